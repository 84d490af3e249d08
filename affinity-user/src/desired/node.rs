//! The node that this runs on: its name and zone, its addresses, and its pod networks.
//!
//! [`NodeFacts`] is what the command line and the kernel say. [`Node`] combines it with the Node object of the cluster's API.
//! The command line takes precedence over the API.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

use ipnet::IpNet;

use super::Family;
use crate::source::{
    api::{self, label},
    parse_address, parse_network,
};

/// The default source ports of masqueraded connections: below the ports that Linux gives to sockets, and below node ports.
pub const MASQUERADE_PORTS: RangeInclusive<u16> = 1024..=29_999;

/// Facts about the node from the command line and the kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeFacts {
    /// Its name in Kubernetes.
    pub name: Option<String>,
    /// Its own addresses; those of devices that lead out of it come first.
    pub addresses: Vec<IpAddr>,
    /// The networks of the addresses that serve node ports; empty: all addresses except loopback and link-local ones, and
    /// loopback.
    pub node_port_networks: Vec<IpNet>,
    /// Pod networks; empty: those of the API.
    pub pod_networks: Vec<IpNet>,
    /// The addresses for masquerading, one for each family. Without one: the node's internal address in the API, else the first
    /// of `addresses`.
    pub masquerade_addresses: Vec<IpAddr>,
    /// Source ports of masqueraded connections.
    pub masquerade_ports: RangeInclusive<u16>,
}

impl Default for NodeFacts {
    /// A node about which nothing is known.
    fn default() -> Self {
        Self {
            name: None,
            addresses: Vec::new(),
            node_port_networks: Vec::new(),
            pod_networks: Vec::new(),
            masquerade_addresses: Vec::new(),
            masquerade_ports: MASQUERADE_PORTS,
        }
    }
}

/// The facts about the node that decisions depend on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Node {
    pub(super) name: Option<String>,
    pub(super) zone: Option<String>,
    /// Its addresses; its own connections have them as source.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// The addresses that serve node ports.
    pub(super) node_port_addresses: BTreeSet<IpAddr>,
    /// The addresses at which load balancers ask for services; the unspecified addresses mean all.
    pub(super) health_addresses: BTreeSet<IpAddr>,
    pub(super) pod_networks: BTreeSet<IpNet>,
    pub(super) masquerade: Masquerade,
}

/// The source of masqueraded connections.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Masquerade {
    /// The node's IPv4 address; `None`: IPv4 connections are not masqueraded.
    pub v4: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub v6: Option<Ipv6Addr>,
    /// Source ports.
    pub ports: RangeInclusive<u16>,
}

impl Masquerade {
    /// Whether there is an address to masquerade to.
    pub(crate) const fn is_possible(&self) -> bool {
        self.v4.is_some() || self.v6.is_some()
    }
}

impl Node {
    /// Combines the facts with what the API says.
    pub(super) fn new(facts: &NodeFacts, api_node: Option<&api::Node>) -> Self {
        let labels = api_node.and_then(|node| node.metadata.labels.as_ref());
        let internal = internal_addresses(api_node);
        let own = if facts.addresses.is_empty() { &internal } else { &facts.addresses };
        let pod_networks = match &facts.pod_networks[..] {
            [] => pod_cidrs(api_node),
            given => given.iter().copied().collect(),
        };
        let node_port_addresses = node_port_addresses(own, &facts.node_port_networks);
        let all = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
        Self {
            name: facts.name.clone(),
            zone: labels.and_then(|labels| labels.get(label::ZONE)).filter(|zone| !zone.is_empty()).cloned(),
            health_addresses: match &facts.node_port_networks[..] {
                [] => all.into(),
                _ => node_port_addresses.clone(),
            },
            addresses: own.iter().copied().collect(),
            node_port_addresses,
            pod_networks,
            masquerade: masquerade(facts, &internal, own),
        }
    }

    /// Whether the pod networks of a family are known.
    pub(super) fn knows_pods(&self, family: Family) -> bool {
        self.pod_networks.iter().any(|network| Family::of(network.addr()) == family)
    }
}

fn node_port_addresses(own: &[IpAddr], networks: &[IpNet]) -> BTreeSet<IpAddr> {
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    if networks.is_empty() {
        return own.iter().copied().filter(|ip| is_global(*ip)).chain(loopback).collect();
    }
    let is_chosen = |ip: &IpAddr| networks.iter().any(|network| network.contains(ip));
    own.iter().copied().chain(loopback).filter(is_chosen).collect()
}

fn masquerade(facts: &NodeFacts, internal: &[IpAddr], own: &[IpAddr]) -> Masquerade {
    let own = own.iter().filter(|ip| is_global(**ip));
    let mut candidates = facts.masquerade_addresses.iter().chain(internal).chain(own);
    Masquerade {
        v4: candidates.clone().find_map(|ip| match ip {
            IpAddr::V4(ip) => Some(*ip),
            IpAddr::V6(_) => None,
        }),
        v6: candidates.find_map(|ip| match ip {
            IpAddr::V6(ip) => Some(*ip),
            IpAddr::V4(_) => None,
        }),
        ports: facts.masquerade_ports.clone(),
    }
}

/// Whether an address can be reached from other machines: it is neither loopback nor link-local.
pub(crate) fn is_global(ip: IpAddr) -> bool {
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !(is_link_local || ip.is_loopback() || ip.is_unspecified() || ip.is_multicast())
}

fn internal_addresses(api_node: Option<&api::Node>) -> Vec<IpAddr> {
    let addresses = api_node.and_then(|node| node.status.as_ref()?.addresses.as_ref());
    let internal = addresses.into_iter().flatten().filter(|address| address.type_ == "InternalIP");
    internal.filter_map(|address| parse_address(&address.address)).collect()
}

fn pod_cidrs(api_node: Option<&api::Node>) -> BTreeSet<IpNet> {
    let Some(spec) = api_node.and_then(|node| node.spec.as_ref()) else { return BTreeSet::new() };
    let listed = spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr);
    listed.filter_map(|network| parse_network(network).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api_node() -> api::Node {
        serde_json::from_str(
            r#"{"metadata": {"name": "a", "labels": {"topology.kubernetes.io/zone": "z"}},
                "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd01:1::/64"]},
                "status": {"addresses": [{"type": "Hostname", "address": "a"},
                {"type": "ExternalIP", "address": "203.0.113.9"}, {"type": "InternalIP", "address": "192.0.2.9"},
                {"type": "InternalIP", "address": "fd00::9"}]}}"#,
        )
        .expect("a node")
    }

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().expect("an address")).collect()
    }

    fn networks(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().expect("a network")).collect()
    }

    fn text(node: &Node) -> String {
        let Node { zone, node_port_addresses, pod_networks, masquerade: Masquerade { v4, v6, ports }, .. } = node;
        let ip = |ip: Option<IpAddr>| ip.map_or("-".to_owned(), |ip| ip.to_string());
        let list = |items: Vec<String>| items.join(" ");
        format!(
            "zone {}; node ports at {}; pods {}; masquerade {} {} {ports:?}",
            zone.as_deref().unwrap_or("-"),
            list(node_port_addresses.iter().map(ToString::to_string).collect()),
            list(pod_networks.iter().map(ToString::to_string).collect()),
            ip(v4.map(IpAddr::V4)),
            ip(v6.map(IpAddr::V6)),
        )
    }

    #[test]
    fn facts_of_a_node_are_merged() {
        let seen = ips(&["192.0.2.1", "fe80::1", "2001:db8::1", "127.0.0.1", "169.254.0.1", "10.0.0.1"]);
        let seen = NodeFacts { addresses: seen, ..NodeFacts::default() };
        insta::assert_snapshot!(text(&Node::new(&NodeFacts::default(), None)), @"zone -; node ports at 127.0.0.1 ::1; pods ; masquerade - - 1024..=29999");
        insta::assert_snapshot!(text(&Node::new(&NodeFacts::default(), Some(&api_node()))), @"zone z; node ports at 127.0.0.1 192.0.2.9 ::1 fd00::9; pods 10.244.1.0/24 fd01:1::/64; masquerade 192.0.2.9 fd00::9 1024..=29999");
        insta::assert_snapshot!(text(&Node::new(&seen, None)), @"zone -; node ports at 10.0.0.1 127.0.0.1 192.0.2.1 ::1 2001:db8::1; pods ; masquerade 192.0.2.1 2001:db8::1 1024..=29999");
        insta::assert_snapshot!(text(&Node::new(&seen, Some(&api_node()))), @"zone z; node ports at 10.0.0.1 127.0.0.1 192.0.2.1 ::1 2001:db8::1; pods 10.244.1.0/24 fd01:1::/64; masquerade 192.0.2.9 fd00::9 1024..=29999");
        let given = NodeFacts {
            node_port_networks: networks(&["192.0.2.0/24", "::1/128", "fe80::/10"]),
            pod_networks: networks(&["10.244.0.0/16"]),
            masquerade_addresses: ips(&["10.0.0.1"]),
            masquerade_ports: 2000..=3000,
            ..seen
        };
        insta::assert_snapshot!(text(&Node::new(&given, Some(&api_node()))), @"zone z; node ports at 192.0.2.1 ::1 fe80::1; pods 10.244.0.0/16; masquerade 10.0.0.1 fd00::9 2000..=3000");
    }
}
