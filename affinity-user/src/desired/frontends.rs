//! The frontends of a service, and what each does for clients inside and outside of the pod networks, as in kube-proxy:
//!
//! | frontend | policy | internal clients | external clients |
//! |---|---|---|---|
//! | cluster IP | internal: `Cluster` | cluster pool | the same, masqueraded |
//! | cluster IP | internal: `Local` | local pool | the same, masqueraded |
//! | all others | external: `Cluster` | cluster pool, masqueraded | the same |
//! | all others | external: `Local` | cluster pool | local pool |
//!
//! If no pod network is known, all clients of a cluster IP are internal, and all clients of an external frontend are external.
//! If a client's local pool is empty, its packets are rejected if no node has an endpoint, and dropped otherwise.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use super::{
    Family, Frontend, FrontendAddress, HealthCheck, Node, Pool, PoolName, Protocol, Reach, Report, Route,
    endpoints::{self, Listed, Slice},
    service::{Port, ServiceSpec},
};
use crate::source::ObjectName;

/// The kind of a frontend's address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    ClusterIp,
    LoadBalancer,
    ExternalIp,
    NodePort,
}

/// An address that a service asks for.
pub(super) struct Claim<'a> {
    pub(super) address: FrontendAddress,
    /// Its port, and the port's position in `spec.ports`.
    pub(super) port: &'a Port,
    pub(super) index: usize,
    kind: Kind,
}

impl Claim<'_> {
    /// Whether this is one of the addresses of a node port.
    pub(super) fn is_node_port(&self) -> bool {
        self.kind == Kind::NodePort
    }
}

/// All addresses that a service asks for. If it asks for one twice, the first counts.
pub(super) fn claims<'a>(spec: &'a ServiceSpec, node: &'a Node) -> impl Iterator<Item = Claim<'a>> {
    let external = &spec.external;
    let own = (spec.cluster_ips.iter().map(|ip| (Kind::ClusterIp, ip)))
        .chain(external.load_balancer.iter().map(|ip| (Kind::LoadBalancer, ip)))
        .chain(external.external_ips.iter().map(|ip| (Kind::ExternalIp, ip)));
    let own: Vec<(Kind, IpAddr)> = own.map(|(kind, ip)| (kind, *ip)).collect();
    spec.ports.iter().flat_map(move |(index, port)| {
        let claim = move |kind, ip, number| Claim {
            address: FrontendAddress { ip, port: number, protocol: port.protocol },
            port,
            index: *index,
            kind,
        };
        let node_port = port.node_port.filter(|_| external.on_nodes);
        let at_node = node_port.into_iter().flat_map(move |number| {
            let of_family = node.node_port_addresses.iter().filter(|ip| spec.is_of(Family::of(**ip)));
            of_family.map(move |ip| claim(Kind::NodePort, *ip, number))
        });
        own.clone().into_iter().map(move |(kind, ip)| claim(kind, ip, port.number)).chain(at_node)
    })
}

/// The decisions for a service.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) frontends: BTreeMap<FrontendAddress, Frontend>,
    pub(super) pools: BTreeMap<PoolName, Pool>,
    pub(super) ranges: BTreeSet<IpNet>,
    pub(super) health_check: Option<HealthCheck>,
}

/// Decides for a service that was given the addresses of `claims`.
pub(super) fn decide<'a>(
    name: &ObjectName,
    spec: &ServiceSpec,
    claims: &[Claim<'_>],
    slices: impl Iterator<Item = &'a Slice> + Clone,
    node: &Node,
    report: &mut Report<'_>,
) -> Outcome {
    let mut decision = Decision { name, spec, node, outcome: Outcome::default() };
    let mut ports: BTreeMap<(usize, Family), Vec<&Claim<'_>>> = BTreeMap::new();
    for claim in claims {
        ports.entry((claim.index, Family::of(claim.address.ip))).or_default().push(claim);
    }
    for ((index, family), claims) in ports {
        let Some(port) = claims.first().map(|claim| claim.port) else { continue };
        let label = decision.pool_name(port, family, Reach::Cluster).to_string();
        let called = (port.name.as_deref().unwrap_or(""), port.protocol, family);
        let listed = Listed::new(slices.clone(), called, &label, report);
        if let Some(ports) = endpoints::ports_of(slices.clone(), family).filter(|_| listed.is_empty()) {
            report.warning(format!("spec.ports[{index}]"), no_such_port(port, &ports));
        }
        let mut left_out = BTreeSet::new();
        for claim in claims {
            if claim.port.protocol == Protocol::Sctp && !listed.serves_only(claim.address.port) {
                left_out.insert(claim.address.port);
            } else {
                decision.frontend(claim, family, &listed);
            }
        }
        if let Some(port) = left_out.first() {
            let message = format!("endpoints do not serve port {port} itself, and SCTP's ports cannot be translated");
            report.warning(format!("spec.ports[{index}]"), format!("{message}; frontends with that port are ignored"));
        }
    }
    if let Some(port) = spec.external.health_check {
        let ready = endpoints::local_ready(slices);
        let families = [Family::V4, Family::V6].into_iter().filter(|family| spec.is_of(*family));
        let local = families.map(|family| (family, ready.get(&family).copied().unwrap_or(0))).collect();
        decision.outcome.health_check = Some(HealthCheck { port, local });
    }
    decision.outcome
}

/// The reason why a port has no endpoints although the service has some.
fn no_such_port(port: &Port, listed: &str) -> String {
    let wanted = match &port.name {
        Some(name) => format!("named {name:?}"),
        None => "without a name".to_owned(),
    };
    format!(
        "has no endpoints: no EndpointSlice of this service has a {} port {wanted}, like this port; the slices have {listed}",
        port.protocol.name()
    )
}

struct Decision<'a> {
    name: &'a ObjectName,
    spec: &'a ServiceSpec,
    node: &'a Node,
    outcome: Outcome,
}

impl Decision<'_> {
    fn frontend(&mut self, claim: &Claim<'_>, family: Family, listed: &Listed<'_>) {
        if self.outcome.frontends.contains_key(&claim.address) {
            return;
        }
        let frontend = match claim.kind {
            Kind::ClusterIp => self.cluster_ip(claim.port, family, listed),
            Kind::LoadBalancer | Kind::ExternalIp | Kind::NodePort => self.external(claim, family, listed),
        };
        if frontend.ranges {
            self.outcome.ranges.clone_from(&self.spec.external.ranges);
        }
        self.outcome.frontends.insert(claim.address, frontend);
    }

    fn cluster_ip(&mut self, port: &Port, family: Family, listed: &Listed<'_>) -> Frontend {
        let reach = if self.spec.internal_local { Reach::Local } else { Reach::Cluster };
        let internal = self.route(port, family, reach, listed);
        let external = self.node.knows_pods(family).then(|| Route { masquerade: true, ..internal.clone() });
        Frontend { internal, external, ranges: false }
    }

    fn external(&mut self, claim: &Claim<'_>, family: Family, listed: &Listed<'_>) -> Frontend {
        let cluster = self.route(claim.port, family, Reach::Cluster, listed);
        let ranges = claim.kind == Kind::LoadBalancer && self.spec.external.restricted.contains(&family);
        if self.spec.external.local {
            let external = Some(self.route(claim.port, family, Reach::Local, listed));
            Frontend { internal: cluster, external, ranges }
        } else {
            Frontend { internal: Route { masquerade: true, ..cluster }, external: None, ranges }
        }
    }

    fn pool_name(&self, port: &Port, family: Family, reach: Reach) -> PoolName {
        PoolName { service: self.name.clone(), port: port.label(), protocol: port.protocol, family, reach }
    }

    /// The route to a pool. Decides the pool's members when it is first used.
    fn route(&mut self, port: &Port, family: Family, reach: Reach, listed: &Listed<'_>) -> Route {
        let name = self.pool_name(port, family, reach);
        let Self { spec, node, outcome, .. } = self;
        let pool = outcome.pools.entry(name.clone()).or_insert_with(|| {
            let members = match reach {
                Reach::Cluster => listed.cluster(node),
                Reach::Local => listed.local(),
            };
            spec.pool(family, members)
        });
        let is_empty = pool.members.values().all(|member| !member.ready);
        Route { pool: Arc::new(name), masquerade: false, drop_if_no_local: is_empty && listed.has_any() }
    }
}
