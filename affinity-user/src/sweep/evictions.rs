//! Counts the pins that the kernel has dropped silently from a full table.
//!
//! Pins that were created before a pass began and not removed by its end must have been met in it: missing ones were evicted.
//! Pins that come or go during the pass make the estimate lower, never higher; the next pass makes up for it.

use std::collections::BTreeMap;

/// Counts of a group's pins at one moment. They only rise after the programs begin to count.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Counts {
    /// Created by packets or operators.
    pub(super) created: u64,
    /// Removed by the agent or operators.
    pub(super) removed: u64,
}

/// A pass's findings about a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Found {
    /// The counts when it began.
    pub(super) before: Counts,
    /// The counts when it ended.
    pub(super) after: Counts,
    /// Pins met.
    pub(super) live: u64,
}

#[derive(Clone, Copy, Debug)]
struct Group {
    /// Pins without a counted creation: those from before. The estimate is too low rather than too high.
    unseen: i128,
    created: u64,
    evicted: u64,
}

/// What is known about every group.
#[derive(Debug, Default)]
pub(super) struct Evictions {
    groups: BTreeMap<u32, Group>,
}

impl Evictions {
    /// Processes a pass's findings about a group, and returns how many new evictions they reveal.
    pub(super) fn update(&mut self, group: u32, found: &Found) -> u64 {
        let Found { before, after, live } = *found;
        let known = self.groups.get_mut(&group).filter(|known| known.created <= before.created);
        let Some(known) = known else {
            // The first pass, or the counters were reset: count from here on.
            let unseen = i128::from(live) + i128::from(before.removed) - i128::from(after.created);
            self.groups.insert(group, Group { unseen, created: after.created, evicted: 0 });
            return 0;
        };
        known.created = before.created;
        let expected = known.unseen + i128::from(before.created) - i128::from(after.removed);
        let evicted = u64::try_from(expected - i128::from(live)).unwrap_or(0);
        let new = evicted.saturating_sub(known.evicted);
        known.evicted += new;
        new
    }

    /// Forgets everything: what was created or removed is no longer known.
    pub(super) fn restart(&mut self) {
        self.groups.clear();
    }

    /// Forgets groups that no longer exist.
    pub(super) fn retain(&mut self, is_there: impl Fn(u32) -> bool) {
        self.groups.retain(|&group, _| is_there(group));
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn quiet(created: u64, removed: u64, live: u64) -> Found {
        let counts = Counts { created, removed };
        Found { before: counts, after: counts, live }
    }

    #[test]
    fn what_is_missing_was_evicted() {
        let mut evictions = Evictions::default();
        assert_eq!(evictions.update(1, &quiet(500, 0, 100)), 0, "what happened before is not known");
        assert_eq!(evictions.update(1, &quiet(600, 0, 200)), 0);
        assert_eq!(evictions.update(1, &quiet(700, 50, 250)), 0);
        assert_eq!(evictions.update(1, &quiet(1000, 50, 256)), 294);
        assert_eq!(evictions.update(1, &quiet(1000, 50, 256)), 0, "each is reported once");
        assert_eq!(evictions.update(1, &quiet(1010, 60, 256)), 0);
        assert_eq!(evictions.update(1, &quiet(5, 0, 5)), 0, "the counters began again");
        assert_eq!(evictions.update(1, &quiet(15, 0, 5)), 10);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Create,
        Remove,
        Evict,
        Begin,
        /// A pass meets each pin at some moment between its beginning and its end.
        End,
    }

    proptest! {
        /// Whatever happens during a pass, it never reports more evictions than there were. Once nothing changes any more, it
        /// has reported all except those of the first pass.
        #[test]
        fn evictions_are_never_overreported(steps in vec(prop_oneof![Just(Step::Create), Just(Step::Remove), Just(Step::Evict),
                Just(Step::Begin), Just(Step::End)], 0..200), seen in any::<u64>()) {
            let (mut counts, mut live, mut evicted, mut reported) = (Counts::default(), 0u64, 0u64, 0);
            let mut evictions = Evictions::default();
            let mut pass: Option<(Counts, u64, u64)> = None;
            for (at, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Create => { counts.created += 1; live += 1; }
                    Step::Remove if live > 0 => { counts.removed += 1; live -= 1; }
                    Step::Evict if live > 0 => { evicted += 1; live -= 1; }
                    Step::Begin => pass = Some((counts, live, live)),
                    Step::End => if let Some((before, _, most)) = pass.take() {
                        let created_meanwhile = counts.created - before.created;
                        // At least the pins that were there all the time, at most those that were there at any time.
                        let least = live.saturating_sub(created_meanwhile);
                        let most = most + created_meanwhile;
                        let met = least + (seen >> (at % 64)) % (most - least + 1);
                        reported += evictions.update(1, &Found { before, after: counts, live: met });
                    },
                    Step::Remove | Step::Evict => {}
                }
            }
            prop_assert!(reported <= evicted, "{reported} of {evicted}");
        }
    }
}
