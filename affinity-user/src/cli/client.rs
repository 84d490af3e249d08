//! `--client`: whose pins, by address, network, or the name of a network namespace.

use std::str::FromStr;

use crate::view::{Client, ClientRef, NETNS, NODE};

/// What an option names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum ClientArg {
    /// An address, or a network.
    Network(Client),
    /// A namespace of this machine: the node, a pod, or by its cookie.
    Named(String),
}

impl ClientArg {
    /// Whether a client is meant.
    pub(crate) fn takes(&self, client: &ClientRef<'_>) -> bool {
        match self {
            Self::Network(network) => network.contains(&client.key),
            Self::Named(name) => {
                let short = client.name.and_then(|full| full.split_once('/')).map(|(_, short)| short);
                let cookie = client.key.netns().map(|cookie| format!("{NETNS}{cookie}"));
                client.name == Some(name) || short == Some(name) || cookie.as_ref() == Some(name)
            }
        }
    }

    /// The one address that can be looked up.
    pub(crate) fn address(&self) -> Option<Client> {
        match self {
            Self::Network(client) => Some(*client).filter(|client| client.is_address() && client.netns().is_none()),
            Self::Named(_) => None,
        }
    }
}

impl FromStr for ClientArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_cookie = text.strip_prefix(NETNS).is_some_and(|cookie| cookie.parse::<u64>().is_ok());
        let is_pod = text.contains(|c: char| c.is_ascii_lowercase())
            && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-./".contains(c));
        match text.parse() {
            Ok(client) => Ok(Self::Network(client)),
            Err(_) if is_cookie || is_pod || text == NODE => Ok(Self::Named(text.to_owned())),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use affinity_common::abi::netns_client;

    use super::*;
    use crate::view::ip;

    #[test]
    fn names_and_addresses_are_told_apart() {
        for text in ["192.0.2.1", "2001:db8::/64", "fd00::", "100::400:0:0:4d"] {
            assert!(matches!(text.parse(), Ok(ClientArg::Network(_))), "{text}");
        }
        for text in ["node", "netns:77", "web-0", "default/web-0"] {
            assert_eq!(text.parse(), Ok(ClientArg::Named(text.to_owned())));
        }
        for text in ["192.0.2", "192.0.2.1/33", "netns:web", "", "Web"] {
            assert!(text.parse::<ClientArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_namespace_answers_to_all_its_names() {
        let client = ClientRef { key: Client::new(ip(netns_client(77, 6)), 128), name: Some("default/web-0") };
        for text in ["default/web-0", "web-0", "netns:77", "100::600:0:0:4d", "100::/64"] {
            assert!(text.parse::<ClientArg>().unwrap().takes(&client), "{text}");
        }
        for text in ["node", "netns:7", "default", "192.0.2.1"] {
            assert!(!text.parse::<ClientArg>().unwrap().takes(&client), "{text}");
        }
    }
}
