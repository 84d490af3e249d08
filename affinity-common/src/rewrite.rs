//! Translating a packet: the edit of a flow, and its application to a frame with complete checksums.

use crate::{
    abi::{Address, Edit, FlowKey, Port, V4},
    checksum,
    packet::Packet,
    parse::{Headers, SCTP, TCP},
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

/// Makes `set` the edit that turns packets of `key` into those whose replies are of `opposite`. Apart, for the sake of its
/// callers' stack.
#[inline(never)]
pub fn set_edit<A: Address>(set: &mut Edit<A>, key: &FlowKey<A>, opposite: &FlowKey<A>) {
    *set = edit(key, opposite.daddr, opposite.saddr, opposite.dport, opposite.sport);
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

/// Applies `edit` to a frame whose checksums are complete; false where the frame is shorter than its headers said. The
/// checksum of SCTP covers no address, and its ports are never changed.
#[inline(always)]
pub fn in_place<A: Address, P: Packet + ?Sized>(packet: &mut P, headers: &Headers<A>, edit: &Edit<A>) -> bool {
    let Edit { saddr, daddr, addr_delta, .. } = *edit;
    write_addresses(packet, headers.l3(), headers.l3_checksum, addr_delta, saddr, daddr)
        && (headers.key.protocol == SCTP
            || write_ports(packet, headers, edit)
                && packet.write(l4_checksum_offset(headers), l4_checksum(headers, edit)))
}

/// Writes the addresses of the IP header at `l3` and, for IPv4, its checksum, which was `l3_checksum`; `delta` is what the
/// addresses change.
#[inline(always)]
pub fn write_addresses<A: Address, P: Packet + ?Sized>(
    packet: &mut P,
    l3: usize,
    l3_checksum: [u8; 2],
    delta: u16,
    saddr: A,
    daddr: A,
) -> bool {
    if A::BITS == V4::BITS {
        let [c, d] = checksum::update(l3_checksum, delta);
        let (V4([e, f, g, h]), V4([i, j, k, l])) =
            (V4::from_mapped(saddr.to_mapped()), V4::from_mapped(daddr.to_mapped()));
        packet.write(l3 + IPV4_CHECKSUM, [c, d, e, f, g, h, i, j, k, l])
    } else {
        packet.write(l3 + IPV6_ADDRESSES, saddr.to_mapped())
            && packet.write(l3 + IPV6_ADDRESSES + 16, daddr.to_mapped())
    }
}

/// Writes the ports.
#[inline(always)]
pub fn write_ports<A: Address, P: Packet + ?Sized>(packet: &mut P, headers: &Headers<A>, edit: &Edit<A>) -> bool {
    let (Port([a, b]), Port([c, d])) = (edit.sport, edit.dport);
    packet.write(headers.l4(), [a, b, c, d])
}
