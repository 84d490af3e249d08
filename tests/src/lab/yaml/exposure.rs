//! How a service is reached from outside the cluster, and which endpoints its traffic may go to.

use std::fmt::Write;

use super::super::address::Family;

/// Which endpoints traffic may go to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Policy {
    /// All of the cluster.
    #[default]
    Cluster,
    /// Those on the node that the traffic arrived on.
    Local,
}

impl Policy {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Cluster, Self::Local];

    fn name(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        }
    }
}

/// A kind of address that clients connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Frontend {
    /// The ClusterIP.
    ClusterIp,
    /// The node port, on node A's address on the wire to the clients.
    NodePort,
    /// The node port, on node A's address on the wire to node B.
    NodePortInside,
    /// The ingress IP of the load balancer.
    LoadBalancer,
    /// An external IP.
    ExternalIp,
    /// The node port, on loopback: for the node's own processes.
    Loopback,
    /// A port of the ClusterIP that the service does not have.
    Unclaimed,
}

impl Frontend {
    /// All that a service has for all clients.
    pub const ALL: [Self; 5] =
        [Self::ClusterIp, Self::NodePort, Self::NodePortInside, Self::LoadBalancer, Self::ExternalIp];

    /// Whether it is for external clients, so that the external policy applies.
    pub fn is_external(self) -> bool {
        self != Self::ClusterIp
    }
}

/// The fields of a Service in addition to its ClusterIP.
#[derive(Clone, Debug, Default)]
pub(super) struct Exposure {
    pub(super) internal: Policy,
    pub(super) external: Policy,
    pub(super) has_node_ports: bool,
    pub(super) load_balancer: Option<LoadBalancer>,
    pub(super) has_external_ip: bool,
    pub(super) source_ranges: Vec<String>,
    pub(super) health_check_node_port: Option<u16>,
}

/// How packets for the ingress IPs are handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LoadBalancer {
    /// `ipMode` is not set.
    Unsaid,
    /// The node handles them.
    Vip,
    /// The node passes them to the load balancer.
    Proxy,
}

impl Exposure {
    /// The value of `type`.
    pub(super) fn kind(&self) -> &'static str {
        match (self.load_balancer, self.has_node_ports) {
            (Some(_), _) => "LoadBalancer",
            (None, true) => "NodePort",
            (None, false) => "ClusterIP",
        }
    }

    /// The fields of `spec`, except `type` and those of ports.
    pub(super) fn spec_yaml(&self, number: u16) -> String {
        let mut yaml = String::new();
        if self.internal == Policy::Local {
            let _ = writeln!(yaml, "  internalTrafficPolicy: {}", self.internal.name());
        }
        if self.has_node_ports || self.has_external_ip {
            let _ = writeln!(yaml, "  externalTrafficPolicy: {}", self.external.name());
        }
        if self.has_external_ip {
            let [v4, v6] = Family::BOTH.map(|family| family.external_ip(number));
            let _ = writeln!(yaml, "  externalIPs: [\"{v4}\", \"{v6}\"]");
        }
        if !self.source_ranges.is_empty() {
            let _ = writeln!(yaml, "  loadBalancerSourceRanges: {:?}", self.source_ranges);
        }
        if let Some(port) = self.health_check_node_port {
            let _ = writeln!(yaml, "  healthCheckNodePort: {port}");
        }
        yaml
    }

    /// The `status`, if there is one.
    pub(super) fn status_yaml(&self, number: u16) -> String {
        let Some(load_balancer) = self.load_balancer else { return String::new() };
        let mode = match load_balancer {
            LoadBalancer::Unsaid => "",
            LoadBalancer::Vip => ", ipMode: VIP",
            LoadBalancer::Proxy => ", ipMode: Proxy",
        };
        let ingress =
            Family::BOTH.map(|family| format!("      - {{ip: \"{}\"{mode}}}\n", family.load_balancer_ip(number)));
        format!("status:\n  loadBalancer:\n    ingress:\n{}", ingress.concat())
    }
}
