//! Sockets that named a frontend and were given a backend: both addresses.

use bytemuck::{Pod, Zeroable};

use super::{BackendRef, Port, V6};

/// The role of an entry of `sockets`, which determines its key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum SocketRole {
    /// The socket's one connection, of TCP or UDP. The key's address and port are zero.
    Connected = 0,
    /// The destination of datagrams that the socket sends to a frontend. The key has the frontend.
    Sending = 1,
    /// The sender that the socket sees for the backend's datagrams. The key has the backend.
    Receiving = 2,
}

/// Key of `sockets`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct SocketKey {
    /// The kernel's cookie of the socket: never given to another one.
    pub cookie: u64,
    /// IPv6, or IPv4-mapped.
    pub address: V6,
    /// The port that goes with it.
    pub port: Port,
    /// IANA protocol number.
    pub protocol: u8,
    /// A [`SocketRole`].
    pub role: u8,
    /// Zero.
    pub pad: [u8; 4],
}

/// Value of `sockets`. It begins as [`super::Session`] and [`super::Flow`] do: when created, when last used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Socket {
    /// When the socket was sent to this backend, monotonic nanoseconds.
    pub created_ns: u64,
    /// When it connected; or when a datagram last passed, to within [`crate::flow::REFRESH_NS`]. Monotonic nanoseconds.
    pub last_used_ns: u64,
    /// The pin's timeout at the beginning, nanoseconds.
    pub timeout_ns: u64,
    /// The client key: see [`netns_client`].
    pub client: V6,
    /// The frontend that the socket named: IPv6, or IPv4-mapped.
    pub frontend: V6,
    /// The backend that it really has: IPv6, or IPv4-mapped.
    pub peer: V6,
    /// The port of `frontend`.
    pub frontend_port: Port,
    /// The port of `peer`.
    pub peer_port: Port,
    /// The backend.
    pub backend: BackendRef,
    /// The pool that the backend was chosen from.
    pub pool: u32,
    /// Scope of the pin; zero: none.
    pub scope: u32,
    /// The service.
    pub service: u32,
    /// The pin's [`super::Timer`].
    pub timer: u8,
    /// Zero.
    pub pad: [u8; 7],
}

/// The discard prefix 100::/64 of RFC 6666: no packet has such a source.
const DISCARD: [u8; 8] = [1, 0, 0, 0, 0, 0, 0, 0];

/// The client key of all sockets of a network namespace: in the discard prefix, one byte for the family of the frontends (4 or
/// 6), and the namespace's cookie. The pins of both families are in `sessions_v6`.
#[inline(always)]
#[must_use]
pub const fn netns_client(cookie: u64, family: u8) -> V6 {
    let [p0, p1, p2, p3, p4, p5, p6, p7] = DISCARD;
    // Cookies count up from one: the first byte is never needed.
    let [_, c1, c2, c3, c4, c5, c6, c7] = cookie.to_be_bytes();
    V6([p0, p1, p2, p3, p4, p5, p6, p7, family, c1, c2, c3, c4, c5, c6, c7])
}

/// The cookie and the family of a key that [`netns_client`] made; `None` for the address of a client.
#[must_use]
pub fn netns_of(client: V6) -> Option<(u64, u8)> {
    let [prefix @ .., _, _, _, _, _, _, _, _] = client.0;
    let [_, _, _, _, _, _, _, _, family, cookie @ ..] = client.0;
    let [c1, c2, c3, c4, c5, c6, c7] = cookie;
    let is_ours = prefix == DISCARD && (family == 4 || family == 6);
    is_ours.then_some((u64::from_be_bytes([0, c1, c2, c3, c4, c5, c6, c7]), family))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{Address, V4};

    #[test]
    fn a_namespace_is_a_client_that_no_packet_has() {
        let cookie = 0x0012_3456_789a_bcde;
        assert_eq!(netns_client(cookie, 4).0, [1, 0, 0, 0, 0, 0, 0, 0, 4, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde]);
        assert_eq!(netns_of(netns_client(cookie, 4)), Some((cookie, 4)));
        assert_eq!(netns_of(netns_client(1, 6)), Some((1, 6)));
        assert_eq!(netns_of(V6(V4([198, 18, 0, 1]).to_mapped())), None);
        assert_eq!(netns_of(V6([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])), None);
    }
}
