//! From a frame to its headers: Ethernet, up to two VLAN tags, IPv4 with options, IPv6 with extension headers, TCP and
//! UDP. Anything else, and anything that contradicts itself, is named by a [`Reason`] and passes.

use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    abi::{Direction, FlowKey, Port, Reason, V4, V6},
    packet::Packet,
};

/// IANA number of TCP.
pub const TCP: u8 = IpProto::Tcp as u8;
/// IANA number of UDP.
pub const UDP: u8 = IpProto::Udp as u8;

/// TCP flag: no more data from the sender.
pub const FIN: u8 = 0x01;
/// TCP flag: a connection begins.
pub const SYN: u8 = 0x02;
/// TCP flag: the connection is void.
pub const RST: u8 = 0x04;
/// TCP flag: the acknowledgement number counts.
pub const ACK: u8 = 0x10;

/// VLAN tags in a frame, at most.
const MAX_TAGS: usize = 2;
/// IPv6 extension headers in a packet, at most; with more it passes as [`Reason::OtherProtocol`].
const MAX_EXTENSIONS: usize = 6;

const ETH_IPV4: [u8; 2] = (EtherType::Ipv4 as u16).to_ne_bytes();
const ETH_IPV6: [u8; 2] = (EtherType::Ipv6 as u16).to_ne_bytes();
const ETH_VLAN: [u8; 2] = [0x81, 0x00];
const ETH_QINQ: [u8; 2] = [0x88, 0xa8];

/// What the pipeline knows of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Headers<A> {
    /// Addresses, ports and protocol, and the direction they were parsed for.
    pub key: FlowKey<A>,
    /// Offset of the IP header.
    pub l3: u16,
    /// Offset of the TCP or UDP header.
    pub l4: u16,
    /// The IPv4 header's checksum; zero for IPv6.
    pub l3_checksum: [u8; 2],
    /// The TCP or UDP checksum.
    pub l4_checksum: [u8; 2],
    /// TCP flags; zero for UDP.
    pub flags: u8,
}

impl<A> Headers<A> {
    /// Offset of the IP header.
    #[inline(always)]
    pub const fn l3(&self) -> usize {
        self.l3 as usize
    }

    /// Offset of the TCP or UDP header.
    #[inline(always)]
    pub const fn l4(&self) -> usize {
        self.l4 as usize
    }

    /// A TCP packet that opens a connection.
    #[inline(always)]
    pub const fn is_opening(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }
}

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
    // More fragments, or an offset.
    if fragment_hi & 0x3f != 0 || fragment_lo != 0 {
        return Err(Reason::Fragment);
    }
    let total_len = usize::from(u16::from_be_bytes([length_hi, length_lo]));
    let [.., a, b, c, d, e, f, g, h] = header;
    let ports = Transport { l4: l3 + header_len, protocol, ip_payload_len: total_len.checked_sub(header_len) };
    // A total length of zero is a large segment made by this host (BIG TCP).
    let transport = ports.read(packet, total_len == 0)?;
    Ok(Headers {
        key: transport.key(V4([a, b, c, d]), V4([e, f, g, h]), protocol, direction),
        l3: l3 as u16,
        l4: (l3 + header_len) as u16,
        l3_checksum: [sum_hi, sum_lo],
        l4_checksum: transport.checksum,
        flags: transport.flags,
    })
}

/// Reads an IPv6 packet's headers (RFC 8200).
///
/// # Errors
/// [`Reason::Truncated`], [`Reason::Malformed`], [`Reason::Fragment`], [`Reason::OtherProtocol`].
#[inline(always)]
pub fn ipv6<P: Packet>(packet: &P, l3: usize, direction: Direction) -> Result<Headers<V6>, Reason> {
    let header: [u8; 8] = packet.read(l3).ok_or(Reason::Truncated)?;
    let saddr = V6(packet.read(l3 + 8).ok_or(Reason::Truncated)?);
    let daddr = V6(packet.read(l3 + 24).ok_or(Reason::Truncated)?);
    let [version, _, _, _, length_hi, length_lo, first, _] = header;
    if version >> 4 != 6 {
        return Err(Reason::Malformed);
    }
    let payload_len = usize::from(u16::from_be_bytes([length_hi, length_lo]));
    let (protocol, extensions_len) = skip_extensions(packet, l3 + Ipv6Hdr::LEN, first)?;
    let l4 = l3 + Ipv6Hdr::LEN + extensions_len;
    let ports = Transport { l4, protocol, ip_payload_len: payload_len.checked_sub(extensions_len) };
    // A payload length of zero is a large segment made by this host (BIG TCP), or a jumbogram.
    let transport = ports.read(packet, payload_len == 0)?;
    Ok(Headers {
        key: transport.key(saddr, daddr, protocol, direction),
        l3: l3 as u16,
        l4: l4 as u16,
        l3_checksum: [0; 2],
        l4_checksum: transport.checksum,
        flags: transport.flags,
    })
}

/// The transport protocol, and the length of the extension headers before it.
#[inline(always)]
pub(crate) fn skip_extensions<P: Packet>(packet: &P, start: usize, first: u8) -> Result<(u8, usize), Reason> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;

    let mut protocol = first;
    let mut len = 0;
    for _ in 0..MAX_EXTENSIONS {
        if protocol == TCP || protocol == UDP {
            return Ok((protocol, len));
        }
        if !matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
            return Err(Reason::OtherProtocol);
        }
        let [next, units, hi, lo]: [u8; 4] = packet.read(start + len).ok_or(Reason::Truncated)?;
        match protocol {
            // An offset or more fragments; a lone ("atomic", RFC 6946) fragment is a whole packet.
            FRAGMENT if hi != 0 || lo & 0xf9 != 0 => return Err(Reason::Fragment),
            // Segments left: the destination is not yet the one that the checksum covers.
            ROUTING if lo != 0 => return Err(Reason::OtherProtocol),
            FRAGMENT => len += 8,
            _ => len += (usize::from(units) + 1) * 8,
        }
        protocol = next;
    }
    if protocol == TCP || protocol == UDP { Ok((protocol, len)) } else { Err(Reason::OtherProtocol) }
}

/// Where a transport header should be.
struct Transport {
    l4: usize,
    protocol: u8,
    /// Bytes that the IP header leaves for it; `None`: fewer than none.
    ip_payload_len: Option<usize>,
}

/// What is read of a transport header.
struct Ports {
    sport: Port,
    dport: Port,
    checksum: [u8; 2],
    flags: u8,
}

impl Transport {
    #[inline(always)]
    fn read<P: Packet>(&self, packet: &P, any_length: bool) -> Result<Ports, Reason> {
        let minimum = match self.protocol {
            TCP => TcpHdr::LEN,
            UDP => UdpHdr::LEN,
            _ => return Err(Reason::OtherProtocol),
        };
        if !any_length && self.ip_payload_len.is_none_or(|len| len < minimum) {
            return Err(Reason::Malformed);
        }
        if self.protocol == UDP {
            let [a, b, c, d, _, _, e, f]: [u8; UdpHdr::LEN] = packet.read(self.l4).ok_or(Reason::Truncated)?;
            return Ok(Ports { sport: Port([a, b]), dport: Port([c, d]), checksum: [e, f], flags: 0 });
        }
        let header: [u8; TcpHdr::LEN] = packet.read(self.l4).ok_or(Reason::Truncated)?;
        let [a, b, c, d, ..] = header;
        let [.., offset, flags, _, _, e, f, _, _] = header;
        if offset >> 4 < 5 {
            return Err(Reason::Malformed);
        }
        Ok(Ports { sport: Port([a, b]), dport: Port([c, d]), checksum: [e, f], flags })
    }
}

impl Ports {
    #[inline(always)]
    const fn key<A>(&self, saddr: A, daddr: A, protocol: u8, direction: Direction) -> FlowKey<A>
    where
        A: Copy,
    {
        FlowKey {
            saddr,
            daddr,
            sport: self.sport,
            dport: self.dport,
            protocol,
            direction: direction as u8,
            pad: [0; 2],
        }
    }
}
