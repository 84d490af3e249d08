//! The rules that kube-proxy writes for a lab's services on node A, for comparison: its iptables mode and its nftables
//! mode, in the shape and order of Kubernetes 1.36, for IPv4 and IPv6 and every kind of frontend. It knows the pod
//! networks (`clusterCIDR`) and has no node port on loopback.
//!
//! Both come from the same [`Service`] values that `affinity` gets as YAML, as input for `iptables-restore`,
//! `ip6tables-restore` and `nft -f`.
//!
//! The modes differ where kube-proxy's modes do. In nftables mode, the node's own packets to an ingress or external IP under
//! the policy Local are dropped if no endpoint is local, and source ranges are checked even if there is no endpoint.

mod conntrack;
mod iptables;
mod nftables;
mod service;

use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use crate::lab::{Family, Lab, Service, WIRE_CLIENT, feed};
use service::ServicePort;

/// A mode of kube-proxy.
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
        is_there(self.command(Family::V4)[0])
    }

    /// Fails if the command for it is missing: a test that needs it must not pass without it.
    ///
    /// # Errors
    /// What to install.
    pub fn ensure_available(self) -> Result<()> {
        ensure_there(self.command(Family::V4)[0])
    }

    /// All rules of one family for these services, as one input for [`Mode::command`].
    pub fn rules(self, family: Family, services: &[Service]) -> String {
        let ports = ServicePort::all_of(services, family);
        match self {
            Self::Iptables => iptables::rules(family, &ports),
            Self::Nftables => nftables::rules(family, &ports),
        }
    }

    /// The command that takes the rules of one family, and its arguments.
    pub fn command(self, family: Family) -> &'static [&'static str] {
        match (self, family) {
            (Self::Iptables, Family::V4) => &["iptables-restore"],
            (Self::Iptables, Family::V6) => &["ip6tables-restore"],
            (Self::Nftables, _) => &["nft", "-f", "-"],
        }
    }

    /// Installs the rules for these services on the lab's node A, instead of the current rules of this mode.
    ///
    /// # Errors
    /// The command's error if it rejects them; what to install if it is missing.
    pub fn install(self, lab: &Lab, services: &[Service]) -> Result<()> {
        Family::BOTH.into_iter().try_for_each(|family| self.install_one(family, lab, services))
    }

    /// The same, when the services or their endpoints have changed while connections are open.
    ///
    /// # Errors
    /// As [`Mode::install`].
    pub fn update(self, lab: &Lab, services: &[Service]) -> Result<()> {
        self.install(lab, services)?;
        ensure_there(conntrack::COMMAND)?;
        Family::BOTH.into_iter().try_for_each(|family| conntrack::delete_stale(family, lab, services))
    }

    /// The same as [`Mode::install`], for one family only.
    ///
    /// # Errors
    /// As [`Mode::install`].
    pub fn install_one(self, family: Family, lab: &Lab, services: &[Service]) -> Result<()> {
        self.ensure_available()?;
        let words = self.command(family);
        let mut command = lab.node().command(words[0]);
        feed(command.args(&words[1..]), &self.rules(family, services))?;
        // The rules see a packet only if the node has a route for its original destination.
        lab.node().ip(&format!("route replace default via {}", WIRE_CLIENT[family as usize]))
    }
}

/// Whether this machine has a command.
fn is_there(command: &str) -> bool {
    let mut probe = Command::new(command);
    probe.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    probe.status().is_ok_and(|status| status.success())
}

fn ensure_there(command: &str) -> Result<()> {
    let package = match command {
        "nft" => "nftables",
        conntrack::COMMAND => "conntrack",
        _ => "iptables",
    };
    ensure!(is_there(command), "{command} is missing: run `cargo xtask setup`, or apt-get install {package}");
    Ok(())
}

/// The mark of packets to masquerade.
const MASQUERADE_MARK: &str = "0x4000";
