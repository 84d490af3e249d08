//! A second reading of frames, to check the pipeline: slow, plain, and written from the RFCs instead of from the parser under
//! test. If both read a frame, they must get the same result.

/// IANA number of ICMP.
pub const ICMP: u8 = 1;
/// IANA number of TCP.
pub const TCP: u8 = 6;
/// IANA number of UDP.
pub const UDP: u8 = 17;
/// IANA number of ICMPv6.
pub const ICMPV6: u8 = 58;

/// TCP flag: no more data.
pub const FIN: u8 = 0x01;
/// TCP flag: a connection begins.
pub const SYN: u8 = 0x02;
/// TCP flag: the connection is reset.
pub const RST: u8 = 0x04;
/// TCP flag: the acknowledgement number is valid.
pub const ACK: u8 = 0x10;

/// With more extension headers a packet is not translated.
const MAX_EXTENSIONS: usize = 6;

/// A packet in a frame: IPv4 or IPv6, whole or its first fragment, over a known transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// IPv6, not IPv4.
    pub is_v6: bool,
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of the transport header.
    pub l4: usize,
    /// Offset behind the last byte of the packet that the frame holds.
    pub end: usize,
    /// The packet ends where its IP header says: the frame is not cut short, and the header has a length.
    pub is_complete: bool,
    /// IANA protocol number.
    pub protocol: u8,
    /// Source, then destination.
    pub addresses: [Vec<u8>; 2],
    /// Source, then destination; zeros for ICMP.
    pub ports: [u16; 2],
}

/// Reads a frame; `None` if it contains no packet with the header of a known transport.
pub fn read(frame: &[u8]) -> Option<Reading> {
    let l3 = network(frame)?;
    match word(frame, l3 - 2)? {
        0x0800 => read_v4(frame, l3),
        0x86dd => read_v6(frame, l3),
        _ => None,
    }
}

/// The offset of the network header.
fn network(frame: &[u8]) -> Option<usize> {
    let mut l3 = 14;
    let mut tags = 0;
    while tags < 2 && matches!(word(frame, l3 - 2)?, 0x8100 | 0x88a8) {
        l3 += 4;
        tags += 1;
    }
    Some(l3)
}

/// The ranges of an IP packet's addresses, and of the IPv4 header's checksum, for any transport.
pub fn network_places(frame: &[u8]) -> Option<[std::ops::Range<usize>; 2]> {
    let l3 = network(frame)?;
    let places =
        if word(frame, l3 - 2)? == 0x86dd { [l3 + 8..l3 + 40, 0..0] } else { [l3 + 12..l3 + 20, l3 + 10..l3 + 12] };
    (frame.len() >= places[0].end).then_some(places)
}

/// The error of an IPv4 header's checksum, in one's complement; zero for IPv6.
pub fn header_error(frame: &[u8]) -> u16 {
    let is_v4 = |l3: &usize| word(frame, l3 - 2) == Some(0x0800);
    network(frame).filter(is_v4).map_or(0, |l3| residue(sum(&frame[l3..l3 + usize::from(frame[l3] & 0xf) * 4])))
}

fn read_v4(frame: &[u8], l3: usize) -> Option<Reading> {
    let header = frame.get(l3..l3 + 20)?;
    let is_later_fragment = word(header, 6)? & 0x1fff != 0;
    if header[0] >> 4 != 4 || header[0] & 0xf < 5 || is_later_fragment {
        return None;
    }
    let l4 = l3 + usize::from(header[0] & 0xf) * 4;
    let (end, is_complete) = end_of(frame, l3, word(header, 2)?);
    let addresses = [header[12..16].to_vec(), header[16..20].to_vec()];
    with_ports(frame, Reading { is_v6: false, l3, l4, end, is_complete, protocol: header[9], addresses, ports: [0; 2] })
}

fn read_v6(frame: &[u8], l3: usize) -> Option<Reading> {
    let header = frame.get(l3..l3 + 40)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let mut protocol = header[6];
    let mut l4 = l3 + 40;
    let mut extensions = 0;
    while let 0 | 43 | 44 | 60 = protocol {
        extensions += 1;
        let extension = frame.get(l4..l4 + 4)?;
        let is_whole = match protocol {
            43 => extension[3] == 0,
            44 => word(extension, 2)? & 0xfff8 == 0,
            _ => true,
        };
        if !is_whole || extensions > MAX_EXTENSIONS {
            return None;
        }
        l4 += if protocol == 44 { 8 } else { 8 + 8 * usize::from(extension[1]) };
        protocol = extension[0];
    }
    let (end, is_complete) = end_of(frame, l3 + 40, word(header, 4)?);
    let addresses = [header[8..24].to_vec(), header[24..40].to_vec()];
    with_ports(frame, Reading { is_v6: true, l3, l4, end, is_complete, protocol, addresses, ports: [0; 2] })
}

/// The end of a packet, and whether that is where its header says. Bytes behind it are padding. With a length field of zero,
/// the frame determines the length.
fn end_of(frame: &[u8], start: usize, length_field: u16) -> (usize, bool) {
    let end = start + usize::from(length_field);
    if length_field == 0 || end > frame.len() { (frame.len(), false) } else { (end, true) }
}

fn with_ports(frame: &[u8], reading: Reading) -> Option<Reading> {
    let header_len = match reading.protocol {
        TCP => 20,
        UDP | ICMP | ICMPV6 => 8,
        _ => return None,
    };
    let header = frame.get(reading.l4..reading.l4 + header_len)?;
    if reading.end < reading.l4 + header_len || reading.protocol == TCP && header[12] >> 4 < 5 {
        return None;
    }
    let ports = match reading.protocol {
        TCP | UDP => [word(frame, reading.l4)?, word(frame, reading.l4 + 2)?],
        _ => [0; 2],
    };
    Some(Reading { ports, ..reading })
}

impl Reading {
    /// Whether the packet carries ports.
    pub fn has_ports(&self) -> bool {
        matches!(self.protocol, TCP | UDP)
    }

    /// Offset of the transport checksum.
    pub fn checksum_at(&self) -> usize {
        self.l4
            + match self.protocol {
                TCP => 16,
                UDP => 6,
                _ => 2,
            }
    }

    /// The error of the IPv4 header's checksum, in one's complement; zero if it is valid, and for IPv6.
    pub fn network_error(&self, frame: &[u8]) -> u16 {
        if self.is_v6 { 0 } else { residue(sum(&frame[self.l3..self.l4])) }
    }

    /// The error of the transport checksum, in one's complement; zero if it is valid. `length` is the length in the
    /// pseudo-header, which a cut frame does not show.
    pub fn transport_error(&self, frame: &[u8], length: usize) -> u16 {
        let payload = sum(&frame[self.l4..self.end]);
        if self.protocol == ICMP {
            return residue(payload);
        }
        let [source, destination] = &self.addresses;
        residue(payload + sum(source) + sum(destination) + u64::from(self.protocol) + length as u64)
    }

    /// The ranges of addresses and ports in the frame: source address, destination address, ports.
    pub fn places(&self) -> [std::ops::Range<usize>; 3] {
        let (first, len) = if self.is_v6 { (self.l3 + 8, 16) } else { (self.l3 + 12, 4) };
        [first..first + len, first + len..first + 2 * len, self.l4..self.l4 + 4]
    }
}

/// The frame in the opposite direction.
pub fn turned(frame: &[u8], reading: &Reading) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let [source, destination, ports] = reading.places();
    frame[source].copy_from_slice(&reading.addresses[1]);
    frame[destination].copy_from_slice(&reading.addresses[0]);
    frame[ports].rotate_left(2);
    frame
}

/// The offset of a packet's fragment field (offset and "more fragments"); `None` if the packet is not fragmented.
pub fn fragment_field(frame: &[u8], reading: &Reading) -> Option<usize> {
    if !reading.is_v6 {
        let at = reading.l3 + 6;
        return (word(frame, at)? & 0x2000 != 0).then_some(at);
    }
    let (mut next, mut at) = (frame[reading.l3 + 6], reading.l3 + 40);
    while at < reading.l4 {
        if next == 44 {
            return (frame[at + 3] & 1 != 0).then_some(at + 2);
        }
        (next, at) = (frame[at], at + 8 + 8 * usize::from(frame[at + 1]));
    }
    None
}

/// A later fragment of the packet with this first fragment: at an offset of 64 bytes, with any contents. The error of the
/// header's checksum stays the same.
pub fn later_fragment(frame: &[u8], field: usize, is_v6: bool) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[field + 1] |= if is_v6 { 64 } else { 8 };
    frame
}

/// An ICMP error about a packet, from that packet's destination: "time exceeded", with wrong checksums, which the pipeline must
/// neither reject nor correct.
pub fn error(reading: &Reading, frame: &[u8], quote: &[u8]) -> Vec<u8> {
    let mut error = frame[..reading.l3 - 2].to_vec();
    let [source, destination] = &reading.addresses;
    let len = 8 + quote.len();
    if reading.is_v6 {
        let [hi, lo] = (len as u16).to_be_bytes();
        error.extend([0x86, 0xdd, 0x60, 0, 0, 0, hi, lo, ICMPV6, 64]);
    } else {
        let [hi, lo] = (20 + len as u16).to_be_bytes();
        error.extend([0x08, 0, 0x45, 0, hi, lo, 0, 0, 0, 0, 64, ICMP, 0, 0]);
    }
    error.extend(destination.iter().chain(source));
    error.extend([if reading.is_v6 { 3 } else { 11 }, 0, 0, 0, 0, 0, 0, 0]);
    error.extend(quote);
    error
}

/// The packet that an error quotes.
pub fn quoted(frame: &[u8]) -> Reading {
    let outer = read(frame).expect("the error is whole");
    let ethertype = if outer.is_v6 { [0x86, 0xdd] } else { [0x08, 0] };
    read(&[&[0; 12], ethertype.as_slice(), &frame[outer.l4 + 8..]].concat()).expect("what it quotes is whole")
}

/// One's complement sum of 16-bit words, not folded.
fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum()
}

/// The error that a sum shows: both zeros of one's complement mean none.
fn residue(sum: u64) -> u16 {
    (sum % 0xffff) as u16
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}
