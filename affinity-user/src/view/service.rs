//! Services: their frontends, pods and pin settings.

use std::{borrow::Cow, collections::BTreeMap};

use affinity_common::abi::{
    AFFINITY, Frontend, Selection, Session, TIMEOUT_UNLIMITED, Timer, USAGES, UsageKey, UsageOf,
};
use serde::{Serialize, Serializer, ser::SerializeMap};

use super::{Catalog, Endpoint, Moment, Policy, expires_in_s, protocol_name};

/// Live pins, counted in one pass over the sessions.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LiveSessions {
    by_service: BTreeMap<u32, u64>,
    by_backend: BTreeMap<u32, u64>,
}

impl LiveSessions {
    /// Counts a pin, unless it has expired or its pod is gone.
    pub fn add(&mut self, catalog: &Catalog, session: &Session) {
        let Some(policy) = catalog.policy(session.service) else { return };
        let backend = catalog.observed.backends.get(&session.backend.index);
        let there = backend.is_some_and(|backend| backend.generation == session.backend.generation);
        if there && expires_in_s(session, policy.timer, policy.timeout_ns, catalog.clock.now_ns) != Some(0) {
            *self.by_service.entry(session.service).or_default() += 1;
            *self.by_backend.entry(session.backend.index).or_default() += 1;
        }
    }

    /// Live pins that connections of a service made.
    #[must_use]
    pub fn of_service(&self, service: u32) -> u64 {
        self.by_service.get(&service).copied().unwrap_or(0)
    }

    /// Live pins to a backend.
    #[must_use]
    pub fn of_backend(&self, backend: u32) -> u64 {
        self.by_backend.get(&backend).copied().unwrap_or(0)
    }
}

/// Counts of pods.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Endpoints {
    /// Pods that take new connections.
    pub ready: u32,
    /// Pods that keep their existing connections, and take no new ones.
    pub draining: u32,
}

impl Endpoints {
    fn count(members: &BTreeMap<u32, bool>) -> Self {
        let mut endpoints = Self::default();
        for &ready in members.values() {
            if ready {
                endpoints.ready += 1;
            } else {
                endpoints.draining += 1;
            }
        }
        endpoints
    }
}

/// An address that clients connect to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct FrontendView {
    /// Address and port.
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// `TCP` or `UDP`.
    pub protocol: &'static str,
    /// The pods that it leads to.
    pub endpoints: Endpoints,
    /// The pods that serve external clients, if these are treated differently.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub external: Option<Endpoints>,
}

/// A service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceView<'a> {
    /// `namespace/name`.
    pub service: Cow<'a, str>,
    /// `ClientIP` or `None`, as in Kubernetes.
    pub affinity: &'static str,
    /// Shadow mode: decided and counted, but every packet passes.
    pub shadow: bool,
    /// What restarts a pin's timeout.
    pub timer: &'static str,
    /// Seconds; null: pins never expire.
    pub timeout_seconds: Option<u64>,
    /// How a pod is chosen.
    pub select: &'static str,
    /// The named group that shares its pins; null: none.
    pub group: Option<&'a str>,
    /// Prefix length of IPv4 client keys; null: no IPv4 frontend.
    #[serde(rename = "clientPrefixV4")]
    pub client_prefix_v4: Option<u8>,
    /// Prefix length of IPv6 client keys; null: no IPv6 frontend.
    #[serde(rename = "clientPrefixV6")]
    pub client_prefix_v6: Option<u8>,
    /// Its frontends, by family and address.
    pub frontends: Vec<FrontendView>,
    /// Pods of all its frontends.
    pub endpoints: Endpoints,
    /// Live pins that its connections made.
    pub sessions: u64,
    /// New connections, by reason.
    pub connections: Connections,
    /// Whether all pinned clients look like nodes of the cluster: then something in front of the service masquerades.
    pub clients_are_nodes: bool,
    /// When the source's content was last completely known; null: never.
    pub as_of: Option<Moment>,
}

/// New connections by reason, in the order of [`USAGES`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Connections(pub [u64; 8]);

impl Connections {
    /// All except the rejected ones, which are last.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.0[..7].iter().sum()
    }
}

impl Serialize for Connections {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(USAGES.len()))?;
        for (reason, count) in USAGES.iter().zip(self.0) {
            map.serialize_entry(reason.name(), &count)?;
        }
        map.end()
    }
}

impl<'a> ServiceView<'a> {
    /// Every service, by name.
    #[must_use]
    pub fn all(catalog: &'a Catalog, live: &LiveSessions) -> Vec<Self> {
        catalog
            .services()
            .into_iter()
            .filter_map(|(name, id)| Some(Self::new(catalog, live, name, id, catalog.policy(id)?)))
            .collect()
    }

    fn new(catalog: &'a Catalog, live: &LiveSessions, service: Cow<'a, str>, id: u32, policy: &Policy) -> Self {
        let mut all = BTreeMap::new();
        let mut frontends: Vec<FrontendView> = Vec::new();
        for frontend in catalog.frontends.iter().filter(|frontend| frontend.record.service == id) {
            let members: BTreeMap<u32, bool> = catalog.members(frontend.record.pool).collect();
            for (&backend, &ready) in &members {
                *all.entry(backend).or_default() |= ready;
            }
            let (endpoints, protocol) = (Endpoints::count(&members), protocol_name(frontend.protocol));
            match frontends.last_mut() {
                // It follows the record for all clients.
                Some(last) if frontend.external => last.external = Some(endpoints),
                _ => frontends.push(FrontendView { endpoint: frontend.endpoint, protocol, endpoints, external: None }),
            }
        }
        let usage = catalog.usage.get(&UsageKey { of: UsageOf::Service as u32, id });
        Self {
            service,
            affinity: if policy.affinity { "ClientIP" } else { "None" },
            shadow: policy.shadow,
            timer: timer_name(policy.timer),
            timeout_seconds: timeout_s(policy.timeout_ns),
            select: selection_name(policy.select),
            group: catalog.group_name(id),
            client_prefix_v4: policy.prefix_v4,
            client_prefix_v6: policy.prefix_v6,
            frontends,
            endpoints: Endpoints::count(&all),
            sessions: live.of_service(id),
            connections: Connections(usage.map_or([0; 8], |usage| usage.counts)),
            clients_are_nodes: catalog.clients_are_nodes(id),
            as_of: catalog.status().and_then(|status| status.as_of),
        }
    }
}

/// Whole seconds of a timeout; `None`: unlimited.
pub(crate) fn timeout_s(timeout_ns: u64) -> Option<u64> {
    (timeout_ns != TIMEOUT_UNLIMITED).then_some(timeout_ns / 1_000_000_000)
}

/// The value in the annotation.
pub(crate) fn timer_name(timer: Timer) -> &'static str {
    match timer {
        Timer::Connection => "connection",
        Timer::Packet => "packet",
        Timer::Absolute => "absolute",
        Timer::Alive => "alive",
    }
}

/// The value in the annotation.
pub(crate) fn selection_name(selection: Selection) -> &'static str {
    match selection {
        Selection::Random => "random",
        Selection::Consistent => "consistent",
        Selection::Least => "least",
    }
}

/// The selection of a frontend's record, and with affinity the timer and timeout.
pub(crate) fn policy_text(record: &Frontend) -> String {
    let select = selection_name(Selection::from_byte(record.select));
    if record.flags & AFFINITY == 0 {
        return format!("select={select}");
    }
    let timeout = timeout_s(record.timeout_ns).map_or_else(|| "unlimited".to_owned(), |s| format!("{s}s"));
    format!("timer={} timeout={timeout} select={select}", timer_name(Timer::from_byte(record.timer)))
}
