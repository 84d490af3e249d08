//! Indices of backends and their generations.
//!
//! An index is in use while its generation is odd. It stays with its identity while that is desired, and after that while the
//! backend lingers: its connections continue, and if it comes back it is the same backend. A plan by itself retires a backend
//! only if its pod is known to be dead; the agent decides how long others linger ([`crate::linger`]). When an index is retired,
//! and when it is used again, its generation rises by one.

use std::{
    collections::{BTreeMap, BTreeSet, btree_set},
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use affinity_common::abi::{BACKEND_LINGERING, BACKEND_LOCAL, BACKEND_TERMINATING, Backend, NameKey, NameKind};

use crate::{desired::BackendName, store::Observed};

/// Which backend has which index, and which indices are free.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct BackendAllocator {
    capacity: u32,
    by_name: BTreeSet<(BackendName, u32)>,
    /// Used before, and free.
    vacant: BTreeSet<u32>,
    /// In use, but in no pool.
    lingering: BTreeSet<u32>,
    /// How many indices are in use or were used before.
    used: usize,
    /// All indices below this one are in use or were used before.
    unused_from: u32,
}

impl BackendAllocator {
    /// An allocator of `capacity` indices that were never used.
    pub(super) const fn new(capacity: u32) -> Self {
        Self {
            capacity,
            by_name: BTreeSet::new(),
            vacant: BTreeSet::new(),
            lingering: BTreeSet::new(),
            used: 0,
            unused_from: 0,
        }
    }

    /// Inserts all backends of a store into an empty allocator.
    pub(super) fn insert_all(&mut self, observed: &Observed) {
        let in_use = observed.backends.iter().filter(|(_, record)| record.generation % 2 == 1);
        self.by_name = in_use.map(|(index, record)| (identity(observed, *index, record), *index)).collect();
        let lingering = observed.backends.iter().filter(|(_, record)| lingers(record));
        self.lingering = lingering.map(|(index, _)| *index).collect();
        let within = observed.backends.range(..self.capacity).filter(|(_, record)| record.generation != 0);
        self.used = within.clone().count();
        self.vacant = within.filter(|(_, record)| record.generation % 2 == 0).map(|(index, _)| *index).collect();
        self.skip_used(observed);
    }

    /// Inserts an index with the record of a store.
    pub(super) fn insert(&mut self, observed: &Observed, index: u32) {
        let Some(record) = used(&observed.backends, index) else { return };
        if record.generation % 2 == 1 {
            self.by_name.insert((identity(observed, index, record), index));
            self.lingering.extend(lingers(record).then_some(index));
        } else if index < self.capacity {
            self.vacant.insert(index);
        }
        self.used += usize::from(index < self.capacity);
        self.skip_used(observed);
    }

    /// Removes an index, before the store changes its record.
    pub(super) fn remove(&mut self, observed: &Observed, index: u32) {
        let Some(record) = used(&observed.backends, index) else { return };
        if record.generation % 2 == 1 {
            self.by_name.remove(&(identity(observed, index, record), index));
            self.lingering.remove(&index);
        } else {
            self.vacant.remove(&index);
        }
        self.used -= usize::from(index < self.capacity);
    }

    fn skip_used(&mut self, observed: &Observed) {
        while used(&observed.backends, self.unused_from).is_some() {
            self.unused_from += 1;
        }
    }

    /// The indices of backends that linger.
    pub(super) fn lingering(&self) -> impl Iterator<Item = u32> {
        self.lingering.iter().copied()
    }

    /// The backends in use at an address.
    pub(super) fn at(&self, address: IpAddr) -> impl Iterator<Item = (&BackendName, u32)> {
        let first = BackendName { address, pod: Arc::default() };
        let from = self.by_name.range((first, 0)..);
        from.take_while(move |(name, _)| name.address == address).map(|(name, index)| (name, *index))
    }

    /// Whether a backend is in use, but in no pool.
    pub(super) fn is_lingering(&self, index: u32) -> bool {
        self.lingering.contains(&index)
    }

    /// The index of a backend that is in use.
    pub(super) fn find(&self, name: &BackendName) -> Option<u32> {
        let (found, index) = self.by_name.range((name.clone(), 0)..).next()?;
        (found == name).then_some(*index)
    }
}

/// Whether a backend is in use, but in no pool.
fn lingers(record: &Backend) -> bool {
    record.generation % 2 == 1 && record.flags & BACKEND_LINGERING != 0
}

/// The record of an index that is in use or was used before.
fn used(records: &BTreeMap<u32, Backend>, index: u32) -> Option<&Backend> {
    records.get(&index).filter(|record| record.generation != 0)
}

/// Assigns indices to backends: their own, or free ones. While less than half of all indices were ever used, a new one is
/// taken, so that what a stale session or a captured dump says of an index stays true for long. Then come vacant ones, then the
/// rest.
pub(super) struct Claims<'a> {
    allocator: &'a BackendAllocator,
    records: &'a BTreeMap<u32, Backend>,
    vacant: btree_set::Iter<'a, u32>,
    unused_from: u32,
    used: usize,
    /// How many backends got no index.
    short: usize,
    /// The records of the indices that were assigned.
    claimed: BTreeMap<u32, Backend>,
}

impl<'a> Claims<'a> {
    /// No index of a store that holds `records` is claimed yet.
    pub(super) fn new(allocator: &'a BackendAllocator, records: &'a BTreeMap<u32, Backend>) -> Self {
        Self {
            allocator,
            records,
            vacant: allocator.vacant.iter(),
            unused_from: allocator.unused_from,
            used: allocator.used,
            short: 0,
            claimed: BTreeMap::new(),
        }
    }

    /// The index of a backend: its own, or a free one; `None` if all are in use. Call this once for each backend.
    pub(super) fn claim(&mut self, name: &BackendName, local: bool, terminating: bool) -> Option<u32> {
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        let flags = flag(local, BACKEND_LOCAL) | flag(terminating, BACKEND_TERMINATING);
        let own = self.allocator.find(name).and_then(|index| Some((index, *self.records.get(&index)?)));
        let (index, record) = match own {
            Some((index, record)) => (index, Backend { flags, ..record }),
            None => {
                let Some(index) = self.take() else {
                    self.short += 1;
                    return None;
                };
                let former = self.records.get(&index).map_or(0, |record| record.generation);
                (index, Backend { address: mapped(name.address), generation: former.wrapping_add(1), flags })
            }
        };
        self.claimed.insert(index, record);
        Some(index)
    }

    /// Keeps an index as a member of pools although it is not desired.
    pub(super) fn keep(&mut self, index: u32) {
        if let Some(record) = self.records.get(&index) {
            let flags = record.flags & !BACKEND_LINGERING;
            self.claimed.entry(index).or_insert(Backend { flags, ..*record });
        }
    }

    /// The generation of an index.
    pub(super) fn generation(&self, index: u32) -> u32 {
        self.claimed.get(&index).or_else(|| self.records.get(&index)).map_or(0, |record| record.generation)
    }

    /// The records after the plan, and the indices in use. Backends in use that were not claimed linger. They are retired if
    /// their pod is dead, or if newcomers need their indices: those that lingered before are retired first.
    pub(super) fn finish(
        self,
        records: &BTreeMap<u32, Backend>,
        leaving: impl Fn(u32, &Backend) -> Leaving,
    ) -> (BTreeMap<u32, Backend>, BTreeSet<u32>) {
        let mut after = records.clone();
        after.extend(self.claimed.iter().map(|(index, record)| (*index, *record)));
        let mut linger = Vec::new();
        for (&index, record) in after.iter_mut().filter(|(_, record)| record.generation % 2 == 1) {
            if self.claimed.contains_key(&index) {
                continue;
            }
            match leaving(index, record) {
                Leaving::Dead => *record = retired(record),
                Leaving::Alive { terminating } => {
                    let is_newly = record.flags & BACKEND_LINGERING == 0;
                    record.flags |= BACKEND_LINGERING | if terminating { BACKEND_TERMINATING } else { 0 };
                    linger.push((is_newly, index));
                }
            }
        }
        linger.sort_unstable();
        for (_, index) in linger.into_iter().take(self.short) {
            after.entry(index).and_modify(|record| *record = retired(record));
        }
        let in_use = after.iter().filter(|(_, record)| record.generation % 2 == 1);
        let in_use = in_use.map(|(index, _)| *index).collect();
        (after, in_use)
    }

    fn take(&mut self) -> Option<u32> {
        let rarely_used = self.used < (self.allocator.capacity / 2) as usize;
        let index = if rarely_used { self.take_unused() } else { self.vacant.next().copied() };
        index.or_else(|| self.take_unused())
    }

    fn take_unused(&mut self) -> Option<u32> {
        let mut unused = self.unused_from..self.allocator.capacity;
        let index = unused.find(|index| used(self.records, *index).is_none())?;
        self.unused_from = index + 1;
        self.used += 1;
        Some(index)
    }
}

/// What is known about a backend that no pool has any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Leaving {
    /// Its pod has ended.
    Dead,
    /// As far as is known, its pod is alive, perhaps not for long.
    Alive {
        /// Whether a slice says that it is terminating.
        terminating: bool,
    },
}

/// The record of an index after its backend is retired.
pub(crate) fn retired(record: &Backend) -> Backend {
    Backend { generation: record.generation.wrapping_add(1), flags: 0, ..*record }
}

/// The identity of the backend at an index in use.
pub(super) fn identity(observed: &Observed, index: u32, record: &Backend) -> BackendName {
    let key = NameKey { kind: NameKind::Backend as u32, id: index };
    let pod = observed.names.get(&key).map(String::as_str).unwrap_or_default().into();
    BackendName { address: Ipv6Addr::from(record.address).to_canonical(), pod }
}

/// An IPv6 or IPv4-mapped address in network byte order.
fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(last: u8) -> BackendName {
        BackendName { address: IpAddr::from([10, 0, 0, last]), pod: format!("default/p{last}").into() }
    }

    /// Publishes `names` as the only desired backends, and assumes that every pod that leaves is dead or alive, as `leaving`
    /// says.
    fn publish(observed: &mut Observed, capacity: u32, names: &[u8], leaving: Leaving) -> Vec<Option<u32>> {
        let mut allocator = BackendAllocator::new(capacity);
        allocator.insert_all(observed);
        let mut claims = Claims::new(&allocator, &observed.backends);
        let indices: Vec<Option<u32>> = names.iter().map(|last| claims.claim(&name(*last), false, false)).collect();
        let (records, _) = claims.finish(&observed.backends, |_, _| leaving);
        for (id, last) in indices.iter().zip(names).filter_map(|(index, last)| Some(((*index)?, last))) {
            observed.names.insert(NameKey { kind: NameKind::Backend as u32, id }, name(*last).pod.to_string());
        }
        observed.backends = records;
        indices
    }

    const ALIVE: Leaving = Leaving::Alive { terminating: false };

    #[test]
    fn indices_stay_and_generations_rise() {
        let mut observed = Observed::default();
        let mut publish = |names: &[u8]| {
            let indices = publish(&mut observed, 6, names, Leaving::Dead);
            (indices, observed.backends[&0].generation)
        };
        assert_eq!(publish(&[1, 2]), (vec![Some(0), Some(1)], 1));
        assert_eq!(publish(&[2]), (vec![Some(1)], 2));
        // Less than half of the indices were ever used: a new one.
        assert_eq!(publish(&[2, 3]), (vec![Some(1), Some(2)], 2));
        // Half were: the vacant one, with a new generation, then the remaining unused ones, then none.
        assert_eq!(publish(&[2, 3, 1]), (vec![Some(1), Some(2), Some(0)], 3));
        let all = publish(&[1, 2, 3, 4, 5, 6, 7]).0;
        assert_eq!(all, [Some(0), Some(1), Some(2), Some(3), Some(4), Some(5), None]);
    }

    #[test]
    fn a_backend_that_left_keeps_its_index_until_it_comes_back() {
        let mut observed = Observed::default();
        publish(&mut observed, 6, &[1, 2], ALIVE);
        let before = observed.backends.clone();
        assert_eq!(publish(&mut observed, 6, &[2, 3, 4], ALIVE), [Some(1), Some(2), Some(3)]);
        let lingering = Backend { flags: BACKEND_LINGERING, ..before[&0] };
        assert_eq!(observed.backends[&0], lingering);
        assert_eq!(publish(&mut observed, 6, &[1, 2], ALIVE), [Some(0), Some(1)]);
        assert_eq!((observed.backends[&0], observed.backends[&1]), (before[&0], before[&1]));
    }

    #[test]
    fn lingering_backends_are_retired_when_indices_run_out() {
        let mut observed = Observed::default();
        publish(&mut observed, 3, &[1, 2, 3], ALIVE);
        publish(&mut observed, 3, &[1, 2], ALIVE);
        // The newcomer gets no index yet: the next plan gives it the one that this plan frees.
        assert_eq!(publish(&mut observed, 3, &[1, 4], ALIVE), [Some(0), None]);
        let generations: Vec<u32> = observed.backends.values().map(|record| record.generation).collect();
        assert_eq!(generations, [1, 1, 2]);
        assert_eq!(publish(&mut observed, 3, &[1, 4], ALIVE), [Some(0), Some(2)]);
    }

    #[test]
    fn a_terminating_pod_is_known_as_such_by_its_record() {
        let mut observed = Observed::default();
        publish(&mut observed, 3, &[1], ALIVE);
        publish(&mut observed, 3, &[], Leaving::Alive { terminating: true });
        assert_eq!(observed.backends[&0].flags, BACKEND_LINGERING | BACKEND_TERMINATING);
    }

    #[test]
    fn another_pod_with_the_address_is_another_backend() {
        let (allocator, none) = (BackendAllocator::new(8), BTreeMap::new());
        let mut claims = Claims::new(&allocator, &none);
        let first = claims.claim(&name(1), false, false);
        let other = BackendName { pod: "default/q".into(), ..name(1) };
        assert_ne!(claims.claim(&other, true, false), first);
        let (records, _) = claims.finish(&none, |_, _| ALIVE);
        assert_eq!(records[&0].address, records[&1].address);
        assert_eq!(records[&1].flags, BACKEND_LOCAL);
    }
}
