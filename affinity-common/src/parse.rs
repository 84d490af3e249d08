//! Parses a frame: Ethernet, up to two VLAN tags, IPv4 with options, IPv6 with extension headers, TCP, UDP and SCTP. All other
//! and malformed packets pass, with a [`Reason`].

use network_types::{
    eth::{EthHdr, EtherType},
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    abi::{Direction, FlowKey, Reason, V4, V6},
    headers::{ACK, FIRST_FRAGMENT, Headers, RST, SCTP, SYN, Segment, TCP, UDP},
    packet::Packet,
};

/// Length of the common header of SCTP (RFC 9260).
const SCTP_LEN: usize = 12;

/// VLAN tags in a frame, at most.
const MAX_TAGS: usize = 2;
/// IPv6 extension headers in a packet, at most; with more it passes as [`Reason::OtherProtocol`].
const MAX_EXTENSIONS: usize = 6;

const ETH_IPV4: [u8; 2] = (EtherType::Ipv4 as u16).to_ne_bytes();
const ETH_IPV6: [u8; 2] = (EtherType::Ipv6 as u16).to_ne_bytes();
const ETH_VLAN: [u8; 2] = [0x81, 0x00];
const ETH_QINQ: [u8; 2] = [0x88, 0xa8];

/// The network protocol of a frame, and where its header starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Network {
    /// IPv4 at an offset.
    V4(usize),
    /// IPv6 at an offset.
    V6(usize),
}

/// Reads the link header.
///
/// # Errors
/// [`Reason::Truncated`], [`Reason::NotIp`].
#[inline(always)]
pub fn network<P: Packet>(packet: &P) -> Result<Network, Reason> {
    let mut l3 = EthHdr::LEN;
    let mut ethertype: [u8; 2] = packet.read(l3 - 2).ok_or(Reason::Truncated)?;
    for _ in 0..MAX_TAGS {
        if ethertype != ETH_VLAN && ethertype != ETH_QINQ {
            break;
        }
        l3 += 4;
        ethertype = packet.read(l3 - 2).ok_or(Reason::Truncated)?;
    }
    match ethertype {
        ETH_IPV4 => Ok(Network::V4(l3)),
        ETH_IPV6 => Ok(Network::V6(l3)),
        _ => Err(Reason::NotIp),
    }
}

/// Reads an IPv4 packet's headers (RFC 791).
///
/// # Errors
/// [`Reason::Truncated`], [`Reason::Malformed`], [`Reason::Fragment`], [`Reason::OtherProtocol`].
#[inline(always)]
pub fn ipv4<P: Packet>(packet: &P, l3: usize, direction: Direction) -> Result<Headers<V4>, Reason> {
    let header: [u8; Ipv4Hdr::LEN] = packet.read(l3).ok_or(Reason::Truncated)?;
    let [version_ihl, _, length_hi, length_lo, _, _, fragment_hi, fragment_lo, _, protocol, sum_hi, sum_lo, ..] =
        header;
    let header_len = usize::from(version_ihl & 0x0f) * 4;
    if version_ihl >> 4 != 4 || header_len < Ipv4Hdr::LEN {
        return Err(Reason::Malformed);
    }
    // A later fragment: it has no ports.
    if fragment_hi & 0x1f != 0 || fragment_lo != 0 {
        return Err(Reason::Fragment);
    }
    let total_len = usize::from(u16::from_be_bytes([length_hi, length_lo]));
    let [.., a, b, c, d, e, f, g, h] = header;
    let ports = Transport { l4: l3 + header_len, protocol, ip_payload_len: total_len.checked_sub(header_len) };
    // A total length of zero is a large segment made by this host (BIG TCP).
    let transport = ports.read(packet, total_len == 0)?;
    Ok(Headers {
        key: FlowKey::of_packet(V4([a, b, c, d]), V4([e, f, g, h]), transport.ports, protocol, direction),
        segment: transport.segment,
        // More fragments.
        l4: (l3 + header_len) as u16 | if fragment_hi & 0x20 != 0 { FIRST_FRAGMENT } else { 0 },
        l3: l3 as u8,
        flags: transport.flags,
        l3_checksum: u16::from_ne_bytes([sum_hi, sum_lo]),
        l4_checksum: transport.checksum,
    })
}

/// Reads an IPv6 packet's headers (RFC 8200).
///
/// # Errors
/// [`Reason::Truncated`], [`Reason::Malformed`], [`Reason::Fragment`], [`Reason::OtherProtocol`].
#[inline(always)]
pub fn ipv6<P: Packet>(packet: &P, l3: usize, direction: Direction) -> Result<Headers<V6>, Reason> {
    let header: [u8; Ipv6Hdr::LEN] = packet.read(l3).ok_or(Reason::Truncated)?;
    let [version, _, _, _, length_hi, length_lo, first, _, ..] = header;
    if version >> 4 != 6 {
        return Err(Reason::Malformed);
    }
    let payload_len = usize::from(u16::from_be_bytes([length_hi, length_lo]));
    let Upper { protocol, len: extensions_len, is_first_fragment } = skip_extensions(packet, l3 + Ipv6Hdr::LEN, first)?;
    let l4 = l3 + Ipv6Hdr::LEN + extensions_len;
    let ports = Transport { l4, protocol, ip_payload_len: payload_len.checked_sub(extensions_len) };
    // A payload length of zero is a large segment made by this host (BIG TCP), or a jumbogram.
    let transport = ports.read(packet, payload_len == 0)?;
    // Read late, and as words: the search for the transport header needs all registers.
    let addresses: [u8; 32] = packet.read(l3 + 8).ok_or(Reason::Truncated)?;
    let [a, b, c, d]: [u64; 4] = bytemuck::must_cast(addresses);
    let (saddr, daddr) = (V6(bytemuck::must_cast([a, b])), V6(bytemuck::must_cast([c, d])));
    Ok(Headers {
        key: FlowKey::of_packet(saddr, daddr, transport.ports, protocol, direction),
        segment: transport.segment,
        l4: l4 as u16 | if is_first_fragment { FIRST_FRAGMENT } else { 0 },
        l3: l3 as u8,
        flags: transport.flags,
        l3_checksum: 0,
        l4_checksum: transport.checksum,
    })
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// The transport header of an IPv6 packet.
pub(crate) struct Upper {
    pub(crate) protocol: u8,
    /// Length of the extension headers.
    pub(crate) len: usize,
    pub(crate) is_first_fragment: bool,
}

/// Finds the transport header behind the extension headers.
#[inline(always)]
pub(crate) fn skip_extensions<P: Packet>(packet: &P, start: usize, first: u8) -> Result<Upper, Reason> {
    let mut upper = Upper { protocol: first, len: 0, is_first_fragment: false };
    for _ in 0..MAX_EXTENSIONS {
        if is_transport(upper.protocol) {
            return Ok(upper);
        }
        if !matches!(upper.protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
            return Err(Reason::OtherProtocol);
        }
        let [next, units, hi, lo]: [u8; 4] = packet.read(start + upper.len).ok_or(Reason::Truncated)?;
        match upper.protocol {
            FRAGMENT if hi != 0 || lo & 0xf8 != 0 => return Err(Reason::Fragment),
            // Segments left: the destination is not yet the one that the checksum covers.
            ROUTING if lo != 0 => return Err(Reason::OtherProtocol),
            FRAGMENT => {
                // A lone ("atomic", RFC 6946) fragment is a whole packet.
                upper.is_first_fragment |= lo & 1 != 0;
                upper.len += 8;
            }
            _ => upper.len += (usize::from(units) + 1) * 8,
        }
        upper.protocol = next;
    }
    if is_transport(upper.protocol) { Ok(upper) } else { Err(Reason::OtherProtocol) }
}

/// The identification in the fragment header of an IPv6 packet.
#[inline(always)]
pub(crate) fn fragment_id<P: Packet>(packet: &P, start: usize, first: u8) -> Option<[u8; 4]> {
    let (mut protocol, mut at) = (first, start);
    for _ in 0..MAX_EXTENSIONS {
        let [next, units, _, _]: [u8; 4] = packet.read(at)?;
        match protocol {
            FRAGMENT => return packet.read(at + 4),
            HOP_BY_HOP | ROUTING | DESTINATION => at += (usize::from(units) + 1) * 8,
            _ => return None,
        }
        protocol = next;
    }
    None
}

#[inline(always)]
const fn is_transport(protocol: u8) -> bool {
    protocol == TCP || protocol == UDP || protocol == SCTP
}

/// The place of a transport header.
struct Transport {
    l4: usize,
    protocol: u8,
    /// Its length in bytes according to the IP header; `None`: negative.
    ip_payload_len: Option<usize>,
}

/// The fields of a transport header.
struct Ports {
    /// Source and destination.
    ports: [u8; 4],
    checksum: [u8; 2],
    flags: u8,
    segment: Segment,
}

impl Transport {
    #[inline(always)]
    fn read<P: Packet>(&self, packet: &P, any_length: bool) -> Result<Ports, Reason> {
        let minimum = match self.protocol {
            TCP => TcpHdr::LEN,
            UDP => UdpHdr::LEN,
            SCTP => SCTP_LEN,
            _ => return Err(Reason::OtherProtocol),
        };
        if !any_length && self.ip_payload_len.is_none_or(|len| len < minimum) {
            return Err(Reason::Malformed);
        }
        if self.protocol == UDP {
            let [a, b, c, d, _, _, e, f]: [u8; UdpHdr::LEN] = packet.read(self.l4).ok_or(Reason::Truncated)?;
            return Ok(Ports { ports: [a, b, c, d], checksum: [e, f], flags: 0, segment: 0 });
        }
        if self.protocol == SCTP {
            let ports = packet.read(self.l4).ok_or(Reason::Truncated)?;
            let [chunk]: [u8; 1] = packet.read(self.l4 + SCTP_LEN).ok_or(Reason::Truncated)?;
            return Ok(Ports { ports, checksum: [0; 2], flags: sctp_flags(chunk), segment: 0 });
        }
        let header: [u8; TcpHdr::LEN] = packet.read(self.l4).ok_or(Reason::Truncated)?;
        let [a, b, c, d, g, h, i, j, k, l, m, n, ..] = header;
        let segment = Segment::from_ne_bytes([g, h, i, j, k, l, m, n]);
        let [.., offset, flags, _, _, e, f, _, _] = header;
        if offset >> 4 < 5 {
            return Err(Reason::Malformed);
        }
        Ok(Ports { ports: [a, b, c, d], checksum: [e, f], flags, segment })
    }
}

/// The first chunk of an SCTP packet (RFC 9260, section 3.2), as TCP flags.
#[inline(always)]
const fn sctp_flags(chunk: u8) -> u8 {
    const INIT: u8 = 1;
    const ABORT: u8 = 6;
    const SHUTDOWN_COMPLETE: u8 = 14;
    match chunk {
        INIT => SYN,
        ABORT | SHUTDOWN_COMPLETE => RST,
        _ => ACK,
    }
}
