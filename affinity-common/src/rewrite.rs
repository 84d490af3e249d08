//! Translating a packet: the edit of a flow, and its application to a frame with complete checksums.

use crate::{
    abi::{Address, Edit, FlowKey, Port, V4, V6},
    checksum,
    packet::Packet,
    parse::{Headers, TCP},
};

/// Offset of the checksum in a TCP header (RFC 9293).
pub const TCP_CHECKSUM: usize = 16;
/// Offset of the checksum in a UDP header (RFC 768).
pub const UDP_CHECKSUM: usize = 6;
/// Offset of the checksum in an IPv4 header (RFC 791); the addresses follow it.
pub const IPV4_CHECKSUM: usize = 10;
/// Offset of the addresses in an IPv6 header (RFC 8200).
pub const IPV6_ADDRESSES: usize = 8;

/// The edit that gives packets of `key` these addresses and ports.
#[inline(always)]
pub fn edit<A: Address>(key: &FlowKey<A>, saddr: A, daddr: A, sport: Port, dport: Port) -> Edit<A> {
    let old_addresses = checksum::fold(key.saddr.sum() + key.daddr.sum());
    let new_addresses = checksum::fold(saddr.sum() + daddr.sum());
    let old_ports = checksum::fold(key.sport.sum() + key.dport.sum());
    let new_ports = checksum::fold(sport.sum() + dport.sum());
    Edit {
        saddr,
        daddr,
        sport,
        dport,
        addr_delta: checksum::delta(old_addresses, new_addresses),
        port_delta: checksum::delta(old_ports, new_ports),
    }
}

/// Offset of the transport checksum in a frame.
#[inline(always)]
#[must_use]
pub const fn l4_checksum_offset<A>(headers: &Headers<A>) -> usize {
    headers.l4() + if headers.key.protocol == TCP { TCP_CHECKSUM } else { UDP_CHECKSUM }
}

/// The transport checksum after `edit`. A UDP checksum of zero means "none" and stays; one that becomes zero is sent as
/// its other form (RFC 768).
#[inline(always)]
#[must_use]
pub fn l4_checksum<A: Address>(headers: &Headers<A>, edit: &Edit<A>) -> [u8; 2] {
    if headers.key.protocol == TCP {
        return checksum::update(headers.l4_checksum, checksum::join(edit.addr_delta, edit.port_delta));
    }
    if headers.l4_checksum == [0, 0] {
        return [0, 0];
    }
    match checksum::update(headers.l4_checksum, checksum::join(edit.addr_delta, edit.port_delta)) {
        [0, 0] => [0xff, 0xff],
        sum => sum,
    }
}

/// Applies `edit` to a frame whose checksums are complete; false where the frame is shorter than its headers said.
#[inline(always)]
pub fn in_place<A: Address, P: Packet + ?Sized>(packet: &mut P, headers: &Headers<A>, edit: &Edit<A>) -> bool {
    write_addresses(packet, headers, edit)
        && write_ports(packet, headers, edit)
        && packet.write(l4_checksum_offset(headers), l4_checksum(headers, edit))
}

/// Writes the addresses and, for IPv4, the header checksum.
#[inline(always)]
pub fn write_addresses<A: Address, P: Packet + ?Sized>(packet: &mut P, headers: &Headers<A>, edit: &Edit<A>) -> bool {
    if A::BITS == V4::BITS {
        let [c, d] = checksum::update(headers.l3_checksum, edit.addr_delta);
        let (V4([e, f, g, h]), V4([i, j, k, l])) =
            (V4::from_mapped(edit.saddr.to_mapped()), V4::from_mapped(edit.daddr.to_mapped()));
        packet.write(headers.l3() + IPV4_CHECKSUM, [c, d, e, f, g, h, i, j, k, l])
    } else {
        let (V6(saddr), V6(daddr)) = (V6(edit.saddr.to_mapped()), V6(edit.daddr.to_mapped()));
        packet.write(headers.l3() + IPV6_ADDRESSES, saddr) && packet.write(headers.l3() + IPV6_ADDRESSES + 16, daddr)
    }
}

/// Writes the ports.
#[inline(always)]
pub fn write_ports<A: Address, P: Packet + ?Sized>(packet: &mut P, headers: &Headers<A>, edit: &Edit<A>) -> bool {
    let (Port([a, b]), Port([c, d])) = (edit.sport, edit.dport);
    packet.write(headers.l4(), [a, b, c, d])
}
