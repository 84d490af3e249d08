//! The addresses of the cluster's nodes, on request.
//!
//! They are needed rarely, and a large cluster has many, so a source reads them only on request.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::{api::Node, parse_address};

/// A source's knowledge of nodes' addresses, shared by all clones.
#[derive(Clone, Debug, Default)]
pub struct NodeAddresses(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    known: Mutex<Option<Arc<BTreeSet<IpAddr>>>>,
    wanted: Notify,
}

impl NodeAddresses {
    /// The addresses of all nodes; `None` if the source does not know them, or does not know them yet.
    #[must_use]
    pub fn known(&self) -> Option<Arc<BTreeSet<IpAddr>>> {
        self.lock().clone()
    }

    /// Requests the addresses, or a check for changes.
    pub fn want(&self) {
        self.0.wanted.notify_one();
    }

    /// Waits until they are requested.
    pub async fn wanted(&self) {
        self.0.wanted.notified().await;
    }

    /// Stores the addresses of all nodes.
    pub fn tell(&self, addresses: BTreeSet<IpAddr>) {
        *self.lock() = Some(Arc::new(addresses));
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<BTreeSet<IpAddr>>>> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The addresses of a node, of either family; host names are left out.
pub(super) fn addresses_of(node: &Node) -> impl Iterator<Item = IpAddr> {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    addresses.filter_map(|address| parse_address(&address.address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_are_no_addresses() {
        let node = r#"{"metadata": {"name": "a"}, "status": {"addresses": [
            {"type": "InternalIP", "address": "192.0.2.1"}, {"type": "InternalIP", "address": "2001:db8::1"},
            {"type": "Hostname", "address": "a"}]}}"#;
        let node: Node = serde_json::from_str(node).expect("a node");
        let addresses: Vec<_> = addresses_of(&node).map(|address| address.to_string()).collect();
        assert_eq!(addresses, ["192.0.2.1", "2001:db8::1"]);
    }

    #[tokio::test]
    async fn who_wants_them_is_heard_later_too() {
        let nodes = NodeAddresses::default();
        assert_eq!(nodes.known(), None);
        nodes.clone().want();
        nodes.wanted().await;
        nodes.tell(BTreeSet::new());
        assert_eq!(nodes.clone().known(), Some(Arc::default()));
    }
}
