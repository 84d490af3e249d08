//! Properties of every plan, whatever the worlds before and after, and after each of its steps.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv6Addr},
};

use affinity_common::{
    abi::{
        AFFINITY, BACKEND_LINGERING, BACKEND_TERMINATING, Backend, Frontend, FrontendKey, MEMBER_READY, Member,
        MemberKey, NameKey, NameKind, PODS, RANGES, RangeKey, Reason, SCOPE_ANY, SPLIT_SCOPE, SessionKey, V4, V6,
    },
    headers::{ACK, SYN, UDP},
    model::Model,
    tables::{Entry, FamilyTables, Tables},
};
use proptest::prelude::*;

use super::world::{TestAddress, World, inner_world, send, world};
use crate::{
    desired::{Desired, DesiredState, options, snapshots},
    plan::{StateIndex, backends::identity, plan, retired},
    source::Snapshot,
    store::{Capacity, Observed, Op, Store, StoreError, memory::MemoryStore},
};

const ROOMY: Capacity = Capacity { backends: 64, slots: 65_536, ranges: 64 };
const TIGHT: Capacity = Capacity { backends: 8, slots: 24, ranges: 2 };
const CLIENTS: u8 = 6;
/// Source port of the residents' connections, and of all later ones.
const OLD_PORT: u16 = 1_000;
const NEW_PORT: u16 = 20_000;

/// Passes steps to another store, except the chosen ones, which fail: the state after a failure must be a valid start for the
/// next plan.
#[derive(Debug, Clone)]
struct FaultyStore<S> {
    inner: S,
    failing: BTreeSet<usize>,
    applied: usize,
}

impl<S: Store> FaultyStore<S> {
    /// Fails the steps with these numbers, counted from 0 over the lifetime of the store.
    fn new(inner: S, failing: impl IntoIterator<Item = usize>) -> Self {
        Self { inner, failing: failing.into_iter().collect(), applied: 0 }
    }
}

impl<S: Store> Store for FaultyStore<S> {
    fn apply(&mut self, op: &Op) -> Result<(), StoreError> {
        let number = self.applied;
        self.applied += 1;
        if self.failing.contains(&number) {
            let source = io::Error::new(io::ErrorKind::StorageFull, "chosen to fail");
            return Err(StoreError { map: "faulty", action: format!("step {number}, {op:?}"), source });
        }
        self.inner.apply(op)
    }

    fn observe(&self) -> Result<Observed, StoreError> {
        self.inner.observe()
    }

    fn capacity(&self) -> Capacity {
        self.inner.capacity()
    }
}

fn store(capacity: Capacity) -> MemoryStore {
    MemoryStore::new(capacity, 65_536)
}

fn observe(store: &impl Store) -> Observed {
    store.observe().expect("memory can be read")
}

/// Applies plans until there is nothing to do: if space was short, a plan may use what the one before it freed.
fn settle(store: &mut impl Store, world: &World) {
    for _ in 0..16 {
        let (steps, _) = plan(&observe(store), &world.desired(), store.capacity());
        if steps.is_empty() {
            return;
        }
        steps.iter().for_each(|step| store.apply(step).expect("memory takes every step"));
    }
    panic!("plans go on for ever");
}

/// Slots name ready members of the frontend's pool, their backends are in use with the same generation, and no two pools share
/// a slot.
fn assert_consistent(observed: &Observed) {
    let mut extents = BTreeSet::new();
    for frontend in observed.frontends_v4.values().chain(observed.frontends_v6.values()) {
        let Frontend { pool, slot_first, slot_count, .. } = *frontend;
        if slot_count == 0 {
            continue;
        }
        extents.insert((slot_first, slot_count, pool));
        let slots = &observed.slots[&slot_first];
        assert_eq!(slots.len(), slot_count as usize);
        for backend in slots.iter().copied().collect::<BTreeSet<u32>>() {
            let member = observed.members.get(&MemberKey { pool, backend }).expect("a slot names a member");
            assert_eq!(member.state, MEMBER_READY);
            assert_eq!(member.generation % 2, 1);
            assert_eq!(member.generation, observed.backends[&backend].generation);
        }
    }
    let firsts = extents.iter().map(|(first, ..)| *first);
    let ends = extents.iter().map(|(first, count, _)| first + count);
    assert!(ends.zip(firsts.skip(1)).all(|(end, next)| end <= next), "extents overlap: {extents:?}");
}

/// How a client of a frontend is treated, according to the records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Access {
    None,
    Denied,
    /// To this pool.
    Allowed(u32),
}

/// Reads the records as the programs do.
fn access<A: TestAddress>(observed: &Observed, key: &FrontendKey<A>, client: u8) -> Access {
    let address = A::client(client);
    let ranges = A::ranges(observed);
    let is_within = |scope| (0..=128u8).any(|prefix| ranges.contains(&RangeKey::new(scope, address, prefix)));
    let frontends = A::frontends(observed);
    let Some(mut record) = frontends.get(key) else { return Access::None };
    if record.flags & SPLIT_SCOPE != 0 && !is_within(PODS) {
        record = frontends.get(&key.external()).expect("a split frontend has a record for external clients");
    }
    if record.flags & RANGES != 0 && !is_within(record.service) {
        return Access::Denied;
    }
    Access::Allowed(record.pool)
}

/// A client that is admitted before and after is admitted now; one that is admitted neither before nor after is not admitted
/// now. Every client is sent to the same pool as before or as after.
fn assert_access<A: TestAddress>(old: &Observed, now: &Observed, new: &Observed) {
    let same_pods = pods(old) == pods(new);
    for key in A::frontends(old).keys().filter(|key| key.scope == SCOPE_ANY) {
        for client in 0..=CLIENTS {
            let [before, now, after] = [old, now, new].map(|observed| access(observed, key, client));
            match (before, after) {
                (Access::None, _) | (_, Access::None) => {}
                (Access::Denied, Access::Denied) => assert_eq!(now, Access::Denied, "client {client} is let in"),
                (Access::Allowed(a), Access::Allowed(b)) => {
                    let Access::Allowed(pool) = now else { panic!("client {client} is kept out: {now:?}") };
                    assert!(!same_pods || pool == a || pool == b, "client {client} is sent to neither pool");
                }
                (Access::Denied, Access::Allowed(_)) | (Access::Allowed(_), Access::Denied) => {
                    assert_ne!(now, Access::None);
                }
            }
        }
    }
}

fn pods(observed: &Observed) -> (Vec<&RangeKey<V4>>, Vec<&RangeKey<V6>>) {
    let v4 = observed.ranges_v4.iter().filter(|key| key.scope == PODS).collect();
    (v4, observed.ranges_v6.iter().filter(|key| key.scope == PODS).collect())
}

/// The backend that had an index with a generation.
type History = BTreeMap<(u32, u32), (IpAddr, String)>;

/// An index with one odd generation never means two different pods.
fn assert_generations(observed: &Observed, history: &mut History) {
    for (index, backend) in observed.backends.iter().filter(|(_, backend)| backend.generation % 2 == 1) {
        let key = NameKey { kind: NameKind::Backend as u32, id: *index };
        let identity = (Ipv6Addr::from(backend.address).to_canonical(), observed.names[&key].clone());
        let known = history.entry((*index, backend.generation)).or_insert_with(|| identity.clone());
        assert_eq!(*known, identity);
    }
}

/// What is in both states keeps its id or index.
fn assert_ids_stay(before: &Observed, after: &Observed) {
    let ids = |observed: &Observed| -> BTreeMap<(u32, String), u32> {
        observed.names.iter().map(|(key, name)| ((key.kind, name.clone()), key.id)).collect()
    };
    let (before, after) = (ids(before), ids(after));
    for (name, id) in after.iter().filter(|((kind, _), _)| *kind != NameKind::Backend as u32) {
        assert!(before.get(name).is_none_or(|former| former == id), "{name:?} has another id");
    }
    let distinct: BTreeSet<&u32> =
        after.iter().filter(|((kind, _), _)| *kind != NameKind::Backend as u32).map(|(_, id)| id).collect();
    let ids = after.keys().filter(|(kind, _)| *kind != NameKind::Backend as u32).count();
    assert_eq!(distinct.len(), ids, "one space of ids");
    assert!(!distinct.contains(&0));
}

/// Backends that leave every pool linger, unless their pod has ended. No others linger, and no others are retired.
fn assert_lingering(before: &Observed, after: &Observed, desired: &Desired) {
    for (index, record) in before.backends.iter().filter(|(_, record)| record.generation % 2 == 1) {
        let name = identity(before, *index, record);
        let is_wanted = desired.backends.contains_key(&name);
        let is_dead = !is_wanted && !desired.others.contains(&name) && record.flags & BACKEND_TERMINATING != 0;
        let now = &after.backends[index];
        assert_eq!(now.generation, record.generation + u32::from(is_dead), "{name:?}");
        assert_eq!(now.flags & BACKEND_LINGERING != 0, !is_wanted && !is_dead, "{name:?}");
    }
    for (key, member) in &after.members {
        let record = &after.backends[&key.backend];
        assert_eq!((record.flags & BACKEND_LINGERING, record.generation), (0, member.generation), "{key:?}");
    }
}

/// Sequences of worlds; between them the agent retires some of the backends that linger.
fn check_lingering(worlds: &[(World, u64)]) {
    let mut observed = Observed::default();
    let mut history = History::new();
    for (world, retire) in worlds {
        let before = observed.clone();
        let desired = world.desired();
        let (steps, problems) = plan(&before, &desired, ROOMY);
        assert_eq!(problems, []);
        steps.iter().for_each(|step| observed.apply(step));
        assert_lingering(&before, &observed, &desired);
        assert_generations(&observed, &mut history);
        assert_eq!(plan(&observed, &desired, ROOMY).0, [], "planned twice");
        let state_index = StateIndex::new(observed.clone(), ROOMY);
        let over = state_index.lingering().filter(|(index, ..)| retire & 1 << (index % 64) != 0);
        let over: Vec<Op> = over.map(|(index, _, record)| Op::PutBackend(index, retired(record))).collect();
        over.iter().for_each(|step| observed.apply(step));
    }
}

fn check_structure(worlds: &[World], capacity: Capacity) {
    let mut store = store(capacity);
    let mut mirror = Observed::default();
    let mut history = History::new();
    for world in worlds {
        let before = observe(&store);
        assert_eq!(mirror, before, "what was applied is what is read");
        let (steps, problems) = plan(&before, &world.desired(), capacity);
        let mut end = before.clone();
        steps.iter().for_each(|step| end.apply(step));
        for step in &steps {
            store.apply(step).expect("memory takes every step");
            mirror.apply(step);
            assert_consistent(&mirror);
            assert_access::<V4>(&before, &mirror, &end);
            assert_access::<V6>(&before, &mirror, &end);
            assert!(mirror.ranges_v4.len().max(mirror.ranges_v6.len()) <= capacity.ranges as usize);
        }
        let after = observe(&store);
        assert_generations(&after, &mut history);
        assert_ids_stay(&before, &after);
        if problems.is_empty() {
            let (again, _) = plan(&after, &world.desired(), capacity);
            assert_eq!(again, [], "planned twice");
            let unread = Snapshot { partial: true, ..Snapshot::default() };
            let (unread, _) = plan(&after, &world.decide(&unread), capacity);
            assert_eq!(unread, [], "a source that says nothing takes nothing down");
        }
        settle(&mut store, world);
        mirror = observe(&store);
        assert_generations(&mirror, &mut history);
    }
}

/// A plan for a change has the steps of the full plan, and an index to which they were applied equals that of the store.
fn check_changes(snapshots: &[Snapshot], capacity: Capacity) {
    let mut store = store(capacity);
    let mut state = DesiredState::new(options());
    let mut state_index = StateIndex::new(observe(&store), capacity);
    let mut is_settled = false;
    for snapshot in snapshots {
        let change = state.update(snapshot);
        let (full, problems) = plan(&observe(&store), state.desired(), capacity);
        if let Some(change) = change.filter(|_| is_settled) {
            let (steps, reported) = state_index.plan_change(&change);
            assert_eq!(reported.is_empty(), problems.is_empty());
            assert!(steps == full || !problems.is_empty(), "{steps:?}\ninstead of\n{full:?}");
        }
        for step in &full {
            store.apply(step).expect("memory takes every step");
            state_index.apply(step);
        }
        let observed = observe(&store);
        assert_eq!(*state_index.observed(), observed, "what was applied is what is read");
        assert_eq!(state_index, StateIndex::new(observed, capacity));
        is_settled = problems.is_empty();
    }
}

/// A client's pin at a frontend.
#[derive(Clone, Copy)]
struct Pin {
    to: (IpAddr, u16),
    backend: u32,
    generation: u32,
    /// Whether it is the group's pin; if not, it is the frontend's own, or there is none.
    shared: bool,
}

type Frontends<A> = BTreeMap<FrontendKey<A>, Frontend>;
type Pins<A> = BTreeMap<(FrontendKey<A>, u8), (Frontend, Pin)>;

/// Connects a client to a frontend.
fn connect<A: TestAddress>(
    model: &Model,
    key: &FrontendKey<A>,
    frontend: &Frontend,
    client: u8,
    sport: u16,
) -> Option<Pin>
where
    Model: FamilyTables<A>,
{
    let fate = send(model, key, client, sport, SYN);
    assert_eq!(fate.to.is_none(), frontend.slot_count == 0, "{fate:?}");
    let to = fate.to?;
    let in_pool = |(index, backend): &(&u32, &Backend)| {
        backend.address == mapped(to.0) && model.member(&MemberKey { pool: frontend.pool, backend: **index }).is_some()
    };
    let (backend, record) = model.backends.iter().find(in_pool).expect("a member has this address");
    let group = SessionKey::new(frontend.group, A::client(client), frontend.prefix);
    let shared = frontend.flags & AFFINITY != 0
        && FamilyTables::<A>::session(model, &group).is_some_and(|pin| pin.get().backend.index == *backend);
    Some(Pin { to, backend: *backend, generation: record.generation, shared })
}

/// Whether a pin must hold: both records pin in the same way, and its pod is ready in the end.
fn must_hold(pin: &Pin, before: &Frontend, after: &Frontend, new: &Observed) -> bool {
    let scope = |frontend: &Frontend| (frontend.group, frontend.own, frontend.flags & AFFINITY, frontend.prefix);
    let key = MemberKey { pool: after.pool, backend: pin.backend };
    let ready = |member: &Member| member.state == MEMBER_READY && member.generation == pin.generation;
    pin.shared && scope(before) == scope(after) && new.members.get(&key).is_some_and(ready)
}

/// Clients that were there before a plan.
struct Residents<A: TestAddress> {
    /// Source port of the connections that stay open.
    sport: u16,
    pins: Pins<A>,
}

impl<A: TestAddress> Residents<A>
where
    Model: FamilyTables<A>,
{
    /// Lets each client connect to each frontend twice: after the second time, its pins are stable.
    fn arrive(model: &Model, sport: u16, frontends: &Frontends<A>) -> Self {
        let mut pins = Pins::new();
        for sport in [sport - 1, sport] {
            for (key, frontend) in frontends.iter().filter(|(key, frontend)| is_for_everybody(key, frontend)) {
                for client in 0..CLIENTS {
                    if let Some(pin) = connect(model, key, frontend, client, sport) {
                        pins.insert((*key, client), (*frontend, pin));
                    }
                }
            }
        }
        Self { sport, pins }
    }

    /// Every client, and one that was never there, connects in the middle of the plan from `old` to `new`.
    fn check(&self, model: &Model, old: &Observed, new: &Observed, tables: [&Frontends<A>; 2], reversed: bool) {
        let mut both: Vec<(&FrontendKey<A>, &Frontend, &Frontend)> = Vec::new();
        for (key, before) in tables[0] {
            both.extend(tables[1].get(key).map(|after| (key, before, after)));
        }
        both.retain(|(key, before, after)| {
            [before, after].iter().all(|frontend| is_for_everybody(key, frontend) && frontend.slot_count > 0)
        });
        if reversed {
            both.reverse();
        }
        for (key, before, after) in both {
            for client in 0..=CLIENTS {
                let fate = send(model, key, client, NEW_PORT, SYN);
                let to = fate.to.unwrap_or_else(|| panic!("client {client} has nobody: {fate:?}"));
                // A pin may lead to a pod that is already ready in the pool that the frontend is about to leave, or still ready
                // in the pool that it was switched to.
                let usable = [old, new].iter().any(|at| is_usable(at, before, to) || is_usable(at, after, to));
                assert!(usable, "client {client} is sent to {to:?}, which is ready neither before nor after");
                let Some((_, pin)) = self.pins.get(&(*key, client)) else { continue };
                self.check_connection(model, key, client, pin, new);
                if must_hold(pin, before, after, new) {
                    assert_eq!((to.0, fate.reason), (pin.to.0, Reason::Pinned), "client {client} was moved");
                }
            }
        }
    }

    /// An established TCP connection stays where it is while the backend has the same generation.
    fn check_connection(&self, model: &Model, key: &FrontendKey<A>, client: u8, pin: &Pin, new: &Observed) {
        if new.backends[&pin.backend].generation == pin.generation && key.protocol != UDP {
            let fate = send(model, key, client, self.sport, ACK);
            assert_eq!((fate.to, fate.reason), (Some(pin.to), Reason::Established), "client {client} was cut off");
        }
    }
}

/// Whether a record applies to the packets of all clients, wherever they are.
fn is_for_everybody<A: TestAddress>(key: &FrontendKey<A>, frontend: &Frontend) -> bool {
    key.scope == SCOPE_ANY && frontend.flags & (SPLIT_SCOPE | RANGES) == 0 && !key.address.is_loopback()
}

fn is_usable(observed: &Observed, frontend: &Frontend, (ip, port): (IpAddr, u16)) -> bool {
    let at_address = observed.backends.iter().filter(|(_, backend)| backend.address == mapped(ip));
    let members =
        at_address.filter_map(|(index, _)| observed.members.get(&MemberKey { pool: frontend.pool, backend: *index }));
    members.into_iter().any(|member| member.state == MEMBER_READY && member.port.get() == port)
}

/// The pools that share a pin.
fn pools_of(observed: &Observed, group: u32) -> BTreeSet<u32> {
    let frontends = observed.frontends_v4.values().chain(observed.frontends_v6.values());
    frontends.filter(|frontend| frontend.group == group).map(|frontend| frontend.pool).collect()
}

/// Clients that arrive in the middle of a plan, connect to all frontends, and stay. (While services join or leave their group,
/// a pin that is created at that moment may follow.)
struct Newcomers<A: TestAddress> {
    clients: std::ops::Range<u8>,
    sport: u16,
    pins: Pins<A>,
}

impl<A: TestAddress> Newcomers<A>
where
    Model: FamilyTables<A>,
{
    fn new() -> Self {
        Self { clients: CLIENTS + 1..CLIENTS + 1, sport: NEW_PORT + 1, pins: Pins::new() }
    }

    /// Begins a new plan: forgets the clients of the last one, and does not reuse their addresses.
    fn begin(&mut self) {
        self.clients.start = self.clients.end;
        self.pins.clear();
    }

    /// More clients arrive, and all of them connect twice to every frontend.
    fn check(&mut self, model: &Model, frontends: &Frontends<A>, old: &Observed, new: &Observed) {
        // As long as there are addresses.
        self.clients.end = self.clients.end.checked_add(3).unwrap_or(self.clients.end);
        for _ in 0..2 {
            self.sport += 1;
            for (client, (key, frontend)) in
                self.clients.clone().flat_map(|client| frontends.iter().map(move |f| (client, f)))
            {
                if !is_for_everybody(key, frontend) {
                    continue;
                }
                let Some(pin) = connect(model, key, frontend, client, self.sport) else { continue };
                if let Some((before, former)) = self.pins.insert((*key, client), (*frontend, pin))
                    && must_hold(&former, &before, frontend, new)
                    && pools_of(old, frontend.group) == pools_of(new, frontend.group)
                {
                    assert_eq!(pin.to.0, former.to.0, "newcomer {client} was moved");
                }
            }
        }
    }
}

fn mapped(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// No prefix of a plan loses a client or moves it to another pod.
pub(super) fn check_prefixes(worlds: &[World]) {
    let mut store = store(ROOMY);
    let (mut new_v4, mut new_v6) = (Newcomers::<V4>::new(), Newcomers::<V6>::new());
    for (sport, world) in (OLD_PORT..).step_by(2).zip(worlds) {
        let old = observe(&store);
        let v4 = Residents::<V4>::arrive(&store.model, sport, &old.frontends_v4);
        let v6 = Residents::<V6>::arrive(&store.model, sport, &old.frontends_v6);
        new_v4.begin();
        new_v6.begin();
        let (steps, _) = plan(&old, &world.desired(), ROOMY);
        let mut new = old.clone();
        steps.iter().for_each(|step| new.apply(step));
        for done in 0..=steps.len() {
            for reversed in [false, true] {
                let model = store.model.clone();
                v4.check(&model, &old, &new, [&old.frontends_v4, &new.frontends_v4], reversed);
                v6.check(&model, &old, &new, [&old.frontends_v6, &new.frontends_v6], reversed);
            }
            let Some(step) = steps.get(done) else { continue };
            store.apply(step).expect("memory takes every step");
            if matches!(step, Op::PutFrontendV4(..) | Op::PutFrontendV6(..)) {
                new_v4.check(&store.model, &store.model.frontends_v4, &old, &new);
                new_v6.check(&store.model, &store.model.frontends_v6, &old, &new);
            }
        }
        new_v4.check(&store.model, &store.model.frontends_v4, &old, &new);
        new_v6.check(&store.model, &store.model.frontends_v6, &old, &new);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn plans_are_exact_and_keep_what_is_there(worlds in prop::collection::vec(world(3), 1..6)) {
        check_structure(&worlds, ROOMY);
    }

    #[test]
    fn plans_stay_within_their_room(worlds in prop::collection::vec(world(3), 1..6)) {
        check_structure(&worlds, TIGHT);
    }

    #[test]
    fn a_change_is_planned_as_if_in_full(snapshots in snapshots(12)) {
        check_changes(&snapshots, ROOMY);
    }

    #[test]
    fn a_backend_that_leaves_all_pools_lingers(worlds in prop::collection::vec((world(3), any::<u64>()), 1..8)) {
        check_lingering(&worlds);
    }

    #[test]
    fn a_change_is_planned_within_its_room(snapshots in snapshots(12)) {
        check_changes(&snapshots, TIGHT);
    }

    #[test]
    fn a_failed_step_is_repaired_by_the_next_plan(
        worlds in prop::collection::vec(world(3), 1..5),
        failing in prop::collection::btree_set(0usize..120, 0..8),
    ) {
        let mut store = FaultyStore::new(store(ROOMY), failing);
        for world in &worlds {
            // As the agent does: up to the first failure, then again from what the store holds.
            while let Some(()) = {
                let (steps, _) = plan(&observe(&store), &world.desired(), ROOMY);
                let failed = steps.iter().any(|step| store.apply(step).is_err());
                assert_consistent(&observe(&store));
                failed.then_some(())
            } {}
            let (again, problems) = plan(&observe(&store), &world.desired(), ROOMY);
            prop_assert_eq!(again, []);
            prop_assert_eq!(problems, []);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_prefix_of_a_plan_loses_or_moves_a_client(worlds in prop::collection::vec(inner_world(2), 2..5)) {
        check_prefixes(&worlds);
    }
}

proptest! {
    // Every additional frontend makes every state of every plan more expensive.
    #![proptest_config(ProptestConfig { cases: 4, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_prefix_of_a_plan_of_exposed_services_loses_or_moves_a_client(worlds in prop::collection::vec(world(2), 2..4)) {
        check_prefixes(&worlds);
    }
}
