//! What the agent warns about: problems, which are logged once when they appear, and once when they have gone; ports that Linux
//! may give to the node's own connections; a source that suddenly gives nothing at all, which is usually a mistake.

use std::collections::BTreeSet;

use tracing::{error, info, warn};

use super::publish::count;
use crate::{
    desired::Desired,
    local_ports::{LocalPorts, Overlap, UsedPorts},
    source::{Problem, Severity, Snapshot},
    store::Observed,
};

/// The current problems.
#[derive(Debug, Default)]
pub(super) struct Problems {
    current: BTreeSet<Problem>,
}

impl Problems {
    /// Replaces the current problems, and logs what has changed.
    pub(super) fn update<'a>(&mut self, problems: impl IntoIterator<Item = &'a Problem>) {
        let now: BTreeSet<_> = problems.into_iter().collect();
        let new: Vec<Problem> =
            now.iter().filter(|problem| !self.current.contains(**problem)).map(|p| (*p).clone()).collect();
        for problem in &new {
            match problem.severity {
                Severity::Error => error!("{problem}"),
                Severity::Warning => warn!("{problem}"),
                Severity::Info => info!("{problem}"),
            }
        }
        self.current.retain(|problem| {
            let holds = now.contains(problem);
            if !holds {
                info!("resolved: {problem}");
            }
            holds
        });
        self.current.extend(new);
    }
}

/// Keeps Linux from giving ports that affinity uses to the node's own connections, or warns that it may. Compares the node's
/// range of ports with the ports in use, repeatedly: services change, and so do the kernel's settings.
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
            Err(error) => Some(format!("cannot read which ports the node's own connections get: {error}")),
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
                "{found}; they are not reserved, because that would leave less than half of the range: widen it, or choose other \
                 --masquerade-ports"
            ));
        }
        match local.reserve(overlap) {
            Ok(()) => {
                info!("reserved in net.ipv4.ip_local_reserved_ports: {}", overlap.ports());
                None
            }
            Err(error) => Some(format!("{found}; the agent cannot reserve them ({error}): on the node, {command}")),
        }
    }
}

/// The ports that affinity uses. With `--shadow`, none.
fn used(desired: &Desired) -> UsedPorts {
    let answered = desired.frontends.keys().filter(|_| !desired.shadow).map(|address| (address.ip, address.port));
    let masquerade = desired.masquerade.as_ref().filter(|masquerade| !desired.shadow && masquerade.is_possible());
    UsedPorts::new(answered, &desired.node_addresses, masquerade.map(|masquerade| masquerade.ports.clone()))
}

/// How many objects of each kind a source gives.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Given {
    services: usize,
    slices: usize,
}

impl Given {
    /// Warns if the snapshot withdraws all objects of a kind that the source gave before.
    pub(super) fn update(&mut self, snapshot: &Snapshot) {
        // A snapshot that may lack objects withdraws nothing.
        if snapshot.partial {
            return;
        }
        let before = *self;
        *self = Self { services: snapshot.services.len(), slices: snapshot.slices.len() };
        if let Some(all) = before.withdrawn_by(*self) {
            warn!("the source has removed all of its objects: {all}");
        }
    }

    fn withdrawn_by(self, now: Self) -> Option<String> {
        let all = |before: usize, now: usize, noun: &str| (before > 0 && now == 0).then(|| count(before, noun));
        let services = all(self.services, now.services, "Service");
        let slices = all(self.slices, now.slices, "EndpointSlice");
        let kinds: Vec<String> = services.into_iter().chain(slices).collect();
        (!kinds.is_empty()).then(|| kinds.join(" and "))
    }
}

/// Warns if a former agent left frontends in the maps, and none is desired.
pub(super) fn compare_with_former(observed: &Observed, frontends_desired: usize, is_partial: bool) {
    let frontends = observed.frontends_v4.len() + observed.frontends_v6.len();
    if frontends > 0 && frontends_desired == 0 && !is_partial {
        let members = count(observed.members.len(), "member");
        warn!(
            "the source has no services: removing all of them from the maps, {} and {members}",
            count(frontends, "frontend")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn withdrawal_of_all_of_a_kind_is_counted() {
        let withdrawn = |before: [usize; 2], now: [usize; 2]| {
            let given = |[services, slices]: [usize; 2]| Given { services, slices };
            given(before).withdrawn_by(given(now))
        };
        assert_eq!(withdrawn([3, 1], [0, 0]).as_deref(), Some("3 Services and 1 EndpointSlice"));
        assert_eq!(withdrawn([1, 2], [1, 0]).as_deref(), Some("2 EndpointSlices"));
        assert_eq!(withdrawn([1, 0], [0, 4]).as_deref(), Some("1 Service"));
        assert_eq!(withdrawn([3, 1], [1, 1]), None);
        assert_eq!(withdrawn([0, 0], [0, 0]), None);
    }
}
