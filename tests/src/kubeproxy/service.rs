//! The properties of a service port that kube-proxy computes before it writes any rule.

use std::net::{IpAddr, SocketAddr};

use crate::lab::{EndpointState, FIRST_OF_B, Family, Hints, Lab, NODE_NAME, Policy, Protocol, Service};

/// One port of a service in one family, for both rule sets.
pub(super) struct ServicePort {
    /// Its index among all ports of the family: part of its chains' names.
    pub(super) number: usize,
    /// `ns/name:port`, as in kube-proxy's comments and hashes.
    pub(super) name: String,
    pub(super) protocol: &'static str,
    pub(super) cluster_ip: IpAddr,
    /// The port of the ClusterIP, the ingress IP and the external IP.
    pub(super) port: u16,
    pub(super) load_balancer: Option<IpAddr>,
    pub(super) external_ip: Option<IpAddr>,
    pub(super) node_port: Option<u16>,
    pub(super) affinity_timeout_s: Option<u32>,
    pub(super) internal: Policy,
    pub(super) external: Policy,
    pub(super) source_ranges: Vec<String>,
    /// Every endpoint that is in one of the pools.
    pub(super) endpoints: Vec<SocketAddr>,
    /// Indices of `endpoints`: those for the policy Cluster.
    pub(super) cluster: Vec<usize>,
    /// Indices of `endpoints`: those for the policy Local.
    pub(super) local: Vec<usize>,
}

/// What happens to a packet if there is no endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The client gets an error.
    Reject,
    /// The client gets none.
    Drop,
}

impl ServicePort {
    /// Every port of these services.
    pub(super) fn all_of(services: &[Service], family: Family) -> Vec<Self> {
        let mut ports: Vec<Self> = services.iter().flat_map(|service| Self::of_service(service, family)).collect();
        ports.iter_mut().enumerate().for_each(|(number, port)| port.number = number);
        ports
    }

    fn of_service(service: &Service, family: Family) -> Vec<Self> {
        let listed: Vec<(usize, EndpointState)> = service.endpoints().collect();
        let cluster = usable(&meant_for_us(service, &listed), |_| true);
        let local = usable(&listed, |pod| pod < FIRST_OF_B);
        let mut pods: Vec<usize> = cluster.iter().chain(&local).copied().collect();
        pods.sort_unstable();
        pods.dedup();
        let indices = |of: &[usize]| of.iter().filter_map(|pod| pods.binary_search(pod).ok()).collect();
        let port = |port: crate::lab::ServicePort| Self {
            number: 0,
            name: format!("{}:{}", service.full_name(), port.name),
            protocol: match port.protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
            },
            cluster_ip: port.cluster_ip.ip(),
            port: port.cluster_ip.port(),
            load_balancer: port.load_balancer.map(|to| to.ip()),
            external_ip: port.external_ip.map(|to| to.ip()),
            node_port: port.node_port,
            affinity_timeout_s: service.affinity_timeout_s(),
            internal: service.internal_policy(),
            external: service.external_policy(),
            source_ranges: service.source_ranges_of(family).map(str::to_owned).collect(),
            endpoints: pods.iter().map(|pod| SocketAddr::new(family.pod(*pod), port.target_port)).collect(),
            cluster: indices(&cluster),
            local: indices(&local),
        };
        service.ports_of(family).map(port).collect()
    }

    /// Whether the port has an address for external clients.
    pub(super) fn is_external(&self) -> bool {
        self.load_balancer.is_some() || self.external_ip.is_some() || self.node_port.is_some()
    }

    pub(super) fn has_endpoints(&self) -> bool {
        !self.endpoints.is_empty()
    }

    /// The endpoints for this policy.
    pub(super) fn pool(&self, policy: Policy) -> &[usize] {
        match policy {
            Policy::Cluster => &self.cluster,
            Policy::Local => &self.local,
        }
    }

    /// The policies that need chains: an external frontend under Local needs both, because the policy does not apply to pods
    /// and the node itself.
    pub(super) fn policies(&self) -> Vec<Policy> {
        let is_used = |policy| match policy {
            Policy::Cluster => self.internal == policy || self.is_external(),
            Policy::Local => self.internal == policy || (self.is_external() && self.external == policy),
        };
        Policy::BOTH.into_iter().filter(|policy| is_used(*policy) && !self.pool(*policy).is_empty()).collect()
    }

    /// The endpoints that a chain may lead to, with their indices.
    pub(super) fn used_endpoints(&self) -> impl Iterator<Item = (usize, SocketAddr)> {
        let policies = self.policies();
        let is_used = move |index: &usize| policies.iter().any(|policy| self.pool(*policy).contains(index));
        (0..self.endpoints.len()).filter(is_used).map(|index| (index, self.endpoints[index]))
    }

    /// What to do with a packet if this policy has no endpoint; None: it has one.
    pub(super) fn refusal(&self, policy: Policy) -> Option<Refusal> {
        match (self.pool(policy).is_empty(), self.has_endpoints()) {
            (false, _) => None,
            (true, true) => Some(Refusal::Drop),
            (true, false) => Some(Refusal::Reject),
        }
    }

    /// The ingress and external IPs.
    pub(super) fn external_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.external_ip.into_iter().chain(self.load_balancer)
    }
}

/// The endpoints without ready ones that are meant for other nodes. As `CategorizeEndpoints` reads hints: by node, if all ready
/// endpoints have such hints and one is for this node; otherwise by zone, under the same condition.
fn meant_for_us(service: &Service, listed: &[(usize, EndpointState)]) -> Vec<(usize, EndpointState)> {
    type Names = fn(&Hints) -> &[String];
    let by_node: (Names, String) = (|hints| &hints.nodes, NODE_NAME.to_owned());
    let by_zone: (Names, String) = (|hints| &hints.zones, Lab::zone_of(NODE_NAME));
    for (names, ours) in [by_node, by_zone] {
        let names = |pod| service.hints(pod).map_or(&[][..], names);
        let is_ours = |pod| names(pod).contains(&ours);
        let ready = || listed.iter().filter(|(_, state)| *state == EndpointState::Ready).map(|(pod, _)| *pod);
        if ready().all(|pod| !names(pod).is_empty()) && ready().any(is_ours) {
            let is_kept = |(pod, state): &&(usize, EndpointState)| *state != EndpointState::Ready || is_ours(*pod);
            return listed.iter().filter(is_kept).copied().collect();
        }
    }
    listed.to_vec()
}

/// Those that are ready; if there are none, the terminating ones that still serve.
fn usable(listed: &[(usize, EndpointState)], is_meant: impl Fn(usize) -> bool) -> Vec<usize> {
    let of_state = |wanted| {
        let is_one = |(pod, state): &&(usize, EndpointState)| *state == wanted && is_meant(*pod);
        listed.iter().filter(is_one).map(|(pod, _)| *pod).collect::<Vec<usize>>()
    };
    match of_state(EndpointState::Ready) {
        ready if ready.is_empty() => of_state(EndpointState::Terminating),
        ready => ready,
    }
}
