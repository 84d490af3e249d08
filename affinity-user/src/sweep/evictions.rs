//! How many pins the kernel has dropped from a full table, without a word.
//!
//! Of the pins that were created before a pass began, those that were not removed by its end must have been met in it: what
//! is missing was evicted. Pins that come or go during the pass make the estimate smaller, never larger; the next pass
//! makes up for it.

use std::collections::BTreeMap;

/// Counts of a group's pins at a moment; rising since the programs began to count.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Counts {
    /// Created by packets or operators.
    pub(super) created: u64,
    /// Removed by the agent or operators.
    pub(super) removed: u64,
}

/// What a pass found of a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Found {
    /// When it began.
    pub(super) before: Counts,
    /// When it ended.
    pub(super) after: Counts,
    /// Pins met.
    pub(super) live: u64,
}

#[derive(Clone, Copy, Debug)]
struct Group {
    /// Pins whose creation was not seen: those of before, or too many rather than too few.
    unseen: i128,
    created: u64,
    evicted: u64,
}

/// What is known of every group.
#[derive(Debug, Default)]
pub(super) struct Evictions {
    groups: BTreeMap<u32, Group>,
}

impl Evictions {
    /// Takes in what a pass found of a group, and returns how many evictions came to light.
    pub(super) fn update(&mut self, group: u32, found: &Found) -> u64 {
        let Found { before, after, live } = *found;
        let known = self.groups.get_mut(&group).filter(|known| known.created <= before.created);
        let Some(known) = known else {
            // The first pass, or counters that began again: from here on.
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

    /// Forgets groups that are no more.
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
        assert_eq!(evictions.update(1, &quiet(1000, 50, 256)), 0, "each is told once");
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
        /// Whatever happens while a pass is on, it never tells of more evictions than there were; and once all is quiet it
        /// knows of all but those of the first pass.
        #[test]
        fn never_too_many(steps in vec(prop_oneof![Just(Step::Create), Just(Step::Remove), Just(Step::Evict),
                Just(Step::Begin), Just(Step::End)], 0..200), seen in any::<u64>()) {
            let (mut counts, mut live, mut evicted, mut told) = (Counts::default(), 0u64, 0u64, 0);
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
                        // At least what was there all the time, at most what was there at any time.
                        let least = live.saturating_sub(created_meanwhile);
                        let most = most + created_meanwhile;
                        let met = least + (seen >> (at % 64)) % (most - least + 1);
                        told += evictions.update(1, &Found { before, after: counts, live: met });
                    },
                    Step::Remove | Step::Evict => {}
                }
            }
            prop_assert!(told <= evicted, "{told} of {evicted}");
        }
    }
}
