//! Sending a packet out by the hook that it came in by, past the node's stack: a translated one to its pod, or a reply to
//! its client. XDP does for pods on other nodes; TC, where it is to redirect, for all.
//!
//! It then meets no egress program in need of work, so all that one would do is done here too: [`pipeline::reverse`]. And
//! what the stack would do: the next hop's link addresses, and a lower time to live. Whatever is not plain is left to the
//! stack, which knows how to tell a sender of it: tags, options, fragments, a packet at the end of its life, or no next
//! hop, be it that there is no route, that the packet is too long for it, or, in XDP, that a neighbour's link address is
//! not known yet.

#[cfg(test)]
mod tests;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    abi::{Address, Direction, Port, Reason, V4, V6, filter_bit},
    checksum,
    icmp::ICMPV6,
    packet::Packet,
    parse::{self, Headers, Network, SCTP, TCP, UDP},
    pipeline::{self, Verdict},
    tables::FamilyTables,
};

/// What a route is looked up by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way<A> {
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

impl<A: Address> Way<A> {
    /// That of an answer of the same length.
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

/// Where a frame is sent next; or that it cannot be told.
pub trait NextHop {
    /// The link addresses of the frame for it, where they are known.
    fn link(&self) -> Option<Link>;
}

/// A frame whose hook can send it out by another device.
pub trait Routes: Packet {
    /// The answer to its hook's lookup of a route.
    type Hop: NextHop;
    /// The next hop of its packet.
    fn hop<A: Address>(&self, way: &Way<A>) -> Self::Hop;
}

/// Whether what [`pipeline::forward`] has passed is a reply that [`send_on`] would translate.
#[inline(always)]
pub fn is_reply<P: Packet, T: FamilyTables<V4> + FamilyTables<V6>>(packet: &P, tables: &T) -> bool {
    match parse::network(packet) {
        Ok(Network::V4(l3)) => parse::ipv4(packet, l3, Direction::Reverse).is_ok_and(|of| has_flow(tables, &of)),
        Ok(Network::V6(l3)) => parse::ipv6(packet, l3, Direction::Reverse).is_ok_and(|of| has_flow(tables, &of)),
        Err(_) => false,
    }
}

#[inline(always)]
fn has_flow<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>) -> bool {
    let bit = filter_bit(headers.key.saddr, headers.key.sport, headers.key.protocol);
    tables.filter(Direction::Reverse, bit) && tables.flow(&headers.key).is_some()
}

/// Sends on what [`pipeline::forward`] has translated, or a reply; `take` gives the hook's action for the next hop, where its
/// device takes the frame. Returns that action.
///
/// # Errors
/// What becomes of it instead: [`Verdict::Forward`], as it was, to the stack; or [`Verdict::Drop`].
#[inline(always)]
pub fn send_on<P: Routes, T: FamilyTables<V4> + FamilyTables<V6>>(
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
        Verdict::Pass | Verdict::Forward | Verdict::Onward => {
            tables.count(Reason::SentOn);
            Ok(action)
        }
        Verdict::Answer | Verdict::Drop => Err(Verdict::Drop),
    }
}

/// No hook's action: there is no next hop whose device takes the frame.
const NO_HOP: u64 = 1 << 32;
/// No hook's action: the frame ends before what the hop changes.
const NOT_WRITTEN: u64 = 1 << 33;

/// Looks the next hop up and writes what it changes: the hook's action, or [`NO_HOP`] or [`NOT_WRITTEN`].
#[inline(always)]
fn take_hop<P: Routes>(packet: &mut P, take: impl FnOnce(&P::Hop) -> Option<u32>) -> u64 {
    match parse::network(packet) {
        Ok(Network::V4(EthHdr::LEN)) => take_hop_v4(packet, take),
        Ok(Network::V6(EthHdr::LEN)) => take_hop_v6(packet, take),
        _ => NO_HOP,
    }
}

/// Out of line: the stack frame of the lookup is free again when the packet is translated. The result is a number, because
/// that fits a register: see [`crate::session::open`].
#[inline(never)]
fn take_hop_v4<P: Routes>(packet: &mut P, take: impl FnOnce(&P::Hop) -> Option<u32>) -> u64 {
    taken(ipv4(packet, take))
}

/// The same of an IPv6 packet.
#[inline(never)]
fn take_hop_v6<P: Routes>(packet: &mut P, take: impl FnOnce(&P::Hop) -> Option<u32>) -> u64 {
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

/// Whether a frame got the link addresses that its next hop needs.
#[inline(always)]
fn address(packet: &mut impl Packet, hop: &impl NextHop) -> bool {
    hop.link().is_none_or(|link| packet.write(0, link))
}

/// The action for an IPv4 packet's next hop, and whether that is written which the hop changes.
#[inline(always)]
fn ipv4<P: Routes>(packet: &mut P, take: impl FnOnce(&P::Hop) -> Option<u32>) -> Option<(u32, bool)> {
    const PLAIN: u8 = 0x45;
    const FRAGMENT: [u8; 2] = 0x3fff_u16.to_be_bytes();
    const TIME_TO_LIVE: usize = 8;

    let [version_ihl, class, len_hi, len_lo, _, _, fragment_hi, fragment_lo]: [u8; 8] = packet.read(EthHdr::LEN)?;
    let [time_to_live, protocol, sum_hi, sum_lo, a, b, c, d, e, f, g, h] = packet.read(EthHdr::LEN + TIME_TO_LIVE)?;
    // A node that tracks connections holds fragments back until it has the first one too.
    let is_fragment = fragment_hi & FRAGMENT[0] | fragment_lo & FRAGMENT[1] != 0;
    if version_ihl != PLAIN || is_fragment || time_to_live <= 1 {
        return None;
    }
    let (saddr, daddr) = (V4([a, b, c, d]), V4([e, f, g, h]));
    let [sport, dport] = ports(packet, EthHdr::LEN + Ipv4Hdr::LEN, protocol)?;
    let way = Way { saddr, daddr, len: u16::from_be_bytes([len_hi, len_lo]), protocol, class, sport, dport };
    let hop = packet.hop(&way);
    let action = take(&hop)?;
    let older = time_to_live - 1;
    let delta = checksum::delta(word(time_to_live, protocol), word(older, protocol));
    let [sum_hi, sum_lo] = checksum::update([sum_hi, sum_lo], delta);
    let is_older = packet.write(EthHdr::LEN + TIME_TO_LIVE, [older, protocol, sum_hi, sum_lo]);
    Some((action, is_older && address(packet, &hop)))
}

/// The ports that rules and multipath routes may choose by: `ip rule ... dport`, `fib_multipath_hash_policy=1`.
#[inline(always)]
fn ports(packet: &impl Packet, l4: usize, protocol: u8) -> Option<[Port; 2]> {
    if !matches!(protocol, TCP | UDP | SCTP) {
        return Some([Port([0; 2]); 2]);
    }
    let [a, b, c, d] = packet.read(l4)?;
    Some([Port([a, b]), Port([c, d])])
}

/// Two bytes of a header as the word that its checksum sums.
#[inline(always)]
const fn word(first: u8, second: u8) -> u16 {
    u16::from_ne_bytes([first, second])
}

/// The same of an IPv6 packet.
#[inline(always)]
fn ipv6<P: Routes>(packet: &mut P, take: impl FnOnce(&P::Hop) -> Option<u32>) -> Option<(u32, bool)> {
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
    let way = Way { saddr, daddr, len, protocol, class: first << 4 | second >> 4, sport, dport };
    let hop = packet.hop(&way);
    let action = take(&hop)?;
    let is_older = packet.write(EthHdr::LEN + HOP_LIMIT, [hop_limit - 1]);
    Some((action, is_older && address(packet, &hop)))
}
