//! Flows: the translation of a connection, with one record for each direction.

use bytemuck::Zeroable;

use super::{Address, BackendRef, Port, SECOND_NS};

/// The translation that a record of a flow describes. A connection has the first two, and the last two if its source is
/// masqueraded as well.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Direction {
    /// Client to frontend: the destination becomes the backend.
    Dnat = 0,
    /// Backend to client: the source becomes the frontend.
    RevDnat = 1,
    /// Client to backend, after [`Direction::Dnat`]: the source becomes the node.
    Snat = 2,
    /// Backend to node: the destination becomes the client.
    RevSnat = 3,
}

/// Key of `flows_v4` and `flows_v6`: the packet's addresses and ports before translation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Zeroable)]
#[repr(C, align(8))]
pub struct FlowKey<A> {
    /// Source address.
    pub saddr: A,
    /// Destination address.
    pub daddr: A,
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
    /// IANA protocol number.
    pub protocol: u8,
    /// A [`Direction`].
    pub direction: u8,
    /// Zero.
    pub pad: [u8; 2],
}

/// A [`FlowKey`] as it is stored.
#[derive(Clone, Copy, Zeroable)]
#[repr(C, align(8))]
pub(super) struct KeyWords<A> {
    saddr: A,
    daddr: A,
    ports: u32,
    kind: u32,
}

impl<A: Address> FlowKey<A> {
    /// The key of a packet with these first four bytes of its transport header. The kernel loads words to hash a key, and a load of a
    /// word that was just stored in parts has to wait for the stores; so the ports are stored as one word, and the rest as another.
    #[inline(always)]
    #[must_use]
    pub fn of_packet(saddr: A, daddr: A, ports: [u8; 4], protocol: u8, direction: Direction) -> Self {
        let kind = u32::from_ne_bytes([protocol, direction as u8, 0, 0]);
        bytemuck::must_cast(KeyWords { saddr, daddr, ports: u32::from_ne_bytes(ports), kind })
    }

    /// The key of a packet after its translation.
    #[inline(always)]
    #[must_use]
    pub fn translated(edit: &Edit<A>, protocol: u8, direction: Direction) -> Self {
        let Edit { saddr, daddr, sport, dport, .. } = *edit;
        Self { saddr, daddr, sport, dport, protocol, direction: direction as u8, pad: [0; 2] }
    }

    /// Whether the client sent the packet.
    #[inline(always)]
    #[must_use]
    pub const fn is_from_client(&self) -> bool {
        self.direction & 1 == 0
    }

    /// Whether the packet arrives on a device; otherwise it leaves one.
    #[inline(always)]
    #[must_use]
    pub const fn is_entering(&self) -> bool {
        self.direction == Direction::Dnat as u8 || self.direction == Direction::RevSnat as u8
    }

    /// The key of a reply to the untranslated packet.
    #[inline(always)]
    #[must_use]
    pub const fn reply(&self) -> Self
    where
        A: Copy,
    {
        Self {
            saddr: self.daddr,
            daddr: self.saddr,
            sport: self.dport,
            dport: self.sport,
            protocol: self.protocol,
            direction: self.direction ^ 1,
            pad: [0; 2],
        }
    }

    /// The key of the opposite direction, given the translation of this one.
    #[inline(always)]
    #[must_use]
    pub fn opposite(&self, edit: &Edit<A>) -> Self {
        let Edit { saddr, daddr, sport, dport, .. } = *edit;
        Self { saddr, daddr, sport, dport, ..*self }.reply()
    }
}

/// The translation of a packet: new addresses and ports, and the change of its checksums.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Zeroable)]
#[repr(C, align(8))]
pub struct Edit<A> {
    /// New source address.
    pub saddr: A,
    /// New destination address.
    pub daddr: A,
    /// New source port.
    pub sport: Port,
    /// New destination port.
    pub dport: Port,
    /// One's complement difference of the addresses: for the IPv4 header and the pseudo-header.
    pub addr_delta: u16,
    /// One's complement difference of the ports.
    pub port_delta: u16,
}

/// Value of `flows_v4` and `flows_v6`. For IPv4 it has 64 bytes: with its key and what the kernel stores before that, an entry of
/// the map has 128, so a lookup reads two cache lines.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Zeroable)]
#[repr(C)]
pub struct Flow<A> {
    /// When the flow began, monotonic nanoseconds.
    pub created_ns: u64,
    /// When a packet last passed, monotonic nanoseconds, to within [`crate::flow::REFRESH_NS`].
    pub last_used_ns: u64,
    /// Sequence and acknowledgment number of the last TCP segment of this direction: a [`crate::headers::Segment`]; zero: none
    /// was seen.
    pub segment: u64,
    /// The translation.
    pub edit: Edit<A>,
    /// The backend.
    pub backend: BackendRef,
    /// The pool that the backend was chosen from.
    pub pool: u32,
    /// Scope of the pin that this flow belongs to; zero: none.
    pub scope: u32,
    /// The pin's timeout when the flow began, seconds: see [`timeout_ns`].
    pub timeout_s: u32,
    /// The state of the connection, the same in both directions: see [`crate::state`]. Bits are only added, atomically, to the
    /// word that consists of this and the next three fields.
    pub state: u8,
    /// The pin's [`super::Timer`].
    pub timer: u8,
    /// The pin's prefix length.
    pub prefix: u8,
    /// [`FLOW_REMOTE`], [`FLOW_FOREIGN`], [`FLOW_EXACT`].
    pub flags: u8,
}

/// A pin's timeout as [`Flow::timeout_s`] stores it: rounded up, and at most 136 years, even if it never ends.
#[inline(always)]
#[must_use]
pub const fn timeout_s(timeout_ns: u64) -> u32 {
    let seconds = timeout_ns.div_ceil(SECOND_NS);
    if seconds < u32::MAX as u64 { seconds as u32 } else { u32::MAX }
}

/// The inverse of [`timeout_s`].
#[inline(always)]
#[must_use]
pub const fn timeout_ns(timeout_s: u32) -> u64 {
    timeout_s as u64 * SECOND_NS
}

/// Key of `fragments_v4` and `fragments_v6`: a fragmented IP packet (RFC 791; RFC 8200, section 4.5), before translation. The value
/// is the [`FlowKey`] of its first fragment.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Zeroable)]
#[repr(C, align(8))]
pub struct FragmentKey<A> {
    /// Source address.
    pub saddr: A,
    /// Destination address.
    pub daddr: A,
    /// Identification, network byte order; IPv4: two bytes and zeroes.
    pub id: [u8; 4],
    /// IANA protocol number.
    pub protocol: u8,
    /// 0: it arrived on a device; 1: it leaves one.
    pub is_leaving: u8,
    /// Zero.
    pub pad: [u8; 2],
}

/// The value of `flow_scratch_v4` and `flow_scratch_v6`, one per CPU: scratch memory to open a connection in, because the
/// 512-byte stack has no room for it. Programs that use it do not interrupt each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Zeroable)]
#[repr(C)]
pub struct FlowScratch<A> {
    /// The key of the packet. A copy: before Linux 6.2 the verifier rejects a map key that is an argument of a global function
    /// (<https://elixir.bootlin.com/linux/v6.1/source/kernel/bpf/verifier.c>, `map_key_value_types`).
    pub key: FlowKey<A>,
    /// The record of the flow.
    pub flow: Flow<A>,
    /// The record of its SNAT: see [`crate::snat`].
    pub snat: Flow<A>,
    /// The key of [`FlowScratch::snat`]: a packet of the client after DNAT.
    pub snat_key: FlowKey<A>,
    /// The key of a reply.
    pub reply_key: FlowKey<A>,
    /// The key of another record: of the opposite direction, or of a finished flow that is removed.
    pub other_key: FlowKey<A>,
}

/// [`Flow::state`]: the client has sent FIN.
pub const FLOW_FIN_CLIENT: u8 = 1;
/// [`Flow::state`]: the server has sent FIN.
pub const FLOW_FIN_SERVER: u8 = 2;
/// [`Flow::state`]: one side has sent RST.
pub const FLOW_RESET: u8 = 4;
/// [`Flow::state`]: began in shadow mode: its packets pass, and it has no record for the opposite direction.
pub const FLOW_SHADOW: u8 = 8;
/// [`Flow::state`]: the server has sent a packet.
pub const FLOW_ANSWERED: u8 = 16;
/// [`Flow::state`]: the handshake is complete; UDP: the server has answered.
pub const FLOW_OPEN: u8 = 32;

/// [`Flow::flags`]: the backend is on another node.
pub const FLOW_REMOTE: u8 = 1;
/// [`Flow::flags`]: a foreign connection that got another source port, because a flow has its own: see [`crate::foreign`].
pub const FLOW_FOREIGN: u8 = 2;
/// [`Flow::flags`]: each packet of the client restarts the pin's timeout, because the timeout is short.
pub const FLOW_EXACT: u8 = 4;

/// [`Flow::backend`] of a [`FLOW_FOREIGN`] flow.
pub const NO_BACKEND: u32 = u32::MAX;

/// Value of `foreign_v4` and `foreign_v6`: a foreign connection, by the [`FlowKey`] of its replies. See [`crate::foreign`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, bytemuck::Pod, Zeroable)]
#[repr(C)]
pub struct Foreign {
    /// When a packet that begins or ends it was last seen, monotonic nanoseconds.
    pub last_sent_ns: u64,
    /// Which sides have ended it, with the bits of [`Flow::state`].
    pub state: u32,
    /// Zero.
    pub pad: u32,
}
