//! EndpointSlices -> the members of a pool.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use affinity_common::abi::Name;
use k8s_openapi::api::discovery::v1::{Endpoint as ApiEndpoint, EndpointConditions, EndpointSlice};

use super::{BackendName, Family, Member, Options, PoolName, Protocol, Report, is_ours};
use crate::source::{ObjectName, Problem, Snapshot};

/// The label that names a slice's service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// How an endpoint is; better ones first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Condition {
    Ready,
    /// On its way out, but still able to serve: used where nothing is ready.
    ServingTerminating,
    /// Takes no new connection.
    Unready,
}

/// An endpoint of one slice.
struct Endpoint {
    backend: BackendName,
    condition: Condition,
}

/// A slice, checked. Its ports hold for all of its endpoints.
struct Slice {
    family: Family,
    ports: Vec<(String, Protocol, u16)>,
    endpoints: Vec<Endpoint>,
}

/// All endpoints, by service.
pub(super) struct Endpoints {
    slices: BTreeMap<ObjectName, Vec<Slice>>,
    local: BTreeSet<BackendName>,
    /// Those of services that are not ours.
    pub(super) others: BTreeSet<BackendName>,
}

impl Endpoints {
    /// Reads the slices of all services; of those that are not ours, what is wrong is not ours to report.
    pub(super) fn read(snapshot: &Snapshot, options: &Options, problems: &mut Vec<Problem>) -> Self {
        let mut endpoints = Self { slices: BTreeMap::new(), local: BTreeSet::new(), others: BTreeSet::new() };
        for (name, sourced) in &snapshot.slices {
            let mut report = Report::new("EndpointSlice", name, sourced, problems);
            let labels = sourced.object.metadata.labels.as_ref();
            let Some(service) = labels.and_then(|labels| labels.get(SERVICE_NAME)) else {
                report.info("metadata.labels", format!("{SERVICE_NAME} is missing; the slice serves no service"));
                continue;
            };
            let service = ObjectName::new(&name.namespace, service);
            if snapshot.services.get(&service).is_some_and(|service| !is_ours(&service.object, options)) {
                endpoints.others.extend(backends(name, &sourced.object));
            } else if let Some(slice) = endpoints.slice(name, &sourced.object, options, &mut report) {
                endpoints.slices.entry(service).or_default().push(slice);
            }
        }
        endpoints
    }

    /// The services that have a slice.
    pub(super) fn services(&self) -> BTreeSet<ObjectName> {
        self.slices.keys().cloned().collect()
    }

    /// Whether a backend is on this node.
    pub(super) fn is_local(&self, backend: &BackendName) -> bool {
        self.local.contains(backend)
    }

    /// The members of a pool, whose port the slices call `port`.
    pub(super) fn members(
        &self,
        pool: &PoolName,
        port: &str,
        report: &mut Report<'_>,
    ) -> BTreeMap<BackendName, Member> {
        let mut found: BTreeMap<&BackendName, (Condition, u16)> = BTreeMap::new();
        for slice in self.slices.get(&pool.service).into_iter().flatten().filter(|slice| slice.family == pool.family) {
            let matching = slice.ports.iter().filter(|(name, protocol, _)| name == port && *protocol == pool.protocol);
            for (number, endpoint) in
                matching.flat_map(|(_, _, number)| slice.endpoints.iter().map(move |e| (*number, e)))
            {
                let candidate = (endpoint.condition, number);
                let best = found.entry(&endpoint.backend).or_insert(candidate);
                if best.1 != number {
                    let (address, kept) = (endpoint.backend.address, (*best).min(candidate).1);
                    report.warning(
                        String::new(),
                        format!("endpoint {address} has two ports for {pool}, {} and {number}; {kept} is used", best.1),
                    );
                }
                *best = (*best).min(candidate);
            }
        }
        let usable = found.values().map(|(condition, _)| *condition).min().filter(|best| *best != Condition::Unready);
        let member = |condition, port| Member { port, ready: Some(condition) == usable };
        found.into_iter().map(|(backend, (condition, port))| (backend.clone(), member(condition, port))).collect()
    }

    fn slice(
        &mut self,
        name: &ObjectName,
        slice: &EndpointSlice,
        options: &Options,
        report: &mut Report<'_>,
    ) -> Option<Slice> {
        let family = match slice.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            other => {
                report.warning("addressType", format!("{other:?} is none of IPv4, IPv6; the slice is ignored"));
                return None;
            }
        };
        let mut endpoints = Vec::new();
        for (index, endpoint) in slice.endpoints.iter().flatten().enumerate() {
            let Some(address) = address(endpoint, family, index, report) else { continue };
            let backend = BackendName { address, pod: pod(endpoint, name) };
            if options.node_name.is_some() && endpoint.node_name == options.node_name {
                self.local.insert(backend.clone());
            }
            endpoints.push(Endpoint { backend, condition: condition(endpoint.conditions.as_ref()) });
        }
        Some(Slice { family, ports: ports(slice, report), endpoints })
    }
}

/// The backends of a slice, whatever else it says.
fn backends(name: &ObjectName, slice: &EndpointSlice) -> impl Iterator<Item = BackendName> {
    slice.endpoints.iter().flatten().filter_map(|endpoint| {
        let address = endpoint.addresses.first()?.parse().ok()?;
        Some(BackendName { address, pod: pod(endpoint, name) })
    })
}

/// The first address: all of an endpoint's addresses mean the same, and none but the first is ever used.
fn address(endpoint: &ApiEndpoint, family: Family, index: usize, report: &mut Report<'_>) -> Option<IpAddr> {
    let field = format!("endpoints[{index}].addresses[0]");
    let Some(text) = endpoint.addresses.first() else {
        report.error(field, "missing; the endpoint is ignored");
        return None;
    };
    match text.parse::<IpAddr>() {
        Ok(ip) if Family::of(ip) != family => report.error(field, format!("{ip} is not of the slice's addressType")),
        Ok(ip) if !is_endpoint(ip) => report.error(field, format!("{ip} cannot be the address of an endpoint")),
        Ok(ip) => return Some(ip),
        Err(_) => report.error(field, format!("{text:?} is no IP address; the endpoint is ignored")),
    }
    None
}

fn is_endpoint(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !(link_local || ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.to_canonical() != ip)
}

fn pod(endpoint: &ApiEndpoint, slice: &ObjectName) -> String {
    let target = endpoint.target_ref.as_ref();
    let name = target.and_then(|target| target.name.as_deref()).filter(|name| !name.is_empty());
    let namespace = target.and_then(|target| target.namespace.as_deref()).unwrap_or(&slice.namespace);
    let pod = name.map(|name| format!("{namespace}/{name}")).unwrap_or_default();
    // As the `names` map can hold it: it is read back from there, and has to be the same then.
    Name::new(&pod).as_str().to_owned()
}

/// As kube-proxy reads them: what is not said is ready, serving, and not terminating. (With publishNotReadyAddresses the
/// slices say ready whatever the pod says.)
fn condition(conditions: Option<&EndpointConditions>) -> Condition {
    let said = |field: fn(&EndpointConditions) -> Option<bool>| conditions.and_then(field);
    if said(|c| c.ready).unwrap_or(true) {
        Condition::Ready
    } else if said(|c| c.serving).unwrap_or(true) && said(|c| c.terminating).unwrap_or(false) {
        Condition::ServingTerminating
    } else {
        Condition::Unready
    }
}

fn ports(slice: &EndpointSlice, report: &mut Report<'_>) -> Vec<(String, Protocol, u16)> {
    let mut ports = Vec::new();
    for (index, port) in slice.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("ports[{index}].{name}");
        let protocol = match port.protocol.as_deref() {
            None | Some("TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            // Reported where a service has such a port.
            Some("SCTP") => continue,
            Some(other) => {
                report.error(field("protocol"), format!("{other:?} is none of TCP, UDP; the port is ignored"));
                continue;
            }
        };
        match port.port.map(u16::try_from) {
            Some(Ok(number)) if number > 0 => ports.push((port.name.clone().unwrap_or_default(), protocol, number)),
            Some(_) => report.error(field("port"), "not within 1 to 65535; the port is ignored"),
            None => report.warning(field("port"), "missing: \"all ports\" cannot be served; the port is ignored"),
        }
    }
    ports
}
