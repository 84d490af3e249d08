//! Rejecting a packet: with a TCP reset, or with an ICMP or ICMPv6 "port unreachable", built from the packet.
//!
//! The answer replaces the frame and leaves on the device that the frame arrived on: link addresses swapped, VLAN tags kept. An
//! ICMP error quotes the IP header without options or extensions, and the first eight bytes of the transport header: a host
//! needs these to find the socket.

use bytemuck::{Pod, Zeroable};

use crate::{
    abi::{Address, SECOND_NS, V4, V6},
    checksum,
    headers::{ACK, FIN, Headers, RST, SYN, TCP},
    packet::Packet,
};

const HOP_LIMIT: u8 = 64;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// ICMP type 3, code 3 (RFC 792).
const PORT_UNREACHABLE: [u8; 2] = [3, 3];
/// ICMPv6 type 1, code 4 (RFC 4443).
const PORT_UNREACHABLE_V6: [u8; 2] = [1, 4];

/// The capacity of a bucket: this many nanoseconds of the configured rate.
const BURST_NS: u64 = 10_000_000_000;

/// The token bucket of a CPU, which limits how many packets it rejects. RFC 4443, section 2.4 (f), demands a limit for ICMPv6
/// errors; ICMPv4 errors and RST share it. Otherwise a flood of packets with a forged source would become a flood of answers to
/// that host.
///
/// A bucket that was never used is zero, and full. It holds one time, not a count and a time, so that no packet has to divide:
/// the time when the bucket will be full again. Each rejection adds the interval between two.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Bucket {
    /// Monotonic nanoseconds.
    pub full_at_ns: u64,
}

impl Bucket {
    /// The bucket after one more rejection; `None` if it is empty.
    #[inline(always)]
    #[must_use]
    pub fn take(self, now_ns: u64, interval_ns: u64) -> Option<Self> {
        let full_at_ns = self.full_at_ns.max(now_ns).saturating_add(interval_ns);
        (full_at_ns - now_ns <= BURST_NS).then_some(Self { full_at_ns })
    }
}

/// The [`crate::abi::Config::rejection_interval_ns`] for a number of rejections per second; zero means no limit in both.
#[must_use]
pub fn rejection_interval_ns(per_second: u32) -> u64 {
    SECOND_NS.checked_div(u64::from(per_second)).unwrap_or(0)
}

/// Whether this packet may be answered: it is no reset (RFC 9293, section 3.5.2), and comes from a single host (RFC 1122,
/// section 3.2.2).
#[inline(always)]
pub fn may_answer<A: Address>(headers: &Headers<A>) -> bool {
    let source = headers.key.saddr.to_mapped();
    let from_one_host = if A::BITS == V4::BITS {
        (1..224).contains(&source[12])
    } else {
        source[0] != 0xff && headers.key.saddr.sum() != 0
    };
    from_one_host && !(headers.key.protocol == TCP && headers.flags & RST != 0)
}

/// Turns the frame into its rejection: RST for TCP, otherwise port unreachable. False if the frame could not be changed; then
/// it must be dropped.
#[inline(never)]
pub fn reject<A: Address, P: Packet>(packet: &mut P, headers: &Headers<A>) -> bool {
    let Some(link) = Link::read(packet, headers.l3()) else { return false };
    let done = if headers.key.protocol == TCP { reset(packet, headers) } else { port_unreachable(packet, headers) };
    done && link.write_back(packet, headers.l3())
}

/// A link header: addresses, then the type or up to two VLAN tags and the type behind them.
struct Link {
    addresses: [u8; 12],
    kind: [u8; 2],
    tags: [[u8; 4]; 2],
}

impl Link {
    #[inline(always)]
    fn read<P: Packet>(packet: &P, l3: usize) -> Option<Self> {
        let mut tags = [[0; 4]; 2];
        if l3 >= 18 {
            tags[0] = packet.read(14)?;
        }
        if l3 >= 22 {
            tags[1] = packet.read(18)?;
        }
        Some(Self { addresses: packet.read(0)?, kind: packet.read(12)?, tags })
    }

    /// Writes it with the addresses swapped.
    #[inline(always)]
    fn write_back<P: Packet>(&self, packet: &mut P, l3: usize) -> bool {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = self.addresses;
        packet.write(0, [g, h, i, j, k, l, a, b, c, d, e, f])
            && packet.write(12, self.kind)
            && (l3 < 18 || packet.write(14, self.tags[0]))
            && (l3 < 22 || packet.write(18, self.tags[1]))
    }
}

/// RST as in RFC 9293, section 3.10.7.1. Its sequence number is the one that the packet acknowledges. If the packet
/// acknowledges nothing, the RST acknowledges the packet's whole sequence space.
#[inline(always)]
fn reset<A: Address, P: Packet>(packet: &mut P, headers: &Headers<A>) -> bool {
    let Some(tcp) = packet.read::<20>(headers.l4()) else { return false };
    let [_, _, _, _, s0, s1, s2, s3, a0, a1, a2, a3, offset, ..] = tcp;
    let (sequence, acknowledged, flags) = if headers.flags & ACK != 0 {
        ([a0, a1, a2, a3], [0; 4], RST)
    } else {
        let Some(end) = segment_end(packet, headers) else { return false };
        let header_len = usize::from(offset >> 4) * 4;
        let data_len = end.saturating_sub(headers.l4() + header_len) as u32;
        let occupied = data_len + u32::from(headers.flags & SYN != 0) + u32::from(headers.flags & FIN != 0);
        ([0; 4], u32::from_be_bytes([s0, s1, s2, s3]).wrapping_add(occupied).to_be_bytes(), RST | ACK)
    };
    let (sport, dport) = (headers.key.dport.0, headers.key.sport.0);
    let mut header = [0; 20];
    header[..2].copy_from_slice(&sport);
    header[2..4].copy_from_slice(&dport);
    header[4..8].copy_from_slice(&sequence);
    header[8..12].copy_from_slice(&acknowledged);
    header[12] = 5 << 4;
    header[13] = flags;
    let sum = pseudo_header_sum(headers, TCP, 20) + checksum::sum(&header);
    header[16..18].copy_from_slice(&checksum::field(sum));
    start_answer(packet, headers, TCP, 20).is_some_and(|l4| packet.write(l4, header))
}

/// Offset in the frame behind the packet's last byte, according to its IP header.
#[inline(always)]
fn segment_end<A: Address, P: Packet>(packet: &P, headers: &Headers<A>) -> Option<usize> {
    let (field, base) = if A::BITS == V4::BITS { (2, 0) } else { (4, 40) };
    let length = u16::from_be_bytes(packet.read(headers.l3() + field)?);
    Some(headers.l3() + base + usize::from(length))
}

#[inline(always)]
fn port_unreachable<A: Address, P: Packet>(packet: &mut P, headers: &Headers<A>) -> bool {
    let Some(transport) = packet.read::<8>(headers.l4()) else { return false };
    if A::BITS == V4::BITS {
        let Some(mut quote) = packet.read::<20>(headers.l3()) else { return false };
        quote[0] = 0x45;
        let mut head = [0; 8];
        head[..2].copy_from_slice(&PORT_UNREACHABLE);
        let sum = checksum::sum(&head) + checksum::sum(&quote) + checksum::sum(&transport);
        head[2..4].copy_from_slice(&checksum::field(sum));
        let len = head.len() + quote.len() + transport.len();
        start_answer(packet, headers, ICMP, len)
            .is_some_and(|l4| packet.write(l4, head) && packet.write(l4 + 8, quote) && packet.write(l4 + 28, transport))
    } else {
        let Some(mut quote) = packet.read::<40>(headers.l3()) else { return false };
        quote[6] = headers.key.protocol;
        let mut head = [0; 8];
        head[..2].copy_from_slice(&PORT_UNREACHABLE_V6);
        let len = head.len() + quote.len() + transport.len();
        let sum = pseudo_header_sum(headers, ICMPV6, len)
            + checksum::sum(&head)
            + checksum::sum(&quote)
            + checksum::sum(&transport);
        head[2..4].copy_from_slice(&checksum::field(sum));
        start_answer(packet, headers, ICMPV6, len)
            .is_some_and(|l4| packet.write(l4, head) && packet.write(l4 + 8, quote) && packet.write(l4 + 48, transport))
    }
}

/// Sizes the frame for an answer of `len` transport bytes and writes its IP header; returns the offset behind that.
#[inline(always)]
fn start_answer<A: Address, P: Packet>(
    packet: &mut P,
    headers: &Headers<A>,
    protocol: u8,
    len: usize,
) -> Option<usize> {
    let (from, to) = (headers.key.daddr.to_mapped(), headers.key.saddr.to_mapped());
    let l3 = headers.l3();
    if A::BITS == V4::BITS {
        let mut header = [0; 20];
        header[0] = 0x45;
        header[2..4].copy_from_slice(&(20 + len as u16).to_be_bytes());
        // Don't fragment, so an identification of zero is valid (RFC 6864).
        header[6] = 0x40;
        header[8] = HOP_LIMIT;
        header[9] = protocol;
        header[12..16].copy_from_slice(&V4::from_mapped(from).0);
        header[16..].copy_from_slice(&V4::from_mapped(to).0);
        let sum = checksum::sum(&header);
        header[10..12].copy_from_slice(&checksum::field(sum));
        (packet.resize(l3 + 20 + len, headers.l4()) && packet.write(l3, header)).then_some(l3 + 20)
    } else {
        let mut header = [0; 40];
        header[0] = 0x60;
        header[4..6].copy_from_slice(&(len as u16).to_be_bytes());
        header[6] = protocol;
        header[7] = HOP_LIMIT;
        header[8..24].copy_from_slice(&V6::from_mapped(from).0);
        header[24..].copy_from_slice(&V6::from_mapped(to).0);
        (packet.resize(l3 + 40 + len, headers.l4()) && packet.write(l3, header)).then_some(l3 + 40)
    }
}

/// Sum of the pseudo-header of an answer (RFC 9293, section 3.1; RFC 8200, section 8.1).
#[inline(always)]
fn pseudo_header_sum<A: Address>(headers: &Headers<A>, protocol: u8, len: usize) -> u32 {
    headers.key.saddr.sum() + headers.key.daddr.sum() + checksum::word(u16::from(protocol)) + checksum::word(len as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of rejections that a bucket grants in a row at one time, and the bucket afterwards.
    fn drain(mut bucket: Bucket, now_ns: u64, interval_ns: u64) -> (u32, Bucket) {
        let mut count = 0;
        while let Some(rest) = bucket.take(now_ns, interval_ns) {
            bucket = rest;
            count += 1;
        }
        (count, bucket)
    }

    #[test]
    fn a_bucket_grants_ten_seconds_at_once_and_then_the_rate() {
        for (per_second, burst) in [(100, 1000), (1, 10), (3, 30), (1000, 10_000)] {
            let interval_ns = rejection_interval_ns(per_second);
            for start_ns in [0, 1, 1_000_000_000_000_000, u64::MAX / 2] {
                let (count, bucket) = drain(Bucket::default(), start_ns, interval_ns);
                assert_eq!(count, burst, "{per_second} a second, at {start_ns}");
                let (count, bucket) = drain(bucket, start_ns + SECOND_NS, interval_ns);
                assert_eq!(count, per_second, "{per_second} a second, at {start_ns}, one second later");
                let (count, bucket) = drain(bucket, start_ns + SECOND_NS, interval_ns);
                assert_eq!(count, 0);
                let (count, _) = drain(bucket, start_ns + 1000 * SECOND_NS, interval_ns);
                assert_eq!(count, burst, "a bucket never holds more");
            }
        }
    }

    #[test]
    fn a_steady_stream_gets_the_rate() {
        let (interval_ns, mut bucket, mut granted) = (rejection_interval_ns(100), Bucket::default(), 0);
        // A thousand packets a second for a hundred seconds.
        for packet in 0..100_000 {
            if let Some(rest) = bucket.take(packet * SECOND_NS / 1000, interval_ns) {
                bucket = rest;
                granted += 1;
            }
        }
        assert!((10_990..=11_000).contains(&granted), "{granted}");
    }

    #[test]
    fn a_rate_of_zero_is_no_limit() {
        assert_eq!(rejection_interval_ns(0), 0);
        assert_eq!(rejection_interval_ns(100), 10_000_000);
    }
}
