//! The values of unused fields never change how an object is read.

use std::{fmt::Debug, path::Path};

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::source::directory;

/// A Service, a slice and a node with a value in every field that is used.
fn full() -> [Value; 3] {
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop", "labels": {label::PROXY_NAME: "x"},
            "annotations": {"affinity.dev/timer": "packet"}, "creationTimestamp": "2026-01-02T03:04:05Z"},
        "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"],
            "externalIPs": ["192.0.2.1"], "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}, "internalTrafficPolicy": "Local",
            "externalTrafficPolicy": "Local", "loadBalancerSourceRanges": ["192.0.2.0/24"], "healthCheckNodePort": 32_000,
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "nodePort": 30_080}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1", "ipMode": "VIP"}]}},
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "web-1", "namespace": "shop", "labels": {label::SERVICE_NAME: "web"}},
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        "endpoints": [{"addresses": ["10.244.0.1"], "nodeName": "a",
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "hints": {"forNodes": [{"name": "a"}], "forZones": [{"name": "z"}]},
            "targetRef": {"name": "web-0", "namespace": "shop"}}],
    });
    let node = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "a", "labels": {label::ZONE: "z"}},
        "spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24"], "taints": [{"key": "x"}]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    });
    [service, slice, node]
}

/// Fields that Kubernetes has and that are not used here, by the object they are in. The last one is unknown to both.
const UNUSED: [(&str, &[&str]); 18] = [
    ("", &["data", "unknown"]),
    ("/metadata", &["managedFields", "ownerReferences", "finalizers", "generation", "selfLink", "unknown"]),
    ("/metadata/labels", &["app", "unknown/label"]),
    ("/metadata/annotations", &["kubectl.kubernetes.io/last-applied-configuration", "unknown"]),
    ("/spec", &["selector", "ipFamilies", "ipFamilyPolicy", "allocateLoadBalancerNodePorts", "providerID", "unknown"]),
    ("/spec/ports/0", &["targetPort", "appProtocol", "unknown"]),
    ("/spec/sessionAffinityConfig", &["unknown"]),
    ("/spec/sessionAffinityConfig/clientIP", &["unknown"]),
    ("/spec/taints/0", &["effect", "timeAdded", "value", "unknown"]),
    ("/status", &["conditions", "images", "nodeInfo", "capacity", "unknown"]),
    ("/status/loadBalancer", &["unknown"]),
    ("/status/loadBalancer/ingress/0", &["hostname", "ports", "unknown"]),
    ("/ports/0", &["appProtocol", "unknown"]),
    ("/endpoints/0", &["hostname", "zone", "deprecatedTopology", "unknown"]),
    ("/endpoints/0/conditions", &["unknown"]),
    ("/endpoints/0/hints", &["unknown"]),
    ("/endpoints/0/hints/forZones/0", &["unknown"]),
    ("/endpoints/0/targetRef", &["kind", "uid", "fieldPath", "resourceVersion", "unknown"]),
];

/// Values that no field of Kubernetes should hold, and values that real servers write.
fn odd_values() -> Vec<Value> {
    let null_time = json!([{"type": "x", "status": "True", "reason": "x", "message": "", "lastTransitionTime": null}]);
    let mut values =
        vec![null_time, json!(null), json!(7), json!(-0.5), json!(true), json!("text"), json!([]), json!({})];
    values.extend([json!([null, 7, {"a": [null]}]), json!({"a": null, "": {"b": [1, "x"]}})]);
    values
}

/// Puts a value at a place, if the object has that place.
fn put(object: &mut Value, place: &str, field: &str, value: Value) -> bool {
    let Some(Value::Object(map)) = object.pointer_mut(place) else { return false };
    map.insert(field.to_owned(), value).is_none()
}

fn read<T: DeserializeOwned>(object: &Value) -> T {
    serde_json::from_str(&object.to_string()).unwrap_or_else(|error| panic!("{error}: {object}"))
}

/// The object is read like the plain one, from an API and from a file.
fn reads_as<T: DeserializeOwned + PartialEq + Debug>(object: &Value, plain: &Value) {
    assert_eq!(read::<T>(object), read::<T>(plain), "{object}");
    let file = |object: &Value| directory::parse(Path::new("a.json"), &object.to_string());
    let (odd, plain) = (file(object), file(plain));
    assert!(!odd.partial && odd.problems.iter().all(|problem| problem.severity < crate::source::Severity::Error));
    assert_eq!((odd.services, odd.slices), (plain.services, plain.slices), "{object}");
}

fn each_reads_as(objects: &[Value; 3], plain: &[Value; 3]) {
    reads_as::<Service>(&objects[0], &plain[0]);
    reads_as::<EndpointSlice>(&objects[1], &plain[1]);
    reads_as::<Node>(&objects[2], &plain[2]);
}

#[test]
fn a_field_that_nothing_uses_may_hold_anything() {
    let mut tried = 0;
    for (place, fields) in UNUSED {
        for field in fields {
            for value in odd_values() {
                let mut objects = full();
                let put = objects.each_mut().map(|object| put(object, place, field, value.clone()));
                tried += put.iter().filter(|put| **put).count();
                each_reads_as(&objects, &full());
            }
        }
    }
    assert!(tried > 500, "{tried}");
}

#[test]
fn times_and_identities_count_where_they_are_good() {
    for (field, value) in
        [("creationTimestamp", json!("yesterday")), ("deletionTimestamp", json!(1)), ("uid", json!([]))]
    {
        let mut objects = full();
        objects[0]["metadata"]["creationTimestamp"] = Value::Null;
        let plain = objects.clone();
        objects.iter_mut().for_each(|object| object["metadata"][field] = value.clone());
        each_reads_as(&objects, &plain);
    }
}

#[test]
fn null_is_the_empty_value_of_each_field() {
    let empty = read::<Service>(&json!({"metadata": {"name": "web"}, "spec": {"ports": [{}]}}));
    let null = json!({"metadata": {"name": "web", "labels": null}, "spec": {"type": null, "clusterIP": null,
        "clusterIPs": null, "ports": [null], "sessionAffinityConfig": null}, "status": {"loadBalancer": null}});
    let null: Service = read(&null);
    assert_eq!((null.metadata, null.spec), (empty.metadata, empty.spec));
    let slice: EndpointSlice = read(&json!({"metadata": null, "addressType": null, "endpoints": [null,
        {"addresses": null}, {"addresses": [null], "hints": {"forZones": [{"name": null}]}}], "ports": null}));
    let addresses: Vec<_> = slice.endpoints.iter().flatten().map(|endpoint| endpoint.addresses.clone()).collect();
    assert_eq!(addresses, [vec![], vec![], vec![String::new()]]);
    let service: Service = read(&json!({"metadata": {"annotations": {"affinity.dev/group": null}}}));
    assert_eq!(service.metadata.annotations, Some([("affinity.dev/group".to_owned(), String::new())].into()));
}

#[test]
fn a_field_that_is_used_is_named_where_it_is_wrong() {
    for (object, place) in [
        (json!({"metadata": {"annotations": {"affinity.dev/client-prefix-v4": 24}}}), "metadata.annotations"),
        (json!({"spec": {"ports": [{"port": 80}, {"port": "x"}]}}), "spec.ports[1].port"),
        (json!({"spec": {"clusterIPs": "10.0.0.1"}}), "spec.clusterIPs"),
    ] {
        let error = serde_path_to_error::deserialize::<_, Service>(&object).expect_err("wrong");
        assert!(error.path().to_string().starts_with(place), "{error}");
    }
}

/// Any JSON, small.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z0-9:.]{0,6}".prop_map(Value::from)
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a-zA-Z]{0,6}", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect()))
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn many_odd_fields_at_once_change_nothing(
        odd in prop::collection::vec((0..UNUSED.len(), any::<prop::sample::Index>(), any_value()), 1..8),
    ) {
        let mut objects = full();
        for (place, field, value) in odd {
            let (place, fields) = UNUSED[place];
            for object in &mut objects {
                put(object, place, fields[field.index(fields.len())], value.clone());
            }
        }
        each_reads_as(&objects, &full());
    }
}

#[test]
fn numbers_may_begin_with_zeros() {
    for (text, address) in [
        ("10.96.0.10", "10.96.0.10"),
        ("010.096.000.010", "10.96.0.10"),
        ("192.0.02.08", "192.0.2.8"),
        ("0.0.0.00", "0.0.0.0"),
        ("fd00::00a", "fd00::a"),
        ("fd00:0000:00001::0", "fd00:0:1::"),
        ("::ffff:010.0.0.01", "::ffff:10.0.0.1"),
        ("::", "::"),
    ] {
        assert_eq!(parse_address(text).map(|address| address.to_string()).as_deref(), Some(address), "{text}");
    }
    for bad in
        ["", "10.96.0", "10.96.0.256", "010.96.0.0300", "0x10.0.0.1", "10..0.1", "fd00", "web", "10.0.0.1/8", " "]
    {
        assert_eq!(parse_address(bad), None, "{bad}");
    }
}

#[test]
fn networks_may_have_host_bits_and_zeros() {
    for (text, network) in [
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("192.0.2.7/32", "192.0.2.7/32"),
        ("1.2.3.4/0", "0.0.0.0/0"),
        (" fd00:1::5/32 ", "fd00:1::/32"),
        ("fd00::/0", "::/0"),
        ("fd00::1/128", "fd00::1/128"),
        ("010.001.0.0/016", "10.1.0.0/16"),
        ("::ffff:10.1.2.3/104", "::ffff:10.0.0.0/104"),
    ] {
        assert_eq!(parse_network(text).map(|network| network.to_string()).as_deref(), Ok(network), "{text}");
    }
    for bad in ["", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/+8", "fd00::/129", "web/8", "10.0.0/8"] {
        assert_eq!(parse_network(bad), Err(NetworkError(bad.to_owned())));
    }
}
