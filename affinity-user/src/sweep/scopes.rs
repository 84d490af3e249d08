//! Maps pins to services and groups, according to the frontends at the beginning of a pass.

use std::collections::BTreeMap;

use affinity_common::abi::{AFFINITY, Frontend, Timer};

use super::expiry::Policy;

/// Services, the scopes of their pins, and the expiry policies.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Scopes {
    policies: BTreeMap<u32, Policy>,
    /// Scope -> the service that gives the policy if the session's own service has gone.
    speakers: BTreeMap<u32, u32>,
    /// Scope (shared, or a frontend's own) -> group.
    groups: BTreeMap<u32, u32>,
    /// Group -> its services, in ascending order.
    services: BTreeMap<u32, Vec<u32>>,
}

impl Scopes {
    pub(super) fn add(&mut self, frontend: &Frontend) {
        let Frontend { timeout_ns, service, group, own, timer, flags, .. } = *frontend;
        if flags & AFFINITY == 0 {
            return;
        }
        self.policies.insert(service, Policy { timer: Timer::from_byte(timer), timeout_ns });
        for scope in [group, own] {
            self.speakers.entry(scope).or_insert(service);
            self.groups.insert(scope, group);
        }
        let services = self.services.entry(group).or_default();
        if let Err(at) = services.binary_search(&service) {
            services.insert(at, service);
        }
    }

    /// The policy of a session under `scope` that `service` made; `None`: no frontend leads to it any more.
    pub(super) fn policy(&self, scope: u32, service: u32) -> Option<Policy> {
        let speaker = self.speakers.get(&scope)?;
        self.policies.get(&service).or_else(|| self.policies.get(speaker)).copied()
    }

    /// Whether any frontend leads to the pins of a scope.
    pub(super) fn leads_to(&self, scope: u32) -> bool {
        self.speakers.contains_key(&scope)
    }

    /// The group that a scope belongs to: the scope itself if no frontend says otherwise.
    pub(super) fn group(&self, scope: u32) -> u32 {
        self.groups.get(&scope).copied().unwrap_or(scope)
    }

    /// Every group with its services.
    pub(super) fn groups(&self) -> impl Iterator<Item = (u32, &[u32])> {
        self.services.iter().map(|(&group, services)| (group, services.as_slice()))
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

    use super::*;

    fn frontend(service: u32, group: u32, own: u32, timeout_ns: u64, flags: u8) -> Frontend {
        Frontend { service, group, own, timeout_ns, flags, ..Zeroable::zeroed() }
    }

    #[test]
    fn a_session_whose_service_has_gone_follows_its_group() {
        let mut scopes = Scopes::default();
        scopes.add(&frontend(1, 9, 10, 100, AFFINITY));
        scopes.add(&frontend(2, 9, 11, 200, AFFINITY));
        scopes.add(&frontend(3, 3, 12, 300, 0));
        let timeout = |scope, service| scopes.policy(scope, service).map(|policy| policy.timeout_ns);
        assert_eq!(timeout(9, 2), Some(200));
        assert_eq!(timeout(11, 2), Some(200));
        assert_eq!(timeout(9, 77), Some(100));
        assert_eq!(timeout(3, 3), None, "a service without affinity has no pins");
        assert_eq!(timeout(77, 1), None);
        assert_eq!((scopes.group(11), scopes.group(77)), (9, 77));
        assert_eq!(scopes.groups().collect::<Vec<_>>(), [(9, [1, 2].as_slice())]);
    }
}
