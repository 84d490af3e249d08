//! The sweep of sockets: connections that keep a pin alive, and datagram entries that have become idle.

use affinity_common::{
    abi::{Address, FLOW_ANSWERED, FrontendKey, Port, Socket, SocketKey, SocketRole, Timer, V4, V6},
    headers::UDP,
};

use super::{Sweeper, expiry::flow_is_over, filter::FilterUse};
use crate::store::{StoreError, kernel::Walk};

impl Sweeper {
    /// Processes one batch of sockets; false at their end. The programs remove a connection's entry when its socket closes.
    pub(super) fn sockets(&mut self, walk: &mut Walk, now_ns: u64) -> Result<bool, StoreError> {
        let Some(batch) = self.store.sockets.next_batch(walk)? else { return Ok(false) };
        for (key, socket) in batch {
            if key.role != SocketRole::Connected as u8 && self.is_silent(&key, &socket, now_ns)? {
                self.store.sockets.remove(&key)?;
                self.totals.flows += 1;
                continue;
            }
            self.pass.met.extend([socket.service, socket.pool, socket.scope]);
            need_frontend(&mut self.filter, socket.frontend, socket.frontend_port, key.protocol);
            self.filter.need_member(socket.peer.0, socket.peer_port, key.protocol);
            if key.role != SocketRole::Receiving as u8 {
                self.watch.note_socket(&self.store, &key, &socket)?;
            }
            let counts = socket.timer == Timer::Alive as u8 && socket.scope != 0;
            if counts && key.role == SocketRole::Connected as u8 {
                let session = (socket.client.0, socket.scope, socket.backend);
                *self.pass.connections.entry(session).or_default() += 1;
            }
        }
        Ok(true)
    }

    /// Whether a socket has sent and received no datagram for long: each direction renews only its own entry.
    fn is_silent(&self, key: &SocketKey, socket: &Socket, now_ns: u64) -> Result<bool, StoreError> {
        let lives = self.pass.lives(socket.backend);
        // It is unknown whether there was an answer. It is assumed, because most senders wait for one.
        let over =
            |socket: &Socket| flow_is_over(UDP, FLOW_ANSWERED, now_ns.saturating_sub(socket.last_used_ns), lives);
        // Looks it up again: a datagram may have passed since the batch was read.
        let again = self.store.sockets.get(key)?.unwrap_or(*socket);
        if !over(&again) {
            return Ok(false);
        }
        let other = self.store.sockets.get(&other_way(key, socket))?;
        let other = other
            .filter(|other| (other.backend, other.backend.generation) == (socket.backend, socket.backend.generation));
        Ok(other.is_none_or(|other| over(&other)))
    }
}

/// The key of the opposite direction of the same datagrams.
fn other_way(key: &SocketKey, socket: &Socket) -> SocketKey {
    let (address, port, role) = if key.role == SocketRole::Sending as u8 {
        (socket.peer, socket.peer_port, SocketRole::Receiving)
    } else {
        (socket.frontend, socket.frontend_port, SocketRole::Sending)
    };
    SocketKey { address, port, role: role as u8, ..*key }
}

/// Marks a frontend. Its address is hashed in its own family.
fn need_frontend(filter: &mut FilterUse, address: V6, port: Port, protocol: u8) {
    let v4 = V4::from_mapped(address.0);
    if v4.to_mapped() == address.0 {
        filter.need_frontend(&FrontendKey::new(v4, port, protocol));
    } else {
        filter.need_frontend(&FrontendKey::new(address, port, protocol));
    }
}
