//! Names of clients in listings: an address, a network, or a network namespace of this machine.

use std::{fmt, net::IpAddr};

use affinity_common::abi::{V6, netns_of};
use serde::{Serialize, Serializer};

use super::{Client, mapped};

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

impl Client {
    /// The cookie of the network namespace that this client key means; `None` for addresses.
    #[must_use]
    pub fn netns(&self) -> Option<u64> {
        self.is_address().then(|| netns_of(V6(mapped(self.address)))).flatten().map(|(cookie, _)| cookie)
    }
}

#[cfg(test)]
mod tests {
    use affinity_common::abi::netns_client;

    use super::*;
    use crate::view::ip;

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
