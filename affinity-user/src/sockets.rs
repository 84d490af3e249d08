//! Closes sockets with a backend that has gone, so that their processes notice at once.
//!
//! A translated socket sends to its backend for as long as it lives, and its packets pass no program. So when a backend goes,
//! the agent asks the kernel to end the sockets that are connected to it (`SOCK_DESTROY`): TCP sockets, and connected UDP
//! sockets. UDP follows its pool too: a backend that is only not ready any more, or serves another port, loses its connected
//! UDP sockets. TCP continues with a backend that drains or lingers, and so does UDP if the service has gone. Sockets that are
//! not connected need none of this: their next datagram selects again.
//!
//! Only sockets that the programs have noted are ended, identified by their cookie and peer. A separate thread looks for them
//! in every visible network namespace; the agent does not wait for it.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::Path,
    sync::mpsc::{Receiver, Sender, channel},
    time::Duration,
};

use affinity_common::{
    abi::{Member, MemberKey, Socket, SocketKey, SocketRole},
    headers::TCP,
};
use netlink_packet_sock_diag::{
    SockDiagDestroy, SockDiagMessage,
    constants::{AF_INET, AF_INET6},
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla},
};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    sys::{Socket as Netlink, protocols::NETLINK_SOCK_DIAG},
};
use tracing::{debug, error, info};

use crate::{
    netns,
    store::{
        StoreError,
        kernel::{KernelStore, OpenError},
    },
    threads,
};

/// Sockets cannot be closed.
#[derive(Debug, thiserror::Error)]
pub enum CloseError {
    /// The dataplane cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A map cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The thread that closes sockets. It ends when this is dropped.
#[derive(Debug)]
pub struct SocketDestroyer(Sender<()>);

impl SocketDestroyer {
    /// Starts the thread. It looks at once, because backends may have gone before.
    ///
    /// # Errors
    /// The system's error if no thread can be started.
    pub fn start(pin_dir: &Path) -> io::Result<Self> {
        let (sender, receiver) = channel();
        let pin_dir = pin_dir.to_owned();
        threads::spawn("sockets", move || follow(&pin_dir, &receiver))?;
        let socket_destroyer = Self(sender);
        socket_destroyer.backends_left();
        Ok(socket_destroyer)
    }

    /// Backends have gone, are no longer ready, or serve another port.
    pub fn backends_left(&self) {
        // If the thread has ended, it has logged why.
        let _ = self.0.send(());
    }
}

fn follow(pin_dir: &Path, wakes: &Receiver<()>) {
    while wakes.recv().is_ok() {
        // One look serves all requests until now.
        while wakes.try_recv().is_ok() {}
        match close_lost(pin_dir) {
            Ok(0) => {}
            Ok(closed) => info!("sockets: closed {closed} connections to pods that are gone"),
            Err(error) => error!("cannot close sockets of pods that are gone: {error}"),
        }
    }
}

/// Connected sockets that the programs have noted, by cookie.
pub(crate) type Noted = BTreeMap<u64, (SocketKey, Socket)>;

/// Closes every socket that has lost its backend, and returns their number.
///
/// # Errors
/// [`CloseError`] if the maps cannot be read. A namespace that cannot be entered is left out.
pub fn close_lost(pin_dir: &Path) -> Result<usize, CloseError> {
    let store = KernelStore::open(pin_dir)?;
    let lost = lost(&store)?;
    if lost.is_empty() {
        return Ok(0);
    }
    let mut closed = 0;
    for namespace in netns::all() {
        match namespace.run(|| close_here(&lost)) {
            Ok(Ok(cookies)) => {
                closed += cookies.len();
                for (key, _) in cookies.iter().filter_map(|cookie| lost.get(cookie)) {
                    store.sockets.remove(key)?;
                }
            }
            // The namespace may have ended meanwhile.
            Ok(Err(error)) | Err(error) => debug!("sockets of {namespace:?}: {error}"),
        }
    }
    Ok(closed)
}

fn lost(store: &KernelStore) -> Result<Noted, StoreError> {
    let mut lost = Noted::new();
    for entry in &store.sockets {
        let (key, socket) = entry?;
        if key.role == SocketRole::Connected as u8 && !is_kept(store, &key, &socket)? {
            lost.insert(key.cookie, (key, socket));
        }
    }
    Ok(lost)
}

fn is_kept(store: &KernelStore, key: &SocketKey, socket: &Socket) -> Result<bool, StoreError> {
    let &Socket { pool, backend, frontend, frontend_port, .. } = socket;
    if !store.follows_pool(key.protocol, frontend, frontend_port)? {
        return Ok(store.is_alive(backend));
    }
    let ready = Member::ready(backend.generation, socket.peer_port);
    Ok(store.members.get(&MemberKey { pool, backend: backend.index })? == Some(ready))
}

/// The state of a TCP socket's connection, as its kernel sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Pulse {
    /// Whether it has retransmitted several times, and nothing has come back since.
    pub(crate) is_unanswered: bool,
    /// How long nothing has come back.
    pub(crate) answered_ago: Duration,
}

impl Pulse {
    /// From a `struct tcp_info` (<https://elixir.bootlin.com/linux/v6.1/source/include/uapi/linux/tcp.h>).
    fn of(info: &[u8]) -> Option<Self> {
        const RETRANSMITS: usize = 2;
        const LAST_DATA_RECV_MS: usize = 52;
        const LAST_ACK_RECV_MS: usize = 56;
        let word = |at: usize| info.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
        let answered_ago = Duration::from_millis(word(LAST_DATA_RECV_MS)?.min(word(LAST_ACK_RECV_MS)?).into());
        Some(Self { is_unanswered: *info.get(RETRANSMITS)? >= RETRANSMISSIONS, answered_ago })
    }
}

/// At least this many times: with the shortest retransmission timers that is a little more than three seconds.
const RETRANSMISSIONS: u8 = 4;

/// The state of these sockets' connections, by cookie. A namespace that cannot be entered is left out.
pub(crate) fn pulses(wanted: &Noted) -> BTreeMap<u64, Pulse> {
    let mut pulses = BTreeMap::new();
    for namespace in netns::all() {
        if let Ok(Err(error)) | Err(error) = namespace.run(|| take_pulses(wanted, &mut pulses)) {
            debug!("sockets of {namespace:?}: {error}");
        }
    }
    pulses
}

fn take_pulses(wanted: &Noted, pulses: &mut BTreeMap<u64, Pulse>) -> io::Result<()> {
    for family in [AF_INET, AF_INET6] {
        list(family, TCP, ExtensionFlags::INFO, |response| {
            let id = &response.header.socket_id;
            let info =
                response.nlas.iter().find_map(|nla| if let Nla::TcpInfo(info) = nla { Some(info) } else { None });
            let pulse = info.filter(|_| is_among(wanted, id)).and_then(|info| Pulse::of(info));
            pulses.extend(pulse.map(|pulse| (cookie(id), pulse)));
        })?;
    }
    Ok(())
}

/// Visits the sockets of a protocol in the calling thread's namespace.
fn list(family: u8, protocol: u8, extensions: ExtensionFlags, mut visit: impl FnMut(&InetResponse)) -> io::Result<()> {
    let request = InetRequest {
        family,
        protocol,
        extensions,
        states: StateFlags::all() - StateFlags::LISTEN - StateFlags::TIME_WAIT,
        socket_id: if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() },
    };
    let mut dump = NetlinkMessage::from(SockDiagMessage::InetRequest(request));
    dump.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    netns::dump(NETLINK_SOCK_DIAG, dump, |message| {
        if let SockDiagMessage::InetResponse(response) = message {
            visit(&response);
        }
    })
}

/// Closes the lost sockets in the calling thread's namespace, and returns their cookies.
fn close_here(lost: &Noted) -> io::Result<Vec<u64>> {
    let mut closed = Vec::new();
    let protocols: std::collections::BTreeSet<u8> = lost.values().map(|(key, _)| key.protocol).collect();
    for protocol in protocols {
        for family in [AF_INET, AF_INET6] {
            let mut found = Vec::new();
            list(family, protocol, ExtensionFlags::empty(), |response| {
                if is_among(lost, &response.header.socket_id) {
                    found.push(response.header.socket_id.clone());
                }
            })?;
            for id in found {
                let cookie = cookie(&id);
                if close(family, protocol, id)? {
                    closed.push(cookie);
                }
            }
        }
    }
    Ok(closed)
}

fn is_among(noted: &Noted, id: &SocketId) -> bool {
    let Some((_, socket)) = noted.get(&cookie(id)) else { return false };
    let peer = SocketAddr::new(IpAddr::from(Ipv6Addr::from(socket.peer.0)).to_canonical(), socket.peer_port.get());
    SocketAddr::new(id.destination_address.to_canonical(), id.destination_port) == peer
}

/// Two native words, the lower one first.
fn cookie(id: &SocketId) -> u64 {
    let [a, b, c, d, e, f, g, h] = id.cookie;
    u64::from(u32::from_ne_bytes([a, b, c, d])) | u64::from(u32::from_ne_bytes([e, f, g, h])) << 32
}

/// Ends one socket of the calling thread's namespace; false if it was already gone.
fn close(family: u8, protocol: u8, socket_id: SocketId) -> io::Result<bool> {
    let request =
        InetRequest { family, protocol, extensions: ExtensionFlags::empty(), states: StateFlags::all(), socket_id };
    let destroy = SockDiagDestroy::new(SockDiagMessage::InetRequest(request));
    let mut message = NetlinkMessage::new(Default::default(), NetlinkPayload::InnerMessage(destroy));
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut netlink = Netlink::new(NETLINK_SOCK_DIAG)?;
    netlink.bind_auto()?;
    netns::send(&netlink, &mut message)?;
    let (bytes, _) = netlink.recv_from_full()?;
    let answer = NetlinkMessage::<SockDiagMessage>::deserialize(&bytes).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::Error(error) => match error.code {
            None => Ok(true),
            Some(_) if error.to_io().raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Some(_) => Err(error.to_io()),
        },
        NetlinkPayload::Done(_)
        | NetlinkPayload::Noop
        | NetlinkPayload::Overrun(_)
        | NetlinkPayload::InnerMessage(_)
        | _ => Err(io::Error::other("the kernel answered SOCK_DESTROY with something else than an error number")),
    }
}
