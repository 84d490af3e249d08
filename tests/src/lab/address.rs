//! The addresses of every lab. IPv4 and IPv6 side by side, so that a test is written once for both.
//!
//! | what | IPv4 | IPv6 |
//! |---|---|---|
//! | clients | 198.18.0.0/15 | 2001:db8:c::/64 |
//! | the wire | 192.0.2.1 node, 192.0.2.2 client | 2001:db8::1 node, 2001:db8::2 client |
//! | between the nodes | 198.51.100.1 node A, 198.51.100.2 node B | 2001:db8:1::1, 2001:db8:1::2 |
//! | pods of node A | 10.244.0.10 + index | fd00:244::10 + index |
//! | pods of node B | 10.245.0.10 + index - 10,000 | fd00:245::10 + index - 10,000 |
//! | ClusterIPs | 10.96.0.0/16 | fd00:96::/112 |
//! | ingress IPs of load balancers | 100.64.0.0/16 | 2001:db8:64::/112 |
//! | external IPs | 100.65.0.0/16 | 2001:db8:65::/112 |

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The prefix of all client addresses, for each family.
pub(super) const CLIENTS: [&str; 2] = ["198.18.0.0/15", "2001:db8:c::/64"];
/// The prefix of the pods of all nodes.
pub const PODS: [&str; 2] = ["10.244.0.0/15", "fd00:244::/31"];
/// The prefix of the pods of node B.
pub(super) const PODS_B: [&str; 2] = ["10.245.0.0/16", "fd00:245::/32"];
/// The prefixes of all addresses of services: ClusterIPs, ingress IPs of load balancers, external IPs.
pub(super) const SERVICES: [[&str; 2]; 3] =
    [["10.96.0.0/16", "fd00:96::/112"], ["100.64.0.0/16", "2001:db8:64::/112"], ["100.65.0.0/16", "2001:db8:65::/112"]];
/// The node's address on the wire.
pub(super) const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
/// The client's address on the wire.
pub(crate) const WIRE_CLIENT: [&str; 2] = ["192.0.2.2", "2001:db8::2"];
/// The wire between the nodes.
pub(super) const UNDERLAY: [&str; 2] = ["198.51.100.0/24", "2001:db8:1::/64"];
/// The address of node A on the wire between the nodes.
pub(super) const UNDERLAY_A: [&str; 2] = ["198.51.100.1", "2001:db8:1::1"];
/// The address of node B.
pub(super) const UNDERLAY_B: [&str; 2] = ["198.51.100.2", "2001:db8:1::2"];
/// The router that every pod sees.
pub(super) const POD_ROUTER: [&str; 2] = ["169.254.1.1", "fe80::1"];

/// How many client addresses a lab has.
pub const CLIENT_COUNT: u32 = 1 << 17;

/// The index of node B's first pod. Pods below are node A's.
pub const FIRST_OF_B: usize = 10_000;

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order that the tables of this module have.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The address of the client with this number, below [`CLIENT_COUNT`].
    pub fn client(self, number: u32) -> IpAddr {
        assert!(number < CLIENT_COUNT, "client {number} of {CLIENT_COUNT}");
        match self {
            Self::V4 => Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() + number).into(),
            Self::V6 => {
                let base = Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 0);
                Ipv6Addr::from_bits(base.to_bits() + u128::from(number)).into()
            }
        }
    }

    /// The address of the pod with this index, on node A or on node B.
    pub fn pod(self, index: usize) -> IpAddr {
        let (net, offset) = if index < FIRST_OF_B { (0, index) } else { (1, index - FIRST_OF_B) };
        let offset = u16::try_from(offset).expect("fewer pods than ports");
        match self {
            Self::V4 => Ipv4Addr::from_bits(Ipv4Addr::new(10, 244 + net, 0, 10).to_bits() + u32::from(offset)).into(),
            Self::V6 => Ipv6Addr::new(0xfd00, 0x244 + u16::from(net), 0, 0, 0, 0, 0, 0x10 + offset).into(),
        }
    }

    /// The ClusterIP of the service with this number.
    pub fn cluster_ip(self, number: u16) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 0, 0).to_bits() + u32::from(number)).into(),
            Self::V6 => Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number).into(),
        }
    }

    /// The ingress IP of the load balancer of the service with this number.
    pub fn load_balancer_ip(self, number: u16) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, 0, 0).to_bits() + u32::from(number)).into(),
            Self::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0x64, 0, 0, 0, 0, number).into(),
        }
    }

    /// The external IP of the service with this number.
    pub fn external_ip(self, number: u16) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from_bits(Ipv4Addr::new(100, 65, 0, 0).to_bits() + u32::from(number)).into(),
            Self::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0x65, 0, 0, 0, 0, number).into(),
        }
    }

    /// Node A's addresses: on the wire to the clients, and on the one between the nodes, which exists only in a lab of two
    /// nodes.
    pub fn node_addresses(self) -> [IpAddr; 2] {
        [NODE, UNDERLAY_A].map(|addresses| addresses[self as usize].parse().expect("an address"))
    }

    /// Node B's address.
    pub fn node_b(self) -> IpAddr {
        UNDERLAY_B[self as usize].parse().expect("an address")
    }

    /// The loopback address of a node or pod.
    pub fn loopback(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::LOCALHOST.into(),
            Self::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }

    /// The prefix of the pods of all nodes.
    pub fn pods(self) -> &'static str {
        PODS[self as usize]
    }
}

impl fmt::Display for Family {
    /// As Kubernetes writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP: HTTP is spoken over it.
    Tcp,
    /// UDP: one datagram asks, one answers.
    Udp,
}

impl Protocol {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Tcp, Self::Udp];
}

impl fmt::Display for Protocol {
    /// As Kubernetes writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}
