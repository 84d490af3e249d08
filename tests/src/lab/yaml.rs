//! Services as their users write them: Kubernetes YAML, a Service and one EndpointSlice for each family.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;

use super::NODE_NAME;
use super::address::{Family, Protocol};

/// The name of the pod with this index.
pub fn pod_name(index: usize) -> String {
    format!("pod-{index}")
}

/// What an EndpointSlice says of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointState {
    /// It serves.
    Ready,
    /// It runs, but is not to get traffic.
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
    endpoints: BTreeMap<usize, EndpointState>,
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
        self.ports.push(Port { name: name.to_owned(), protocol, port, target_port });
        self
    }

    /// With `sessionAffinity: ClientIP`, the timeout not said.
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
        let endpoints = pods.into_iter().map(|pod| (pod, EndpointState::Ready)).collect();
        Self { endpoints, ..self }
    }

    /// With this pod as one of its endpoints, in this state.
    pub fn endpoint(mut self, pod: usize, state: EndpointState) -> Self {
        self.endpoints.insert(pod, state);
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

    /// Where clients dial the port with this name.
    ///
    /// # Panics
    /// When the service has no such port.
    pub fn frontend(&self, family: Family, port_name: &str) -> SocketAddr {
        let port = self.ports.iter().find(|port| port.name == port_name);
        let port = port.unwrap_or_else(|| panic!("{} has no port {port_name}", self.name));
        SocketAddr::new(family.cluster_ip(self.number), port.port)
    }

    /// Every port of one family: its name, its protocol, where clients dial it, and the pods' port.
    pub fn frontends(&self, family: Family) -> impl Iterator<Item = (&str, Protocol, SocketAddr, u16)> {
        self.ports.iter().map(move |port| {
            let address = SocketAddr::new(family.cluster_ip(self.number), port.port);
            (port.name.as_str(), port.protocol, address, port.target_port)
        })
    }

    /// The indices of the pods that are ready.
    pub fn ready_pods(&self) -> impl Iterator<Item = usize> {
        let ready = |(_, state): &(&usize, &EndpointState)| **state == EndpointState::Ready;
        self.endpoints.iter().filter(ready).map(|(pod, _)| *pod)
    }

    /// The YAML: one document for the Service, and one for each family's EndpointSlice.
    pub fn to_yaml(&self) -> String {
        let mut yaml = self.service_yaml();
        for family in Family::BOTH {
            yaml += "---\n";
            yaml += &self.slice_yaml(family);
        }
        yaml
    }

    fn service_yaml(&self) -> String {
        let Self { name, number, .. } = self;
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
            .map(|Port { name, protocol, port, target_port }| {
                format!(
                    "    - name: {name}\n      protocol: {protocol}\n      port: {port}\n      \
                     targetPort: {target_port}\n"
                )
            })
            .collect();
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: default\n{annotations}\
             spec:\n  type: ClusterIP\n  clusterIP: {v4}\n  clusterIPs: [\"{v4}\", \"{v6}\"]\n  \
             ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: RequireDualStack\n{affinity}  ports:\n{ports}"
        )
    }

    fn slice_yaml(&self, family: Family) -> String {
        let name = &self.name;
        let suffix = if family == Family::V4 { "v4" } else { "v6" };
        let mut yaml = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-{suffix}\n  \
             namespace: default\n  labels:\n    kubernetes.io/service-name: {name}\naddressType: {family}\n"
        );
        yaml += if self.ports.is_empty() { "ports: []\n" } else { "ports:\n" };
        for Port { name, protocol, target_port, .. } in &self.ports {
            let _ = writeln!(yaml, "  - name: {name}\n    protocol: {protocol}\n    port: {target_port}");
        }
        yaml += if self.endpoints.is_empty() { "endpoints: []\n" } else { "endpoints:\n" };
        for (pod, state) in &self.endpoints {
            let (ready, serving, terminating) = match state {
                EndpointState::Ready => (true, true, false),
                EndpointState::NotReady => (false, false, false),
                EndpointState::Terminating => (false, true, true),
            };
            let _ = writeln!(
                yaml,
                "  - addresses: [\"{}\"]\n    conditions: {{ready: {ready}, serving: {serving}, \
                 terminating: {terminating}}}\n    nodeName: {NODE_NAME}\n    targetRef: {{kind: Pod, \
                 namespace: default, name: {}}}",
                family.pod(*pod),
                pod_name(*pod)
            );
        }
        yaml
    }
}
