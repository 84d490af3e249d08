//! Checksums computed only from the bytes, by RFC 1071, independent of their origin.

use anyhow::{Context, Result, bail, ensure};

use super::protocol;

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
    let mut at = 12;
    loop {
        let kind = u16::from_be_bytes(slice(frame, at, 2)?.try_into()?);
        at += 2;
        match kind {
            0x8100 | 0x88a8 => at += 2,
            0x0800 => return verify_ipv4(&frame[at..]),
            0x86dd => return verify_ipv6(&frame[at..]),
            _ => return Ok(Verified::Nothing),
        }
    }
}

fn verify_ipv4(packet: &[u8]) -> Result<Verified> {
    let header_length = usize::from(slice(packet, 0, 20)?[0] & 0x0f) * 4;
    let header = slice(packet, 0, header_length)?;
    ensure!(sum(&[header]) == 0xffff, "the IPv4 header's checksum is wrong");
    let total_length = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    // A short frame has padding behind its packet.
    let segment = slice(packet, header_length, total_length.saturating_sub(header_length))?;
    let is_fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0;
    if is_fragment {
        return Ok(Verified::Network);
    }
    verify_segment(&packet[12..20], packet[9], segment)
}

fn verify_ipv6(packet: &[u8]) -> Result<Verified> {
    let header = slice(packet, 0, 40)?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let mut rest = slice(packet, 40, length)?;
    let mut next = header[6];
    loop {
        let skip = match next {
            0 | 43 | 60 => (usize::from(slice(rest, 0, 2)?[1]) + 1) * 8,
            51 => (usize::from(slice(rest, 0, 2)?[1]) + 2) * 4,
            44 => {
                let is_whole = u16::from_be_bytes(slice(rest, 2, 2)?.try_into()?) & 0xfff9 == 0;
                if !is_whole {
                    return Ok(Verified::Network);
                }
                8
            }
            _ => return verify_segment(&header[8..40], next, rest),
        };
        next = slice(rest, 0, skip)?[0];
        rest = &rest[skip..];
    }
}

/// `addresses`: source and destination, adjacent as in the IP header.
fn verify_segment(addresses: &[u8], number: u8, segment: &[u8]) -> Result<Verified> {
    let (name, header_length) = match number {
        protocol::TCP => ("TCP", 20),
        protocol::UDP => ("UDP", 8),
        protocol::ICMP => ("ICMP", 8),
        protocol::ICMPV6 => ("ICMPv6", 8),
        _ => return Ok(Verified::Network),
    };
    let header = slice(segment, 0, header_length)?;
    let pseudo = pseudo_header(addresses, number, segment.len());
    if number == protocol::UDP {
        let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
        ensure!(length == segment.len(), "UDP's length is {length} of {}", segment.len());
        match (header[6..8] == [0, 0], addresses.len()) {
            (true, 8) => return Ok(Verified::Network),
            (true, _) => bail!("UDP over IPv6 without a checksum"),
            (false, _) => {}
        }
    }
    ensure!(sum(&[&pseudo, segment]) == 0xffff, "the {name} checksum is wrong");
    Ok(Verified::Transport)
}

/// The pseudo-header: the transport checksum covers it in addition to the segment. ICMP of IPv4 has none.
pub(super) fn pseudo_header(addresses: &[u8], number: u8, length: usize) -> Vec<u8> {
    if number == protocol::ICMP {
        return Vec::new();
    }
    // IPv4 and IPv6 arrange this differently, but with the same sum.
    let length = u32::try_from(length).expect("a packet's length");
    [addresses, &length.to_be_bytes(), &[0, 0, 0, number]].concat()
}

/// The ones' complement sum of the bytes, each part padded to whole words.
pub(super) fn sum(parts: &[&[u8]]) -> u16 {
    let mut total: u64 = 0;
    for part in parts {
        for word in part.chunks(2) {
            total += u64::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]));
        }
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).expect("folded")
}

fn slice(bytes: &[u8], at: usize, length: usize) -> Result<&[u8]> {
    bytes.get(at..at + length).with_context(|| format!("{} bytes, no {length} at {at}", bytes.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Extension, Frame, tcp_flags};

    #[test]
    fn rfc_1071_example_adds_up() {
        assert_eq!(sum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]), 0xddf2);
    }

    #[test]
    fn a_known_ipv4_header_is_right() {
        // The example from encyclopedias: its checksum is b861.
        let header = [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];
        assert_eq!(sum(&[&header]), 0xffff);
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
        let arp = [[0xff; 12].as_slice(), &[0x08, 0x06, 0, 1]].concat();
        assert_eq!(verify_checksums(&arp).unwrap(), Verified::Nothing);
    }
}
