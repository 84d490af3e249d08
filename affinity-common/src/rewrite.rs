//! Rewriting a packet: the edit of a flow, and how it is applied to a frame with complete checksums.

use crate::{
    abi::{Address, Edit, FlowKey, Port, V4},
    checksum,
    headers::{Headers, SCTP, TCP},
    packet::Packet,
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

/// Sets `set` to the edit that turns packets of `key` into those whose replies have the key `opposite`. Out of line, to keep the
/// callers' stack frames small.
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

/// The transport checksum after `edit`.
#[inline(always)]
#[must_use]
pub fn l4_checksum<A: Address>(headers: &Headers<A>, edit: &Edit<A>) -> [u8; 2] {
    l4_checksum_after(headers, checksum::join(edit.addr_delta, edit.port_delta))
}

/// A complete transport checksum after the data that it covers has changed by `delta`. A UDP checksum of zero means "none" and
/// stays; one that becomes zero is sent as 0xffff (RFC 768).
#[inline(always)]
fn l4_checksum_after<A: Address>(headers: &Headers<A>, delta: u16) -> [u8; 2] {
    if headers.key.protocol == TCP {
        return checksum::update(headers.l4_checksum, delta);
    }
    if headers.l4_checksum == [0, 0] {
        return [0, 0];
    }
    match checksum::update(headers.l4_checksum, delta) {
        [0, 0] => [0xff, 0xff],
        sum => sum,
    }
}

/// How to update the checksum for the ports, after the kernel has updated it for the addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ForPorts {
    /// The sum is complete: the new value of the field.
    Field([u8; 2]),
    /// The sum is partial: it covers the addresses, and the device adds the ports as they are then.
    Nothing,
    /// It is not known which of the two it is.
    Unknown,
}

/// Finds out whether the sum is complete or partial from `field`, the checksum field after the kernel has updated it for the
/// new addresses. The field of a complete sum is the complement of the sum of everything, so the kernel subtracts the delta
/// from it. A partial sum is the plain sum of the pseudo-header, so the kernel adds the delta. The results differ for every
/// delta but zero, because in one's complement twice a number is zero only if the number is zero.
///
/// <https://elixir.bootlin.com/linux/v6.18/source/net/core/utils.c> (`inet_proto_csum_replace_by_diff`)
#[inline(always)]
#[must_use]
pub fn for_ports<A: Address>(headers: &Headers<A>, edit: &Edit<A>, field: [u8; 2]) -> ForPorts {
    let is_zero = |delta| delta == 0 || delta == 0xffff;
    if is_zero(edit.port_delta) {
        return ForPorts::Nothing;
    }
    let partial = checksum::fold(u32::from(u16::from_ne_bytes(headers.l4_checksum)) + u32::from(edit.addr_delta));
    if is_zero(edit.addr_delta) {
        ForPorts::Unknown
    } else if field == l4_checksum_after(headers, edit.addr_delta) {
        ForPorts::Field(l4_checksum(headers, edit))
    } else if field == partial.to_ne_bytes() {
        ForPorts::Nothing
    } else {
        ForPorts::Unknown
    }
}

/// Applies `edit` to a frame with complete checksums; false if the frame is shorter than its headers say. The checksum of SCTP
/// does not cover the addresses, and its ports never change.
#[inline(always)]
pub fn in_place<A: Address, P: Packet + ?Sized>(packet: &mut P, headers: &Headers<A>, edit: &Edit<A>) -> bool {
    let Edit { saddr, daddr, addr_delta, .. } = *edit;
    write_addresses(packet, headers.l3(), headers.l3_checksum.to_ne_bytes(), addr_delta, saddr, daddr)
        && (headers.key.protocol == SCTP
            || write_ports(packet, headers, edit)
                && packet.write(l4_checksum_offset(headers), l4_checksum(headers, edit)))
}

/// Writes the addresses of the IP header at `l3` and, for IPv4, its checksum, which was `l3_checksum`; `delta` is the change by
/// the addresses.
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        abi::{Direction, V6},
        headers::UDP,
    };

    /// The field after `bpf_l4_csum_replace` with a delta of the pseudo-header, as Linux computes it.
    fn kernel(field: u16, delta: u16, is_partial: bool, is_udp: bool) -> u16 {
        let fold = |sum: u64| {
            let once = (sum >> 16) + (sum & 0xffff);
            let twice = (once >> 16) + (once & 0xffff);
            checksum::fold(twice as u32)
        };
        let zero_is_none = |field| if is_udp && field == 0 { 0xffff } else { field };
        if is_udp && field == 0 {
            return 0;
        }
        let before = if is_partial { u64::from(field) } else { u64::from(!u32::from(field)) };
        let sum = fold(before + u64::from(delta));
        zero_is_none(if is_partial { sum } else { !sum })
    }

    fn headers<A: Address>(address: A, protocol: u8, field: u16) -> Headers<A> {
        let key = FlowKey {
            saddr: address,
            daddr: address,
            sport: Port::new(1),
            dport: Port::new(2),
            protocol,
            direction: Direction::Dnat as u8,
            pad: [0; 2],
        };
        let mut headers = Headers::new(key, 0);
        headers.l4_checksum = field.to_ne_bytes();
        headers
    }

    /// The field after the kernel's update and this crate's.
    fn rewritten<A: Address>(headers: &Headers<A>, edit: &Edit<A>, is_partial: bool) -> u16 {
        let is_udp = headers.key.protocol == UDP;
        let field = kernel(u16::from_ne_bytes(headers.l4_checksum), edit.addr_delta, is_partial, is_udp);
        match for_ports(headers, edit, field.to_ne_bytes()) {
            ForPorts::Field(field) => u16::from_ne_bytes(field),
            ForPorts::Nothing => field,
            // A second call of the helper, which does not change a partial sum.
            ForPorts::Unknown if is_partial => field,
            ForPorts::Unknown => kernel(field, edit.port_delta, false, is_udp),
        }
    }

    fn check<A: Address>(address: A, protocol: u8, field: u16, deltas: (u16, u16)) -> Result<(), TestCaseError> {
        let headers = headers(address, protocol, field);
        let edit = Edit {
            saddr: address,
            daddr: address,
            sport: Port::new(3),
            dport: Port::new(4),
            addr_delta: deltas.0,
            port_delta: deltas.1,
        };
        // Zero has two forms in one's complement.
        let same = |one: u16, other: u16| one == other || one.wrapping_add(other) == 0xffff && (one == 0 || other == 0);
        let is_none = protocol == UDP && field == 0;
        let complete = if is_none { 0 } else { u16::from_ne_bytes(l4_checksum(&headers, &edit)) };
        prop_assert!(same(rewritten(&headers, &edit, false), complete));
        prop_assert_eq!(is_none, is_none && rewritten(&headers, &edit, false) == 0);
        let partial = if is_none { 0 } else { checksum::fold(u32::from(field) + u32::from(deltas.0)) };
        prop_assert!(same(rewritten(&headers, &edit, true), partial));
        Ok(())
    }

    /// Numbers, often one of the two zeros.
    fn word() -> impl Strategy<Value = u16> {
        prop_oneof![1 => Just(0), 1 => Just(0xffff), 4 => any::<u16>()]
    }

    proptest! {
        #[test]
        fn one_call_of_the_helper_gives_the_sum_of_two(field in word(), addresses in word(), ports in word(), is_udp: bool) {
            let protocol = if is_udp { UDP } else { TCP };
            check(V4([192, 0, 2, 1]), protocol, field, (addresses, ports))?;
            check(V6([1; 16]), protocol, field, (addresses, ports))?;
        }
    }
}
