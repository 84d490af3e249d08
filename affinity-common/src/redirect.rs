//! Redirecting a packet without the node's network stack: a translated packet to its pod, or a reply to its client. XDP
//! redirects packets to pods on other nodes. With `--forwarding redirect`, TC redirects all translated packets.
//!
//! No egress program sees a redirected packet, so [`pipeline::reverse`] runs here too. This also does what the stack would do:
//! it sets the link addresses of the next hop and decrements the TTL. The stack gets all other packets, because it can send
//! ICMP errors about them: packets with VLAN tags, IP options or fragments, with an expiring TTL, without a route, or longer
//! than the MTU; and in XDP those to a neighbour whose link address is not known yet.

#[cfg(test)]
mod tests;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    abi::{Address, Direction, Port, Reason, V4, V6, filter_bit},
    checksum,
    global::GlobalFunctions,
    headers::{Headers, SCTP, TCP, UDP},
    icmp::ICMPV6,
    packet::Packet,
    parse::{self, Network},
    pipeline::{self, Verdict},
    tables::FamilyTables,
};

/// The key of a FIB lookup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FibKey<A> {
    /// Source address.
    pub saddr: A,
    /// Destination address.
    pub daddr: A,
    /// Length of the packet in bytes, from its IP header on.
    pub len: u16,
    /// IANA protocol number.
    pub protocol: u8,
    /// IPv4: type of service. IPv6: traffic class.
    pub class: u8,
    /// Source port; zero where the protocol has none.
    pub sport: Port,
    /// Destination port; zero where the protocol has none.
    pub dport: Port,
}

impl<A: Address> FibKey<A> {
    /// The key of a reply of the same length.
    #[inline(always)]
    #[must_use]
    pub const fn back(&self) -> Self {
        Self { saddr: self.daddr, daddr: self.saddr, sport: self.dport, dport: self.sport, ..*self }
    }

    /// Offset of the transport header in a plain frame.
    #[inline(always)]
    #[must_use]
    pub const fn transport(&self) -> usize {
        EthHdr::LEN + if A::BITS == V4::BITS { Ipv4Hdr::LEN } else { Ipv6Hdr::LEN }
    }
}

/// The link addresses of a frame: destination, then source.
pub type Link = [u8; 12];

/// The result of a FIB lookup.
pub trait NextHop {
    /// The link addresses of the frame, if they are known.
    fn link(&self) -> Option<Link>;
}

/// A frame that its hook can redirect to another device.
pub trait FibLookup: Packet {
    /// The result of the hook's FIB lookup.
    type Hop: NextHop;
    /// Looks up the next hop of the packet.
    fn fib_lookup<A: Address>(&self, key: &FibKey<A>) -> Self::Hop;
}

/// Whether a packet that [`pipeline::forward`] passed is a reply that [`redirect`] would translate.
#[inline(always)]
pub fn is_reply<P: Packet, T: FamilyTables<V4> + FamilyTables<V6>>(packet: &P, tables: &T) -> bool {
    match parse::network(packet) {
        Ok(Network::V4(l3)) => parse::ipv4(packet, l3, Direction::RevDnat).is_ok_and(|of| has_flow(tables, &of)),
        Ok(Network::V6(l3)) => parse::ipv6(packet, l3, Direction::RevDnat).is_ok_and(|of| has_flow(tables, &of)),
        Err(_) => false,
    }
}

#[inline(always)]
fn has_flow<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>) -> bool {
    let bit = filter_bit(headers.key.saddr, headers.key.sport, headers.key.protocol);
    tables.filter(Direction::RevDnat, bit) && tables.flow(&headers.key).is_some()
}

/// Redirects a packet that [`pipeline::forward`] has translated, or a reply. `take` returns the hook's action for the next hop,
/// or none if its device does not take redirected frames. Returns that action.
///
/// # Errors
/// The verdict for a packet that is not redirected: [`Verdict::Forward`], unchanged, for the stack; or [`Verdict::Drop`].
#[inline(always)]
pub fn redirect<P: FibLookup, T: GlobalFunctions<V4> + GlobalFunctions<V6>>(
    packet: &mut P,
    tables: &T,
    take: impl FnOnce(&P::Hop) -> Option<u32>,
) -> Result<u32, Verdict> {
    let action = match take_hop(packet, take) {
        NO_HOP => return Err(Verdict::Forward),
        NOT_WRITTEN => return Err(Verdict::Drop),
        action => action as u32,
    };
    match pipeline::reverse(packet, tables) {
        Verdict::Pass | Verdict::Forward | Verdict::Redirect => {
            tables.count(Reason::Redirected);
            Ok(action)
        }
        Verdict::Answer | Verdict::Drop => Err(Verdict::Drop),
    }
}

/// Not an action: no next hop, or its device does not take redirected frames.
const NO_HOP: u64 = 1 << 32;
/// Not an action: the frame is too short to rewrite.
const NOT_WRITTEN: u64 = 1 << 33;

/// Looks up the next hop and rewrites the link addresses and the TTL: the hook's action, [`NO_HOP`] or [`NOT_WRITTEN`].
#[inline(always)]
fn take_hop<P: FibLookup>(packet: &mut P, take: impl FnOnce(&P::Hop) -> Option<u32>) -> u64 {
    match parse::network(packet) {
        Ok(Network::V4(EthHdr::LEN)) => take_hop_v4(packet, take),
        Ok(Network::V6(EthHdr::LEN)) => take_hop_v6(packet, take),
        _ => NO_HOP,
    }
}

/// Out of line: its stack frame is released before the packet is translated (512-byte BPF stack). The result is a number,
/// because it must fit a register: see [`crate::session::open`].
#[inline(never)]
fn take_hop_v4<P: FibLookup>(packet: &mut P, take: impl FnOnce(&P::Hop) -> Option<u32>) -> u64 {
    taken(ipv4(packet, take))
}

/// The same for IPv6.
#[inline(never)]
fn take_hop_v6<P: FibLookup>(packet: &mut P, take: impl FnOnce(&P::Hop) -> Option<u32>) -> u64 {
    taken(ipv6(packet, take))
}

#[inline(always)]
fn taken(action: Option<(u32, bool)>) -> u64 {
    match action {
        None => NO_HOP,
        Some((_, false)) => NOT_WRITTEN,
        Some((action, true)) => u64::from(action),
    }
}

/// Writes the link addresses of the next hop, if the hook needs them.
#[inline(always)]
fn address(packet: &mut impl Packet, hop: &impl NextHop) -> bool {
    hop.link().is_none_or(|link| packet.write(0, link))
}

/// The action for the next hop of an IPv4 packet, and whether the packet was rewritten for it.
#[inline(always)]
fn ipv4<P: FibLookup>(packet: &mut P, take: impl FnOnce(&P::Hop) -> Option<u32>) -> Option<(u32, bool)> {
    const PLAIN: u8 = 0x45;
    const FRAGMENT: [u8; 2] = 0x3fff_u16.to_be_bytes();
    const TIME_TO_LIVE: usize = 8;

    let [version_ihl, class, len_hi, len_lo, _, _, fragment_hi, fragment_lo]: [u8; 8] = packet.read(EthHdr::LEN)?;
    let [time_to_live, protocol, sum_hi, sum_lo, a, b, c, d, e, f, g, h] = packet.read(EthHdr::LEN + TIME_TO_LIVE)?;
    // Connection tracking on the node reassembles fragments, so it must see the first one too.
    let is_fragment = fragment_hi & FRAGMENT[0] | fragment_lo & FRAGMENT[1] != 0;
    if version_ihl != PLAIN || is_fragment || time_to_live <= 1 {
        return None;
    }
    let (saddr, daddr) = (V4([a, b, c, d]), V4([e, f, g, h]));
    let [sport, dport] = ports(packet, EthHdr::LEN + Ipv4Hdr::LEN, protocol)?;
    let key = FibKey { saddr, daddr, len: u16::from_be_bytes([len_hi, len_lo]), protocol, class, sport, dport };
    let hop = packet.fib_lookup(&key);
    let action = take(&hop)?;
    let older = time_to_live - 1;
    let delta = checksum::delta(word(time_to_live, protocol), word(older, protocol));
    let [sum_hi, sum_lo] = checksum::update([sum_hi, sum_lo], delta);
    let is_older = packet.write(EthHdr::LEN + TIME_TO_LIVE, [older, protocol, sum_hi, sum_lo]);
    Some((action, is_older && address(packet, &hop)))
}

/// The ports, for routing rules (`ip rule ... dport`) and multipath routes (`fib_multipath_hash_policy=1`).
#[inline(always)]
fn ports(packet: &impl Packet, l4: usize, protocol: u8) -> Option<[Port; 2]> {
    if !matches!(protocol, TCP | UDP | SCTP) {
        return Some([Port([0; 2]); 2]);
    }
    let [a, b, c, d] = packet.read(l4)?;
    Some([Port([a, b]), Port([c, d])])
}

/// Two bytes of a header as one word of its checksum.
#[inline(always)]
const fn word(first: u8, second: u8) -> u16 {
    u16::from_ne_bytes([first, second])
}

/// The same for IPv6.
#[inline(always)]
fn ipv6<P: FibLookup>(packet: &mut P, take: impl FnOnce(&P::Hop) -> Option<u32>) -> Option<(u32, bool)> {
    const HOP_LIMIT: usize = 7;
    const ADDRESSES: usize = 8;

    let [first, second, _, _, len_hi, len_lo, protocol, hop_limit]: [u8; 8] = packet.read(EthHdr::LEN)?;
    let saddr = V6(packet.read(EthHdr::LEN + ADDRESSES)?);
    let daddr = V6(packet.read(EthHdr::LEN + ADDRESSES + 16)?);
    if !matches!(protocol, TCP | UDP | SCTP | ICMPV6) || hop_limit <= 1 {
        return None;
    }
    let len = u16::from_be_bytes([len_hi, len_lo]).saturating_add(Ipv6Hdr::LEN as u16);
    let [sport, dport] = ports(packet, EthHdr::LEN + Ipv6Hdr::LEN, protocol)?;
    let key = FibKey { saddr, daddr, len, protocol, class: first << 4 | second >> 4, sport, dport };
    let hop = packet.fib_lookup(&key);
    let action = take(&hop)?;
    let is_older = packet.write(EthHdr::LEN + HOP_LIMIT, [hop_limit - 1]);
    Some((action, is_older && address(packet, &hop)))
}
