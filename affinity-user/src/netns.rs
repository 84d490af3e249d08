//! The network namespaces of this machine: those that processes are in, and those with a name.
//!
//! To work inside one, a separate thread enters it and ends there; all other threads stay where they are.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    net::IpAddr,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::PathBuf,
    thread,
};

use rtnetlink::{
    packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage},
    },
    sys::{Socket, protocols::NETLINK_ROUTE},
};
use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::sys;

/// The directory where `ip netns` and container runtimes keep names.
const NAMED: &str = "/run/netns";

/// A network namespace.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// The namespace of this process.
    ///
    /// # Errors
    /// The system's error.
    pub fn own() -> io::Result<Self> {
        File::open("/proc/self/ns/net").map(Self)
    }

    /// Runs `work` inside, on a separate thread, and waits for it.
    ///
    /// # Errors
    /// The system's error if the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(work())
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Its cookie.
    ///
    /// # Errors
    /// The system's error.
    pub fn cookie(&self) -> io::Result<u64> {
        self.run(cookie_of_thread)?
    }

    /// Its addresses, including those for the host's own use (loopback, link-local).
    ///
    /// # Errors
    /// The system's error.
    pub fn addresses(&self) -> io::Result<BTreeSet<IpAddr>> {
        self.run(addresses_of_thread)?
    }
}

/// All visible namespaces, each once. A process in a container without the host's processes sees few.
#[must_use]
pub fn all() -> Vec<Namespace> {
    let mut seen = BTreeMap::new();
    for path in paths() {
        // Processes and names may come and go meanwhile.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        let place = seen.entry((metadata.dev(), metadata.ino())).or_insert(None);
        if place.is_none() {
            *place = File::open(&path).ok();
        }
    }
    seen.into_values().flatten().map(Namespace).collect()
}

fn paths() -> Vec<PathBuf> {
    let names = |dir: &str| -> Vec<PathBuf> {
        fs::read_dir(dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect()
    };
    let is_process = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
    };
    let processes = names("/proc").into_iter().filter(is_process).map(|process| process.join("ns/net"));
    processes.chain(names(NAMED)).collect()
}

fn cookie_of_thread() -> io::Result<u64> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    sys::netns_cookie(socket.as_fd()).map_err(|error| error.source)
}

fn addresses_of_thread() -> io::Result<BTreeSet<IpAddr>> {
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetAddress(AddressMessage::default()));
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut addresses = BTreeSet::new();
    dump(NETLINK_ROUTE, request, |message| {
        if let RouteNetlinkMessage::NewAddress(AddressMessage { attributes, .. }) = message {
            addresses.extend(attributes.into_iter().filter_map(|attribute| {
                if let AddressAttribute::Address(address) = attribute { Some(address) } else { None }
            }));
        }
    })?;
    Ok(addresses)
}

/// Requests a list from the kernel, on the calling thread, and visits its entries.
///
/// # Errors
/// The system's error, or the kernel's.
pub(crate) fn dump<M>(protocol: isize, mut request: NetlinkMessage<M>, mut visit: impl FnMut(M)) -> io::Result<()>
where
    M: rtnetlink::packet_core::NetlinkSerializable + rtnetlink::packet_core::NetlinkDeserializable,
{
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    send(&socket, &mut request)?;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut at = 0;
        while at < bytes.len() {
            let message = NetlinkMessage::<M>::deserialize(&bytes[at..]).map_err(io::Error::other)?;
            let len = (message.header.length as usize).next_multiple_of(4);
            #[expect(clippy::wildcard_enum_match_arm, reason = "overruns and no-ops carry nothing")]
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(message) => visit(message),
                _ => {}
            }
            at += len.max(1);
        }
    }
}

/// Sends one message.
///
/// # Errors
/// The system's error.
pub(crate) fn send<M>(socket: &Socket, message: &mut NetlinkMessage<M>) -> io::Result<()>
where
    M: rtnetlink::packet_core::NetlinkSerializable,
{
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_namespace_is_among_all() {
        let own = Namespace::own().unwrap().0.metadata().unwrap();
        assert!(all().iter().any(|namespace| {
            namespace.0.metadata().is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == (own.dev(), own.ino()))
        }));
    }
}
