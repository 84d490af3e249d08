//! Two processors and one client, step by step: another packet of the client is handled whole between any two accesses
//! to the tables that the handling of the first one makes.

use std::{cell::Cell, vec::Vec};

use super::*;
use crate::{
    abi::{Draft, Flow, FlowKey, FragmentKey, Node},
    model::Shared,
    parse::Headers,
    pipeline::{self, Opened},
    tables::{Entry, FamilyTables, NotStored, Pin},
};

const OTHER_PORT: u16 = 2;
const STRANGERS: u16 = 3;

/// The tables as the first processor sees them.
struct Interrupted<'a> {
    cluster: &'a Cluster,
    /// Accesses until the other processor comes.
    left: Cell<u32>,
    /// Where the other one's packet went.
    other: Cell<Option<u32>>,
}

impl Interrupted<'_> {
    fn step(&self) {
        match self.left.get().checked_sub(1) {
            Some(left) => self.left.set(left),
            None if self.other.get().is_none() => {
                // Clients that change the loads, which the first processor may have read already.
                for number in 0..STRANGERS {
                    self.cluster.connect(client(number), OTHER_PORT);
                }
                self.other.set(Some(self.cluster.connect(CLIENT, OTHER_PORT)));
            }
            None => {}
        }
    }
}

/// A pin as the first processor sees it.
struct Stepwise<'a, 'b>(Shared<Session>, &'a Interrupted<'b>);

impl Entry<Session> for Stepwise<'_, '_> {
    fn get(&self) -> Session {
        self.1.step();
        self.0.get()
    }
    fn with<R>(&self, read: impl FnOnce(&Session) -> R) -> R {
        self.1.step();
        self.0.with(read)
    }
    fn update(&self, change: impl FnOnce(&mut Session)) {
        self.1.step();
        self.0.update(change);
    }
}

impl Pin for Stepwise<'_, '_> {
    fn observe(&self) -> Session {
        self.1.step();
        self.0.observe()
    }
    fn repin(&self, from: (u32, u32), to: (u32, u32)) -> bool {
        self.1.step();
        self.0.repin(from, to)
    }
    fn add_connections(&self, connections: u32) {
        self.1.step();
        self.0.add_connections(connections);
    }
}

impl<'a, 'b> Tables for &'a Interrupted<'b> {
    type Entry<V: Copy> = Shared<V>;
    type Pin = Stepwise<'a, 'b>;

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
    fn tried(&self, backend: u32) -> u64 {
        self.cluster.0.tried(backend)
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
    fn count(&self, reason: Reason) {
        self.cluster.0.count(reason);
    }
    fn count_usage(&self, of: UsageOf, id: u32, reason: Reason) {
        self.cluster.0.count_usage(of, id, reason);
    }
    fn report(&self, event: &Event) {
        self.cluster.0.report(event);
    }
}

impl<A: crate::abi::Address> FamilyTables<A> for &Interrupted<'_>
where
    Model: FamilyTables<A>,
{
    fn open(&self, headers: &Headers<A>) -> Opened {
        pipeline::open(self, headers)
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
    fn draft<R>(&self, work: impl FnOnce(&mut Draft<A>) -> R) -> Option<R> {
        self.cluster.0.draft(work)
    }
    fn fragment(&self, key: &FragmentKey<A>) -> Option<FlowKey<A>> {
        self.cluster.0.fragment(key)
    }
    fn put_fragment(&self, key: &FragmentKey<A>, flow: &FlowKey<A>) {
        self.cluster.0.put_fragment(key, flow);
    }
    fn frontend(&self, key: &FrontendKey<A>) -> Option<&Frontend> {
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
    fn flow(&self, key: &FlowKey<A>) -> Option<Shared<Flow<A>>> {
        self.cluster.0.flow(key)
    }
    fn put_flow(&self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), NotStored> {
        self.cluster.0.put_flow(key, flow)
    }
}

/// What became of the client's pin before both packets come.
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
    // Loads so close that one pin more or less makes another pod the less loaded one.
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

/// Both packets reach one pod, the pin names it and counts both connections, and the loads count the pin once.
#[test]
fn whenever_the_other_comes_both_agree() {
    let mut moves_in_the_middle = 0;
    for select in [Selection::Random, Selection::Consistent, Selection::Least] {
        for before in [Before::None, Before::Fresh, Before::Expired, Before::Gone, Before::Draining] {
            for draw in 0..200u32 {
                for after in 0.. {
                    let cluster = scene(select, draw.wrapping_mul(0x9e37_79b1), before);
                    let loads: u64 = cluster.0.loads.borrow().values().sum();
                    let tables = Interrupted { cluster: &cluster, left: Cell::new(after), other: Cell::new(None) };
                    let mut frame = Shape::tcp(SYN).frame(&Ends { from: (CLIENT, 1), to: WEB });
                    assert_eq!(pipeline::forward(&mut frame, &&tables), Verdict::Forward);
                    let Some(other) = tables.other.get() else { break };
                    let what = format!("{select:?}, {before:?}, draw {draw}, after {after} steps");
                    assert_eq!(u32::from(frame[33]), other, "{what}");
                    let pin = cluster.session(GROUP, CLIENT).expect("a pin");
                    assert_eq!((pin.backend, pin.connections), (other, 2), "{what}");
                    assert_eq!(pin.generation, 1, "{what}");
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

/// Where nobody comes in between, nobody follows: the test above would see it.
#[test]
fn alone_a_processor_makes_the_move_itself() {
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
