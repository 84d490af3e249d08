//! The rules that kube-proxy writes for a lab's services, for comparison: its iptables mode and its nftables
//! mode, in the shape and order of Kubernetes 1.36, for IPv4 and ClusterIPs.
//!
//! Both come from the same [`Service`] values that `affinity` gets as YAML, as one input for `iptables-restore`
//! or `nft -f`.

mod iptables;
mod nftables;

use std::process::{Command, Stdio};

use anyhow::Result;

use crate::lab::{Family, Lab, PODS, Protocol, Service, WIRE_CLIENT, feed};

/// Which of kube-proxy's modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Chains of the nat table, and `xt_recent` for affinity.
    Iptables,
    /// Maps of verdicts, and sets with timeouts for affinity.
    Nftables,
}

impl Mode {
    /// Whether this machine has the command for it.
    pub fn is_available(self) -> bool {
        let mut probe = Command::new(match self {
            Self::Iptables => "iptables-restore",
            Self::Nftables => "nft",
        });
        probe.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        probe.status().is_ok_and(|status| status.success())
    }

    /// All rules for these services, as one input for the command.
    pub fn rules(self, services: &[Service]) -> String {
        let ports: Vec<ServicePort> = services.iter().flat_map(ServicePort::all_of).collect();
        match self {
            Self::Iptables => iptables::rules(&ports),
            Self::Nftables => nftables::rules(&ports),
        }
    }

    /// Puts the rules for these services in place on the lab's node, instead of those that are there.
    ///
    /// # Errors
    /// What the command says when it refuses them.
    pub fn install(self, lab: &Lab, services: &[Service]) -> Result<()> {
        let mut command = match self {
            Self::Iptables => lab.node().command("iptables-restore"),
            Self::Nftables => {
                let mut nft = lab.node().command("nft");
                nft.args(["-f", "-"]);
                nft
            }
        };
        feed(&mut command, &self.rules(services))?;
        // The rules see a packet only if the node knows where it would go without them.
        lab.node().ip(&format!("route replace default via {}", WIRE_CLIENT[0]))
    }
}

/// The part of the cluster's addresses that are pods': traffic from elsewhere is masqueraded.
const POD_CIDR: &str = PODS[0];
/// The mark of packets to masquerade.
const MASQUERADE_MARK: &str = "0x4000";

/// One port of a service, as both rule sets want it.
struct ServicePort {
    /// `ns/name:port`, as in kube-proxy's comments and hashes.
    name: String,
    protocol: &'static str,
    cluster_ip: String,
    port: u16,
    affinity_timeout_s: Option<u32>,
    endpoints: Vec<Endpoint>,
}

struct Endpoint {
    address: String,
    port: u16,
}

impl ServicePort {
    fn all_of(service: &Service) -> Vec<Self> {
        let port = |(name, protocol, frontend, target_port): (_, _, std::net::SocketAddr, _)| Self {
            name: format!("{}:{name}", service.full_name()),
            protocol: match protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
            },
            cluster_ip: frontend.ip().to_string(),
            port: frontend.port(),
            affinity_timeout_s: service.affinity_timeout_s(),
            endpoints: service
                .ready_pods()
                .map(|pod| Endpoint { address: Family::V4.pod(pod).to_string(), port: target_port })
                .collect(),
        };
        service.frontends(Family::V4).map(port).collect()
    }
}
