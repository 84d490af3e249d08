//! Two CPUs and one client, step by step: the other CPU handles whole packets between any two table accesses that the first CPU
//! makes for its packet.

use std::{cell::Cell, vec::Vec};

use bytemuck::Pod;

use super::*;
use crate::{
    abi::{Address, BackendRef, Field, Flow, FlowKey, FlowScratch, Foreign, FragmentKey, Node},
    model::{DirectCalls, Shared},
    pipeline,
    tables::{Entry, FamilyTables, NotStored, Pin, Unstable},
};

const OTHER_PORT: u16 = 2;
const STRANGERS: u16 = 3;

/// After how many accesses of the first CPU the other one does what.
type Work<'a> = (u32, &'a dyn Fn(&Cluster));

/// The tables as the first CPU sees them.
struct Interrupted<'a> {
    cluster: &'a Cluster,
    /// The first CPU's own tables.
    own: Model,
    /// Its accesses so far.
    accesses: Cell<u32>,
    /// What the other CPU has done.
    done: Cell<usize>,
    /// The work of the other CPU.
    others: &'a [Work<'a>],
}

impl<'a> Interrupted<'a> {
    fn new(cluster: &'a Cluster, others: &'a [Work<'a>]) -> Self {
        Self { cluster, own: Model::new(1), accesses: Cell::new(0), done: Cell::new(0), others }
    }

    fn step(&self) {
        while let Some((after, other)) = self.others.get(self.done.get())
            && *after <= self.accesses.get()
        {
            self.done.set(self.done.get() + 1);
            other(self.cluster);
        }
        self.accesses.set(self.accesses.get() + 1);
    }

    /// Whether the other CPU has done all its work.
    fn is_over(&self) -> bool {
        self.done.get() == self.others.len()
    }
}

/// Runs `packet` on the first CPU, interrupted by `other` after each possible number of accesses; `check` examines the result.
fn at_every_step(
    scene: impl Fn() -> Cluster,
    packet: impl Fn(&Interrupted<'_>),
    other: impl Fn(&Cluster),
    check: impl Fn(&Cluster, u32),
) {
    for after in 0.. {
        let cluster = scene();
        let others: [Work<'_>; 1] = [(after, &other)];
        let tables = Interrupted::new(&cluster, &others);
        packet(&tables);
        if !tables.is_over() {
            assert!(after > 3, "it was never interrupted");
            return;
        }
        check(&cluster, after);
    }
}

/// The same with two interruptions, after each possible pair of numbers of accesses.
fn at_every_two_steps(
    scene: impl Fn() -> Cluster,
    packet: impl Fn(&Interrupted<'_>),
    (first, then): (impl Fn(&Cluster), impl Fn(&Cluster)),
    check: impl Fn(&Cluster, [u32; 2]),
) {
    for after_first in 0.. {
        for after_then in after_first.. {
            let cluster = scene();
            let others: [Work<'_>; 2] = [(after_first, &first), (after_then, &then)];
            let tables = Interrupted::new(&cluster, &others);
            packet(&tables);
            if tables.is_over() {
                check(&cluster, [after_first, after_then]);
            } else if after_then > after_first {
                break;
            } else {
                assert!(after_first > 3, "it was never interrupted");
                return;
            }
        }
    }
}

/// A record as the first CPU sees it.
struct Stepwise<'a, 'b, V: Pod>(Shared<V>, &'a Interrupted<'b>);

impl<V: Pod> Entry<V> for Stepwise<'_, '_, V> {
    fn get(&self) -> V {
        self.1.step();
        self.0.get()
    }
    fn read<F: Pod>(&self, field: Field<V, F>) -> F {
        self.1.step();
        self.0.read(field)
    }
    fn write<F: Pod>(&self, field: Field<V, F>, value: F) {
        self.1.step();
        self.0.write(field, value);
    }
    fn add_bits(&self, field: Field<V, u32>, bits: u32) -> u32 {
        self.1.step();
        self.0.add_bits(field, bits)
    }
}

impl Pin for Stepwise<'_, '_, Session> {
    fn snapshot(&self) -> Session {
        self.1.step();
        self.0.snapshot()
    }
    fn cas_backend(&self, from: BackendRef, to: BackendRef) -> bool {
        self.1.step();
        self.0.cas_backend(from, to)
    }
    fn backend(&self) -> BackendRef {
        self.1.step();
        self.0.backend()
    }
    fn connections(&self) -> u32 {
        self.1.step();
        self.0.connections()
    }
    fn swap_connections(&self, from: u32, to: u32) -> bool {
        self.1.step();
        self.0.swap_connections(from, to)
    }
}

impl<'a, 'b> Tables for &'a Interrupted<'b> {
    type Entry<V: Pod> = Stepwise<'a, 'b, V>;
    type Pin = Stepwise<'a, 'b, Session>;

    fn now_ns(&self) -> u64 {
        self.cluster.0.now_ns()
    }
    fn random(&self) -> u32 {
        self.cluster.0.random()
    }
    fn filter(&self, direction: Direction, bit: u32) -> bool {
        self.cluster.0.filter(direction, bit)
    }
    fn mark(&self, direction: Direction, bit: u32) {
        self.cluster.0.mark(direction, bit);
    }
    fn node(&self) -> Option<Node> {
        self.cluster.0.node()
    }
    fn is_above_another(&self, ifindex: u32) -> bool {
        self.cluster.0.is_above_another(ifindex)
    }
    fn next_snat_port(&self, backend: u32) -> u64 {
        self.cluster.0.next_snat_port(backend)
    }
    fn slot(&self, index: u32) -> Option<u32> {
        self.cluster.0.slot(index)
    }
    fn backend(&self, index: u32) -> Option<Backend> {
        self.cluster.0.backend(index)
    }
    fn member(&self, key: &MemberKey) -> Option<Member> {
        self.step();
        self.cluster.0.member(key)
    }
    fn load(&self, backend: u32) -> u64 {
        self.step();
        self.cluster.0.load(backend)
    }
    fn add_load(&self, backend: u32, sessions: i64) {
        self.step();
        self.cluster.0.add_load(backend, sessions);
    }
    fn frontend_scratch<R>(&self, work: impl FnOnce(&mut Frontend) -> R) -> Option<R> {
        self.own.frontend_scratch(work)
    }
    fn may_reject(&self) -> bool {
        self.cluster.0.may_reject()
    }
    fn count(&self, reason: Reason) {
        self.cluster.0.count(reason);
    }
    fn count_usage(&self, of: UsageOf, id: u32, reason: Reason) {
        self.cluster.0.count_usage(of, id, reason);
    }
    fn report(&self, event: impl FnOnce() -> Event) {
        self.cluster.0.report(event);
    }
}

impl DirectCalls for &Interrupted<'_> {}

impl<A: Address> FamilyTables<A> for &Interrupted<'_>
where
    Model: FamilyTables<A>,
{
    fn foreign(&self, replies: &FlowKey<A>) -> Option<Self::Entry<Foreign>> {
        self.cluster.0.foreign(replies).map(|known| Stepwise(known, self))
    }
    fn put_foreign(&self, replies: &FlowKey<A>, foreign: &Foreign) {
        self.cluster.0.put_foreign(replies, foreign);
    }
    fn is_within(&self, scope: u32, address: A) -> bool {
        self.cluster.0.is_within(scope, address)
    }
    fn add_flow(&self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), NotStored> {
        self.cluster.0.add_flow(key, flow)
    }
    fn remove_flow(&self, key: &FlowKey<A>) {
        self.cluster.0.remove_flow(key);
    }
    fn flow_scratch<R>(&self, work: impl FnOnce(&mut FlowScratch<A>) -> R) -> Option<R> {
        self.own.flow_scratch(work)
    }
    fn opened_flow(&self) -> Option<Self::Entry<Flow<A>>> {
        self.own.opened_flow().map(|flow| Stepwise(flow, self))
    }
    fn fragment(&self, key: &FragmentKey<A>) -> Option<FlowKey<A>> {
        self.cluster.0.fragment(key)
    }
    fn put_fragment(&self, key: &FragmentKey<A>, flow: &FlowKey<A>) {
        self.cluster.0.put_fragment(key, flow);
    }
    fn frontend(&self, key: &FrontendKey<A>) -> Result<Option<Frontend>, Unstable> {
        self.cluster.0.frontend(key)
    }
    fn session(&self, key: &SessionKey<A>) -> Option<Self::Pin> {
        self.step();
        self.cluster.0.session(key).map(|pin| Stepwise(pin, self))
    }
    fn add_session(&self, key: &SessionKey<A>, session: &Session) -> Result<(), NotStored> {
        self.step();
        self.cluster.0.add_session(key, session)
    }
    fn flow(&self, key: &FlowKey<A>) -> Option<Self::Entry<Flow<A>>> {
        self.step();
        self.cluster.0.flow(key).map(|flow| Stepwise(flow, self))
    }
    fn put_flow(&self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), NotStored> {
        self.cluster.0.put_flow(key, flow)
    }
}

/// What happened to the client's pin before both packets arrive.
#[derive(Clone, Copy, Debug)]
enum Before {
    None,
    Fresh,
    Expired,
    Gone,
    Draining,
}

fn scene(select: Selection, draw: u32, before: Before) -> Cluster {
    let mut cluster = Cluster::new(|frontend| {
        (frontend.select, frontend.timer) = (select as u8, Timer::Alive as u8);
    });
    // Loads so close that a single pin more or less changes which pod is the less loaded one.
    for pod in 0..PODS {
        cluster.0.loads.get_mut().insert(pod, 10 + u64::from(draw >> pod & 1));
    }
    cluster.0.random.set(draw);
    if matches!(before, Before::None) {
        return cluster;
    }
    let pod = cluster.connect(CLIENT, 9);
    if !matches!(before, Before::Gone | Before::Draining) {
        cluster.segment(CLIENT, 9, RST).unwrap();
    }
    match before {
        Before::None | Before::Fresh => {}
        Before::Expired => cluster.wait_s(TIMEOUT_S),
        Before::Gone => cluster.stop(pod),
        Before::Draining => cluster.drain(1, pod),
    }
    cluster
}

/// Both packets reach one pod. The pin names it and, once both connections are open, counts both. The loads count the pin once.
#[test]
fn two_cpus_agree_at_every_interleaving() {
    let mut moves_in_the_middle = 0;
    for select in [Selection::Random, Selection::Consistent, Selection::Least] {
        for before in [Before::None, Before::Fresh, Before::Expired, Before::Gone, Before::Draining] {
            for draw in 0..200u32 {
                for after in 0.. {
                    let cluster = scene(select, draw.wrapping_mul(0x9e37_79b1), before);
                    let loads: u64 = cluster.0.loads.borrow().values().sum();
                    let went = Cell::new(0);
                    let other = |cluster: &Cluster| {
                        // Clients that change the loads, which the first CPU may have read already.
                        for number in 0..STRANGERS {
                            cluster.connect(client(number), OTHER_PORT);
                        }
                        went.set(cluster.connect(CLIENT, OTHER_PORT));
                    };
                    let others: [Work<'_>; 1] = [(after, &other)];
                    let tables = Interrupted::new(&cluster, &others);
                    let mut frame = Shape::tcp(SYN).frame(&Ends { from: (CLIENT, 1), to: WEB });
                    assert_eq!(pipeline::forward(&mut frame, &&tables), Verdict::Forward);
                    if !tables.is_over() {
                        break;
                    }
                    let other = went.get();
                    let what = format!("{select:?}, {before:?}, draw {draw}, after {after} steps");
                    assert_eq!(u32::from(frame[33]), other, "{what}");
                    for port in [1, OTHER_PORT] {
                        cluster.complete(other, CLIENT, port);
                    }
                    let pin = cluster.session(GROUP, CLIENT).expect("a pin");
                    assert_eq!((pin.backend.index, pin.live_connections()), (other, 2), "{what}");
                    assert_eq!(pin.backend.generation, 1, "{what}");
                    let new = u64::from(matches!(before, Before::None)) + u64::from(STRANGERS);
                    assert_eq!(cluster.0.loads.borrow().values().sum::<u64>(), loads + new, "{what}");
                    assert_eq!(cluster.count(Reason::SessionNotStored), 0, "{what}");
                    moves_in_the_middle += u32::from(cluster.count(Reason::Expired) > 0);
                }
            }
        }
    }
    assert!(moves_in_the_middle > 1000, "{moves_in_the_middle}");
}

/// Without an interruption, a CPU never follows another one; the test above would detect it.
#[test]
fn an_uninterrupted_cpu_moves_the_pin_itself() {
    let moves: Vec<Reason> = [Before::None, Before::Fresh, Before::Expired, Before::Gone, Before::Draining]
        .into_iter()
        .map(|before| {
            let cluster = scene(Selection::Random, 5, before);
            cluster.0.counters.borrow_mut().clear();
            cluster.connect(CLIENT, 1);
            *cluster.0.counters.borrow().keys().next().expect("a reason")
        })
        .collect();
    assert_eq!(moves, [Reason::Created, Reason::Pinned, Reason::Expired, Reason::BackendGone, Reason::NotReady]);
}

/// A service under `alive`: a connection from port 1 to the returned pod, and one from port 9 that stays open.
fn alive() -> (Cluster, u32) {
    let cluster = Cluster::new(|frontend| frontend.timer = Timer::Alive as u8);
    let pod = cluster.connect(CLIENT, 1);
    cluster.complete(pod, CLIENT, 1);
    cluster.open(CLIENT, 9);
    (cluster, pod)
}

/// A segment of the client that the first CPU handles.
fn segment(tables: &Interrupted<'_>, flags: u8) {
    let mut frame = Shape::tcp(flags).frame(&Ends { from: (CLIENT, 1), to: WEB });
    assert_eq!(pipeline::forward(&mut frame, &tables), Verdict::Forward);
}

/// A whole new connection of the same client, with its handshake.
fn open_another(cluster: &Cluster) {
    cluster.open(CLIENT, OTHER_PORT);
}

fn live(cluster: &Cluster) -> u32 {
    cluster.session(GROUP, CLIENT).expect("a pin").live_connections()
}

/// Two CPUs see the two FINs, in either order: the connection has ended, and is uncounted once.
#[test]
fn both_ends_at_once_are_one_end() {
    let (_, pod) = alive();
    at_every_step(
        || alive().0,
        |tables| segment(tables, FIN | ACK),
        |cluster| cluster.reply(pod, CLIENT, 1, FIN | ACK),
        |cluster, after| {
            assert_eq!(live(cluster), 1, "after {after} steps");
            cluster.connect(CLIENT, 1);
            assert_eq!(live(cluster), 1, "a new connection ends none, after {after} steps");
        },
    );
}

/// The end of a connection is never counted for a connection to another pod, even if the pin has moved meanwhile.
#[test]
fn an_end_is_subtracted_from_the_pod_that_counted_the_connection() {
    let scene = || {
        let (mut cluster, pod) = alive();
        cluster.drain(1, pod);
        cluster
    };
    at_every_step(
        scene,
        |tables| segment(tables, RST),
        open_another,
        |cluster, after| {
            assert_eq!(live(cluster), 1, "the connection to the other pod, after {after} steps");
        },
    );
}

/// A connection that opens is not counted for a pod other than its own, either.
#[test]
fn a_connection_is_counted_for_its_own_pod() {
    let scene = || {
        let mut cluster = Cluster::new(|frontend| frontend.timer = Timer::Alive as u8);
        let pod = cluster.connect(CLIENT, 1);
        cluster.reply(pod, CLIENT, 1, SYN | ACK);
        cluster.drain(1, pod);
        cluster
    };
    at_every_step(
        scene,
        |tables| segment(tables, ACK),
        open_another,
        |cluster, after| {
            assert_eq!(live(cluster), 1, "after {after} steps");
        },
    );
}

/// Two CPUs see the client's ACK: it opened one connection.
#[test]
fn a_connection_opens_once() {
    let scene = || {
        let cluster = Cluster::new(|frontend| frontend.timer = Timer::Alive as u8);
        let pod = cluster.connect(CLIENT, 1);
        cluster.reply(pod, CLIENT, 1, SYN | ACK);
        cluster
    };
    let again = |cluster: &Cluster| {
        cluster.segment(CLIENT, 1, ACK).unwrap();
    };
    at_every_step(
        scene,
        |tables| segment(tables, ACK),
        again,
        |cluster, after| {
            assert_eq!(live(cluster), 1, "after {after} steps");
        },
    );
}

/// Two connections in their middle count as soon as they are seen, even if each of two CPUs moves the expired pin, and the
/// second one finds it at its former backend.
#[test]
fn a_pin_that_stays_where_it_was_keeps_its_connections() {
    let mut stayed = 0;
    for draw in 0..50u32 {
        let scene = || scene(Selection::Random, draw.wrapping_mul(0x9e37_79b1), Before::Expired);
        let was = scene().session(GROUP, CLIENT).expect("a pin").backend;
        let other = |cluster: &Cluster| {
            cluster.segment(CLIENT, OTHER_PORT, ACK).unwrap();
        };
        at_every_step(
            scene,
            |tables| segment(tables, ACK),
            other,
            |cluster, after| assert_eq!(live(cluster), 2, "draw {draw}, after {after} steps"),
        );
        let cluster = scene();
        stayed += u32::from(cluster.segment(CLIENT, 1, ACK) == Ok(was.index));
    }
    assert!(stayed > 0, "no draw leaves the pin where it was");
}

/// The second CPU renews the expired pin, then counts its connection, while the first one is about to renew the pin, too, and
/// stands still for as long as it likes.
#[test]
fn a_connection_counts_while_another_processor_renews_the_pin() {
    for draw in 0..50u32 {
        let scene = || scene(Selection::Random, draw.wrapping_mul(0x9e37_79b1), Before::Expired);
        let pod = Cell::new(0);
        let open = |cluster: &Cluster| pod.set(cluster.connect(CLIENT, OTHER_PORT));
        let complete = |cluster: &Cluster| cluster.complete(pod.get(), CLIENT, OTHER_PORT);
        at_every_two_steps(
            scene,
            |tables| segment(tables, ACK),
            (open, complete),
            |cluster, after| assert_eq!(live(cluster), 2, "draw {draw}, after {after:?} steps"),
        );
    }
}
