//! Ids of services, pools and groups: one space of `u32`, without the ids that are scopes of ranges ([`PODS`], [`NODE`]).
//!
//! Names that are in the store keep their ids. A new id is a hash of the kind and the name, or the next free number. So a
//! service that is created again finds its own pins, and another service never does.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::abi::{NODE, NameKey, NameKind, PODS};

use super::state_index::discount;
use crate::hash::hash32;

/// The ids in use, and their uses. An id is in use if a name or a record refers to it.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Ids {
    /// Kind, name and id.
    by_name: BTreeSet<(u32, String, u32)>,
    /// How many names and records refer to each id.
    uses: BTreeMap<u32, u32>,
}

impl Ids {
    /// No ids except the reserved ones.
    pub(super) fn new() -> Self {
        Self { by_name: BTreeSet::new(), uses: BTreeMap::from([PODS, NODE].map(|scope| (scope, 1))) }
    }

    /// Inserts a name.
    pub(super) fn insert(&mut self, key: &NameKey, name: &str) {
        self.by_name.insert((key.kind, name.to_owned(), key.id));
        self.count(key.id);
    }

    /// Removes a name.
    pub(super) fn remove(&mut self, key: &NameKey, name: &str) {
        self.by_name.remove(&(key.kind, name.to_owned(), key.id));
        self.discount(key.id);
    }

    /// Counts a record that refers to an id.
    pub(super) fn count(&mut self, id: u32) {
        *self.uses.entry(id).or_default() += 1;
    }

    /// Removes a record from the count.
    pub(super) fn discount(&mut self, id: u32) {
        discount(&mut self.uses, id);
    }

    /// The id of a name.
    pub(super) fn find(&self, kind: NameKind, name: &str) -> Option<u32> {
        let (of, found, id) = self.by_name.range((kind as u32, name.to_owned(), 0)..).next()?;
        (*of == kind as u32 && found == name).then_some(*id)
    }

    /// Ids and names of a kind that no record refers to.
    pub(super) fn unused(&self, kind: NameKind) -> impl Iterator<Item = (u32, &str)> {
        let kind = kind as u32;
        let of_kind = self.by_name.range((kind, String::new(), 0)..).take_while(move |(of, ..)| *of == kind);
        of_kind.filter(|(.., id)| self.uses.get(id) == Some(&1)).map(|(_, name, id)| (*id, name.as_str()))
    }

    /// The ids of a service's pools.
    pub(super) fn pools(&self, service: &str) -> impl Iterator<Item = u32> {
        let prefix = format!("{service}:");
        let kind = NameKind::Pool as u32;
        let from = self.by_name.range((kind, prefix.clone(), 0)..);
        from.take_while(move |(of, name, _)| *of == kind && name.starts_with(&prefix)).map(|(_, _, id)| *id)
    }
}

/// Assigns ids to names: existing ids, or new ones.
pub(super) struct Naming<'a> {
    ids: &'a Ids,
    new: BTreeMap<(u32, String), u32>,
    taken: BTreeSet<u32>,
}

impl<'a> Naming<'a> {
    pub(super) fn new(ids: &'a Ids) -> Self {
        Self { ids, new: BTreeMap::new(), taken: BTreeSet::new() }
    }

    /// The id of a name, and its key in `names`.
    pub(super) fn get(&mut self, kind: NameKind, name: &str) -> NameKey {
        let id = self.ids.find(kind, name).unwrap_or_else(|| self.make(kind as u32, name));
        NameKey { kind: kind as u32, id }
    }

    fn make(&mut self, kind: u32, name: &str) -> u32 {
        let Self { ids, new, taken } = self;
        *new.entry((kind, name.to_owned())).or_insert_with(|| {
            let mut id = hash32(&format!("{kind} {name}"));
            while ids.uses.contains_key(&id) || !taken.insert(id) {
                id = id.wrapping_add(1);
            }
            id
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_id_and_no_two_share_one() {
        let ids = Ids::new();
        let mut ids = Naming::new(&ids);
        let web = ids.get(NameKind::Service, "default/web");
        assert_eq!(ids.get(NameKind::Service, "default/web"), web);
        assert_ne!(ids.get(NameKind::Group, "default/web").id, web.id);

        // The hash's number is taken: by a name, and by a record without a name.
        let taken = NameKey { kind: NameKind::Pool as u32, id: web.id };
        let mut ids = Ids::new();
        ids.insert(&taken, "other");
        ids.count(web.id.wrapping_add(1));
        let mut ids = Naming::new(&ids);
        assert_eq!(ids.get(NameKind::Service, "default/web").id, web.id.wrapping_add(2));
        assert_eq!(ids.get(NameKind::Pool, "other"), taken);
    }
}
