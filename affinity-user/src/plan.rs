//! The difference between what a store holds and what it should hold, as steps in a safe order. Pure functions.
//!
//! A [`StateIndex`] mirrors the store. It plans for the whole desired state, or for a [`Change`] alone: the steps are the same,
//! but the cost of the latter depends only on what has changed.
//!
//! First [`target`] assigns numbers to the names in [`Desired`]. It keeps every id, backend index and extent of slots that is
//! already in use. Then the two states are compared, and the steps come in this order:
//!
//! 1. records that nothing refers to yet: names, usage entries, ranges, what masquerading uses, filter bits, new backends, new
//!    or better members;
//! 2. `SHARED`, on frontends of a group with pools that begin to differ: before any of them does;
//! 3. slots, into free extents;
//! 4. frontends: published or switched, each in one atomic update, the record for external clients before the record for all
//!    clients that refers to it; then withdrawn;
//! 5. [`Op::Grace`]: from here on no packet uses what step 4 replaced;
//! 6. records for external clients that nothing refers to any more are withdrawn, followed by another [`Op::Grace`];
//! 7. records that nothing refers to any more: members drain or leave, backends linger or are retired, ranges and usage entries
//!    are removed.
//!
//! So after every prefix of a plan, each slot of a frontend holds a ready member of its pool, and a client with a pod that is
//! ready before and after the plan finds it ready throughout. A client that may use a frontend before and after may use it
//! throughout; a client that may use it neither before nor after never may.
//!
//! A plan that fails in the middle leaves such a state too: observe and plan again. (Wait a moment first: a failed plan did not
//! reach its grace period.) If space was short, the next plan may use what this one freed: plan until no steps are left.

mod backends;
mod ids;
mod keep;
mod maglev;
mod state_index;
mod target;

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::abi::{
    Address, BACKEND_LINGERING, Backend, Direction, Frontend, FrontendKey, MEMBER_READY, Member, MemberKey, SCOPE_ANY,
    SHARED, V4, V6, filter_bit,
};

pub(crate) use self::backends::retired;
pub use self::state_index::StateIndex;
use crate::{
    desired::{Change, Desired},
    source::Problem,
    store::{Capacity, Observed, Op},
};

/// The steps from `observed` to `desired`: see [`StateIndex::plan`].
#[must_use]
pub fn plan(observed: &Observed, desired: &Desired, capacity: Capacity) -> (Vec<Op>, Vec<Problem>) {
    StateIndex::new(observed.clone(), capacity).plan(desired)
}

impl StateIndex {
    /// The steps from here to `desired`; empty if there is nothing to do. Reports what does not fit. What could not be
    /// published for lack of space stays as it is. If only a part of the source was read, everything that `desired` does not
    /// know about stays as well.
    #[must_use]
    pub fn plan(&self, desired: &Desired) -> (Vec<Op>, Vec<Problem>) {
        let kept = desired.known.as_ref().map(|known| keep::keep(&self.observed, desired, known));
        let (target, problems) = target::target(self, &self.observed, kept.as_ref().unwrap_or(desired));
        (steps(&self.observed, &target), problems)
    }

    /// The same steps, if the last plan was carried out completely without a report, and `change` is all that has changed
    /// since. If this plan reports anything, it is void: plan in full.
    #[must_use]
    pub fn plan_change(&self, change: &Change) -> (Vec<Op>, Vec<Problem>) {
        let mut touched = self.touched(change);
        let (target, problems) = target::target(self, &touched, &change.desired);
        // Indices that are reused.
        target.backends.keys().for_each(|index| self.copy_backend(*index, &mut touched));
        (steps(&touched, &target), problems)
    }
}

/// The steps for the frontends of one family.
#[derive(Default)]
struct Switch {
    share: Vec<Op>,
    /// Records for external clients; applied before `put`.
    put_external: Vec<Op>,
    put: Vec<Op>,
    remove: Vec<Op>,
    /// Records for external clients; applied when no packet is sent to them any more.
    remove_external: Vec<Op>,
    /// Whether a record was replaced, so that packets may still use the old one.
    replaced: bool,
}

fn steps(observed: &Observed, target: &Observed) -> Vec<Op> {
    let v4 = switch(&observed.frontends_v4, &target.frontends_v4, Op::PutFrontendV4, Op::RemoveFrontendV4);
    let v6 = switch(&observed.frontends_v6, &target.frontends_v6, Op::PutFrontendV6, Op::RemoveFrontendV6);
    let mut late = retire_members(observed, target);
    late.extend(retire_rest(observed, target));
    let external: Vec<Op> = v4.remove_external.into_iter().chain(v6.remove_external).collect();
    let is_used = v4.replaced || v6.replaced || !v4.remove.is_empty() || !v6.remove.is_empty();
    let grace = is_used || !external.is_empty() || !late.is_empty();

    let mut steps = prepare(observed, target);
    steps.extend(v4.share.into_iter().chain(v6.share));
    steps.extend(new_slots(observed, target));
    steps.extend(v4.put_external.into_iter().chain(v6.put_external));
    steps.extend(v4.put.into_iter().chain(v6.put));
    steps.extend(v4.remove.into_iter().chain(v6.remove));
    steps.extend(grace.then_some(Op::Grace));
    let another = !external.is_empty();
    steps.extend(external);
    steps.extend(another.then_some(Op::Grace));
    steps.extend(late);
    steps
}

/// Step 1: records that nothing refers to yet.
fn prepare(observed: &Observed, target: &Observed) -> Vec<Op> {
    let mut steps = Vec::new();
    for (key, name) in changed(&observed.names, &target.names) {
        steps.push(Op::PutName(*key, name.clone()));
    }
    steps.extend(target.usage.difference(&observed.usage).map(|key| Op::PutUsage(*key)));
    steps.extend(target.ranges_v4.difference(&observed.ranges_v4).map(|key| Op::PutRangeV4(*key)));
    steps.extend(target.ranges_v6.difference(&observed.ranges_v6).map(|key| Op::PutRangeV6(*key)));
    steps.extend((target.node != observed.node).then_some(Op::PutNode(target.node)));
    for (direction, bits) in filter_bits(observed, target) {
        if !bits.is_empty() {
            steps.push(Op::SetFilter(direction, bits.into_iter().collect()));
        }
    }
    for (index, backend) in changed(&observed.backends, &target.backends) {
        if !leaves(backend) {
            steps.push(Op::PutBackend(*index, *backend));
        }
    }
    for (key, member) in changed(&observed.members, &target.members) {
        if !is_demotion(observed.members.get(key), member) {
            steps.push(Op::PutMember(*key, *member));
        }
    }
    steps
}

/// Bits of new frontends and members, for the two parts of the filter that a plan sets. Existing records have their bits set.
fn filter_bits(observed: &Observed, target: &Observed) -> [(Direction, BTreeSet<u32>); 2] {
    let mut forward = BTreeSet::new();
    forward.extend(frontend_bits(&observed.frontends_v4, &target.frontends_v4));
    forward.extend(frontend_bits(&observed.frontends_v6, &target.frontends_v6));
    let protocols: BTreeMap<u32, u8> =
        (target.frontends_v4.iter().map(|(key, frontend)| (frontend.pool, key.protocol)))
            .chain(target.frontends_v6.iter().map(|(key, frontend)| (frontend.pool, key.protocol)))
            .collect();

    let mut reverse = BTreeSet::new();
    for (key, member) in changed(&observed.members, &target.members) {
        let same = |other: &Member| (other.port, other.generation) == (member.port, member.generation);
        // Members under a group's id serve no port of their own.
        let (Some(protocol), Some(backend)) = (protocols.get(&key.pool), target.backends.get(&key.backend)) else {
            continue;
        };
        if !observed.members.get(key).is_some_and(same) {
            reverse.insert(member_bit(backend.address, member, *protocol));
        }
    }
    [(Direction::Dnat, forward), (Direction::RevDnat, reverse)]
}

fn frontend_bits<A: Address>(
    observed: &BTreeMap<FrontendKey<A>, Frontend>,
    target: &BTreeMap<FrontendKey<A>, Frontend>,
) -> impl Iterator<Item = u32> {
    let new = target.keys().filter(|key| key.scope == SCOPE_ANY && !observed.contains_key(key));
    new.map(|key| filter_bit(key.address, key.port, key.protocol))
}

/// The filter bit of a member's replies. Its address is hashed in its own family.
fn member_bit(mapped: [u8; 16], member: &Member, protocol: u8) -> u32 {
    let v4 = V4::from_mapped(mapped);
    if v4.to_mapped() == mapped {
        filter_bit(v4, member.port, protocol)
    } else {
        filter_bit(V6::from_mapped(mapped), member.port, protocol)
    }
}

/// Steps 2, 4 and 6 of one family.
fn switch<A: Address>(
    observed: &BTreeMap<FrontendKey<A>, Frontend>,
    target: &BTreeMap<FrontendKey<A>, Frontend>,
    put: fn(FrontendKey<A>, Frontend) -> Op,
    remove: fn(FrontendKey<A>) -> Op,
) -> Switch {
    let mut switch = Switch::default();
    for (key, new) in changed(observed, target) {
        let puts = if key.scope == SCOPE_ANY { &mut switch.put } else { &mut switch.put_external };
        let Some(old) = observed.get(key) else {
            puts.push(put(*key, *new));
            continue;
        };
        switch.replaced = true;
        let shared = Frontend { flags: old.flags | SHARED, ..*old };
        if new.flags & SHARED != 0 && old.group == new.group && shared != *old {
            switch.share.push(put(*key, shared));
        }
        if shared != *new {
            puts.push(put(*key, *new));
        }
    }
    for key in observed.keys().filter(|key| !target.contains_key(key)) {
        let removes = if key.scope == SCOPE_ANY { &mut switch.remove } else { &mut switch.remove_external };
        removes.push(remove(*key));
    }
    switch
}

/// Step 3. Slots that a frontend already names are never rewritten.
fn new_slots(observed: &Observed, target: &Observed) -> Vec<Op> {
    let changed = changed(&observed.slots, &target.slots);
    changed.map(|(first, backends)| Op::WriteSlots { first: *first, backends: backends.clone() }).collect()
}

/// Step 7, for members.
fn retire_members(observed: &Observed, target: &Observed) -> Vec<Op> {
    let demoted = changed(&observed.members, &target.members)
        .filter(|(key, member)| is_demotion(observed.members.get(key), member))
        .map(|(key, member)| Op::PutMember(*key, *member));
    let gone = observed.members.keys().filter(|key| !target.members.contains_key(key));
    demoted.chain(gone.map(|key: &MemberKey| Op::RemoveMember(*key))).collect()
}

/// Step 7, for everything except members.
fn retire_rest(observed: &Observed, target: &Observed) -> Vec<Op> {
    let left = changed(&observed.backends, &target.backends).filter(|(_, backend)| leaves(backend));
    let mut steps: Vec<Op> = left.map(|(index, backend)| Op::PutBackend(*index, *backend)).collect();
    steps.extend(observed.ranges_v4.difference(&target.ranges_v4).map(|key| Op::RemoveRangeV4(*key)));
    steps.extend(observed.ranges_v6.difference(&target.ranges_v6).map(|key| Op::RemoveRangeV6(*key)));
    steps.extend(observed.usage.difference(&target.usage).map(|key| Op::RemoveUsage(*key)));
    let names = observed.names.keys().filter(|key| !target.names.contains_key(key));
    steps.extend(names.map(|key| Op::RemoveName(*key)));
    steps
}

/// Whether a backend is retired, or lingers.
const fn leaves(backend: &Backend) -> bool {
    backend.generation.is_multiple_of(2) || backend.flags & BACKEND_LINGERING != 0
}

/// Whether a member stops taking connections: slots may name it until they are switched.
fn is_demotion(old: Option<&Member>, new: &Member) -> bool {
    old.is_some_and(|old| old.state == MEMBER_READY) && new.state != MEMBER_READY
}

/// The entries of `target` that are new or different.
fn changed<'a, K: Ord, V: PartialEq>(
    observed: &'a BTreeMap<K, V>,
    target: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    target.iter().filter(|(key, value)| observed.get(key) != Some(value))
}

#[cfg(test)]
mod tests;
