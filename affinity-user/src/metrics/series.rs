//! A bound on how many services and backends have their own series.

use std::collections::{BTreeMap, BTreeSet};

/// The label value of all that have no series of their own.
pub const OTHER: &str = "other";

/// The names that have their own series. A name keeps its series while it exists, so that a series does not change its meaning
/// from one scrape to the next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Admitted {
    limit: usize,
    names: BTreeSet<String>,
}

impl Admitted {
    /// No names yet, and at most `limit`.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { limit, names: BTreeSet::new() }
    }

    /// Removes names that no longer exist, and admits others in their order, as far as there is room.
    pub fn update<'n>(&mut self, present: impl IntoIterator<Item = &'n str>) {
        let present: BTreeSet<&str> = present.into_iter().collect();
        self.names.retain(|name| present.contains(name.as_str()));
        for name in present {
            if self.names.len() >= self.limit {
                break;
            }
            self.names.insert(name.to_owned());
        }
    }

    /// The label value of a name.
    #[must_use]
    pub fn label<'n>(&self, name: &'n str) -> &'n str {
        if self.names.contains(name) { name } else { OTHER }
    }

    /// Values by label: those without their own series are summed.
    #[must_use]
    pub fn sum<'n, const N: usize>(
        &self,
        values: impl IntoIterator<Item = (&'n str, [u64; N])>,
    ) -> BTreeMap<&'n str, [u64; N]> {
        let mut sums = BTreeMap::new();
        for (name, values) in values {
            let sum = sums.entry(self.label(name)).or_insert([0; N]);
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_came_first_stays_and_the_rest_is_summed() {
        let mut admitted = Admitted::new(2);
        admitted.update(["b", "c", "d"]);
        let sums = admitted.sum([("b", [1, 10]), ("c", [2, 20]), ("d", [4, 40]), ("e", [8, 80])]);
        assert_eq!(sums, BTreeMap::from([("b", [1, 10]), ("c", [2, 20]), (OTHER, [12, 120])]));
        admitted.update(["a", "b", "c", "d"]);
        assert_eq!((admitted.label("a"), admitted.label("c")), (OTHER, "c"), "c keeps its series");
        admitted.update(["a", "b", "d"]);
        assert_eq!((admitted.label("a"), admitted.label("d")), ("a", OTHER), "a has the place of c");
    }
}
