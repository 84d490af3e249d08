//! The questions: services of every shape, and clients that connect to them, chosen by a seed.

use affinity_tests::dice::Dice;
use affinity_tests::lab::{
    EndpointState, FIRST_OF_B, Family, Frontend, Lab, NODE_B_NAME, NODE_NAME, PODS, Policy, Protocol, Service, node_of,
};

use EndpointState::{NotReady, Ready, Terminating};

/// The pods that are endpoints, node A's and node B's. The first asks too.
pub(crate) const ENDPOINTS: [[usize; 2]; 2] = [[0, 1], [FIRST_OF_B, FIRST_OF_B + 1]];
/// A pod of node A that is no endpoint.
pub(crate) const BYSTANDER_A: usize = 2;
/// A pod of node B that is no endpoint.
pub(crate) const BYSTANDER_B: usize = FIRST_OF_B + 2;
/// Every pod that asks.
pub(crate) const ASKING_PODS: [usize; 3] = [ENDPOINTS[0][0], BYSTANDER_A, BYSTANDER_B];

/// How often a question is asked at most, each time by another client if there are several.
pub(crate) const ATTEMPTS: u32 = 64;

/// The states of a node's two endpoints; None: it is not one.
const SHAPES: [[Option<EndpointState>; 2]; 6] = [
    [None, None],
    [Some(Ready), None],
    [Some(Ready), Some(Ready)],
    [Some(Ready), Some(Terminating)],
    [Some(Terminating), Some(NotReady)],
    [Some(NotReady), None],
];
/// Services of each pair of shapes.
const ROUNDS: usize = 2;
/// Questions to each service.
const QUESTIONS: usize = 8;
/// The first client outside `Ranges::Outside`.
pub(crate) const FIRST_STRANGER: u32 = 1 << 16;

/// The frontends that clients connect to, including one only for the node, and one that does not exist.
const DIALLED: [Frontend; 8] = [
    Frontend::ClusterIp,
    Frontend::ClusterIp,
    Frontend::NodePort,
    Frontend::NodePortInside,
    Frontend::LoadBalancer,
    Frontend::ExternalIp,
    Frontend::Loopback,
    Frontend::Unclaimed,
];

/// The source of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    /// External clients.
    Outside,
    /// External clients in another network.
    Stranger,
    /// The pod with this index.
    Pod(usize),
    /// A process in node A's own network namespace.
    Node,
    /// A process of node B, which reaches node A over the wire between them.
    NodeB,
}

impl Source {
    pub(crate) const ALL: [Self; 7] = [
        Self::Outside,
        Self::Stranger,
        Self::Pod(ASKING_PODS[0]),
        Self::Pod(ASKING_PODS[1]),
        Self::Pod(ASKING_PODS[2]),
        Self::Node,
        Self::NodeB,
    ];

    pub(crate) fn is_outside(self) -> bool {
        matches!(self, Self::Outside | Self::Stranger)
    }
}

/// `loadBalancerSourceRanges`, by the clients that they allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ranges {
    /// All: there are none.
    Unsaid,
    /// `Source::Outside`.
    Outside,
    /// The pods.
    Pods,
    /// The nodes.
    Nodes,
    /// `Source::Outside` for IPv4, and all for IPv6.
    OneFamily,
}

impl Ranges {
    fn all(self) -> &'static [&'static str] {
        match self {
            Self::Unsaid => &[],
            Self::Outside => &["198.18.0.0/16", "2001:db8:c::/112"],
            Self::Pods => &PODS,
            Self::Nodes => &["192.0.2.0/24", "198.51.100.0/24", "2001:db8::/64", "2001:db8:1::/64"],
            Self::OneFamily => &["198.18.0.0/16"],
        }
    }

    /// Those of one family.
    pub(crate) fn all_of(self, family: Family) -> impl Iterator<Item = &'static str> {
        let is_of_family = move |range: &&str| range.contains(':') == (family == Family::V6);
        self.all().iter().copied().filter(is_of_family)
    }

    pub(crate) fn let_in(self, source: Source, family: Family) -> bool {
        match self {
            Self::Unsaid => true,
            Self::Outside => source == Source::Outside,
            Self::Pods => matches!(source, Source::Pod(_)),
            Self::Nodes => matches!(source, Source::Node | Source::NodeB),
            Self::OneFamily => source == Source::Outside || family == Family::V6,
        }
    }
}

/// `ipMode` of the ingress IPs in the load balancer's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IpMode {
    Unsaid,
    Vip,
    Proxy,
}

/// The hints of the endpoints, as the control plane would write them for topology-aware routing and `trafficDistribution`, and
/// some that it would rarely write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meant {
    /// No hints.
    Unsaid,
    /// Each for its own node.
    ForNodes,
    /// Each for its own zone; its node is the only one there.
    ForZones,
    /// Node A's for the zone of node B, and vice versa.
    Crossed,
    /// Each for its own zone, except the first one, which has no hint.
    Incomplete,
    /// Each for its own zone, and for a node that does not exist.
    ForAnother,
}

impl Meant {
    /// The service, with the hint of its endpoint on this pod.
    fn say(self, service: Service, pod: usize, is_first: bool) -> Service {
        let own = node_of(pod);
        let other = if own == NODE_NAME { NODE_B_NAME } else { NODE_NAME };
        match self {
            Self::Unsaid => service,
            Self::Incomplete if is_first => service,
            Self::ForNodes => service.hinted_for_node(pod, own),
            Self::ForZones | Self::Incomplete => service.hinted_for_zone(pod, &Lab::zone_of(own)),
            Self::Crossed => service.hinted_for_zone(pod, &Lab::zone_of(other)),
            Self::ForAnother => service.hinted_for_zone(pod, &Lab::zone_of(own)).hinted_for_node(pod, "node-c"),
        }
    }
}

/// The random choices for a service.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) endpoints: Vec<(usize, EndpointState)>,
    pub(crate) internal: Policy,
    pub(crate) external: Policy,
    pub(crate) ranges: Ranges,
    pub(crate) ip_mode: IpMode,
    pub(crate) has_affinity: bool,
    pub(crate) meant: Meant,
}

impl Spec {
    fn choose(shapes: [[Option<EndpointState>; 2]; 2], dice: &mut Dice) -> Self {
        let pods = ENDPOINTS.into_iter().flatten().zip(shapes.into_iter().flatten());
        Self {
            endpoints: pods.filter_map(|(pod, state)| Some((pod, state?))).collect(),
            internal: dice.pick(&Policy::BOTH),
            external: dice.pick(&Policy::BOTH),
            ranges: match dice.below(10) {
                0 => Ranges::Outside,
                1 => Ranges::Pods,
                2 => Ranges::Nodes,
                3 => Ranges::OneFamily,
                _ => Ranges::Unsaid,
            },
            ip_mode: match dice.below(8) {
                0 => IpMode::Proxy,
                1..4 => IpMode::Vip,
                _ => IpMode::Unsaid,
            },
            has_affinity: dice.percent(33),
            meant: match dice.below(10) {
                0 => Meant::ForNodes,
                1 => Meant::ForZones,
                2 => Meant::Crossed,
                3 => Meant::Incomplete,
                4 => Meant::ForAnother,
                _ => Meant::Unsaid,
            },
        }
    }

    /// The service with this number, with all its frontends.
    pub(crate) fn service(&self, number: u16) -> Service {
        let service = Service::new(&format!("service-{number}"), number)
            .tcp("http", 80, 8080)
            .udp("dns", 53, 5353)
            .node_ports(30_000 + 2 * number)
            .external_ips()
            .internal(self.internal)
            .external(self.external)
            .source_ranges(self.ranges.all());
        let service = match self.ip_mode {
            IpMode::Unsaid => service.load_balancer(),
            IpMode::Vip => service.load_balancer_vip(),
            IpMode::Proxy => service.load_balancer_proxy(),
        };
        let service = if self.has_affinity { service.client_ip() } else { service };
        let service = match self.health_check(number) {
            Some(port) => service.health_check(port),
            None => service,
        };
        self.endpoints.iter().enumerate().fold(service, |service, (index, (pod, state))| {
            self.meant.say(service.endpoint(*pod, *state), *pod, index == 0)
        })
    }

    /// The port at which load balancers ask whether there are local endpoints; None: they need not ask.
    pub(crate) fn health_check(&self, number: u16) -> Option<u16> {
        (self.external == Policy::Local).then_some(31_000 + number)
    }
}

/// One question: can this source reach that frontend, and which pods does it reach?
#[derive(Clone, Debug)]
pub(crate) struct Case {
    /// The number of the service.
    pub(crate) service: u16,
    pub(crate) spec: Spec,
    pub(crate) frontend: Frontend,
    pub(crate) family: Family,
    pub(crate) protocol: Protocol,
    pub(crate) source: Source,
    /// The number of the first of its clients, if they are external. Each question has its own.
    pub(crate) first_client: u32,
}

/// The questions of this seed. `can_be_asked` decides which of them have an answer.
pub(crate) fn choose(seed: u64, can_be_asked: impl Fn(&Case) -> bool) -> Vec<Case> {
    let mut dice = Dice::new(seed);
    let mut cases = Vec::new();
    let shapes = SHAPES.into_iter().flat_map(|of_a| SHAPES.map(|of_b| [of_a, of_b]));
    for (shapes, service) in shapes.flat_map(|shapes| [shapes; ROUNDS]).zip(1..) {
        let spec = Spec::choose(shapes, &mut dice);
        let wanted = cases.len() + QUESTIONS;
        while cases.len() < wanted {
            let source = dice.pick(&Source::ALL);
            let first = if source == Source::Stranger { FIRST_STRANGER } else { 0 };
            let case = Case {
                service,
                spec: spec.clone(),
                frontend: dice.pick(&DIALLED),
                family: dice.pick(&Family::BOTH),
                protocol: dice.pick(&Protocol::BOTH),
                source,
                first_client: first + cases.len() as u32 * ATTEMPTS,
            };
            if can_be_asked(&case) {
                cases.push(case);
            }
        }
    }
    assert!((cases.len() as u32 + 1) * ATTEMPTS < FIRST_STRANGER, "{} cases are too many for the clients", cases.len());
    cases
}
