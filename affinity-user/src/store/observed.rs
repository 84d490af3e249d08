//! Applies a step to what a store holds, so that the store need not be read again after each step.

use super::{Observed, Op};

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
        let named: std::collections::BTreeSet<u32> =
            frontends.filter(|frontend| frontend.slot_count > 0).map(|frontend| frontend.slot_first).collect();
        self.slots.retain(|first, _| named.contains(first));
    }
}
