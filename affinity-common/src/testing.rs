//! For tests: frames of every shape that the pipeline understands, built from scratch with complete checksums.

use proptest::prelude::*;

use crate::{
    abi::{Address, V4, V6},
    headers::{TCP, UDP},
};

/// The part of a frame that translation changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ends<A> {
    pub(crate) from: (A, u16),
    pub(crate) to: (A, u16),
}

/// The part of a frame that translation does not change.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) tags: usize,
    pub(crate) time_to_live: u8,
    pub(crate) protocol: u8,
    /// Units of four bytes: IPv4 options.
    pub(crate) option_words: u8,
    /// IPv6 extension headers, by their length in units of eight bytes beyond the first.
    pub(crate) extensions: Vec<u8>,
    pub(crate) flags: u8,
    pub(crate) sequence: u32,
    pub(crate) acknowledged: u32,
    pub(crate) has_checksum: bool,
    pub(crate) payload: Vec<u8>,
    pub(crate) trailer: usize,
}

impl Shape {
    /// A segment without data.
    pub(crate) fn tcp(flags: u8) -> Self {
        Self {
            tags: 0,
            time_to_live: 64,
            protocol: TCP,
            option_words: 0,
            extensions: Vec::new(),
            flags,
            sequence: 1,
            acknowledged: 1,
            has_checksum: true,
            payload: Vec::new(),
            trailer: 0,
        }
    }

    /// An empty datagram.
    pub(crate) fn udp() -> Self {
        Self { protocol: UDP, ..Self::tcp(0) }
    }

    /// Offset of the IP header.
    pub(crate) fn l3(&self) -> usize {
        14 + 4 * self.tags
    }

    /// Offset of the TCP or UDP header.
    pub(crate) fn l4<A: Address>(&self) -> usize {
        let extensions: usize = self.extensions.iter().map(|units| 8 * (usize::from(*units) + 1)).sum();
        self.l3() + if A::BITS == V4::BITS { 20 + 4 * usize::from(self.option_words) } else { 40 + extensions }
    }

    /// The frame.
    pub(crate) fn frame<A: Address>(&self, ends: &Ends<A>) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for tag in 0..self.tags {
            frame.extend([0x81, 0, 0, tag as u8]);
        }
        let segment = self.segment(ends);
        if A::BITS == V4::BITS {
            frame.extend([0x08, 0x00]);
            frame.extend(self.ipv4_header(ends, segment.len()));
        } else {
            frame.extend([0x86, 0xdd]);
            frame.extend(self.ipv6_headers(ends, segment.len()));
        }
        frame.extend(segment);
        frame.extend(vec![0xee; self.trailer]);
        frame
    }

    fn ipv4_header<A: Address>(&self, ends: &Ends<A>, segment_len: usize) -> Vec<u8> {
        let len = 20 + 4 * usize::from(self.option_words);
        let mut header = vec![0x45 + self.option_words, 0];
        header.extend(((len + segment_len) as u16).to_be_bytes());
        header.extend([0, 7, 0x40, 0, self.time_to_live, self.protocol, 0, 0]);
        header.extend(octets(ends.from.0));
        header.extend(octets(ends.to.0));
        header.resize(len, 1);
        let checksum = !sum(&[&header]);
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        header
    }

    fn ipv6_headers<A: Address>(&self, ends: &Ends<A>, segment_len: usize) -> Vec<u8> {
        const DESTINATION_OPTIONS: u8 = 60;
        let mut extensions = Vec::new();
        for (number, units) in (1..).zip(&self.extensions) {
            let next = if number < self.extensions.len() { DESTINATION_OPTIONS } else { self.protocol };
            extensions.extend([next, *units]);
            extensions.extend(vec![0; 8 * (usize::from(*units) + 1) - 2]);
        }
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(((extensions.len() + segment_len) as u16).to_be_bytes());
        header.extend([if extensions.is_empty() { self.protocol } else { DESTINATION_OPTIONS }, self.time_to_live]);
        header.extend(octets(ends.from.0));
        header.extend(octets(ends.to.0));
        header.extend(extensions);
        header
    }

    fn segment<A: Address>(&self, ends: &Ends<A>) -> Vec<u8> {
        let mut segment = [ends.from.1.to_be_bytes(), ends.to.1.to_be_bytes()].concat();
        let at = if self.protocol == TCP {
            segment.extend(self.sequence.to_be_bytes());
            segment.extend(self.acknowledged.to_be_bytes());
            segment.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
            16
        } else {
            segment.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            segment.extend([0, 0]);
            6
        };
        segment.extend(&self.payload);
        if self.protocol == TCP || self.has_checksum {
            let pseudo = pseudo_header(octets(ends.from.0), octets(ends.to.0), self.protocol, segment.len());
            let checksum = match !sum(&[&pseudo, &segment]) {
                0 if self.protocol == UDP => 0xffff,
                checksum => checksum,
            };
            segment[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        }
        segment
    }
}

/// Any shape.
pub(crate) fn shapes() -> impl Strategy<Value = Shape> {
    let headers = (0..3usize, prop::bool::ANY, 0..11u8, prop::collection::vec(0..3u8, 0..5));
    let content = (any::<u8>(), any::<u32>(), any::<u32>(), prop::bool::weighted(0.9));
    (headers, content, prop::collection::vec(any::<u8>(), 0..70), 0..4usize).prop_map(
        |(
            (tags, is_tcp, option_words, extensions),
            (flags, sequence, acknowledged, has_checksum),
            payload,
            trailer,
        )| {
            let protocol = if is_tcp { TCP } else { UDP };
            let headers = Shape { tags, protocol, option_words, extensions, ..Shape::tcp(flags) };
            Shape { sequence, acknowledged, has_checksum, payload, trailer, ..headers }
        },
    )
}

/// Any two ends, IPv4.
pub(crate) fn ends_v4() -> impl Strategy<Value = Ends<V4>> {
    any::<(([u8; 4], u16), ([u8; 4], u16))>()
        .prop_map(|((from, sport), (to, dport))| Ends { from: (V4(from), sport), to: (V4(to), dport) })
}

/// Any two ends, IPv6.
pub(crate) fn ends_v6() -> impl Strategy<Value = Ends<V6>> {
    any::<(([u8; 16], u16), ([u8; 16], u16))>()
        .prop_map(|((from, sport), (to, dport))| Ends { from: (V6(from), sport), to: (V6(to), dport) })
}

/// An address as in a header.
pub(crate) fn octets<A: Address>(address: A) -> Vec<u8> {
    let mapped = address.to_mapped();
    if A::BITS == V4::BITS { mapped[12..].to_vec() } else { mapped.to_vec() }
}

/// The pseudo-header: TCP, UDP and ICMPv6 checksums cover it in addition to the segment.
pub(crate) fn pseudo_header(from: Vec<u8>, to: Vec<u8>, protocol: u8, len: usize) -> Vec<u8> {
    [from, to, (len as u32).to_be_bytes().to_vec(), vec![0, 0, 0, protocol]].concat()
}

/// The one's complement sum of the big-endian words of each part, bit by bit as RFC 1071 writes it.
pub(crate) fn sum(parts: &[&[u8]]) -> u16 {
    let mut total = 0u64;
    for part in parts {
        for word in part.chunks(2) {
            total += u64::from(word[0]) << 8 | u64::from(*word.get(1).unwrap_or(&0));
        }
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}
