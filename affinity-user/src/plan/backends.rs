//! Indices of backends and their generations.
//!
//! An index is in use while its generation is odd. It stays with its identity for as long as that is desired; when it is
//! retired, and when it is used again, its generation rises by one.

use std::{
    collections::{BTreeMap, BTreeSet, btree_set},
    net::{IpAddr, Ipv6Addr},
};

use affinity_common::abi::{BACKEND_LOCAL, Backend, NameKey, NameKind};

use crate::{desired::BackendName, store::Observed};

/// Who has which index, and which are free.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Roster {
    capacity: u32,
    by_name: BTreeSet<(BackendName, u32)>,
    /// Used once, and free.
    vacant: BTreeSet<u32>,
    /// How many were used once or are in use.
    used: usize,
    /// No index below was never used.
    unused_from: u32,
}

impl Roster {
    /// Of `capacity` indices that were never used.
    pub(super) const fn new(capacity: u32) -> Self {
        Self { capacity, by_name: BTreeSet::new(), vacant: BTreeSet::new(), used: 0, unused_from: 0 }
    }

    /// Enters all backends of a store, where none was entered.
    pub(super) fn enter_all(&mut self, observed: &Observed) {
        let in_use = observed.backends.iter().filter(|(_, record)| record.generation % 2 == 1);
        self.by_name = in_use.map(|(index, record)| (identity(observed, *index, record), *index)).collect();
        let within = observed.backends.range(..self.capacity).filter(|(_, record)| record.generation != 0);
        self.used = within.clone().count();
        self.vacant = within.filter(|(_, record)| record.generation % 2 == 0).map(|(index, _)| *index).collect();
        self.skip_used(observed);
    }

    /// Enters an index as a store has it.
    pub(super) fn enter(&mut self, observed: &Observed, index: u32) {
        let Some(record) = used(&observed.backends, index) else { return };
        if record.generation % 2 == 1 {
            self.by_name.insert((identity(observed, index, record), index));
        } else if index < self.capacity {
            self.vacant.insert(index);
        }
        self.used += usize::from(index < self.capacity);
        self.skip_used(observed);
    }

    /// Strikes an index out, before the store changes it.
    pub(super) fn strike(&mut self, observed: &Observed, index: u32) {
        let Some(record) = used(&observed.backends, index) else { return };
        if record.generation % 2 == 1 {
            self.by_name.remove(&(identity(observed, index, record), index));
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

    /// The index that is in use for a backend.
    pub(super) fn find(&self, name: &BackendName) -> Option<u32> {
        let (found, index) = self.by_name.range((name.clone(), 0)..).next()?;
        (found == name).then_some(*index)
    }
}

/// The record of an index that was ever used.
fn used(records: &BTreeMap<u32, Backend>, index: u32) -> Option<&Backend> {
    records.get(&index).filter(|record| record.generation != 0)
}

/// Gives indices to backends, those that they have or free ones: such as were never used while less than half have been,
/// so that what a stale session or a captured dump says of an index stays true for long; then vacant ones; then the rest.
pub(super) struct Claims<'a> {
    roster: &'a Roster,
    records: &'a BTreeMap<u32, Backend>,
    vacant: btree_set::Iter<'a, u32>,
    unused_from: u32,
    used: usize,
    /// The records of what is in use.
    claimed: BTreeMap<u32, Backend>,
}

impl<'a> Claims<'a> {
    /// Nothing is claimed yet of a store that holds `records`.
    pub(super) fn new(roster: &'a Roster, records: &'a BTreeMap<u32, Backend>) -> Self {
        Self {
            roster,
            records,
            vacant: roster.vacant.iter(),
            unused_from: roster.unused_from,
            used: roster.used,
            claimed: BTreeMap::new(),
        }
    }

    /// The index of a backend: its own, or a free one; none where all are in use. To be asked once for each backend.
    pub(super) fn claim(&mut self, name: &BackendName, local: bool) -> Option<u32> {
        let flags = if local { BACKEND_LOCAL } else { 0 };
        let own = self.roster.find(name).and_then(|index| Some((index, *self.records.get(&index)?)));
        let (index, record) = match own {
            Some((index, record)) => (index, Backend { flags, ..record }),
            None => {
                let index = self.take()?;
                let former = self.records.get(&index).map_or(0, |record| record.generation);
                (index, Backend { address: mapped(name.address), generation: former.wrapping_add(1), flags })
            }
        };
        self.claimed.insert(index, record);
        Some(index)
    }

    /// Keeps an index in use although nothing desires it.
    pub(super) fn keep(&mut self, index: u32) {
        if let Some(record) = self.records.get(&index) {
            self.claimed.entry(index).or_insert(*record);
        }
    }

    /// Keeps those indices in use that belong to any of `names`.
    pub(super) fn keep_all(&mut self, names: &BTreeSet<BackendName>) {
        names.iter().filter_map(|name| self.roster.find(name)).for_each(|index| self.keep(index));
    }

    /// The generation of an index.
    pub(super) fn generation(&self, index: u32) -> u32 {
        self.claimed.get(&index).or_else(|| self.records.get(&index)).map_or(0, |record| record.generation)
    }

    /// What becomes of `records`: those in use that nothing claimed are retired. And the indices that were claimed.
    pub(super) fn finish(self, records: &BTreeMap<u32, Backend>) -> (BTreeMap<u32, Backend>, BTreeSet<u32>) {
        let mut after = records.clone();
        for record in after.values_mut().filter(|record| record.generation % 2 == 1) {
            *record = Backend { generation: record.generation.wrapping_add(1), flags: 0, ..*record };
        }
        let claimed = self.claimed.keys().copied().collect();
        after.extend(self.claimed);
        (after, claimed)
    }

    fn take(&mut self) -> Option<u32> {
        let seldom_used = self.used < (self.roster.capacity / 2) as usize;
        let index = if seldom_used { self.take_unused() } else { self.vacant.next().copied() };
        index.or_else(|| self.take_unused())
    }

    fn take_unused(&mut self) -> Option<u32> {
        let mut unused = self.unused_from..self.roster.capacity;
        let index = unused.find(|index| used(self.records, *index).is_none())?;
        self.unused_from = index + 1;
        self.used += 1;
        Some(index)
    }
}

/// Who has an index that is in use.
pub(super) fn identity(observed: &Observed, index: u32, record: &Backend) -> BackendName {
    let key = NameKey { kind: NameKind::Backend as u32, id: index };
    let pod = observed.names.get(&key).map(String::as_str).unwrap_or_default().into();
    BackendName { address: Ipv6Addr::from(record.address).to_canonical(), pod }
}

/// As IPv6, or IPv4-mapped, in network byte order.
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

    /// What a store holds after `backends` are all that is desired.
    fn publish(observed: &mut Observed, capacity: u32, names: &[u8]) -> Vec<Option<u32>> {
        let mut roster = Roster::new(capacity);
        roster.enter_all(observed);
        let mut claims = Claims::new(&roster, &observed.backends);
        let indices: Vec<Option<u32>> = names.iter().map(|last| claims.claim(&name(*last), false)).collect();
        let (records, _) = claims.finish(&observed.backends);
        for (id, last) in indices.iter().zip(names).filter_map(|(index, last)| Some(((*index)?, last))) {
            observed.names.insert(NameKey { kind: NameKind::Backend as u32, id }, name(*last).pod.to_string());
        }
        observed.backends = records;
        indices
    }

    #[test]
    fn indices_stay_and_generations_rise() {
        let mut observed = Observed::default();
        assert_eq!(publish(&mut observed, 6, &[1, 2]), [Some(0), Some(1)]);
        assert_eq!(publish(&mut observed, 6, &[2]), [Some(1)]);
        assert_eq!(observed.backends[&0].generation, 2);
        // Less than half were ever used: a new one.
        assert_eq!(publish(&mut observed, 6, &[2, 3]), [Some(1), Some(2)]);
        // Half were: the vacant one, under a new generation, then those never used, then none.
        assert_eq!(publish(&mut observed, 6, &[2, 3, 1]), [Some(1), Some(2), Some(0)]);
        assert_eq!(observed.backends[&0].generation, 3);
        let all = publish(&mut observed, 6, &[1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(all, [Some(0), Some(1), Some(2), Some(3), Some(4), Some(5), None]);
    }

    #[test]
    fn another_pod_with_the_address_is_another_backend() {
        let (roster, none) = (Roster::new(8), BTreeMap::new());
        let mut claims = Claims::new(&roster, &none);
        let first = claims.claim(&name(1), false);
        let other = BackendName { pod: "default/q".into(), ..name(1) };
        assert_ne!(claims.claim(&other, true), first);
        let (records, _) = claims.finish(&none);
        assert_eq!(records[&0].address, records[&1].address);
        assert_eq!(records[&1].flags, BACKEND_LOCAL);
    }
}
