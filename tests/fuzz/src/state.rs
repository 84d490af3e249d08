//! The choices of an input's first bytes: the tables, and their later changes.
//!
//! The tables are as the agent would publish them. There is one service on two ports, over TCP and UDP, IPv4 and IPv6. Each
//! family has four pods. The input chooses their membership in the two ports' pools, the policies, the clock, a pin that the
//! client already has, the allowed clients, and the connections that are masqueraded.

use affinity_common::{
    abi::{
        AFFINITY, Address, BACKEND_LOCAL, Backend, BackendRef, COEXIST, DROP_IF_NO_LOCAL, Direction, Frontend,
        FrontendKey, MASQUERADE, MEMBER_DRAINING, MEMBER_READY, Member, MemberKey, Node, PODS as POD_NETWORKS, Port,
        RANGES, RangeKey, Reason, SHADOW, SHARED, SPLIT_SCOPE, Session, SessionKey, TIMEOUT_UNLIMITED, V4, V6,
        filter_bit,
    },
    flow::REFRESH_NS,
    headers::{TCP, UDP},
    model::Model,
};

use crate::frame::{self, Reading};

/// Bytes of an input before its frame.
pub const HEAD: usize = 13;

/// Scope of the pins that all ports share.
pub const GROUP: u32 = 10;
/// The service's id, and the scope of its source ranges.
const SERVICE: u32 = 1;
/// Pods of each family.
const PODS: u32 = 4;
/// The ports that clients connect to, each with the port that pods serve.
pub const PORTS: [(u16, u16); 2] = [(80, 8080), (443, 8443)];
/// The generation of every pod, until it is retired.
const IN_USE: u32 = 3;
/// The node's addresses: sources of masqueraded connections.
pub const NODE_V4: V4 = V4([192, 0, 2, 250]);
/// The same, IPv6.
pub const NODE_V6: V6 = V6([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfa]);
/// The first of the node's ports.
pub const NODE_PORT: u16 = 30_000;
/// Number of ports of a node that has enough of them.
const NODE_PORTS: u16 = 64;

/// Clients of all frontends get the node's address: see [`State::exposure`].
pub const TO_NODE: u8 = 0x01;
/// Frontends are for clients in ranges,
pub const IN_RANGES: u8 = 0x02;
/// and the client is in one of them; and in the networks of pods.
pub const WITHIN: u8 = 0x04;
/// If there is no usable member, packets are dropped.
pub const NO_ANSWER: u8 = 0x08;
/// External clients have records of their own, and get the node's address.
pub const EXTERNAL_CLIENTS: u8 = 0x10;
/// The node has one port.
pub const ONE_PORT: u8 = 0x20;
/// Pods are on this node.
pub const LOCAL: u8 = 0x40;
/// The CPU has rejected as many packets as it may.
pub const REJECTED_ENOUGH: u8 = 0x80;

/// The service's address.
pub const ADDRESS_V4: V4 = V4([10, 96, 0, 1]);
/// The service's address.
pub const ADDRESS_V6: V6 = V6([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);

/// The choices of one input.
#[derive(Clone, Copy, Debug)]
pub struct State {
    aim: u8,
    policy: u8,
    prefix: u8,
    timeout: u8,
    /// For each port, two bits for each pod.
    members: [u8; 2],
    pin: u8,
    pinned_pod: u8,
    pin_age: u8,
    clock: u8,
    random: u8,
    change: u8,
    /// [`TO_NODE`], [`IN_RANGES`], [`WITHIN`], [`NO_ANSWER`], [`EXTERNAL_CLIENTS`], [`ONE_PORT`], [`LOCAL`] and
    /// [`REJECTED_ENOUGH`].
    exposure: u8,
}

impl State {
    /// Splits an input; `None` if it is too short to contain a frame.
    pub fn split(input: &[u8]) -> Option<(Self, &[u8])> {
        let (&head, frame) = input.split_first_chunk::<HEAD>()?;
        let [aim, policy, prefix, timeout, one, other, pin, pinned_pod, pin_age, clock, random, change, exposure] =
            head;
        let members = [one, other];
        let state =
            Self { aim, policy, prefix, timeout, members, pin, pinned_pod, pin_age, clock, random, change, exposure };
        Some((state, frame))
    }

    /// The frame, sent to a frontend unless the input says to leave it unchanged. The error of its checksums changes by the
    /// change of its addresses; the pipeline must neither reject nor correct that.
    pub fn aimed(&self, frame: &[u8]) -> Vec<u8> {
        let mut frame = frame.to_vec();
        if let (1.., Some(reading)) = (self.aim, frame::read(&frame)) {
            let (port, _) = PORTS[usize::from(self.aim) % PORTS.len()];
            send_to(&mut frame, &reading, port);
        }
        frame
    }

    /// The tables, with a pin for the client that sent the frame if the input asks for one.
    pub fn tables(&self, client: Option<&Reading>) -> Model {
        let mut model = Model::new(64);
        model.now_ns.set(self.now_ns());
        model.random.set(u32::from(self.random).wrapping_mul(0x0101_0101));
        model.rejection_interval_ns = if self.exposes(REJECTED_ENOUGH) { u64::MAX } else { 0 };
        for index in 0..2 * PODS {
            let address = if index < PODS { pod_v4(index).to_mapped() } else { pod_v6(index).0 };
            let flags = if self.exposes(LOCAL) { BACKEND_LOCAL } else { 0 };
            model.backends.insert(index, Backend { address, generation: IN_USE, flags });
        }
        let port_count = if self.exposes(ONE_PORT) { 1 } else { NODE_PORTS };
        model.node = Node { address_v6: NODE_V6, address_v4: NODE_V4, port_first: Port::new(NODE_PORT), port_count };
        for port in 0..PORTS.len() {
            self.add_pool(&mut model, port, 0);
            self.add_pool(&mut model, port, PODS);
        }
        match client.map(|reading| (reading, reading.addresses[0].as_slice())) {
            Some((reading, source)) if reading.is_v6 => {
                let client = V6(source.try_into().expect("an IPv6 address has 16 bytes"));
                if self.exposes(WITHIN) {
                    let ranges = [POD_NETWORKS, SERVICE].map(|scope| RangeKey::new(scope, client, V6::BITS));
                    model.ranges_v6.extend(ranges);
                }
                for (scope, session) in self.pins(PODS) {
                    let key = SessionKey::new(scope, client, self.prefix);
                    model.sessions_v6.borrow_mut().insert(key, session);
                }
            }
            Some((_, source)) => {
                let client = V4(source.try_into().expect("an IPv4 address has 4 bytes"));
                if self.exposes(WITHIN) {
                    let ranges = [POD_NETWORKS, SERVICE].map(|scope| RangeKey::new(scope, client, V4::BITS));
                    model.ranges_v4.extend(ranges);
                }
                for (scope, session) in self.pins(0) {
                    let key = SessionKey::new(scope, client, self.prefix);
                    model.sessions_v4.borrow_mut().insert(key, session);
                }
            }
            None => {}
        }
        model
    }

    /// Lets time pass, retires pods, or drains them: possible changes between two packets of one client.
    pub fn change(&self, model: &mut Model) {
        let passed_ns = [0, 1, REFRESH_NS, self.timeout_ns() / 2, self.timeout_ns()][usize::from(self.change >> 4) % 5];
        model.now_ns.set(model.now_ns.get().saturating_add(passed_ns));
        let gone = |index: u32| match self.change & 0x3 {
            0 => false,
            1 => true,
            _ => index.is_multiple_of(2),
        };
        if self.change & 0x4 != 0 {
            for (key, member) in &mut model.members {
                member.state = if gone(key.backend) { MEMBER_DRAINING } else { member.state };
            }
            return;
        }
        for (_, backend) in model.backends.iter_mut().filter(|(index, _)| gone(**index)) {
            backend.generation += 1;
        }
        model.members.retain(|key, _| !gone(key.backend));
        if self.change & 0x8 != 0 {
            // No usable member is left: the agent publishes pools without slots.
            model.frontends_v4.values_mut().for_each(|frontend| frontend.slot_count = 0);
            model.frontends_v6.values_mut().for_each(|frontend| frontend.slot_count = 0);
        }
    }

    /// A pool of one port and family, its frontends, and their bits in the filter.
    fn add_pool(&self, model: &mut Model, port: usize, first_pod: u32) {
        let (number, target) = PORTS[port];
        let pool = 1 + port as u32 * 2 + u32::from(first_pod != 0);
        let slot_first = pool * 16;
        let mut slot_count = 0;
        for pod in 0..PODS {
            let index = first_pod + pod;
            let state = match self.members[port] >> (2 * pod) & 3 {
                0 => continue,
                1 => MEMBER_DRAINING,
                _ => MEMBER_READY,
            };
            let member = Member { generation: IN_USE, port: Port::new(target), state, pad: 0 };
            model.members.insert(MemberKey { pool, backend: index }, member);
            if state == MEMBER_READY {
                let of_group = Member { port: Port::new(0), ..member };
                model.members.insert(MemberKey { pool: GROUP, backend: index }, of_group);
                model.slots.insert(slot_first + slot_count, index);
                slot_count += 1;
            }
            for protocol in [TCP, UDP] {
                let bit = if first_pod == 0 {
                    filter_bit(pod_v4(index), Port::new(target), protocol)
                } else {
                    filter_bit(pod_v6(index), Port::new(target), protocol)
                };
                model.filter.borrow_mut().insert((Direction::RevDnat, bit));
            }
        }
        let frontend = self.frontend(pool, slot_first, slot_count);
        for protocol in [TCP, UDP] {
            add_frontend(model, first_pod == 0, Port::new(number), protocol, frontend);
        }
    }

    fn frontend(&self, pool: u32, slot_first: u32, slot_count: u32) -> Frontend {
        // The agent publishes a slot for every ready member; an extra slot must not do harm.
        let surplus = u32::from(self.policy & 0x40 != 0);
        let shared = if self.members[0] == self.members[1] { 0 } else { SHARED };
        let pinned = if self.policy & 0x80 == 0 { AFFINITY } else { 0 };
        let beside = if self.policy & 0x10 == 0 { 0 } else { COEXIST };
        let shadow = if self.policy & 0x20 == 0 { 0 } else { SHADOW };
        let exposed = [
            (TO_NODE, MASQUERADE),
            (IN_RANGES, RANGES),
            (NO_ANSWER, DROP_IF_NO_LOCAL),
            (EXTERNAL_CLIENTS, SPLIT_SCOPE),
        ];
        let exposed: u8 = exposed.into_iter().filter(|(chosen, _)| self.exposes(*chosen)).map(|(_, flag)| flag).sum();
        Frontend {
            timeout_ns: self.timeout_ns(),
            service: SERVICE,
            pool,
            group: GROUP,
            own: own_scope(pool),
            slot_first,
            slot_count: slot_count + surplus,
            seed: 7,
            select: self.policy & 3,
            timer: self.policy >> 2 & 3,
            prefix: self.prefix,
            flags: pinned | shared | beside | shadow | exposed,
        }
    }

    fn exposes(&self, flag: u8) -> bool {
        self.exposure & flag != 0
    }

    /// The client's pins before its first packet, each under its scope.
    fn pins(&self, first_pod: u32) -> Vec<(u32, Session)> {
        let timeout_ns = self.timeout_ns();
        let ages_ns = [0, timeout_ns - 1, timeout_ns, timeout_ns.saturating_mul(2)];
        let last_used_ns = self.now_ns().saturating_sub(ages_ns[usize::from(self.pin_age) % ages_ns.len()]);
        let session = Session {
            created_ns: last_used_ns.saturating_sub(u64::from(self.pin_age >> 4)),
            last_used_ns,
            // Sometimes a backend that does not exist.
            backend: BackendRef {
                index: first_pod + u32::from(self.pinned_pod) % (PODS + 1),
                generation: if self.pin & 0x10 == 0 { IN_USE } else { IN_USE - 2 },
            },
            service: SERVICE,
            draw: u32::from(self.random),
            connections: u32::from(self.pin >> 5 & 1),
            uses: 1,
            reason: Reason::Created as u8,
            pad: [0; 7],
        };
        let own = (1..=4).map(|pool| (self.pin & 0x2 != 0, own_scope(pool)));
        let scopes = own.chain([(self.pin & 0x1 != 0, GROUP)]);
        scopes.filter(|(wanted, _)| *wanted).map(|(_, scope)| (scope, session)).collect()
    }

    fn now_ns(&self) -> u64 {
        u64::from(self.clock) << 42
    }

    fn timeout_ns(&self) -> u64 {
        [1_000_000_000, 60_000_000_000, 10_800_000_000_000, TIMEOUT_UNLIMITED][usize::from(self.timeout) % 4]
    }
}

fn add_frontend(model: &mut Model, is_v4: bool, port: Port, protocol: u8, frontend: Frontend) {
    let external = Frontend { flags: frontend.flags & !SPLIT_SCOPE | MASQUERADE, ..frontend };
    let is_split = frontend.flags & SPLIT_SCOPE != 0;
    let bit = if is_v4 {
        let key = FrontendKey::new(ADDRESS_V4, port, protocol);
        model.frontends_v4.extend([(key, frontend)].into_iter().chain(is_split.then_some((key.external(), external))));
        filter_bit(ADDRESS_V4, port, protocol)
    } else {
        let key = FrontendKey::new(ADDRESS_V6, port, protocol);
        model.frontends_v6.extend([(key, frontend)].into_iter().chain(is_split.then_some((key.external(), external))));
        filter_bit(ADDRESS_V6, port, protocol)
    };
    model.filter.borrow_mut().insert((Direction::Dnat, bit));
}

/// Makes `port` of the service the destination of a frame.
pub fn send_to(frame: &mut [u8], reading: &Reading, port: u16) {
    let [_, destination, ports] = reading.places();
    if reading.is_v6 {
        frame[destination].copy_from_slice(&ADDRESS_V6.0);
    } else {
        frame[destination].copy_from_slice(&ADDRESS_V4.0);
    }
    if reading.has_ports() {
        frame[ports][2..].copy_from_slice(&port.to_be_bytes());
    }
}

/// The scope of the pins that a frontend keeps if it cannot follow the group's.
const fn own_scope(pool: u32) -> u32 {
    GROUP + pool
}

fn pod_v4(index: u32) -> V4 {
    V4([10, 244, 0, index as u8])
}

fn pod_v6(index: u32) -> V6 {
    let mut address = ADDRESS_V6.0;
    address[1] = 0x44;
    address[15] = index as u8;
    V6(address)
}
