//! The kinds that are watched, and what of their objects is kept.

use std::fmt::Debug;

use k8s_openapi::{
    api::{
        core::v1::{Node, NodeSpec, NodeStatus, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::Resource;
use serde::de::DeserializeOwned;

use crate::source::ObjectName;

/// As kube-proxy asks for them.
const NOT_HEADLESS: &str = "!service.kubernetes.io/headless";
/// The whole object once more, as `kubectl apply` left it.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// A kind that is watched.
pub(super) trait Watched:
    Resource<DynamicType = ()> + DeserializeOwned + Clone + Debug + PartialEq + 'static
{
    /// Its name.
    const KIND: &'static str;
    /// Which of its objects, by their labels; empty: all.
    const LABELS: &'static str;

    /// Drops what nothing reads: most of the memory, and all that changes without meaning.
    fn strip(&mut self);
}

impl Watched for Service {
    const KIND: &'static str = "Service";
    const LABELS: &'static str = NOT_HEADLESS;

    fn strip(&mut self) {
        strip_meta(&mut self.metadata);
        if let Some(annotations) = &mut self.metadata.annotations {
            annotations.remove(LAST_APPLIED);
        }
    }
}

impl Watched for EndpointSlice {
    const KIND: &'static str = "EndpointSlice";
    const LABELS: &'static str = NOT_HEADLESS;

    fn strip(&mut self) {
        strip_meta(&mut self.metadata);
        // The time of the last change, above all.
        self.metadata.annotations = None;
        let Some(endpoints) = &mut self.endpoints else { return };
        endpoints.shrink_to_fit();
        for endpoint in endpoints {
            endpoint.deprecated_topology = None;
            if let Some(target) = &mut endpoint.target_ref {
                target.uid = None;
                target.resource_version = None;
            }
        }
    }
}

impl Watched for Node {
    const KIND: &'static str = "Node";
    const LABELS: &'static str = "";

    /// Labels for topology, addresses and pod networks stay; heartbeats and images go.
    fn strip(&mut self) {
        strip_meta(&mut self.metadata);
        self.metadata.annotations = None;
        if let Some(spec) = self.spec.take() {
            self.spec = Some(NodeSpec { pod_cidr: spec.pod_cidr, pod_cidrs: spec.pod_cidrs, ..NodeSpec::default() });
        }
        if let Some(status) = self.status.take() {
            self.status = Some(NodeStatus { addresses: status.addresses, ..NodeStatus::default() });
        }
    }
}

fn strip_meta(meta: &mut ObjectMeta) {
    *meta = ObjectMeta {
        name: meta.name.take(),
        namespace: meta.namespace.take(),
        uid: meta.uid.take(),
        labels: meta.labels.take(),
        annotations: meta.annotations.take(),
        creation_timestamp: meta.creation_timestamp.take(),
        ..ObjectMeta::default()
    };
}

/// The version of an object, a list or a bookmark. The API promises that they can be compared as numbers.
pub(super) fn version(text: Option<&str>) -> Option<u64> {
    text?.parse().ok()
}

/// The name of an object; nodes have no namespace.
pub(super) fn name_of(meta: &ObjectMeta) -> ObjectName {
    ObjectName::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stripped<K: Watched>(json: &str) -> K {
        let mut object: K = serde_json::from_str(json).expect("an object");
        object.strip();
        object
    }

    #[test]
    fn what_decides_stays_and_what_only_takes_memory_goes() {
        let service: Service = stripped(
            r#"{"metadata": {"name": "web", "namespace": "shop", "uid": "1", "resourceVersion": "7",
                "creationTimestamp": "2026-01-02T03:04:05Z", "managedFields": [{"manager": "kubectl"}],
                "labels": {"a": "b"}, "annotations": {"affinity.dev/timer": "packet",
                "kubectl.kubernetes.io/last-applied-configuration": "{}"}}, "spec": {"clusterIP": "10.96.0.10"}}"#,
        );
        let kept = r#"{"metadata": {"name": "web", "namespace": "shop", "uid": "1",
            "creationTimestamp": "2026-01-02T03:04:05Z", "labels": {"a": "b"},
            "annotations": {"affinity.dev/timer": "packet"}}, "spec": {"clusterIP": "10.96.0.10"}}"#;
        assert_eq!(service, serde_json::from_str(kept).expect("an object"));
        let slice: EndpointSlice = stripped(
            r#"{"metadata": {"name": "web-1", "generateName": "web-", "annotations": {"changed": "now"}},
                "addressType": "IPv4", "endpoints": [{"addresses": ["10.244.0.1"], "zone": "a",
                "targetRef": {"kind": "Pod", "name": "web-0", "uid": "2"}}]}"#,
        );
        let kept = r#"{"metadata": {"name": "web-1"}, "addressType": "IPv4", "endpoints": [
            {"addresses": ["10.244.0.1"], "zone": "a", "targetRef": {"kind": "Pod", "name": "web-0"}}]}"#;
        assert_eq!(slice, serde_json::from_str(kept).expect("an object"));
        let node: Node = stripped(
            r#"{"metadata": {"name": "a", "labels": {"topology.kubernetes.io/zone": "z"}}, "spec": {"podCIDR": "10.244.0.0/24",
                "providerID": "x"}, "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
                "images": [{"names": ["x"]}]}}"#,
        );
        let kept = r#"{"metadata": {"name": "a", "labels": {"topology.kubernetes.io/zone": "z"}},
            "spec": {"podCIDR": "10.244.0.0/24"}, "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}"#;
        assert_eq!(node, serde_json::from_str(kept).expect("an object"));
    }
}
