//! Frontends: the addresses that clients connect to, with everything inline that a new connection needs; and the ranges of
//! addresses that they refer to.

use bytemuck::{Pod, Zeroable};

use super::{Address, Port, V4, V6};

/// Key of `frontends_v4` and `frontends_v6`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(C, align(8))]
pub struct FrontendKey<A: Address> {
    /// The address that clients connect to.
    pub address: A,
    /// The port that clients connect to.
    pub port: Port,
    /// IANA protocol number.
    pub protocol: u8,
    /// [`SCOPE_ANY`] or [`SCOPE_EXTERNAL`].
    pub scope: u8,
    /// Zero.
    pub fill: A::Fill,
}

/// [`FrontendKey::scope`]: the record that is looked up first.
pub const SCOPE_ANY: u8 = 0;
/// [`FrontendKey::scope`]: the record for external clients, if the first one is [`SPLIT_SCOPE`].
pub const SCOPE_EXTERNAL: u8 = 1;

impl<A: Address> FrontendKey<A> {
    /// For any client.
    #[inline(always)]
    #[must_use]
    pub fn new(address: A, port: Port, protocol: u8) -> Self {
        Self { address, port, protocol, scope: SCOPE_ANY, fill: A::Fill::zeroed() }
    }

    /// The same for external clients.
    #[inline(always)]
    #[must_use]
    pub fn external(self) -> Self {
        Self { scope: SCOPE_EXTERNAL, ..self }
    }
}

/// Value of `frontends_v4` and `frontends_v6`: the frontend, its pool and its service's affinity.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Frontend {
    /// How long a pin stays fresh, in nanoseconds; [`TIMEOUT_UNLIMITED`]: for ever.
    pub timeout_ns: u64,
    /// The service.
    pub service: u32,
    /// The pool: scope of the members' keys.
    pub pool: u32,
    /// Scope of the shared pin: the service itself, or the named group it belongs to.
    pub group: u32,
    /// Scope of the pin that this frontend keeps if the group's pinned pod is not a member of its pool.
    pub own: u32,
    /// First entry of the pool in `slots`.
    pub slot_first: u32,
    /// Entries of the pool in `slots`; zero: the pool has no usable member.
    pub slot_count: u32,
    /// Seed of the `consistent` selection: the same on every node.
    pub seed: u32,
    /// A [`Selection`].
    pub select: u8,
    /// A [`Timer`].
    pub timer: u8,
    /// Prefix length of the client key.
    pub prefix: u8,
    /// [`AFFINITY`], [`SHARED`], [`COEXIST`], [`SHADOW`], [`SPLIT_SCOPE`], [`MASQUERADE`], [`RANGES`] and [`DROP_IF_NO_LOCAL`].
    pub flags: u8,
}

/// A timeout that never ends.
pub const TIMEOUT_UNLIMITED: u64 = u64::MAX;
/// [`Frontend::flags`]: connections are pinned.
pub const AFFINITY: u8 = 1;
/// [`Frontend::flags`]: the group spans pools with different members; `members` then also holds the group's union of
/// members, under the group's id.
pub const SHARED: u8 = 2;
/// [`Frontend::flags`]: another service proxy is running. TCP packets in the middle of a connection that is not known here
/// belong to it, and pass.
pub const COEXIST: u8 = 4;
/// [`Frontend::flags`]: everything is decided, remembered and counted, and every packet passes.
pub const SHADOW: u8 = 8;
/// [`Frontend::flags`]: external clients have a record of their own, [`SCOPE_EXTERNAL`].
pub const SPLIT_SCOPE: u8 = 16;
/// [`Frontend::flags`]: the source becomes an address of the node, so that replies come back through it.
pub const MASQUERADE: u8 = 32;
/// [`Frontend::flags`]: only clients within the service's [`RangeKey`]s are accepted.
pub const RANGES: u8 = 64;
/// [`Frontend::flags`]: if the pool has no usable member, packets are dropped instead of rejected.
pub const DROP_IF_NO_LOCAL: u8 = 128;

/// Key of the tries `ranges_v4` and `ranges_v6`: a prefix of addresses in a scope. The value is one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(C)]
pub struct RangeKey<A: Address> {
    /// Significant bits of the fields below: 32 for the scope, and the prefix length.
    pub prefix_len: u32,
    /// [`PODS`], [`NODE`], or the service that has these `loadBalancerSourceRanges`.
    pub scope: u32,
    /// The network's address.
    pub address: A,
}

/// [`RangeKey::scope`]: the networks of the cluster's pods.
pub const PODS: u32 = 0;
/// [`RangeKey::scope`]: the addresses of this node. No service has this id.
pub const NODE: u32 = u32::MAX;

impl<A: Address> RangeKey<A> {
    /// A network.
    #[must_use]
    pub fn new(scope: u32, address: A, prefix: u8) -> Self {
        Self { prefix_len: 32 + u32::from(prefix.min(A::BITS)), scope, address: address.masked(prefix) }
    }
}

/// The one value of `node`: the source of masqueraded connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Node {
    /// An IPv6 address of this node; zero: none.
    pub address_v6: V6,
    /// An IPv4 address of this node; zero: none.
    pub address_v4: V4,
    /// The first port.
    pub port_first: Port,
    /// Number of ports, native byte order; zero: nothing is masqueraded.
    pub port_count: u16,
}

/// How a member is chosen for a connection without a usable pin.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
#[repr(u8)]
pub enum Selection {
    /// Uniform over the slots: one slot per ready member.
    #[default]
    Random = 0,
    /// By the client key: the slots are a Maglev table, the same on every node.
    Consistent = 1,
    /// Two random slots; the backend with fewer live sessions.
    Least = 2,
}

impl Selection {
    /// Unknown bytes are `random`.
    #[inline(always)]
    #[must_use]
    pub const fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::Consistent,
            2 => Self::Least,
            _ => Self::Random,
        }
    }
}

/// What restarts the timeout of a pin.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
#[repr(u8)]
pub enum Timer {
    /// Each new connection.
    #[default]
    Connection = 0,
    /// Each packet of the client, written at most once a second per flow.
    Packet = 1,
    /// Nothing: it runs from the pin's creation.
    Absolute = 2,
    /// The end of the client's last connection; no pin expires while one lives.
    Alive = 3,
}

impl Timer {
    /// Unknown bytes are `connection`.
    #[inline(always)]
    #[must_use]
    pub const fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::Packet,
            2 => Self::Absolute,
            3 => Self::Alive,
            _ => Self::Connection,
        }
    }
}

/// Bits of the `filter` map in each of its four parts, one for each [`super::Direction`]. The first two contain frontends and
/// members. The programs set bits in the last two for the flows that they masquerade: pods, and addresses and ports of the
/// node.
pub const FILTER_BITS: u32 = 1 << 19;
/// Words of 64 bits in the `filter` map.
pub const FILTER_WORDS: u32 = 4 * FILTER_BITS / u64::BITS;

/// The bit of an address and port in its part of the filter. Collisions cost a lookup, never a decision.
#[inline(always)]
#[must_use]
pub fn filter_bit<A: Address>(address: A, port: Port, protocol: u8) -> u32 {
    let port = u32::from(port.get()) << 8 | u32::from(protocol);
    let mixed = (address.fold() ^ port.wrapping_mul(0x85eb_ca6b)).wrapping_mul(0x9e37_79b1);
    mixed >> (32 - FILTER_BITS.trailing_zeros())
}
