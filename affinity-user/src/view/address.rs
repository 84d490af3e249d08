//! Addresses, ports and client keys in the form that users write, and the names of clients.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use affinity_common::{
    abi::{Address, Port, V4, V6, netns_of},
    headers::{SCTP, TCP, UDP},
};
use ipnet::IpNet;
use serde::{Serialize, Serializer};

/// From the common form of both families in `backends` and in events: IPv6, or IPv4-mapped.
pub(crate) fn from_mapped(mapped: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(mapped).to_canonical()
}

/// From a key's address.
pub(crate) fn ip<A: Address>(address: A) -> IpAddr {
    if A::BITS == V4::BITS { from_mapped(address.to_mapped()) } else { Ipv6Addr::from(address.to_mapped()).into() }
}

/// To the common form of both families.
pub(crate) fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// The name of an IANA protocol number, as Kubernetes writes it.
#[must_use]
pub fn protocol_name(protocol: u8) -> &'static str {
    match protocol {
        TCP => "TCP",
        UDP => "UDP",
        SCTP => "SCTP",
        _ => "?",
    }
}

/// An address and a port: `10.0.0.1:80`, `[fd00::1]:80`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct Endpoint {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
}

impl Endpoint {
    /// From a key's parts.
    pub(crate) fn new<A: Address>(address: A, port: Port) -> Self {
        Self { address: ip(address), port: port.get() }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::new(self.address, self.port).fmt(f)
    }
}

/// A client key: an address, or a network with a common pin, as CIDR.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Client(IpNet);

impl Client {
    /// The client key of `address` with a prefix length, limited to the family's longest.
    #[must_use]
    pub fn new(address: IpAddr, prefix: u8) -> Self {
        Self(IpNet::new(address, prefix).unwrap_or(address.into()).trunc())
    }

    /// The address, or the first one of the network.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.0.addr()
    }

    /// The prefix length: 32 or 128 for one address.
    #[must_use]
    pub fn prefix(&self) -> u8 {
        self.0.prefix_len()
    }

    /// The cookie of the network namespace that this client key means; `None` for addresses.
    #[must_use]
    pub fn netns(&self) -> Option<u64> {
        self.is_address().then(|| netns_of(V6(mapped(self.address())))).flatten().map(|(cookie, _)| cookie)
    }

    /// Whether this is one address and not a network.
    #[must_use]
    pub fn is_address(&self) -> bool {
        self.0.prefix_len() == self.0.max_prefix_len()
    }

    /// Whether it contains `other`.
    #[must_use]
    pub fn contains(&self, other: &Self) -> bool {
        self.0.contains(&other.0)
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_address() { self.address().fmt(f) } else { self.0.fmt(f) }
    }
}

impl Serialize for Client {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for Client {
    type Err = String;

    /// Parses an address, or a CIDR as listings print it. An IPv4-mapped address means the IPv4 address.
    fn from_str(text: &str) -> Result<Self, String> {
        let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let address: IpAddr = address.parse().map_err(|_| format!("`{address}` is not an IP address"))?;
        let longest = if address.is_ipv4() { V4::BITS } else { V6::BITS };
        let prefix: u8 = match prefix {
            None => longest,
            Some(prefix) => prefix
                .parse()
                .ok()
                .filter(|&bits| bits <= longest)
                .ok_or_else(|| format!("`/{prefix}` is not a prefix length from 0 to {longest}"))?,
        };
        // `::ffff:0:0/96` is all of IPv4; a shorter prefix is an IPv6 network.
        let in_v4 = prefix.checked_sub(V6::BITS - V4::BITS);
        Ok(match (address.to_canonical(), in_v4) {
            (mapped @ IpAddr::V4(_), Some(in_v4)) if address.is_ipv6() => Self::new(mapped, in_v4),
            _ => Self::new(address, prefix),
        })
    }
}

/// The network namespace of this process. For the node's agent, it is the node's.
pub const NODE: &str = "node";
/// The prefix of the name of a namespace about which nothing else is known; its cookie follows.
pub const NETNS: &str = "netns:";

/// A client key with its name, if it has one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ClientRef<'a> {
    /// The key.
    pub key: Client,
    /// For a network namespace: [`NODE`], or the pod's name.
    pub name: Option<&'a str>,
    /// For a network namespace: its known addresses.
    pub addresses: &'a [IpAddr],
}

impl fmt::Display for ClientRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name, self.key.netns()) {
            (Some(name), _) => f.write_str(name),
            (None, Some(cookie)) => match self.addresses.first() {
                Some(address) => address.fmt(f),
                None => write!(f, "{NETNS}{cookie}"),
            },
            (None, None) => self.key.fmt(f),
        }
    }
}

impl Serialize for ClientRef<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use affinity_common::abi::netns_client;

    use super::*;

    #[test]
    fn clients_are_addresses_or_networks() {
        for text in ["192.0.2.1", "192.0.2.0/24", "2001:db8::1", "2001:db8::/64", "0.0.0.0/0"] {
            assert_eq!(text.parse::<Client>().unwrap().to_string(), text);
        }
        assert_eq!("192.0.2.77/24".parse::<Client>().unwrap().to_string(), "192.0.2.0/24");
        for (text, means) in [
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1/128", "192.0.2.1"),
            ("::ffff:192.0.2.1/120", "192.0.2.0/24"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::ffff:0:0/95", "::fffe:0:0/95"),
        ] {
            assert_eq!(text.parse::<Client>().unwrap().to_string(), means);
        }
        for text in ["192.0.2.1/33", "2001:db8::/129", "web", "192.0.2.1/", "192.0.2"] {
            assert!(text.parse::<Client>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_network_contains_its_addresses_and_no_other_family() {
        let network: Client = "192.0.2.0/24".parse().unwrap();
        assert!(network.contains(&"192.0.2.9".parse().unwrap()));
        assert!(network.contains(&network));
        assert!(!network.contains(&"192.0.3.9".parse().unwrap()));
        assert!(!network.contains(&"192.0.0.0/16".parse().unwrap()));
        assert!(!"0.0.0.0/0".parse::<Client>().unwrap().contains(&"2001:db8::1".parse().unwrap()));
    }

    #[test]
    fn a_mapped_address_in_an_ipv6_key_stays_ipv6() {
        let mapped = V4([192, 0, 2, 1]).to_mapped();
        assert_eq!(from_mapped(mapped).to_string(), "192.0.2.1");
        assert_eq!(ip(V6(mapped)).to_string(), "::ffff:192.0.2.1");
    }

    #[test]
    fn a_namespace_is_named_as_well_as_it_can_be() {
        let key = Client::new(ip(netns_client(77, 4)), 128);
        let text = |key, name, addresses| ClientRef { key, name, addresses }.to_string();
        let addresses = ["10.244.0.7".parse().unwrap(), "fd00::7".parse().unwrap()];
        assert_eq!(text(key, None, &[]), "netns:77");
        assert_eq!(text(key, None, &addresses), "10.244.0.7");
        assert_eq!(text(key, Some("default/web-0"), &addresses), "default/web-0");
        let key: Client = "192.0.2.0/24".parse().unwrap();
        assert_eq!((text(key, None, &[]), key.netns()), ("192.0.2.0/24".to_owned(), None));
    }
}
