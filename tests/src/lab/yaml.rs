//! Services as users write them: Kubernetes YAML, a Service and one EndpointSlice for each family.

mod exposure;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;

use super::address::{FIRST_OF_B, Family, Protocol};
use super::{NODE_B_NAME, NODE_NAME};
use exposure::{Exposure, LoadBalancer};
pub use exposure::{Frontend, Policy};

/// The name of the pod with this index.
pub fn pod_name(index: usize) -> String {
    format!("pod-{index}")
}

/// The index of the pod with this name; None: it is not a pod of a lab.
pub fn pod_index(name: &str) -> Option<usize> {
    name.strip_prefix("pod-")?.parse().ok()
}

/// The name of the node that the pod with this index is on.
pub fn node_of(index: usize) -> &'static str {
    if index < FIRST_OF_B { NODE_NAME } else { NODE_B_NAME }
}

/// The state of an endpoint in an EndpointSlice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointState {
    /// It serves.
    Ready,
    /// It runs, but must not get traffic.
    NotReady,
    /// It is being shut down and still serves.
    Terminating,
}

/// One port of a service.
#[derive(Clone, Debug)]
struct Port {
    name: String,
    protocol: Protocol,
    port: u16,
    target_port: u16,
    node_port: Option<u16>,
}

/// An endpoint, by the index of its pod.
#[derive(Clone, Debug)]
struct Endpoint {
    state: EndpointState,
    hints: Hints,
}

/// The hints of an endpoint in an EndpointSlice; empty: none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Names of nodes.
    pub nodes: Vec<String>,
    /// Names of zones.
    pub zones: Vec<String>,
}

impl Hints {
    fn yaml(&self) -> String {
        let list = |field: &str, names: &[String]| {
            let names: Vec<_> = names.iter().map(|name| format!("{{name: {name}}}")).collect();
            (!names.is_empty()).then(|| format!("{field}: [{}]", names.join(", ")))
        };
        let said: Vec<_> =
            [list("forNodes", &self.nodes), list("forZones", &self.zones)].into_iter().flatten().collect();
        if said.is_empty() { String::new() } else { format!("    hints: {{{}}}\n", said.join(", ")) }
    }
}

/// One port of a service in one family, as a client and a proxy see it.
#[derive(Clone, Debug)]
pub struct ServicePort {
    /// Its name.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// The service's address.
    pub cluster_ip: SocketAddr,
    /// The ingress IPs that the node takes packets for.
    pub load_balancer: Option<SocketAddr>,
    /// The external IP.
    pub external_ip: Option<SocketAddr>,
    /// The port on the node's addresses.
    pub node_port: Option<u16>,
    /// The pods' port.
    pub target_port: u16,
}

/// A Service of the namespace `default` with both families, and its endpoints among a lab's pods.
///
/// ```
/// use affinity_tests::lab::Service;
/// let web = Service::new("web", 10).tcp("http", 80, 8080).client_ip_for(3600).on(0..3);
/// assert!(web.to_yaml().contains("timeoutSeconds: 3600"));
/// assert!(!web.without_affinity().to_yaml().contains("timeoutSeconds"));
/// ```
#[derive(Clone, Debug)]
pub struct Service {
    name: String,
    number: u16,
    ports: Vec<Port>,
    client_ip: bool,
    timeout_s: Option<u32>,
    annotations: BTreeMap<String, String>,
    endpoints: BTreeMap<usize, Endpoint>,
    exposure: Exposure,
}

impl Service {
    /// A service without ports, endpoints or affinity; `number` is the last part of its ClusterIPs.
    pub fn new(name: &str, number: u16) -> Self {
        Self {
            name: name.to_owned(),
            number,
            ports: Vec::new(),
            client_ip: false,
            timeout_s: None,
            annotations: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            exposure: Exposure::default(),
        }
    }

    /// With a TCP port, served by the pods on `target_port`.
    pub fn tcp(self, name: &str, port: u16, target_port: u16) -> Self {
        self.port(Protocol::Tcp, name, port, target_port)
    }

    /// With a UDP port, served by the pods on `target_port`.
    pub fn udp(self, name: &str, port: u16, target_port: u16) -> Self {
        self.port(Protocol::Udp, name, port, target_port)
    }

    fn port(mut self, protocol: Protocol, name: &str, port: u16, target_port: u16) -> Self {
        self.ports.push(Port { name: name.to_owned(), protocol, port, target_port, node_port: None });
        self
    }

    /// With node ports, as `type: NodePort`: this one for the first port, the next one for the next.
    pub fn node_ports(mut self, first: u16) -> Self {
        self.exposure.has_node_ports = true;
        for (port, node_port) in self.ports.iter_mut().zip(first..) {
            port.node_port = Some(node_port);
        }
        self
    }

    /// With a load balancer. The node handles packets for its ingress IPs; `ipMode` is not set.
    pub fn load_balancer(mut self) -> Self {
        self.exposure.load_balancer = Some(LoadBalancer::Unsaid);
        self
    }

    /// The same, with `ipMode: VIP`.
    pub fn load_balancer_vip(mut self) -> Self {
        self.exposure.load_balancer = Some(LoadBalancer::Vip);
        self
    }

    /// With a load balancer that must get the packets for its ingress IPs itself: `ipMode: Proxy`.
    pub fn load_balancer_proxy(mut self) -> Self {
        self.exposure.load_balancer = Some(LoadBalancer::Proxy);
        self
    }

    /// With an external IP for each family.
    pub fn external_ips(mut self) -> Self {
        self.exposure.has_external_ip = true;
        self
    }

    /// With this `internalTrafficPolicy`.
    pub fn internal(mut self, policy: Policy) -> Self {
        self.exposure.internal = policy;
        self
    }

    /// With this `externalTrafficPolicy`.
    pub fn external(mut self, policy: Policy) -> Self {
        self.exposure.external = policy;
        self
    }

    /// With `loadBalancerSourceRanges`.
    pub fn source_ranges(mut self, ranges: &[&str]) -> Self {
        self.exposure.source_ranges = ranges.iter().map(|range| range.to_string()).collect();
        self
    }

    /// With `healthCheckNodePort`.
    pub fn health_check(mut self, port: u16) -> Self {
        self.exposure.health_check_node_port = Some(port);
        self
    }

    /// With `sessionAffinity: ClientIP`, without a timeout.
    pub fn client_ip(self) -> Self {
        Self { client_ip: true, timeout_s: None, ..self }
    }

    /// With `sessionAffinity: ClientIP` and this timeout.
    pub fn client_ip_for(self, timeout_s: u32) -> Self {
        Self { client_ip: true, timeout_s: Some(timeout_s), ..self }
    }

    /// With `sessionAffinity: None`.
    pub fn without_affinity(self) -> Self {
        Self { client_ip: false, timeout_s: None, ..self }
    }

    /// With the annotation `affinity.dev/KEY: VALUE`.
    pub fn annotated(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Whether each client has one backend that it would be pinned to.
    pub(super) fn is_consistent(&self) -> bool {
        self.annotations.get("select").is_some_and(|policy| policy == "consistent")
    }

    /// With these pods, all ready, as its only endpoints.
    pub fn on(self, pods: impl IntoIterator<Item = usize>) -> Self {
        let ready = Endpoint { state: EndpointState::Ready, hints: Hints::default() };
        Self { endpoints: pods.into_iter().map(|pod| (pod, ready.clone())).collect(), ..self }
    }

    /// With this pod as one of its endpoints, in this state.
    pub fn endpoint(mut self, pod: usize, state: EndpointState) -> Self {
        self.endpoints.insert(pod, Endpoint { state, hints: Hints::default() });
        self
    }

    /// With a hint that the endpoint on this pod is for the node with this name.
    ///
    /// # Panics
    /// When the pod is no endpoint.
    pub fn hinted_for_node(self, pod: usize, node: &str) -> Self {
        self.hinted(pod, |hints| hints.nodes.push(node.to_owned()))
    }

    /// With a hint that the endpoint on this pod is for nodes in this zone.
    ///
    /// # Panics
    /// When the pod is no endpoint.
    pub fn hinted_for_zone(self, pod: usize, zone: &str) -> Self {
        self.hinted(pod, |hints| hints.zones.push(zone.to_owned()))
    }

    fn hinted(mut self, pod: usize, hint: impl FnOnce(&mut Hints)) -> Self {
        hint(&mut self.endpoints.get_mut(&pod).expect("an endpoint").hints);
        self
    }

    /// Without this pod among its endpoints.
    pub fn without(mut self, pod: usize) -> Self {
        self.endpoints.remove(&pod);
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its name with its namespace, as `--service` takes it.
    pub fn full_name(&self) -> String {
        format!("default/{}", self.name)
    }

    /// The timeout of its pins; None: it has no affinity.
    pub fn affinity_timeout_s(&self) -> Option<u32> {
        self.client_ip.then_some(self.timeout_s.unwrap_or(10_800))
    }

    /// The frontend of the port with this name.
    ///
    /// # Panics
    /// When the service has no such port.
    pub fn frontend(&self, family: Family, port_name: &str) -> SocketAddr {
        let port = self.ports.iter().find(|port| port.name == port_name);
        let port = port.unwrap_or_else(|| panic!("{} has no port {port_name}", self.name));
        SocketAddr::new(family.cluster_ip(self.number), port.port)
    }

    /// The frontend of the first port of this protocol, with this kind of address; None: the service has none.
    pub fn address(&self, frontend: Frontend, family: Family, protocol: Protocol) -> Option<SocketAddr> {
        let port = self.ports_of(family).find(|port| port.protocol == protocol)?;
        let [on_wire, inside] = family.node_addresses();
        match frontend {
            Frontend::ClusterIp => Some(port.cluster_ip),
            Frontend::NodePort => Some(SocketAddr::new(on_wire, port.node_port?)),
            Frontend::NodePortInside => Some(SocketAddr::new(inside, port.node_port?)),
            Frontend::LoadBalancer => {
                let port = port.cluster_ip.port();
                self.exposure.load_balancer.map(|_| SocketAddr::new(family.load_balancer_ip(self.number), port))
            }
            Frontend::ExternalIp => port.external_ip,
            Frontend::Loopback => Some(SocketAddr::new(family.loopback(), port.node_port?)),
            Frontend::Unclaimed => {
                let taken = |port: &u16| self.ports.iter().any(|claimed| claimed.port == *port);
                let free = (port.cluster_ip.port()..).find(|port| !taken(port))?;
                Some(SocketAddr::new(port.cluster_ip.ip(), free))
            }
        }
    }

    /// Every port, in one family.
    pub fn ports_of(&self, family: Family) -> impl Iterator<Item = ServicePort> {
        let number = self.number;
        self.ports.iter().map(move |port| ServicePort {
            name: port.name.clone(),
            protocol: port.protocol,
            cluster_ip: SocketAddr::new(family.cluster_ip(number), port.port),
            load_balancer: match self.exposure.load_balancer {
                None | Some(LoadBalancer::Proxy) => None,
                Some(_) => Some(SocketAddr::new(family.load_balancer_ip(number), port.port)),
            },
            external_ip: self.exposure.has_external_ip.then(|| SocketAddr::new(family.external_ip(number), port.port)),
            node_port: port.node_port,
            target_port: port.target_port,
        })
    }

    /// The internal traffic policy.
    pub fn internal_policy(&self) -> Policy {
        self.exposure.internal
    }

    /// The external traffic policy.
    pub fn external_policy(&self) -> Policy {
        self.exposure.external
    }

    /// The source ranges of one family.
    pub fn source_ranges_of(&self, family: Family) -> impl Iterator<Item = &str> {
        let of_family = move |range: &&str| range.contains(':') == (family == Family::V6);
        self.exposure.source_ranges.iter().map(String::as_str).filter(of_family)
    }

    /// The indices of the pods that are ready, and may be reached by the ClusterIP.
    pub fn ready_pods(&self) -> impl Iterator<Item = usize> {
        let is_reached = |pod| self.exposure.internal == Policy::Cluster || pod < FIRST_OF_B;
        let ready = self.endpoints().filter(|(_, state)| *state == EndpointState::Ready);
        ready.map(|(pod, _)| pod).filter(move |pod| is_reached(*pod))
    }

    /// The endpoints: the indices of their pods, and their states.
    pub fn endpoints(&self) -> impl Iterator<Item = (usize, EndpointState)> {
        self.endpoints.iter().map(|(pod, endpoint)| (*pod, endpoint.state))
    }

    /// The hints of the endpoint on a pod; None: it is no endpoint.
    pub fn hints(&self, pod: usize) -> Option<&Hints> {
        self.endpoints.get(&pod).map(|endpoint| &endpoint.hints)
    }

    /// The YAML: one document for the Service, and one for each family's EndpointSlice.
    pub fn to_yaml(&self) -> String {
        self.service_yaml() + &self.slices_yaml("slice")
    }

    /// Only the EndpointSlices, one document for each family, with this in their names: a service may have further ones.
    pub fn slices_yaml(&self, name: &str) -> String {
        Family::BOTH.iter().map(|family| format!("---\n{}", self.slice_yaml(name, *family))).collect()
    }

    fn service_yaml(&self) -> String {
        let Self { name, number, exposure, .. } = self;
        let (v4, v6) = (Family::V4.cluster_ip(*number), Family::V6.cluster_ip(*number));
        let affinity = match (self.client_ip, self.timeout_s) {
            (false, _) => "  sessionAffinity: None\n".to_owned(),
            (true, None) => "  sessionAffinity: ClientIP\n".to_owned(),
            (true, Some(timeout_s)) => format!(
                "  sessionAffinity: ClientIP\n  sessionAffinityConfig:\n    clientIP:\n      \
                 timeoutSeconds: {timeout_s}\n"
            ),
        };
        let mut annotations = String::new();
        for (key, value) in &self.annotations {
            annotations += if annotations.is_empty() { "  annotations:\n" } else { "" };
            let _ = writeln!(annotations, "    affinity.dev/{key}: {value:?}");
        }
        let ports: String = self
            .ports
            .iter()
            .map(|Port { name, protocol, port, target_port, node_port }| {
                let node_port = node_port.map(|port| format!("      nodePort: {port}\n")).unwrap_or_default();
                format!(
                    "    - name: {name}\n      protocol: {protocol}\n      port: {port}\n      \
                     targetPort: {target_port}\n{node_port}"
                )
            })
            .collect();
        let (kind, spec, status) = (exposure.kind(), exposure.spec_yaml(*number), exposure.status_yaml(*number));
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: default\n{annotations}\
             spec:\n  type: {kind}\n  clusterIP: {v4}\n  clusterIPs: [\"{v4}\", \"{v6}\"]\n  \
             ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n{affinity}{spec}  ports:\n{ports}{status}"
        )
    }

    fn slice_yaml(&self, slice: &str, family: Family) -> String {
        let name = &self.name;
        let suffix = if family == Family::V4 { "v4" } else { "v6" };
        let mut yaml = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-{slice}-{suffix}\n  \
             namespace: default\n  labels:\n    kubernetes.io/service-name: {name}\naddressType: {family}\n"
        );
        yaml += if self.ports.is_empty() { "ports: []\n" } else { "ports:\n" };
        for Port { name, protocol, target_port, .. } in &self.ports {
            let _ = writeln!(yaml, "  - name: {name}\n    protocol: {protocol}\n    port: {target_port}");
        }
        yaml += if self.endpoints.is_empty() { "endpoints: []\n" } else { "endpoints:\n" };
        for (pod, Endpoint { state, hints }) in &self.endpoints {
            let (ready, serving, terminating) = match state {
                EndpointState::Ready => (true, true, false),
                EndpointState::NotReady => (false, false, false),
                EndpointState::Terminating => (false, true, true),
            };
            let hints = hints.yaml();
            let _ = writeln!(
                yaml,
                "  - addresses: [\"{}\"]\n    conditions: {{ready: {ready}, serving: {serving}, \
                 terminating: {terminating}}}\n{hints}    nodeName: {}\n    targetRef: {{kind: Pod, \
                 namespace: default, name: {}}}",
                family.pod(*pod),
                node_of(*pod),
                pod_name(*pod)
            );
        }
        yaml
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, Result, ensure};
    use k8s_openapi::api::core::v1::Service as KubernetesService;
    use k8s_openapi::api::discovery::v1::EndpointSlice;

    use super::*;

    /// Reads an object, and fails on a field that Kubernetes does not have.
    fn read<T: serde::de::DeserializeOwned>(yaml: &str) -> Result<T> {
        let value: serde_json::Value = serde_saphyr::from_str(yaml).with_context(|| yaml.to_owned())?;
        let mut unknown = Vec::new();
        let object = serde_ignored::deserialize(&value, |path| unknown.push(path.to_string()));
        unknown.retain(|field| field != "apiVersion" && field != "kind");
        ensure!(unknown.is_empty(), "unknown fields {unknown:?} in\n{yaml}");
        object.with_context(|| yaml.to_owned())
    }

    #[test]
    fn everything_is_said_in_kubernetes_own_fields() -> Result<()> {
        let service = Service::new("web", 10)
            .tcp("http", 80, 8080)
            .udp("dns", 53, 5353)
            .client_ip_for(60)
            .node_ports(30_080)
            .load_balancer_vip()
            .external_ips()
            .internal(Policy::Local)
            .external(Policy::Local)
            .source_ranges(&["198.18.0.0/16", "2001:db8:c::/64"])
            .health_check(32_000)
            .on([0, FIRST_OF_B])
            .endpoint(1, EndpointState::Terminating)
            .hinted_for_node(0, NODE_NAME)
            .hinted_for_zone(FIRST_OF_B, "zone-b");
        let yaml = service.to_yaml();
        let documents: Vec<&str> = yaml.split("---\n").collect();
        let [object, v4, v6] = documents[..] else { panic!("{yaml}") };
        let spec = read::<KubernetesService>(object)?.spec.context("spec")?;
        assert_eq!(spec.type_.as_deref(), Some("LoadBalancer"));
        assert_eq!(spec.internal_traffic_policy.as_deref(), Some("Local"));
        assert_eq!(spec.external_traffic_policy.as_deref(), Some("Local"));
        assert_eq!(spec.health_check_node_port, Some(32_000));
        assert_eq!(spec.external_ips.map(|ips| ips.len()), Some(2));
        let node_ports: Vec<_> = spec.ports.iter().flatten().filter_map(|port| port.node_port).collect();
        assert_eq!(node_ports, [30_080, 30_081]);
        for slice in [v4, v6] {
            let endpoints = read::<EndpointSlice>(slice)?.endpoints.context("endpoints")?;
            let nodes: Vec<_> = endpoints.iter().filter_map(|endpoint| endpoint.node_name.as_deref()).collect();
            assert_eq!(nodes, [NODE_NAME, NODE_NAME, NODE_B_NAME]);
            assert!(endpoints[0].hints.as_ref().is_some_and(|hints| hints.for_nodes.is_some()));
            assert!(endpoints[2].hints.as_ref().is_some_and(|hints| hints.for_zones.is_some()));
        }
        Ok(())
    }
}
