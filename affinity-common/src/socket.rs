//! What happens to a socket: it is translated at `connect()`, so that none of its packets needs translation.
//!
//! A process that connects to a frontend is connected to a backend; `getpeername()` returns the frontend. The client key is the
//! network namespace of the socket ([`netns_client`]): a pod, or the node. Pins, selection and counts are those of
//! [`crate::session`], as for packets.
//!
//! * [`connect`]: a TCP socket, or a connected UDP socket. Its packets go to the backend's address, which is no frontend, so the
//!   packet programs pass them.
//! * [`send`]: a datagram of an unconnected socket. The socket keeps one backend for each frontend, as a flow does, while the
//!   backend is ready; if the frontend has gone, until the backend has gone.
//! * [`received`], [`connected_to`]: the frontend as the sender of a datagram, and as the peer of the socket.
//! * [`release`]: the socket is closed. For the timer `alive` its connection ends here. Its packets are not seen, so only
//!   connecting and [`send`] restart the timer `packet`.
//!
//! IPv4 and IPv4-mapped addresses are the same here: an IPv6 socket that connects to `::ffff:a.b.c.d` gets an IPv4 frontend.

#[cfg(test)]
mod tests;

use bytemuck::Zeroable;

use crate::{
    abi::{
        Address, BackendRef, Direction, Frontend, FrontendKey, Member, MemberKey, Port, RANGES, Reason, SHADOW,
        SessionKey, Socket, SocketKey, SocketRole, Timer, V4, V6, filter_bit, netns_client,
    },
    flow::REFRESH_NS,
    frontend,
    session::{self, Follower, Opening, Resolved},
    tables::{Entry, NotStored, SocketTables, Tables},
};

/// The socket of a system call.
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

    /// The key of the socket's connection.
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

    /// Whether it is a loopback address: only in the node's namespace that is the node.
    #[inline(always)]
    fn is_loopback(&self) -> bool {
        if self.is_ipv4() { V4::from_mapped(self.address.0).is_loopback() } else { self.address.is_loopback() }
    }

    /// Whether it may be a frontend, or a member, by the filter.
    #[inline(always)]
    fn may_be<T: Tables>(&self, tables: &T, direction: Direction, protocol: u8) -> bool {
        let bit = if self.is_ipv4() {
            filter_bit(V4::from_mapped(self.address.0), self.port, protocol)
        } else {
            filter_bit(self.address, self.port, protocol)
        };
        tables.filter(direction, bit)
    }

    /// Copies the record of the frontend with this address. Out of line, to keep stack frames small.
    ///
    /// # Errors
    /// As [`frontend::copy`].
    #[inline(never)]
    fn frontend<T: SocketTables>(&self, tables: &T, protocol: u8, frontend: &mut Frontend) -> Result<(), Reason> {
        if self.is_ipv4() {
            let key = FrontendKey::<V4>::new(V4::from_mapped(self.address.0), self.port, protocol);
            frontend::copy(tables, &key, frontend)
        } else {
            frontend::copy(tables, &FrontendKey::<V6>::new(self.address, self.port, protocol), frontend)
        }
    }
}

/// The answer to a system call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// It proceeds unchanged.
    Leave,
    /// It proceeds with this peer instead.
    Redirect(Peer),
    /// It fails at once: there is no endpoint.
    Reject,
}

/// Handles `connect()`.
#[inline(always)]
pub fn connect<T: SocketTables>(tables: &T, caller: &Caller, to: &Peer) -> Answer {
    // A former connection of the socket ends.
    release(tables, caller);
    if !to.may_be(tables, Direction::Dnat, caller.protocol) {
        return concluded(tables, Answer::Leave, Reason::NotFrontend);
    }
    begin(tables, caller, to, SocketRole::Connected)
}

/// Handles `sendmsg()` with an address.
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

/// Handles `recvmsg()`: the frontend, if the sender is its backend.
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

/// Handles `getpeername()`: the frontend, if the peer is its backend.
#[inline(always)]
pub fn connected_to<T: SocketTables>(tables: &T, caller: &Caller, peer: &Peer) -> Option<Peer> {
    if !peer.may_be(tables, Direction::RevDnat, caller.protocol) {
        return None;
    }
    frontend_of_connection(tables, caller, peer)
}

/// Handles the end of a socket's connection: the socket is closed, or connects again.
#[inline(never)]
pub fn release<T: SocketTables>(tables: &T, caller: &Caller) {
    let key = caller.connection();
    let Some(entry) = tables.socket(&key) else { return };
    if entry.read(Socket::TIMER) == Timer::Alive as u8 && entry.read(Socket::SCOPE) != 0 {
        session::end_connection(tables, &pin_key(&entry), backend_of(&entry), tables.now_ns());
    }
    tables.remove_socket(&key);
}

/// The key of the socket's pin.
#[inline(always)]
fn pin_key(entry: &impl Entry<Socket>) -> SessionKey<V6> {
    SessionKey::new(entry.read(Socket::SCOPE), entry.read(Socket::CLIENT), V6::BITS)
}

/// The socket's backend.
#[inline(always)]
fn backend_of(entry: &impl Entry<Socket>) -> BackendRef {
    BackendRef { index: entry.read(Socket::BACKEND), generation: entry.read(Socket::GENERATION) }
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

/// Whether a datagram may go to the same backend as the one before it: see [`crate::flow`].
#[inline(always)]
fn is_ready<T: SocketTables>(tables: &T, entry: &T::Entry<Socket>) -> bool {
    let BackendRef { index, generation } = backend_of(entry);
    let key = MemberKey { pool: entry.read(Socket::POOL), backend: index };
    let ready = Member::ready(generation, entry.read(Socket::PEER_PORT));
    tables.is_member(&key, &ready) && (entry.read(Socket::SCOPE) == 0 || follows_pin(tables, entry))
}

/// Whether the frontend of a datagram has gone and its backend has not. Then it goes on, as a flow does. Out of line, to keep stack
/// frames small.
#[inline(never)]
fn outlives_frontend<T: SocketTables>(tables: &T, caller: &Caller, to: &Peer, entry: &T::Entry<Socket>) -> bool {
    tables.has_backend(backend_of(entry))
        && to.frontend(tables, caller.protocol, &mut Frontend::zeroed()) == Err(Reason::NotFrontend)
}

/// Whether the socket's pin still has its backend. Out of line, to keep stack frames small.
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

/// Notes once a second that the socket still sends. The end of datagrams cannot be seen, so under `alive` they restart the timer
/// too.
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
        // It was evicted: without it, replies would come from the backend's address. If there is no room, try again in a second.
        let _ = tables.put_socket(&key, &entry.get());
    }
    let timer = Timer::from_byte(entry.read(Socket::TIMER));
    if entry.read(Socket::SCOPE) != 0 && matches!(timer, Timer::Packet | Timer::Alive) {
        let (backend, timeout_ns) = (entry.read(Socket::BACKEND), entry.read(Socket::TIMEOUT_NS));
        session::renew(tables, &pin_key(entry), backend, (timer, timeout_ns), now_ns);
    }
}

/// Opens a connection, or handles the first datagram to a frontend: finds the member and stores it.
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
        // The source address of the packets is not known yet: the packet programs decide.
        return concluded(tables, Answer::Leave, Reason::NotInRanges);
    }
    if frontend.flags & SHADOW != 0 {
        // The packet programs decide and count in shadow mode.
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

/// The result of opening a connection.
struct Opened {
    resolved: Resolved,
    /// The frontend, then the backend.
    peer: Peer,
}

#[inline(always)]
fn client_of(caller: &Caller, frontend: &Peer) -> V6 {
    netns_client(caller.netns, if frontend.is_ipv4() { 4 } else { 6 })
}

/// Finds the backend. Out of line: its stack frame is released before [`remember`] runs.
#[inline(never)]
fn open<T: SocketTables>(tables: &T, caller: &Caller, frontend: &Frontend, opened: &mut Opened) -> Result<(), Reason> {
    let (client, now_ns) = (client_of(caller, &opened.peer), tables.now_ns());
    let opening = Opening { client, frontend, now_ns, draw: tables.random() };
    session::open(tables, &opening, &mut opened.resolved)?;
    let chosen = &opened.resolved.chosen;
    let backend = tables.backend(chosen.backend.index).ok_or(Reason::Inconsistent)?;
    opened.peer = Peer { address: V6(backend.address), port: chosen.port };
    Ok(())
}

/// Stores the frontend and the backend of the socket; for datagrams the entry for replies first.
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
        pool: frontend.pool,
        scope: *scope,
        service: frontend.service,
        timer: frontend.timer,
        pad: [0; 7],
    };
    let stored = if role == SocketRole::Connected {
        if socket.timer == Timer::Alive as u8 && socket.scope != 0 {
            // Before the entry is stored, and so before the connection can end.
            session::add_connection(tables, &SessionKey::new(socket.scope, socket.client, V6::BITS), socket.backend);
        }
        tables.put_socket(&caller.connection(), &socket)
    } else {
        let receiving = tables.put_socket(&caller.key(SocketRole::Receiving, peer), &socket);
        receiving.and_then(|()| tables.put_socket(&caller.key(SocketRole::Sending, asked), &socket))
    };
    stored.map_err(|NotStored| Reason::SocketNotStored)
}
