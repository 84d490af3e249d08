//! Questions about a packet, or about a socket of this machine.

use std::{collections::BTreeSet, net::IpAddr};

use affinity_common::{
    abi::{
        AFFINITY, Address, Direction, FlowKey, Frontend, FrontendKey, PODS, Port, RANGES, RangeKey, SHADOW, SHARED,
        SPLIT_SCOPE, SessionKey, V4, V6, filter_bit,
    },
    model::Model,
};

use super::{Catalog, Client, Endpoint, NODE, address::mapped};

/// A question about a packet; both addresses are of one family. Or about a socket: then the client is the key of its network
/// namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Question {
    /// The client.
    pub from: IpAddr,
    /// The client's port; `None`: the client has no connection yet.
    pub from_port: Option<u16>,
    /// The destination.
    pub to: Endpoint,
    /// IANA protocol number.
    pub protocol: u8,
}

impl Question {
    /// The packet's key. If no port is given, it is zero, which no client uses.
    #[must_use]
    pub fn key<A: Address>(&self) -> FlowKey<A> {
        FlowKey {
            saddr: A::from_mapped(mapped(self.from)),
            daddr: A::from_mapped(mapped(self.to.address)),
            sport: Port::new(self.from_port.unwrap_or(0)),
            dport: Port::new(self.to.port),
            protocol: self.protocol,
            direction: Direction::Dnat as u8,
            pad: [0; 2],
        }
    }

    /// Whether the destination is a frontend.
    #[must_use]
    pub fn is_frontend<A: FrontendTables>(&self, catalog: &Catalog) -> bool {
        self.frontend::<A>(catalog).is_some()
    }

    /// Whether this is about a socket instead of a packet.
    #[must_use]
    pub fn is_socket(&self) -> bool {
        Client::new(self.from, u8::MAX).netns().is_some()
    }

    /// The frontend record that applies to this client. For a socket, the whole client key counts, and settings that depend on
    /// where a packet comes from do not apply.
    pub(super) fn frontend<A: FrontendTables>(&self, catalog: &Catalog) -> Option<Frontend> {
        if !self.is_socket() {
            if self.to.address.is_loopback() {
                // Only for the node's own sockets.
                return None;
            }
            let (key, client) = (self.frontend_key::<A>(), self.key::<A>().saddr);
            let frontend = A::frontend(catalog, &key)?;
            let is_inside =
                || (0..=A::BITS).any(|bits| A::ranges(catalog).contains(&RangeKey::new(PODS, client, bits)));
            let is_meant = frontend.flags & SPLIT_SCOPE == 0 || is_inside();
            let frontend = if is_meant { frontend } else { A::frontend(catalog, &key.external())? };
            return Some(Frontend { flags: frontend.flags & !SPLIT_SCOPE, ..frontend });
        }
        let address = self.to.address.to_canonical();
        if address.is_loopback() && catalog.client(self.from, 0).name != Some(NODE) {
            // A pod's loopback address is its own.
            return None;
        }
        let frontend = match address {
            IpAddr::V4(_) => V4::frontend(catalog, &self.frontend_key()),
            IpAddr::V6(_) => V6::frontend(catalog, &self.frontend_key()),
        }?;
        let flags = frontend.flags & (AFFINITY | SHARED | SHADOW | RANGES);
        Some(Frontend { prefix: V6::BITS, flags, ..frontend })
    }

    /// The filter bit of the destination.
    #[must_use]
    pub fn filter_bit(&self) -> u32 {
        let Self { to: Endpoint { address, port }, protocol, .. } = *self;
        match address.to_canonical() {
            IpAddr::V4(address) => filter_bit(V4(address.octets()), Port::new(port), protocol),
            IpAddr::V6(address) => filter_bit(V6(address.octets()), Port::new(port), protocol),
        }
    }

    pub(super) fn frontend_key<A: Address>(&self) -> FrontendKey<A> {
        let key = self.key::<A>();
        FrontendKey::new(key.daddr, key.dport, key.protocol)
    }
}

/// A family's tables in the catalog and in the model.
pub trait FrontendTables: Address {
    /// The record of a frontend.
    fn frontend(catalog: &Catalog, key: &FrontendKey<Self>) -> Option<Frontend>;
    /// The ranges of addresses.
    fn ranges(catalog: &Catalog) -> &BTreeSet<RangeKey<Self>>;
    /// Copies a frontend and all ranges into the model.
    fn put_frontend(model: &mut Model, catalog: &Catalog, key: FrontendKey<Self>, frontend: Frontend);
}

impl FrontendTables for V4 {
    fn frontend(catalog: &Catalog, key: &FrontendKey<Self>) -> Option<Frontend> {
        catalog.observed.frontends_v4.get(key).copied()
    }

    fn ranges(catalog: &Catalog) -> &BTreeSet<RangeKey<Self>> {
        &catalog.observed.ranges_v4
    }

    fn put_frontend(model: &mut Model, catalog: &Catalog, key: FrontendKey<Self>, frontend: Frontend) {
        model.frontends_v4.insert(key, frontend);
        model.ranges_v4.clone_from(&catalog.observed.ranges_v4);
    }
}

impl FrontendTables for V6 {
    fn frontend(catalog: &Catalog, key: &FrontendKey<Self>) -> Option<Frontend> {
        catalog.observed.frontends_v6.get(key).copied()
    }

    fn ranges(catalog: &Catalog) -> &BTreeSet<RangeKey<Self>> {
        &catalog.observed.ranges_v6
    }

    fn put_frontend(model: &mut Model, catalog: &Catalog, key: FrontendKey<Self>, frontend: Frontend) {
        model.frontends_v6.insert(key, frontend);
        model.ranges_v6.clone_from(&catalog.observed.ranges_v6);
    }
}

/// Keys that a client's pins for a frontend may have: the group's, then the service's own.
#[must_use]
pub(super) fn session_keys<A: FrontendTables>(catalog: &Catalog, question: &Question) -> Vec<SessionKey<A>> {
    let Some(frontend) = question.frontend::<A>(catalog) else { return Vec::new() };
    let client = question.key::<A>().saddr;
    let mut keys: Vec<_> =
        [frontend.group, frontend.own].map(|scope| SessionKey::new(scope, client, frontend.prefix)).to_vec();
    keys.dedup();
    keys
}

/// Indices of the backends in the pool of a question's frontend.
#[must_use]
pub(super) fn pool_backends<A: FrontendTables>(catalog: &Catalog, question: &Question) -> Vec<u32> {
    question
        .frontend::<A>(catalog)
        .map_or_else(Vec::new, |frontend| catalog.members(frontend.pool).map(|(index, _)| index).collect())
}
