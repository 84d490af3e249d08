//! The decisions for a snapshot, kept so that the cost of the next one depends only on what has changed in it.
//!
//! The state is a function of the last snapshot only: earlier snapshots make no difference.
//!
//! The outcome for a service depends on three things: its own object and slices; which of its addresses an older service
//! claims, so all services that claim an address are decided together; and its group, so the services of a group are decided
//! together as well. All other decisions stay. Much depends on the node, which rarely changes: if it has, everything is decided
//! again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::jiff::Timestamp;

use super::{
    BackendName, Desired, Family, FrontendAddress, Known, Node, NodeFacts, Options, Pool, PoolName, Protocol, Reach,
    Report, Scope, Services,
    endpoints::{self, Slice},
    frontends::{self, Claim, Outcome, claims},
    is_ours,
    service::{self, ServiceSpec},
};
use crate::source::{
    ObjectName, Problem, Snapshot, Sourced,
    api::{EndpointSlice, Node as ApiNode, Service},
};

/// A part of the desired state that can be planned for by itself, because nothing outside of it has changed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Change {
    /// The services that this part is about, now or before.
    pub services: BTreeSet<ObjectName>,
    /// The groups that these services are in, now or before.
    pub groups: BTreeSet<ObjectName>,
    /// Backends that are not desired any more.
    pub gone: BTreeSet<BackendName>,
    /// The desired state of these services and groups. Its backends include all other backends that have moved.
    pub desired: Desired,
}

/// The order of claims to an address: the oldest service first, services without a date last; then by name.
type Seniority = (bool, Option<Timestamp>, ObjectName);

/// The object that a problem was found in. Problems are reported in this order.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Subject {
    Slice(ObjectName),
    Service(ObjectName),
    InGroup(ObjectName),
    Frontends(Seniority),
}

struct KnownSlice {
    source: Sourced<EndpointSlice>,
    service: Option<ObjectName>,
    /// The parsed slice; `None` if its service is not ours.
    slice: Option<Slice>,
}

struct KnownService {
    source: Sourced<Service>,
    seniority: Seniority,
    spec: Option<ServiceSpec>,
}

/// What has to be decided again.
#[derive(Default)]
struct Touched {
    services: BTreeSet<ObjectName>,
    scopes: BTreeSet<Scope>,
    backends: BTreeSet<BackendName>,
}

/// The decisions for the last snapshot.
pub struct DesiredState {
    options: Options,
    node: Node,
    /// The Node object of the last snapshot.
    api_node: Option<Arc<ApiNode>>,
    slices: BTreeMap<ObjectName, KnownSlice>,
    services: BTreeMap<ObjectName, KnownService>,
    slices_of: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
    claims: BTreeMap<FrontendAddress, BTreeSet<Seniority>>,
    scopes: BTreeMap<Scope, BTreeSet<ObjectName>>,
    /// How many pools a backend is in.
    pools_with: BTreeMap<BackendName, u32>,
    /// How many slices say that a backend is on this node.
    local: BTreeMap<BackendName, u32>,
    /// How many slices list a backend, no matter of which service.
    listed: BTreeMap<BackendName, u32>,
    /// How many of these say that it is terminating.
    terminating: BTreeMap<BackendName, u32>,
    desired: Desired,
    problems: BTreeMap<Subject, Vec<Problem>>,
}

impl DesiredState {
    /// The state for an empty snapshot.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let node = Node::new(&options.node, None);
        Self::on(node, options)
    }

    fn on(node: Node, options: Options) -> Self {
        let desired = Desired {
            coexists: options.services != Services::All,
            shadow: options.shadow,
            pod_networks: node.pod_networks.clone(),
            node_addresses: node.addresses.clone(),
            masquerade: Some(node.masquerade.clone()),
            health_addresses: node.health_addresses.clone(),
            ..Desired::default()
        };
        Self {
            options,
            node,
            api_node: None,
            slices: BTreeMap::new(),
            services: BTreeMap::new(),
            slices_of: BTreeMap::new(),
            claims: BTreeMap::new(),
            scopes: BTreeMap::new(),
            pools_with: BTreeMap::new(),
            local: BTreeMap::new(),
            listed: BTreeMap::new(),
            terminating: BTreeMap::new(),
            desired,
            problems: BTreeMap::new(),
        }
    }

    /// What the dataplane should hold for the last snapshot.
    #[must_use]
    pub const fn desired(&self) -> &Desired {
        &self.desired
    }

    /// The same, by value.
    #[must_use]
    pub fn into_desired(self) -> Desired {
        self.desired
    }

    /// What is wrong with the last snapshot.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    /// Updates what is known about the node, in addition to the snapshots. Returns whether that made a difference; if so,
    /// everything was decided again.
    pub fn learn(&mut self, node: NodeFacts) -> bool {
        self.options.node = node;
        let is_news = Node::new(&self.options.node, self.api_node.as_deref()) != self.node;
        if is_news {
            self.update(&self.snapshot());
        }
        is_news
    }

    /// The last snapshot, without the problems of its source.
    fn snapshot(&self) -> Snapshot {
        let services = self.services.iter().map(|(name, known)| (name.clone(), known.source.clone()));
        let slices = self.slices.iter().map(|(name, known)| (name.clone(), known.source.clone()));
        Snapshot {
            services: Arc::new(services.collect()),
            slices: Arc::new(slices.collect()),
            node: self.api_node.clone().map(|object| Sourced { origin: None, object }),
            problems: Vec::new(),
            partial: self.desired.known.is_some(),
            unreadable: None,
        }
    }

    /// Decides for a snapshot. Returns what has changed, or `None` if everything has to be planned for: after the first
    /// snapshot, if only a part of the source was read, or if the node has changed.
    pub fn update(&mut self, snapshot: &Snapshot) -> Option<Change> {
        let api_node = snapshot.node.as_ref().map(|node| Arc::clone(&node.object));
        let node = Node::new(&self.options.node, api_node.as_deref());
        if node != self.node {
            *self = Self::on(node, self.options.clone());
        }
        self.api_node = api_node;
        let is_first = self.services.is_empty();
        let was_partial = self.desired.known.is_some();
        let mut touched = Touched::default();
        let mut slices = differing(&mut self.slices, |known| &mut known.source, &snapshot.slices);
        for name in differing(&mut self.services, |known| &mut known.source, &snapshot.services) {
            let was_foreign = self.is_foreign(&name);
            self.forget_service(&name, &mut touched);
            if let Some(source) = snapshot.services.get(&name) {
                self.read_service(&name, source, &mut touched);
            }
            if self.is_foreign(&name) != was_foreign {
                slices.extend(self.slices_of.get(&name).into_iter().flatten().cloned());
            }
        }
        for name in slices {
            self.forget_slice(&name, &mut touched);
            if let Some(source) = snapshot.slices.get(&name) {
                self.read_slice(&name, source, &mut touched);
            }
        }
        self.decide(&mut touched);
        self.desired.known = snapshot.partial.then(|| self.known());
        (!is_first && !was_partial && !snapshot.partial).then(|| self.change(touched))
    }

    fn known(&self) -> Known {
        let with_slices = self.slices.values().filter(|known| known.slice.is_some());
        Known {
            services: self.services.keys().cloned().collect(),
            with_slices: with_slices.filter_map(|known| known.service.clone()).collect(),
        }
    }

    fn forget_slice(&mut self, name: &ObjectName, touched: &mut Touched) {
        let Some(KnownSlice { source, service, slice }) = self.slices.remove(name) else { return };
        for (backend, is_terminating) in endpoints::listed(name, &source.object) {
            discount(&mut self.listed, &backend);
            if is_terminating {
                discount(&mut self.terminating, &backend);
            }
            touched.backends.insert(backend);
        }
        self.problems.remove(&Subject::Slice(name.clone()));
        for backend in slice.iter().flat_map(Slice::local) {
            discount(&mut self.local, backend);
            touched.backends.insert(backend.clone());
        }
        if let Some(service) = service {
            remove(&mut self.slices_of, &service, name);
            touched.services.insert(service);
        }
    }

    fn read_slice(&mut self, name: &ObjectName, source: &Sourced<EndpointSlice>, touched: &mut Touched) {
        let service = endpoints::service_of(name, &source.object);
        for (backend, is_terminating) in endpoints::listed(name, &source.object) {
            touched.backends.insert(backend.clone());
            if is_terminating {
                *self.terminating.entry(backend.clone()).or_default() += 1;
            }
            *self.listed.entry(backend).or_default() += 1;
        }
        let mut slice = None;
        if !service.as_ref().is_some_and(|service| self.is_foreign(service)) {
            let mut problems = Vec::new();
            let mut report = Report::new("EndpointSlice", name, source, &mut problems);
            slice = endpoints::read(name, &source.object, &self.node, &mut report);
            self.note(Subject::Slice(name.clone()), problems);
        }
        for backend in slice.iter().flat_map(Slice::local) {
            *self.local.entry(backend.clone()).or_default() += 1;
            touched.backends.insert(backend.clone());
        }
        if let Some(service) = &service {
            self.slices_of.entry(service.clone()).or_default().insert(name.clone());
            touched.services.insert(service.clone());
        }
        self.slices.insert(name.clone(), KnownSlice { source: source.clone(), service, slice });
    }

    /// Whether a service is there, but not ours.
    fn is_foreign(&self, service: &ObjectName) -> bool {
        self.services.get(service).is_some_and(|known| !is_ours(&known.source.object, &self.options))
    }

    fn forget_service(&mut self, name: &ObjectName, touched: &mut Touched) {
        self.withdraw(name, touched);
        let Some(KnownService { seniority, spec, .. }) = self.services.remove(name) else { return };
        touched.services.insert(name.clone());
        self.problems.remove(&Subject::Service(name.clone()));
        self.problems.remove(&Subject::InGroup(name.clone()));
        let Some(spec) = spec else { return };
        for Claim { address, .. } in claims(&spec, &self.node) {
            remove(&mut self.claims, &address, &seniority);
            touched.services.extend(claimants(&self.claims, &address));
        }
        remove(&mut self.scopes, &spec.scope, name);
        touched.scopes.insert(spec.scope);
    }

    fn read_service(&mut self, name: &ObjectName, source: &Sourced<Service>, touched: &mut Touched) {
        let mut problems = Vec::new();
        let mut report = Report::new("Service", name, source, &mut problems);
        let is_ours = is_ours(&source.object, &self.options);
        let spec = if is_ours { service::read(name, &source.object, &mut report) } else { None };
        self.note(Subject::Service(name.clone()), problems);
        let created = source.object.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let seniority = (created.is_none(), created, name.clone());
        if let Some(spec) = &spec {
            for Claim { address, .. } in claims(spec, &self.node) {
                self.claims.entry(address).or_default().insert(seniority.clone());
                touched.services.extend(claimants(&self.claims, &address));
            }
            self.scopes.entry(spec.scope.clone()).or_default().insert(name.clone());
        }
        touched.services.insert(name.clone());
        self.services.insert(name.clone(), KnownService { source: source.clone(), seniority, spec });
    }

    /// Repeats the decisions for what was touched, and for everything that depends on it.
    fn decide(&mut self, touched: &mut Touched) {
        for known in touched.services.iter().filter_map(|name| self.services.get(name)) {
            touched.scopes.extend(known.spec.as_ref().map(|spec| spec.scope.clone()));
        }
        for scope in &touched.scopes {
            touched.services.extend(self.scopes.get(scope).into_iter().flatten().cloned());
        }
        let services: Vec<ObjectName> = touched.services.iter().cloned().collect();
        services.iter().for_each(|name| self.withdraw(name, touched));
        services.iter().for_each(|name| self.publish(name, touched));
        touched.scopes.iter().for_each(|scope| self.unite(scope));
        for backend in &touched.backends {
            let is_in_pool = self.pools_with.contains_key(backend);
            if is_in_pool {
                self.desired.backends.insert(backend.clone(), self.local.contains_key(&backend.as_listed()));
            } else {
                self.desired.backends.remove(backend);
            }
            let Desired { others, terminating, .. } = &mut self.desired;
            set_member(others, backend, !is_in_pool && self.listed.contains_key(backend));
            set_member(terminating, backend, self.terminating.contains_key(backend));
        }
    }

    /// Removes the decisions for a service.
    fn withdraw(&mut self, name: &ObjectName, touched: &mut Touched) {
        let Some(KnownService { seniority, spec: Some(spec), .. }) = self.services.get(name) else { return };
        self.problems.remove(&Subject::Frontends(seniority.clone()));
        for Claim { address, .. } in claims(spec, &self.node) {
            if self.desired.frontends.get(&address).is_some_and(|frontend| frontend.internal.pool.service == *name) {
                self.desired.frontends.remove(&address);
            }
        }
        self.desired.ranges.remove(name);
        self.desired.health_checks.remove(name);
        let pools: Vec<PoolName> = pools(&self.desired, name).map(|(pool, _)| pool.clone()).collect();
        for pool in pools.iter().filter_map(|pool| self.desired.pools.remove(pool)) {
            for backend in pool.members.into_keys() {
                discount(&mut self.pools_with, &backend);
                touched.backends.insert(backend);
            }
        }
    }

    /// Makes the decisions for a service.
    fn publish(&mut self, name: &ObjectName, touched: &mut Touched) {
        let Some(KnownService { source, seniority, spec: Some(spec) }) = self.services.get(name) else { return };
        let mut problems = Vec::new();
        let mut report = Report::new("Service", name, source, &mut problems);
        let won = self.won(spec, seniority, &mut report);
        let slices = self.slices_of.get(name).into_iter().flatten();
        let slices: Vec<&Slice> = slices.filter_map(|slice| self.slices.get(slice)?.slice.as_ref()).collect();
        let apart = endpoints::told_apart(&slices);
        let slices = apart.as_ref().map_or(slices, |apart| apart.iter().collect());
        let outcome = frontends::decide(name, spec, &won, slices.iter().copied(), &self.node, &mut report);
        let Outcome { frontends, pools, ranges, health_check } = outcome;
        for backend in pools.values().flat_map(|pool| pool.members.keys()) {
            *self.pools_with.entry(backend.clone()).or_default() += 1;
            touched.backends.insert(backend.clone());
        }
        self.desired.frontends.extend(frontends);
        self.desired.pools.extend(pools);
        self.desired.ranges.extend((!ranges.is_empty()).then(|| (name.clone(), ranges)));
        self.desired.health_checks.extend(health_check.map(|check| (name.clone(), check)));
        let subject = Subject::Frontends(seniority.clone());
        self.note(subject, problems);
    }

    /// The addresses that a service gets. Reports taken addresses, but of a node port only one for each other service.
    fn won<'a>(&'a self, spec: &'a ServiceSpec, seniority: &Seniority, report: &mut Report<'_>) -> Vec<Claim<'a>> {
        let mut won = Vec::new();
        let mut reported = BTreeSet::new();
        for claim in claims(spec, &self.node) {
            let winner = self.claims.get(&claim.address).and_then(BTreeSet::first).unwrap_or(seniority);
            if winner == seniority {
                won.push(claim);
            } else if !claim.is_node_port() {
                let message =
                    format!("{} is taken by service {}; this service does not get it", claim.address, winner.2);
                report.error(format!("spec.ports[{}]", claim.index), message);
            } else if reported.insert((claim.index, &winner.2)) {
                let message = format!("taken by service {}; this service does not get it", winner.2);
                let (address, field) = (claim.address, format!("spec.ports[{}].nodePort", claim.index));
                report.error(field, format!("{}/{} is {message}", address.port, address.protocol.name()));
            }
        }
        won
    }

    /// Decides the union of a scope's pools, and reports services of a group that disagree.
    fn unite(&mut self, scope: &Scope) {
        let services: Vec<ObjectName> = self.scopes.get(scope).into_iter().flatten().cloned().collect();
        let pools: Vec<(Family, &Pool)> = (services.iter().flat_map(|service| pools(&self.desired, service)))
            .filter(|(_, pool)| pool.affinity.is_some())
            .map(|(name, pool)| (name.family, pool))
            .collect();
        match union(&pools) {
            Some(union) => _ = self.desired.unions.insert(scope.clone(), union),
            None => _ = self.desired.unions.remove(scope),
        }
        if matches!(scope, Scope::Group(_)) {
            let first = services.first();
            services.iter().for_each(|name| self.compare(name, first.unwrap_or(name)));
        }
    }

    /// Reports a service that treats pins differently from the first one of its group.
    fn compare(&mut self, name: &ObjectName, first: &ObjectName) {
        let spec = |name| self.services.get(name).and_then(|known| known.spec.as_ref());
        let (Some(known), Some(own), Some(other)) = (self.services.get(name), spec(name), spec(first)) else { return };
        let mut problems = Vec::new();
        if let Some(message) = disagreement(own, (first, other)) {
            Report::new("Service", name, &known.source, &mut problems).warning("metadata.annotations", message);
        }
        self.note(Subject::InGroup(name.clone()), problems);
    }

    fn note(&mut self, subject: Subject, problems: Vec<Problem>) {
        if problems.is_empty() {
            self.problems.remove(&subject);
        } else {
            self.problems.insert(subject, problems);
        }
    }

    /// The part of the desired state that was touched.
    fn change(&self, touched: Touched) -> Change {
        let Touched { services, scopes, backends } = touched;
        let Desired { coexists, shadow, .. } = self.desired;
        let mut desired = Desired { coexists, shadow, ..Desired::default() };
        for name in &services {
            let spec = self.services.get(name).and_then(|known| known.spec.as_ref());
            for Claim { address, .. } in spec.into_iter().flat_map(|spec| claims(spec, &self.node)) {
                let frontend = self.desired.frontends.get(&address);
                let own = frontend.filter(|frontend| frontend.internal.pool.service == *name);
                desired.frontends.extend(own.map(|frontend| (address, frontend.clone())));
            }
            let ranges = self.desired.ranges.get(name);
            desired.ranges.extend(ranges.map(|ranges| (name.clone(), ranges.clone())));
            let check = self.desired.health_checks.get(name);
            desired.health_checks.extend(check.map(|check| (name.clone(), check.clone())));
            desired.pools.extend(pools(&self.desired, name).map(|(name, pool)| (name.clone(), pool.clone())));
        }
        let unions = scopes.iter().filter_map(|scope| self.desired.unions.get_key_value(scope));
        desired.unions.extend(unions.map(|(scope, union)| (scope.clone(), union.clone())));
        let mut gone = BTreeSet::new();
        for backend in backends {
            let local = self.desired.backends.get(&backend);
            set_member(&mut desired.terminating, &backend, self.desired.terminating.contains(&backend));
            desired.backends.extend(local.map(|local| (backend.clone(), *local)));
            if self.desired.others.contains(&backend) {
                desired.others.insert(backend);
            } else if local.is_none() {
                gone.insert(backend);
            }
        }
        let groups = scopes.into_iter().filter_map(|scope| match scope {
            Scope::Group(name) => Some(name),
            Scope::Service(_) => None,
        });
        Change { services, groups: groups.collect(), gone, desired }
    }
}

/// The services that claim an address.
fn claimants(
    claims: &BTreeMap<FrontendAddress, BTreeSet<Seniority>>,
    address: &FrontendAddress,
) -> impl Iterator<Item = ObjectName> {
    claims.get(address).into_iter().flatten().map(|(_, _, name)| name.clone())
}

/// The pools of a service.
fn pools<'a>(desired: &'a Desired, service: &ObjectName) -> impl Iterator<Item = (&'a PoolName, &'a Pool)> {
    let service = service.clone();
    let first = PoolName {
        service: service.clone(),
        port: String::new(),
        protocol: Protocol::Tcp,
        family: Family::V4,
        reach: Reach::Cluster,
    };
    desired.pools.range(first..).take_while(move |(name, _)| name.service == service)
}

/// The names of objects that were added, removed or changed. Objects that are equal are shared from here on.
fn differing<K, T: PartialEq>(
    former: &mut BTreeMap<ObjectName, K>,
    source: impl Fn(&mut K) -> &mut Sourced<T>,
    now: &BTreeMap<ObjectName, Sourced<T>>,
) -> Vec<ObjectName> {
    let mut differing = Vec::new();
    let mut now = now.iter().peekable();
    for (name, known) in former {
        while let Some((added, _)) = now.next_if(|(other, _)| *other < name) {
            differing.push(added.clone());
        }
        let known = source(known);
        match now.next_if(|(other, _)| *other == name) {
            Some((_, object)) if is_same(known, object) => {}
            Some((_, object)) if known == object => *known = object.clone(),
            _ => differing.push(name.clone()),
        }
    }
    differing.extend(now.map(|(name, _)| name.clone()));
    differing
}

fn is_same<T>(a: &Sourced<T>, b: &Sourced<T>) -> bool {
    Arc::ptr_eq(&a.object, &b.object) && a.origin == b.origin
}

/// Subtracts one from a count, and removes it if it is zero.
fn discount(counts: &mut BTreeMap<BackendName, u32>, of: &BackendName) {
    if let Some(count) = counts.get_mut(of) {
        *count -= 1;
        if *count == 0 {
            counts.remove(of);
        }
    }
}

/// Adds a backend to a set, or removes it.
fn set_member(set: &mut BTreeSet<BackendName>, backend: &BackendName, is_member: bool) {
    if is_member {
        set.insert(backend.clone());
    } else {
        set.remove(backend);
    }
}

/// Removes a value from a set, and the set if it is empty.
fn remove<K: Ord, V: Ord>(sets: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = sets.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            sets.remove(key);
        }
    }
}

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
fn union(pools: &[(Family, &Pool)]) -> Option<BTreeMap<BackendName, bool>> {
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
fn disagreement(spec: &ServiceSpec, (first_name, first): (&ObjectName, &ServiceSpec)) -> Option<String> {
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
        .then(|| format!("in group {group}, these annotations differ from service {first_name}: {differing}; each service keeps its own values"))
}

#[cfg(test)]
pub(crate) mod tests;
