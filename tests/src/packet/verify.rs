//! Checksums computed only from the bytes, by RFC 1071, independent of their origin.

use anyhow::{Result, bail, ensure};
use etherparse::{IpPayloadSlice, NetSlice, SlicedPacket, TransportSlice, checksum::Sum16BitWords, ip_number};

/// The parts of a frame that could be verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verified {
    /// The transport checksum, and IPv4's header checksum.
    Transport,
    /// Only the IP header: a fragment, a protocol without a known checksum, or UDP without one.
    Network,
    /// Nothing: it is not IP.
    Nothing,
}

/// Computes every checksum of the frame.
///
/// # Errors
/// When one is wrong, or the frame ends before its headers or lengths say.
pub fn verify_checksums(frame: &[u8]) -> Result<Verified> {
    let packet = SlicedPacket::from_ethernet(frame)?;
    match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header();
            ensure!(is_complete(&[header.slice()]), "the IPv4 header's checksum is wrong");
            verify_transport(packet.transport.as_ref(), &header.slice()[12..20], ip.payload())
        }
        Some(NetSlice::Ipv6(ip)) => {
            verify_transport(packet.transport.as_ref(), &ip.header().slice()[8..40], ip.payload())
        }
        Some(NetSlice::Arp(_)) | None => Ok(Verified::Nothing),
    }
}

/// `addresses`: source and destination, adjacent as in the IP header. A fragment has no `transport`.
fn verify_transport(
    transport: Option<&TransportSlice>,
    addresses: &[u8],
    segment: &IpPayloadSlice,
) -> Result<Verified> {
    let (number, segment) = (segment.ip_number, segment.payload);
    match transport {
        Some(TransportSlice::Udp(udp)) => {
            ensure!(
                usize::from(udp.length()) == segment.len(),
                "UDP's length is {} of {}",
                udp.length(),
                segment.len()
            );
            match (udp.checksum(), addresses.len()) {
                (0, 8) => return Ok(Verified::Network),
                (0, _) => bail!("UDP over IPv6 without a checksum"),
                _ => {}
            }
        }
        Some(TransportSlice::Tcp(_) | TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_)) => {}
        Some(TransportSlice::Igmp(_)) | None => return Ok(Verified::Network),
    }
    // IPv4 and IPv6 arrange the pseudo-header differently, but with the same sum. ICMP of IPv4 has none.
    let length = u32::try_from(segment.len())?.to_be_bytes();
    let pseudo = [addresses, &length, &[0, number.0]].concat();
    let pseudo = if number == ip_number::ICMP { &[] } else { pseudo.as_slice() };
    ensure!(is_complete(&[pseudo, segment]), "the checksum of {number:?} is wrong");
    Ok(Verified::Transport)
}

/// Whether the ones' complement sum of the parts, which include the checksum, is as it should be. Each part but the last has
/// whole words.
fn is_complete(parts: &[&[u8]]) -> bool {
    parts.iter().fold(Sum16BitWords::new(), |sum, part| sum.add_slice(part)).ones_complement() == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Extension, Frame, tcp_flags};

    #[test]
    fn a_known_ipv4_header_is_right() {
        // The example from encyclopedias: its checksum is b861.
        let header = [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];
        assert!(is_complete(&[&header]));
    }

    #[test]
    fn every_shape_is_built_right_and_a_damaged_byte_is_found() {
        let v4 = ("198.18.0.1:40000".parse().unwrap(), "10.96.0.10:80".parse().unwrap());
        let v6 = ("[2001:db8:c::1]:40000".parse().unwrap(), "[fd00:96::a]:80".parse().unwrap());
        for (source, destination) in [v4, v6] {
            let shapes = [
                Frame::tcp(source, destination, tcp_flags::SYN).tcp_options(&[2, 4, 5, 180]),
                Frame::udp(source, destination).payload(b"odd"),
                Frame::icmp(source.ip(), destination.ip(), 3, 3, [0; 4]).payload(b"quoted"),
                Frame::tcp(source, destination, tcp_flags::ACK).ipv4_options(&[1, 1, 1]).vlan(5).vlan(6),
                Frame::udp(source, destination)
                    .extension(Extension::HopByHop(Vec::new()))
                    .extension(Extension::Routing(vec![0; 6]))
                    .extension(Extension::DestinationOptions(vec![1, 12])),
            ];
            for shape in shapes {
                let mut frame = shape.build();
                assert_eq!(verify_checksums(&frame).unwrap(), Verified::Transport, "{shape:?}");
                let last = frame.len() - 1;
                frame[last] ^= 0x10;
                assert!(verify_checksums(&frame).is_err(), "{shape:?}");
            }
        }
    }

    #[test]
    fn fragments_and_udp_without_checksum_are_told_apart() {
        let (source, destination) = ("198.18.0.1:1".parse().unwrap(), "10.96.0.10:2".parse().unwrap());
        let frame = Frame::udp(source, destination).without_udp_checksum();
        assert_eq!(verify_checksums(&frame.build()).unwrap(), Verified::Network);
        let frame = Frame::udp(source, destination).ipv4_fragment(185, true);
        assert_eq!(verify_checksums(&frame.build()).unwrap(), Verified::Network);
        let arp = [[0xff; 12].as_slice(), &[0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1], &[0; 20]].concat();
        assert_eq!(verify_checksums(&arp).unwrap(), Verified::Nothing);
    }
}
