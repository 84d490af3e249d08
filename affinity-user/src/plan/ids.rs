//! Ids of services, pools and groups: one space of `u32`, without zero.
//!
//! Names that are in the store keep their ids. A new id is a hash of the kind and the name, or the next free number, so
//! that a service that is made again meets its own pins, and another one never does.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::abi::{Frontend, NameKey, NameKind};

use crate::{desired::hash32, store::Observed};

/// The ids that are in use, and what for.
pub(super) struct Ids {
    by_name: BTreeMap<(u32, String), u32>,
    used: BTreeSet<u32>,
}

impl Ids {
    /// Those of a store. Whatever a record refers to is in use, named or not.
    pub(super) fn restore(observed: &Observed) -> Self {
        let mut ids = Self { by_name: BTreeMap::new(), used: BTreeSet::from([0]) };
        for (key, name) in observed.names.iter().filter(|(key, _)| key.kind != NameKind::Backend as u32) {
            ids.by_name.entry((key.kind, name.clone())).or_insert(key.id);
            ids.used.insert(key.id);
        }
        for frontend in observed.frontends_v4.values().chain(observed.frontends_v6.values()) {
            let Frontend { service, pool, group, own, .. } = *frontend;
            ids.used.extend([service, pool, group, own]);
        }
        ids.used.extend(observed.members.keys().map(|key| key.pool));
        ids
    }

    /// The id of a name, and its key in `names`.
    pub(super) fn get(&mut self, kind: NameKind, name: &str) -> NameKey {
        let kind = kind as u32;
        let used = &mut self.used;
        let id = *self.by_name.entry((kind, name.to_owned())).or_insert_with(|| {
            let mut id = hash32(&format!("{kind} {name}"));
            while !used.insert(id) {
                id = id.wrapping_add(1);
            }
            id
        });
        NameKey { kind, id }
    }
}

#[cfg(test)]
mod tests {
    use affinity_common::abi::{MEMBER_READY, Member, MemberKey, Port};

    use super::*;

    #[test]
    fn a_name_keeps_its_id_and_no_two_share_one() {
        let mut ids = Ids::restore(&Observed::default());
        let web = ids.get(NameKind::Service, "default/web");
        assert_eq!(ids.get(NameKind::Service, "default/web"), web);
        assert_ne!(ids.get(NameKind::Group, "default/web").id, web.id);

        // The number that the hash would give is taken: by a name, and by a record without one.
        let taken = NameKey { kind: NameKind::Pool as u32, id: web.id };
        let mut observed = Observed::default();
        observed.names.insert(taken, "other".to_owned());
        let member = Member { generation: 1, port: Port::new(80), state: MEMBER_READY, pad: 0 };
        observed.members.insert(MemberKey { pool: web.id.wrapping_add(1), backend: 0 }, member);
        let mut ids = Ids::restore(&observed);
        assert_eq!(ids.get(NameKind::Service, "default/web").id, web.id.wrapping_add(2));
        assert_eq!(ids.get(NameKind::Pool, "other"), taken);
    }
}
