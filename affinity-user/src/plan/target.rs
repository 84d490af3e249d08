//! What the store should hold: [`Desired`], with numbers.
//!
//! Existing records keep their numbers. If there is no space, a pool keeps the slots that it has, and their members stay ready.
//! A pool without slots is not published. Both cases are reported.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use affinity_common::abi::{
    AFFINITY, Address, BACKEND_TERMINATING, Backend, COEXIST, DROP_IF_NO_LOCAL, Frontend, FrontendKey, MASQUERADE,
    MEMBER_DRAINING, MEMBER_READY, Member, MemberKey, NODE, NameKey, NameKind, Node, PODS, Port, RANGES, RangeKey,
    SHADOW, SHARED, SPLIT_SCOPE, Selection, UsageKey, UsageOf, V4, V6,
};
use ipnet::IpNet;

use super::{
    backends::{Claims, Leaving, identity},
    ids::Naming,
    maglev,
    state_index::StateIndex,
};
use crate::{
    desired::{self, BackendName, Desired, FrontendAddress, Masquerade, Pool, PoolName, Route, Scope},
    source::{ObjectName, Problem, Severity},
    store::Observed,
};

/// The state that `part` of a store should reach. `part` is the whole store, or what a change may touch.
pub(super) fn target(state_index: &StateIndex, part: &Observed, desired: &Desired) -> (Observed, Vec<Problem>) {
    let mut numbering = Numbering {
        state_index,
        desired,
        ids: Naming::new(&state_index.ids),
        backends: Claims::new(&state_index.backends, &state_index.observed.backends),
        extents: None,
        new_ranges: (0, 0),
        target: Observed::default(),
        problems: Vec::new(),
    };
    let indices = numbering.claim_backends();
    let mut records = BTreeMap::new();
    for (name, pool) in &desired.pools {
        if let Some(record) = numbering.pool(name, pool, &indices) {
            records.insert(name, record);
        }
    }
    numbering.unions(&indices);
    numbering.frontends(&records);
    numbering.ranges();
    numbering.target.node = desired.masquerade.as_ref().map_or(part.node, node);
    numbering.finish(part, &indices)
}

struct Numbering<'a> {
    state_index: &'a StateIndex,
    desired: &'a Desired,
    ids: Naming<'a>,
    backends: Claims<'a>,
    /// The free extents; computed when they are first needed.
    extents: Option<Extents>,
    /// How many of the ranges are new, in each family.
    new_ranges: (usize, usize),
    target: Observed,
    problems: Vec<Problem>,
}

/// A pool's extent.
#[derive(Default)]
struct Slots<'a> {
    first: u32,
    count: u32,
    /// The slots' content, if it is not what is wanted.
    held: &'a [u32],
}

type Indices<'a> = BTreeMap<&'a BackendName, u32>;

impl<'a> Numbering<'a> {
    /// Assigns each backend its index. Backends keep their indices; if there is no space, new backends get none.
    fn claim_backends(&mut self) -> Indices<'a> {
        let mut indices = BTreeMap::new();
        for (name, local) in &self.desired.backends {
            let terminating = self.desired.terminating.contains(name);
            if let Some(index) = self.backends.claim(name, *local, terminating) {
                indices.insert(name, index);
            }
        }
        indices
    }

    /// The flags that all frontends of this node have.
    fn node_flags(&self) -> u8 {
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        flag(self.desired.coexists, COEXIST) | flag(self.desired.shadow, SHADOW)
    }

    fn id(&mut self, kind: NameKind, name: &str) -> u32 {
        let key = self.ids.get(kind, name);
        self.target.names.insert(key, name.to_owned());
        key.id
    }

    fn scope(&mut self, scope: &Scope) -> u32 {
        match scope {
            Scope::Service(name) => self.id(NameKind::Service, &name.to_string()),
            Scope::Group(name) => self.id(NameKind::Group, &name.to_string()),
        }
    }

    /// The record of a pool's frontends; `None` if there is no space for its slots.
    fn pool(&mut self, name: &PoolName, pool: &Pool, indices: &Indices<'_>) -> Option<Frontend> {
        let service = self.id(NameKind::Service, &name.service.to_string());
        let id = self.id(NameKind::Pool, &name.to_string());
        let group = self.scope(&pool.scope);
        let Slots { first: slot_first, count: slot_count, held } =
            self.slots(name, id, &wanted_slots(pool, indices))?;
        self.members(name, id, pool, indices);
        self.hold(id, held);
        self.target.usage.insert(UsageKey { of: UsageOf::Service as u32, id: service });

        let shared = pool.affinity.is_some() && self.desired.unions.contains_key(&pool.scope);
        Some(Frontend {
            timeout_ns: pool.affinity.map_or(0, |affinity| affinity.timeout_ns),
            service,
            pool: id,
            group,
            own: if group == service { id } else { service },
            slot_first,
            slot_count,
            seed: pool.seed,
            select: pool.select as u8,
            timer: pool.affinity.map_or(0, |affinity| affinity.timer as u8),
            prefix: pool.prefix,
            flags: if pool.affinity.is_some() { AFFINITY } else { 0 }
                | if shared { SHARED } else { 0 }
                | self.node_flags(),
        })
    }

    fn members(&mut self, name: &PoolName, id: u32, pool: &Pool, indices: &Indices<'_>) {
        let mut left_out = 0;
        for (backend, member) in &pool.members {
            match indices.get(backend) {
                Some(index) => self.member(id, *index, member.port, member.ready),
                None => left_out += 1,
            }
        }
        if left_out > 0 {
            let all = self.state_index.capacity.backends;
            self.report(
                &name.service,
                format!(
                    "{left_out} endpoints of {name} are not used: all {all} backends are in use; raise --max-backends"
                ),
            );
        }
    }

    fn member(&mut self, pool: u32, backend: u32, port: u16, ready: bool) {
        let state = if ready { MEMBER_READY } else { MEMBER_DRAINING };
        let member = Member { generation: self.backends.generation(backend), port: Port::new(port), state, pad: 0 };
        self.target.members.insert(MemberKey { pool, backend }, member);
    }

    /// The extent that holds `wanted`: the pool's own if its content is the same, or a new one.
    fn slots(&mut self, name: &PoolName, pool: u32, wanted: &[u32]) -> Option<Slots<'a>> {
        if wanted.is_empty() {
            return Some(Slots::default());
        }
        let observed = &self.state_index.observed;
        let own: Vec<Slots<'a>> = (self.state_index.extents(pool).into_iter())
            .filter_map(|(first, count)| {
                let held = observed.slots.get(&first)?.get(..count as usize)?;
                Some(Slots { first, count, held })
            })
            .collect();
        let count = u32::try_from(wanted.len()).ok()?;
        let first = match own.iter().find(|slots| slots.held == wanted) {
            Some(same) => Some(same.first),
            None => self.free_extents().allocate(count),
        };
        if let Some(first) = first {
            self.target.slots.insert(first, wanted.to_vec());
            return Some(Slots { first, count, held: &[] });
        }
        let outcome = if own.is_empty() { "it is not published" } else { "its former members stay in use" };
        let all = self.state_index.capacity.slots;
        self.report(
            &name.service,
            format!("no room for {count} slots of {name} (of {all} slots); {outcome}; raise --max-slots"),
        );
        let kept = own.into_iter().next()?;
        self.target.slots.insert(kept.first, kept.held.to_vec());
        Some(kept)
    }

    fn free_extents(&mut self) -> &mut Extents {
        let StateIndex { observed, capacity, .. } = self.state_index;
        let used = observed.slots.iter().map(|(first, slots)| (*first, slots.len() as u32));
        self.extents.get_or_insert_with(|| Extents::new(used, capacity.slots))
    }

    /// Keeps the members that slots name as they are.
    fn hold(&mut self, pool: u32, slots: &[u32]) {
        for backend in slots.iter().copied().collect::<BTreeSet<u32>>() {
            let key = MemberKey { pool, backend };
            if let Some(member) = self.state_index.observed.members.get(&key) {
                let port = self.target.members.get(&key).map_or(member.port, |wanted| wanted.port);
                self.target.members.insert(key, Member { port, ..*member });
                self.backends.keep(backend);
            }
        }
    }

    fn unions(&mut self, indices: &Indices<'_>) {
        for (scope, union) in &self.desired.unions {
            let group = self.scope(scope);
            for (backend, ready) in union {
                if let Some(index) = indices.get(backend) {
                    self.member(group, *index, 0, *ready);
                }
            }
        }
    }

    fn frontends(&mut self, records: &BTreeMap<&PoolName, Frontend>) {
        for (FrontendAddress { ip, port, protocol }, frontend) in &self.desired.frontends {
            let (port, protocol) = (Port::new(*port), protocol.number());
            let Observed { frontends_v4, frontends_v6, .. } = &mut self.target;
            match ip {
                IpAddr::V4(ip) => {
                    let key = FrontendKey::new(V4(ip.octets()), port, protocol);
                    publish(frontends_v4, key, frontend, records);
                }
                IpAddr::V6(ip) => {
                    let key = FrontendKey::new(V6(ip.octets()), port, protocol);
                    publish(frontends_v6, key, frontend, records);
                }
            }
        }
        // A frontend is withheld if one of its pools has no space; then the slots of its other pool must not be used.
        let Observed { frontends_v4, frontends_v6, slots, .. } = &mut self.target;
        let published = frontends_v4.values().chain(frontends_v6.values());
        let named: BTreeSet<u32> =
            published.filter(|frontend| frontend.slot_count > 0).map(|frontend| frontend.slot_first).collect();
        slots.retain(|first, _| named.contains(first));
    }

    /// The addresses of this node, the pod networks, and the ranges of services.
    fn ranges(&mut self) {
        let Desired { node_addresses, pod_networks, ranges, .. } = self.desired;
        let left_out = node_addresses.iter().filter(|address| !self.range(NODE, &IpNet::from(**address))).count();
        if left_out > 0 {
            let message =
                format!("ranges table full: {left_out} of {} addresses of this node are ignored", node_addresses.len());
            self.problems.push(Problem::new(Severity::Error, None, message));
        }
        let left_out = pod_networks.iter().filter(|network| !self.range(PODS, network)).count();
        if left_out > 0 {
            let message =
                format!("ranges table full: {left_out} of {} networks of pods are ignored", pod_networks.len());
            self.problems.push(Problem::new(Severity::Error, None, message));
        }
        for (service, ranges) in ranges {
            let scope = self.id(NameKind::Service, &service.to_string());
            let left_out = ranges.iter().filter(|range| !self.range(scope, range)).count();
            if left_out > 0 {
                let all = self.state_index.capacity.ranges;
                let message = format!(
                    "ranges table full ({all}): {left_out} source ranges of the service are ignored, clients in them are dropped"
                );
                self.report(service, message);
            }
        }
    }

    /// Adds a range; false if there is no space for it in addition to all existing ones, wanted or not.
    fn range(&mut self, scope: u32, network: &IpNet) -> bool {
        let StateIndex { observed, capacity, .. } = self.state_index;
        let Observed { ranges_v4, ranges_v6, .. } = &mut self.target;
        match network {
            IpNet::V4(network) => {
                let key = RangeKey::new(scope, V4(network.addr().octets()), network.prefix_len());
                add_range(ranges_v4, &observed.ranges_v4, &mut self.new_ranges.0, capacity.ranges, key)
            }
            IpNet::V6(network) => {
                let key = RangeKey::new(scope, V6(network.addr().octets()), network.prefix_len());
                add_range(ranges_v6, &observed.ranges_v6, &mut self.new_ranges.1, capacity.ranges, key)
            }
        }
    }

    fn report(&mut self, service: &ObjectName, message: String) {
        self.problems.push(Problem::new(Severity::Error, None, message).of("Service", service));
    }

    fn finish(mut self, part: &Observed, indices: &Indices<'_>) -> (Observed, Vec<Problem>) {
        let key = |id| NameKey { kind: NameKind::Backend as u32, id };
        let Numbering { state_index, desired, .. } = self;
        let (records, in_use) =
            self.backends.finish(&part.backends, |index, record| leaving(state_index, part, desired, (index, record)));
        // A pod that has gone keeps its name until another pod gets its index: sessions and events still refer to it.
        for id in records.keys() {
            self.target.names.extend(part.names.get(&key(*id)).map(|name| (key(*id), name.clone())));
        }
        self.target.names.extend(indices.iter().map(|(name, id)| (key(*id), name.pod.to_string())));
        // A service, a pool and a group keep their names, and so their ids, while pins and flows refer to them. That is known
        // elsewhere: see `StateIndex::withdrawn`.
        let ids = part.names.iter().filter(|(key, _)| key.kind != NameKind::Backend as u32);
        for (key, name) in ids {
            self.target.names.entry(*key).or_insert_with(|| name.clone());
        }
        self.target.usage.extend(in_use.into_iter().map(|id| UsageKey { of: UsageOf::Backend as u32, id }));
        self.target.backends = records;
        (self.target, self.problems)
    }
}

/// What is known about a backend that is not desired. If only a part of the source was read, it may be alive.
fn leaving(state_index: &StateIndex, part: &Observed, desired: &Desired, (index, record): (u32, &Backend)) -> Leaving {
    let name = identity(&state_index.observed, index, record);
    let is_known = desired.known.is_none() && !desired.others.contains(&name);
    let was_terminating = record.flags & BACKEND_TERMINATING != 0;
    if is_known && (was_terminating || is_replaced(state_index, part, desired, &name)) {
        return Leaving::Dead;
    }
    Leaving::Alive { terminating: desired.terminating.contains(&name) }
}

/// Whether another pod has the address of a pod that no slice lists. Pods in the host's network share its address, so only an
/// address in a pod network is evidence.
fn is_replaced(state_index: &StateIndex, part: &Observed, desired: &Desired, name: &BackendName) -> bool {
    // The name of a pod contains a slash.
    let is_another = |other: &BackendName| other.pod.contains('/') && other.pod != name.pod;
    let first = BackendName { address: name.address, pod: Arc::default() };
    let desired_there = desired.backends.range(first..).map(|(other, _)| other);
    let mut desired_there = desired_there.take_while(|other| other.address == name.address);
    // Backends that a change does not touch are still desired.
    let is_untouched = |index| !state_index.backends.is_lingering(index) && !part.backends.contains_key(&index);
    let mut untouched = state_index.backends.at(name.address).filter(|(_, index)| is_untouched(*index));
    name.pod.contains('/')
        && (desired_there.any(is_another) || untouched.any(|(other, _)| is_another(other)))
        && (desired.pod_networks.iter().any(|network| network.contains(&name.address))
            || state_index.is_in_pod_network(name.address))
}

/// Inserts the records of a frontend; none if one of its pools is not published.
fn publish<A: Address>(
    frontends: &mut BTreeMap<FrontendKey<A>, Frontend>,
    key: FrontendKey<A>,
    desired::Frontend { internal, external, ranges }: &desired::Frontend,
    records: &BTreeMap<&PoolName, Frontend>,
) {
    let flag = |is_set, flag| if is_set { flag } else { 0 };
    let record = |route: &Route| {
        let record = records.get(&*route.pool)?;
        let own =
            flag(route.masquerade, MASQUERADE) | flag(route.drop_if_no_local, DROP_IF_NO_LOCAL) | flag(*ranges, RANGES);
        Some(Frontend { flags: record.flags | own, ..*record })
    };
    match (record(internal), external.as_ref().map(record)) {
        (Some(internal), None) => _ = frontends.insert(key, internal),
        (Some(internal), Some(Some(external))) => {
            frontends.insert(key, Frontend { flags: internal.flags | SPLIT_SCOPE, ..internal });
            frontends.insert(key.external(), external);
        }
        (None, _) | (_, Some(None)) => {}
    }
}

fn add_range<A: Address>(
    target: &mut BTreeSet<RangeKey<A>>,
    observed: &BTreeSet<RangeKey<A>>,
    new: &mut usize,
    capacity: u32,
    key: RangeKey<A>,
) -> bool {
    if !observed.contains(&key) && !target.contains(&key) {
        if observed.len() + *new >= capacity as usize {
            return false;
        }
        *new += 1;
    }
    target.insert(key);
    true
}

/// What masquerading uses, in the programs' format.
fn node(masquerade: &Masquerade) -> Node {
    let Masquerade { v4, v6, ports } = masquerade;
    Node {
        address_v6: v6.map_or_else(V6::default, |ip| V6(ip.octets())),
        address_v4: v4.map_or_else(V4::default, |ip| V4(ip.octets())),
        port_first: Port::new(*ports.start()),
        // At most 65,535: port 0 means no port.
        port_count: ports.len() as u16,
    }
}

/// The slots of a pool: one for each ready member, ordered by address, or a Maglev table of them.
fn wanted_slots(pool: &Pool, indices: &Indices<'_>) -> Vec<u32> {
    let ready: Vec<(IpAddr, u32)> = (pool.members.iter().filter(|(_, member)| member.ready))
        .filter_map(|(backend, _)| indices.get(backend).map(|index| (backend.address, *index)))
        .collect();
    match pool.select {
        Selection::Random | Selection::Least => ready.into_iter().map(|(_, index)| index).collect(),
        Selection::Consistent => {
            let addresses: Vec<IpAddr> = ready.iter().map(|(address, _)| *address).collect();
            maglev::table(&addresses).into_iter().map(|member| ready[member].1).collect()
        }
    }
}

/// The free ranges: first -> length. No two of them are adjacent.
#[derive(Debug)]
struct Extents {
    free: BTreeMap<u32, u32>,
}

impl Extents {
    /// The slots among `capacity` that the `used` ranges (first, length) do not cover.
    fn new(used: impl IntoIterator<Item = (u32, u32)>, capacity: u32) -> Self {
        let mut used: Vec<(u32, u32)> = used.into_iter().filter(|(_, length)| *length > 0).collect();
        used.sort_unstable();
        let mut free = BTreeMap::new();
        let mut end = 0;
        for (first, length) in used.into_iter().chain([(capacity, 0)]) {
            if first > end {
                free.insert(end, first.min(capacity) - end);
            }
            end = end.max(first.saturating_add(length)).min(capacity);
        }
        Self { free }
    }

    /// Takes the first free range of `length`, and returns its first slot; `None` if there is no such range.
    fn allocate(&mut self, length: u32) -> Option<u32> {
        let (first, free) = self.free.iter().find(|(_, free)| **free >= length).map(|(first, free)| (*first, *free))?;
        self.free.remove(&first);
        if free > length {
            self.free.insert(first + length, free - length);
        }
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ports_up_to_the_last_one() {
        for (ports, count) in [(1024..=29_999, 28_976), (60_000..=u16::MAX, 5_536), (1..=u16::MAX, u16::MAX)] {
            let node = node(&Masquerade { v4: None, v6: None, ports });
            assert_eq!(node.port_count, count);
        }
    }

    #[test]
    fn first_fit() {
        let mut extents = Extents::new([(2, 3), (7, 1), (8, 2)], 20);
        assert_eq!(extents.allocate(3), Some(10));
        assert_eq!(extents.allocate(2), Some(0));
        assert_eq!(extents.allocate(2), Some(5));
        assert_eq!(extents.allocate(8), None);
        assert_eq!(extents.allocate(7), Some(13));
        assert_eq!(extents.allocate(1), None);
    }

    proptest! {
        #[test]
        fn nothing_overlaps(used in prop::collection::vec((0u32..60, 0u32..9), 0..6), lengths in prop::collection::vec(1u32..9, 0..12)) {
            let mut taken = [false; 64];
            for (first, length) in &used {
                for slot in *first..(first + length).min(64) {
                    taken[slot as usize] = true;
                }
            }
            let mut extents = Extents::new(used, 64);
            for length in lengths {
                let fits = taken.windows(length as usize).any(|window| window.iter().all(|taken| !taken));
                let first = extents.allocate(length);
                prop_assert_eq!(first.is_some(), fits);
                for slot in first.map_or(0..0, |first| first..first + length) {
                    prop_assert!(!std::mem::replace(&mut taken[slot as usize], true));
                }
            }
        }
    }
}
