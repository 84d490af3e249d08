//! A table has no room, or a frame cannot be changed: no packet is forwarded half translated, and each case has its own
//! counter.

use std::{cell::Cell, vec::Vec};

use bytemuck::Pod;

use super::*;
use crate::{
    abi::{
        AFFINITY, BACKEND_LOCAL, Backend, BackendRef, Event, FlowScratch, Foreign, FragmentKey, FrontendKey, Member,
        MemberKey, Node, Port, Session, SessionKey, UsageKey, UsageOf, V4, V6,
    },
    headers::{ACK, SYN, TCP},
    model::{DirectCalls, Model},
    rewrite,
    tables::{FamilyTables, NotStored, Unstable},
    testing::{Ends, Shape},
};

const SERVICE: (V4, u16) = (V4([10, 96, 0, 1]), 80);
const CLIENT: (V4, u16) = (V4([198, 18, 0, 1]), 40_000);

/// A model with tables that do not take new entries of some kinds, or get them from another CPU first.
struct Failing {
    model: Model,
    sessions: Sessions,
    /// Number of flow records that are still stored.
    flows: Cell<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sessions {
    Taken,
    NoRoom,
    /// Another CPU pins the client to this backend just before.
    Overtaken(u32),
}

impl Tables for Failing {
    type Entry<V: Pod> = <Model as Tables>::Entry<V>;
    type Pin = <Model as Tables>::Pin;

    fn now_ns(&self) -> u64 {
        self.model.now_ns()
    }
    fn random(&self) -> u32 {
        self.model.random()
    }
    fn filter(&self, direction: Direction, bit: u32) -> bool {
        self.model.filter(direction, bit)
    }
    fn mark(&self, direction: Direction, bit: u32) {
        self.model.mark(direction, bit);
    }
    fn node(&self) -> Option<Node> {
        self.model.node()
    }
    fn is_above_another(&self, ifindex: u32) -> bool {
        self.model.is_above_another(ifindex)
    }
    fn next_snat_port(&self, backend: u32) -> u64 {
        self.model.next_snat_port(backend)
    }
    fn slot(&self, index: u32) -> Option<u32> {
        self.model.slot(index)
    }
    fn backend(&self, index: u32) -> Option<Backend> {
        self.model.backend(index)
    }
    fn member(&self, key: &MemberKey) -> Option<Member> {
        self.model.member(key)
    }
    fn load(&self, backend: u32) -> u64 {
        self.model.load(backend)
    }
    fn add_load(&self, backend: u32, sessions: i64) {
        self.model.add_load(backend, sessions);
    }
    fn frontend_scratch<R>(&self, work: impl FnOnce(&mut Frontend) -> R) -> Option<R> {
        self.model.frontend_scratch(work)
    }
    fn may_reject(&self) -> bool {
        self.model.may_reject()
    }
    fn count(&self, reason: Reason) {
        self.model.count(reason);
    }
    fn count_usage(&self, of: UsageOf, id: u32, reason: Reason) {
        self.model.count_usage(of, id, reason);
    }
    fn report(&self, event: impl FnOnce() -> Event) {
        self.model.report(event);
    }
}

impl DirectCalls for Failing {}

impl<A: Address> FamilyTables<A> for Failing
where
    Model: FamilyTables<A>,
{
    fn foreign(&self, replies: &FlowKey<A>) -> Option<Self::Entry<Foreign>> {
        self.model.foreign(replies)
    }
    fn put_foreign(&self, replies: &FlowKey<A>, foreign: &Foreign) {
        self.model.put_foreign(replies, foreign);
    }
    fn is_within(&self, scope: u32, address: A) -> bool {
        self.model.is_within(scope, address)
    }
    fn add_flow(&self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), NotStored> {
        self.flows.set(self.flows.get().checked_sub(1).ok_or(NotStored)?);
        self.model.add_flow(key, flow)
    }
    fn remove_flow(&self, key: &FlowKey<A>) {
        self.model.remove_flow(key);
    }
    fn flow_scratch<R>(&self, work: impl FnOnce(&mut FlowScratch<A>) -> R) -> Option<R> {
        self.model.flow_scratch(work)
    }
    fn opened_flow(&self) -> Option<Self::Entry<Flow<A>>> {
        self.model.opened_flow()
    }
    fn fragment(&self, key: &FragmentKey<A>) -> Option<FlowKey<A>> {
        self.model.fragment(key)
    }
    fn put_fragment(&self, key: &FragmentKey<A>, flow: &FlowKey<A>) {
        self.model.put_fragment(key, flow);
    }
    fn frontend(&self, key: &FrontendKey<A>) -> Result<Option<Frontend>, Unstable> {
        self.model.frontend(key)
    }
    fn session(&self, key: &SessionKey<A>) -> Option<Self::Pin> {
        self.model.session(key)
    }
    fn add_session(&self, key: &SessionKey<A>, session: &Session) -> Result<(), NotStored> {
        match self.sessions {
            Sessions::Taken => self.model.add_session(key, session),
            Sessions::NoRoom => Err(NotStored),
            Sessions::Overtaken(index) => {
                let backend = BackendRef { index, ..session.backend };
                self.model.add_session(key, &Session { backend, ..*session })?;
                Err(NotStored)
            }
        }
    }
    fn flow(&self, key: &FlowKey<A>) -> Option<Self::Entry<Flow<A>>> {
        self.model.flow(key)
    }
    fn put_flow(&self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), NotStored> {
        self.flows.set(self.flows.get().checked_sub(1).ok_or(NotStored)?);
        self.model.put_flow(key, flow)
    }
}

/// A service with two pods; every draw selects the first one.
fn failing(sessions: Sessions, flows: u32) -> Failing {
    let mut model = Model::new(16);
    model.now_ns.set(1_000_000_000_000);
    model.fixed_random = true;
    for pod in [0, 1] {
        let address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 244, 0, pod as u8];
        model.backends.insert(pod, Backend { address, generation: 1, flags: BACKEND_LOCAL });
        let member = Member::ready(1, Port::new(8080));
        model.members.insert(MemberKey { pool: 1, backend: pod }, member);
        model.slots.insert(pod, pod);
    }
    let frontend = Frontend {
        timeout_ns: 60_000_000_000,
        service: 1,
        pool: 1,
        group: 1,
        own: 2,
        slot_first: 0,
        slot_count: 2,
        seed: 0,
        select: 0,
        timer: 0,
        prefix: 32,
        flags: AFFINITY,
    };
    let port = Port::new(SERVICE.1);
    model.frontends_v4.insert(FrontendKey::new(SERVICE.0, port, TCP), frontend);
    model.filter.borrow_mut().insert((Direction::Dnat, filter_bit(SERVICE.0, port, TCP)));
    model.usage.get_mut().insert(UsageKey { of: UsageOf::Service as u32, id: 1 }, Default::default());
    Failing { model, sessions, flows: Cell::new(flows) }
}

fn counters(failing: &Failing) -> Vec<(Reason, u64)> {
    failing.model.counters.borrow().iter().map(|(reason, count)| (*reason, *count)).collect()
}

fn first_frame() -> Vec<u8> {
    Shape::tcp(SYN).frame(&Ends { from: CLIENT, to: SERVICE })
}

#[test]
fn without_room_for_a_pin_the_connection_goes_on_unpinned() {
    let tables = failing(Sessions::NoRoom, 2);
    let mut frame = first_frame();
    assert_eq!(forward(&mut frame, &tables), Verdict::Forward);
    assert_eq!(counters(&tables), [(Reason::Selected, 1), (Reason::SessionNotStored, 1)]);
    assert!(tables.model.events.borrow().is_empty() && tables.model.loads.borrow().is_empty());
    let flows = tables.model.flows_v4.borrow();
    assert!(flows.iter().all(|(_, flow)| flow.scope == 0), "no pin to renew or to count");
}

#[test]
fn the_second_cpu_follows_the_pin_of_the_first() {
    let tables = failing(Sessions::Overtaken(1), 2);
    let mut frame = first_frame();
    assert_eq!(forward(&mut frame, &tables), Verdict::Forward);
    assert_eq!(frame[30..34], [10, 244, 0, 1], "not the pod that it had drawn itself");
    assert_eq!(counters(&tables), [(Reason::Pinned, 1)]);
    let uses: Vec<u32> = tables.model.sessions_v4.borrow().iter().map(|(_, session)| session.uses).collect();
    assert_eq!(uses, [2]);
}

/// The record for replies is stored first, so no connection is let through without translation of its replies.
#[test]
fn without_room_for_its_flow_a_connection_is_dropped() {
    for room in [0, 1] {
        let tables = failing(Sessions::Taken, room);
        let mut frame = first_frame();
        assert_eq!(forward(&mut frame, &tables), Verdict::Drop);
        assert_eq!(frame, first_frame());
        assert_eq!(counters(&tables), [(Reason::FlowNotStored, 1)]);
        // The client's retry finds its pin.
        tables.flows.set(3);
        assert_eq!(forward(&mut frame, &tables), Verdict::Forward);
        assert_eq!(counters(&tables), [(Reason::Pinned, 1), (Reason::FlowNotStored, 1)]);
    }
}

/// A frame that cannot be resized, and perhaps not rewritten.
struct Stiff {
    bytes: Vec<u8>,
    can_be_rewritten: bool,
}

impl Packet for Stiff {
    fn ifindex(&self) -> u32 {
        0
    }
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.read(offset)
    }
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool {
        self.bytes.write(offset, bytes)
    }
    fn rewrite<A: Address>(&mut self, headers: &Headers<A>, edit: &crate::abi::Edit<A>) -> bool {
        self.can_be_rewritten && rewrite::in_place(self, headers, edit)
    }
    fn resize(&mut self, _len: usize, _l4: usize) -> bool {
        false
    }
}

#[test]
fn a_frame_that_cannot_be_rewritten_is_dropped() {
    let tables = failing(Sessions::Taken, 2);
    let mut frame = Stiff { bytes: first_frame(), can_be_rewritten: false };
    assert_eq!(forward(&mut frame, &tables), Verdict::Drop);
    assert_eq!(counters(&tables), [(Reason::NotRewritten, 1)]);
}

#[test]
fn a_refusal_that_cannot_be_written_is_a_drop() {
    let mut tables = failing(Sessions::Taken, 2);
    tables.model.frontends_v4.values_mut().for_each(|frontend| frontend.slot_count = 0);
    let mut frame = Stiff { bytes: first_frame(), can_be_rewritten: true };
    assert_eq!(forward(&mut frame, &tables), Verdict::Drop);
    assert_eq!(counters(&tables), [(Reason::NoReplyBuilt, 1)]);
}

#[test]
fn a_service_of_the_other_family_is_another() {
    let tables = failing(Sessions::Taken, 2);
    let mapped = |of: V4| V6(of.to_mapped());
    let ends = Ends { from: (mapped(CLIENT.0), CLIENT.1), to: (mapped(SERVICE.0), SERVICE.1) };
    let mut frame = Shape::tcp(ACK).frame(&ends);
    assert_eq!(forward(&mut frame, &tables), Verdict::Pass);
    assert_eq!(counters(&tables), [(Reason::NotFrontend, 1)]);
}

/// A node port on loopback is only for the node's own sockets: packets that arrive on a device pass untranslated.
#[test]
fn a_frontend_on_loopback_is_for_no_packet() {
    const LOOPBACK: V4 = V4([127, 0, 0, 1]);
    let mut tables = failing(Sessions::Taken, 2);
    let port = Port::new(SERVICE.1);
    let frontend = tables.model.frontends_v4[&FrontendKey::new(SERVICE.0, port, TCP)];
    tables.model.frontends_v4.insert(FrontendKey::new(LOOPBACK, port, TCP), frontend);
    tables.model.filter.borrow_mut().insert((Direction::Dnat, filter_bit(LOOPBACK, port, TCP)));
    let mut frame = Shape::tcp(SYN).frame(&Ends { from: CLIENT, to: (LOOPBACK, SERVICE.1) });
    assert_eq!(forward(&mut frame, &tables), Verdict::Pass);
    assert_eq!(counters(&tables), [(Reason::NotFrontend, 1)]);
}
