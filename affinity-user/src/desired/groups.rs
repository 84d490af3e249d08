//! Groups: scopes with pools that share pins.

use std::collections::{BTreeMap, BTreeSet};

use super::{BackendName, Family, Pool, PoolName, Scope, service::ServiceSpec};
use crate::source::ObjectName;

/// The unions of scopes with pools that do not all have the same ready members.
pub(crate) fn unions(pools: &BTreeMap<PoolName, Pool>) -> BTreeMap<Scope, BTreeMap<BackendName, bool>> {
    let mut scopes: BTreeMap<&Scope, Vec<(Family, &Pool)>> = BTreeMap::new();
    for (name, pool) in pools.iter().filter(|(_, pool)| pool.affinity.is_some()) {
        scopes.entry(&pool.scope).or_default().push((name.family, pool));
    }
    scopes.into_iter().filter_map(|(scope, pools)| Some((scope.clone(), union(&pools)?))).collect()
}

/// The union of a scope's pools with affinity; `None` if all have the same ready members.
///
/// Pools of different families are not compared: a client of one family cannot use a backend of the other.
pub(super) fn union(pools: &[(Family, &Pool)]) -> Option<BTreeMap<BackendName, bool>> {
    if !differ(pools) {
        return None;
    }
    let mut union = BTreeMap::new();
    for (backend, member) in pools.iter().flat_map(|(_, pool)| &pool.members) {
        *union.entry(backend.clone()).or_default() |= member.ready;
    }
    Some(union)
}

fn differ(pools: &[(Family, &Pool)]) -> bool {
    fn ready(pool: &Pool) -> BTreeSet<&BackendName> {
        pool.members.iter().filter(|(_, member)| member.ready).map(|(backend, _)| backend).collect()
    }
    let mut first: BTreeMap<Family, BTreeSet<&BackendName>> = BTreeMap::new();
    pools.iter().any(|(family, pool)| *first.entry(*family).or_insert_with(|| ready(pool)) != ready(pool))
}

/// The message about a service that treats pins differently from the `first` service of its group.
pub(super) fn disagreement(spec: &ServiceSpec, (first_name, first): (&ObjectName, &ServiceSpec)) -> Option<String> {
    let (Some(a), Some(b)) = (spec.affinity, first.affinity) else { return None };
    let differing: Vec<&str> = [
        ("timer", a.timer != b.timer),
        ("timeout", a.timeout_ns != b.timeout_ns),
        ("client-prefix-v4", spec.prefix(Family::V4) != first.prefix(Family::V4)),
        ("client-prefix-v6", spec.prefix(Family::V6) != first.prefix(Family::V6)),
    ]
    .into_iter()
    .filter_map(|(what, differs)| differs.then_some(what))
    .collect();
    let (group, differing) = (spec.scope.name(), differing.join(", "));
    (!differing.is_empty())
        .then(|| format!("in group {group}, not as in service {first_name}: {differing}; each service keeps its own"))
}
