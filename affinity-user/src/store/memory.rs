//! A store in memory. Its tables are those of the packet pipeline in tests and in `affinity explain`.

use std::collections::BTreeMap;

use affinity_common::{
    abi::{Frontend, NameKey},
    model::Model,
};

use super::{Capacity, Observed, Op, Store, StoreError};

/// The model's tables, and the names, which the pipeline does not use.
#[derive(Debug, Clone)]
pub struct MemoryStore {
    /// The tables.
    pub model: Model,
    names: BTreeMap<NameKey, String>,
    capacity: Capacity,
}

impl MemoryStore {
    /// An empty store; each of the model's LRU tables has space for `entries`.
    #[must_use]
    pub fn new(capacity: Capacity, entries: usize) -> Self {
        Self { model: Model::new(entries), names: BTreeMap::new(), capacity }
    }

    /// The contents of a frontend's slots.
    fn slots(&self, frontend: &Frontend) -> Vec<u32> {
        let slots = frontend.slot_first..frontend.slot_first + frontend.slot_count;
        slots.map(|slot| self.model.slots.get(&slot).copied().unwrap_or(0)).collect()
    }
}

impl Store for MemoryStore {
    fn apply(&mut self, op: &Op) -> Result<(), StoreError> {
        let model = &mut self.model;
        match op {
            Op::PutName(key, name) => _ = self.names.insert(*key, name.clone()),
            Op::RemoveName(key) => _ = self.names.remove(key),
            Op::PutBackend(index, backend) => _ = model.backends.insert(*index, *backend),
            Op::PutMember(key, member) => _ = model.members.insert(*key, *member),
            Op::RemoveMember(key) => _ = model.members.remove(key),
            Op::WriteSlots { first, backends } => model.slots.extend((*first..).zip(backends.iter().copied())),
            Op::SetFilter(direction, bits) => model.filter.get_mut().extend(bits.iter().map(|bit| (*direction, *bit))),
            Op::PutUsage(key) => _ = model.usage.get_mut().entry(*key).or_default(),
            Op::RemoveUsage(key) => _ = model.usage.get_mut().remove(key),
            Op::PutNode(node) => model.node = *node,
            Op::PutRangeV4(key) => _ = model.ranges_v4.insert(*key),
            Op::PutRangeV6(key) => _ = model.ranges_v6.insert(*key),
            Op::RemoveRangeV4(key) => _ = model.ranges_v4.remove(key),
            Op::RemoveRangeV6(key) => _ = model.ranges_v6.remove(key),
            Op::PutFrontendV4(key, frontend) => _ = model.frontends_v4.insert(*key, *frontend),
            Op::PutFrontendV6(key, frontend) => _ = model.frontends_v6.insert(*key, *frontend),
            Op::RemoveFrontendV4(key) => _ = model.frontends_v4.remove(key),
            Op::RemoveFrontendV6(key) => _ = model.frontends_v6.remove(key),
            // There are no packets in flight.
            Op::Grace => {}
        }
        Ok(())
    }

    fn observe(&self) -> Result<Observed, StoreError> {
        let model = &self.model;
        let frontends = model.frontends_v4.values().chain(model.frontends_v6.values());
        let extents = frontends.filter(|frontend| frontend.slot_count > 0);
        Ok(Observed {
            frontends_v4: model.frontends_v4.clone(),
            frontends_v6: model.frontends_v6.clone(),
            ranges_v4: model.ranges_v4.clone(),
            ranges_v6: model.ranges_v6.clone(),
            node: model.node,
            slots: extents.map(|frontend| (frontend.slot_first, self.slots(frontend))).collect(),
            members: model.members.clone(),
            backends: model.backends.clone(),
            names: self.names.clone(),
            usage: model.usage.borrow().keys().copied().collect(),
        })
    }

    fn capacity(&self) -> Capacity {
        self.capacity
    }
}
