//! ICMP and ICMPv6 errors about packets of flows. An error quotes a packet as it is on its side of the translation, so both its
//! own addresses and the quoted packet are translated (RFC 5508).
//!
//! A client's error is about a reply from the frontend; it goes to the pod, and quotes what the pod sent. An error of a pod, or
//! of a router on the way to it, is about a translated packet; it goes to the client from the frontend, and quotes what the client
//! sent, with its original checksum if the quote is long enough.

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::{
    abi::{Address, Direction, Edit, FLOW_SHADOW, Flow, FlowKey, Port, Reason, V4, V6, filter_bit},
    checksum,
    headers::{SCTP, TCP, UDP},
    packet::Packet,
    parse::{Upper, skip_extensions},
    rewrite::{TCP_CHECKSUM, UDP_CHECKSUM, write_addresses},
    tables::{Entry, FamilyTables},
};

const ICMP: u8 = 1;
pub(crate) const ICMPV6: u8 = 58;

/// Bytes of an ICMP error's header; the quoted packet follows.
const HEADER: usize = 8;
/// Offset of the checksum in an ICMP header.
const CHECKSUM: usize = 2;

/// An error, and the packet that it quotes.
struct Quote<A> {
    /// The flow of the quoted packet, as a packet of the opposite direction has it.
    key: FlowKey<A>,
    /// The error's own addresses.
    saddr: A,
    daddr: A,
    /// Offset of the error's IP header.
    l3: usize,
    l3_checksum: [u8; 2],
    /// Offset of the ICMP header.
    l4: usize,
    l4_checksum: [u8; 2],
    /// Offset of the quoted IP header.
    inner_l3: usize,
    inner_l3_checksum: [u8; 2],
    /// Offset of the quoted transport header.
    inner_l4: usize,
    /// The quoted UDP checksum; zero if there is none.
    inner_udp_checksum: [u8; 2],
}

/// Translates an IPv4 packet at `l3` if it is an error about a known flow.
///
/// # Errors
/// The reason why it is not translated, and passes.
#[inline(never)]
pub fn ipv4<P: Packet, T: FamilyTables<V4>>(
    packet: &mut P,
    tables: &T,
    l3: usize,
    direction: Direction,
) -> Result<(), Reason> {
    translate(packet, tables, &mut quote_v4(packet, l3, direction).ok_or(Reason::OtherProtocol)?)
}

/// Translates an IPv6 packet at `l3` if it is an error about a known flow.
///
/// # Errors
/// The reason why it is not translated, and passes.
#[inline(never)]
pub fn ipv6<P: Packet, T: FamilyTables<V6>>(
    packet: &mut P,
    tables: &T,
    l3: usize,
    direction: Direction,
) -> Result<(), Reason> {
    translate(packet, tables, &mut quote_v6(packet, l3, direction).ok_or(Reason::OtherProtocol)?)
}

/// Reads an ICMP error (RFC 792): destination unreachable, time exceeded, parameter problem.
#[inline(always)]
fn quote_v4<P: Packet>(packet: &P, l3: usize, direction: Direction) -> Option<Quote<V4>> {
    let outer = Ipv4::read(packet, l3)?;
    let l4 = l3 + outer.len;
    let [kind, _, a, b]: [u8; 4] = packet.read(l4)?;
    if outer.protocol != ICMP || !matches!(kind, 3 | 11 | 12) {
        return None;
    }
    let inner_l3 = l4 + HEADER;
    let inner = Ipv4::read(packet, inner_l3)?;
    let inner_l4 = inner_l3 + inner.len;
    let ports = Ports::read(packet, inner_l4, inner.protocol)?;
    Some(Quote {
        key: ports.key(inner.saddr, inner.daddr, direction),
        saddr: outer.saddr,
        daddr: outer.daddr,
        l3,
        l3_checksum: outer.checksum,
        l4,
        l4_checksum: [a, b],
        inner_l3,
        inner_l3_checksum: inner.checksum,
        inner_l4,
        inner_udp_checksum: ports.udp_checksum,
    })
}

/// Reads an ICMPv6 error (RFC 4443): types below 128.
#[inline(always)]
fn quote_v6<P: Packet>(packet: &P, l3: usize, direction: Direction) -> Option<Quote<V6>> {
    let outer = Ipv6::read(packet, l3)?;
    let l4 = l3 + Ipv6Hdr::LEN;
    let [kind, _, a, b]: [u8; 4] = packet.read(l4)?;
    if outer.next != ICMPV6 || !matches!(kind, 1..=4) {
        return None;
    }
    let inner_l3 = l4 + HEADER;
    let inner = Ipv6::read(packet, inner_l3)?;
    let Upper { protocol, len, .. } = skip_extensions(packet, inner_l3 + Ipv6Hdr::LEN, inner.next).ok()?;
    let inner_l4 = inner_l3 + Ipv6Hdr::LEN + len;
    let ports = Ports::read(packet, inner_l4, protocol)?;
    Some(Quote {
        key: ports.key(inner.saddr, inner.daddr, direction),
        saddr: outer.saddr,
        daddr: outer.daddr,
        l3,
        l3_checksum: [0; 2],
        l4,
        l4_checksum: [a, b],
        inner_l3,
        inner_l3_checksum: [0; 2],
        inner_l4,
        inner_udp_checksum: ports.udp_checksum,
    })
}

struct Ipv4 {
    len: usize,
    protocol: u8,
    checksum: [u8; 2],
    saddr: V4,
    daddr: V4,
}

impl Ipv4 {
    #[inline(always)]
    fn read<P: Packet>(packet: &P, at: usize) -> Option<Self> {
        let header: [u8; Ipv4Hdr::LEN] = packet.read(at)?;
        let [version_ihl, _, _, _, _, _, fragment_hi, fragment_lo, _, protocol, x, y, ..] = header;
        let [.., a, b, c, d, e, f, g, h] = header;
        let len = usize::from(version_ihl & 0x0f) * 4;
        // A first fragment has the ports.
        let has_ports = fragment_hi & 0x1f == 0 && fragment_lo == 0;
        (version_ihl >> 4 == 4 && len >= Ipv4Hdr::LEN && has_ports).then_some(Self {
            len,
            protocol,
            checksum: [x, y],
            saddr: V4([a, b, c, d]),
            daddr: V4([e, f, g, h]),
        })
    }
}

struct Ipv6 {
    next: u8,
    saddr: V6,
    daddr: V6,
}

impl Ipv6 {
    #[inline(always)]
    fn read<P: Packet>(packet: &P, at: usize) -> Option<Self> {
        let [version, _, _, _, _, _, next, _]: [u8; 8] = packet.read(at)?;
        let saddr = V6(packet.read(at + 8)?);
        let daddr = V6(packet.read(at + 24)?);
        (version >> 4 == 6).then_some(Self { next, saddr, daddr })
    }
}

/// The fields of a quoted transport header, from its first eight bytes, which every error quotes.
struct Ports {
    protocol: u8,
    sport: Port,
    dport: Port,
    udp_checksum: [u8; 2],
}

impl Ports {
    #[inline(always)]
    fn read<P: Packet>(packet: &P, at: usize, protocol: u8) -> Option<Self> {
        let [a, b, c, d, _, _, e, f]: [u8; 8] = packet.read(at)?;
        if protocol != TCP && protocol != UDP && protocol != SCTP {
            return None;
        }
        let udp_checksum = if protocol == UDP { [e, f] } else { [0; 2] };
        Some(Self { protocol, sport: Port([a, b]), dport: Port([c, d]), udp_checksum })
    }

    /// The key of the flow in the error's own direction: the quoted packet went in the opposite one.
    #[inline(always)]
    fn key<A: Address>(&self, quoted_saddr: A, quoted_daddr: A, direction: Direction) -> FlowKey<A> {
        FlowKey {
            saddr: quoted_daddr,
            daddr: quoted_saddr,
            sport: self.dport,
            dport: self.sport,
            protocol: self.protocol,
            direction: direction as u8,
            pad: [0; 2],
        }
    }
}

#[inline(always)]
fn translate<A: Address, P: Packet, T: FamilyTables<A>>(
    packet: &mut P,
    tables: &T,
    quote: &mut Quote<A>,
) -> Result<(), Reason> {
    let flow = flow_of(tables, &mut quote.key).ok_or(Reason::OtherProtocol)?;
    let is_done = rewrite(packet, quote, &flow.read(Flow::EDIT));
    if is_done { Ok(()) } else { Err(Reason::NotRewritten) }
}

/// Finds the flow, with the filter first, as for any packet; sets the direction of `key`.
#[inline(always)]
fn flow_of<A: Address, T: FamilyTables<A>>(tables: &T, key: &mut FlowKey<A>) -> Option<T::Entry<Flow<A>>> {
    let (from, to) = (filter_bit(key.saddr, key.sport, key.protocol), filter_bit(key.daddr, key.dport, key.protocol));
    let ways = if key.is_entering() {
        [(Direction::Dnat, to), (Direction::RevSnat, to)]
    } else {
        [(Direction::RevDnat, from), (Direction::Snat, to)]
    };
    for (direction, bit) in ways {
        if tables.filter(direction, bit) {
            key.direction = direction as u8;
            let flow = tables.flow(key).filter(|flow| flow.read(Flow::STATE) & FLOW_SHADOW == 0);
            if flow.is_some() {
                return flow;
            }
        }
    }
    None
}

/// Translates the error as a packet of its direction, and the quoted packet back to what the opposite direction sent; updates
/// all checksums. False if the frame is too short.
#[inline(always)]
fn rewrite<A: Address, P: Packet>(packet: &mut P, quote: &Quote<A>, edit: &Edit<A>) -> bool {
    // The error may come from a router: the client expects it from the frontend, and the pod from the node.
    let saddr = if quote.key.is_entering() { quote.saddr } else { edit.saddr };
    let old = checksum::fold(quote.saddr.sum() + quote.daddr.sum());
    let outer_delta = checksum::delta(old, checksum::fold(saddr.sum() + edit.daddr.sum()));

    write_addresses(packet, quote.l3, quote.l3_checksum, outer_delta, saddr, edit.daddr)
        && write_addresses(packet, quote.inner_l3, quote.inner_l3_checksum, edit.addr_delta, edit.daddr, edit.saddr)
        && write_quoted_ports(packet, quote, edit)
        && write_checksums(packet, quote, edit, message_delta(quote, edit, outer_delta))
}

/// Writes the error's own checksum, and the one in the quoted TCP header if it is quoted.
#[inline(always)]
fn write_checksums<A: Address, P: Packet>(packet: &mut P, quote: &Quote<A>, edit: &Edit<A>, delta: u16) -> bool {
    let sum = checksum::update(quote.l4_checksum, delta);
    let quoted = if quote.key.protocol == TCP { packet.read(quote.inner_l4 + TCP_CHECKSUM) } else { None };
    let Some(quoted) = quoted else { return packet.write(quote.l4 + CHECKSUM, sum) };
    let restored = checksum::update(quoted, checksum::join(edit.addr_delta, edit.port_delta));
    let delta = checksum::delta(u16::from_ne_bytes(quoted), u16::from_ne_bytes(restored));
    packet.write(quote.inner_l4 + TCP_CHECKSUM, restored)
        && packet.write(quote.l4 + CHECKSUM, checksum::update(sum, delta))
}

/// The change of the sum that the error's own checksum covers.
#[inline(always)]
fn message_delta<A: Address>(quote: &Quote<A>, edit: &Edit<A>, outer_delta: u16) -> u16 {
    // An updated checksum balances the change that it covers: the sum of the quoted IPv4 header stays the same, and so does
    // that of a UDP header with its pseudo-header.
    let is_v4 = A::BITS == V4::BITS;
    let has_udp_checksum = quote.inner_udp_checksum != [0; 2];
    match (is_v4, has_udp_checksum) {
        (true, true) => !edit.addr_delta,
        (true, false) => edit.port_delta,
        (false, true) => outer_delta,
        (false, false) => checksum::join(outer_delta, checksum::join(edit.addr_delta, edit.port_delta)),
    }
}

#[inline(always)]
fn write_quoted_ports<A: Address, P: Packet>(packet: &mut P, quote: &Quote<A>, edit: &Edit<A>) -> bool {
    let (Port([a, b]), Port([c, d])) = (edit.dport, edit.sport);
    if !packet.write(quote.inner_l4, [a, b, c, d]) {
        return false;
    }
    if quote.inner_udp_checksum == [0; 2] {
        return true;
    }
    let sum = checksum::update(quote.inner_udp_checksum, checksum::join(edit.addr_delta, edit.port_delta));
    packet.write(quote.inner_l4 + UDP_CHECKSUM, if sum == [0; 2] { [0xff; 2] } else { sum })
}
