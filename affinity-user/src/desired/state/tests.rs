//! The state does not depend on earlier snapshots.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use proptest::prelude::*;

use super::*;
use crate::{
    desired::desired,
    source::api::{
        Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, LoadBalancerIngress,
        LoadBalancerStatus, Named, Node as ApiNode, NodeSpec, ObjectReference, Service, ServicePort, ServiceSpec,
        ServiceStatus,
    },
};

/// A sequence of snapshots that differ in a few objects each. Services are added, removed and changed; they clash, join and
/// leave groups, are ours or not, and are exposed in every way and under every policy. Slices move from one service to another.
/// The node gets a zone and pod networks. Parts cannot be read.
pub(crate) fn snapshots(most: usize) -> impl Strategy<Value = Vec<Snapshot>> {
    let service =
        (0u8..5, prop::option::weighted(0.8, service())).prop_map(|(n, service)| Step::Service(n, Box::new(service)));
    let slice = (0u8..8, prop::option::weighted(0.8, slice())).prop_map(|(n, slice)| Step::Slice(n, Box::new(slice)));
    let node = prop::option::of((any::<bool>(), any::<bool>())).prop_map(Step::Node);
    let partial = prop::bool::weighted(0.3).prop_map(Step::Partial);
    let step = prop_oneof![8 => service, 12 => slice, 2 => partial, 1 => node];
    prop::collection::vec(prop::collection::vec(step, 1..5), 1..most).prop_map(follow)
}

/// A change of a source.
#[derive(Clone, Debug)]
enum Step {
    Service(u8, Box<Option<Service>>),
    Slice(u8, Box<Option<EndpointSlice>>),
    Partial(bool),
    /// Whether the node is in a zone, and whether it has a network of pods.
    Node(Option<(bool, bool)>),
}

fn follow(bursts: Vec<Vec<Step>>) -> Vec<Snapshot> {
    let mut snapshot = Snapshot::default();
    let mut all = Vec::new();
    for burst in bursts {
        for step in burst {
            match step {
                Step::Service(number, service) => {
                    put(Arc::make_mut(&mut snapshot.services), &format!("s{number}"), *service)
                }
                Step::Slice(number, slice) => put(Arc::make_mut(&mut snapshot.slices), &format!("e{number}"), *slice),
                Step::Partial(partial) => snapshot.partial = partial,
                Step::Node(node) => snapshot.node = node.map(|(in_zone, has_pods)| node_of(in_zone, has_pods)),
            }
        }
        all.push(snapshot.clone());
    }
    all
}

fn put<T>(objects: &mut BTreeMap<ObjectName, Sourced<T>>, name: &str, object: Option<T>) {
    let name = ObjectName::new("default", name);
    match object {
        Some(object) => _ = objects.insert(name, Sourced { origin: None, object: Arc::new(object) }),
        None => _ = objects.remove(&name),
    }
}

fn node_of(in_zone: bool, has_pods: bool) -> Sourced<ApiNode> {
    let mut node = ApiNode::default();
    if in_zone {
        let labels = node.metadata.labels.get_or_insert_default();
        labels.insert("topology.kubernetes.io/zone".to_owned(), "z".to_owned());
    }
    node.spec = Some(NodeSpec { pod_cidr: has_pods.then(|| "10.1.0.0/24".to_owned()), ..NodeSpec::default() });
    Sourced { origin: None, object: Arc::new(node) }
}

/// A service with one or two of a few addresses, with or without a date.
fn service() -> impl Strategy<Value = Service> {
    let addresses = prop::sample::subsequence(vec!["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1"], 1..3);
    let ports = prop::sample::subsequence(vec![("a", 80, "TCP"), ("b", 81, "UDP"), ("c", 80, "SCTP")], 1..3);
    let group = prop::option::weighted(0.5, prop::sample::select(vec!["g", "h"]));
    let date = prop::option::of(0i64..3);
    let pins = (prop::bool::weighted(0.8), prop::option::weighted(0.3, Just("packet")));
    let exposed = prop::option::of(exposed());
    (addresses, ports, group, date, pins, exposed).prop_map(|(addresses, ports, group, date, pins, exposed)| {
        let (pinned, timer) = pins;
        let port = |(name, port, protocol): (&str, i32, &str)| ServicePort {
            name: Some(name.to_owned()),
            port,
            protocol: Some(protocol.to_owned()),
            ..ServicePort::default()
        };
        let mut service = Service {
            spec: Some(ServiceSpec {
                cluster_ips: Some(addresses.into_iter().map(str::to_owned).collect()),
                ports: Some(ports.into_iter().map(port).collect()),
                session_affinity: pinned.then(|| "ClientIP".to_owned()),
                ..ServiceSpec::default()
            }),
            ..Service::default()
        };
        let annotations = service.metadata.annotations.get_or_insert_default();
        annotations.extend(group.map(|group| ("affinity.dev/group".to_owned(), group.to_owned())));
        annotations.extend(timer.map(|timer| ("affinity.dev/timer".to_owned(), timer.to_owned())));
        let date = date.and_then(|second| Timestamp::from_second(second).ok());
        service.metadata.creation_timestamp = date.map(Time);
        exposed.unwrap_or_default().put_on(&mut service);
        service
    })
}

/// How a service is reached from outside.
#[derive(Clone, Debug, Default)]
struct Exposed {
    kind: Option<&'static str>,
    node_ports: Vec<i32>,
    external_ips: Vec<&'static str>,
    ingress: Vec<&'static str>,
    ranges: Vec<&'static str>,
    is_local: (bool, bool),
}

fn exposed() -> impl Strategy<Value = Exposed> {
    let kind = prop::option::of(prop::sample::select(vec!["NodePort", "LoadBalancer", "ClusterIP"]));
    let node_ports = prop::collection::vec(prop::sample::select(vec![80, 30_080, 30_081]), 3);
    let ips = || prop::sample::subsequence(vec!["10.0.0.3", "192.0.2.1", "203.0.113.1", "2001:db8::1"], 0..3);
    let ranges = prop::sample::subsequence(vec!["198.51.100.0/24", "2001:db8::/32"], 0..3);
    (kind, node_ports, ips(), ips(), ranges, any::<(bool, bool)>()).prop_map(
        |(kind, node_ports, external_ips, ingress, ranges, is_local)| Exposed {
            kind,
            node_ports,
            external_ips,
            ingress,
            ranges,
            is_local,
        },
    )
}

impl Exposed {
    fn put_on(self, service: &mut Service) {
        let owned = |texts: Vec<&str>| Some(texts.into_iter().map(str::to_owned).collect());
        let policy = |is_local| Some(if is_local { "Local" } else { "Cluster" }.to_owned());
        let Some(spec) = &mut service.spec else { return };
        spec.type_ = self.kind.map(str::to_owned);
        for (port, node_port) in spec.ports.iter_mut().flatten().zip(self.node_ports) {
            port.node_port = Some(node_port);
        }
        spec.external_ips = owned(self.external_ips);
        spec.load_balancer_source_ranges = owned(self.ranges);
        spec.internal_traffic_policy = policy(self.is_local.0);
        spec.external_traffic_policy = policy(self.is_local.1);
        spec.health_check_node_port = Some(32_000);
        let ingress = |ip: &str| LoadBalancerIngress { ip: Some(ip.to_owned()), ..LoadBalancerIngress::default() };
        let ingress = Some(self.ingress.into_iter().map(ingress).collect());
        service.status = Some(ServiceStatus { load_balancer: Some(LoadBalancerStatus { ingress }) });
    }
}

/// A slice of one of the services, or of none, with some of a few pods.
fn slice() -> impl Strategy<Value = EndpointSlice> {
    let service = prop::option::weighted(0.95, 0u8..5);
    let ports = vec![("a", 8080, "TCP"), ("a", 9090, "TCP"), ("b", 53, "UDP"), ("c", 80, "SCTP")];
    let ports = prop::sample::subsequence(ports, 1..3);
    let endpoint = (0u8..6, 0u8..3, any::<bool>(), prop::option::of(any::<(bool, bool)>()));
    (service, any::<bool>(), ports, prop::collection::vec(endpoint, 0..4)).prop_map(
        |(service, v6, ports, endpoints)| {
            let port = |(name, port, protocol): (&str, i32, &str)| EndpointPort {
                name: Some(name.to_owned()),
                port: Some(port),
                protocol: Some(protocol.to_owned()),
            };
            let mut slice = EndpointSlice {
                address_type: if v6 { "IPv6" } else { "IPv4" }.to_owned(),
                endpoints: Some(
                    endpoints
                        .into_iter()
                        .map(|(pod, state, here, hints)| endpoint_of(pod, state, here, hints, v6))
                        .collect(),
                ),
                ports: Some(ports.into_iter().map(port).collect()),
                ..EndpointSlice::default()
            };
            let labels = slice.metadata.labels.get_or_insert_default();
            let label = service.map(|service| ("kubernetes.io/service-name".to_owned(), format!("s{service}")));
            labels.extend(label);
            slice
        },
    )
}

fn endpoint_of(pod: u8, state: u8, here: bool, hints: Option<(bool, bool)>, v6: bool) -> Endpoint {
    let hints = hints.map(|(node, zone)| EndpointHints {
        for_nodes: Some(vec![Named { name: if node { "here" } else { "there" }.to_owned() }]),
        for_zones: Some(vec![Named { name: if zone { "z" } else { "y" }.to_owned() }]),
    });
    Endpoint {
        hints,
        addresses: vec![if v6 { format!("fd01::{pod:x}") } else { format!("10.1.0.{pod}") }],
        conditions: Some(EndpointConditions {
            ready: Some(state == 0),
            serving: Some(state < 2),
            terminating: Some(state == 1),
        }),
        node_name: Some(if here { "here" } else { "there" }.to_owned()),
        // One address has no pod: slices may distinguish it by ports.
        target_ref: (pod != 5).then(|| ObjectReference { name: Some(format!("p{pod}")), ..ObjectReference::default() }),
    }
}

pub(crate) fn options() -> Options {
    let addresses = ["192.0.2.1", "2001:db8::1"].iter().flat_map(|address| address.parse()).collect();
    let node = NodeFacts { name: Some("here".to_owned()), addresses, ..NodeFacts::default() };
    Options { node, services: Services::Affinity, ..Options::default() }
}

/// Applies a change to the previous desired state.
fn patch(before: &Desired, change: &Change) -> Desired {
    let Desired { frontends, ranges, health_checks, pools, unions, backends, others, terminating, .. } =
        change.desired.clone();
    let mut after = before.clone();
    after.frontends.retain(|_, frontend| !change.services.contains(&frontend.internal.pool.service));
    after.ranges.retain(|service, _| !change.services.contains(service));
    after.health_checks.retain(|service, _| !change.services.contains(service));
    after.pools.retain(|pool, _| !change.services.contains(&pool.service));
    after.unions.retain(|scope, _| match scope {
        Scope::Service(name) => !change.services.contains(name),
        Scope::Group(name) => !change.groups.contains(name),
    });
    after.backends.retain(|backend, _| !change.gone.contains(backend) && !others.contains(backend));
    after.others.retain(|backend| !change.gone.contains(backend) && !backends.contains_key(backend));
    let is_told =
        |name: &BackendName| backends.contains_key(name) || others.contains(name) || change.gone.contains(name);
    after.terminating.retain(|backend| !is_told(backend));
    after.frontends.extend(frontends);
    after.ranges.extend(ranges);
    after.health_checks.extend(health_checks);
    after.pools.extend(pools);
    after.unions.extend(unions);
    after.backends.extend(backends);
    after.others.extend(others);
    after.terminating.extend(terminating);
    after
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn kept_state_equals_a_full_computation(snapshots in snapshots(12)) {
        let mut state = DesiredState::new(options());
        for (number, snapshot) in snapshots.iter().enumerate() {
            let before = state.desired().clone();
            let change = state.update(snapshot);
            // Facts that are learned and then replaced leave no trace.
            if number % 4 == 3 {
                let elsewhere = NodeFacts { name: Some("there".to_owned()), ..NodeFacts::default() };
                let is_news = [state.learn(elsewhere), state.learn(options().node)];
                prop_assert_eq!(is_news, [true; 2]);
            }
            let (full, problems) = desired(snapshot, &options());
            prop_assert_eq!(state.desired(), &full);
            prop_assert_eq!(state.problems().cloned().collect::<Vec<_>>(), problems);
            if let Some(change) = change {
                prop_assert_eq!(patch(&before, &change), full);
            }
            let again = state.update(snapshot);
            if let Some(again) = again {
                let Change { services, groups, gone, desired } = again;
                prop_assert!(services.is_empty() && groups.is_empty() && gone.is_empty());
                prop_assert!(desired.pools.is_empty() && desired.backends.is_empty());
            }
        }
    }
}
