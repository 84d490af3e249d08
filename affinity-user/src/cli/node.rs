//! Options that several commands share: facts about the node, and the sizes of the maps.

use std::{net::IpAddr, ops::RangeInclusive};

use clap::Args;
use ipnet::IpNet;

use super::{Global, error::Error};
use crate::{
    desired::{Family, MASQUERADE_PORTS, NodeFacts},
    load::Sizes,
    source::parse_network,
};

/// Facts of the node that decide about frontends and masquerading.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct NodeArgs {
    /// Serve node ports and health checks at the node's addresses in these networks [default: node ports at all addresses
    /// except link-local ones, health checks at all addresses]
    #[arg(long = "nodeport-addresses", value_name = "CIDR", value_delimiter = ',', value_parser = parse_network)]
    node_port_networks: Vec<IpNet>,
    /// A network of pods; repeat the option for each. Clients outside of these networks are external [default: the podCIDRs
    /// of the node's Node object]
    #[arg(long = "pod-cidr", value_name = "CIDR", value_parser = parse_network)]
    pod_networks: Vec<IpNet>,
    /// Source address of masqueraded connections; one for each IP family [default: the InternalIP of the node's Node
    /// object; else the first global address of a device with a default route; else the first global address]
    #[arg(long = "node-address", value_name = "IP")]
    addresses: Vec<IpAddr>,
    /// Source ports of masqueraded connections; the node's own processes should use others [default: 1024-29999]
    #[arg(long, value_name = "FIRST-LAST", value_parser = parse_ports)]
    masquerade_ports: Option<RangeInclusive<u16>>,
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let ports = text.split_once('-').and_then(|(first, last)| Some(first.parse().ok()?..=last.parse().ok()?));
    ports
        .filter(|ports: &RangeInclusive<u16>| *ports.start() > 0 && !ports.is_empty())
        .ok_or_else(|| "expected FIRST-LAST, ports from 1 to 65535, such as 1024-29999".to_owned())
}

impl NodeArgs {
    /// The facts about the node, before the node itself is examined.
    pub(crate) fn facts(&self, global: &Global) -> Result<NodeFacts, Error> {
        for family in [Family::V4, Family::V6] {
            let given: Vec<_> = self.addresses.iter().filter(|ip| Family::of(**ip) == family).collect();
            if let [first, second, ..] = given[..] {
                return Err(Error::Usage(format!(
                    "--node-address {first} and {second}: give at most one address for each IP family"
                )));
            }
        }
        Ok(NodeFacts {
            name: Some(global.node_name()),
            addresses: Vec::new(),
            node_port_networks: self.node_port_networks.clone(),
            pod_networks: self.pod_networks.clone(),
            masquerade_addresses: self.addresses.clone(),
            masquerade_ports: self.masquerade_ports.clone().unwrap_or(MASQUERADE_PORTS),
        })
    }

    /// The same if the node cannot be examined: it has the given addresses.
    pub(crate) fn facts_without_node(&self, global: &Global) -> Result<NodeFacts, Error> {
        Ok(NodeFacts { addresses: self.addresses.clone(), ..self.facts(global)? })
    }
}

/// Sizes that differ from the defaults for this machine.
#[derive(Args, Clone, Copy, PartialEq, Eq, Debug, Default)]
#[command(next_help_heading = "Table sizes (defaults depend on this machine's memory: see `affinity check`)")]
pub(crate) struct SizeArgs {
    /// Maximum number of pins for each IP family
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_sessions: Option<u32>,
    /// Maximum number of flow records for each IP family; a connection has two
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    max_flows: Option<u32>,
    /// Maximum number of frontends (address, port and protocol) for each IP family
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_frontends: Option<u32>,
    /// Maximum number of pod addresses; a dual-stack pod has two
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_backends: Option<u32>,
    /// Maximum number of endpoints, counted once for each port of each service
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_members: Option<u32>,
    /// Maximum number of slots of all selection tables: one for each ready endpoint; with `consistent` 1,021 for up to 10
    /// endpoints, 16,381 for up to 163, and 65,537 beyond
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_slots: Option<u32>,
}

impl SizeArgs {
    /// The defaults for this machine, with the given options applied.
    pub(crate) fn sizes(&self) -> Sizes {
        let default = Sizes::of_this_machine();
        Sizes {
            sessions: self.max_sessions.unwrap_or(default.sessions),
            flows: self.max_flows.unwrap_or(default.flows),
            frontends: self.max_frontends.unwrap_or(default.frontends),
            members: self.max_members.unwrap_or(default.members),
            slots: self.max_slots.unwrap_or(default.slots),
            ..default
        }
        .with_backends(self.max_backends.unwrap_or(default.backends))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_from_first_to_last() {
        assert_eq!(parse_ports("1024-29999"), Ok(1024..=29_999));
        assert_eq!(parse_ports("1-65535"), Ok(1..=65_535));
        for bad in ["", "80", "0-80", "81-80", "1-65536", "a-b", "1--2"] {
            assert!(parse_ports(bad).is_err(), "{bad:?}");
        }
    }
}
