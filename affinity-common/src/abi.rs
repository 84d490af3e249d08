//! The layout of every map: the contract between the programs, the agent, and a later version of either.
//!
//! All types are `repr(C)` without implicit padding. Addresses and ports are byte arrays in network order behind typed getters.
//! There is no bool, enum, Option or usize, so every bit pattern is a valid value. Keys and values are aligned to the words
//! that the machine loads, because the verifier requires it on the programs' stacks. A change of any size or meaning raises
//! [`VERSION`], which names the pin directory.

mod backend;
mod config;
mod event;
mod fields;
mod flow;
mod frontend;
mod pod;
mod reason;
mod redirect;
mod session;
mod socket;
mod status;

use core::fmt::Debug;

use bytemuck::{Pod, Zeroable};

pub use backend::{
    BACKEND_LINGERING, BACKEND_LOCAL, BACKEND_TERMINATING, Backend, BackendRef, MEMBER_DRAINING, MEMBER_READY, Member,
    MemberKey,
};
pub use config::{CONFIG_MAGIC, Config};
pub use event::{Event, EventKind};
pub use fields::Field;
pub use flow::{
    Direction, Edit, FLOW_ANSWERED, FLOW_EXACT, FLOW_FIN_CLIENT, FLOW_FIN_SERVER, FLOW_FOREIGN, FLOW_OPEN, FLOW_REMOTE,
    FLOW_RESET, FLOW_SHADOW, Flow, FlowKey, FlowScratch, Foreign, FragmentKey, NO_BACKEND, timeout_ns, timeout_s,
};
pub use frontend::{
    AFFINITY, COEXIST, DROP_IF_NO_LOCAL, FILTER_BITS, FILTER_WORDS, Frontend, FrontendKey, MASQUERADE, NODE, Node,
    PODS, RANGES, RangeKey, SCOPE_ANY, SCOPE_EXTERNAL, SHADOW, SHARED, SPLIT_SCOPE, Selection, TIMEOUT_UNLIMITED,
    Timer, filter_bit,
};
pub use reason::{REASONS, Reason, USAGES, Usage, UsageKey, UsageOf, usage_index};
pub use redirect::{
    DEVICE_NOTE_SHIFT, DEVICE_POD, DEVICE_REDIRECT_TC, DEVICE_REDIRECT_XDP, DEVICE_UPPER, DeviceMac, MAC_SLOTS,
    TAIL_TC_REDIRECT, TAIL_TC_REPLY, TAIL_XDP_REDIRECT, XDP_META_PASSED, XDP_META_TRANSLATED,
};
pub use session::{Correction, MOVES, Session, SessionKey};
pub use socket::{Socket, SocketKey, SocketRole, netns_client, netns_of};
pub use status::{SourceKind, Status};

/// Version of this layout.
pub const VERSION: u32 = 5;
/// The oldest layout with records that are equal to those of this one, or can be converted. An upgrade takes over those of its
/// maps that have the same names.
pub const OLDEST_READABLE: u32 = 3;

/// A second, in nanoseconds.
pub const SECOND_NS: u64 = 1_000_000_000;

/// An IPv4 or IPv6 address in network byte order: the type parameter of everything that exists once per family.
pub trait Address: Copy + Eq + Ord + Debug + Pod + sealed::Sealed + 'static {
    /// Length in bits: 32 or 128.
    const BITS: u8;
    /// Padding of a key of one address and four bytes to a multiple of eight bytes.
    type Fill: Copy + Eq + Ord + Debug + Pod;
    /// The address as IPv6: itself, or IPv4-mapped (RFC 4291, section 2.5.5.2).
    fn to_mapped(self) -> [u8; 16];
    /// The inverse of [`Address::to_mapped`]; for IPv4, the last four bytes.
    fn from_mapped(mapped: [u8; 16]) -> Self;
    /// The first `prefix` bits; the rest zero. A prefix of [`Address::BITS`] or more keeps all.
    fn masked(self, prefix: u8) -> Self;
    /// The address folded to 32 bits, for hashing.
    fn fold(self) -> u32;
    /// The sum of its 16-bit words, as [`crate::checksum`] takes it.
    fn sum(self) -> u32;
    /// Whether it is a loopback address (RFC 1122, section 3.2.1.3; RFC 4291, section 2.5.3).
    fn is_loopback(self) -> bool;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::V4 {}
    impl Sealed for super::V6 {}
}

/// An IPv4 address, network byte order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Pod, Zeroable)]
#[repr(C, align(4))]
pub struct V4(pub [u8; 4]);

/// An IPv6 address, network byte order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct V6(pub [u8; 16]);

impl Address for V4 {
    const BITS: u8 = 32;
    type Fill = [u8; 0];

    #[inline(always)]
    fn to_mapped(self) -> [u8; 16] {
        let [a, b, c, d] = self.0;
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
    }

    #[inline(always)]
    fn from_mapped(mapped: [u8; 16]) -> Self {
        let [.., a, b, c, d] = mapped;
        Self([a, b, c, d])
    }

    #[inline(always)]
    fn masked(self, prefix: u8) -> Self {
        let drop = 32u8.saturating_sub(prefix);
        let mask = (u64::from(u32::MAX) << drop) as u32;
        Self((u32::from_be_bytes(self.0) & mask).to_be_bytes())
    }

    #[inline(always)]
    fn fold(self) -> u32 {
        u32::from_be_bytes(self.0)
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        let word = u32::from_ne_bytes(self.0);
        (word >> 16) + (word & 0xffff)
    }

    #[inline(always)]
    fn is_loopback(self) -> bool {
        self.0[0] == 127
    }
}

impl V6 {
    /// Both halves, native byte order.
    #[inline(always)]
    fn halves(self) -> [u64; 2] {
        bytemuck::must_cast(self)
    }
}

impl Address for V6 {
    const BITS: u8 = 128;
    type Fill = [u8; 4];

    #[inline(always)]
    fn to_mapped(self) -> [u8; 16] {
        self.0
    }

    #[inline(always)]
    fn from_mapped(mapped: [u8; 16]) -> Self {
        Self(mapped)
    }

    #[inline(always)]
    fn masked(self, prefix: u8) -> Self {
        let [high, low] = self.halves();
        let ones = |count: u8| if count == 0 { 0 } else { (u64::MAX << (64 - count)).to_be() };
        bytemuck::must_cast([high & ones(prefix.min(64)), low & ones(prefix.clamp(64, 128) - 64)])
    }

    #[inline(always)]
    fn fold(self) -> u32 {
        let [high, low] = self.halves().map(u64::from_be);
        // Multiplied, so that addresses which differ in both halves alike do not cancel out.
        let mixed = high.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ low;
        (mixed ^ (mixed >> 32)) as u32
    }

    #[inline(always)]
    fn sum(self) -> u32 {
        let [high, low] = self.halves();
        let words = |half: u64| (half >> 32) + (half & 0xffff_ffff);
        let sum = words(high) + words(low);
        let sum = (sum >> 32) + (sum & 0xffff_ffff);
        (sum >> 16) as u32 + (sum & 0xffff) as u32
    }

    #[inline(always)]
    fn is_loopback(self) -> bool {
        self.halves() == [0, 1_u64.to_be()]
    }
}

/// A TCP, UDP or SCTP port, network byte order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Pod, Zeroable)]
#[repr(C, align(2))]
pub struct Port(pub [u8; 2]);

impl Port {
    /// From the number.
    #[inline(always)]
    #[must_use]
    pub const fn new(number: u16) -> Self {
        Self(number.to_be_bytes())
    }

    /// The port as a word, as [`crate::checksum`] takes it.
    #[inline(always)]
    pub(crate) const fn sum(self) -> u32 {
        u16::from_ne_bytes(self.0) as u32
    }

    /// The number.
    #[inline(always)]
    #[must_use]
    pub const fn get(self) -> u16 {
        u16::from_be_bytes(self.0)
    }
}

/// In `service_conditions`: all clients that are pinned to a service have the addresses of nodes.
pub const CLIENTS_ARE_NODES: u32 = 1;

/// Kind of a [`NameKey`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u32)]
pub enum NameKind {
    /// Service id -> `namespace/name`.
    Service = 1,
    /// Pool id -> `namespace/name:port/PROTOCOL` and the family.
    Pool = 2,
    /// Group id -> `namespace/group`.
    Group = 3,
    /// Backend index -> `namespace/pod`, or empty if the source names none.
    Backend = 4,
}

/// Key of the `names` map.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct NameKey {
    /// A [`NameKind`].
    pub kind: u32,
    /// The id, or the backend's index.
    pub id: u32,
}

/// Value of the `names` map: UTF-8, `len` bytes of `bytes`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Name {
    /// Bytes in use.
    pub len: u16,
    /// The name; longer ones are cut.
    pub bytes: [u8; 318],
}

impl Name {
    /// Cuts a long name at a character boundary.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let mut bytes = [0; 318];
        let mut len = name.len().min(bytes.len());
        while !name.is_char_boundary(len) {
            len -= 1;
        }
        bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
        Self { len: len as u16, bytes }
    }

    /// The name; empty if the bytes are not UTF-8.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let len = usize::from(self.len).min(self.bytes.len());
        core::str::from_utf8(&self.bytes[..len]).unwrap_or("")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_keeps_its_bits() {
        assert_eq!(V4([10, 1, 2, 3]).masked(24), V4([10, 1, 2, 0]));
        assert_eq!(V4([10, 1, 2, 3]).masked(32), V4([10, 1, 2, 3]));
        assert_eq!(V4([10, 1, 2, 3]).masked(0), V4([0; 4]));
        let all = V6([0xff; 16]);
        for prefix in 0..=128u8 {
            let ones: u32 = all.masked(prefix).0.iter().map(|b| b.count_ones()).sum();
            assert_eq!(ones, u32::from(prefix));
        }
    }

    #[test]
    fn a_name_is_cut_at_a_character() {
        let long = "ä".repeat(200);
        assert_eq!(Name::new(&long).as_str().chars().count(), 159);
        assert_eq!(Name::new("default/web").as_str(), "default/web");
    }

    #[test]
    fn mapped_addresses_come_back() {
        assert_eq!(V4::from_mapped(V4([1, 2, 3, 4]).to_mapped()), V4([1, 2, 3, 4]));
    }
}
