//! The cluster: its objects as an API server has them, including everything that the agent does not use.

use std::net::Ipv4Addr;

use anyhow::Result;
use serde_json::{Value, json};

use crate::{apiserver::ApiServer, lab::NODE_NAME};

/// The port of each service.
pub(super) const PORT: u16 = 80;
/// Its protocol.
pub(super) const TCP: u8 = 6;

const NAMESPACE: &str = "scale";
/// First addresses of services and pods: ranges with room for the largest cluster.
const SERVICES: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const PODS: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);
/// The distance between services that are changed one after another: a prime.
const STRIDE: u32 = 7_919;

/// Services, each with one slice.
#[derive(Debug)]
pub struct Cluster {
    /// The pods of each service.
    pods: Vec<Vec<u32>>,
    endpoints: u32,
    /// The number of the next pod.
    next: u32,
}

impl Cluster {
    /// This many services, each with this many endpoints.
    #[must_use]
    pub fn new(services: u32, endpoints: u32) -> Self {
        let pods = (0..services).map(|service| (service * endpoints..(service + 1) * endpoints).collect());
        Self { pods: pods.collect(), endpoints, next: services * endpoints }
    }

    pub(super) fn services(&self) -> u32 {
        self.pods.len() as u32
    }

    pub(super) fn endpoints(&self) -> u32 {
        self.endpoints
    }

    /// Sends all objects to the API.
    ///
    /// # Errors
    /// If the API rejects an object.
    pub fn fill(&self, api: &ApiServer) -> Result<()> {
        api.put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE_NAME}}))?;
        (0..self.services()).try_for_each(|service| {
            api.put(self.service(service))?;
            api.put(self.slice(service))
        })
    }

    /// The service of a change.
    pub(super) fn pick(&self, number: u32) -> u32 {
        (u64::from(number) * u64::from(STRIDE) % u64::from(self.services())) as u32
    }

    /// A service's address.
    pub(super) fn address(&self, service: u32) -> Ipv4Addr {
        nth(SERVICES, service)
    }

    /// Replaces one pod of a service with a new one. Returns the new slice, and the pod's address.
    pub(super) fn replace(&mut self, service: u32, number: u32) -> (Value, Ipv4Addr) {
        let pod = self.next;
        self.next += 1;
        self.pods[service as usize][(number % self.endpoints) as usize] = pod;
        (self.slice(service), nth(PODS, pod))
    }

    fn service(&self, service: u32) -> Value {
        let (name, address) = (name(service), self.address(service).to_string());
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": name, "namespace": NAMESPACE, "uid": uid(service), "labels": {"app": name},
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "managedFields": [{"manager": "kubectl", "operation": "Apply", "apiVersion": "v1",
                    "fieldsV1": {"f:spec": {"f:ports": {}, "f:selector": {}, "f:sessionAffinity": {}}}}],
            },
            "spec": {
                "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
                "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10_800}},
                "selector": {"app": name},
                "ports": [{"name": "http", "protocol": "TCP", "port": PORT, "targetPort": 8080}],
            },
        })
    }

    fn slice(&self, service: u32) -> Value {
        let name = name(service);
        let endpoints: Vec<Value> = self.pods[service as usize].iter().map(|pod| endpoint(&name, *pod)).collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{name}-abcde"), "generateName": format!("{name}-"), "namespace": NAMESPACE,
                "labels": {"kubernetes.io/service-name": name, "app": name,
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
                "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": name, "uid": uid(service),
                    "controller": true, "blockOwnerDeletion": true}],
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
            "endpoints": endpoints,
        })
    }
}

fn endpoint(service: &str, pod: u32) -> Value {
    json!({
        "addresses": [nth(PODS, pod).to_string()],
        "conditions": {"ready": true, "serving": true, "terminating": false},
        "nodeName": format!("node-{:03}", pod % 500),
        "zone": "zone-a",
        "targetRef": {"kind": "Pod", "namespace": NAMESPACE, "name": format!("{service}-{pod}"), "uid": uid(pod)},
    })
}

fn name(service: u32) -> String {
    format!("service-{service:05}")
}

fn uid(number: u32) -> String {
    format!("{number:08x}-0000-4000-8000-000000000000")
}

fn nth(first: Ipv4Addr, number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(first) + number)
}
