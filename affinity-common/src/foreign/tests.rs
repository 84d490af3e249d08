//! Two connections with equal reply keys, on the model: both work, whichever comes first, and packets of foreign connections
//! are not changed.

use std::vec::Vec;

use crate::{
    abi::{
        AFFINITY, Address, BACKEND_LOCAL, Backend, Direction, Edit, Frontend, FrontendKey, MASQUERADE, Member,
        MemberKey, NODE, Node, Port, RangeKey, Reason, V4, filter_bit,
    },
    headers::{ACK, FIN, Headers, RST, SYN, TCP, UDP},
    model::Model,
    pipeline::{self, Verdict},
    rewrite,
    snat::EXCHANGE_SILENT_NS,
    tables::Tables,
    testing::{Ends, Shape},
};

type End = (V4, u16);

const SERVICE: End = (V4([10, 96, 0, 1]), 80);
const NODE_PORT: End = (V4([192, 0, 2, 1]), 30_080);
const POD: End = (V4([10, 244, 0, 1]), 8080);
const CLIENT: End = (V4([198, 18, 0, 1]), 40_000);
const STRANGER: End = (V4([203, 0, 113, 9]), 53);
/// The first source port that SNAT gives.
const SNAT_PORT: u16 = 1024;
/// A port of the node that SNAT may use, too.
const OF_NODE: End = (NODE_PORT.0, SNAT_PORT);
const BRIDGE: u32 = 7;

/// A node with one pod, and a service for `protocol`.
struct Site {
    model: Model,
    protocol: u8,
}

impl Site {
    fn new(protocol: u8) -> Self {
        let mut model = Model::new(64);
        model.now_ns.set(1_000_000_000_000_000);
        model.backends.insert(0, Backend { address: mapped(POD.0), generation: 1, flags: BACKEND_LOCAL });
        let member = Member::ready(1, Port::new(POD.1));
        model.members.insert(MemberKey { pool: 1, backend: 0 }, member);
        model.slots.insert(0, 0);
        let port_first = Port::new(SNAT_PORT);
        model.node = Node { address_v4: NODE_PORT.0, port_first, port_count: 1000, ..Node::default() };
        model.ranges_v4.insert(RangeKey::new(NODE, NODE_PORT.0, 32));
        for (at, flags) in [(SERVICE, AFFINITY), (NODE_PORT, AFFINITY | MASQUERADE)] {
            let frontend = Frontend {
                timeout_ns: 60_000_000_000,
                service: 1,
                pool: 1,
                group: 1,
                own: 2,
                slot_first: 0,
                slot_count: 1,
                seed: 0,
                select: 0,
                timer: 0,
                prefix: 32,
                flags,
            };
            model.frontends_v4.insert(FrontendKey::new(at.0, Port::new(at.1), protocol), frontend);
            model.filter.borrow_mut().insert((Direction::Dnat, bit(at, protocol)));
        }
        model.filter.borrow_mut().insert((Direction::RevDnat, bit(POD, protocol)));
        Self { model, protocol }
    }

    fn frame(&self, flags: u8, from: End, to: End) -> Vec<u8> {
        let shape = if self.protocol == TCP { Shape::tcp(flags) } else { Shape::udp() };
        shape.frame(&Ends { from, to })
    }

    /// A packet arrives: returns its ends afterwards, or the verdict.
    fn enter(&self, flags: u8, from: End, to: End) -> Result<(End, End), Verdict> {
        let mut frame = self.frame(flags, from, to);
        match pipeline::forward(&mut frame, &self.model) {
            Verdict::Forward => Ok(ends(&frame)),
            verdict @ (Verdict::Pass | Verdict::Redirect | Verdict::Answer | Verdict::Drop) => {
                let untouched = frame == self.frame(flags, from, to);
                assert!(untouched || verdict != Verdict::Pass);
                Err(verdict)
            }
        }
    }

    /// A packet leaves: returns its ends afterwards, or the verdict.
    fn leave(&self, flags: u8, from: End, to: End) -> Result<(End, End), Verdict> {
        let mut frame = self.frame(flags, from, to);
        match pipeline::reverse(&mut frame, &self.model) {
            Verdict::Forward => Ok(ends(&frame)),
            verdict @ (Verdict::Pass | Verdict::Redirect | Verdict::Answer | Verdict::Drop) => Err(verdict),
        }
    }

    /// Opens and answers a connection through the service; returns the source that the pod sees.
    fn by_service(&self) -> End {
        let (source, to) = self.enter(SYN, CLIENT, SERVICE).expect("it is served");
        assert_eq!(to, POD);
        self.goes_on_by_service(source);
        source
    }

    fn goes_on_by_service(&self, source: End) {
        assert_eq!(self.leave(SYN | ACK, POD, source), Ok((SERVICE, CLIENT)));
        assert_eq!(self.enter(ACK, CLIENT, SERVICE), Ok((source, POD)));
    }

    fn count(&self, reason: Reason) -> u64 {
        self.model.counters.borrow().get(&reason).copied().unwrap_or(0)
    }

    fn wait_ns(&self, ns: u64) {
        self.model.now_ns.set(self.model.now_ns() + ns);
    }
}

fn mapped(address: V4) -> [u8; 16] {
    crate::abi::Address::to_mapped(address)
}

fn bit(at: End, protocol: u8) -> u32 {
    filter_bit(at.0, Port::new(at.1), protocol)
}

fn ends(frame: &[u8]) -> (End, End) {
    let address = |at: usize| V4([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    ((address(26), port(34)), (address(30), port(36)))
}

const PASSES: Result<(End, End), Verdict> = Err(Verdict::Pass);

// ---- straight to a pod ----

#[test]
fn the_service_first_and_then_straight() {
    for protocol in [TCP, UDP] {
        let site = Site::new(protocol);
        let source = site.by_service();
        assert_eq!(source, CLIENT);
        let (moved, to) = site.enter(SYN, CLIENT, POD).expect("it gets another port");
        assert_eq!(to, POD);
        assert_ne!(moved, CLIENT);
        assert_eq!(site.leave(SYN | ACK, POD, moved), Ok((POD, CLIENT)));
        assert_eq!(site.enter(ACK, CLIENT, POD), Ok((moved, POD)));
        site.goes_on_by_service(source);
        assert_eq!(site.count(Reason::PortChanged), 1);
    }
}

#[test]
fn straight_first_and_then_the_service() {
    let site = Site::new(TCP);
    assert_eq!(site.enter(SYN, CLIENT, POD), PASSES);
    assert_eq!(site.leave(SYN | ACK, POD, CLIENT), PASSES);
    assert_eq!(site.enter(ACK, CLIENT, POD), PASSES);
    let source = site.by_service();
    assert_ne!(source, CLIENT);
    assert_eq!(site.leave(ACK, POD, CLIENT), PASSES, "the other one's replies");
    assert_eq!(site.enter(ACK, CLIENT, POD), PASSES);
    site.goes_on_by_service(source);
}

/// Direct datagrams are not noted: the next one finds that its replies now match a flow.
#[test]
fn straight_first_by_datagrams_and_then_the_service() {
    let site = Site::new(UDP);
    assert_eq!(site.enter(0, CLIENT, POD), PASSES);
    assert_eq!(site.leave(0, POD, CLIENT), PASSES);
    let source = site.by_service();
    let (moved, _) = site.enter(0, CLIENT, POD).expect("it gets another port");
    assert_ne!(moved, source);
    assert_eq!(site.leave(0, POD, moved), Ok((POD, CLIENT)));
    site.goes_on_by_service(source);
}

#[test]
fn a_connection_that_is_over_holds_no_port() {
    let site = Site::new(TCP);
    site.enter(SYN, CLIENT, POD).unwrap_err();
    site.leave(SYN | ACK, POD, CLIENT).unwrap_err();
    assert_eq!(site.enter(FIN | ACK, CLIENT, POD), PASSES);
    assert_ne!(site.by_service(), CLIENT, "the pod may have more to say");
    let site = Site::new(TCP);
    site.enter(SYN, CLIENT, POD).unwrap_err();
    site.enter(FIN | ACK, CLIENT, POD).unwrap_err();
    site.leave(FIN | ACK, POD, CLIENT).unwrap_err();
    assert_eq!(site.by_service(), CLIENT);

    let site = Site::new(TCP);
    site.by_service();
    site.enter(RST, CLIENT, SERVICE).unwrap();
    assert_eq!(site.enter(SYN, CLIENT, POD), PASSES, "its port is free again");
    assert_eq!(site.leave(SYN | ACK, POD, CLIENT), PASSES);

    let site = Site::new(UDP);
    site.by_service();
    site.wait_ns(EXCHANGE_SILENT_NS);
    assert_eq!(site.enter(0, CLIENT, POD), PASSES);
    assert_eq!(site.leave(0, POD, CLIENT), PASSES);
}

/// A frame that a bridge passes on is already translated, and looks like a direct connection to the pod.
#[test]
fn what_a_port_of_a_bridge_has_translated_is_not_translated_again() {
    for protocol in [TCP, UDP] {
        let mut site = Site::new(protocol);
        site.model.above.insert(BRIDGE);
        let source = site.by_service();
        let mut frame = Seen(site.frame(SYN, source, POD));
        assert_eq!(pipeline::forward(&mut frame, &site.model), Verdict::Pass);
        assert_eq!(frame.0, site.frame(SYN, source, POD));
        site.goes_on_by_service(source);
    }
}

/// A frame that arrives on the bridge.
struct Seen(Vec<u8>);

impl crate::packet::Packet for Seen {
    fn ifindex(&self) -> u32 {
        BRIDGE
    }
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.read(offset)
    }
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool {
        self.0.write(offset, bytes)
    }
    fn rewrite<A: Address>(&mut self, headers: &Headers<A>, edit: &Edit<A>) -> bool {
        rewrite::in_place(self, headers, edit)
    }
    fn resize(&mut self, _len: usize, _l4: usize) -> bool {
        false
    }
}

// ---- the node's own ----

#[test]
fn replies_to_the_nodes_own_connections_are_not_for_a_node_port() {
    let site = Site::new(TCP);
    // A process on the node is connected from a port that is a node port, or was when this began.
    for flags in [SYN | ACK, ACK, FIN | ACK, RST | ACK] {
        assert_eq!(site.enter(flags, STRANGER, NODE_PORT), PASSES, "{flags:#x}");
    }
    assert_eq!(site.count(Reason::NotOurs), 4);
    assert!(site.enter(SYN, CLIENT, NODE_PORT).is_ok(), "a client's connection is served");
    // Only a service has this address: a connection is taken over if its beginning was not seen.
    assert!(site.enter(ACK, CLIENT, SERVICE).is_ok());
}

#[test]
fn answers_to_the_nodes_own_datagrams_are_not_for_a_node_port() {
    let site = Site::new(UDP);
    assert_eq!(site.leave(0, NODE_PORT, STRANGER), PASSES);
    assert_eq!(site.enter(0, STRANGER, NODE_PORT), PASSES);
    assert_eq!(site.count(Reason::NotOurs), 1);
    assert!(site.enter(0, CLIENT, NODE_PORT).is_ok(), "a client's datagram is served");
    site.wait_ns(super::UDP_NS);
    assert!(site.enter(0, STRANGER, NODE_PORT).is_ok(), "nobody has asked for long");
}

/// Replies to a masqueraded client leave from the frontend too. They belong to a flow.
#[test]
fn our_own_replies_are_not_others_connections() {
    let site = Site::new(UDP);
    let (_, pod) = site.enter(0, CLIENT, NODE_PORT).expect("it is served");
    let (node, _) = site.leave(0, CLIENT, pod).expect("it is masqueraded");
    let (_, client) = site.enter(0, POD, node).expect("it comes back");
    assert_eq!(site.leave(0, POD, client), Ok((NODE_PORT, CLIENT)));
    // On a port of the bridge, after the bridge itself.
    assert_eq!(site.leave(0, NODE_PORT, CLIENT), PASSES);
    assert!(site.enter(0, CLIENT, NODE_PORT).is_ok(), "the next datagram is served");
}

#[test]
fn snat_takes_no_port_that_the_node_has_to_the_pod() {
    for protocol in [TCP, UDP] {
        let site = Site::new(protocol);
        assert_eq!(site.leave(SYN, OF_NODE, POD), PASSES, "the node's own connection");
        site.enter(SYN, CLIENT, NODE_PORT).expect("it is served");
        let (node, _) = site.leave(SYN, CLIENT, POD).expect("it is masqueraded");
        assert_eq!(node, (OF_NODE.0, SNAT_PORT + 1));
        assert_eq!(site.enter(SYN | ACK, POD, OF_NODE), PASSES, "the node's own reply");
        assert_eq!(site.enter(SYN | ACK, POD, node), Ok((POD, CLIENT)));
    }
}
