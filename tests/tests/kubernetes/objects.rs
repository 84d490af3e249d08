//! Objects of a cluster, as its API returns them.

use affinity_tests::apiserver::ApiServer;
use anyhow::Result;
use serde_json::{Value, json};

/// A service with affinity, by number.
pub(crate) fn service(number: u32) -> Value {
    let [.., high, low] = number.to_be_bytes();
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": format!("web-{number}"), "namespace": "shop", "uid": format!("uid-{number}"),
            "creationTimestamp": "2026-01-02T03:04:05Z", "managedFields": [{"manager": "kubectl", "operation": "Update"}],
        },
        "spec": {
            "type": "ClusterIP", "clusterIP": format!("10.96.{high}.{low}"), "clusterIPs": [format!("10.96.{high}.{low}")],
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}},
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
        },
    })
}

/// The service's only slice, with this many ready endpoints.
pub(crate) fn slice(number: u32, endpoints: u8) -> Value {
    let [.., high, low] = number.to_be_bytes();
    let endpoint = |index: u8| {
        json!({
            "addresses": [format!("10.{}.{high}.{low}", 128 + index)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": if index == 0 { "node-a" } else { "node-b" }, "zone": "zone-a",
            "targetRef": {"kind": "Pod", "namespace": "shop", "name": format!("web-{number}-{index}"), "uid": "u"},
        })
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": format!("web-{number}-abcde"), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": format!("web-{number}")},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-02T03:04:05Z"},
        },
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        "endpoints": (0..endpoints).map(endpoint).collect::<Vec<_>>(),
    })
}

/// This node.
pub(crate) fn node() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "node-a", "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    })
}

/// A double with this node, and services of these numbers with two endpoints each.
pub(crate) fn cluster(services: impl IntoIterator<Item = u32>) -> Result<ApiServer> {
    let api = ApiServer::start()?;
    api.put(node())?;
    for number in services {
        api.put(service(number))?;
        api.put(slice(number, 2))?;
    }
    Ok(api)
}
