//! Random worlds of services and pods, and clients that connect to them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use affinity_common::{
    abi::{Address, Direction, Flow, FlowKey, Frontend, FrontendKey, Port, RangeKey, Reason},
    headers::Headers,
    model::Model,
    pipeline::{Decision, from_backend, to_frontend},
    tables::{Entry, FamilyTables},
};
use proptest::prelude::*;

use crate::{
    desired::{Desired, NodeFacts, Options, desired},
    source::{
        ObjectName, Snapshot, Sourced,
        api::{
            Endpoint, EndpointConditions, EndpointPort, EndpointSlice, LoadBalancerIngress, LoadBalancerStatus,
            ObjectReference, Service, ServicePort, ServiceSpec, ServiceStatus,
        },
    },
    store::Observed,
};

/// The state of a pod in a service.
#[derive(Clone, Copy, Debug)]
pub(super) enum State {
    Ready,
    Leaving,
    Unready,
}

/// A pod's part in a service: its number, its state, and whether it serves the second port too.
pub(super) type Part = (u8, State, bool);

/// A service of two ports.
#[derive(Clone, Debug)]
pub(super) struct World {
    services: Vec<Option<Spec>>,
    /// Whether the pod networks are known.
    knows_pods: bool,
}

#[derive(Clone, Debug)]
struct Spec {
    affinity: bool,
    dual: bool,
    select: usize,
    grouped: bool,
    target_port: u16,
    exposed: Option<Exposed>,
    parts: BTreeMap<u8, (State, bool)>,
}

/// How a service is reached from outside.
#[derive(Clone, Debug)]
struct Exposed {
    node_port: u16,
    is_local: (bool, bool),
    ranges: Vec<&'static str>,
}

/// Up to `services` services over six pods, some of them reached from outside.
pub(super) fn world(services: usize) -> impl Strategy<Value = World> {
    let exposed = prop::option::weighted(0.4, exposed());
    (world_with(services, exposed), any::<bool>()).prop_map(|(world, knows_pods)| World { knows_pods, ..world })
}

/// The same with cluster IPs only.
pub(super) fn inner_world(services: usize) -> impl Strategy<Value = World> {
    world_with(services, Just(None))
}

fn world_with(services: usize, exposed: impl Strategy<Value = Option<Exposed>>) -> impl Strategy<Value = World> {
    let state = prop_oneof![4 => Just(State::Ready), 1 => Just(State::Leaving), 1 => Just(State::Unready)];
    let parts = prop::collection::btree_map(1u8..7, (state, prop::bool::weighted(0.8)), 0..6);
    let flags = (prop::bool::weighted(0.9), any::<bool>(), prop::bool::weighted(0.5));
    // Selection rarely changes: a Maglev table is large, and every state is checked many times.
    let select = prop_oneof![4 => Just(0usize), 1 => Just(1), 2 => Just(2)];
    let port = prop_oneof![5 => Just(8080u16), 1 => Just(9090)];
    let spec = (flags, select, port, exposed, parts).prop_map(|(flags, select, target_port, exposed, parts)| {
        let (affinity, dual, grouped) = flags;
        Spec { affinity, dual, select, grouped, target_port, exposed, parts }
    });
    let services = prop::collection::vec(prop::option::weighted(0.85, spec), services);
    services.prop_map(|services| World { services, knows_pods: false })
}

fn exposed() -> impl Strategy<Value = Exposed> {
    let ranges = vec!["192.0.2.1/32", "192.0.2.4/31", "2001:db8::2/127", "2001:db8::4/128"];
    let ranges = prop_oneof![Just(Vec::new()), prop::sample::subsequence(ranges, 1..3)];
    let node_port = prop_oneof![4 => Just(30_080u16), 1 => Just(30_081)];
    (node_port, any::<(bool, bool)>(), ranges).prop_map(|(node_port, is_local, ranges)| Exposed {
        node_port,
        is_local,
        ranges,
    })
}

impl World {
    /// A world with every service, with these parts, ungrouped and with affinity.
    pub(super) fn of(services: &[&[Part]]) -> Self {
        let spec = |parts: &&[Part]| {
            let parts = parts.iter().map(|(pod, state, second)| (*pod, (*state, *second))).collect();
            let (affinity, dual, select, grouped) = (true, false, 0, false);
            Some(Spec { affinity, dual, select, grouped, target_port: 8080, exposed: None, parts })
        };
        Self { services: services.iter().map(spec).collect(), knows_pods: false }
    }

    /// Exposes the first service on a node port and a load balancer with these ranges, under both policies; pod networks are
    /// known.
    pub(super) fn exposed(mut self, is_local: bool, ranges: &[&'static str]) -> Self {
        self.knows_pods = true;
        if let Some(Some(spec)) = self.services.first_mut() {
            let is_local = (is_local, is_local);
            spec.exposed = Some(Exposed { node_port: 30_080, is_local, ranges: ranges.to_vec() });
        }
        self
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (number, spec) in (1u8..).zip(&self.services) {
            let Some(spec) = spec else { continue };
            let name = ObjectName::new("default", &format!("s{number}"));
            Arc::make_mut(&mut snapshot.services).insert(name.clone(), sourced(service(number, spec)));
            for (pod, (state, second)) in &spec.parts {
                for v6 in [false, true] {
                    let slice = slice(&name.name, spec.target_port, *pod, *state, *second, v6);
                    let name = ObjectName::new("default", &format!("s{number}-{pod}-{v6}"));
                    Arc::make_mut(&mut snapshot.slices).insert(name, sourced(slice));
                }
            }
        }
        snapshot
    }

    pub(super) fn desired(&self) -> Desired {
        self.decide(&self.snapshot())
    }

    /// The desired state for a snapshot on this world's node.
    pub(super) fn decide(&self, snapshot: &Snapshot) -> Desired {
        let address = |text: &str| text.parse().expect("an address");
        let networks = if self.knows_pods { POD_NETWORKS.as_slice() } else { &[] };
        let node = NodeFacts {
            name: Some("here".to_owned()),
            addresses: vec![address("198.51.100.1"), address("fd00::1:1")],
            // One address is enough: each additional one makes every state of every plan more expensive.
            node_port_networks: vec!["198.51.100.0/24".parse().expect("a network")],
            pod_networks: networks.iter().map(|text| text.parse().expect("a network")).collect(),
            ..NodeFacts::default()
        };
        desired(snapshot, &Options { node, ..Options::default() }).0
    }
}

/// The first four clients of each family are pods.
const POD_NETWORKS: [&str; 2] = ["192.0.2.0/30", "2001:db8::/126"];

fn sourced<T>(object: T) -> Sourced<T> {
    Sourced { origin: None, object: Arc::new(object) }
}

fn service(number: u8, spec: &Spec) -> Service {
    let port = |name: &str, port, protocol: &str| ServicePort {
        name: Some(name.to_owned()),
        port,
        protocol: Some(protocol.to_owned()),
        ..ServicePort::default()
    };
    let mut ips = vec![format!("10.0.0.{number}")];
    ips.extend(spec.dual.then(|| format!("fd00::{number}")));
    let mut service = Service {
        spec: Some(ServiceSpec {
            cluster_ips: Some(ips),
            ports: Some(vec![port("a", 80, "TCP"), port("b", 81, "UDP")]),
            session_affinity: spec.affinity.then(|| "ClientIP".to_owned()),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    };
    let annotations = service.metadata.annotations.get_or_insert_default();
    annotations.insert("affinity.dev/select".to_owned(), ["random", "consistent", "least"][spec.select].to_owned());
    if spec.grouped {
        annotations.insert("affinity.dev/group".to_owned(), "g".to_owned());
    }
    if let Some(exposed) = &spec.exposed {
        expose(&mut service, number, exposed);
    }
    service
}

/// Gives the first port a node port, and the service a load balancer.
fn expose(service: &mut Service, number: u8, exposed: &Exposed) {
    let policy = |is_local| Some(if is_local { "Local" } else { "Cluster" }.to_owned());
    let Some(spec) = &mut service.spec else { return };
    spec.type_ = Some("LoadBalancer".to_owned());
    if let Some(port) = spec.ports.iter_mut().flatten().next() {
        port.node_port = Some(exposed.node_port.into());
    }
    spec.internal_traffic_policy = policy(exposed.is_local.0);
    spec.external_traffic_policy = policy(exposed.is_local.1);
    spec.load_balancer_source_ranges = Some(exposed.ranges.iter().map(|range| (*range).to_owned()).collect());
    let ingress = |ip: String| LoadBalancerIngress { ip: Some(ip), ..LoadBalancerIngress::default() };
    let ingress = Some(vec![ingress(format!("203.0.113.{number}")), ingress(format!("fd02::{number}"))]);
    service.status = Some(ServiceStatus { load_balancer: Some(LoadBalancerStatus { ingress }) });
}

fn slice(service: &str, target_port: u16, pod: u8, state: State, second: bool, v6: bool) -> EndpointSlice {
    let port = |name: &str, port, protocol: &str| EndpointPort {
        name: Some(name.to_owned()),
        port: Some(port),
        protocol: Some(protocol.to_owned()),
    };
    let mut ports = vec![port("a", i32::from(target_port), "TCP")];
    ports.extend(second.then(|| port("b", 5353, "UDP")));
    let mut slice = EndpointSlice {
        address_type: if v6 { "IPv6" } else { "IPv4" }.to_owned(),
        endpoints: Some(vec![Endpoint {
            addresses: vec![if v6 { format!("fd01::{pod}") } else { format!("10.1.0.{pod}") }],
            conditions: Some(EndpointConditions {
                ready: Some(matches!(state, State::Ready)),
                serving: Some(matches!(state, State::Ready | State::Leaving)),
                terminating: Some(matches!(state, State::Leaving)),
            }),
            node_name: Some(if pod.is_multiple_of(2) { "here" } else { "there" }.to_owned()),
            target_ref: Some(ObjectReference { name: Some(format!("p{pod}")), ..ObjectReference::default() }),
            ..Endpoint::default()
        }]),
        ports: Some(ports),
        ..EndpointSlice::default()
    };
    let labels = slice.metadata.labels.get_or_insert_default();
    labels.insert("kubernetes.io/service-name".to_owned(), service.to_owned());
    slice
}

/// An address of either family.
pub(super) trait TestAddress: Address {
    /// A client's address.
    fn client(number: u8) -> Self;
    /// The standard library's type.
    fn ip(self) -> IpAddr;
    /// The frontends of its family.
    fn frontends(observed: &Observed) -> &BTreeMap<FrontendKey<Self>, Frontend>;
    /// The ranges of its family.
    fn ranges(observed: &Observed) -> &BTreeSet<RangeKey<Self>>;
}

impl TestAddress for affinity_common::abi::V4 {
    fn client(number: u8) -> Self {
        Self([192, 0, 2, number])
    }

    fn ip(self) -> IpAddr {
        self.0.into()
    }

    fn frontends(observed: &Observed) -> &BTreeMap<FrontendKey<Self>, Frontend> {
        &observed.frontends_v4
    }

    fn ranges(observed: &Observed) -> &BTreeSet<RangeKey<Self>> {
        &observed.ranges_v4
    }
}

impl TestAddress for affinity_common::abi::V6 {
    fn client(number: u8) -> Self {
        let mut address = [0; 16];
        address[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
        address[15] = number;
        Self(address)
    }

    fn ip(self) -> IpAddr {
        self.0.into()
    }

    fn frontends(observed: &Observed) -> &BTreeMap<FrontendKey<Self>, Frontend> {
        &observed.frontends_v6
    }

    fn ranges(observed: &Observed) -> &BTreeSet<RangeKey<Self>> {
        &observed.ranges_v6
    }
}

/// The outcome of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Fate {
    /// Where it went.
    pub(super) to: Option<(IpAddr, u16)>,
    /// Why.
    pub(super) reason: Reason,
}

/// Sends a packet of `client` to a frontend. A reply, if one is possible, must be translated back.
pub(super) fn send<A: TestAddress>(model: &Model, frontend: &FrontendKey<A>, client: u8, sport: u16, flags: u8) -> Fate
where
    Model: FamilyTables<A>,
{
    let mut headers = headers(frontend, client, sport, flags);
    let outcome = to_frontend(model, &mut headers, || 0);
    let to = match outcome.decision {
        Decision::Forward(_) => {
            let edit = model.flow(&headers.key).expect("the flow that the packet belongs to").read(Flow::EDIT);
            let mut reply = headers;
            reply.key = headers.key.opposite(&edit);
            let answer = from_backend(model, &mut reply).decision;
            assert!(matches!(answer, Decision::Forward(_)), "the filter or the flows know nothing of the reply");
            Some((edit.daddr.ip(), edit.dport.get()))
        }
        Decision::Pass | Decision::Reject | Decision::Drop => None,
    };
    Fate { to, reason: outcome.reason }
}

fn headers<A: TestAddress>(frontend: &FrontendKey<A>, client: u8, sport: u16, flags: u8) -> Headers<A> {
    let key = FlowKey {
        saddr: A::client(client),
        daddr: frontend.address,
        sport: Port::new(sport),
        dport: frontend.port,
        protocol: frontend.protocol,
        direction: Direction::Dnat as u8,
        pad: [0; 2],
    };
    let flags = if frontend.protocol == affinity_common::headers::TCP { flags } else { 0 };
    Headers::new(key, flags)
}
