//! It makes no difference to a memo what came before.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{
    api::{
        core::v1::{ObjectReference, Service, ServicePort, ServiceSpec},
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use proptest::prelude::*;

use super::*;
use crate::desired::desired;

/// Snapshots that follow one another, each a few objects away from the one before: services that are added, removed and
/// changed, that clash, join groups and leave them, are ours or not; slices that pass from one service to another; parts that could not
/// be read.
pub(crate) fn snapshots(most: usize) -> impl Strategy<Value = Vec<Snapshot>> {
    let service =
        (0u8..5, prop::option::weighted(0.8, service())).prop_map(|(n, service)| Step::Service(n, Box::new(service)));
    let slice = (0u8..8, prop::option::weighted(0.8, slice())).prop_map(|(n, slice)| Step::Slice(n, Box::new(slice)));
    let step = prop_oneof![4 => service, 6 => slice, 1 => prop::bool::weighted(0.3).prop_map(Step::Partial)];
    prop::collection::vec(prop::collection::vec(step, 1..5), 1..most).prop_map(follow)
}

/// A change of a source.
#[derive(Clone, Debug)]
enum Step {
    Service(u8, Box<Option<Service>>),
    Slice(u8, Box<Option<EndpointSlice>>),
    Partial(bool),
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

/// A service on one or two of few addresses, with a date or without.
fn service() -> impl Strategy<Value = Service> {
    let addresses = prop::sample::subsequence(vec!["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1"], 1..3);
    let ports = prop::sample::subsequence(vec![("a", 80, "TCP"), ("b", 81, "UDP"), ("c", 80, "SCTP")], 1..3);
    let group = prop::option::weighted(0.5, prop::sample::select(vec!["g", "h"]));
    let date = prop::option::of(0i64..3);
    let pins = (prop::bool::weighted(0.8), prop::option::weighted(0.3, Just("packet")));
    (addresses, ports, group, date, pins).prop_map(|(addresses, ports, group, date, (pinned, timer))| {
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
        service
    })
}

/// A slice of one of the services, or of none, over few pods.
fn slice() -> impl Strategy<Value = EndpointSlice> {
    let service = prop::option::weighted(0.95, 0u8..5);
    let ports = prop::sample::subsequence(vec![("a", 8080, "TCP"), ("a", 9090, "TCP"), ("b", 53, "UDP")], 1..3);
    let endpoint = (0u8..6, 0u8..3, any::<bool>());
    (service, any::<bool>(), ports, prop::collection::vec(endpoint, 0..4)).prop_map(
        |(service, v6, ports, endpoints)| {
            let port = |(name, port, protocol): (&str, i32, &str)| EndpointPort {
                name: Some(name.to_owned()),
                port: Some(port),
                protocol: Some(protocol.to_owned()),
                ..EndpointPort::default()
            };
            let mut slice = EndpointSlice {
                address_type: if v6 { "IPv6" } else { "IPv4" }.to_owned(),
                endpoints: Some(
                    endpoints.into_iter().map(|(pod, state, here)| endpoint_of(pod, state, here, v6)).collect(),
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

fn endpoint_of(pod: u8, state: u8, here: bool, v6: bool) -> Endpoint {
    Endpoint {
        addresses: vec![if v6 { format!("fd01::{pod:x}") } else { format!("10.1.0.{pod}") }],
        conditions: Some(EndpointConditions {
            ready: Some(state == 0),
            serving: Some(state < 2),
            terminating: Some(state == 1),
        }),
        node_name: Some(if here { "here" } else { "there" }.to_owned()),
        target_ref: Some(ObjectReference { name: Some(format!("p{pod}")), ..ObjectReference::default() }),
        ..Endpoint::default()
    }
}

pub(crate) fn options() -> Options {
    Options { node_name: Some("here".to_owned()), services: Services::Affinity, ..Options::default() }
}

/// Puts a change into what was desired before it.
fn patch(before: &Desired, change: &Change) -> Desired {
    let Desired { frontends, pools, unions, backends, others, beside: _, shadow: _, known: _ } = change.desired.clone();
    let mut after = before.clone();
    after.frontends.retain(|_, pool| !change.services.contains(&pool.service));
    after.pools.retain(|pool, _| !change.services.contains(&pool.service));
    after.unions.retain(|scope, _| match scope {
        Scope::Service(name) => !change.services.contains(name),
        Scope::Group(name) => !change.groups.contains(name),
    });
    after.backends.retain(|backend, _| !change.gone.contains(backend) && !others.contains(backend));
    after.others.retain(|backend| !change.gone.contains(backend) && !backends.contains_key(backend));
    after.frontends.extend(frontends);
    after.pools.extend(pools);
    after.unions.extend(unions);
    after.backends.extend(backends);
    after.others.extend(others);
    after
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn history_makes_no_difference(snapshots in snapshots(12)) {
        let mut memo = Memo::new(options());
        for snapshot in &snapshots {
            let before = memo.desired().clone();
            let change = memo.update(snapshot);
            let (full, problems) = desired(snapshot, &options());
            prop_assert_eq!(memo.desired(), &full);
            prop_assert_eq!(memo.problems().cloned().collect::<Vec<_>>(), problems);
            if let Some(change) = change {
                prop_assert_eq!(patch(&before, &change), full);
            }
            let again = memo.update(snapshot);
            if let Some(again) = again {
                let Change { services, groups, gone, desired } = again;
                prop_assert!(services.is_empty() && groups.is_empty() && gone.is_empty());
                prop_assert!(desired.pools.is_empty() && desired.backends.is_empty());
            }
        }
    }
}
