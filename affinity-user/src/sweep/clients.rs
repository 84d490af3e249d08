//! Detects services for which all clients look like nodes of the cluster: then something in front of the service masquerades,
//! and all clients that come through one node share a pin.
//!
//! Sockets of this machine and its own addresses are not counted as clients: it is known what they are.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use affinity_common::abi::{Address, V6, netns_of};

use crate::{netns::Namespace, source::NodeAddresses, view::ip};

/// A service must have this many pins before its clients are judged. (If they all look like nodes, there are no more of them
/// than nodes.) One pin of a node's address proves nothing: a process on another node is rightly such a client. So a cluster of
/// one node never gets the warning: what masquerades in front of it is no node, and has an address like any client's.
const LEAST: u64 = 2;

/// The clients that a pass has met.
#[derive(Debug, Default)]
pub(super) struct Clients {
    /// `None` if they are not known.
    nodes: Option<Arc<BTreeSet<IpAddr>>>,
    own: BTreeSet<IpAddr>,
    by_service: BTreeMap<u32, Count>,
}

/// Live pins of a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Count {
    all: u64,
    /// Pins of clients with the address of a node.
    of_nodes: u64,
}

impl Clients {
    pub(super) fn begin(nodes: &NodeAddresses) -> Self {
        // If they cannot be listed, a pin of one of this node's addresses counts as a node's.
        let own = Namespace::own().and_then(|own| own.addresses()).unwrap_or_default();
        Self { nodes: nodes.known(), own, by_service: BTreeMap::new() }
    }

    /// Counts a live pin.
    pub(super) fn note<A: Address>(&mut self, service: u32, client: A) {
        if A::BITS == V6::BITS && netns_of(V6(client.to_mapped())).is_some() {
            return;
        }
        let client = ip(client);
        if self.own.contains(&client) {
            return;
        }
        let count = self.by_service.entry(service).or_default();
        count.all += 1;
        count.of_nodes += u64::from(self.nodes.as_ref().is_some_and(|nodes| nodes.contains(&client)));
    }

    /// The services for which all clients look like nodes. The nodes' addresses are requested if they may matter.
    pub(super) fn look_like_nodes(&self, nodes: &NodeAddresses) -> BTreeSet<u32> {
        let enough = || self.by_service.iter().filter(|(_, count)| count.all >= LEAST);
        if enough().next().is_some() {
            nodes.want();
        }
        enough().filter(|(_, count)| count.of_nodes == count.all).map(|(service, _)| *service).collect()
    }
}

#[cfg(test)]
mod tests {
    use affinity_common::abi::{V4, netns_client};

    use super::*;
    use crate::view::mapped;

    fn looks(nodes: &NodeAddresses, pins: &[(u32, &str)]) -> Vec<u32> {
        let own = BTreeSet::from(["192.0.2.1".parse().unwrap()]);
        let mut clients = Clients { own, nodes: nodes.known(), ..Clients::default() };
        for (service, client) in pins {
            match client.parse().unwrap() {
                IpAddr::V4(client) => clients.note(*service, V4(client.octets())),
                client @ IpAddr::V6(_) => clients.note(*service, V6(mapped(client))),
            }
        }
        clients.note(7, netns_client(5, 4));
        clients.look_like_nodes(nodes).into_iter().collect()
    }

    #[test]
    fn all_and_more_than_one_must_be_nodes() {
        let nodes = NodeAddresses::default();
        let pins = [(1, "192.0.2.2"), (1, "2001:db8::2"), (2, "192.0.2.2"), (2, "192.0.2.99"), (3, "192.0.2.2")];
        assert_eq!(looks(&nodes, &pins), [0; 0], "the nodes are not known");
        nodes.tell(["192.0.2.1", "192.0.2.2", "2001:db8::2"].map(|address| address.parse().unwrap()).into());
        assert_eq!(looks(&nodes, &pins), [1]);
        assert_eq!(
            looks(&nodes, &[(7, "192.0.2.2"), (7, "2001:db8::2")]),
            [7],
            "a socket of this machine is no client"
        );
        assert_eq!(looks(&nodes, &[(1, "192.0.2.1"), (1, "192.0.2.2")]), [0; 0], "nor is this node itself");
        nodes.tell(["192.0.2.1".parse().unwrap()].into());
        assert_eq!(looks(&nodes, &[(1, "192.0.2.1"), (1, "192.0.2.99")]), [0; 0], "a cluster of one node has no other");
    }

    #[tokio::test]
    async fn nodes_are_asked_for_only_where_it_may_matter() {
        let nodes = NodeAddresses::default();
        let is_wanted =
            async || tokio::time::timeout(std::time::Duration::from_millis(1), nodes.wanted()).await.is_ok();
        looks(&nodes, &[(1, "192.0.2.2"), (2, "192.0.2.3")]);
        assert!(!is_wanted().await);
        looks(&nodes, &[(1, "192.0.2.2"), (1, "192.0.2.3")]);
        assert!(is_wanted().await);
    }
}
