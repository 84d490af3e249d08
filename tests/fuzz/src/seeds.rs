//! Initial inputs: every shape of frame that the parser knows, in states that produce every reason.

use crate::{
    frame::{self, TCP, UDP},
    state::{
        ADDRESS_V4, ADDRESS_V6, EXTERNAL_CLIENTS, HEAD, IN_RANGES, LOCAL, NO_ANSWER, ONE_PORT, PORTS, REJECTED_ENOUGH,
        TO_NODE, WITHIN,
    },
};

/// The states, by name; the fields of [`crate::state::State`] in order.
const STATES: [(&str, [u8; HEAD]); 25] = [
    ("random", [0, 0, 128, 2, 0xaa, 0xaa, 0, 0, 0, 9, 1, 0, 0]),
    ("consistent", [0, 1, 24, 2, 0xaa, 0xaa, 0, 0, 0, 9, 1, 0, 0]),
    ("least", [0, 2, 128, 2, 0xaa, 0xaa, 0, 0, 0, 9, 1, 0, 0]),
    ("unpinned", [0, 0x80, 128, 2, 0xaa, 0xaa, 0, 0, 0, 9, 1, 0, 0]),
    ("pinned", [0, 4, 128, 2, 0xaa, 0xaa, 1, 1, 1, 9, 1, 0, 0]),
    ("expired", [0, 4, 128, 2, 0xaa, 0xaa, 1, 1, 2, 9, 1, 0, 0]),
    ("absolute", [0, 8, 128, 2, 0xaa, 0xaa, 1, 1, 0xf1, 9, 1, 0, 0]),
    ("alive", [0, 12, 128, 2, 0xaa, 0xaa, 0x21, 1, 3, 9, 1, 0x40, 0]),
    ("drained", [0, 0, 128, 2, 0xa6, 0xa6, 1, 1, 1, 9, 1, 0x05, 0]),
    ("not a member", [0, 0, 128, 2, 0xa2, 0xa2, 1, 1, 1, 9, 1, 0, 0]),
    ("shared", [0, 0, 128, 2, 0xa2, 0xaa, 1, 1, 1, 9, 1, 0, 0]),
    ("pod retired", [0, 0, 128, 2, 0xaa, 0xaa, 0x11, 1, 1, 9, 1, 0x09, 0]),
    ("idle", [0, 4, 128, 0, 0xaa, 0xaa, 0, 0, 0, 9, 1, 0x40, 0]),
    ("no endpoints", [0, 0, 128, 2, 0, 0, 0, 0, 0, 9, 1, 0, 0]),
    ("beside", [0, 0x10, 128, 2, 0xaa, 0xaa, 0, 0, 0, 9, 1, 0, 0]),
    ("shadow", [0, 0x2c, 128, 2, 0xaa, 0xaa, 1, 1, 1, 9, 1, 0x05, 0]),
    ("slot too many", [0, 0x40, 128, 2, 0, 0, 0, 0, 0, 9, 1, 0, 0]),
    ("masqueraded", [0, 0, 128, 2, 0xaa, 0xaa, 1, 1, 1, 9, 1, 0x05, TO_NODE]),
    ("masqueraded, pods here", [0, 0, 128, 2, 0xaa, 0xaa, 1, 1, 1, 9, 1, 0x01, TO_NODE | LOCAL]),
    ("out of ports", [0, 0, 128, 2, 0xaa, 0xaa, 1, 1, 1, 9, 1, 0, TO_NODE | ONE_PORT]),
    ("external client", [0, 0, 128, 2, 0xaa, 0xaa, 0, 0, 0, 9, 1, 0, EXTERNAL_CLIENTS]),
    ("internal client", [0, 0, 128, 2, 0xaa, 0xaa, 0, 0, 0, 9, 1, 0, EXTERNAL_CLIENTS | IN_RANGES | WITHIN]),
    ("not in ranges", [0, 0, 128, 2, 0xaa, 0xaa, 0, 0, 0, 9, 1, 0, IN_RANGES]),
    ("rejected enough", [0, 0, 128, 2, 0, 0, 0, 0, 0, 9, 1, 0, REJECTED_ENOUGH]),
    ("none here", [0, 0, 128, 2, 0, 0, 0, 0, 0, 9, 1, 0, NO_ANSWER]),
];

/// The transport layer: protocol and TCP flags, or whether there is a UDP checksum.
const TRANSPORTS: [(&str, u8, u8); 7] = [
    ("syn", TCP, 0x02),
    ("ack", TCP, 0x10),
    ("fin", TCP, 0x11),
    ("rst", TCP, 0x04),
    ("syn-rst", TCP, 0x06),
    ("udp", UDP, 1),
    ("udp-without-checksum", UDP, 0),
];

/// Every seed, with a descriptive name.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for (state, head) in STATES {
        for is_v6 in [false, true] {
            for (transport, protocol, flags) in TRANSPORTS {
                for (shape, frame) in shapes(is_v6, protocol, flags) {
                    let family = if is_v6 { "v6" } else { "v4" };
                    let name = format!("{state} {family} {transport} {shape}").replace([' ', ','], "-");
                    seeds.push((name, [head.as_slice(), &frame].concat()));
                }
            }
        }
    }
    seeds
}

/// The frames of one transport: whole ones with every combination of headers, and some that must pass.
fn shapes(is_v6: bool, protocol: u8, flags: u8) -> Vec<(&'static str, Vec<u8>)> {
    let plain = Shape { is_v6, protocol, flags, tags: &[], between: &[] };
    let between: &[u8] = if is_v6 {
        // Hop-by-hop options, a routing header without segments left, an atomic fragment, destination options.
        &[43, 0, 1, 4, 0, 0, 0, 0, 44, 0, 4, 0, 0, 0, 0, 0, 60, 0, 0, 0, 1, 2, 3, 4, protocol, 0, 1, 4, 0, 0, 0, 0]
    } else {
        // Options: three no-operations, and the end.
        &[1, 1, 1, 0]
    };
    let extended = Shape { between, ..plain }.frame();
    // A later fragment, and a first fragment.
    let (later, first) = if is_v6 {
        (with(&extended, 14 + 40 + 8 + 8 + 3, 8), with(&extended, 14 + 40 + 8 + 8 + 3, 1))
    } else {
        (with(&plain.frame(), 14 + 7, 9), with(&plain.frame(), 14 + 6, 0x20))
    };
    // Offsets of the protocol, the low byte of the length, and the destination's last byte in the headers.
    let (protocol_at, length_at, address_at) = if is_v6 { (20, 19, 53) } else { (23, 17, 33) };
    let l4 = address_at + 1;
    let mut shapes = vec![
        ("plain", plain.frame()),
        ("vlan", Shape { tags: &[0x81, 0, 0, 7], ..plain }.frame()),
        ("qinq", Shape { tags: &[0x88, 0xa8, 0, 7, 0x81, 0, 0, 8], ..plain }.frame()),
        ("truncated", plain.frame()[..40].to_vec()),
        ("later-fragment", later),
        ("first-fragment", first),
        ("elsewhere", with(&plain.frame(), address_at, 77)),
        ("gre", with(&plain.frame(), protocol_at, 47)),
        ("arp", with(&plain.frame(), 13, 6)),
        ("wrong-version", with(&plain.frame(), 14, 0x15)),
        ("short-length", with(&plain.frame(), length_at, 7)),
    ];
    if is_v6 {
        shapes.push(("on-its-way", with(&extended, 14 + 40 + 8 + 3, 1)));
    } else {
        shapes.push(("short-header", with(&plain.frame(), 14, 0x44)));
    }
    if protocol == TCP {
        shapes.push(("short-offset", with(&plain.frame(), l4 + 12, 0x40)));
    }
    shapes.push(("extended", extended));
    shapes
}

/// The frame with one byte changed.
fn with(frame: &[u8], at: usize, byte: u8) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[at] = byte;
    frame
}

/// A whole packet to the service's first port.
#[derive(Clone, Copy)]
struct Shape<'a> {
    is_v6: bool,
    protocol: u8,
    flags: u8,
    /// VLAN tags.
    tags: &'a [u8],
    /// IPv4 options, or IPv6 extension headers. The last one names the transport.
    between: &'a [u8],
}

impl Shape<'_> {
    fn frame(&self) -> Vec<u8> {
        let transport = self.transport();
        let network = if self.is_v6 { self.ipv6(transport.len()) } else { self.ipv4(transport.len()) };
        let link = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        let ethertype = if self.is_v6 { [0x86, 0xdd] } else { [0x08, 0x00] };
        let mut frame = [&link, self.tags, &ethertype, &network, self.between, &transport].concat();
        if self.protocol == TCP || self.flags != 0 {
            complete_checksums(&mut frame);
        }
        frame
    }

    fn ipv4(&self, transport_len: usize) -> Vec<u8> {
        let header_len = 20 + self.between.len();
        let [hi, lo] = ((header_len + transport_len) as u16).to_be_bytes();
        let mut header = vec![0x40 | (header_len / 4) as u8, 0, hi, lo, 0, 0, 0x40, 0, 64, self.protocol, 0, 0];
        header.extend([192, 0, 2, 1]);
        header.extend(ADDRESS_V4.0);
        header
    }

    fn ipv6(&self, transport_len: usize) -> Vec<u8> {
        let [hi, lo] = ((self.between.len() + transport_len) as u16).to_be_bytes();
        // Extensions begin with hop-by-hop options, number zero.
        let next = if self.between.is_empty() { self.protocol } else { 0 };
        let mut header = vec![0x60, 0, 0, 0, hi, lo, next, 64];
        header.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        header.extend(ADDRESS_V6.0);
        header
    }

    fn transport(&self) -> Vec<u8> {
        let ports = [40_000u16.to_be_bytes(), PORTS[0].0.to_be_bytes()].concat();
        let payload = b"hello";
        let rest: &[u8] = if self.protocol == TCP {
            &[0, 0, 0, 1, 0, 0, 0, 2, 0x50, self.flags, 0x20, 0, 0, 0, 0, 0]
        } else {
            &[0, 13, 0, 0]
        };
        [&ports, rest, payload].concat()
    }
}

/// Fills in checksums that were zero.
fn complete_checksums(frame: &mut [u8]) {
    let reading = frame::read(frame).expect("the shape is whole");
    let network = !reading.network_error(frame);
    if !reading.is_v6 {
        frame[reading.l3 + 10..reading.l3 + 12].copy_from_slice(&network.to_be_bytes());
    }
    let transport = !reading.transport_error(frame, reading.end - reading.l4);
    let at = reading.checksum_at();
    frame[at..at + 2].copy_from_slice(&transport.to_be_bytes());
}
