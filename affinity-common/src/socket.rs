//! The story of a socket: translation at `connect()`, so that no packet needs any.
//!
//! A process that connects to a frontend is connected to a backend instead, and is told that it speaks to the frontend.
//! The client key is the network namespace that the socket belongs to ([`netns_client`]): a pod, or the node itself. Pins,
//! selection and counts are those of [`crate::session`], as for packets.
//!
//! * [`connect`]: a TCP socket, or a UDP socket that will speak to one peer. Its packets go to the backend's address, which
//!   is no frontend, so the packet programs leave them alone.
//! * [`send`]: a datagram to a named peer. One socket keeps to one backend for each frontend, as a flow does, until that
//!   one is no longer ready; where the frontend has gone, until the backend has.
//! * [`received`], [`connected_to`]: whom a datagram is from, and whom the socket is connected to, as it asked for them.
//! * [`release`]: the socket is closed. For the timer `alive` its connection ends here; nothing is seen of its packets, so
//!   the timer `packet` is restarted by connecting and by [`send`] alone.
//!
//! IPv4 and IPv4-mapped addresses are one here: an IPv6 socket that asks for `::ffff:a.b.c.d` asks for an IPv4 frontend.

#[cfg(test)]
mod tests;

use bytemuck::Zeroable;

use crate::{
    abi::{
        Address, Direction, Frontend, FrontendKey, MEMBER_READY, Member, MemberKey, Port, RANGES, Reason, SHADOW,
        SessionKey, Socket, SocketKey, SocketRole, Timer, V4, V6, filter_bit, netns_client,
    },
    flow::REFRESH_NS,
    pipeline::copy_frontend,
    session::{self, Follower, Opening, Resolved},
    tables::{Entry, NotStored, SocketTables, Tables},
};

/// The socket that a process has made a call on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    /// The socket's cookie.
    pub cookie: u64,
    /// The cookie of its network namespace.
    pub netns: u64,
    /// IANA protocol number: TCP or UDP.
    pub protocol: u8,
}

impl Caller {
    #[inline(always)]
    fn key(&self, role: SocketRole, peer: &Peer) -> SocketKey {
        let Peer { address, port } = *peer;
        SocketKey { cookie: self.cookie, address, port, protocol: self.protocol, role: role as u8, pad: [0; 4] }
    }

    /// Of the socket's one connection.
    #[inline(always)]
    fn connection(&self) -> SocketKey {
        self.key(SocketRole::Connected, &Peer { address: V6([0; 16]), port: Port([0; 2]) })
    }
}

/// The other end of a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// IPv6, or IPv4-mapped.
    pub address: V6,
    /// The port.
    pub port: Port,
}

impl Peer {
    #[inline(always)]
    fn is_ipv4(&self) -> bool {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = self.address.0;
        u64::from_ne_bytes([a, b, c, d, e, f, g, h]) == 0 && [i, j, k, l] == [0, 0, 0xff, 0xff]
    }

    /// Whether it is the namespace itself, which is the node for the node's processes alone.
    #[inline(always)]
    fn is_loopback(&self) -> bool {
        if self.is_ipv4() { V4::from_mapped(self.address.0).is_loopback() } else { self.address.is_loopback() }
    }

    /// Whether the filter knows it: as a frontend, or as a member.
    #[inline(always)]
    fn may_be<T: Tables>(&self, tables: &T, direction: Direction, protocol: u8) -> bool {
        let bit = if self.is_ipv4() {
            filter_bit(V4::from_mapped(self.address.0), self.port, protocol)
        } else {
            filter_bit(self.address, self.port, protocol)
        };
        tables.filter(direction, bit)
    }

    /// Copies the record of the frontend that this is. Apart, for the sake of the stack.
    ///
    /// # Errors
    /// As [`copy_frontend`].
    #[inline(never)]
    fn frontend<T: SocketTables>(&self, tables: &T, protocol: u8, frontend: &mut Frontend) -> Result<(), Reason> {
        if self.is_ipv4() {
            let key = FrontendKey::<V4>::new(V4::from_mapped(self.address.0), self.port, protocol);
            copy_frontend(tables, &key, frontend)
        } else {
            copy_frontend(tables, &FrontendKey::<V6>::new(self.address, self.port, protocol), frontend)
        }
    }
}

/// What a call is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// It goes on as it is.
    Leave,
    /// It goes on with this peer in place of the one that was asked for.
    Redirect(Peer),
    /// It fails at once: nobody is there.
    Reject,
}

/// A socket connects.
#[inline(always)]
pub fn connect<T: SocketTables>(tables: &T, caller: &Caller, to: &Peer) -> Answer {
    // Whatever it was connected to, it is so no longer.
    release(tables, caller);
    if !to.may_be(tables, Direction::Dnat, caller.protocol) {
        return concluded(tables, Answer::Leave, Reason::NotFrontend);
    }
    begin(tables, caller, to, SocketRole::Connected)
}

/// A socket sends a datagram to a peer that it names.
#[inline(always)]
pub fn send<T: SocketTables>(tables: &T, caller: &Caller, to: &Peer) -> Answer {
    if !to.may_be(tables, Direction::Dnat, caller.protocol) {
        return concluded(tables, Answer::Leave, Reason::NotFrontend);
    }
    if let Some(entry) = tables.socket(&caller.key(SocketRole::Sending, to))
        && (is_ready(tables, &entry) || outlives_frontend(tables, caller, to, &entry))
    {
        let peer = peer_of(&entry);
        note_datagram(tables, caller, &entry);
        return concluded(tables, Answer::Redirect(peer), Reason::Established);
    }
    begin(tables, caller, to, SocketRole::Sending)
}

/// A socket has received a datagram, and asks from whom: the frontend, where it is from that one's backend.
#[inline(always)]
pub fn received<T: SocketTables>(tables: &T, caller: &Caller, from: &Peer) -> Option<Peer> {
    let frontend = if !from.may_be(tables, Direction::RevDnat, caller.protocol) {
        None
    } else if let Some(entry) = tables.socket(&caller.key(SocketRole::Receiving, from)) {
        let now_ns = tables.now_ns();
        if is_stale(&entry, now_ns) {
            entry.write(Socket::LAST_USED_NS, now_ns);
        }
        Some(frontend_of(&entry))
    } else {
        frontend_of_connection(tables, caller, from)
    };
    tables.conclude(if frontend.is_some() { Reason::Reply } else { Reason::NotReply });
    frontend
}

/// A process asks whom its socket is connected to: the frontend, where that is one's backend.
#[inline(always)]
pub fn connected_to<T: SocketTables>(tables: &T, caller: &Caller, peer: &Peer) -> Option<Peer> {
    if !peer.may_be(tables, Direction::RevDnat, caller.protocol) {
        return None;
    }
    frontend_of_connection(tables, caller, peer)
}

/// A socket is closed, or connects anew.
#[inline(never)]
pub fn release<T: SocketTables>(tables: &T, caller: &Caller) {
    let key = caller.connection();
    let Some(entry) = tables.socket(&key) else { return };
    if entry.read(Socket::TIMER) == Timer::Alive as u8 && entry.read(Socket::SCOPE) != 0 {
        session::end_connection(tables, &pin_key(&entry), backend_of(&entry), tables.now_ns());
    }
    tables.remove_socket(&key);
}

/// The key of the pin of a socket that has one.
#[inline(always)]
fn pin_key(entry: &impl Entry<Socket>) -> SessionKey<V6> {
    SessionKey::new(entry.read(Socket::SCOPE), entry.read(Socket::CLIENT), V6::BITS)
}

/// The socket's backend and its generation.
#[inline(always)]
fn backend_of(entry: &impl Entry<Socket>) -> (u32, u32) {
    (entry.read(Socket::BACKEND), entry.read(Socket::GENERATION))
}

#[inline(always)]
fn concluded<T: Tables>(tables: &T, answer: Answer, reason: Reason) -> Answer {
    tables.conclude(reason);
    answer
}

#[inline(always)]
fn peer_of(entry: &impl Entry<Socket>) -> Peer {
    Peer { address: entry.read(Socket::PEER), port: entry.read(Socket::PEER_PORT) }
}

#[inline(always)]
fn frontend_of(entry: &impl Entry<Socket>) -> Peer {
    Peer { address: entry.read(Socket::FRONTEND), port: entry.read(Socket::FRONTEND_PORT) }
}

#[inline(always)]
fn frontend_of_connection<T: SocketTables>(tables: &T, caller: &Caller, peer: &Peer) -> Option<Peer> {
    let entry = tables.socket(&caller.connection())?;
    (peer_of(&entry) == *peer).then(|| frontend_of(&entry))
}

/// A datagram has no connection to lose: it goes where new ones would be allowed to go, to the port that is served there now,
/// and where its client's pin leads.
#[inline(always)]
fn is_ready<T: SocketTables>(tables: &T, entry: &T::Entry<Socket>) -> bool {
    let (backend, generation) = backend_of(entry);
    let key = MemberKey { pool: entry.read(Socket::POOL), backend };
    let ready = Member { generation, port: entry.read(Socket::PEER_PORT), state: MEMBER_READY, pad: 0 };
    tables.is_member(&key, &ready) && (entry.read(Socket::SCOPE) == 0 || follows_pin(tables, entry))
}

/// Whether the frontend of a datagram has gone, and its backend has not: as with a flow, it goes on. Apart, for the sake of
/// the stack.
#[inline(never)]
fn outlives_frontend<T: SocketTables>(tables: &T, caller: &Caller, to: &Peer, entry: &T::Entry<Socket>) -> bool {
    let (backend, generation) = backend_of(entry);
    tables.backend(backend).is_some_and(|backend| backend.generation == generation)
        && to.frontend(tables, caller.protocol, &mut Frontend::zeroed()) == Err(Reason::NotFrontend)
}

/// Whether the socket's pin still leads to its backend. Apart, for the sake of the stack.
#[inline(never)]
fn follows_pin<T: SocketTables>(tables: &T, entry: &T::Entry<Socket>) -> bool {
    let follower = Follower {
        to: backend_of(entry),
        timer: Timer::from_byte(entry.read(Socket::TIMER)),
        timeout_ns: entry.read(Socket::TIMEOUT_NS),
        created_ns: entry.read(Socket::CREATED_NS),
        last_used_ns: entry.read(Socket::LAST_USED_NS),
    };
    session::leads(tables, &pin_key(entry), &follower)
}

#[inline(always)]
fn is_stale(entry: &impl Entry<Socket>, now_ns: u64) -> bool {
    now_ns.saturating_sub(entry.read(Socket::LAST_USED_NS)) >= REFRESH_NS
}

/// Once a second, notes that the socket still sends; a datagram's end cannot be seen, so under `alive` too its datagrams
/// stand for its life.
#[inline(always)]
fn note_datagram<T: SocketTables>(tables: &T, caller: &Caller, entry: &T::Entry<Socket>) {
    let now_ns = tables.now_ns();
    if is_stale(entry, now_ns) {
        renew(tables, caller, entry, now_ns);
    }
}

#[inline(never)]
fn renew<T: SocketTables>(tables: &T, caller: &Caller, entry: &T::Entry<Socket>, now_ns: u64) {
    entry.write(Socket::LAST_USED_NS, now_ns);
    let key = caller.key(SocketRole::Receiving, &peer_of(entry));
    if tables.socket(&key).is_none() {
        // Evicted: without it replies would come from a stranger. Where there is no room the next second tries again.
        let _ = tables.put_socket(&key, &entry.get());
    }
    let timer = Timer::from_byte(entry.read(Socket::TIMER));
    if entry.read(Socket::SCOPE) != 0 && matches!(timer, Timer::Packet | Timer::Alive) {
        let (backend, timeout_ns) = (entry.read(Socket::BACKEND), entry.read(Socket::TIMEOUT_NS));
        session::renew(tables, &pin_key(entry), backend, (timer, timeout_ns), now_ns);
    }
}

/// A new connection, or the first datagram to a frontend: finds the member and remembers it.
#[inline(always)]
fn begin<T: SocketTables>(tables: &T, caller: &Caller, to: &Peer, role: SocketRole) -> Answer {
    if to.is_loopback() && caller.netns != tables.node_netns() {
        return concluded(tables, Answer::Leave, Reason::NotFrontend);
    }
    let mut frontend = Frontend::zeroed();
    match to.frontend(tables, caller.protocol, &mut frontend) {
        Ok(()) => {}
        Err(Reason::NotFrontend) => return concluded(tables, Answer::Leave, Reason::NotFrontend),
        Err(reason) => return concluded(tables, Answer::Reject, reason),
    }
    let frontend = &frontend;
    if frontend.flags & RANGES != 0 {
        // What the packets' source will be is not known yet: they are decided about where they enter a device.
        return concluded(tables, Answer::Leave, Reason::NotInRanges);
    }
    if frontend.flags & SHADOW != 0 {
        // Its packets are decided about where they enter a device, and counted there.
        return concluded(tables, Answer::Leave, Reason::Shadow);
    }
    let mut opened = Opened { resolved: Resolved::NOTHING, peer: *to };
    let done = open(tables, caller, frontend, &mut opened)
        .and_then(|()| remember(tables, caller, frontend, (to, role), &opened));
    match done {
        Ok(()) => concluded(tables, Answer::Redirect(opened.peer), opened.resolved.reason),
        Err(reason) => concluded(tables, Answer::Reject, reason),
    }
}

/// What came of a new connection.
struct Opened {
    resolved: Resolved,
    /// The frontend that was asked for; then the backend.
    peer: Peer,
}

#[inline(always)]
fn client_of(caller: &Caller, frontend: &Peer) -> V6 {
    netns_client(caller.netns, if frontend.is_ipv4() { 4 } else { 6 })
}

/// Finds the backend. Apart, because what it needs of the stack is free again when the socket is remembered.
#[inline(never)]
fn open<T: SocketTables>(tables: &T, caller: &Caller, frontend: &Frontend, opened: &mut Opened) -> Result<(), Reason> {
    let (client, now_ns) = (client_of(caller, &opened.peer), tables.now_ns());
    let opening = Opening { client, frontend, now_ns, draw: tables.random() };
    session::open(tables, &opening, &mut opened.resolved)?;
    let chosen = &opened.resolved.chosen;
    let backend = tables.backend(chosen.backend).ok_or(Reason::Inconsistent)?;
    opened.peer = Peer { address: V6(backend.address), port: chosen.member.port };
    Ok(())
}

/// Stores what the socket asked for and whom it got; of datagrams what replies need first.
#[inline(never)]
fn remember<T: SocketTables>(
    tables: &T,
    caller: &Caller,
    frontend: &Frontend,
    (asked, role): (&Peer, SocketRole),
    opened: &Opened,
) -> Result<(), Reason> {
    let Opened { resolved: Resolved { chosen, scope, .. }, peer } = opened;
    let now_ns = tables.now_ns();
    let socket = Socket {
        created_ns: now_ns,
        last_used_ns: now_ns,
        timeout_ns: frontend.timeout_ns,
        client: client_of(caller, asked),
        frontend: asked.address,
        peer: peer.address,
        frontend_port: asked.port,
        peer_port: peer.port,
        backend: chosen.backend,
        generation: chosen.member.generation,
        pool: frontend.pool,
        scope: *scope,
        service: frontend.service,
        timer: frontend.timer,
        pad: [0; 7],
    };
    let stored = if role == SocketRole::Connected {
        if socket.timer == Timer::Alive as u8 && socket.scope != 0 {
            // Before the entry is there, and so before it can end.
            session::add_connection(
                tables,
                &SessionKey::new(socket.scope, socket.client, V6::BITS),
                (socket.backend, socket.generation),
            );
        }
        tables.put_socket(&caller.connection(), &socket)
    } else {
        let receiving = tables.put_socket(&caller.key(SocketRole::Receiving, peer), &socket);
        receiving.and_then(|()| tables.put_socket(&caller.key(SocketRole::Sending, asked), &socket))
    };
    stored.map_err(|NotStored| Reason::SocketNotStored)
}
