//! Reconstructs the desired state of services that could not be read from what a store holds.
//!
//! After a restart with a file that cannot be read, the services of that file exist only in the store. They stay as they are,
//! and so do the members of a service if its slices were in that file.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use affinity_common::abi::{
    AFFINITY, Address, BACKEND_LOCAL, BACKEND_TERMINATING, DROP_IF_NO_LOCAL, Frontend, FrontendKey, MASQUERADE,
    MEMBER_READY, MemberKey, NameKey, NameKind, RANGES, SCOPE_EXTERNAL, Selection, Timer,
};

use super::{backends::identity, state_index::network};
use crate::{
    desired::{self, Affinity, Desired, FrontendAddress, Known, Member, Pool, PoolName, Route, Scope, unions},
    source::ObjectName,
    store::Observed,
};

/// `desired`, with everything that `observed` has of services that are not `known`, and the members of services without known
/// slices.
pub(super) fn keep(observed: &Observed, desired: &Desired, known: &Known) -> Desired {
    let mut kept = Keeper { observed, known, desired: desired.clone() };
    for (key, frontend) in &observed.frontends_v4 {
        kept.frontend(IpAddr::V4(Ipv4Addr::from(key.address.0)), key, frontend);
    }
    for (key, frontend) in &observed.frontends_v6 {
        kept.frontend(IpAddr::V6(Ipv6Addr::from(key.address.0)), key, frontend);
    }
    kept.ranges();
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
            let has = |flag| frontend.flags & flag != 0;
            let route = Route {
                pool: Arc::new(name.clone()),
                masquerade: has(MASQUERADE),
                drop_if_no_local: has(DROP_IF_NO_LOCAL),
            };
            if key.scope == SCOPE_EXTERNAL {
                // The record for all clients came before this one.
                match self.desired.frontends.get_mut(&address) {
                    Some(kept) if kept.internal.pool.service == name.service => kept.external = Some(route),
                    _ => return,
                }
            } else {
                let kept = desired::Frontend { internal: route, external: None, ranges: has(RANGES) };
                if *self.desired.frontends.entry(address).or_insert_with(|| kept.clone()) != kept {
                    // Another service has claimed the address.
                    return;
                }
            }
            let pool = self.pool(&name, frontend);
            self.desired.pools.entry(name.clone()).or_insert(pool);
        }
        if !self.known.with_slices.contains(&name.service) {
            self.members(&name, frontend.pool);
            self.copy_drop_rule(ip, key, &name, frontend);
        }
    }

    /// Copies whether packets are dropped, because that is decided from endpoints.
    fn copy_drop_rule<A: Address>(&mut self, ip: IpAddr, key: &FrontendKey<A>, name: &PoolName, record: &Frontend) {
        let address = FrontendAddress { ip, port: key.port.get(), protocol: name.protocol };
        let Some(frontend) = self.desired.frontends.get_mut(&address) else { return };
        let route = if key.scope == SCOPE_EXTERNAL { frontend.external.as_mut() } else { Some(&mut frontend.internal) };
        if let Some(route) = route.filter(|route| *route.pool == *name) {
            route.drop_if_no_local = record.flags & DROP_IF_NO_LOCAL != 0;
        }
    }

    fn ranges(&mut self) {
        let Observed { ranges_v4, ranges_v6, .. } = self.observed;
        let v4 = ranges_v4.iter().map(|key| (key.scope, network(key.address.0, key.prefix_len)));
        let v6 = ranges_v6.iter().map(|key| (key.scope, network(key.address.0, key.prefix_len)));
        for (scope, network) in v4.chain(v6) {
            let name = self.name(NameKind::Service, scope).and_then(|name| name.split_once('/'));
            let (Some((namespace, name)), Some(network)) = (name, network) else { continue };
            let service = ObjectName::new(namespace, name);
            if !self.known.services.contains(&service) {
                self.desired.ranges.entry(service).or_default().insert(network);
            }
        }
    }

    fn name(&self, kind: NameKind, id: u32) -> Option<&String> {
        self.observed.names.get(&NameKey { kind: kind as u32, id })
    }

    /// The pool, with the settings of its frontend's record, without members.
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
            if let Entry::Vacant(unknown) = self.desired.backends.entry(backend.clone()) {
                unknown.insert(record.flags & BACKEND_LOCAL != 0);
                let is_terminating = record.flags & BACKEND_TERMINATING != 0;
                self.desired.terminating.extend(is_terminating.then_some(backend));
            }
        }
    }
}
