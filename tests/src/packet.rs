//! Frames for tests: built field by field with valid lengths and checksums, and verified by a second, independent reader.
//!
//! A [`Frame`] is what a sender would put on the wire. A test that needs an invalid one builds a valid one and then damages its
//! bytes. [`verify_checksums`] does not know how a frame was built, and shares no code with the dataplane: it computes
//! everything again.
//!
//! ```
//! use affinity_tests::packet::{Frame, Verified, tcp_flags, verify_checksums};
//! let (client, service) = ("198.18.0.1:40000".parse()?, "10.96.0.10:80".parse()?);
//! let mut frame = Frame::tcp(client, service, tcp_flags::SYN).vlan(7).payload(b"hello").build();
//! assert_eq!(verify_checksums(&frame)?, Verified::Transport);
//! *frame.last_mut().unwrap() ^= 1;
//! assert!(verify_checksums(&frame).is_err());
//! # anyhow::Ok(())
//! ```

mod verify;

use std::net::{IpAddr, SocketAddr};

pub use verify::{Verified, verify_checksums};

/// Bits of TCP's flags byte.
pub mod tcp_flags {
    /// The sender has no more data.
    pub const FIN: u8 = 0x01;
    /// First packet of a direction.
    pub const SYN: u8 = 0x02;
    /// There is no such connection.
    pub const RST: u8 = 0x04;
    /// Deliver now.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement number is valid.
    pub const ACK: u8 = 0x10;
}

/// IP protocol numbers, as far as tests need them.
pub mod protocol {
    /// ICMP of IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP of IPv6.
    pub const ICMPV6: u8 = 58;
}

/// Ethernet's type of an 802.1Q tag.
const VLAN: u16 = 0x8100;
/// Ethernet's type of the outer tag of two, by 802.1ad.
const VLAN_OUTER: u16 = 0x88a8;
/// The MAC address that every frame is sent from.
pub const SOURCE_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
/// The MAC address that every frame is sent to.
pub const DESTINATION_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x02];

/// An IPv6 extension header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extension {
    /// Options for every router: the option bytes, padded to the unit of eight.
    HopByHop(Vec<u8>),
    /// Options for the destination.
    DestinationOptions(Vec<u8>),
    /// Routing, with its type-specific bytes.
    Routing(Vec<u8>),
    /// One piece of a packet.
    Fragment {
        /// Where the piece begins, in units of eight bytes.
        offset_units: u16,
        /// Others follow.
        more: bool,
        /// The packet that it belongs to.
        id: u32,
    },
}

#[derive(Clone, Debug)]
enum Transport {
    Tcp { flags: u8, sequence: u32, acknowledgement: u32, options: Vec<u8> },
    Udp { checksum: bool },
    Icmp { kind: u8, code: u8, rest: [u8; 4] },
    Other(u8),
}

/// A frame to be built.
#[derive(Clone, Debug)]
pub struct Frame {
    source: SocketAddr,
    destination: SocketAddr,
    transport: Transport,
    payload: Vec<u8>,
    vlans: Vec<u16>,
    hop_limit: u8,
    ipv4_options: Vec<u8>,
    ipv4_fragment: u16,
    extensions: Vec<Extension>,
}

impl Frame {
    /// A TCP segment with these [`tcp_flags`].
    ///
    /// # Panics
    /// As all constructors, when the two addresses are of different families.
    pub fn tcp(source: SocketAddr, destination: SocketAddr, flags: u8) -> Self {
        let transport = Transport::Tcp { flags, sequence: 1000, acknowledgement: 2000, options: Vec::new() };
        Self::new(source, destination, transport)
    }

    /// A UDP datagram.
    pub fn udp(source: SocketAddr, destination: SocketAddr) -> Self {
        Self::new(source, destination, Transport::Udp { checksum: true })
    }

    /// An ICMP or ICMPv6 message, by the family of the addresses; `rest` is the second word of its header.
    pub fn icmp(source: IpAddr, destination: IpAddr, kind: u8, code: u8, rest: [u8; 4]) -> Self {
        let (source, destination) = (SocketAddr::new(source, 0), SocketAddr::new(destination, 0));
        Self::new(source, destination, Transport::Icmp { kind, code, rest })
    }

    /// A packet of another protocol: its payload is all there is.
    pub fn other(source: IpAddr, destination: IpAddr, protocol: u8) -> Self {
        let (source, destination) = (SocketAddr::new(source, 0), SocketAddr::new(destination, 0));
        Self::new(source, destination, Transport::Other(protocol))
    }

    fn new(source: SocketAddr, destination: SocketAddr, transport: Transport) -> Self {
        assert_eq!(source.is_ipv4(), destination.is_ipv4(), "{source} and {destination}");
        Self {
            source,
            destination,
            transport,
            payload: Vec::new(),
            vlans: Vec::new(),
            hop_limit: 64,
            ipv4_options: Vec::new(),
            ipv4_fragment: 0,
            extensions: Vec::new(),
        }
    }

    /// With this payload.
    pub fn payload(self, payload: &[u8]) -> Self {
        Self { payload: payload.to_vec(), ..self }
    }

    /// With a VLAN tag inside the tags that it has.
    pub fn vlan(mut self, id: u16) -> Self {
        self.vlans.push(id);
        self
    }

    /// With this TTL or hop limit; 64 by default.
    pub fn hop_limit(self, hop_limit: u8) -> Self {
        Self { hop_limit, ..self }
    }

    /// With these sequence and acknowledgement numbers, if it is TCP.
    pub fn numbers(mut self, new_sequence: u32, new_acknowledgement: u32) -> Self {
        if let Transport::Tcp { sequence, acknowledgement, .. } = &mut self.transport {
            (*sequence, *acknowledgement) = (new_sequence, new_acknowledgement);
        }
        self
    }

    /// With these TCP options, padded to the unit of four, if it is TCP.
    pub fn tcp_options(mut self, new_options: &[u8]) -> Self {
        if let Transport::Tcp { options, .. } = &mut self.transport {
            *options = padded(new_options, 0, 4);
        }
        self
    }

    /// Without a checksum, if it is UDP (which IPv4 allows).
    pub fn without_udp_checksum(mut self) -> Self {
        if let Transport::Udp { checksum } = &mut self.transport {
            *checksum = false;
        }
        self
    }

    /// With these IPv4 options, padded to the unit of four.
    pub fn ipv4_options(self, options: &[u8]) -> Self {
        Self { ipv4_options: padded(options, 0, 4), ..self }
    }

    /// As a fragment of an IPv4 packet that begins at this offset, in units of eight bytes. The transport header is always
    /// included, as in the first fragment.
    pub fn ipv4_fragment(self, offset_units: u16, more: bool) -> Self {
        Self { ipv4_fragment: offset_units | u16::from(more) << 13, ..self }
    }

    /// With this IPv6 extension header behind those that it has.
    pub fn extension(mut self, extension: Extension) -> Self {
        self.extensions.push(extension);
        self
    }

    /// The bytes, from the Ethernet header on.
    pub fn build(&self) -> Vec<u8> {
        let mut frame = [DESTINATION_MAC, SOURCE_MAC].concat();
        for (index, id) in self.vlans.iter().enumerate() {
            let outer = index + 1 < self.vlans.len();
            frame.extend(if outer { VLAN_OUTER } else { VLAN }.to_be_bytes());
            frame.extend(id.to_be_bytes());
        }
        frame.extend(if self.source.is_ipv4() { 0x0800_u16 } else { 0x86dd }.to_be_bytes());
        frame.extend(self.packet());
        frame
    }

    /// The bytes from the IP header on: an ICMP error quotes these.
    pub fn packet(&self) -> Vec<u8> {
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => self.ipv4_packet(source.octets(), destination.octets()),
            (IpAddr::V6(source), IpAddr::V6(destination)) => self.ipv6_packet(source.octets(), destination.octets()),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                unreachable!("the constructors refuse this")
            }
        }
    }

    fn ipv4_packet(&self, source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
        let segment = self.segment(&[source, destination].concat());
        let header_length = 20 + self.ipv4_options.len();
        let mut header = vec![0x40 | length_u8(header_length / 4), 0];
        header.extend(length_u16(header_length + segment.len()).to_be_bytes());
        header.extend([0, 1]); // identification
        header.extend(self.ipv4_fragment.to_be_bytes());
        header.extend([self.hop_limit, self.protocol(), 0, 0]);
        header.extend(source);
        header.extend(destination);
        header.extend(&self.ipv4_options);
        let checksum = !verify::sum(&[&header]);
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        [header, segment].concat()
    }

    fn ipv6_packet(&self, source: [u8; 16], destination: [u8; 16]) -> Vec<u8> {
        let mut body = self.segment(&[source, destination].concat());
        let mut next = self.protocol();
        for extension in self.extensions.iter().rev() {
            let (number, header) = extension.header(next);
            body = [header, body].concat();
            next = number;
        }
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend(length_u16(body.len()).to_be_bytes());
        packet.extend([next, self.hop_limit]);
        packet.extend(source);
        packet.extend(destination);
        packet.extend(body);
        packet
    }

    fn protocol(&self) -> u8 {
        match self.transport {
            Transport::Tcp { .. } => protocol::TCP,
            Transport::Udp { .. } => protocol::UDP,
            Transport::Icmp { .. } if self.source.is_ipv4() => protocol::ICMP,
            Transport::Icmp { .. } => protocol::ICMPV6,
            Transport::Other(number) => number,
        }
    }

    /// Transport header and payload; `addresses` are those of the pseudo header.
    fn segment(&self, addresses: &[u8]) -> Vec<u8> {
        let mut segment = Vec::new();
        segment.extend(self.source.port().to_be_bytes());
        segment.extend(self.destination.port().to_be_bytes());
        let checksum_at = match &self.transport {
            Transport::Tcp { flags, sequence, acknowledgement, options } => {
                segment.extend(sequence.to_be_bytes());
                segment.extend(acknowledgement.to_be_bytes());
                segment.extend([length_u8((20 + options.len()) / 4) << 4, *flags]);
                segment.extend([0xff, 0xff, 0, 0, 0, 0]); // window, checksum, urgent pointer
                segment.extend(options);
                16
            }
            Transport::Udp { checksum } => {
                segment.extend(length_u16(8 + self.payload.len()).to_be_bytes());
                segment.extend([0, 0]);
                if *checksum { 6 } else { return [segment, self.payload.clone()].concat() }
            }
            Transport::Icmp { kind, code, rest } => {
                segment = vec![*kind, *code, 0, 0];
                segment.extend(rest);
                2
            }
            Transport::Other(_) => return self.payload.clone(),
        };
        segment.extend(&self.payload);
        let pseudo = verify::pseudo_header(addresses, self.protocol(), segment.len());
        let mut checksum = !verify::sum(&[&pseudo, &segment]);
        if checksum == 0 && self.protocol() == protocol::UDP {
            checksum = 0xffff; // zero would say that there is none
        }
        segment[checksum_at..checksum_at + 2].copy_from_slice(&checksum.to_be_bytes());
        segment
    }
}

impl Extension {
    /// Its number, and its bytes when the header numbered `next` follows.
    fn header(&self, next: u8) -> (u8, Vec<u8>) {
        let sized = |number, body: &[u8]| {
            let body = padded(body, 2, 8);
            let units = length_u8((2 + body.len()) / 8 - 1);
            (number, [vec![next, units], body].concat())
        };
        match self {
            Self::HopByHop(options) => sized(0, options),
            Self::Routing(data) => sized(43, data),
            Self::DestinationOptions(options) => sized(60, options),
            Self::Fragment { offset_units, more, id } => {
                let mut header = vec![next, 0];
                header.extend((offset_units << 3 | u16::from(*more)).to_be_bytes());
                header.extend(id.to_be_bytes());
                (44, header)
            }
        }
    }
}

/// The bytes, with zeros (which are the padding options of IPv4, IPv6 and TCP) up to the unit, where `before`
/// bytes come before them.
fn padded(bytes: &[u8], before: usize, unit: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let length = (before + bytes.len()).max(if before > 0 { unit } else { 0 }).next_multiple_of(unit);
    bytes.resize(length - before, 0);
    bytes
}

fn length_u8(length: usize) -> u8 {
    u8::try_from(length).expect("a header that fits its length field")
}

fn length_u16(length: usize) -> u16 {
    u16::try_from(length).expect("a packet that fits its length field")
}
