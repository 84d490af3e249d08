//! EndpointSlices -> the members of a pool.

use std::{collections::BTreeMap, net::IpAddr};

use affinity_common::abi::Name;
use k8s_openapi::api::discovery::v1::{Endpoint as ApiEndpoint, EndpointConditions, EndpointSlice};

use super::{BackendName, Family, Member, Options, PoolName, Protocol, Report};
use crate::source::ObjectName;

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
    local: bool,
}

/// A slice, checked. Its ports hold for all of its endpoints.
pub(super) struct Slice {
    family: Family,
    ports: Vec<(String, Protocol, u16)>,
    endpoints: Vec<Endpoint>,
}

/// The service that a slice is of; none where it does not say.
pub(super) fn service_of(name: &ObjectName, slice: &EndpointSlice) -> Option<ObjectName> {
    let service = slice.metadata.labels.as_ref()?.get(SERVICE_NAME)?;
    Some(ObjectName::new(&name.namespace, service))
}

/// Reads a slice; none where nothing of it can be used.
pub(super) fn read(
    name: &ObjectName,
    slice: &EndpointSlice,
    options: &Options,
    report: &mut Report<'_>,
) -> Option<Slice> {
    if service_of(name, slice).is_none() {
        report.info("metadata.labels", format!("{SERVICE_NAME} is missing; the slice serves no service"));
        return None;
    }
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
        endpoints.push(Endpoint {
            backend: BackendName { address, pod: pod(endpoint, name) },
            condition: condition(endpoint.conditions.as_ref()),
            local: options.node_name.is_some() && endpoint.node_name == options.node_name,
        });
    }
    Some(Slice { family, ports: ports(slice, report), endpoints })
}

impl Slice {
    /// The backends that this slice says are on this node.
    pub(super) fn local(&self) -> impl Iterator<Item = &BackendName> {
        self.endpoints.iter().filter(|endpoint| endpoint.local).map(|endpoint| &endpoint.backend)
    }
}

/// The members of a pool, of its service's slices. They call its port `port`.
pub(super) fn members<'a>(
    slices: impl Iterator<Item = &'a Slice>,
    pool: &PoolName,
    port: &str,
    report: &mut Report<'_>,
) -> BTreeMap<BackendName, Member> {
    let mut found: BTreeMap<&BackendName, (Condition, u16)> = BTreeMap::new();
    for slice in slices.filter(|slice| slice.family == pool.family) {
        let matching = slice.ports.iter().filter(|(name, protocol, _)| name == port && *protocol == pool.protocol);
        for (number, endpoint) in matching.flat_map(|(_, _, number)| slice.endpoints.iter().map(move |e| (*number, e)))
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

/// The backends of a slice, whatever else it says.
pub(super) fn backends(name: &ObjectName, slice: &EndpointSlice) -> impl Iterator<Item = BackendName> {
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
