//! The tables as ordered maps, with a clock that is set by hand: they replace the kernel in tests and in `affinity explain`.
//!
//! Unlike the kernel's, its LRU is exact: a full table drops the entry that was looked up or written longest ago.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    vec::Vec,
};

use bytemuck::{Pod, Zeroable};

use crate::{
    abi::{
        Address, Backend, BackendRef, Direction, Edit, Event, Field, Flow, FlowKey, FlowScratch, Foreign, FragmentKey,
        Frontend, FrontendKey, Member, MemberKey, Node, RangeKey, Reason, Session, SessionKey, Socket, SocketKey,
        UsageKey, UsageOf, V4, V6,
    },
    flow, foreign,
    global::{GlobalFunctions, Opened},
    headers::Headers,
    packet::Packet,
    pipeline,
    reject::Bucket,
    rewrite, snat,
    tables::{Entry, FamilyTables, NotStored, Pin, SocketTables, Tables, Unstable},
};

/// A map that drops the least recently used entry when it is full.
#[derive(Debug)]
pub struct Lru<K, V: Copy> {
    entries: BTreeMap<K, (u64, Rc<Cell<V>>)>,
    by_use: BTreeMap<u64, K>,
    clock: u64,
    capacity: usize,
}

impl<K: Ord + Copy, V: Copy> Lru<K, V> {
    /// Holds up to `capacity` entries.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { entries: BTreeMap::new(), by_use: BTreeMap::new(), clock: 0, capacity }
    }

    fn touch(&mut self, key: &K) -> Option<Rc<Cell<V>>> {
        self.clock += 1;
        let (used, value) = self.entries.get_mut(key)?;
        self.by_use.remove(used);
        *used = self.clock;
        self.by_use.insert(self.clock, *key);
        Some(Rc::clone(value))
    }

    /// A copy of the value, without counting as a use.
    pub fn get(&self, key: &K) -> Option<V> {
        self.entries.get(key).map(|(_, value)| value.get())
    }

    /// Stores an entry.
    pub fn insert(&mut self, key: K, value: V) {
        if let Some(cell) = self.touch(&key) {
            cell.set(value);
            return;
        }
        if self.entries.len() >= self.capacity
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.entries.remove(&oldest);
        }
        self.by_use.insert(self.clock, key);
        self.entries.insert(key, (self.clock, Rc::new(Cell::new(value))));
    }

    /// Removes an entry.
    pub fn remove(&mut self, key: &K) {
        if let Some((used, _)) = self.entries.remove(key) {
            self.by_use.remove(&used);
        }
    }

    /// Every entry, by key.
    pub fn iter(&self) -> impl Iterator<Item = (K, V)> + '_ {
        self.entries.iter().map(|(key, (_, value))| (*key, value.get()))
    }
}

/// A copy shares no value with the original.
impl<K: Copy + Ord, V: Copy> Clone for Lru<K, V> {
    fn clone(&self) -> Self {
        let entries = self.entries.iter().map(|(key, (used, value))| (*key, (*used, Rc::new(Cell::new(value.get())))));
        Self { entries: entries.collect(), by_use: self.by_use.clone(), clock: self.clock, capacity: self.capacity }
    }
}

/// A value of an [`Lru`], shared with it as a pointer into a map would be.
#[derive(Debug)]
pub struct Shared<V: Copy>(Rc<Cell<V>>);

impl<V: Pod> Entry<V> for Shared<V> {
    fn get(&self) -> V {
        self.0.get()
    }

    fn read<F: Pod>(&self, field: Field<V, F>) -> F {
        field.of(&self.0.get())
    }

    fn write<F: Pod>(&self, field: Field<V, F>, value: F) {
        let mut record = self.0.get();
        field.set(&mut record, &value);
        self.0.set(record);
    }

    fn add_bits(&self, field: Field<V, u32>, bits: u32) -> u32 {
        let before = self.read(field);
        self.write(field, before | bits);
        before
    }
}

impl Pin for Shared<Session> {
    fn snapshot(&self) -> Session {
        Session { service: 0, uses: 0, reason: 0, ..self.get() }
    }

    fn cas_backend(&self, from: BackendRef, to: BackendRef) -> bool {
        let is_there = self.backend() == from;
        if is_there {
            self.write(Session::BACKEND, to.index);
            self.write(Session::GENERATION, to.generation);
        }
        is_there
    }

    fn backend(&self) -> BackendRef {
        self.get().backend
    }

    fn connections(&self) -> u32 {
        self.read(Session::CONNECTIONS)
    }

    fn swap_connections(&self, from: u32, to: u32) -> bool {
        let is_there = self.connections() == from;
        if is_there {
            self.write(Session::CONNECTIONS, to);
        }
        is_there
    }
}

/// Everything that the pipeline reads and writes.
#[derive(Debug, Clone)]
pub struct Model {
    /// Monotonic time that the pipeline sees, in nanoseconds.
    pub now_ns: Cell<u64>,
    /// The pipeline's next random number; each draw replaces it by its successor unless `fixed_random` is set.
    pub random: Cell<u32>,
    /// Every draw returns the same number, as in the kernel programs with a fixed clock.
    pub fixed_random: bool,
    /// Frontends, IPv4.
    pub frontends_v4: BTreeMap<FrontendKey<V4>, Frontend>,
    /// Frontends, IPv6.
    pub frontends_v6: BTreeMap<FrontendKey<V6>, Frontend>,
    /// Ranges of addresses, IPv4.
    pub ranges_v4: BTreeSet<RangeKey<V4>>,
    /// Ranges of addresses, IPv6.
    pub ranges_v6: BTreeSet<RangeKey<V6>>,
    /// The addresses and ports for masquerading.
    pub node: Node,
    /// The cookie of the node's network namespace.
    pub node_netns: u64,
    /// Bits set in the filter, by part.
    pub filter: RefCell<BTreeSet<(Direction, u32)>>,
    /// Slots in use.
    pub slots: BTreeMap<u32, u32>,
    /// Members.
    pub members: BTreeMap<MemberKey, Member>,
    /// Backends.
    pub backends: BTreeMap<u32, Backend>,
    /// Live sessions by backend; wraps, as the kernel's does.
    pub loads: RefCell<BTreeMap<u32, u64>>,
    /// Sessions, IPv4.
    pub sessions_v4: RefCell<Lru<SessionKey<V4>, Session>>,
    /// Sessions, IPv6.
    pub sessions_v6: RefCell<Lru<SessionKey<V6>, Session>>,
    /// Flows, IPv4.
    pub flows_v4: RefCell<Lru<FlowKey<V4>, Flow<V4>>>,
    /// Flows, IPv6.
    pub flows_v6: RefCell<Lru<FlowKey<V6>, Flow<V6>>>,
    /// Connections to no frontend, IPv4.
    pub foreign_v4: RefCell<Lru<FlowKey<V4>, Foreign>>,
    /// Connections to no frontend, IPv6.
    pub foreign_v6: RefCell<Lru<FlowKey<V6>, Foreign>>,
    flow_scratch_v4: RefCell<FlowScratch<V4>>,
    flow_scratch_v6: RefCell<FlowScratch<V6>>,
    /// Upper devices.
    pub above: BTreeSet<u32>,
    /// Fragmented packets, IPv4.
    pub fragments_v4: RefCell<Lru<FragmentKey<V4>, FlowKey<V4>>>,
    /// Fragmented packets, IPv6.
    pub fragments_v6: RefCell<Lru<FragmentKey<V6>, FlowKey<V6>>>,
    /// Source ports given out, by backend.
    pub snat_port_cursor: RefCell<BTreeMap<u32, u64>>,
    /// The interval between two rejections, in nanoseconds; zero: no limit.
    pub rejection_interval_ns: u64,
    /// The bucket of the only CPU.
    pub rejections: Cell<Bucket>,
    /// Sockets.
    pub sockets: RefCell<Lru<SocketKey, Socket>>,
    /// Packets by reason.
    pub counters: RefCell<BTreeMap<Reason, u64>>,
    /// Entries made for counting by service and backend.
    pub usage: RefCell<BTreeMap<UsageKey, BTreeMap<Reason, u64>>>,
    /// Events, oldest first.
    pub events: RefCell<Vec<Event>>,
}

impl Model {
    /// Empty tables; each LRU holds `capacity` entries.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            now_ns: Cell::new(0),
            random: Cell::new(0),
            fixed_random: false,
            frontends_v4: BTreeMap::new(),
            frontends_v6: BTreeMap::new(),
            ranges_v4: BTreeSet::new(),
            ranges_v6: BTreeSet::new(),
            node: Node::default(),
            node_netns: 0,
            filter: RefCell::default(),
            slots: BTreeMap::new(),
            members: BTreeMap::new(),
            backends: BTreeMap::new(),
            loads: RefCell::default(),
            sessions_v4: RefCell::new(Lru::new(capacity)),
            sessions_v6: RefCell::new(Lru::new(capacity)),
            flows_v4: RefCell::new(Lru::new(capacity)),
            flows_v6: RefCell::new(Lru::new(capacity)),
            foreign_v4: RefCell::new(Lru::new(capacity)),
            foreign_v6: RefCell::new(Lru::new(capacity)),
            flow_scratch_v4: RefCell::new(FlowScratch::zeroed()),
            flow_scratch_v6: RefCell::new(FlowScratch::zeroed()),
            above: BTreeSet::new(),
            fragments_v4: RefCell::new(Lru::new(capacity)),
            fragments_v6: RefCell::new(Lru::new(capacity)),
            snat_port_cursor: RefCell::default(),
            rejection_interval_ns: 0,
            rejections: Cell::default(),
            sockets: RefCell::new(Lru::new(capacity)),
            counters: RefCell::default(),
            usage: RefCell::default(),
            events: RefCell::default(),
        }
    }
}

impl Tables for Model {
    type Entry<V: Pod> = Shared<V>;
    type Pin = Shared<Session>;

    fn now_ns(&self) -> u64 {
        self.now_ns.get()
    }

    fn random(&self) -> u32 {
        let drawn = self.random.get();
        if !self.fixed_random {
            self.random.set(crate::select::next_draw(drawn));
        }
        drawn
    }

    fn filter(&self, direction: Direction, bit: u32) -> bool {
        self.filter.borrow().contains(&(direction, bit))
    }

    fn mark(&self, direction: Direction, bit: u32) {
        self.filter.borrow_mut().insert((direction, bit));
    }

    fn node(&self) -> Option<Node> {
        Some(self.node)
    }

    fn is_above_another(&self, ifindex: u32) -> bool {
        self.above.contains(&ifindex)
    }

    fn next_snat_port(&self, backend: u32) -> u64 {
        let mut cursors = self.snat_port_cursor.borrow_mut();
        let count = cursors.entry(backend).or_default();
        *count += 1;
        *count - 1
    }

    fn slot(&self, index: u32) -> Option<u32> {
        self.slots.get(&index).copied()
    }

    fn backend(&self, index: u32) -> Option<Backend> {
        self.backends.get(&index).copied()
    }

    fn member(&self, key: &MemberKey) -> Option<Member> {
        self.members.get(key).copied()
    }

    fn load(&self, backend: u32) -> u64 {
        self.loads.borrow().get(&backend).map_or(0, |load| load.cast_signed().max(0).cast_unsigned())
    }

    fn add_load(&self, backend: u32, sessions: i64) {
        let mut loads = self.loads.borrow_mut();
        let load = loads.entry(backend).or_default();
        *load = load.wrapping_add_signed(sessions);
    }

    fn frontend_scratch<R>(&self, work: impl FnOnce(&mut Frontend) -> R) -> Option<R> {
        Some(work(&mut Frontend::zeroed()))
    }

    fn may_reject(&self) -> bool {
        if self.rejection_interval_ns == 0 {
            return true;
        }
        let rest = self.rejections.get().take(self.now_ns.get(), self.rejection_interval_ns);
        rest.inspect(|rest| self.rejections.set(*rest)).is_some()
    }

    fn count(&self, reason: Reason) {
        *self.counters.borrow_mut().entry(reason).or_default() += 1;
    }

    fn count_usage(&self, of: UsageOf, id: u32, reason: Reason) {
        if let Some(counts) = self.usage.borrow_mut().get_mut(&UsageKey { of: of as u32, id }) {
            *counts.entry(reason).or_default() += 1;
        }
    }

    fn report(&self, event: impl FnOnce() -> Event) {
        self.events.borrow_mut().push(event());
    }
}

/// Tables of user space: what is a global function of the kernel programs is an ordinary call.
pub trait DirectCalls: Tables {}

impl DirectCalls for Model {}

impl<A: Address, T: FamilyTables<A> + DirectCalls> GlobalFunctions<A> for T {
    fn open_connection(&self, headers: &Headers<A>) -> Opened {
        pipeline::open(self, headers)
    }

    fn note_change(&self, headers: &Headers<A>) {
        flow::note_change(self, headers);
    }

    fn note_leaving(&self, headers: &Headers<A>) {
        foreign::note_leaving(self, headers);
    }

    fn is_free(&self, replies: &FlowKey<A>) -> bool {
        snat::is_free(self, replies)
    }
}

macro_rules! family {
    ($address:ty, $frontends:ident, $ranges:ident, $sessions:ident, $flows:ident, $foreign:ident, $fragments:ident, $flow_scratch:ident) => {
        impl FamilyTables<$address> for Model {
            fn frontend(&self, key: &FrontendKey<$address>) -> Result<Option<Frontend>, Unstable> {
                Ok(self.$frontends.get(key).copied())
            }

            fn is_within(&self, scope: u32, address: $address) -> bool {
                (0..=<$address>::BITS).any(|bits| self.$ranges.contains(&RangeKey::new(scope, address, bits)))
            }

            fn session(&self, key: &SessionKey<$address>) -> Option<Shared<Session>> {
                self.$sessions.borrow_mut().touch(key).map(Shared)
            }

            fn add_session(&self, key: &SessionKey<$address>, session: &Session) -> Result<(), NotStored> {
                let mut sessions = self.$sessions.borrow_mut();
                if sessions.get(key).is_some() {
                    return Err(NotStored);
                }
                sessions.insert(*key, *session);
                Ok(())
            }

            fn flow(&self, key: &FlowKey<$address>) -> Option<Shared<Flow<$address>>> {
                self.$flows.borrow_mut().touch(key).map(Shared)
            }

            fn put_flow(&self, key: &FlowKey<$address>, flow: &Flow<$address>) -> Result<(), NotStored> {
                self.$flows.borrow_mut().insert(*key, *flow);
                Ok(())
            }

            fn add_flow(&self, key: &FlowKey<$address>, flow: &Flow<$address>) -> Result<(), NotStored> {
                let is_new = self.$flows.borrow().get(key).is_none();
                if is_new { self.put_flow(key, flow) } else { Err(NotStored) }
            }

            fn remove_flow(&self, key: &FlowKey<$address>) {
                self.$flows.borrow_mut().remove(key);
            }

            fn foreign(&self, replies: &FlowKey<$address>) -> Option<Shared<Foreign>> {
                self.$foreign.borrow_mut().touch(replies).map(Shared)
            }

            fn put_foreign(&self, replies: &FlowKey<$address>, foreign: &Foreign) {
                self.$foreign.borrow_mut().insert(*replies, *foreign);
            }

            fn flow_scratch<R>(&self, work: impl FnOnce(&mut FlowScratch<$address>) -> R) -> Option<R> {
                Some(work(&mut self.$flow_scratch.borrow_mut()))
            }

            fn opened_flow(&self) -> Option<Shared<Flow<$address>>> {
                Some(Shared(Rc::new(Cell::new(self.$flow_scratch.borrow().flow))))
            }

            fn fragment(&self, key: &FragmentKey<$address>) -> Option<FlowKey<$address>> {
                self.$fragments.borrow_mut().touch(key).map(|found| found.get())
            }

            fn put_fragment(&self, key: &FragmentKey<$address>, flow: &FlowKey<$address>) {
                self.$fragments.borrow_mut().insert(*key, *flow);
            }
        }
    };
}

family!(V4, frontends_v4, ranges_v4, sessions_v4, flows_v4, foreign_v4, fragments_v4, flow_scratch_v4);
family!(V6, frontends_v6, ranges_v6, sessions_v6, flows_v6, foreign_v6, fragments_v6, flow_scratch_v6);

impl SocketTables for Model {
    fn node_netns(&self) -> u64 {
        self.node_netns
    }

    fn socket(&self, key: &SocketKey) -> Option<Shared<Socket>> {
        self.sockets.borrow_mut().touch(key).map(Shared)
    }

    fn put_socket(&self, key: &SocketKey, socket: &Socket) -> Result<(), NotStored> {
        self.sockets.borrow_mut().insert(*key, *socket);
        Ok(())
    }

    fn remove_socket(&self, key: &SocketKey) {
        self.sockets.borrow_mut().remove(key);
    }
}

/// A frame is its bytes, with complete checksums.
impl Packet for Vec<u8> {
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..offset.checked_add(N)?)?.try_into().ok()
    }

    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool {
        match offset.checked_add(N).and_then(|end| self.get_mut(offset..end)) {
            Some(place) => {
                place.copy_from_slice(&bytes);
                true
            }
            None => false,
        }
    }

    fn rewrite<A: Address>(&mut self, headers: &Headers<A>, edit: &Edit<A>) -> bool {
        rewrite::in_place(self, headers, edit)
    }

    fn resize(&mut self, len: usize, _l4: usize) -> bool {
        Self::resize(self, len, 0);
        true
    }

    /// No known device.
    fn ifindex(&self) -> u32 {
        0
    }
}
