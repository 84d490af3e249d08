//! The targets of a plan: the kernel's maps, or the model's tables.
//!
//! A [`Store`] applies one [`Op`] at a time and reports what it holds ([`Observed`]). Every operation is idempotent: applying
//! it twice has the same result as applying it once.

pub mod kernel;
pub mod memory;

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::abi::{
    Backend, Direction, Frontend, FrontendKey, Member, MemberKey, NameKey, Node, RangeKey, UsageKey, V4, V6,
};

/// One step of a plan. The order of the steps makes a plan safe: see the `plan` module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Names an id or a backend index.
    PutName(NameKey, String),
    /// Removes a name.
    RemoveName(NameKey),
    /// Writes a backend's record: new, changed, or retired (an even generation).
    PutBackend(u32, Backend),
    /// Adds a member to a pool (or a group's union), or changes it.
    PutMember(MemberKey, Member),
    /// Removes a member.
    RemoveMember(MemberKey),
    /// Writes backend indices into the slots from `first` on.
    WriteSlots {
        /// First slot.
        first: u32,
        /// Backend indices.
        backends: Vec<u32>,
    },
    /// Sets bits of one part of the filter. Only the agent's sweep clears bits, when no flow needs them.
    SetFilter(Direction, Vec<u32>),
    /// Creates an entry for counts of a service or backend; keeps existing counts.
    PutUsage(UsageKey),
    /// Removes the counts of a service or backend.
    RemoveUsage(UsageKey),
    /// Sets what masquerading uses.
    PutNode(Node),
    /// Adds a range of IPv4 addresses to a scope.
    PutRangeV4(RangeKey<V4>),
    /// Adds a range of IPv6 addresses to a scope.
    PutRangeV6(RangeKey<V6>),
    /// Removes a range of IPv4 addresses.
    RemoveRangeV4(RangeKey<V4>),
    /// Removes a range of IPv6 addresses.
    RemoveRangeV6(RangeKey<V6>),
    /// Publishes or switches an IPv4 frontend: one atomic update.
    PutFrontendV4(FrontendKey<V4>, Frontend),
    /// Publishes or switches an IPv6 frontend: one atomic update.
    PutFrontendV6(FrontendKey<V6>, Frontend),
    /// Withdraws an IPv4 frontend.
    RemoveFrontendV4(FrontendKey<V4>),
    /// Withdraws an IPv6 frontend.
    RemoveFrontendV6(FrontendKey<V6>),
    /// Waits until no packet uses what earlier steps replaced.
    Grace,
}

/// Everything in a store that plans write. Sessions and flows are written by the programs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Observed {
    /// Frontends, IPv4.
    pub frontends_v4: BTreeMap<FrontendKey<V4>, Frontend>,
    /// Frontends, IPv6.
    pub frontends_v6: BTreeMap<FrontendKey<V6>, Frontend>,
    /// Ranges of addresses, IPv4.
    pub ranges_v4: BTreeSet<RangeKey<V4>>,
    /// Ranges of addresses, IPv6.
    pub ranges_v6: BTreeSet<RangeKey<V6>>,
    /// What masquerading uses; zero at first.
    pub node: Node,
    /// The slots of every extent that a frontend names: first slot -> backend indices.
    pub slots: BTreeMap<u32, Vec<u32>>,
    /// Members by pool or group.
    pub members: BTreeMap<MemberKey, Member>,
    /// Every backend record that was ever used; vacant ones keep their generation.
    pub backends: BTreeMap<u32, Backend>,
    /// Names of ids and backends.
    pub names: BTreeMap<NameKey, String>,
    /// Entries of `usage`.
    pub usage: BTreeSet<UsageKey>,
}

impl Observed {
    /// Updates this to what a store holds after `op`. Slots that no frontend names any more are removed at the next
    /// [`Op::Grace`].
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::PutName(key, name) => _ = self.names.insert(*key, name.clone()),
            Op::RemoveName(key) => _ = self.names.remove(key),
            Op::PutBackend(index, backend) => _ = self.backends.insert(*index, *backend),
            Op::PutMember(key, member) => _ = self.members.insert(*key, *member),
            Op::RemoveMember(key) => _ = self.members.remove(key),
            Op::WriteSlots { first, backends } => _ = self.slots.insert(*first, backends.clone()),
            Op::SetFilter(..) => {}
            Op::PutUsage(key) => _ = self.usage.insert(*key),
            Op::RemoveUsage(key) => _ = self.usage.remove(key),
            Op::PutNode(node) => self.node = *node,
            Op::PutRangeV4(key) => _ = self.ranges_v4.insert(*key),
            Op::PutRangeV6(key) => _ = self.ranges_v6.insert(*key),
            Op::RemoveRangeV4(key) => _ = self.ranges_v4.remove(key),
            Op::RemoveRangeV6(key) => _ = self.ranges_v6.remove(key),
            Op::PutFrontendV4(key, frontend) => _ = self.frontends_v4.insert(*key, *frontend),
            Op::PutFrontendV6(key, frontend) => _ = self.frontends_v6.insert(*key, *frontend),
            Op::RemoveFrontendV4(key) => _ = self.frontends_v4.remove(key),
            Op::RemoveFrontendV6(key) => _ = self.frontends_v6.remove(key),
            Op::Grace => self.forget_unnamed_slots(),
        }
    }

    fn forget_unnamed_slots(&mut self) {
        let frontends = self.frontends_v4.values().chain(self.frontends_v6.values());
        let named: BTreeSet<u32> =
            frontends.filter(|frontend| frontend.slot_count > 0).map(|frontend| frontend.slot_first).collect();
        self.slots.retain(|first, _| named.contains(first));
    }
}

/// A limit of the store that a plan must respect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    /// Entries of `backends`.
    pub backends: u32,
    /// Entries of `slots`.
    pub slots: u32,
    /// Entries of `ranges_v4`, and of `ranges_v6`.
    pub ranges: u32,
}

/// A step failed; the steps before it remain applied.
#[derive(Debug, thiserror::Error)]
#[error("{map}: {action}: {source}")]
pub struct StoreError {
    /// The map.
    pub map: &'static str,
    /// The failed action, with the name of the object.
    pub action: String,
    /// The system's error.
    pub source: std::io::Error,
}

/// A target of plans.
pub trait Store {
    /// Applies one step.
    ///
    /// # Errors
    /// [`StoreError`] if the step failed; then nothing of it is visible.
    fn apply(&mut self, op: &Op) -> Result<(), StoreError>;

    /// Reads everything that plans write.
    ///
    /// # Errors
    /// [`StoreError`] if a map could not be read.
    fn observe(&self) -> Result<Observed, StoreError>;

    /// The limits of its tables.
    fn capacity(&self) -> Capacity;
}
