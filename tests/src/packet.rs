//! Frames for tests: built field by field with valid lengths and checksums, and verified by a second, independent reader.
//!
//! A [`Frame`] is what a sender would put on the wire. A test that needs an invalid one builds a valid one and then damages its
//! bytes. [`verify_checksums`] does not know how a frame was built, and shares no code with the dataplane: it computes
//! everything again.
//!
//! etherparse writes and reads the headers. Its `PacketBuilder` has at most two VLAN tags, and each IPv6 extension header once,
//! in a fixed order; tests need more, so the headers are put together here.
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

use etherparse::{
    Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpFragOffset, IpNumber, Ipv4Header, Ipv6FragmentHeader,
    Ipv6Header, Ipv6RawExtHeader, TcpHeader, TcpOptions, TransportHeader, UdpHeader, ether_type, ip_number,
};

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
    /// The urgent pointer is valid.
    pub const URG: u8 = 0x20;
    /// The sender learned of congestion (RFC 3168).
    pub const ECE: u8 = 0x40;
    /// The sender has reduced its congestion window.
    pub const CWR: u8 = 0x80;
}

/// What a frame of a test does.
const FITS: &str = "a packet that fits its length fields";
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

/// The IP header, without lengths and checksum; IPv6 with the number of the transport, as if no extension header came between.
#[derive(Clone, Debug)]
enum Ip {
    V4(Ipv4Header),
    V6(Ipv6Header),
}

/// A frame to be built.
#[derive(Clone, Debug)]
pub struct Frame {
    vlans: Vec<u16>,
    ip: Ip,
    extensions: Vec<Extension>,
    /// Without one, the payload is all that follows the IP header.
    transport: Option<TransportHeader>,
    has_checksum: bool,
    payload: Vec<u8>,
}

impl Frame {
    /// A TCP segment with these [`tcp_flags`].
    ///
    /// # Panics
    /// As all constructors, when the two addresses are of different families.
    pub fn tcp(source: SocketAddr, destination: SocketAddr, flags: u8) -> Self {
        let has = |flag| flags & flag != 0;
        let header = TcpHeader {
            acknowledgment_number: 2000,
            fin: has(tcp_flags::FIN),
            syn: has(tcp_flags::SYN),
            rst: has(tcp_flags::RST),
            psh: has(tcp_flags::PSH),
            ack: has(tcp_flags::ACK),
            urg: has(tcp_flags::URG),
            ece: has(tcp_flags::ECE),
            cwr: has(tcp_flags::CWR),
            ..TcpHeader::new(source.port(), destination.port(), 1000, 0xffff)
        };
        Self::new(source.ip(), destination.ip(), ip_number::TCP, Some(TransportHeader::Tcp(header)))
    }

    /// A UDP datagram.
    pub fn udp(source: SocketAddr, destination: SocketAddr) -> Self {
        let ports =
            UdpHeader { source_port: source.port(), destination_port: destination.port(), ..UdpHeader::default() };
        Self::new(source.ip(), destination.ip(), ip_number::UDP, Some(TransportHeader::Udp(ports)))
    }

    /// An ICMP or ICMPv6 message, by the family of the addresses; `rest` is the second word of its header.
    pub fn icmp(source: IpAddr, destination: IpAddr, kind: u8, code: u8, rest: [u8; 4]) -> Self {
        let (type_u8, code_u8, bytes5to8) = (kind, code, rest);
        let (number, header) = if source.is_ipv4() {
            let message = Icmpv4Type::Unknown { type_u8, code_u8, bytes5to8 };
            (ip_number::ICMP, TransportHeader::Icmpv4(Icmpv4Header::new(message)))
        } else {
            let message = Icmpv6Type::Unknown { type_u8, code_u8, bytes5to8 };
            (ip_number::IPV6_ICMP, TransportHeader::Icmpv6(Icmpv6Header::new(message)))
        };
        Self::new(source, destination, number, Some(header))
    }

    /// A packet of another protocol: its payload is all there is.
    pub fn other(source: IpAddr, destination: IpAddr, protocol: u8) -> Self {
        Self::new(source, destination, IpNumber(protocol), None)
    }

    fn new(source: IpAddr, destination: IpAddr, number: IpNumber, transport: Option<TransportHeader>) -> Self {
        let ip = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => Ip::V4(Ipv4Header {
                identification: 1,
                dont_fragment: false,
                time_to_live: 64,
                protocol: number,
                source: source.octets(),
                destination: destination.octets(),
                ..Ipv4Header::default()
            }),
            (IpAddr::V6(source), IpAddr::V6(destination)) => Ip::V6(Ipv6Header {
                next_header: number,
                hop_limit: 64,
                source: source.octets(),
                destination: destination.octets(),
                ..Ipv6Header::default()
            }),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => panic!("{source} and {destination}"),
        };
        Self { vlans: Vec::new(), ip, extensions: Vec::new(), transport, has_checksum: true, payload: Vec::new() }
    }

    /// With this payload.
    pub fn payload(self, payload: &[u8]) -> Self {
        Self { payload: payload.to_vec(), ..self }
    }

    /// With a VLAN tag inside the tags that it has.
    pub fn vlan(mut self, tag: u16) -> Self {
        self.vlans.push(tag);
        self
    }

    /// With this TTL or hop limit; 64 by default.
    pub fn hop_limit(mut self, hop_limit: u8) -> Self {
        match &mut self.ip {
            Ip::V4(header) => header.time_to_live = hop_limit,
            Ip::V6(header) => header.hop_limit = hop_limit,
        }
        self
    }

    /// With these sequence and acknowledgement numbers, if it is TCP.
    pub fn numbers(mut self, sequence: u32, acknowledgement: u32) -> Self {
        if let Some(TransportHeader::Tcp(header)) = &mut self.transport {
            (header.sequence_number, header.acknowledgment_number) = (sequence, acknowledgement);
        }
        self
    }

    /// With these TCP options, padded to the unit of four, if it is TCP.
    pub fn tcp_options(mut self, options: &[u8]) -> Self {
        if let Some(TransportHeader::Tcp(header)) = &mut self.transport {
            header.options = TcpOptions::try_from_slice(options).expect("at most 40 bytes");
        }
        self
    }

    /// Without a checksum, if it is UDP (which IPv4 allows).
    pub fn without_udp_checksum(mut self) -> Self {
        self.has_checksum = !matches!(self.transport, Some(TransportHeader::Udp(_)));
        self
    }

    /// With these IPv4 options, padded to the unit of four, if it is IPv4.
    pub fn ipv4_options(mut self, options: &[u8]) -> Self {
        if let Ip::V4(header) = &mut self.ip {
            let padded = padded(options, options.len().next_multiple_of(4));
            header.options = padded.as_slice().try_into().expect("at most 40 bytes");
        }
        self
    }

    /// As a fragment of an IPv4 packet that begins at this offset, in units of eight bytes, if it is IPv4. The transport header
    /// is always included, as in the first fragment.
    pub fn ipv4_fragment(mut self, offset_units: u16, more: bool) -> Self {
        if let Ip::V4(header) = &mut self.ip {
            (header.fragment_offset, header.more_fragments) = (fragment_offset(offset_units), more);
        }
        self
    }

    /// With this IPv6 extension header behind those that it has, if it is IPv6.
    pub fn extension(mut self, extension: Extension) -> Self {
        self.extensions.push(extension);
        self
    }

    /// The bytes, from the Ethernet header on.
    pub fn build(&self) -> Vec<u8> {
        let mut frame = [DESTINATION_MAC, SOURCE_MAC].concat();
        for (index, tag) in self.vlans.iter().enumerate() {
            let outer = index + 1 < self.vlans.len();
            let kind = if outer { ether_type::PROVIDER_BRIDGING } else { ether_type::VLAN_TAGGED_FRAME };
            frame.extend(kind.0.to_be_bytes());
            frame.extend(tag.to_be_bytes());
        }
        let kind = match self.ip {
            Ip::V4(_) => ether_type::IPV4,
            Ip::V6(_) => ether_type::IPV6,
        };
        frame.extend(kind.0.to_be_bytes());
        frame.extend(self.packet());
        frame
    }

    /// The bytes from the IP header on: an ICMP error quotes these.
    pub fn packet(&self) -> Vec<u8> {
        match &self.ip {
            Ip::V4(header) => {
                let segment =
                    self.segment(|transport| transport.update_checksum_ipv4(header, &self.payload).expect(FITS));
                let mut header = header.clone();
                header.set_payload_len(segment.len()).expect(FITS);
                header.header_checksum = header.calc_header_checksum();
                [header.to_bytes().as_slice(), &segment].concat()
            }
            Ip::V6(header) => {
                let mut body =
                    self.segment(|transport| transport.update_checksum_ipv6(header, &self.payload).expect(FITS));
                let mut header = header.clone();
                for extension in self.extensions.iter().rev() {
                    let (number, bytes) = extension.header(header.next_header);
                    body = [bytes, body].concat();
                    header.next_header = number;
                }
                header.set_payload_length(body.len()).expect(FITS);
                [header.to_bytes().as_slice(), &body].concat()
            }
        }
    }

    /// Transport header and payload.
    fn segment(&self, update_checksum: impl Fn(&mut TransportHeader)) -> Vec<u8> {
        let mut segment = Vec::new();
        if let Some(mut header) = self.transport.clone() {
            if let TransportHeader::Udp(udp) = &mut header {
                udp.length = u16::try_from(UdpHeader::LEN + self.payload.len()).expect(FITS);
            }
            if self.has_checksum {
                update_checksum(&mut header);
            }
            header.write(&mut segment).expect("a vector grows");
        }
        segment.extend(&self.payload);
        segment
    }
}

impl Extension {
    /// Its number, and its bytes when the header numbered `next` follows.
    fn header(&self, next: IpNumber) -> (IpNumber, Vec<u8>) {
        let raw = |body: &[u8]| {
            // A multiple of eight, with the two bytes in front of the body.
            let length = (2 + body.len()).next_multiple_of(8) - 2;
            Ipv6RawExtHeader::new_raw(next, &padded(body, length)).expect("a valid length").to_bytes().to_vec()
        };
        match self {
            Self::HopByHop(options) => (ip_number::IPV6_HOP_BY_HOP, raw(options)),
            Self::Routing(data) => (ip_number::IPV6_ROUTE, raw(data)),
            Self::DestinationOptions(options) => (ip_number::IPV6_DEST_OPTIONS, raw(options)),
            Self::Fragment { offset_units, more, id } => {
                let header = Ipv6FragmentHeader::new(next, fragment_offset(*offset_units), *more, *id);
                (ip_number::IPV6_FRAG, header.to_bytes().to_vec())
            }
        }
    }
}

fn fragment_offset(units: u16) -> IpFragOffset {
    IpFragOffset::try_new(units).expect("an offset of 13 bits")
}

/// The bytes, and zeros, which are the padding options of IPv4, IPv6 and TCP.
fn padded(bytes: &[u8], length: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(length, 0);
    bytes
}
