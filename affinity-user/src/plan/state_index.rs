//! What a store holds, with the indices that the next plan needs.
//!
//! A [`StateIndex`] is a function of [`Observed`] only: each completed step is applied here, with the same result as reading
//! the store again. So the cost of a plan for a few services depends only on these services, whatever else the store holds.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use affinity_common::abi::{
    Address, Backend, Frontend, FrontendKey, MemberKey, NameKey, NameKind, PODS, Port, RangeKey, UsageKey, UsageOf, V4,
    V6,
};
use ipnet::IpNet;

use super::{
    backends::{BackendAllocator, identity},
    ids::Ids,
};
use crate::{
    desired::{BackendName, Change},
    store::{Capacity, Observed, Op},
};

/// What a store holds, with the indices that plans need.
#[derive(Clone, PartialEq, Debug)]
pub struct StateIndex {
    pub(super) observed: Observed,
    pub(super) capacity: Capacity,
    pub(super) ids: Ids,
    pub(super) backends: BackendAllocator,
    frontends_v4: BTreeSet<(u32, FrontendKey<V4>)>,
    frontends_v6: BTreeSet<(u32, FrontendKey<V6>)>,
    /// Indexed by scope.
    ranges_v4: BTreeSet<(u32, RangeKey<V4>)>,
    ranges_v6: BTreeSet<(u32, RangeKey<V6>)>,
    /// How many frontends name an extent, by its first slot.
    named: BTreeMap<u32, u32>,
    /// Extents that lost a frontend since the last grace period.
    left: BTreeSet<u32>,
}

impl StateIndex {
    /// The index of a store that was just read.
    #[must_use]
    pub fn new(observed: Observed, capacity: Capacity) -> Self {
        let mut state_index = Self {
            ids: Ids::new(),
            backends: BackendAllocator::new(capacity.backends),
            capacity,
            frontends_v4: BTreeSet::new(),
            frontends_v6: BTreeSet::new(),
            ranges_v4: observed.ranges_v4.iter().map(|key| (key.scope, *key)).collect(),
            ranges_v6: observed.ranges_v6.iter().map(|key| (key.scope, *key)).collect(),
            observed,
            named: BTreeMap::new(),
            left: BTreeSet::new(),
        };
        let Self { observed, ids, backends, frontends_v4, frontends_v6, named, .. } = &mut state_index;
        for (key, name) in observed.names.iter().filter(|(key, _)| key.kind != NameKind::Backend as u32) {
            ids.insert(key, name);
        }
        observed.members.keys().for_each(|key| ids.count(key.pool));
        observed.ranges_v4.iter().for_each(|key| ids.count(key.scope));
        observed.ranges_v6.iter().for_each(|key| ids.count(key.scope));
        observed
            .frontends_v4
            .iter()
            .for_each(|(key, frontend)| insert_frontend(frontends_v4, ids, named, key, frontend));
        observed
            .frontends_v6
            .iter()
            .for_each(|(key, frontend)| insert_frontend(frontends_v6, ids, named, key, frontend));
        backends.insert_all(observed);
        state_index
    }

    /// What the store holds.
    #[must_use]
    pub const fn observed(&self) -> &Observed {
        &self.observed
    }

    /// Services, pools and groups of which only the name is left. No plan removes the name, because pins and flows may still
    /// refer to it, and apply again if it comes back.
    pub fn withdrawn(&self) -> impl Iterator<Item = (NameKey, &str)> {
        [NameKind::Service, NameKind::Pool, NameKind::Group]
            .into_iter()
            .flat_map(|kind| self.ids.unused(kind).map(move |(id, name)| (NameKey { kind: kind as u32, id }, name)))
    }

    /// The backends that linger: index, identity and record.
    pub fn lingering(&self) -> impl Iterator<Item = (u32, BackendName, &Backend)> {
        let records = self.backends.lingering().filter_map(|index| Some((index, self.observed.backends.get(&index)?)));
        records.map(|(index, record)| (index, identity(&self.observed, index, record), record))
    }

    /// Whether an address is in a pod network.
    pub(super) fn is_in_pod_network(&self, address: IpAddr) -> bool {
        let v4 = ranges(&self.ranges_v4, PODS).map(|key| network(key.address.0, key.prefix_len));
        let v6 = ranges(&self.ranges_v6, PODS).map(|key| network(key.address.0, key.prefix_len));
        v4.chain(v6).flatten().any(|network| network.contains(&address))
    }

    /// Applies a step that was carried out.
    pub fn apply(&mut self, op: &Op) {
        if matches!(op, Op::Grace) {
            return self.forget_unnamed_slots();
        }
        self.remove_subject(op);
        self.observed.apply(op);
        self.enter_subject(op);
    }

    /// Removes from the indices what a step is about to change.
    fn remove_subject(&mut self, op: &Op) {
        let Self { observed, ids, backends, frontends_v4, frontends_v6, ranges_v4, ranges_v6, named, left, .. } = self;
        match op {
            Op::PutName(NameKey { kind, id }, _) | Op::RemoveName(NameKey { kind, id })
                if *kind == NameKind::Backend as u32 =>
            {
                backends.remove(observed, *id);
            }
            Op::PutName(key, _) | Op::RemoveName(key) => {
                if let Some(name) = observed.names.get(key) {
                    ids.remove(key, name);
                }
            }
            Op::PutBackend(index, _) => backends.remove(observed, *index),
            Op::PutMember(key, _) | Op::RemoveMember(key) => {
                if observed.members.contains_key(key) {
                    ids.discount(key.pool);
                }
            }
            Op::PutFrontendV4(key, _) | Op::RemoveFrontendV4(key) => {
                if let Some(frontend) = observed.frontends_v4.get(key) {
                    remove_frontend(frontends_v4, ids, (named, left), key, frontend);
                }
            }
            Op::PutFrontendV6(key, _) | Op::RemoveFrontendV6(key) => {
                if let Some(frontend) = observed.frontends_v6.get(key) {
                    remove_frontend(frontends_v6, ids, (named, left), key, frontend);
                }
            }
            Op::PutRangeV4(key) | Op::RemoveRangeV4(key) => remove_range(ranges_v4, ids, key),
            Op::PutRangeV6(key) | Op::RemoveRangeV6(key) => remove_range(ranges_v6, ids, key),
            Op::WriteSlots { .. }
            | Op::SetFilter(..)
            | Op::PutUsage(_)
            | Op::RemoveUsage(_)
            | Op::PutNode(_)
            | Op::Grace => {}
        }
    }

    /// The inverse, after the step.
    fn enter_subject(&mut self, op: &Op) {
        let Self { observed, ids, backends, frontends_v4, frontends_v6, ranges_v4, ranges_v6, named, .. } = self;
        match op {
            Op::PutName(NameKey { kind, id }, _) | Op::RemoveName(NameKey { kind, id })
                if *kind == NameKind::Backend as u32 =>
            {
                backends.insert(observed, *id);
            }
            Op::PutName(key, name) => ids.insert(key, name),
            Op::PutBackend(index, _) => backends.insert(observed, *index),
            Op::PutMember(key, _) => ids.count(key.pool),
            Op::PutRangeV4(key) => enter_range(ranges_v4, ids, key),
            Op::PutRangeV6(key) => enter_range(ranges_v6, ids, key),
            Op::PutFrontendV4(key, frontend) => insert_frontend(frontends_v4, ids, named, key, frontend),
            Op::PutFrontendV6(key, frontend) => insert_frontend(frontends_v6, ids, named, key, frontend),
            Op::RemoveName(_)
            | Op::RemoveMember(_)
            | Op::RemoveFrontendV4(_)
            | Op::RemoveFrontendV6(_)
            | Op::WriteSlots { .. }
            | Op::SetFilter(..)
            | Op::PutUsage(_)
            | Op::RemoveUsage(_)
            | Op::PutNode(_)
            | Op::RemoveRangeV4(_)
            | Op::RemoveRangeV6(_)
            | Op::Grace => {}
        }
    }

    fn forget_unnamed_slots(&mut self) {
        for first in std::mem::take(&mut self.left) {
            if !self.named.contains_key(&first) {
                self.observed.slots.remove(&first);
            }
        }
    }

    /// The extents that the frontends of a pool name: first slot and length.
    pub(super) fn extents(&self, pool: u32) -> BTreeSet<(u32, u32)> {
        let v4 = keys(&self.frontends_v4, pool).map(|key| &self.observed.frontends_v4[&key]);
        let v6 = keys(&self.frontends_v6, pool).map(|key| &self.observed.frontends_v6[&key]);
        let extents = v4.chain(v6).map(|frontend| (frontend.slot_first, frontend.slot_count));
        extents.filter(|(_, count)| *count > 0).collect()
    }

    /// The part of the store that a change may touch; everything else stays as it is.
    pub(super) fn touched(&self, change: &Change) -> Observed {
        let mut part = Observed::default();
        for service in &change.services {
            let service = service.to_string();
            if let Some(id) = self.ids.find(NameKind::Service, &service) {
                self.copy_scope(NameKind::Service, id, &mut part);
                self.copy_usage(UsageKey { of: UsageOf::Service as u32, id }, &mut part);
                part.ranges_v4.extend(ranges(&self.ranges_v4, id));
                part.ranges_v6.extend(ranges(&self.ranges_v6, id));
            }
            for pool in self.ids.pools(&service) {
                self.copy_scope(NameKind::Pool, pool, &mut part);
                self.copy_frontends(pool, &mut part);
            }
        }
        for group in &change.groups {
            if let Some(id) = self.ids.find(NameKind::Group, &group.to_string()) {
                self.copy_scope(NameKind::Group, id, &mut part);
            }
        }
        let backends = change.desired.backends.keys().chain(&change.desired.others).chain(&change.gone);
        for name in backends {
            // Includes backends that linger at the same addresses: another pod may have taken the address.
            let there = self.backends.at(name.address);
            let there = there.filter(|(other, index)| *other == name || self.backends.is_lingering(*index));
            there.for_each(|(_, index)| self.copy_backend(index, &mut part));
        }
        part
    }

    /// The name of an id, and its members.
    fn copy_scope(&self, kind: NameKind, id: u32, part: &mut Observed) {
        let key = NameKey { kind: kind as u32, id };
        part.names.extend(self.observed.names.get(&key).map(|name| (key, name.clone())));
        let members = MemberKey { pool: id, backend: 0 }..=MemberKey { pool: id, backend: u32::MAX };
        part.members.extend(self.observed.members.range(members));
    }

    fn copy_frontends(&self, pool: u32, part: &mut Observed) {
        let observed = &self.observed;
        part.frontends_v4.extend(keys(&self.frontends_v4, pool).map(|key| (key, observed.frontends_v4[&key])));
        part.frontends_v6.extend(keys(&self.frontends_v6, pool).map(|key| (key, observed.frontends_v6[&key])));
        for (first, _) in self.extents(pool) {
            part.slots.extend(observed.slots.get(&first).map(|slots| (first, slots.clone())));
        }
    }

    /// The record, name and usage entry of a backend's index.
    pub(super) fn copy_backend(&self, id: u32, part: &mut Observed) {
        part.backends.extend(self.observed.backends.get(&id).map(|record| (id, *record)));
        let key = NameKey { kind: NameKind::Backend as u32, id };
        part.names.extend(self.observed.names.get(&key).map(|name| (key, name.clone())));
        self.copy_usage(UsageKey { of: UsageOf::Backend as u32, id }, part);
    }

    fn copy_usage(&self, key: UsageKey, part: &mut Observed) {
        part.usage.extend(self.observed.usage.get(&key));
    }
}

/// The frontends of a pool.
fn keys<A: Address>(
    frontends: &BTreeSet<(u32, FrontendKey<A>)>,
    pool: u32,
) -> impl Iterator<Item = FrontendKey<A>> + '_ {
    let least = FrontendKey::new(A::from_mapped([0; 16]), Port::new(0), 0);
    frontends.range((pool, least)..).take_while(move |(of, _)| *of == pool).map(|(_, key)| *key)
}

/// The ranges of a scope.
fn ranges<A: Address>(ranges: &BTreeSet<(u32, RangeKey<A>)>, scope: u32) -> impl Iterator<Item = RangeKey<A>> + '_ {
    let least = RangeKey { prefix_len: 0, scope: 0, address: A::from_mapped([0; 16]) };
    ranges.range((scope, least)..).take_while(move |(of, _)| *of == scope).map(|(_, key)| *key)
}

/// The network of a [`RangeKey`]; `None` if its length is none of its family: no agent wrote it.
pub(super) fn network(address: impl Into<IpAddr>, prefix_len: u32) -> Option<IpNet> {
    IpNet::new(address.into(), u8::try_from(prefix_len.checked_sub(u32::BITS)?).ok()?).ok()
}

fn enter_range<A: Address>(ranges: &mut BTreeSet<(u32, RangeKey<A>)>, ids: &mut Ids, key: &RangeKey<A>) {
    if ranges.insert((key.scope, *key)) {
        ids.count(key.scope);
    }
}

fn remove_range<A: Address>(ranges: &mut BTreeSet<(u32, RangeKey<A>)>, ids: &mut Ids, key: &RangeKey<A>) {
    if ranges.remove(&(key.scope, *key)) {
        ids.discount(key.scope);
    }
}

fn insert_frontend<A: Address>(
    frontends: &mut BTreeSet<(u32, FrontendKey<A>)>,
    ids: &mut Ids,
    named: &mut BTreeMap<u32, u32>,
    key: &FrontendKey<A>,
    frontend: &Frontend,
) {
    frontends.insert((frontend.pool, *key));
    ids_of(frontend).into_iter().for_each(|id| ids.count(id));
    if frontend.slot_count > 0 {
        *named.entry(frontend.slot_first).or_default() += 1;
    }
}

fn remove_frontend<A: Address>(
    frontends: &mut BTreeSet<(u32, FrontendKey<A>)>,
    ids: &mut Ids,
    (named, left): (&mut BTreeMap<u32, u32>, &mut BTreeSet<u32>),
    key: &FrontendKey<A>,
    frontend: &Frontend,
) {
    frontends.remove(&(frontend.pool, *key));
    ids_of(frontend).into_iter().for_each(|id| ids.discount(id));
    if frontend.slot_count > 0 {
        discount(named, frontend.slot_first);
        left.insert(frontend.slot_first);
    }
}

fn ids_of(frontend: &Frontend) -> [u32; 4] {
    let Frontend { service, pool, group, own, .. } = *frontend;
    [service, pool, group, own]
}

/// Subtracts one from a count, and removes it if it is zero.
pub(super) fn discount(counts: &mut BTreeMap<u32, u32>, of: u32) {
    if let std::collections::btree_map::Entry::Occupied(mut count) = counts.entry(of) {
        *count.get_mut() -= 1;
        if *count.get() == 0 {
            count.remove();
        }
    }
}
