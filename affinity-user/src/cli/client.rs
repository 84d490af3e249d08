//! `--client`: selects pins by address, network, or the name of a network namespace.

use std::{collections::BTreeMap, net::IpAddr, str::FromStr};

use affinity_common::abi::netns_client;

use super::error::Error;
use crate::view::{Catalog, Client, ClientRef, KnownNamespace, NETNS, NODE, ip};

/// The value of the option.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum ClientArg {
    /// An address, or a network.
    Network(Client),
    /// A namespace of this machine: the node, a pod, or one given by its cookie.
    Named(String),
}

impl ClientArg {
    /// Whether it selects a client.
    pub(crate) fn takes(&self, client: &ClientRef<'_>) -> bool {
        match self {
            Self::Network(network) => {
                let has = |address: &IpAddr| network.contains(&Client::new(*address, u8::MAX));
                network.contains(&client.key) || client.addresses.iter().any(has)
            }
            Self::Named(name) => {
                let short = client.name.and_then(|full| full.split_once('/')).map(|(_, short)| short);
                let cookie = client.key.netns().map(|cookie| format!("{NETNS}{cookie}"));
                client.name == Some(name) || short == Some(name) || cookie.as_ref() == Some(name)
            }
        }
    }

    /// The cookies of the namespaces with this name or address: more than one if several namespaces have the address of one
    /// pod. A network has none.
    ///
    /// # Errors
    /// [`Error`] if no namespace of this machine has the name, or if several pods have it.
    pub(crate) fn cookies(&self, catalog: &Catalog) -> Result<Vec<u64>, Error> {
        let name = match self {
            Self::Network(client) => return Ok(cookies_at(client, catalog)),
            Self::Named(name) => name,
        };
        if let Some(cookie) = name.strip_prefix(NETNS).and_then(|cookie| cookie.parse().ok()) {
            return Ok(vec![cookie]);
        }
        // One family is enough: all keys of a namespace have its name.
        let mut by_name: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (&cookie, known) in catalog.namespaces() {
            let client = catalog.namespace_ref(Client::new(ip(netns_client(cookie, 4)), u8::MAX), cookie);
            if let Some(full) = known.name.as_deref().filter(|_| self.takes(&client)) {
                by_name.entry(full).or_default().push(cookie);
            }
        }
        let mut names = by_name.into_iter();
        match (names.next(), names.next()) {
            (None, _) => Err(Error::no_namespace(name)),
            (Some((_, cookies)), None) => Ok(cookies),
            (Some((first, _)), Some((second, _))) => Err(Error::Usage(format!(
                "{name} is ambiguous, {first} or {second}: give the namespace, or {NETNS}COOKIE"
            ))),
        }
    }

    /// The address, if it is a single one that can be looked up.
    pub(crate) fn address(&self) -> Option<Client> {
        match self {
            Self::Network(client) => Some(*client).filter(|client| client.is_address() && client.netns().is_none()),
            Self::Named(_) => None,
        }
    }
}

/// The cookies of the namespaces that a client key means, or that have its address.
fn cookies_at(client: &Client, catalog: &Catalog) -> Vec<u64> {
    if let Some(cookie) = client.netns() {
        return vec![cookie];
    }
    let has_address = |known: &KnownNamespace| client.is_address() && known.addresses.contains(&client.address());
    catalog.namespaces().iter().filter(|(_, known)| has_address(known)).map(|(cookie, _)| *cookie).collect()
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
    use super::*;
    use crate::view::fixture;

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
    fn a_name_leads_to_its_namespace() {
        let names = [
            (7, "node"),
            (77, "default/web-0"),
            (78, "shop/web-0"),
            (79, "shop/cart-0"),
            (80, "shop/db-0"),
            (81, "shop/db-0"),
        ];
        let at = |cookie| format!("10.244.0.{cookie}").parse().unwrap();
        let known =
            |cookie, name: Option<&str>| KnownNamespace { name: name.map(str::to_owned), addresses: vec![at(cookie)] };
        let mut namespaces: BTreeMap<u64, KnownNamespace> =
            names.map(|(cookie, name)| (cookie, known(cookie, Some(name)))).into();
        namespaces.insert(90, known(90, None));
        let catalog = fixture::catalog().with_namespaces(namespaces);
        let cookies =
            |text: &str| text.parse::<ClientArg>().unwrap().cookies(&catalog).map_err(|error| error.to_string());
        for (text, found) in [("node", 7), ("shop/web-0", 78), ("cart-0", 79), ("netns:5", 5), ("100::400:0:0:4d", 77)]
        {
            assert_eq!(cookies(text), Ok(vec![found]), "{text}");
        }
        assert_eq!(cookies("192.0.2.1"), Ok(vec![]));
        assert_eq!(cookies("10.244.0.0/24"), Ok(vec![]), "a network is not one client");
        for (text, cookie) in [("10.244.0.90", 90), ("::ffff:10.244.0.90", 90), ("10.244.0.79", 79), ("10.244.0.7", 7)]
        {
            assert_eq!(cookies(text), Ok(vec![cookie]), "{text}");
        }
        assert_eq!(cookies("shop/db-0"), Ok(vec![80, 81]), "the address of one that has ended, and of its successor");
        assert!(cookies("web-0").unwrap_err().contains("default/web-0 or shop/web-0"));
        assert!(cookies("web-9").unwrap_err().contains("not found"));
    }

    #[test]
    fn a_namespace_answers_to_all_its_names() {
        let addresses = ["10.244.0.77".parse().unwrap(), "fd00::77".parse().unwrap()];
        let key = Client::new(ip(netns_client(77, 6)), 128);
        let client = ClientRef { key, name: Some("default/web-0"), addresses: &addresses };
        for text in [
            "default/web-0",
            "web-0",
            "netns:77",
            "100::600:0:0:4d",
            "100::/64",
            "10.244.0.77",
            "10.244.0.0/24",
            "fd00::77",
        ] {
            assert!(text.parse::<ClientArg>().unwrap().takes(&client), "{text}");
        }
        for text in ["node", "netns:7", "default", "192.0.2.1", "10.244.0.7"] {
            assert!(!text.parse::<ClientArg>().unwrap().takes(&client), "{text}");
        }
    }
}
