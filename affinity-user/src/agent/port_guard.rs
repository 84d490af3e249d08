//! Keeps Linux from giving ports that affinity uses to the node's own connections, or warns that it may.

use tracing::info;

use super::problems::Problems;
use crate::{
    desired::Desired,
    local_ports::{LocalPorts, Overlap, UsedPorts},
    source::{Problem, Severity},
};

/// Compares the node's range of ports with the ports in use, repeatedly: services change, and so do the kernel's settings.
pub(super) struct PortGuard {
    /// Whether ports are reserved, or only reported.
    reserves: bool,
    problems: Problems,
}

impl PortGuard {
    pub(super) fn new(reserves: bool) -> Self {
        Self { reserves, problems: Problems::default() }
    }

    /// Reserves ports if that is configured. Logs a problem once when it appears, and once when it has gone.
    pub(super) fn look(&mut self, desired: &Desired) {
        let problem = match LocalPorts::read() {
            Ok(local) => local.overlap(&used(desired)).and_then(|overlap| self.settle(&local, &overlap)),
            Err(error) => Some(format!("which ports the node's own connections get cannot be told: {error}")),
        };
        let problem = problem.map(|message| Problem::new(Severity::Warning, None, message));
        self.problems.update(&problem);
    }

    /// Reserves the ports if possible. Returns what is left to do.
    fn settle(&self, local: &LocalPorts, overlap: &Overlap) -> Option<String> {
        let (found, command) = (local.describe(overlap), local.command(overlap));
        if !self.reserves {
            return Some(format!("{found}; start with --reserve-ports, or {command}"));
        }
        if !local.can_spare(overlap) {
            return Some(format!(
                "{found}; reserving them would leave less than half of that range: widen it, or choose other \
                 --masquerade-ports"
            ));
        }
        match local.reserve(overlap) {
            Ok(()) => {
                info!("reserved in net.ipv4.ip_local_reserved_ports: {}", overlap.ports());
                None
            }
            Err(error) => Some(format!("{found}; they cannot be reserved from here ({error}): on the node, {command}")),
        }
    }
}

/// The ports that affinity uses. With `--shadow`, none.
fn used(desired: &Desired) -> UsedPorts {
    let answered = desired.frontends.keys().filter(|_| !desired.shadow).map(|address| (address.ip, address.port));
    let masquerade = desired.masquerade.as_ref().filter(|masquerade| !desired.shadow && masquerade.is_possible());
    UsedPorts::new(answered, &desired.node_addresses, masquerade.map(|masquerade| masquerade.ports.clone()))
}
