//! Groups: scopes whose pools share pins.

use std::collections::{BTreeMap, BTreeSet};

use super::{BackendName, Family, Pool, PoolName, Report, Scope, service::ServiceSpec};
use crate::source::{ObjectName, Problem, Snapshot};

/// The unions of those scopes whose pools do not all have the same ready members.
///
/// Pools of the two families are never compared: a client of one family has no use for a backend of the other.
pub(crate) fn unions(pools: &BTreeMap<PoolName, Pool>) -> BTreeMap<Scope, BTreeMap<BackendName, bool>> {
    let mut scopes: BTreeMap<&Scope, Vec<(Family, &Pool)>> = BTreeMap::new();
    for (name, pool) in pools.iter().filter(|(_, pool)| pool.affinity.is_some()) {
        scopes.entry(&pool.scope).or_default().push((name.family, pool));
    }
    scopes.retain(|_, pools| differ(pools));
    scopes.into_iter().map(|(scope, pools)| (scope.clone(), union(&pools))).collect()
}

fn differ(pools: &[(Family, &Pool)]) -> bool {
    let ready = |pool: &Pool| -> BTreeSet<BackendName> {
        pool.members.iter().filter(|(_, member)| member.ready).map(|(backend, _)| backend.clone()).collect()
    };
    let mut first: BTreeMap<Family, BTreeSet<BackendName>> = BTreeMap::new();
    pools.iter().any(|(family, pool)| *first.entry(*family).or_insert_with(|| ready(pool)) != ready(pool))
}

fn union(pools: &[(Family, &Pool)]) -> BTreeMap<BackendName, bool> {
    let mut union = BTreeMap::new();
    for (backend, member) in pools.iter().flat_map(|(_, pool)| &pool.members) {
        *union.entry(backend.clone()).or_default() |= member.ready;
    }
    union
}

/// Reports services of one group that treat pins differently.
pub(super) fn report_disagreement(
    snapshot: &Snapshot,
    specs: &BTreeMap<&ObjectName, ServiceSpec>,
    problems: &mut Vec<Problem>,
) {
    let mut firsts: BTreeMap<&Scope, (&ObjectName, &ServiceSpec)> = BTreeMap::new();
    for (name, spec) in specs.iter().filter(|(_, spec)| matches!(spec.scope, Scope::Group(_))) {
        let (first_name, first) = *firsts.entry(&spec.scope).or_insert((name, spec));
        let (Some(a), Some(b)) = (spec.affinity, first.affinity) else { continue };
        let differing: Vec<&str> = [
            ("timer", a.timer != b.timer),
            ("timeout", a.timeout_ns != b.timeout_ns),
            ("client-prefix-v4", spec.prefix(Family::V4) != first.prefix(Family::V4)),
            ("client-prefix-v6", spec.prefix(Family::V6) != first.prefix(Family::V6)),
        ]
        .into_iter()
        .filter_map(|(what, differs)| differs.then_some(what))
        .collect();
        if !differing.is_empty() {
            let message = format!(
                "in group {}, not as in service {first_name}: {}; each service keeps its own",
                spec.scope.name(),
                differing.join(", ")
            );
            Report::new("Service", name, &snapshot.services[*name], problems).warning("metadata.annotations", message);
        }
    }
}
