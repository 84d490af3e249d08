//! System calls of processes on their sockets, as scenarios on the model.

use std::vec::Vec;

use super::*;
use crate::{
    abi::{AFFINITY, Backend, Member, SECOND_NS, Selection, Session, UsageKey, UsageOf},
    headers::{TCP, UDP},
    model::Model,
};

const SERVICE: u32 = 1;
const GROUP: u32 = 100;
const PODS: u32 = 4;
const POD_PORT: Port = Port::new(8080);
const NODE: u64 = 1;
const WEB_V4: Peer =
    Peer { address: V6([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 96, 0, 1]), port: Port::new(80) };
const WEB_V6: Peer = Peer { address: V6([0xfd, 0, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]), port: Port::new(80) };

/// One service on four pods of each family: the even backends are IPv4, the odd ones IPv6.
struct Node(Model);

impl Node {
    fn new(change: impl Fn(&mut Frontend)) -> Self {
        let mut model = Model::new(1024);
        model.now_ns.set(1_000_000 * SECOND_NS);
        model.usage.get_mut().insert(UsageKey { of: UsageOf::Service as u32, id: SERVICE }, Default::default());
        let mut node = Self(model);
        for (pool, at) in [(1, WEB_V4), (2, WEB_V6)] {
            let mut frontend = Frontend {
                timeout_ns: 60 * SECOND_NS,
                service: SERVICE,
                pool,
                group: GROUP,
                own: GROUP + pool,
                slot_first: pool * PODS,
                slot_count: PODS,
                seed: 3,
                select: Selection::Random as u8,
                timer: Timer::Connection as u8,
                prefix: if pool == 1 { 24 } else { 64 },
                flags: AFFINITY,
            };
            change(&mut frontend);
            for pod in 0..PODS {
                node.start(pool, pod);
            }
            for protocol in [TCP, UDP] {
                node.publish(at, protocol, frontend);
            }
        }
        node
    }

    fn start(&mut self, pool: u32, pod: u32) {
        let backend = 2 * pod + pool - 1;
        let address = pod_address(pool, pod);
        self.0.slots.insert(pool * PODS + pod, backend);
        self.0.backends.insert(backend, Backend { address: address.0, generation: 1, flags: 0 });
        let member = Member::ready(1, POD_PORT);
        self.0.members.insert(MemberKey { pool, backend }, member);
        for protocol in [TCP, UDP] {
            let bit = if pool == 1 {
                filter_bit(V4::from_mapped(address.0), POD_PORT, protocol)
            } else {
                filter_bit(address, POD_PORT, protocol)
            };
            self.0.filter.borrow_mut().insert((Direction::RevDnat, bit));
        }
    }

    fn publish(&mut self, at: Peer, protocol: u8, frontend: Frontend) {
        let bit = if at.is_ipv4() {
            let address = V4::from_mapped(at.address.0);
            self.0.frontends_v4.insert(FrontendKey::new(address, at.port, protocol), frontend);
            filter_bit(address, at.port, protocol)
        } else {
            self.0.frontends_v6.insert(FrontendKey::new(at.address, at.port, protocol), frontend);
            filter_bit(at.address, at.port, protocol)
        };
        self.0.filter.borrow_mut().insert((Direction::Dnat, bit));
    }

    fn later(&self, seconds: u64) {
        self.0.now_ns.set(self.0.now_ns.get() + seconds * SECOND_NS);
    }

    fn connect(&self, socket: &Caller, to: &Peer) -> Peer {
        redirected(connect(&self.0, socket, to))
    }

    fn send(&self, socket: &Caller, to: &Peer) -> Peer {
        redirected(send(&self.0, socket, to))
    }

    fn session(&self, netns: u64, family: u8) -> Option<Session> {
        self.0.sessions_v6.borrow().get(&SessionKey::new(GROUP, netns_client(netns, family), V6::BITS))
    }

    fn sockets(&self) -> Vec<SocketKey> {
        self.0.sockets.borrow().iter().map(|(key, _)| key).collect()
    }

    fn count(&self, reason: Reason) -> u64 {
        self.0.counters.borrow().get(&reason).copied().unwrap_or(0)
    }

    /// Removes the backend that a socket is connected to from its pool.
    fn stop(&mut self, peer: &Peer) {
        let (&backend, _) = self.0.backends.iter().find(|(_, record)| record.address == peer.address.0).unwrap();
        let pool = 1 + backend % 2;
        self.0.backends.get_mut(&backend).unwrap().generation += 1;
        self.0.members.remove(&MemberKey { pool, backend });
        let other = (backend + 2) % (2 * PODS);
        self.0.slots.values_mut().filter(|slot| **slot == backend).for_each(|slot| *slot = other);
    }
}

fn pod_address(pool: u32, pod: u32) -> V6 {
    let mut address = if pool == 1 { V4([10, 244, 0, 0]).to_mapped() } else { WEB_V6.address.0 };
    address[14] = 7;
    address[15] = pod as u8;
    V6(address)
}

fn redirected(answer: Answer) -> Peer {
    match answer {
        Answer::Redirect(peer) => peer,
        Answer::Leave | Answer::Reject => panic!("{answer:?}"),
    }
}

fn tcp(cookie: u64) -> Caller {
    Caller { cookie, netns: NODE, protocol: TCP }
}

fn udp(cookie: u64) -> Caller {
    Caller { cookie, netns: NODE, protocol: UDP }
}

#[test]
fn a_namespace_keeps_to_one_backend_and_is_told_that_it_is_the_frontend() {
    let node = Node::new(|_| {});
    for (family, web) in [(4, WEB_V4), (6, WEB_V6)] {
        let peers: Vec<Peer> = (0..20).map(|cookie| node.connect(&tcp(cookie), &web)).collect();
        assert!(peers.iter().all(|peer| *peer == peers[0] && peer.port == POD_PORT), "{peers:?}");
        assert_eq!(peers[0].is_ipv4(), web.is_ipv4());
        assert_eq!(connected_to(&node.0, &tcp(3), &peers[0]), Some(web));
        assert_eq!(connected_to(&node.0, &tcp(77), &peers[0]), None, "a socket that asked for the pod itself");
        let session = node.session(NODE, family).unwrap();
        assert_eq!((session.uses, session.connections), (20, 0));
    }
    let pods: std::collections::BTreeSet<[u8; 16]> =
        (10..60).map(|netns| node.connect(&Caller { netns, ..tcp(netns) }, &WEB_V4).address.0).collect();
    assert_eq!(pods.len(), PODS as usize, "other namespaces are other clients");
    assert_eq!(node.count(Reason::Created), 52);
    assert_eq!(node.count(Reason::Pinned), 38);
}

#[test]
fn what_is_no_frontend_is_left_alone() {
    let node = Node::new(|_| {});
    let other = Peer { port: Port::new(81), ..WEB_V4 };
    assert_eq!(connect(&node.0, &tcp(1), &other), Answer::Leave);
    assert_eq!(send(&node.0, &udp(1), &other), Answer::Leave);
    assert_eq!(received(&node.0, &udp(1), &other), None);
    assert_eq!(node.count(Reason::NotFrontend), 2);
    assert_eq!(node.count(Reason::NotReply), 1);
    assert_eq!(node.sockets(), []);
}

#[test]
fn a_node_port_on_loopback_is_for_the_nodes_processes_alone() {
    let mut node = Node::new(|_| {});
    node.0.node_netns = NODE;
    let loopback =
        [[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]];
    for (address, like) in loopback.into_iter().zip([WEB_V4, WEB_V6]) {
        let to = Peer { address: V6(address), port: Port::new(30_080) };
        let mut frontend = Frontend::zeroed();
        like.frontend(&node.0, UDP, &mut frontend).unwrap();
        node.publish(to, UDP, frontend);
        let of_pod = Caller { netns: NODE + 1, ..udp(1) };
        assert_ne!(node.send(&udp(2), &to), to);
        assert_eq!(send(&node.0, &of_pod, &to), Answer::Leave);
        assert_ne!(redirected(send(&node.0, &of_pod, &like)), like, "the pod is served where it asks for the service");
    }
    assert_eq!(node.count(Reason::NotFrontend), 2);
}

#[test]
fn shadow_mode_leaves_the_decision_to_the_packets() {
    let node = Node::new(|frontend| frontend.flags |= SHADOW);
    assert_eq!(connect(&node.0, &tcp(1), &WEB_V4), Answer::Leave);
    assert_eq!(send(&node.0, &udp(1), &WEB_V4), Answer::Leave);
    assert_eq!((node.count(Reason::Shadow), node.session(NODE, 4)), (2, None));
}

#[test]
fn sockets_without_endpoints_are_rejected_and_counted() {
    let node = Node::new(|frontend| frontend.slot_count = 0);
    assert_eq!(connect(&node.0, &tcp(1), &WEB_V6), Answer::Reject);
    assert_eq!(send(&node.0, &udp(1), &WEB_V4), Answer::Reject);
    assert_eq!(node.count(Reason::NoEndpoints), 2);
    let usage = node.0.usage.borrow();
    assert_eq!(usage[&UsageKey { of: UsageOf::Service as u32, id: SERVICE }][&Reason::NoEndpoints], 2);
    assert_eq!(node.sockets(), []);
}

#[test]
fn datagrams_of_a_socket_keep_to_a_backend_until_it_is_not_ready() {
    let mut node = Node::new(|frontend| frontend.flags = 0);
    let peer = node.send(&udp(1), &WEB_V4);
    for _ in 0..20 {
        node.later(1);
        assert_eq!(node.send(&udp(1), &WEB_V4), peer, "without affinity too: it is a flow");
    }
    assert_eq!(received(&node.0, &udp(1), &peer), Some(WEB_V4));
    assert_eq!(received(&node.0, &udp(2), &peer), None, "another socket knows the pod as itself");
    assert_eq!((node.count(Reason::Selected), node.count(Reason::Established)), (1, 20));
    node.stop(&peer);
    let next = node.send(&udp(1), &WEB_V4);
    assert_ne!(next, peer);
    assert_eq!(received(&node.0, &udp(1), &next), Some(WEB_V4));
    assert_eq!(received(&node.0, &udp(1), &peer), Some(WEB_V4), "a late reply");
}

#[test]
fn datagrams_of_a_socket_go_on_where_the_frontend_has_gone_and_the_backend_has_not() {
    let mut node = Node::new(|_| {});
    let peer = node.send(&udp(1), &WEB_V4);
    node.0.frontends_v4.clear();
    let members = std::mem::take(&mut node.0.members);
    assert_eq!(node.send(&udp(1), &WEB_V4), peer);
    assert_eq!(send(&node.0, &udp(2), &WEB_V4), Answer::Leave, "nobody new");
    node.0.members = members;
    node.stop(&peer);
    assert_eq!(send(&node.0, &udp(1), &WEB_V4), Answer::Leave);
}

#[test]
fn a_connected_socket_that_asks_who_sent_is_told_the_frontend() {
    let node = Node::new(|_| {});
    let peer = node.connect(&udp(1), &WEB_V6);
    assert_eq!(received(&node.0, &udp(1), &peer), Some(WEB_V6));
    assert_eq!(connect(&node.0, &udp(1), &peer), Answer::Leave, "connected again, to the pod itself");
    assert_eq!(received(&node.0, &udp(1), &peer), None);
    assert_eq!(connected_to(&node.0, &udp(1), &peer), None);
}

#[test]
fn evicted_records_of_replies_are_restored() {
    let node = Node::new(|_| {});
    let peer = node.send(&udp(1), &WEB_V4);
    node.0.sockets.borrow_mut().remove(&udp(1).key(SocketRole::Receiving, &peer));
    assert_eq!(received(&node.0, &udp(1), &peer), None);
    node.later(1);
    node.send(&udp(1), &WEB_V4);
    assert_eq!(received(&node.0, &udp(1), &peer), Some(WEB_V4));
}

#[test]
fn each_connection_restarts_the_timer_and_under_packet_each_datagram() {
    for timer in [Timer::Connection, Timer::Packet] {
        let node = Node::new(|frontend| frontend.timer = timer as u8);
        node.connect(&tcp(1), &WEB_V4);
        node.later(59);
        node.connect(&tcp(2), &WEB_V4);
        node.later(59);
        node.send(&udp(3), &WEB_V4);
        assert_eq!(node.count(Reason::Pinned), 2);
        node.later(59);
        node.send(&udp(3), &WEB_V4);
        node.later(59);
        node.connect(&tcp(4), &WEB_V4);
        let pinned = if timer == Timer::Packet { 3 } else { 2 };
        assert_eq!(node.count(Reason::Pinned), pinned, "{timer:?}");
        assert_eq!(node.count(Reason::Expired), 3 - pinned, "{timer:?}");
    }
}

#[test]
fn under_alive_a_pin_lives_as_long_as_its_sockets() {
    let node = Node::new(|frontend| frontend.timer = Timer::Alive as u8);
    node.connect(&tcp(1), &WEB_V4);
    node.connect(&udp(2), &WEB_V4);
    assert_eq!(node.session(NODE, 4).unwrap().connections, 2);
    node.later(1000);
    node.connect(&tcp(3), &WEB_V4);
    assert_eq!((node.count(Reason::Pinned), node.count(Reason::Expired)), (2, 0));
    for socket in [tcp(1), udp(2), tcp(3), tcp(3)] {
        release(&node.0, &socket);
    }
    assert_eq!(node.session(NODE, 4).unwrap().connections, 0);
    assert_eq!(node.sockets(), []);
    node.later(60);
    node.connect(&tcp(4), &WEB_V4);
    assert_eq!(node.count(Reason::Expired), 1);
}

#[test]
fn a_socket_that_connects_again_has_one_connection() {
    let node = Node::new(|frontend| frontend.timer = Timer::Alive as u8);
    for _ in 0..3 {
        node.connect(&tcp(1), &WEB_V4);
    }
    assert_eq!(node.session(NODE, 4).unwrap().connections, 1);
}

#[test]
fn a_pin_whose_pod_has_gone_moves() {
    let mut node = Node::new(|_| {});
    let peer = node.connect(&tcp(1), &WEB_V4);
    node.stop(&peer);
    let next = node.connect(&tcp(2), &WEB_V4);
    assert_ne!(next, peer);
    assert_eq!(node.connect(&tcp(3), &WEB_V4), next);
    assert_eq!(node.count(Reason::BackendGone), 1);
    assert_eq!(connected_to(&node.0, &tcp(1), &peer), Some(WEB_V4), "who is connected stays so");
}
