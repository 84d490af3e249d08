//! Free extents of the slots: first fit.

use std::collections::BTreeMap;

/// The free ranges: first -> length. No two of them are adjacent.
#[derive(Debug)]
pub(super) struct Extents {
    free: BTreeMap<u32, u32>,
}

impl Extents {
    /// The slots among `capacity` that the `used` ranges (first, length) do not cover.
    pub(super) fn new(used: impl IntoIterator<Item = (u32, u32)>, capacity: u32) -> Self {
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
    pub(super) fn allocate(&mut self, length: u32) -> Option<u32> {
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
