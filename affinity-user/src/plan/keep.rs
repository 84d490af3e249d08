//! What a store holds of services that the source could not tell about, in the words of [`Desired`].
//!
//! After a restart with a file that cannot be read, the services of that file are nowhere but in the store. They stay as
//! they are, and so do the members of a service whose slices were in that file.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use affinity_common::abi::{
    AFFINITY, Address, BACKEND_LOCAL, Frontend, FrontendKey, MEMBER_READY, MemberKey, NameKey, NameKind, Selection,
    Timer,
};

use super::backends::identity;
use crate::{
    desired::{Affinity, Desired, FrontendAddress, Known, Member, Pool, PoolName, Scope, unions},
    source::ObjectName,
    store::Observed,
};

/// `desired`, with all that `observed` has of services that are not `known`, and the members of those known by name only.
pub(super) fn keep(observed: &Observed, desired: &Desired, known: &Known) -> Desired {
    let mut kept = Keeper { observed, known, desired: desired.clone() };
    for (key, frontend) in &observed.frontends_v4 {
        kept.frontend(IpAddr::V4(Ipv4Addr::from(key.address.0)), key, frontend);
    }
    for (key, frontend) in &observed.frontends_v6 {
        kept.frontend(IpAddr::V6(Ipv6Addr::from(key.address.0)), key, frontend);
    }
    kept.desired.unions = unions(&kept.desired.pools);
    kept.desired
}

struct Keeper<'a> {
    observed: &'a Observed,
    known: &'a Known,
    desired: Desired,
}

impl Keeper<'_> {
    fn frontend<A: Address>(&mut self, ip: IpAddr, key: &FrontendKey<A>, frontend: &Frontend) {
        let Some(name) = self.name(NameKind::Pool, frontend.pool).and_then(|name| PoolName::parse(name)) else {
            return;
        };
        if !self.known.services.contains(&name.service) {
            let address = FrontendAddress { ip, port: key.port.get(), protocol: name.protocol };
            if *self.desired.frontends.entry(address).or_insert_with(|| name.clone()) != name {
                // Another service has claimed the address.
                return;
            }
            let pool = self.pool(&name, frontend);
            self.desired.pools.entry(name.clone()).or_insert(pool);
        }
        if !self.known.with_slices.contains(&name.service) {
            self.members(&name, frontend.pool);
        }
    }

    fn name(&self, kind: NameKind, id: u32) -> Option<&String> {
        self.observed.names.get(&NameKey { kind: kind as u32, id })
    }

    /// The pool as its frontend's record has it, without members.
    fn pool(&self, name: &PoolName, frontend: &Frontend) -> Pool {
        let group = self.name(NameKind::Group, frontend.group).and_then(|group| group.split_once('/'));
        let affinity = Affinity { timer: Timer::from_byte(frontend.timer), timeout_ns: frontend.timeout_ns };
        Pool {
            scope: match group {
                Some((namespace, group)) => Scope::Group(ObjectName::new(namespace, group)),
                None => Scope::Service(name.service.clone()),
            },
            affinity: (frontend.flags & AFFINITY != 0).then_some(affinity),
            select: Selection::from_byte(frontend.select),
            seed: frontend.seed,
            prefix: frontend.prefix,
            members: BTreeMap::new(),
        }
    }

    fn members(&mut self, name: &PoolName, id: u32) {
        let Some(pool) = self.desired.pools.get_mut(name) else { return };
        let all = MemberKey { pool: id, backend: 0 }..=MemberKey { pool: id, backend: u32::MAX };
        for (key, member) in self.observed.members.range(all) {
            let Some(record) = self.observed.backends.get(&key.backend) else { continue };
            let backend = identity(self.observed, key.backend, record);
            let member = Member { port: member.port.get(), ready: member.state == MEMBER_READY };
            pool.members.entry(backend.clone()).or_insert(member);
            self.desired.backends.entry(backend).or_insert(record.flags & BACKEND_LOCAL != 0);
        }
    }
}
