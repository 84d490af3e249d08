//! The headers of a packet that the pipeline decides by.

use network_types::ip::IpProto;

use crate::abi::FlowKey;

/// IANA number of TCP.
pub const TCP: u8 = IpProto::Tcp as u8;
/// IANA number of UDP.
pub const UDP: u8 = IpProto::Udp as u8;
/// IANA number of SCTP.
pub const SCTP: u8 = IpProto::Sctp as u8;

/// TCP flag: no more data from the sender. The flags also stand for the corresponding chunks of SCTP.
pub const FIN: u8 = 0x01;
/// TCP flag: opens a connection.
pub const SYN: u8 = 0x02;
/// TCP flag: resets the connection.
pub const RST: u8 = 0x04;
/// TCP flag: the acknowledgment number is valid.
pub const ACK: u8 = 0x10;

/// Sequence and acknowledgment number of a TCP segment, as in its header (RFC 9293, section 3.1).
pub type Segment = u64;

/// The headers of a frame. Without padding, because the verifier requires that every byte of an argument is initialised.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Headers<A> {
    /// Addresses, ports and protocol, and the direction they were parsed for.
    pub key: FlowKey<A>,
    /// Sequence and acknowledgment number of TCP; otherwise zero.
    pub segment: Segment,
    /// Offset of the TCP or UDP header, with [`FIRST_FRAGMENT`] and [`SEEN_BELOW`].
    pub(crate) l4: u16,
    /// Offset of the IP header.
    pub(crate) l3: u8,
    /// TCP flags; zero for UDP.
    pub flags: u8,
    /// The IPv4 header's checksum, network byte order; zero for IPv6.
    pub l3_checksum: u16,
    /// The TCP or UDP checksum.
    pub l4_checksum: [u8; 2],
}

/// In [`Headers`]: the packet is a first fragment.
pub(crate) const FIRST_FRAGMENT: u16 = 1 << 15;
/// In [`Headers`]: programs on a lower device have seen the frame.
const SEEN_BELOW: u16 = 1 << 14;

impl<A> Headers<A> {
    /// Headers with nothing but a key.
    pub const fn new(key: FlowKey<A>, flags: u8) -> Self {
        Self { key, segment: 0, l4: 0, l3: 0, flags, l3_checksum: 0, l4_checksum: [0; 2] }
    }

    /// Offset of the IP header.
    #[inline(always)]
    pub const fn l3(&self) -> usize {
        self.l3 as usize
    }

    /// Offset of the TCP or UDP header.
    #[inline(always)]
    pub const fn l4(&self) -> usize {
        (self.l4 & !(FIRST_FRAGMENT | SEEN_BELOW)) as usize
    }

    /// Whether it is a first fragment.
    #[inline(always)]
    pub const fn is_first_fragment(&self) -> bool {
        self.l4 & FIRST_FRAGMENT != 0
    }

    /// Notes that programs on a lower device have seen the frame.
    #[inline(always)]
    pub const fn set_seen_below(&mut self) {
        self.l4 |= SEEN_BELOW;
    }

    /// Whether programs on a lower device have seen the frame.
    #[inline(always)]
    pub const fn is_seen_below(&self) -> bool {
        self.l4 & SEEN_BELOW != 0
    }

    /// Whether the packet opens a connection.
    #[inline(always)]
    pub const fn is_opening(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }
}
