//! Indices of backends and their generations.
//!
//! An index is in use while its generation is odd. It stays with its identity for as long as that is desired; when it is
//! retired, and when it is used again, its generation rises by one.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr},
};

use affinity_common::abi::{BACKEND_LOCAL, Backend, NameKey, NameKind};

use crate::{desired::BackendName, store::Observed};

/// The records of `backends`, and who has which.
pub(super) struct Backends {
    records: BTreeMap<u32, Backend>,
    by_name: BTreeMap<BackendName, u32>,
    claimed: BTreeSet<u32>,
    free: Free,
}

impl Backends {
    /// Those of a store.
    pub(super) fn restore(observed: &Observed, capacity: u32) -> Self {
        let mut by_name = BTreeMap::new();
        for (index, record) in observed.backends.iter().filter(|(_, record)| record.generation % 2 == 1) {
            by_name.entry(identity(observed, *index, record)).or_insert(*index);
        }
        Self {
            records: observed.backends.clone(),
            by_name,
            claimed: BTreeSet::new(),
            free: Free::new(observed, capacity),
        }
    }

    /// The index of a backend: its own, or a free one; none where all are in use.
    pub(super) fn claim(&mut self, name: &BackendName, local: bool) -> Option<u32> {
        let flags = if local { BACKEND_LOCAL } else { 0 };
        let index = if let Some(index) = self.by_name.get(name) {
            self.records.get_mut(index)?.flags = flags;
            *index
        } else {
            let index = self.free.take()?;
            let former = self.records.get(&index).map_or(0, |record| record.generation);
            let record = Backend { address: mapped(name.address), generation: former.wrapping_add(1), flags };
            self.records.insert(index, record);
            self.by_name.insert(name.clone(), index);
            index
        };
        self.claimed.insert(index);
        Some(index)
    }

    /// Keeps an index in use although nothing desires it.
    pub(super) fn keep(&mut self, index: u32) {
        self.claimed.insert(index);
    }

    /// Keeps those indices in use that belong to any of `names`.
    pub(super) fn keep_all(&mut self, names: &BTreeSet<BackendName>) {
        let kept = self.by_name.iter().filter(|(name, _)| names.contains(name));
        self.claimed.extend(kept.map(|(_, index)| *index));
    }

    /// The generation of an index.
    pub(super) fn generation(&self, index: u32) -> u32 {
        self.records.get(&index).map_or(0, |record| record.generation)
    }

    /// All records, with those retired that nothing claimed, and the names of those in use.
    pub(super) fn finish(mut self) -> (BTreeMap<u32, Backend>, BTreeMap<u32, BackendName>) {
        for (index, record) in &mut self.records {
            if record.generation % 2 == 1 && !self.claimed.contains(index) {
                record.generation = record.generation.wrapping_add(1);
                record.flags = 0;
            }
        }
        let names = self.by_name.into_iter().filter(|(_, index)| self.claimed.contains(index));
        (self.records, names.map(|(name, index)| (index, name)).collect())
    }
}

/// Who has an index that is in use.
pub(super) fn identity(observed: &Observed, index: u32, record: &Backend) -> BackendName {
    let key = NameKey { kind: NameKind::Backend as u32, id: index };
    let pod = observed.names.get(&key).cloned().unwrap_or_default();
    BackendName { address: Ipv6Addr::from(record.address).to_canonical(), pod }
}

/// Indices to give away: those never used while less than half have been, so that what a stale session or a captured
/// dump says of an index stays true for long; then vacant ones; then the rest.
struct Free {
    /// Used once, or in use.
    used: BTreeSet<u32>,
    vacant: BTreeSet<u32>,
    /// No index below was never used.
    unused_from: u32,
    capacity: u32,
}

impl Free {
    fn new(observed: &Observed, capacity: u32) -> Self {
        let within = observed.backends.range(..capacity).filter(|(_, record)| record.generation != 0);
        let vacant = within.clone().filter(|(_, record)| record.generation % 2 == 0).map(|(index, _)| *index).collect();
        Self { used: within.map(|(index, _)| *index).collect(), vacant, unused_from: 0, capacity }
    }

    fn take(&mut self) -> Option<u32> {
        let seldom_used = self.used.len() < (self.capacity / 2) as usize;
        let index = if seldom_used { self.take_unused() } else { self.vacant.pop_first() };
        index.or_else(|| self.take_unused())
    }

    fn take_unused(&mut self) -> Option<u32> {
        let index = (self.unused_from..self.capacity).find(|index| !self.used.contains(index))?;
        self.unused_from = index + 1;
        self.used.insert(index);
        Some(index)
    }
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
        BackendName { address: IpAddr::from([10, 0, 0, last]), pod: format!("default/p{last}") }
    }

    /// What a store holds after `backends` are all that is desired.
    fn publish(observed: &mut Observed, capacity: u32, names: &[u8]) -> Vec<Option<u32>> {
        let mut backends = Backends::restore(observed, capacity);
        let indices = names.iter().map(|last| backends.claim(&name(*last), false)).collect();
        let (records, names) = backends.finish();
        observed.backends = records;
        observed.names =
            names.into_iter().map(|(id, name)| (NameKey { kind: NameKind::Backend as u32, id }, name.pod)).collect();
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
        let mut backends = Backends::restore(&Observed::default(), 8);
        let first = backends.claim(&name(1), false);
        let other = BackendName { pod: "default/q".to_owned(), ..name(1) };
        assert_ne!(backends.claim(&other, true), first);
        let (records, _) = backends.finish();
        assert_eq!(records[&0].address, records[&1].address);
        assert_eq!(records[&1].flags, BACKEND_LOCAL);
    }
}
