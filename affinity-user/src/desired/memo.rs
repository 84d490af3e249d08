//! What was decided for a snapshot, kept so that the next one costs what has changed in it.
//!
//! A memo is a function of the last snapshot and nothing else: it makes no difference what came before.
//!
//! What a service gets depends on its own object and slices; on which of its addresses an older service claims, so that
//! all who claim an address are decided together; and on its group, so that the services of a group are as well.
//! Everything else stays as it was decided.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::{
    api::{core::v1::Service, discovery::v1::EndpointSlice},
    jiff::Timestamp,
};

use super::{
    BackendName, Desired, Family, FrontendAddress, Known, Options, Pool, PoolName, Protocol, Report, Scope, Services,
    endpoints::{self, Slice},
    groups, is_ours,
    service::{self, ServiceSpec},
};
use crate::source::{ObjectName, Problem, Snapshot, Sourced};

/// A part of what is desired that can be planned for by itself, as nothing outside of it has changed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Change {
    /// The services that this part is about, now or before.
    pub services: BTreeSet<ObjectName>,
    /// The groups that these services are in, now or before.
    pub groups: BTreeSet<ObjectName>,
    /// Backends that nothing desires any more.
    pub gone: BTreeSet<BackendName>,
    /// What is desired of these services and groups. All other backends whose place has changed are among its backends.
    pub desired: Desired,
}

/// Who may claim an address first: the oldest service, those without a date last; then by name.
type Seniority = (bool, Option<Timestamp>, ObjectName);

/// What a problem was found in, in the order in which problems are reported.
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
    /// What was read of it.
    slice: Option<Slice>,
    /// Whether its service is not ours: then it was not read.
    foreign: bool,
}

struct KnownService {
    source: Sourced<Service>,
    seniority: Seniority,
    spec: Option<ServiceSpec>,
}

/// What has to be decided anew.
#[derive(Default)]
struct Touched {
    services: BTreeSet<ObjectName>,
    scopes: BTreeSet<Scope>,
    backends: BTreeSet<BackendName>,
}

/// What was decided for the last snapshot.
pub struct Memo {
    options: Options,
    slices: BTreeMap<ObjectName, KnownSlice>,
    services: BTreeMap<ObjectName, KnownService>,
    slices_of: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
    claims: BTreeMap<FrontendAddress, BTreeSet<Seniority>>,
    scopes: BTreeMap<Scope, BTreeSet<ObjectName>>,
    /// How many pools a backend is in.
    pools_with: BTreeMap<BackendName, u32>,
    /// How many slices say that a backend is on this node.
    local: BTreeMap<BackendName, u32>,
    /// How many slices of services that are not ours list a backend.
    others: BTreeMap<BackendName, u32>,
    desired: Desired,
    problems: BTreeMap<Subject, Vec<Problem>>,
}

impl Memo {
    /// Of an empty snapshot.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let (beside, shadow) = (options.services != Services::All, options.shadow);
        Self {
            options,
            slices: BTreeMap::new(),
            services: BTreeMap::new(),
            slices_of: BTreeMap::new(),
            claims: BTreeMap::new(),
            scopes: BTreeMap::new(),
            pools_with: BTreeMap::new(),
            local: BTreeMap::new(),
            others: BTreeMap::new(),
            desired: Desired { beside, shadow, ..Desired::default() },
            problems: BTreeMap::new(),
        }
    }

    /// What the dataplane should hold for the last snapshot.
    #[must_use]
    pub const fn desired(&self) -> &Desired {
        &self.desired
    }

    /// The same, for good.
    #[must_use]
    pub fn into_desired(self) -> Desired {
        self.desired
    }

    /// What is wrong with the last snapshot.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }

    /// Decides for a snapshot. Returns what has changed; none where that cannot be told apart from all the rest, at the
    /// first snapshot and where the source was read in part only.
    pub fn update(&mut self, snapshot: &Snapshot) -> Option<Change> {
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
        let Some(KnownSlice { source, service, slice, foreign }) = self.slices.remove(name) else { return };
        for backend in foreign.then(|| endpoints::backends(name, &source.object)).into_iter().flatten() {
            discount(&mut self.others, &backend);
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
        let foreign = service.as_ref().is_some_and(|service| self.is_foreign(service));
        let mut slice = None;
        if foreign {
            for backend in endpoints::backends(name, &source.object) {
                touched.backends.insert(backend.clone());
                *self.others.entry(backend).or_default() += 1;
            }
        } else {
            let mut problems = Vec::new();
            let mut report = Report::new("EndpointSlice", name, source, &mut problems);
            slice = endpoints::read(name, &source.object, &self.options, &mut report);
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
        self.slices.insert(name.clone(), KnownSlice { source: source.clone(), service, slice, foreign });
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
        for (address, ..) in claims(&spec) {
            remove(&mut self.claims, &address, &seniority);
            touched.services.extend(self.claimants(&address));
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
            for (address, ..) in claims(spec) {
                self.claims.entry(address).or_default().insert(seniority.clone());
                touched.services.extend(self.claimants(&address));
            }
            self.scopes.entry(spec.scope.clone()).or_default().insert(name.clone());
        }
        touched.services.insert(name.clone());
        self.services.insert(name.clone(), KnownService { source: source.clone(), seniority, spec });
    }

    /// The services that claim an address.
    fn claimants(&self, address: &FrontendAddress) -> impl Iterator<Item = ObjectName> + use<'_> {
        self.claims.get(address).into_iter().flatten().map(|(_, _, name)| name.clone())
    }

    /// Decides anew what was touched, and all that hangs together with it.
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
            if self.pools_with.contains_key(backend) {
                self.desired.backends.insert(backend.clone(), self.local.contains_key(backend));
            } else {
                self.desired.backends.remove(backend);
            }
            if self.others.contains_key(backend) {
                self.desired.others.insert(backend.clone());
            } else {
                self.desired.others.remove(backend);
            }
        }
    }

    /// Takes away what was decided for a service.
    fn withdraw(&mut self, name: &ObjectName, touched: &mut Touched) {
        let Some(KnownService { seniority, spec: Some(spec), .. }) = self.services.get(name) else { return };
        self.problems.remove(&Subject::Frontends(seniority.clone()));
        for (address, ..) in claims(spec) {
            if self.desired.frontends.get(&address).is_some_and(|pool| pool.service == *name) {
                self.desired.frontends.remove(&address);
            }
        }
        let pools: Vec<PoolName> = pools(&self.desired, name).map(|(pool, _)| pool.clone()).collect();
        for pool in pools.iter().filter_map(|pool| self.desired.pools.remove(pool)) {
            for backend in pool.members.into_keys() {
                discount(&mut self.pools_with, &backend);
                touched.backends.insert(backend);
            }
        }
    }

    /// Decides what a service gets.
    fn publish(&mut self, name: &ObjectName, touched: &mut Touched) {
        let Some(KnownService { source, seniority, spec: Some(spec) }) = self.services.get(name) else { return };
        let mut problems = Vec::new();
        let mut report = Report::new("Service", name, source, &mut problems);
        for (address, index, port) in claims(spec) {
            let winner = self.claims.get(&address).and_then(BTreeSet::first).unwrap_or(seniority);
            if winner != seniority {
                let message = format!("{address} is taken by service {}; this one does not get it", winner.2);
                report.error(format!("spec.ports[{index}]"), message);
                continue;
            }
            let family = Family::of(address.ip);
            let pool = PoolName { service: name.clone(), port: port.label(), protocol: port.protocol, family };
            self.desired.frontends.insert(address, pool.clone());
            if self.desired.pools.contains_key(&pool) {
                continue;
            }
            let slices = self.slices_of.get(name).into_iter().flatten();
            let slices = slices.filter_map(|slice| self.slices.get(slice)?.slice.as_ref());
            let members = endpoints::members(slices, &pool, port.name.as_deref().unwrap_or(""), &mut report);
            for backend in members.keys() {
                *self.pools_with.entry(backend.clone()).or_default() += 1;
                touched.backends.insert(backend.clone());
            }
            self.desired.pools.insert(pool, spec.pool(family, members));
        }
        let subject = Subject::Frontends(seniority.clone());
        self.note(subject, problems);
    }

    /// Decides what the pools of a scope have in common, and what is wrong with that.
    fn unite(&mut self, scope: &Scope) {
        let services: Vec<ObjectName> = self.scopes.get(scope).into_iter().flatten().cloned().collect();
        let pools: Vec<(Family, &Pool)> = (services.iter().flat_map(|service| pools(&self.desired, service)))
            .filter(|(_, pool)| pool.affinity.is_some())
            .map(|(name, pool)| (name.family, pool))
            .collect();
        match groups::union(&pools) {
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
        if let Some(message) = groups::disagreement(own, (first, other)) {
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

    /// What was touched, as a part of what is desired.
    fn change(&self, touched: Touched) -> Change {
        let Touched { services, scopes, backends } = touched;
        let Desired { beside, shadow, .. } = self.desired;
        let mut desired = Desired { beside, shadow, ..Desired::default() };
        for name in &services {
            let spec = self.services.get(name).and_then(|known| known.spec.as_ref());
            for (address, ..) in spec.into_iter().flat_map(claims) {
                let pool = self.desired.frontends.get(&address).filter(|pool| pool.service == *name);
                desired.frontends.extend(pool.map(|pool| (address, pool.clone())));
            }
            desired.pools.extend(pools(&self.desired, name).map(|(name, pool)| (name.clone(), pool.clone())));
        }
        let unions = scopes.iter().filter_map(|scope| self.desired.unions.get_key_value(scope));
        desired.unions.extend(unions.map(|(scope, union)| (scope.clone(), union.clone())));
        let mut gone = BTreeSet::new();
        for backend in backends {
            let local = self.desired.backends.get(&backend);
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

/// The addresses that a service asks for, each with its port and that one's position in `spec.ports`.
fn claims(spec: &ServiceSpec) -> impl Iterator<Item = (FrontendAddress, usize, &service::Port)> {
    spec.ports.iter().flat_map(|(index, port)| {
        let address = |ip: &_| FrontendAddress { ip: *ip, port: port.number, protocol: port.protocol };
        spec.addresses.iter().map(move |ip| (address(ip), *index, port))
    })
}

/// The pools of a service.
fn pools<'a>(desired: &'a Desired, service: &ObjectName) -> impl Iterator<Item = (&'a PoolName, &'a Pool)> {
    let service = service.clone();
    let first = PoolName { service: service.clone(), port: String::new(), protocol: Protocol::Tcp, family: Family::V4 };
    desired.pools.range(first..).take_while(move |(name, _)| name.service == service)
}

/// The names of objects that were added, removed or changed. Those that are equal are shared from here on.
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

/// One less; none are not kept.
fn discount(counts: &mut BTreeMap<BackendName, u32>, of: &BackendName) {
    if let Some(count) = counts.get_mut(of) {
        *count -= 1;
        if *count == 0 {
            counts.remove(of);
        }
    }
}

/// Takes one out of a set; empty sets are not kept.
fn remove<K: Ord, V: Ord>(sets: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = sets.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            sets.remove(key);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
