//! The semantics of a pin, as scenarios on the model, with a clock that is set by hand.

mod interleaving;

use std::{collections::BTreeSet, vec::Vec};

use crate::{
    abi::{
        AFFINITY, BACKEND_LOCAL, Backend, BackendRef, Direction, Event, EventKind, Frontend, FrontendKey,
        MEMBER_DRAINING, Member, MemberKey, Port, Reason, SECOND_NS, SHARED, Selection, Session, SessionKey,
        TIMEOUT_UNLIMITED, Timer, UsageKey, UsageOf, V4, filter_bit,
    },
    headers::{ACK, FIN, RST, SYN, TCP, UDP},
    model::Model,
    pipeline::{self, Verdict},
    tables::Tables,
    testing::{Ends, Shape},
};

const TIMEOUT_S: u64 = 60;
/// Pods 0 to 7 are members of the first service's pool.
const PODS: u32 = 8;
const POD_PORT: u16 = 8080;
const WEB: (V4, u16) = (V4([10, 96, 0, 1]), 80);
const CLIENT: V4 = V4([198, 18, 0, 1]);
const GROUP: u32 = 100;
const OWN: u32 = 101;

/// A cluster with one service. Scenarios change it.
struct Cluster(Model);

impl Cluster {
    fn new(change: impl Fn(&mut Frontend)) -> Self {
        Self::with_room(1 << 16, change)
    }

    fn with_room(sessions: usize, change: impl Fn(&mut Frontend)) -> Self {
        let mut cluster = Self(Model::new(sessions));
        cluster.0.now_ns.set(1_000_000 * SECOND_NS);
        cluster.0.random.set(7);
        for pod in 0..2 * PODS {
            cluster.start(pod);
        }
        cluster.publish(WEB, TCP, 1, 0..PODS, &change);
        cluster
    }

    /// Publishes a service's port with these pods; the pool's number is the service's.
    fn publish(
        &mut self,
        at: (V4, u16),
        protocol: u8,
        service: u32,
        pods: impl Iterator<Item = u32>,
        change: &impl Fn(&mut Frontend),
    ) {
        let pods: Vec<u32> = pods.collect();
        let slot_first = service * 2 * PODS;
        for (slot, pod) in (slot_first..).zip(&pods) {
            self.0.slots.insert(slot, *pod);
            self.join(service, *pod);
        }
        let mut frontend = Frontend {
            timeout_ns: TIMEOUT_S * SECOND_NS,
            service,
            pool: service,
            group: GROUP,
            own: OWN + service,
            slot_first,
            slot_count: pods.len() as u32,
            seed: 3,
            select: Selection::Random as u8,
            timer: Timer::Connection as u8,
            prefix: 32,
            flags: AFFINITY,
        };
        change(&mut frontend);
        self.0.frontends_v4.insert(FrontendKey::new(at.0, Port::new(at.1), protocol), frontend);
        self.0.filter.borrow_mut().insert((Direction::Dnat, filter_bit(at.0, Port::new(at.1), protocol)));
        self.0.usage.get_mut().entry(UsageKey { of: UsageOf::Service as u32, id: service }).or_default();
    }

    /// A pod starts, perhaps at the index of a former pod.
    fn start(&mut self, pod: u32) {
        let generation = self.0.backends.get(&pod).map_or(0, |before| before.generation) + 1;
        let address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 244, 0, pod as u8];
        self.0.backends.insert(pod, Backend { address, generation, flags: BACKEND_LOCAL });
        self.0
            .filter
            .borrow_mut()
            .insert((Direction::RevDnat, filter_bit(V4([10, 244, 0, pod as u8]), Port::new(POD_PORT), TCP)));
    }

    fn join(&mut self, pool: u32, pod: u32) {
        let generation = self.0.backends[&pod].generation;
        let member = Member::ready(generation, Port::new(POD_PORT));
        self.0.members.insert(MemberKey { pool, backend: pod }, member);
    }

    /// A pod is gone from all pools, and from the slots: a neighbour takes each of its slots.
    fn stop(&mut self, pod: u32) {
        self.0.backends.get_mut(&pod).unwrap().generation += 1;
        self.0.members.retain(|key, _| key.backend != pod);
        self.leave_slots(pod);
    }

    fn drain(&mut self, pool: u32, pod: u32) {
        self.0.members.get_mut(&MemberKey { pool, backend: pod }).unwrap().state = MEMBER_DRAINING;
        self.leave_slots(pod);
    }

    fn leave_slots(&mut self, pod: u32) {
        for backend in self.0.slots.values_mut().filter(|backend| **backend == pod) {
            *backend = if pod == 0 { 1 } else { pod - 1 };
        }
    }

    fn wait_s(&self, seconds: u64) {
        self.0.now_ns.set(self.0.now_ns.get() + seconds * SECOND_NS);
    }

    /// Sends a frame; returns the pod that it goes to, or the verdict.
    fn send(&self, shape: &Shape, from: (V4, u16), to: (V4, u16)) -> Result<u32, Verdict> {
        let mut frame = shape.frame(&Ends { from, to });
        match pipeline::forward(&mut frame, &self.0) {
            Verdict::Forward => Ok(u32::from(frame[33])),
            verdict @ (Verdict::Pass | Verdict::Redirect | Verdict::Answer | Verdict::Drop) => Err(verdict),
        }
    }

    /// Opens a client's connection from a port; returns the pod.
    fn connect(&self, client: V4, port: u16) -> u32 {
        self.send(&Shape::tcp(SYN), (client, port), WEB).expect("a pod")
    }

    /// Sends a client's segment of a connection; returns the pod.
    fn segment(&self, client: V4, port: u16, flags: u8) -> Result<u32, Verdict> {
        self.send(&Shape::tcp(flags), (client, port), WEB)
    }

    /// Sends a pod's segment back to the client.
    fn reply(&self, pod: u32, client: V4, port: u16, flags: u8) {
        let mut frame =
            Shape::tcp(flags).frame(&Ends { from: (V4([10, 244, 0, pod as u8]), POD_PORT), to: (client, port) });
        assert_eq!(pipeline::reverse(&mut frame, &self.0), Verdict::Forward);
        assert_eq!(frame[26..30], WEB.0.0, "a reply comes from the service");
    }

    /// Completes a handshake.
    fn complete(&self, pod: u32, client: V4, port: u16) {
        self.reply(pod, client, port, SYN | ACK);
        assert_eq!(self.segment(client, port, ACK), Ok(pod));
    }

    /// Opens a client's connection from a port, with its handshake.
    fn open(&self, client: V4, port: u16) -> u32 {
        let pod = self.connect(client, port);
        self.complete(pod, client, port);
        pod
    }

    fn session(&self, scope: u32, client: V4) -> Option<Session> {
        self.0.sessions_v4.borrow().get(&SessionKey::new(scope, client, 32))
    }

    fn count(&self, reason: Reason) -> u64 {
        self.0.counters.borrow().get(&reason).copied().unwrap_or(0)
    }

    fn events(&self) -> Vec<Event> {
        self.0.events.borrow().clone()
    }
}

/// Clients of one network, by number.
fn client(number: u16) -> V4 {
    let [high, low] = number.to_be_bytes();
    V4([198, 19, high, low])
}

// ---- timers ----

#[test]
fn connection_each_new_connection_restarts_the_timer() {
    let cluster = Cluster::new(|_| {});
    let pod = cluster.connect(CLIENT, 1);
    for port in 2..20 {
        cluster.wait_s(TIMEOUT_S - 1);
        assert_eq!(cluster.connect(CLIENT, port), pod);
    }
    assert_eq!(cluster.count(Reason::Pinned), 18);
    cluster.wait_s(TIMEOUT_S);
    cluster.connect(CLIENT, 20);
    assert_eq!(cluster.count(Reason::Expired), 1);
}

#[test]
fn connection_packets_of_an_old_connection_do_not_restart_it() {
    let cluster = Cluster::new(|_| {});
    let pod = cluster.connect(CLIENT, 1);
    for _ in 0..TIMEOUT_S {
        cluster.wait_s(1);
        assert_eq!(cluster.segment(CLIENT, 1, ACK), Ok(pod));
    }
    cluster.connect(CLIENT, 2);
    assert_eq!(cluster.count(Reason::Expired), 1);
    assert_eq!(cluster.segment(CLIENT, 1, ACK), Ok(pod), "the old connection goes on");
}

#[test]
fn packet_each_packet_of_the_client_restarts_it() {
    let cluster = Cluster::new(|frontend| frontend.timer = Timer::Packet as u8);
    let pod = cluster.connect(CLIENT, 1);
    for _ in 0..10 {
        cluster.wait_s(TIMEOUT_S - 1);
        cluster.segment(CLIENT, 1, ACK).unwrap();
    }
    cluster.wait_s(TIMEOUT_S - 1);
    assert_eq!(cluster.connect(CLIENT, 2), pod);
    assert_eq!(cluster.count(Reason::Pinned), 1);
    cluster.wait_s(TIMEOUT_S);
    cluster.reply(pod, CLIENT, 1, ACK);
    cluster.connect(CLIENT, 3);
    assert_eq!(cluster.count(Reason::Expired), 1, "a pod's packets do not");
}

/// With a short timeout each packet is written, otherwise one a second.
#[test]
fn packet_is_exact_to_a_hundredth() {
    for (timeout_s, every_tenth) in [(1, 1), (TIMEOUT_S, 1), (100, 10), (3600, 10)] {
        let cluster = Cluster::new(|frontend| {
            (frontend.timer, frontend.timeout_ns) = (Timer::Packet as u8, timeout_s * SECOND_NS);
        });
        cluster.connect(CLIENT, 1);
        let start_ns = cluster.0.now_ns();
        for tenth in 1..=25 {
            cluster.0.now_ns.set(start_ns + tenth * SECOND_NS / 10);
            cluster.segment(CLIENT, 1, ACK).unwrap();
            let written_ns = start_ns + tenth / every_tenth * every_tenth * SECOND_NS / 10;
            assert_eq!(cluster.session(GROUP, CLIENT).unwrap().last_used_ns, written_ns, "{timeout_s} s");
        }
    }
}

#[test]
fn alive_connections_that_never_open_do_not_count() {
    let cluster = Cluster::new(|frontend| frontend.timer = Timer::Alive as u8);
    let pod = cluster.connect(CLIENT, 1);
    cluster.connect(CLIENT, 2);
    cluster.reply(pod, CLIENT, 2, SYN | ACK);
    assert_eq!(cluster.session(GROUP, CLIENT).unwrap().live_connections(), 0);
    cluster.wait_s(TIMEOUT_S);
    cluster.connect(CLIENT, 3);
    assert_eq!(cluster.count(Reason::Expired), 1);
}

/// A reset that its receiver would not accept ends nothing.
#[test]
fn alive_a_forged_reset_ends_nothing() {
    let cluster = Cluster::new(|frontend| frontend.timer = Timer::Alive as u8);
    let pod = cluster.open(CLIENT, 1);
    let forged = Shape { sequence: 0x4000_0000, ..Shape::tcp(RST) };
    assert_eq!(cluster.send(&forged, (CLIENT, 1), WEB), Ok(pod), "it is its receiver's to judge");
    assert_eq!(cluster.session(GROUP, CLIENT).unwrap().live_connections(), 1);
    cluster.segment(CLIENT, 1, RST).unwrap();
    assert_eq!(cluster.session(GROUP, CLIENT).unwrap().live_connections(), 0);
}

#[test]
fn absolute_nothing_restarts_it() {
    let cluster = Cluster::new(|frontend| frontend.timer = Timer::Absolute as u8);
    let pod = cluster.connect(CLIENT, 1);
    for port in 2..=TIMEOUT_S as u16 {
        cluster.wait_s(1);
        cluster.segment(CLIENT, 1, ACK).unwrap();
        assert_eq!(cluster.connect(CLIENT, port), pod);
    }
    cluster.wait_s(1);
    cluster.connect(CLIENT, 1000);
    assert_eq!(cluster.count(Reason::Expired), 1);
}

#[test]
fn alive_it_runs_from_the_end_of_the_last_connection() {
    let cluster = Cluster::new(|frontend| frontend.timer = Timer::Alive as u8);
    let pod = cluster.open(CLIENT, 1);
    cluster.wait_s(100 * TIMEOUT_S);
    assert_eq!(cluster.open(CLIENT, 2), pod);
    cluster.segment(CLIENT, 2, RST).unwrap();
    cluster.wait_s(100 * TIMEOUT_S);
    cluster.segment(CLIENT, 1, FIN | ACK).unwrap();
    cluster.reply(pod, CLIENT, 1, FIN | ACK);
    assert_eq!(cluster.session(GROUP, CLIENT).unwrap().live_connections(), 0);
    cluster.wait_s(TIMEOUT_S - 1);
    assert_eq!(cluster.open(CLIENT, 3), pod);
    cluster.segment(CLIENT, 3, RST).unwrap();
    assert_eq!((cluster.count(Reason::Pinned), cluster.count(Reason::Expired)), (2, 0));
    cluster.wait_s(TIMEOUT_S);
    cluster.connect(CLIENT, 4);
    assert_eq!(cluster.count(Reason::Expired), 1);
}

/// In every order of packets, an ended connection is counted once: the pin of a client without connections expires.
#[test]
fn alive_no_order_of_packets_leaves_a_connection_behind() {
    let endings: [&[(bool, u8)]; 8] = [
        &[(true, RST)],
        &[(false, RST | ACK)],
        &[(true, FIN | ACK), (false, FIN | ACK), (true, ACK)],
        &[(false, FIN | ACK), (true, FIN | ACK)],
        &[(true, FIN | ACK), (true, FIN | ACK), (false, FIN | ACK), (false, FIN | ACK)],
        &[(true, FIN | ACK), (true, RST), (false, RST)],
        &[(true, FIN | ACK), (true, SYN), (true, RST)],
        &[(true, RST), (true, SYN), (false, FIN | ACK), (true, SYN), (true, RST), (true, RST)],
    ];
    for ending in endings {
        let cluster = Cluster::new(|frontend| frontend.timer = Timer::Alive as u8);
        let pod = cluster.open(CLIENT, 1);
        for &(is_client, flags) in ending {
            if is_client {
                assert_eq!(cluster.segment(CLIENT, 1, flags), Ok(pod), "{ending:?}");
            } else {
                cluster.reply(pod, CLIENT, 1, flags);
            }
        }
        assert_eq!(cluster.session(GROUP, CLIENT).unwrap().live_connections(), 0, "{ending:?}");
        cluster.wait_s(TIMEOUT_S);
        cluster.connect(CLIENT, 2);
        assert_eq!(cluster.count(Reason::Expired), 1, "{ending:?}");
    }
}

#[test]
fn unlimited_a_pin_lasts_for_years() {
    for timer in [Timer::Connection, Timer::Packet, Timer::Absolute, Timer::Alive] {
        let cluster = Cluster::new(|frontend| (frontend.timer, frontend.timeout_ns) = (timer as u8, TIMEOUT_UNLIMITED));
        let pod = cluster.connect(CLIENT, 1);
        cluster.segment(CLIENT, 1, RST).unwrap();
        cluster.wait_s(100 * 365 * 86_400);
        assert_eq!(cluster.connect(CLIENT, 2), pod, "{timer:?}");
        assert_eq!(cluster.count(Reason::Pinned), 1, "{timer:?}");
    }
}

// ---- selection ----

#[test]
fn random_reaches_other_pods_after_expiry_and_spreads_clients() {
    let cluster = Cluster::new(|_| {});
    let spread: BTreeSet<u32> = (0..200).map(|number| cluster.connect(client(number), 1)).collect();
    assert_eq!(spread.len(), PODS as usize);
    let mut pods = BTreeSet::new();
    for port in 0..100 {
        pods.insert(cluster.connect(CLIENT, port));
        cluster.wait_s(TIMEOUT_S);
    }
    assert_eq!(pods.len(), PODS as usize, "one client over a hundred expiries");
}

#[test]
fn consistent_needs_no_memory() {
    let one = Cluster::new(|frontend| frontend.select = Selection::Consistent as u8);
    let other = Cluster::with_room(8, |frontend| frontend.select = Selection::Consistent as u8);
    other.0.random.set(12_345);
    for round in 1..4 {
        for number in 0..200 {
            assert_eq!(one.connect(client(number), round), other.connect(client(number), round));
        }
        one.wait_s(TIMEOUT_S);
    }
    assert_eq!(one.count(Reason::Expired), 400);
    assert_eq!(other.count(Reason::Created), 600, "a table of eight forgets, and nobody moves");
}

#[test]
fn least_keeps_the_load_even() {
    let cluster = Cluster::new(|frontend| frontend.select = Selection::Least as u8);
    for number in 0..800 {
        cluster.connect(client(number), 1);
    }
    let loads = cluster.0.loads.borrow();
    assert_eq!(loads.values().sum::<u64>(), 800);
    assert!(loads.values().all(|load| (90..=110).contains(load)), "{loads:?}");
}

// ---- fail-over ----

#[test]
fn a_pin_fails_over_at_once_and_says_so_once() {
    let mut cluster = Cluster::new(|_| {});
    let pod = cluster.connect(CLIENT, 1);
    cluster.stop(pod);
    let next = cluster.connect(CLIENT, 2);
    assert_ne!(next, pod);
    assert_eq!(cluster.connect(CLIENT, 3), next);
    assert_eq!((cluster.count(Reason::BackendGone), cluster.count(Reason::Pinned)), (1, 1));
    let events = cluster.events();
    let kinds: Vec<u8> = events.iter().map(|event| event.kind).collect();
    assert_eq!(kinds, [EventKind::Created as u8, EventKind::Moved as u8]);
    assert_eq!((events[1].from.index, events[1].to.index), (pod, next));
    assert_eq!((events[1].from.generation, events[1].reason), (1, Reason::BackendGone as u8));
    let loads = cluster.0.loads.borrow();
    assert_eq!((loads[&pod], loads[&next]), (0, 1));
}

#[test]
fn a_pod_with_a_reused_index_inherits_no_clients() {
    let mut cluster = Cluster::new(|_| {});
    let pod = cluster.connect(CLIENT, 1);
    cluster.stop(pod);
    cluster.start(pod);
    cluster.join(1, pod);
    cluster.connect(CLIENT, 2);
    assert_eq!(cluster.count(Reason::BackendGone), 1);
    assert_eq!(cluster.segment(CLIENT, 1, ACK), Err(Verdict::Answer), "its connection is reset");
}

#[test]
fn a_draining_pod_keeps_its_connections_and_no_pin() {
    let mut cluster = Cluster::new(|_| {});
    let pod = cluster.connect(CLIENT, 1);
    cluster.drain(1, pod);
    assert_eq!(cluster.segment(CLIENT, 1, ACK), Ok(pod));
    assert_ne!(cluster.connect(CLIENT, 2), pod);
    assert_eq!(cluster.count(Reason::NotReady), 1);
    assert_eq!(cluster.segment(CLIENT, 1, ACK), Ok(pod), "whatever happens to the pin");
}

#[test]
fn datagrams_of_a_known_client_go_to_another_pod_at_once() {
    let mut cluster = Cluster::new(|_| {});
    cluster.publish(WEB, UDP, 1, 0..PODS, &|_| {});
    let ask = |cluster: &Cluster| cluster.send(&Shape::udp(), (CLIENT, 1), WEB).expect("a pod");
    let pod = ask(&cluster);
    assert_eq!(ask(&cluster), pod);
    cluster.drain(1, pod);
    let next = ask(&cluster);
    assert_ne!(next, pod);
    assert_eq!(ask(&cluster), next);
    cluster.stop(next);
    assert_ne!(ask(&cluster), next);
}

#[test]
fn datagrams_of_a_service_that_has_gone_keep_to_their_pod_while_that_lives() {
    let mut cluster = Cluster::new(|_| {});
    cluster.publish(WEB, UDP, 1, 0..PODS, &|_| {});
    let ask = |cluster: &Cluster| cluster.send(&Shape::udp(), (CLIENT, 1), WEB);
    let pod = ask(&cluster).expect("a pod");
    cluster.0.members.clear();
    let mut frontends = std::mem::take(&mut cluster.0.frontends_v4);
    assert_eq!(ask(&cluster), Ok(pod));
    assert_eq!(cluster.send(&Shape::udp(), (CLIENT, 2), WEB), Err(Verdict::Pass), "nobody new");
    frontends.values_mut().for_each(|frontend| frontend.slot_count = 0);
    cluster.0.frontends_v4 = frontends;
    assert_eq!(ask(&cluster), Err(Verdict::Answer), "a service without endpoints");
    cluster.0.frontends_v4.clear();
    cluster.stop(pod);
    assert_eq!(ask(&cluster), Err(Verdict::Pass));
}

#[test]
fn datagrams_follow_the_pin_of_their_client() {
    let mut cluster = Cluster::new(|_| {});
    cluster.publish(WEB, UDP, 1, 0..PODS, &|_| {});
    let ask = |cluster: &Cluster| cluster.send(&Shape::udp(), (CLIENT, 1), WEB).expect("a pod");
    let pin_to = |cluster: &Cluster, pod| {
        let mut sessions = cluster.0.sessions_v4.borrow_mut();
        let key = SessionKey::new(GROUP, CLIENT, 32);
        let pin = sessions.get(&key).expect("a pin");
        sessions.insert(key, Session { backend: BackendRef { index: pod, ..pin.backend }, ..pin });
    };
    let pod = ask(&cluster);
    assert_eq!(cluster.connect(CLIENT, 1), pod, "one pin for datagrams and connections");
    pin_to(&cluster, (pod + 1) % PODS);
    assert_eq!(ask(&cluster), (pod + 1) % PODS, "moved by somebody");
    cluster.wait_s(TIMEOUT_S);
    ask(&cluster);
    assert_eq!(cluster.count(Reason::Expired), 1);
    cluster.wait_s(TIMEOUT_S - 1);
    let pod = ask(&cluster);
    cluster.0.sessions_v4.borrow_mut().remove(&SessionKey::new(GROUP, CLIENT, 32));
    assert_eq!(ask(&cluster), pod, "evicted: they go on");
    cluster.wait_s(1);
    ask(&cluster);
    assert_eq!(cluster.count(Reason::Created), 2, "and no longer than their pin would have lasted");
}

#[test]
fn datagrams_follow_a_changed_target_port_and_connections_do_not() {
    let mut cluster = Cluster::new(|_| {});
    cluster.publish(WEB, UDP, 1, 0..PODS, &|_| {});
    let port_of = |cluster: &Cluster, shape: &Shape| {
        let mut frame = shape.frame(&Ends { from: (CLIENT, 1), to: WEB });
        assert_eq!(pipeline::forward(&mut frame, &cluster.0), Verdict::Forward);
        u16::from_be_bytes([frame[36], frame[37]])
    };
    assert_eq!([Shape::tcp(SYN), Shape::udp()].map(|shape| port_of(&cluster, &shape)), [POD_PORT; 2]);
    cluster.0.members.values_mut().for_each(|member| member.port = Port::new(POD_PORT + 1));
    assert_eq!([Shape::tcp(ACK), Shape::udp()].map(|shape| port_of(&cluster, &shape)), [POD_PORT, POD_PORT + 1]);
}

#[test]
fn consistent_gives_a_pod_that_returns_its_clients_back() {
    let mut cluster = Cluster::new(|frontend| frontend.select = Selection::Consistent as u8);
    let before: Vec<u32> = (0..100).map(|number| cluster.connect(client(number), 1)).collect();
    let slots = cluster.0.slots.clone();
    cluster.stop(before[0]);
    for number in 0..100 {
        assert_ne!(cluster.connect(client(number), 2), before[0]);
    }
    cluster.start(before[0]);
    cluster.join(1, before[0]);
    cluster.0.slots = slots;
    cluster.wait_s(TIMEOUT_S);
    let after: Vec<u32> = (0..100).map(|number| cluster.connect(client(number), 3)).collect();
    assert_eq!(after, before);
}

// ---- scope ----

#[test]
fn all_ports_and_addresses_of_a_service_share_the_pin() {
    let mut cluster = Cluster::new(|_| {});
    let others = [((WEB.0, 443), TCP), ((V4([203, 0, 113, 1]), 80), TCP), (WEB, UDP)];
    // Each port has a pool of its own, with the same pods in another order.
    for (pool, (at, protocol)) in (2..).zip(others) {
        cluster.publish(at, protocol, pool, (0..PODS).rev(), &|_| {});
    }
    for number in 0..100 {
        let pod = cluster.connect(client(number), 1);
        for (at, protocol) in others {
            let shape = if protocol == TCP { Shape::tcp(SYN) } else { Shape::udp() };
            assert_eq!(cluster.send(&shape, (client(number), 1), at), Ok(pod));
        }
    }
    assert_eq!((cluster.count(Reason::Created), cluster.count(Reason::Pinned)), (100, 300));
}

/// Two services of a group: one with pods 0 to 7, one with pods 4 to 11.
fn group_of_two(change: impl Fn(&mut Frontend)) -> Cluster {
    let mut cluster = Cluster::new(|frontend| frontend.flags |= SHARED);
    cluster.publish(API, TCP, 2, PODS / 2..PODS * 3 / 2, &|frontend| {
        frontend.flags |= SHARED;
        change(frontend);
    });
    (0..PODS * 3 / 2).for_each(|pod| cluster.join(GROUP, pod));
    cluster
}

const API: (V4, u16) = (V4([10, 96, 0, 2]), 80);

#[test]
fn a_group_shares_pins_as_far_as_it_shares_pods() {
    let cluster = group_of_two(|_| {});
    let api = |number, port| cluster.send(&Shape::tcp(SYN), (client(number), port), API).expect("a pod");
    for number in 0..200 {
        let web = cluster.connect(client(number), 1);
        let first = api(number, 1);
        assert_eq!(web == first, web >= PODS / 2, "pod {web} for one service, {first} for the other");
        for port in 2..5 {
            // Neither service moves the other's pin.
            assert_eq!(cluster.connect(client(number), port), web);
            assert_eq!(api(number, port), first);
        }
        assert_eq!(cluster.session(GROUP, client(number)).unwrap().backend.index, web);
        assert_eq!(cluster.session(OWN + 2, client(number)).is_some(), web < PODS / 2);
    }
    assert_eq!(cluster.count(Reason::NotMember) + cluster.count(Reason::Expired), 0);
}

#[test]
fn a_groups_pin_moves_when_its_pod_has_gone_for_all() {
    let mut cluster = group_of_two(|_| {});
    let number = (0..).find(|number| cluster.connect(client(*number), 1) < PODS / 2).unwrap();
    let own = cluster.send(&Shape::tcp(SYN), (client(number), 1), API).unwrap();
    let web = cluster.session(GROUP, client(number)).unwrap().backend.index;
    cluster.stop(web);
    let moved = cluster.send(&Shape::tcp(SYN), (client(number), 2), API).unwrap();
    assert_eq!(cluster.count(Reason::BackendGone), 1);
    assert_eq!(cluster.session(GROUP, client(number)).unwrap().backend.index, moved, "now the group leads here");
    let web = cluster.connect(client(number), 3);
    assert_eq!(web == moved, moved < PODS, "where it can be followed it is");
    assert_eq!(cluster.session(OWN + 2, client(number)).unwrap().backend.index, own);
}

#[test]
fn clients_of_one_network_share_a_pin_where_the_service_says_so() {
    let cluster = Cluster::new(|frontend| frontend.prefix = 24);
    let pod = cluster.connect(client(0), 1);
    for number in 1..256 {
        assert_eq!(cluster.connect(client(number), 1), pod);
    }
    assert_eq!((cluster.count(Reason::Created), cluster.count(Reason::Pinned)), (1, 255));
    cluster.connect(client(256), 1);
    assert_eq!(cluster.count(Reason::Created), 2);
}

#[test]
fn without_affinity_connections_spread_and_leave_no_pin() {
    let cluster = Cluster::new(|frontend| frontend.flags = 0);
    let pods: BTreeSet<u32> = (0..200).map(|port| cluster.connect(CLIENT, port)).collect();
    assert_eq!(pods.len(), PODS as usize);
    assert!(cluster.session(GROUP, CLIENT).is_none() && cluster.events().is_empty());
}

#[test]
fn an_affinity_that_is_switched_on_and_off_applies_to_the_next_connection() {
    let mut cluster = Cluster::new(|frontend| frontend.flags = 0);
    let set = |cluster: &mut Cluster, flags| {
        let key = FrontendKey::new(WEB.0, Port::new(WEB.1), TCP);
        cluster.0.frontends_v4.get_mut(&key).unwrap().flags = flags;
    };
    let pods = |cluster: &Cluster, ports: std::ops::Range<u16>| -> BTreeSet<u32> {
        ports.map(|port| cluster.connect(CLIENT, port)).collect()
    };
    assert!(pods(&cluster, 0..50).len() > 1);
    set(&mut cluster, AFFINITY);
    assert_eq!(pods(&cluster, 50..65).len(), 1);
    set(&mut cluster, 0);
    assert!(pods(&cluster, 100..150).len() > 1);
}

#[test]
fn a_full_table_forgets_the_client_that_was_away_longest() {
    let cluster = Cluster::with_room(10, |_| {});
    for number in 0..10 {
        cluster.connect(client(number), 1);
    }
    cluster.connect(client(0), 2);
    cluster.connect(client(10), 1);
    assert!(cluster.session(GROUP, client(0)).is_some(), "just seen");
    assert!(cluster.session(GROUP, client(1)).is_none(), "away longest");
}
