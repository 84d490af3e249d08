//! Pods, as parts of other views and as views.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use affinity_common::abi::{BACKEND_LINGERING, BACKEND_LOCAL, BackendRef, UsageKey, UsageOf};
use serde::Serialize;

use super::{Catalog, LiveSessions};

/// A pod, as other views refer to it. All fields are empty if nothing is known about it any more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize)]
pub struct PodRef<'a> {
    /// Its address.
    pub address: Option<IpAddr>,
    /// The pod's name, if the source gave one.
    pub name: Option<&'a str>,
    /// The pod's namespace, if the source gave a name.
    pub namespace: Option<&'a str>,
}

impl<'a> PodRef<'a> {
    /// `full_name` is `namespace/pod`, or empty.
    pub(crate) fn new(address: Option<IpAddr>, full_name: &'a str) -> Self {
        match full_name.split_once('/') {
            Some((namespace, name)) => Self { address, name: Some(name), namespace: Some(namespace) },
            None => Self { address, name: Some(full_name).filter(|name| !name.is_empty()), namespace: None },
        }
    }

    /// `namespace/name`, else the displayed text.
    #[must_use]
    pub fn full_name(&self) -> String {
        match (self.namespace, self.name) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
            _ => self.to_string(),
        }
    }

    /// Whether `wanted` is its address, its name, or `namespace/name`.
    #[must_use]
    pub fn is_called(&self, wanted: &str) -> bool {
        if self.name == Some(wanted) || wanted.parse().is_ok_and(|wanted: IpAddr| self.address == Some(wanted)) {
            return true;
        }
        wanted
            .split_once('/')
            .is_some_and(|(namespace, name)| self.namespace == Some(namespace) && self.name == Some(name))
    }
}

/// The name, else the address, else `(gone)`.
impl fmt::Display for PodRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name, self.address) {
            (Some(name), _) => f.write_str(name),
            (None, Some(address)) => address.fmt(f),
            (None, None) => f.write_str("(gone)"),
        }
    }
}

/// Whether a pod takes connections.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// It takes new connections, in at least one service port.
    Ready,
    /// It takes only packets of its existing connections.
    Draining,
    /// It takes only packets of its existing connections: it is in no service any more.
    Lingering,
    /// It takes no connections, because its service is being changed.
    Unused,
}

impl BackendState {
    /// The name in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Lingering => "lingering",
            Self::Unused => "unused",
        }
    }
}

/// A pod.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct BackendView<'a> {
    /// Address and name.
    #[serde(flatten)]
    pub backend: PodRef<'a>,
    /// The services that it serves, by name.
    pub services: Vec<String>,
    /// Whether it takes connections.
    pub state: BackendState,
    /// Whether it runs on this node.
    pub local: bool,
    /// Live pins.
    pub sessions: u64,
    /// New connections that it got since it became known.
    pub connections: u64,
    /// Open connections of a lingering pod. They are not counted for others.
    pub open: Option<u64>,
}

impl<'a> BackendView<'a> {
    /// Every pod in use, by name and address. `open` is the number of open connections of lingering backends.
    #[must_use]
    pub fn all(catalog: &'a Catalog, live: &LiveSessions, open: &BTreeMap<u32, u64>) -> Vec<Self> {
        let mut members: BTreeMap<u32, (Vec<String>, bool)> = BTreeMap::new();
        for (pool, service) in catalog.pools() {
            for (backend, ready) in catalog.members(pool) {
                let (services, any_ready) = members.entry(backend).or_default();
                services.push(catalog.service_name(service).into_owned());
                *any_ready |= ready;
            }
        }
        let in_use = catalog.observed.backends.iter().filter(|(_, record)| record.generation % 2 == 1);
        let mut views: Vec<Self> = in_use
            .map(|(&index, record)| {
                let (mut services, any_ready) = members.remove(&index).unwrap_or_default();
                services.sort_unstable();
                services.dedup();
                let lingers = record.flags & BACKEND_LINGERING != 0;
                let state = match (services.is_empty(), any_ready) {
                    (true, _) if lingers => BackendState::Lingering,
                    (true, _) => BackendState::Unused,
                    (false, true) => BackendState::Ready,
                    (false, false) => BackendState::Draining,
                };
                let usage = catalog.usage.get(&UsageKey { of: UsageOf::Backend as u32, id: index });
                Self {
                    backend: catalog.backend(BackendRef { index, generation: record.generation }),
                    services,
                    state,
                    local: record.flags & BACKEND_LOCAL != 0,
                    sessions: live.of_backend(index),
                    connections: usage.map_or(0, |usage| usage.counts.iter().sum()),
                    open: lingers.then(|| open.get(&index).copied().unwrap_or(0)),
                }
            })
            .collect();
        views.sort_by_key(|view| (view.backend.namespace, view.backend.name, view.backend.address));
        views
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::fixture;

    #[test]
    fn a_pod_without_a_service_lingers_while_its_record_says_so() {
        let mut catalog = fixture::catalog();
        catalog.observed.members.clear();
        for (index, flags) in [(1, BACKEND_LOCAL | BACKEND_LINGERING), (2, BACKEND_LINGERING), (3, 0)] {
            catalog.observed.backends.entry(index).and_modify(|record| record.flags = flags);
        }
        let views = BackendView::all(&catalog, &LiveSessions::default(), &BTreeMap::from([(1, 7)]));
        let states: Vec<_> = views.iter().map(|view| (view.backend.name, view.state.name(), view.open)).collect();
        let (web_0, web_1) = (Some("web-0"), Some("web-1"));
        assert_eq!(states, [(None, "unused", None), (web_0, "lingering", Some(7)), (web_1, "lingering", Some(0))]);
    }

    #[test]
    fn a_pod_answers_to_its_address_its_name_and_its_full_name() {
        let pod = PodRef::new(Some("10.1.0.1".parse().unwrap()), "default/web-0");
        for wanted in ["10.1.0.1", "web-0", "default/web-0"] {
            assert!(pod.is_called(wanted), "{wanted}");
        }
        for wanted in ["10.1.0.2", "web-1", "other/web-0", "default", ""] {
            assert!(!pod.is_called(wanted), "{wanted}");
        }
        assert_eq!(pod.to_string(), "web-0");
        assert_eq!(PodRef::new(pod.address, "").to_string(), "10.1.0.1");
        assert_eq!(PodRef::default().to_string(), "(gone)");
    }
}
