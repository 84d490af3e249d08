//! Random states of the maps: few addresses, ports, pools and groups, so that all combinations occur, and every time,
//! generation and flag at its boundary.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use affinity_common::{
    abi::{
        Backend, BackendRef, DROP_IF_NO_LOCAL, Direction, FLOW_ANSWERED, FLOW_EXACT, FLOW_FIN_CLIENT, FLOW_FIN_SERVER,
        FLOW_OPEN, FLOW_RESET, FLOW_SHADOW, Flow, FlowKey, Foreign, Frontend, FrontendKey, MASQUERADE, MEMBER_DRAINING,
        MEMBER_READY, MOVES, Member, MemberKey, NODE, Node, PODS, Port, RANGES, RangeKey, Reason, SECOND_NS,
        SPLIT_SCOPE, Session, SessionKey, TIMEOUT_UNLIMITED, UsageKey, UsageOf, V4, V6, filter_bit, timeout_s,
    },
    headers::{TCP, UDP},
    model::Model,
    rewrite,
};
use affinity_tests::{
    kernel::{Fixed, ModelFamily, SMALL, empty_model},
    lab::Family,
};

use affinity_tests::dice::Dice;

const TIMEOUTS_NS: [u64; 5] = [SECOND_NS, 10 * SECOND_NS, 10_800 * SECOND_NS, TIMEOUT_UNLIMITED, 0];
/// Flags of frontends in addition to those of a plain one.
const OF_A_PROXY: [u8; 8] = [0, 0, 0, MASQUERADE, MASQUERADE, SPLIT_SCOPE, RANGES, DROP_IF_NO_LOCAL];
const PREFIXES: [u8; 8] = [32, 128, 128, 128, 24, 64, 0, 255];
/// States that flows may have.
const STATES: [u8; 11] = [
    0,
    FLOW_ANSWERED,
    OPEN,
    OPEN,
    FLOW_SHADOW,
    FLOW_SHADOW | FLOW_OPEN,
    FLOW_SHADOW | FLOW_OPEN | FLOW_FIN_CLIENT,
    OPEN | FLOW_FIN_CLIENT,
    OPEN | FLOW_FIN_SERVER,
    OPEN | FLOW_RESET,
    OPEN | FLOW_FIN_CLIENT | FLOW_FIN_SERVER,
];
/// The state of an open connection.
const OPEN: u8 = FLOW_ANSWERED | FLOW_OPEN;
const BACKENDS: u32 = 12;
const POOLS: u32 = 4;
const SLOTS_OF_A_POOL: u32 = 8;
const SERVICES: u32 = 3;
const FIRST_SCOPE: u32 = 100;
const SCOPES: u32 = 6;
/// The first source port of the node, and how many there are at most.
const NODE_PORTS: (u16, usize) = (30_000, 6);
/// How many more there are if there is one for every connection.
const NODE_PORTS_FOR_ALL: u16 = 1_000;

/// A connection that the flow table may know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Connection {
    pub(crate) client: SocketAddr,
    pub(crate) service: SocketAddr,
    pub(crate) pod: SocketAddr,
    pub(crate) protocol: u8,
}

/// A state, and the frames worth sending.
pub(crate) struct World {
    pub(crate) model: Model,
    pub(crate) frontends: Vec<(SocketAddr, u8)>,
    pub(crate) pods: Vec<SocketAddr>,
    pub(crate) connections: Vec<Connection>,
    now_ns: u64,
}

impl World {
    pub(crate) fn new(dice: &mut Dice, fixed: Fixed) -> Self {
        let mut world = Self {
            model: empty_model(&SMALL, fixed),
            frontends: Vec::new(),
            pods: Vec::new(),
            connections: Vec::new(),
            now_ns: fixed.now_ns,
        };
        world.model.node = Node {
            address_v6: address(Self::node(Family::V6, 0)),
            address_v4: address(Self::node(Family::V4, 0)),
            port_first: Port::new(NODE_PORTS.0),
            port_count: dice.pick(&[0, 2, NODE_PORTS.1 as u16, NODE_PORTS.1 as u16]),
        };
        world.add_backends(dice);
        world.add_pools(dice);
        for family in Family::BOTH {
            match family {
                Family::V4 => world.add_family::<V4>(dice, family),
                Family::V6 => world.add_family::<V6>(dice, family),
            }
        }
        for id in 0..SERVICES {
            world.count_for(dice, UsageOf::Service, id);
        }
        world
    }

    /// A state as publishing creates it: pools of one family with slots that name ready members, and frontends of one pool with
    /// the same slots; and ports for masquerading, if any, for every connection. Pins and connections are arbitrary.
    pub(crate) fn published(dice: &mut Dice, fixed: Fixed) -> Self {
        let mut world = Self::new(dice, fixed);
        let model = &mut world.model;
        model.node.port_count = model.node.port_count.saturating_mul(NODE_PORTS_FOR_ALL);
        model.backends.values_mut().for_each(|backend| backend.generation |= 1);
        model.members.retain(|key, _| key.pool >= FIRST_SCOPE || family_of(key.pool) == family_of(key.backend));
        for (key, member) in model.members.iter_mut().filter(|(_, member)| member.state == MEMBER_READY) {
            member.generation = model.backends[&key.backend].generation;
        }
        for pool in 0..POOLS {
            let is_ready = |(key, member): &(&MemberKey, &Member)| key.pool == pool && member.state == MEMBER_READY;
            let ready: Vec<u32> = model.members.iter().filter(is_ready).map(|(key, _)| key.backend).collect();
            let slots = pool * SLOTS_OF_A_POOL..(pool + 1) * SLOTS_OF_A_POOL;
            model.slots.extend(slots.zip(ready.iter().copied().cycle()));
            let frontends = model.frontends_v4.values_mut().chain(model.frontends_v6.values_mut());
            for frontend in frontends.filter(|frontend| frontend.pool == pool && frontend.slot_count > 0) {
                frontend.slot_count = SLOTS_OF_A_POOL.min(ready.len() as u32);
            }
        }
        world
    }

    /// The node's address, and one of its ports.
    pub(crate) fn node(family: Family, number: usize) -> SocketAddr {
        let ip: IpAddr = match family {
            Family::V4 => Ipv4Addr::new(192, 0, 2, 9).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0, 9).into(),
        };
        SocketAddr::new(ip, NODE_PORTS.0 + (number % NODE_PORTS.1) as u16)
    }

    /// The address of a client; few, in two networks, and rarely one that no host has.
    pub(crate) fn client(dice: &mut Dice, family: Family) -> IpAddr {
        if dice.percent(3) {
            return match family {
                Family::V4 => Ipv4Addr::from(dice.pick(&[[0; 4], [224, 0, 0, 5], [255; 4]])).into(),
                Family::V6 => dice.pick(&[Ipv6Addr::UNSPECIFIED, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1)]).into(),
            };
        }
        family.client(dice.pick(&[1, 2, 3, 257]))
    }

    fn count_for(&mut self, dice: &mut Dice, of: UsageOf, id: u32) {
        if dice.percent(80) {
            self.model.usage.get_mut().insert(UsageKey { of: of as u32, id }, Default::default());
        }
    }

    fn add_backends(&mut self, dice: &mut Dice) {
        for index in 0..BACKENDS {
            let address = match family_of(index).pod(index as usize) {
                IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                IpAddr::V6(address) => address.octets(),
            };
            let generation = dice.pick(&[1, 1, 3, 3, 5, 2, 0]);
            self.model.backends.insert(index, Backend { address, generation, flags: dice.below(2) as u32 });
            self.count_for(dice, UsageOf::Backend, index);
            let load = dice.pick(&[0, 0, 1, 2, 3, u64::MAX]);
            self.model.loads.get_mut().insert(index, load);
        }
    }

    /// Members, including the groups' unions, and the pools' slots.
    fn add_pools(&mut self, dice: &mut Dice) {
        for pool in (0..POOLS).chain(FIRST_SCOPE..FIRST_SCOPE + SCOPES) {
            for backend in 0..BACKENDS {
                let fits = pool >= FIRST_SCOPE || family_of(pool) == family_of(backend);
                if !dice.percent(if fits { 75 } else { 2 }) {
                    continue;
                }
                let generation = self.generation(dice, backend);
                let port = Port::new(dice.pick(&[8080, 9090]));
                let state = dice.pick(&[
                    MEMBER_READY,
                    MEMBER_READY,
                    MEMBER_READY,
                    MEMBER_READY,
                    MEMBER_DRAINING,
                    MEMBER_DRAINING,
                    0,
                ]);
                self.model.members.insert(MemberKey { pool, backend }, Member { generation, port, state, pad: 0 });
            }
        }
        for pool in 0..POOLS {
            let is_ready = |(key, member): &(&MemberKey, &Member)| key.pool == pool && member.state == MEMBER_READY;
            let ready: Vec<u32> = self.model.members.iter().filter(is_ready).map(|(key, _)| key.backend).collect();
            for slot in pool * SLOTS_OF_A_POOL..(pool + 1) * SLOTS_OF_A_POOL {
                let is_wrong = ready.is_empty() || dice.percent(2);
                let backend = if is_wrong { dice.below(SMALL.backends as usize + 2) as u32 } else { dice.pick(&ready) };
                self.model.slots.insert(slot, backend);
            }
        }
    }

    /// A backend's generation, or rarely a former or future one.
    fn generation(&self, dice: &mut Dice, backend: u32) -> u32 {
        let generation = self.model.backends[&backend].generation;
        if dice.percent(88) { generation } else { generation.wrapping_add(dice.pick(&[1, 2, u32::MAX])) }
    }

    /// The numbers of a segment: none, those that frames have, or others.
    fn segment(&self, dice: &mut Dice) -> u64 {
        let number = |dice: &mut Dice| dice.pick(&[1_000_u32, 2_000, 2_000, 900, 0x8000_0000]).to_be_bytes();
        let ([a, b, c, d], [e, f, g, h]) = (number(dice), number(dice));
        dice.pick(&[0, u64::from_ne_bytes([a, b, c, d, e, f, g, h])])
    }

    /// A time at the boundary of every timeout.
    fn time_ns(&self, dice: &mut Dice) -> u64 {
        let edges = [0, SECOND_NS, 10 * SECOND_NS, 10_800 * SECOND_NS];
        let age_ns = dice.pick(&edges).saturating_add(dice.pick(&[0, 1, SECOND_NS / 2]));
        match dice.below(20) {
            0 => self.now_ns + SECOND_NS,
            1 => 0,
            2..6 => self.now_ns.saturating_sub(age_ns.saturating_sub(2)),
            _ => self.now_ns.saturating_sub(age_ns),
        }
    }

    fn add_family<A: ModelFamily>(&mut self, dice: &mut Dice, family: Family) {
        for number in 1..3 {
            for port in [80, 443] {
                for protocol in [TCP, UDP] {
                    if dice.percent(80) {
                        self.add_frontend::<A>(
                            dice,
                            family,
                            SocketAddr::new(family.cluster_ip(number), port),
                            protocol,
                        );
                    }
                }
            }
        }
        for index in (0..BACKENDS).filter(|index| family_of(*index) == family) {
            for port in [8080, 9090] {
                let pod = SocketAddr::new(family.pod(index as usize), port);
                self.pods.push(pod);
                for protocol in [TCP, UDP] {
                    if dice.percent(95) {
                        let bit = filter_bit::<A>(address(pod), Port::new(port), protocol);
                        self.model.filter.borrow_mut().insert((Direction::RevDnat, bit));
                    }
                }
            }
        }
        for scope in [PODS].into_iter().chain(0..SERVICES) {
            let within = RangeKey::new(scope, address(SocketAddr::new(family.client(1), 0)), dice.pick(&PREFIXES));
            A::ranges_mut(&mut self.model).insert(within);
        }
        if dice.percent(50) {
            let shared = RangeKey::new(NODE, address(SocketAddr::new(family.cluster_ip(1), 0)), A::BITS);
            A::ranges_mut(&mut self.model).insert(shared);
        }
        for scope in FIRST_SCOPE..FIRST_SCOPE + SCOPES {
            for _ in 0..5 {
                let (client, session) = (Self::client(dice, family), self.session(dice));
                let client = A::of(client).expect("an address of this family");
                let key = SessionKey::new(scope, client, dice.pick(&PREFIXES));
                A::sessions(&self.model).borrow_mut().insert(key, session);
            }
        }
    }

    fn session(&self, dice: &mut Dice) -> Session {
        let backend = dice.below(BACKENDS as usize) as u32;
        Session {
            created_ns: self.time_ns(dice),
            last_used_ns: self.time_ns(dice),
            backend: BackendRef { index: backend, generation: self.generation(dice, backend) },
            service: dice.below(SERVICES as usize) as u32,
            draw: dice.number() as u32,
            connections: dice.pick(&[0, 0, 0, 1, 2, 7 * MOVES, 255 * MOVES + 1]),
            uses: dice.pick(&[1, 7, u32::MAX]),
            reason: Reason::Created as u8,
            pad: [0; 7],
        }
    }

    fn add_frontend<A: ModelFamily>(&mut self, dice: &mut Dice, family: Family, at: SocketAddr, protocol: u8) {
        let fitting: Vec<u32> = (0..POOLS).filter(|pool| family_of(*pool) == family).collect();
        let pool = dice.pick(&fitting);
        let scope = |dice: &mut Dice| FIRST_SCOPE + dice.below(SCOPES as usize) as u32;
        let group = scope(dice);
        let frontend = Frontend {
            timeout_ns: dice.pick(&TIMEOUTS_NS),
            service: dice.below(SERVICES as usize) as u32,
            pool,
            group,
            own: if dice.percent(20) { group } else { scope(dice) },
            slot_first: pool * SLOTS_OF_A_POOL,
            slot_count: dice.pick(&[8, 8, 7, 3, 2, 1, 0]),
            seed: dice.number() as u32,
            select: dice.pick(&[0, 1, 2, 2, 3]),
            timer: dice.pick(&[0, 1, 2, 3, 3, 4]),
            prefix: dice.pick(&PREFIXES),
            flags: dice.pick(&[0, 1, 1, 1, 3, 3, 3, 2, 5, 7, 9, 11, 0xff]) | dice.pick(&OF_A_PROXY),
        };
        let port = Port::new(at.port());
        let key = FrontendKey::new(address(at), port, protocol);
        let frontends = A::frontends_mut(&mut self.model);
        frontends.insert(key, frontend);
        if dice.percent(80) {
            let flags = frontend.flags ^ dice.pick(&OF_A_PROXY);
            frontends.insert(key.external(), Frontend { flags, slot_count: dice.pick(&[0, 3]), ..frontend });
        }
        if dice.percent(97) {
            self.model.filter.borrow_mut().insert((Direction::Dnat, filter_bit::<A>(address(at), port, protocol)));
        }
        self.frontends.push((at, protocol));
        for _ in 0..6 {
            self.add_connection::<A>(dice, family, at, protocol, &frontend);
        }
    }

    fn add_connection<A: ModelFamily>(
        &mut self,
        dice: &mut Dice,
        family: Family,
        service: SocketAddr,
        protocol: u8,
        frontend: &Frontend,
    ) {
        let fitting: Vec<u32> = (0..BACKENDS).filter(|backend| family_of(*backend) == family).collect();
        let backend = dice.pick(&fitting);
        let client = SocketAddr::new(Self::client(dice, family), 40_000 + dice.below(4) as u16);
        let pod = SocketAddr::new(family.pod(backend as usize), dice.pick(&[8080, 9090]));
        let key = FlowKey::<A> {
            saddr: address(client),
            daddr: address(service),
            sport: Port::new(client.port()),
            dport: Port::new(service.port()),
            protocol,
            direction: Direction::Dnat as u8,
            pad: [0; 2],
        };
        let edit = rewrite::edit(&key, key.saddr, address(pod), key.sport, Port::new(pod.port()));
        let flow = Flow {
            created_ns: self.time_ns(dice),
            last_used_ns: self.time_ns(dice),
            segment: self.segment(dice),
            edit,
            backend: BackendRef { index: backend, generation: self.generation(dice, backend) },
            pool: frontend.pool,
            scope: dice.pick(&[0, frontend.group, frontend.group, frontend.own]),
            timeout_s: timeout_s(frontend.timeout_ns),
            state: dice.pick(&STATES),
            timer: frontend.timer,
            prefix: frontend.prefix,
            flags: dice.pick(&[0, 0, 0, FLOW_EXACT]),
        };
        let reverse = key.opposite(&edit);
        let back = rewrite::edit(&reverse, key.daddr, key.saddr, key.dport, key.sport);
        let mut flows = A::flows(&self.model).borrow_mut();
        if dice.percent(95) {
            flows.insert(key, flow);
        }
        if dice.percent(95) {
            let (last_used_ns, segment) = (self.time_ns(dice), self.segment(dice));
            flows.insert(reverse, Flow { edit: back, last_used_ns, segment, ..flow });
        }
        drop(flows);
        if dice.percent(20) {
            let replies = dice.pick(&[key, reverse, reverse]);
            self.add_foreign(dice, replies);
        }
        self.connections.push(Connection { client, service, pod, protocol });
    }

    /// A foreign connection with replies that look like packets of another one, or have no flow.
    fn add_foreign<A: ModelFamily>(&mut self, dice: &mut Dice, replies: FlowKey<A>) {
        let state = dice.pick(&STATES) & !FLOW_SHADOW;
        let foreign = Foreign { last_sent_ns: self.time_ns(dice), state: u32::from(state), pad: 0 };
        A::foreign(&self.model).borrow_mut().insert(replies, foreign);
        if dice.percent(50) {
            A::flows(&self.model).borrow_mut().remove(&replies);
        }
    }
}

/// Backends and pools alternate between the families.
fn family_of(number: u32) -> Family {
    Family::BOTH[number as usize % 2]
}

fn address<A: ModelFamily>(of: SocketAddr) -> A {
    A::of(of.ip()).expect("an address of this family")
}
