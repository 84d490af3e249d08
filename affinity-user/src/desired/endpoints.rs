//! EndpointSlices -> the members of a pool.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use affinity_common::abi::Name;

use super::{BackendName, Family, Member, Node, Protocol, Report};
use crate::source::{
    ObjectName,
    api::{Endpoint as ApiEndpoint, EndpointConditions, EndpointSlice, label::SERVICE_NAME},
    parse_address,
};

/// The condition of an endpoint; better ones first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Condition {
    Ready,
    /// Terminating, but still able to serve: used if no endpoint is ready.
    ServingTerminating,
    /// Takes no new connection.
    Unready,
}

/// An endpoint of one slice.
#[derive(Clone)]
struct Endpoint {
    backend: BackendName,
    condition: Condition,
    local: bool,
    hints: Hints,
}

/// The zones and nodes that an endpoint is meant for; empty: no hint.
#[derive(Clone, Default)]
struct Hints {
    nodes: Vec<String>,
    zones: Vec<String>,
}

/// The name, protocol and number of a port.
type SlicePort = (String, Protocol, u16);

/// A validated slice. Its ports apply to all of its endpoints.
#[derive(Clone)]
pub(super) struct Slice {
    family: Family,
    ports: Vec<SlicePort>,
    endpoints: Vec<Endpoint>,
}

/// The service of a slice; `None` if its label is missing.
pub(super) fn service_of(name: &ObjectName, slice: &EndpointSlice) -> Option<ObjectName> {
    let service = slice.metadata.labels.as_ref()?.get(SERVICE_NAME)?;
    Some(ObjectName::new(&name.namespace, service))
}

/// Reads a slice; `None` if nothing in it can be used.
pub(super) fn read(name: &ObjectName, slice: &EndpointSlice, node: &Node, report: &mut Report<'_>) -> Option<Slice> {
    if service_of(name, slice).is_none() {
        report.info("metadata.labels", format!("{SERVICE_NAME} is missing; the slice is ignored"));
        return None;
    }
    let family = match slice.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        other => {
            report.warning("addressType", format!("{other:?} is not one of IPv4, IPv6; the slice is ignored"));
            return None;
        }
    };
    let mut endpoints = Vec::new();
    for (index, endpoint) in slice.endpoints.iter().flatten().enumerate() {
        let Some(address) = address(endpoint, family, index, report) else { continue };
        endpoints.push(Endpoint {
            backend: BackendName { address, pod: pod(endpoint, name).into() },
            condition: condition(endpoint.conditions.as_ref()),
            local: node.name.is_some() && endpoint.node_name == node.name,
            hints: hints(endpoint),
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

/// Distinguishes several servers at one address. The identity of an endpoint is its pod, or its address if it has no pod:
/// whatever ports slices list for it, it is one backend. But if slices of a service give different numbers for one port of such
/// an address, there are several servers. The first one, ordered by ports, stays the backend of the address; the others are
/// named by address and port. `None`: there is nothing to distinguish.
pub(super) fn told_apart(slices: &[&Slice]) -> Option<Vec<Slice>> {
    let mut listed: BTreeMap<IpAddr, BTreeSet<&[SlicePort]>> = BTreeMap::new();
    for slice in slices {
        for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.backend.pod.is_empty()) {
            listed.entry(endpoint.backend.address).or_default().insert(&slice.ports);
        }
    }
    let mut names = BTreeMap::new();
    for (address, lists) in listed.into_iter().filter(|(_, lists)| lists.len() > 1) {
        let mut servers: Vec<Vec<&[SlicePort]>> = Vec::new();
        for ports in lists {
            match servers.iter_mut().find(|server| server.iter().all(|other| agree(other, ports))) {
                Some(server) => server.push(ports),
                None => servers.push(vec![ports]),
            }
        }
        for server in servers.iter().skip(1) {
            names.extend(server.iter().map(|ports| ((address, *ports), server_name(address, server[0]))));
        }
    }
    let renamed = |slice: &Slice| {
        let mut renamed = slice.clone();
        for endpoint in renamed.endpoints.iter_mut().filter(|endpoint| endpoint.backend.pod.is_empty()) {
            if let Some(name) = names.get(&(endpoint.backend.address, &*slice.ports)) {
                endpoint.backend.pod = name.as_str().into();
            }
        }
        renamed
    };
    (!names.is_empty()).then(|| slices.iter().map(|slice| renamed(slice)).collect())
}

/// Whether two lists of ports can be those of one server.
fn agree(a: &[SlicePort], b: &[SlicePort]) -> bool {
    let differs = |(a, b): (&SlicePort, &SlicePort)| (&a.0, a.1) == (&b.0, b.1) && a.2 != b.2;
    !a.iter().any(|a| b.iter().any(|b| differs((a, b))))
}

/// `192.0.2.1:8081,9101`.
fn server_name(address: IpAddr, ports: &[SlicePort]) -> String {
    let numbers: BTreeSet<u16> = ports.iter().map(|(_, _, number)| *number).collect();
    let mut numbers = numbers.into_iter();
    let first = SocketAddr::new(address, numbers.next().unwrap_or(0)).to_string();
    let name = numbers.fold(first, |name, number| format!("{name},{number}"));
    // Shortened to fit the `names` map, as a pod's name is.
    Name::new(&name).as_str().to_owned()
}

/// The endpoints that a service's slices list for one of its ports, in one family.
pub(super) struct Listed<'a> {
    endpoints: BTreeMap<&'a BackendName, Candidate<'a>>,
}

/// An endpoint, with the values of its best slice.
struct Candidate<'a> {
    condition: Condition,
    port: u16,
    local: bool,
    hints: &'a Hints,
}

/// Which hints select endpoints. Hints count only if all ready endpoints have them.
enum Topology {
    None,
    SameNode,
    SameZone,
}

impl<'a> Listed<'a> {
    /// From slices that list a port with the name `port`.
    pub(super) fn new(
        slices: impl Iterator<Item = &'a Slice>,
        (port, protocol, family): (&str, Protocol, Family),
        label: &str,
        report: &mut Report<'_>,
    ) -> Self {
        let mut endpoints: BTreeMap<&BackendName, Candidate<'_>> = BTreeMap::new();
        for slice in slices.filter(|slice| slice.family == family) {
            let matching = slice.ports.iter().filter(|(name, of, _)| name == port && *of == protocol);
            for (number, endpoint) in
                matching.flat_map(|(_, _, number)| slice.endpoints.iter().map(move |e| (*number, e)))
            {
                let Endpoint { backend, condition, local, hints } = endpoint;
                let candidate = Candidate { condition: *condition, port: number, local: *local, hints };
                let best = endpoints.entry(backend).or_insert(Candidate { ..candidate });
                let is_better = (candidate.condition, candidate.port) < (best.condition, best.port);
                if best.port != number {
                    let (address, kept) = (backend.address, if is_better { number } else { best.port });
                    let ports = format!("{} and {number}", best.port);
                    report.warning(
                        String::new(),
                        format!("endpoint {address} has two ports for {label}, {ports}; {kept} is used"),
                    );
                }
                if is_better {
                    *best = Candidate { local: best.local, ..candidate };
                }
                best.local |= local;
            }
        }
        Self { endpoints }
    }

    /// Whether slices list no endpoint for the port.
    pub(super) fn is_empty(&self) -> bool {
        self.endpoints.is_empty()
    }

    /// Whether any endpoint on any node takes connections.
    pub(super) fn has_any(&self) -> bool {
        self.endpoints.values().any(|endpoint| endpoint.condition != Condition::Unready)
    }

    /// Whether every endpoint that takes connections serves this same port number.
    pub(super) fn serves_only(&self, port: u16) -> bool {
        self.endpoints.values().all(|endpoint| endpoint.condition == Condition::Unready || endpoint.port == port)
    }

    /// The members of the cluster pool. Ready endpoints that are meant for this node take connections; if there are none, those
    /// that still serve do. The others drain.
    pub(super) fn cluster(&self, node: &Node) -> BTreeMap<BackendName, Member> {
        let topology = self.topology(node);
        self.members(|endpoint| match topology {
            _ if endpoint.condition != Condition::Ready => true,
            Topology::None => true,
            Topology::SameNode => endpoint.hints.is_for_node(node),
            Topology::SameZone => endpoint.hints.is_for_zone(node),
        })
    }

    /// The members of this node's pool. Its ready endpoints take connections; if there are none, its endpoints that still serve
    /// do. The others drain.
    pub(super) fn local(&self) -> BTreeMap<BackendName, Member> {
        self.members(|endpoint| endpoint.local)
    }

    fn members(&self, is_eligible: impl Fn(&Candidate<'_>) -> bool) -> BTreeMap<BackendName, Member> {
        let eligible = self.endpoints.values().filter(|endpoint| is_eligible(endpoint));
        let usable = eligible.map(|endpoint| endpoint.condition).min().filter(|best| *best != Condition::Unready);
        let member = |endpoint: &Candidate<'_>| Member {
            port: endpoint.port,
            ready: Some(endpoint.condition) == usable && is_eligible(endpoint),
        };
        self.endpoints.iter().map(|(backend, endpoint)| ((*backend).clone(), member(endpoint))).collect()
    }

    /// As in kube-proxy: hints count if every ready endpoint has one of their kind, and at least one of them is for us.
    fn topology(&self, node: &Node) -> Topology {
        let ready = || self.endpoints.values().filter(|endpoint| endpoint.condition == Condition::Ready);
        let all_have = |of: fn(&Hints) -> &[String]| ready().all(|endpoint| !of(endpoint.hints).is_empty());
        if all_have(|hints| &hints.nodes) && ready().any(|endpoint| endpoint.hints.is_for_node(node)) {
            Topology::SameNode
        } else if all_have(|hints| &hints.zones) && ready().any(|endpoint| endpoint.hints.is_for_zone(node)) {
            Topology::SameZone
        } else {
            Topology::None
        }
    }
}

impl Hints {
    fn is_for_node(&self, node: &Node) -> bool {
        node.name.as_ref().is_some_and(|name| self.nodes.contains(name))
    }

    fn is_for_zone(&self, node: &Node) -> bool {
        node.zone.as_ref().is_some_and(|zone| self.zones.contains(zone))
    }
}

/// The ports, as text, of a family's slices that have an endpoint that takes connections; `None` if there is no such slice.
pub(super) fn ports_of<'a>(slices: impl Iterator<Item = &'a Slice>, family: Family) -> Option<String> {
    let serves = |slice: &&Slice| slice.endpoints.iter().any(|endpoint| endpoint.condition != Condition::Unready);
    let serving: Vec<&Slice> = slices.filter(|slice| slice.family == family).filter(serves).collect();
    let port = |(name, protocol, number): &SlicePort| match name.as_str() {
        "" => format!("{number}/{} without a name", protocol.name()),
        name => format!("{name:?} ({number}/{})", protocol.name()),
    };
    let ports: BTreeSet<String> = serving.iter().flat_map(|slice| slice.ports.iter().map(port)).collect();
    let listed = if ports.is_empty() { "no port".to_owned() } else { ports.into_iter().collect::<Vec<_>>().join(", ") };
    (!serving.is_empty()).then_some(listed)
}

/// The number of ready endpoints on this node, by family. An address counts once, whatever it serves.
pub(super) fn local_ready<'a>(slices: impl Iterator<Item = &'a Slice>) -> BTreeMap<Family, usize> {
    let mut addresses: BTreeMap<Family, BTreeSet<IpAddr>> = BTreeMap::new();
    for slice in slices.filter(|slice| !slice.ports.is_empty()) {
        let ready = slice.endpoints.iter().filter(|endpoint| endpoint.local && endpoint.condition == Condition::Ready);
        addresses.entry(slice.family).or_default().extend(ready.map(|endpoint| endpoint.backend.address));
    }
    addresses.into_iter().map(|(family, addresses)| (family, addresses.len())).collect()
}

/// The backends that a slice lists, and whether each is terminating. Independent of everything else in the slice.
pub(super) fn listed(name: &ObjectName, slice: &EndpointSlice) -> impl Iterator<Item = (BackendName, bool)> {
    slice.endpoints.iter().flatten().filter_map(|endpoint| {
        let address = parse_address(endpoint.addresses.first()?)?;
        let terminating = endpoint.conditions.as_ref().and_then(|conditions| conditions.terminating);
        Some((BackendName { address, pod: pod(endpoint, name).into() }, terminating == Some(true)))
    })
}

/// The first address: all addresses of an endpoint are equivalent, and consumers use only the first.
fn address(endpoint: &ApiEndpoint, family: Family, index: usize, report: &mut Report<'_>) -> Option<IpAddr> {
    let field = format!("endpoints[{index}].addresses[0]");
    let Some(text) = endpoint.addresses.first() else {
        report.error(field, "missing; the endpoint is ignored");
        return None;
    };
    match parse_address(text) {
        Some(ip) if Family::of(ip) != family => report.error(field, format!("{ip} is not of the slice's addressType")),
        Some(ip) if !is_endpoint(ip) => report.error(field, format!("{ip} cannot be the address of an endpoint")),
        Some(ip) => return Some(ip),
        None => report.error(field, format!("{text:?} is not an IP address; the endpoint is ignored")),
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
    // Shortened to fit the `names` map: the name that is read back from there must be equal.
    Name::new(&pod).as_str().to_owned()
}

fn hints(endpoint: &ApiEndpoint) -> Hints {
    let Some(hints) = &endpoint.hints else { return Hints::default() };
    Hints {
        nodes: hints.for_nodes.iter().flatten().map(|node| node.name.clone()).collect(),
        zones: hints.for_zones.iter().flatten().map(|zone| zone.name.clone()).collect(),
    }
}

/// As in kube-proxy: missing values mean ready, serving, and not terminating. (With publishNotReadyAddresses the slices say
/// ready, whatever the pod's state is.)
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

fn ports(slice: &EndpointSlice, report: &mut Report<'_>) -> Vec<SlicePort> {
    let mut ports = Vec::new();
    for (index, port) in slice.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("ports[{index}].{name}");
        let protocol = match port.protocol.as_deref() {
            None | Some("TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            Some(other) => {
                report.error(field("protocol"), format!("{other:?} is not one of TCP, UDP, SCTP; the port is ignored"));
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
