//! Which services are ours, and which are left to another service proxy. Reads and validates the parts of a Service that are
//! used.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    str::FromStr,
};

use affinity_common::abi::{SECOND_NS, Selection};
use ipnet::IpNet;

use super::{Affinity, BackendName, Family, Member, Options, Pool, Protocol, Report, Scope, exposure};
use crate::{
    hash::hash32,
    source::{
        ObjectName,
        annotations::{self, Annotations, PREFIX, is_dns_label},
        api::{Service, ServicePort, ServiceSpec as ApiSpec, label},
        parse_address,
    },
};

/// `timeoutSeconds` if the service gives none.
const TIMEOUT_DEFAULT_S: i32 = 10_800;
/// The largest `timeoutSeconds`.
const TIMEOUT_MAX_S: i32 = 86_400;

/// A port of a service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Port {
    pub(super) name: Option<String>,
    pub(super) number: u16,
    pub(super) protocol: Protocol,
    pub(super) node_port: Option<u16>,
}

impl Port {
    /// Its name, or its number if it has no name.
    pub(super) fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.number.to_string())
    }
}

/// A service that has frontends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct ServiceSpec {
    pub(super) cluster_ips: Vec<IpAddr>,
    /// The addresses and policies for external clients.
    pub(super) external: Exposure,
    /// `internalTrafficPolicy: Local`.
    pub(super) internal_local: bool,
    /// By position in `spec.ports`.
    pub(super) ports: Vec<(usize, Port)>,
    pub(super) scope: Scope,
    pub(super) affinity: Option<Affinity>,
    pub(super) annotations: Annotations,
}

/// How a service is reached from outside of the cluster, in addition to its node ports.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Exposure {
    /// Whether its ports are on the node's addresses.
    pub(super) on_nodes: bool,
    /// Addresses of its load balancer that the nodes serve.
    pub(super) load_balancer: Vec<IpAddr>,
    /// Addresses that are routed to the nodes by other means.
    pub(super) external_ips: Vec<IpAddr>,
    /// `externalTrafficPolicy: Local`.
    pub(super) local: bool,
    /// The families in which only clients in the ranges may use the load balancer.
    pub(super) restricted: BTreeSet<Family>,
    /// These ranges.
    pub(super) ranges: BTreeSet<IpNet>,
    /// The port at which load balancers ask whether this node has endpoints.
    pub(super) health_check: Option<u16>,
}

impl ServiceSpec {
    /// Whether it has a cluster IP of a family.
    pub(super) fn is_of(&self, family: Family) -> bool {
        self.cluster_ips.iter().any(|ip| Family::of(*ip) == family)
    }

    /// The prefix length of a client key.
    pub(super) fn prefix(&self, family: Family) -> u8 {
        match family {
            Family::V4 => self.annotations.prefix_v4.unwrap_or(32),
            Family::V6 => self.annotations.prefix_v6.unwrap_or(128),
        }
    }

    /// A pool of this service.
    pub(super) fn pool(&self, family: Family, members: BTreeMap<BackendName, Member>) -> Pool {
        Pool {
            scope: self.scope.clone(),
            affinity: self.affinity,
            select: self.annotations.select,
            seed: hash32(&self.scope.name().to_string()),
            prefix: self.prefix(family),
            members,
        }
    }
}

/// Reads a service; `None` if it has no frontends: headless, `ExternalName`, or without a usable address.
pub(super) fn read(name: &ObjectName, service: &Service, report: &mut Report<'_>) -> Option<ServiceSpec> {
    let Some(spec) = &service.spec else {
        report.error("spec", "missing");
        return None;
    };
    if spec.type_.as_deref() == Some("ExternalName") || is_headless(spec) {
        return None;
    }
    if !is_dns_label(&name.name) || !is_dns_label(&name.namespace) {
        report.error("metadata.name", "not a DNS label (a-z, 0-9, '-', at most 63)");
        return None;
    }
    let cluster_ips = addresses(spec, report);
    let external = exposure::read(spec, service.status.as_ref(), &cluster_ips, report);
    let ports = ports(spec, report);
    let none = BTreeMap::new();
    let (annotations, affinity) = affinity(spec, service.metadata.annotations.as_ref().unwrap_or(&none), report);
    let scope = match &annotations.group {
        Some(group) => Scope::Group(ObjectName::new(&name.namespace, group)),
        None => Scope::Service(name.clone()),
    };
    let internal_local = exposure::is_local(spec.internal_traffic_policy.as_deref(), "internalTrafficPolicy", report);
    Some(ServiceSpec { cluster_ips, external, internal_local, ports, scope, affinity, annotations })
}

fn is_headless(spec: &ApiSpec) -> bool {
    spec.cluster_ip.as_deref() == Some("None")
        || spec.cluster_ips.as_ref().is_some_and(|ips| ips.first().is_some_and(|ip| ip == "None"))
}

fn addresses(spec: &ApiSpec, report: &mut Report<'_>) -> Vec<IpAddr> {
    let single = spec.cluster_ip.iter().filter(|ip| !ip.is_empty());
    let listed = match &spec.cluster_ips {
        Some(ips) if !ips.is_empty() => {
            let is_same =
                |ip: &str| ip == ips[0] || parse_address(ip).is_some_and(|ip| Some(ip) == parse_address(&ips[0]));
            if let Some(other) = single.clone().find(|ip| !is_same(ip)) {
                let message = format!("{other:?} differs from spec.clusterIPs[0], {:?}; that one is used", ips[0]);
                report.warning("spec.clusterIP", message);
            }
            ips.iter().enumerate().map(|(index, ip)| (format!("spec.clusterIPs[{index}]"), ip)).collect::<Vec<_>>()
        }
        _ => single.map(|ip| ("spec.clusterIP".to_owned(), ip)).collect(),
    };
    if listed.is_empty() {
        report.error("spec.clusterIP", "missing: set one, because affinity does not assign addresses");
    }
    parse_addresses(listed, report)
}

/// The usable ones among addresses, each with its field.
pub(super) fn parse_addresses<'a>(
    listed: impl IntoIterator<Item = (String, &'a String)>,
    report: &mut Report<'_>,
) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for (field, text) in listed {
        match parse_address(text) {
            Some(ip) if !is_frontend(ip) => report.error(field, format!("{ip} cannot be the address of a service")),
            Some(ip) if addresses.contains(&ip) => report.warning(field, format!("{ip} is listed twice")),
            Some(ip) => addresses.push(ip),
            None => report.error(field, format!("{text:?} is not an IP address")),
        }
    }
    addresses
}

fn is_frontend(ip: IpAddr) -> bool {
    !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.to_canonical() != ip)
}

fn ports(spec: &ApiSpec, report: &mut Report<'_>) -> Vec<(usize, Port)> {
    let all = spec.ports.as_deref().unwrap_or_default();
    if all.is_empty() {
        report.error("spec.ports", "missing: the service has no port");
    }
    let mut ports: Vec<(usize, Port)> = Vec::new();
    for (index, api) in all.iter().enumerate() {
        let Some(port) = port(index, api, exposure::has_node_ports(spec), report) else { continue };
        if api.name.is_none() && all.len() > 1 {
            report.warning(format!("spec.ports[{index}].name"), "missing: a service with several ports must name them");
        }
        let twin = |other: &Port| {
            let same_node_port = other.node_port.is_some() && other.node_port == port.node_port;
            let same = other.number == port.number || other.label() == port.label() || same_node_port;
            other.protocol == port.protocol && same
        };
        match ports.iter().find(|(_, other)| twin(other)) {
            Some((first, _)) => report.error(
                format!("spec.ports[{index}]"),
                format!("has the same name, number or node port as spec.ports[{first}]; it is ignored"),
            ),
            None => ports.push((index, port)),
        }
    }
    ports
}

fn port(index: usize, port: &ServicePort, on_nodes: bool, report: &mut Report<'_>) -> Option<Port> {
    let field = |name: &str| format!("spec.ports[{index}].{name}");
    let protocol = match port.protocol.as_deref() {
        None | Some("TCP") => Protocol::Tcp,
        Some("UDP") => Protocol::Udp,
        Some("SCTP") => Protocol::Sctp,
        Some(other) => {
            report.error(field("protocol"), format!("{other:?} is not one of TCP, UDP, SCTP; the port is ignored"));
            return None;
        }
    };
    let number = u16::try_from(port.port).ok().filter(|number| *number > 0);
    if number.is_none() {
        report.error(field("port"), format!("{} is not a port from 1 to 65535; the port is ignored", port.port));
    }
    let name = port.name.clone().filter(|name| !name.is_empty());
    if name.as_ref().is_some_and(|name| !is_dns_label(name)) {
        report.error(field("name"), "not a DNS label (a-z, 0-9, '-', at most 63); the port is ignored");
        return None;
    }
    let node_port = port.node_port.filter(|number| on_nodes && *number != 0);
    let given = node_port.map(|number| u16::try_from(number).ok().filter(|number| *number > 0).ok_or(number));
    if let Some(Err(number)) = given {
        report.error(field("nodePort"), format!("{number} is not a port from 1 to 65535; there is no node port"));
    }
    Some(Port { name, number: number?, protocol, node_port: given.and_then(Result::ok) })
}

/// The annotations that have an effect, and how clients are pinned.
fn affinity(
    spec: &ApiSpec,
    annotations: &BTreeMap<String, String>,
    report: &mut Report<'_>,
) -> (Annotations, Option<Affinity>) {
    let (parsed, unknown) = annotations::parse(annotations);
    let field = |key: &str| format!("metadata.annotations[{key}]");
    for annotations::Unknown { key, message } in &unknown {
        report.warning(field(key), message);
    }
    match spec.session_affinity.as_deref() {
        Some("ClientIP") => {
            let timeout_ns = parsed.timeout_ns.unwrap_or_else(|| timeout_s(spec, report) * SECOND_NS);
            let affinity = Affinity { timer: parsed.timer, timeout_ns };
            return (parsed, Some(affinity));
        }
        None | Some("None" | "") => {}
        Some(other) => {
            let message = format!("{other:?} is not one of ClientIP, None; None is used");
            report.error("spec.sessionAffinity", message);
        }
    }
    for key in annotations.keys().filter(|key| key.starts_with(PREFIX)) {
        if unknown.iter().all(|unknown| unknown.key != *key) {
            report.warning(field(key), "has no effect without spec.sessionAffinity: ClientIP");
        }
    }
    (Annotations { select: Selection::Random, ..Annotations::default() }, None)
}

fn timeout_s(spec: &ApiSpec, report: &mut Report<'_>) -> u64 {
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let given = config.and_then(|config| config.timeout_seconds).unwrap_or(TIMEOUT_DEFAULT_S);
    let timeout_s = if (1..=TIMEOUT_MAX_S).contains(&given) {
        given
    } else {
        let message = format!(
            "{given} is not within 1 to {TIMEOUT_MAX_S}; {TIMEOUT_DEFAULT_S} is used (for longer: annotation {PREFIX}timeout)"
        );
        report.warning("spec.sessionAffinityConfig.clientIP.timeoutSeconds", message);
        TIMEOUT_DEFAULT_S
    };
    u64::from(timeout_s.unsigned_abs())
}

/// Our default name.
pub const DEFAULT_PROXY_NAME: &str = "affinity.dev";

/// Which services are ours. Services labelled for another proxy never are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Services {
    /// All: instead of another service proxy.
    #[default]
    All,
    /// Services with `sessionAffinity: ClientIP`, and services labelled for us.
    Affinity,
    /// Services labelled for us.
    Labelled,
}

impl Services {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Affinity, Self::Labelled, Self::All];

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Affinity => "affinity",
            Self::Labelled => "labelled",
        }
    }
}

impl fmt::Display for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that selects no services.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not one of affinity, labelled, all")]
pub struct UnknownServices(String);

impl FromStr for Services {
    type Err = UnknownServices;

    fn from_str(name: &str) -> Result<Self, UnknownServices> {
        Self::ALL.into_iter().find(|services| services.name() == name).ok_or_else(|| UnknownServices(name.to_owned()))
    }
}

/// Whether a service is ours.
pub(super) fn is_ours(service: &Service, options: &Options) -> bool {
    let value = |name| service.metadata.labels.as_ref().and_then(|labels| labels.get(name));
    if value(label::HEADLESS).is_some() {
        return false;
    }
    let affinity = service.spec.as_ref().and_then(|spec| spec.session_affinity.as_deref());
    match (value(label::PROXY_NAME), options.services) {
        (Some(name), _) => *name == options.proxy_name,
        (None, Services::All) => true,
        (None, Services::Affinity) => affinity == Some("ClientIP"),
        (None, Services::Labelled) => false,
    }
}
