//! Sending a translated packet out by the hook that it came in by, past the node's stack: to a pod on another node, or
//! back from there to the client.
//!
//! It then leaves by no other hook, so all that the egress program would do is done here too: [`pipeline::reverse`]. And
//! what the stack would do: the next hop's link addresses, and a lower time to live. Whatever is not plain is left to the
//! stack, which knows how to tell a sender of it: tags, options, fragments, a packet at the end of its life, or no next
//! hop, be it that there is no route, that the packet is too long for it, or that a neighbour's link address is not known
//! yet.

#[cfg(test)]
mod tests;

use network_types::{eth::EthHdr, ip::Ipv6Hdr};

use crate::{
    abi::{Address, Reason, V4, V6},
    checksum,
    packet::Packet,
    parse::{self, Network, SCTP, TCP, UDP},
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
}

/// Where a frame is sent next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hop {
    /// The link addresses of a frame: destination, then source.
    pub link: [u8; 12],
    /// The device.
    pub ifindex: u32,
}

/// A frame whose hook can send it out by another device.
pub trait Routes: Packet {
    /// The next hop of its packet; `None` where there is none that it could be sent to at once.
    fn hop<A: Address>(&self, way: &Way<A>) -> Option<Hop>;
}

/// Sends a packet on that [`pipeline::forward`] gave [`Verdict::Onward`], where the next hop's device `is_wire`: one that the
/// hook can send out of. Returns the device that the frame is to leave by.
///
/// # Errors
/// What becomes of it instead: [`Verdict::Forward`], as it was, to the stack; or [`Verdict::Drop`].
#[inline(always)]
pub fn send_on<P: Routes, T: FamilyTables<V4> + FamilyTables<V6>>(
    packet: &mut P,
    tables: &T,
    is_wire: impl FnOnce(u32) -> bool,
) -> Result<u32, Verdict> {
    let (hop, is_written) = match parse::network(packet) {
        Ok(Network::V4(EthHdr::LEN)) => ipv4(packet, is_wire),
        Ok(Network::V6(EthHdr::LEN)) => ipv6(packet, is_wire),
        _ => None,
    }
    .ok_or(Verdict::Forward)?;
    if !is_written || !packet.write(0, hop.link) {
        return Err(Verdict::Drop);
    }
    match pipeline::reverse(packet, tables) {
        Verdict::Pass | Verdict::Forward | Verdict::Onward => {
            tables.count(Reason::SentOn);
            Ok(hop.ifindex)
        }
        Verdict::Answer | Verdict::Drop => Err(Verdict::Drop),
    }
}

/// The next hop of an IPv4 packet, and whether that is written which the hop changes.
#[inline(always)]
fn ipv4<P: Routes>(packet: &mut P, is_wire: impl FnOnce(u32) -> bool) -> Option<(Hop, bool)> {
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
    let way = Way { saddr, daddr, len: u16::from_be_bytes([len_hi, len_lo]), protocol, class };
    let hop = packet.hop(&way).filter(|hop| is_wire(hop.ifindex))?;
    let older = time_to_live - 1;
    let delta = checksum::delta(word(time_to_live, protocol), word(older, protocol));
    let [sum_hi, sum_lo] = checksum::update([sum_hi, sum_lo], delta);
    Some((hop, packet.write(EthHdr::LEN + TIME_TO_LIVE, [older, protocol, sum_hi, sum_lo])))
}

/// Two bytes of a header as the word that its checksum sums.
#[inline(always)]
const fn word(first: u8, second: u8) -> u16 {
    u16::from_ne_bytes([first, second])
}

/// The same of an IPv6 packet.
#[inline(always)]
fn ipv6<P: Routes>(packet: &mut P, is_wire: impl FnOnce(u32) -> bool) -> Option<(Hop, bool)> {
    const HOP_LIMIT: usize = 7;
    const ADDRESSES: usize = 8;

    let [first, second, _, _, len_hi, len_lo, protocol, hop_limit]: [u8; 8] = packet.read(EthHdr::LEN)?;
    let saddr = V6(packet.read(EthHdr::LEN + ADDRESSES)?);
    let daddr = V6(packet.read(EthHdr::LEN + ADDRESSES + 16)?);
    if !matches!(protocol, TCP | UDP | SCTP) || hop_limit <= 1 {
        return None;
    }
    let len = u16::from_be_bytes([len_hi, len_lo]).saturating_add(Ipv6Hdr::LEN as u16);
    let way = Way { saddr, daddr, len, protocol, class: first << 4 | second >> 4 };
    let hop = packet.hop(&way).filter(|hop| is_wire(hop.ifindex))?;
    Some((hop, packet.write(EthHdr::LEN + HOP_LIMIT, [hop_limit - 1])))
}
