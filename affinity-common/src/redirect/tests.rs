//! A masqueraded connection to a pod on another node and back, without the stack; and the packets that go to the stack.

use std::vec::Vec;

use bytemuck::Zeroable;

use super::*;
use crate::{
    abi::{
        Backend, Direction, Edit, FLOW_ANSWERED, FLOW_OPEN, Frontend, FrontendKey, MASQUERADE, Member, MemberKey, Node,
        Port, filter_bit,
    },
    headers::{ACK, FIN, Headers, SYN, TCP},
    model::Model,
    packet::Packet,
    rewrite,
    testing::{Ends, Shape},
};

const LINK: [u8; 12] = [1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15, 16];
/// The device of the only next hop.
const WIRE: u32 = 7;
const NODE_PORT: u16 = 30_000;

/// A family's addresses.
trait Sited: Address {
    const CLIENT: Self;
    const SERVICE: Self;
    const NODE: Self;
    const POD: Self;

    fn publish(model: &mut Model, key: FrontendKey<Self>, frontend: Frontend);
}

impl Sited for V4 {
    const CLIENT: Self = V4([198, 18, 0, 1]);
    const SERVICE: Self = V4([192, 0, 2, 80]);
    const NODE: Self = V4([192, 0, 2, 1]);
    const POD: Self = V4([10, 244, 1, 10]);

    fn publish(model: &mut Model, key: FrontendKey<V4>, frontend: Frontend) {
        model.frontends_v4.insert(key, frontend);
        model.node.address_v4 = Self::NODE;
    }
}

impl Sited for V6 {
    const CLIENT: Self = V6([0x20; 16]);
    const SERVICE: Self = V6([0x30; 16]);
    const NODE: Self = V6([0x40; 16]);
    const POD: Self = V6([0x50; 16]);

    fn publish(model: &mut Model, key: FrontendKey<V6>, frontend: Frontend) {
        model.frontends_v6.insert(key, frontend);
        model.node.address_v6 = Self::NODE;
    }
}

impl NextHop for Option<u32> {
    fn link(&self) -> Option<Link> {
        self.map(|_| LINK)
    }
}

/// A frame with the result of its FIB lookup.
struct Frame {
    bytes: Vec<u8>,
    hop: Option<u32>,
}

impl Packet for Frame {
    fn ifindex(&self) -> u32 {
        0
    }
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.read(offset)
    }
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool {
        self.bytes.write(offset, bytes)
    }
    fn rewrite<A: Address>(&mut self, headers: &Headers<A>, edit: &Edit<A>) -> bool {
        rewrite::in_place(self, headers, edit)
    }
    fn resize(&mut self, len: usize, l4: usize) -> bool {
        Packet::resize(&mut self.bytes, len, l4)
    }
}

impl FibLookup for Frame {
    type Hop = Option<u32>;

    fn fib_lookup<A: Address>(&self, key: &FibKey<A>) -> Option<u32> {
        assert_eq!(usize::from(key.len), self.bytes.len() - EthHdr::LEN);
        assert_eq!((key.protocol, key.class), (TCP, 0));
        let ports: [u8; 4] = self.bytes.read(key.transport()).expect("a TCP header");
        assert_eq!([key.sport.0, key.dport.0].concat(), ports, "rules and multipath routes may choose by them");
        self.hop
    }
}

/// A node port with one pod, which is on another node if `remote`.
fn world<A: Sited>(remote: bool) -> Model {
    let mut model = Model::new(16);
    model.now_ns.set(1);
    let flags = u32::from(!remote);
    model.backends.insert(0, Backend { address: A::POD.to_mapped(), generation: 1, flags });
    let member = Member::ready(1, Port::new(8080));
    model.members.insert(MemberKey { pool: 1, backend: 0 }, member);
    model.slots.insert(0, 0);
    model.node = Node { port_first: Port::new(NODE_PORT), port_count: 1, ..Node::default() };
    let (slot_count, prefix, flags) = (1, A::BITS, MASQUERADE);
    let frontend = Frontend { service: 1, pool: 1, slot_count, prefix, flags, ..Frontend::zeroed() };
    let port = Port::new(80);
    model.filter.borrow_mut().insert((Direction::Dnat, filter_bit(A::SERVICE, port, TCP)));
    model.filter.borrow_mut().insert((Direction::RevDnat, filter_bit(A::POD, member.port, TCP)));
    A::publish(&mut model, FrontendKey::new(A::SERVICE, port, TCP), frontend);
    model
}

const fn from_client<A: Sited>() -> Ends<A> {
    Ends { from: (A::CLIENT, 40_000), to: (A::SERVICE, 80) }
}

/// Sends a frame through the node; returns the device that it is redirected to, or the verdict.
fn send(model: &Model, frame: &mut Frame, is_wire: bool) -> Result<u32, Verdict> {
    match pipeline::forward(frame, model) {
        Verdict::Redirect => redirect(frame, model, |hop| hop.filter(|_| is_wire)),
        verdict @ (Verdict::Pass | Verdict::Forward | Verdict::Answer | Verdict::Drop) => Err(verdict),
    }
}

/// A segment as it leaves on the wire, with the TTL decremented.
fn sent<A: Sited>(flags: u8, ends: &Ends<A>) -> Vec<u8> {
    let mut frame = Shape { time_to_live: 63, ..Shape::tcp(flags) }.frame(ends);
    frame[..LINK.len()].copy_from_slice(&LINK);
    frame
}

fn goes_to_the_pod_and_back<A: Sited>() {
    let model = world::<A>(true);
    let hop = Some(WIRE);
    let mut there = Frame { bytes: Shape::tcp(SYN).frame(&from_client::<A>()), hop };
    assert_eq!(send(&model, &mut there, true), Ok(WIRE));
    let to_pod = Ends { from: (A::NODE, NODE_PORT), to: (A::POD, 8080) };
    assert_eq!(there.bytes, sent(SYN, &to_pod));

    let reply = Ends { from: to_pod.to, to: to_pod.from };
    let mut back = Frame { bytes: Shape::tcp(SYN | ACK).frame(&reply), hop };
    assert_eq!(send(&model, &mut back, true), Ok(WIRE));
    let Ends { from, to } = from_client::<A>();
    assert_eq!(back.bytes, sent(SYN | ACK, &Ends { from: to, to: from }));
    assert_eq!(model.counters.borrow().get(&Reason::Redirected), Some(&2));
}

#[test]
fn a_connection_goes_to_a_pod_on_another_node_and_back() {
    goes_to_the_pod_and_back::<V4>();
    goes_to_the_pod_and_back::<V6>();
}

/// Otherwise the records of its SNAT would be removed a minute after its last packet.
#[test]
fn all_records_of_a_connection_whose_handshake_was_not_seen_are_open() {
    let model = world::<V4>(true);
    let mut frame = Frame { bytes: Shape::tcp(ACK).frame(&from_client::<V4>()), hop: Some(WIRE) };
    assert_eq!(pipeline::forward(&mut frame, &model), Verdict::Redirect);
    let states: Vec<u8> = model.flows_v4.borrow().iter().map(|(_, flow)| flow.state).collect();
    assert_eq!(states, [FLOW_ANSWERED | FLOW_OPEN; 4]);
}

fn knows_replies<A: Sited>() {
    let model = world::<A>(true);
    let reply = Shape::tcp(ACK).frame(&Ends { from: (A::POD, 8080), to: (A::CLIENT, 40_000) });
    assert!(!is_reply(&reply, &model), "nobody has asked");

    let mut request = Shape::tcp(SYN).frame(&from_client::<A>());
    assert_eq!(pipeline::forward(&mut request, &model), Verdict::Redirect);
    let there = Shape::tcp(SYN).frame(&Ends { from: (A::CLIENT, 40_000), to: (A::POD, 8080) });
    assert_eq!(request, there);
    let back = |flags, port| Shape::tcp(flags).frame(&Ends { from: (A::POD, 8080), to: (A::CLIENT, port) });
    assert!(is_reply(&back(ACK, 40_000), &model));
    assert!(!is_reply(&back(ACK, 40_001), &model), "of another connection");
    assert!(!is_reply(&there, &model), "the way there");

    let mut end = Shape::tcp(FIN | ACK).frame(&from_client::<A>());
    assert_eq!(pipeline::forward(&mut end, &model), Verdict::Redirect);
    assert!(is_reply(&back(FIN | ACK, 40_000), &model), "at its end, too");
}

#[test]
fn a_reply_is_known_by_its_flow() {
    knows_replies::<V4>();
    knows_replies::<V6>();
}

/// The stack gets the packet with the first translation only, as without XDP.
fn leaves_to_the_stack<A: Sited>(shape: &Shape, hop: Option<u32>, is_wire: bool) {
    let model = world::<A>(true);
    let mut frame = Frame { bytes: shape.frame(&from_client::<A>()), hop };
    assert_eq!(send(&model, &mut frame, is_wire), Err(Verdict::Forward), "{shape:?}");
    let Ends { from, .. } = from_client::<A>();
    assert_eq!(frame.bytes, shape.frame(&Ends { from, to: (A::POD, 8080) }), "{shape:?}");
    assert_eq!(model.counters.borrow().get(&Reason::Redirected), None);
}

#[test]
fn what_is_not_plain_is_left_to_the_stack() {
    let hop = Some(WIRE);
    for shape in [
        Shape { tags: 1, ..Shape::tcp(SYN) },
        Shape { option_words: 1, extensions: vec![0], ..Shape::tcp(SYN) },
        Shape { time_to_live: 1, ..Shape::tcp(SYN) },
    ] {
        leaves_to_the_stack::<V4>(&shape, hop, true);
        leaves_to_the_stack::<V6>(&shape, hop, true);
    }
}

#[test]
fn packets_without_a_route_are_left_to_the_stack() {
    let shape = Shape::tcp(SYN);
    for (hop, is_wire) in [(None, true), (Some(WIRE), false)] {
        leaves_to_the_stack::<V4>(&shape, hop, is_wire);
        leaves_to_the_stack::<V6>(&shape, hop, is_wire);
    }
}

#[test]
fn a_first_fragment_is_left_to_the_stack() {
    const MORE_FRAGMENTS: u8 = 0x20;
    let model = world::<V4>(true);
    let mut bytes = Shape::tcp(SYN).frame(&from_client::<V4>());
    bytes[20] = MORE_FRAGMENTS;
    let mut frame = Frame { bytes, hop: Some(WIRE) };
    assert_eq!(send(&model, &mut frame, true), Err(Verdict::Forward));
}

#[test]
fn a_pod_of_this_node_is_for_the_stack() {
    let mut frame = Frame { bytes: Shape::tcp(SYN).frame(&from_client::<V4>()), hop: None };
    assert_eq!(send(&world::<V4>(false), &mut frame, true), Err(Verdict::Forward));
}
