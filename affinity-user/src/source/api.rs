//! The parts of Kubernetes objects that are used here.
//!
//! Only used fields are decoded. Real API servers write values that their own schema forbids, such as
//! `lastTransitionTime: null` in the conditions of a Service; with Kubernetes' full types, one such field would make the whole
//! object unreadable. Here an unused field may hold anything.
//!
//! As in Go's decoder, null means a field's empty value, also as an element of a list.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor},
};
use serde_json::Value;

use super::annotations::PREFIX;

/// The labels that are used.
pub mod label {
    /// Names the service of a slice.
    pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
    /// Assigns a service to the proxy with that name.
    pub const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
    /// Marks services that no proxy handles. Its value does not matter.
    pub const HEADLESS: &str = "service.kubernetes.io/headless";
    /// The zone of a node.
    pub const ZONE: &str = "topology.kubernetes.io/zone";

    pub(super) const ALL: [&str; 4] = [SERVICE_NAME, PROXY_NAME, HEADLESS, ZONE];
}

/// A type with these fields, all of which may be missing or null.
macro_rules! object {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        pub struct $name {
            $(
                $(#[$field_meta])*
                pub $field: $type,
            )*
        }
    };
}

object! {
    /// The metadata of every object.
    Metadata {
        /// The name.
        name: Option<String>,
        /// The namespace.
        namespace: Option<String>,
        /// Distinguishes an object from an earlier one with the same name.
        #[serde(deserialize_with = "if_good")]
        uid: Option<String>,
        /// The version of this state of the object.
        resource_version: Option<String>,
        /// The labels of [`label`]; others are not read.
        #[serde(deserialize_with = "used_texts")]
        labels: Option<BTreeMap<String, String>>,
        /// Our annotations; others are not read.
        #[serde(deserialize_with = "used_texts")]
        annotations: Option<BTreeMap<String, String>>,
        /// When it was created.
        #[serde(deserialize_with = "if_good")]
        creation_timestamp: Option<Time>,
        /// When its deletion was requested.
        #[serde(deserialize_with = "if_good")]
        deletion_timestamp: Option<Time>,
    }
}

object! {
    /// A Service of `v1`.
    Service {
        /// Its metadata.
        #[serde(deserialize_with = "or_default")]
        metadata: Metadata,
        /// What its owner requests.
        spec: Option<ServiceSpec>,
        /// What controllers report.
        status: Option<ServiceStatus>,
    }
}

object! {
    /// What a Service requests.
    ServiceSpec {
        /// `ClusterIP`, `NodePort`, `LoadBalancer` or `ExternalName`.
        #[serde(rename = "type")]
        type_: Option<String>,
        /// The first cluster IP, or `None`.
        #[serde(rename = "clusterIP")]
        cluster_ip: Option<String>,
        /// All cluster IPs.
        #[serde(rename = "clusterIPs", deserialize_with = "list")]
        cluster_ips: Option<Vec<String>>,
        /// Addresses that are routed to the nodes by other means.
        #[serde(rename = "externalIPs", deserialize_with = "list")]
        external_ips: Option<Vec<String>>,
        /// The ports.
        #[serde(deserialize_with = "list")]
        ports: Option<Vec<ServicePort>>,
        /// `ClientIP` or `None`.
        session_affinity: Option<String>,
        /// How long a pin lasts.
        session_affinity_config: Option<SessionAffinityConfig>,
        /// `Cluster` or `Local`, for clients in the cluster.
        internal_traffic_policy: Option<String>,
        /// `Cluster` or `Local`, for external clients.
        external_traffic_policy: Option<String>,
        /// The clients that may use the load balancer.
        #[serde(deserialize_with = "list")]
        load_balancer_source_ranges: Option<Vec<String>>,
        /// The port at which load balancers ask for endpoints on this node.
        health_check_node_port: Option<i32>,
    }
}

object! {
    /// A port of a Service.
    ServicePort {
        /// Its name.
        name: Option<String>,
        /// `TCP`, `UDP` or `SCTP`.
        protocol: Option<String>,
        /// Its number.
        #[serde(deserialize_with = "or_default")]
        port: i32,
        /// The port on the nodes' addresses.
        node_port: Option<i32>,
    }
}

object! {
    /// The configuration of session affinity.
    SessionAffinityConfig {
        /// The configuration of `ClientIP`.
        #[serde(rename = "clientIP")]
        client_ip: Option<ClientIpConfig>,
    }
}

object! {
    /// The configuration of `ClientIP`.
    ClientIpConfig {
        /// How long a pin lasts.
        timeout_seconds: Option<i32>,
    }
}

object! {
    /// What controllers report about a Service.
    ServiceStatus {
        /// Its load balancer.
        load_balancer: Option<LoadBalancerStatus>,
    }
}

object! {
    /// A load balancer.
    LoadBalancerStatus {
        /// Where clients reach it.
        #[serde(deserialize_with = "list")]
        ingress: Option<Vec<LoadBalancerIngress>>,
    }
}

object! {
    /// One address of a load balancer.
    LoadBalancerIngress {
        /// Its address.
        ip: Option<String>,
        /// `VIP` or `Proxy`.
        ip_mode: Option<String>,
    }
}

object! {
    /// An EndpointSlice of `discovery.k8s.io/v1`.
    EndpointSlice {
        /// Its metadata.
        #[serde(deserialize_with = "or_default")]
        metadata: Metadata,
        /// `IPv4`, `IPv6` or `FQDN`.
        #[serde(deserialize_with = "or_default")]
        address_type: String,
        /// The endpoints.
        #[serde(deserialize_with = "list")]
        endpoints: Option<Vec<Endpoint>>,
        /// The ports that all of them serve.
        #[serde(deserialize_with = "list")]
        ports: Option<Vec<EndpointPort>>,
    }
}

object! {
    /// An endpoint.
    Endpoint {
        /// Its addresses; the first one counts.
        #[serde(deserialize_with = "list_or_empty")]
        addresses: Vec<String>,
        /// Whether it serves.
        conditions: Option<EndpointConditions>,
        /// Its node.
        node_name: Option<String>,
        /// Its pod.
        target_ref: Option<ObjectReference>,
        /// The nodes and zones that it is meant for.
        hints: Option<EndpointHints>,
    }
}

object! {
    /// Whether an endpoint serves.
    EndpointConditions {
        /// Whether it takes new connections.
        ready: Option<bool>,
        /// Whether it is able to serve.
        serving: Option<bool>,
        /// Whether it is terminating.
        terminating: Option<bool>,
    }
}

object! {
    /// The object behind an endpoint.
    ObjectReference {
        /// Its name.
        name: Option<String>,
        /// Its namespace.
        namespace: Option<String>,
    }
}

object! {
    /// The nodes and zones that an endpoint is meant for.
    EndpointHints {
        /// Nodes.
        #[serde(deserialize_with = "list")]
        for_nodes: Option<Vec<Named>>,
        /// Zones.
        #[serde(deserialize_with = "list")]
        for_zones: Option<Vec<Named>>,
    }
}

object! {
    /// A node or a zone that a hint names.
    Named {
        /// Its name.
        #[serde(deserialize_with = "or_default")]
        name: String,
    }
}

object! {
    /// A port of a slice.
    EndpointPort {
        /// Its name.
        name: Option<String>,
        /// `TCP`, `UDP` or `SCTP`.
        protocol: Option<String>,
        /// Its number.
        port: Option<i32>,
    }
}

object! {
    /// A Node of `v1`.
    Node {
        /// Its metadata.
        #[serde(deserialize_with = "or_default")]
        metadata: Metadata,
        /// Its configuration.
        spec: Option<NodeSpec>,
        /// Its state, as it reports it.
        status: Option<NodeStatus>,
    }
}

object! {
    /// The configuration of a node.
    NodeSpec {
        /// The first network of its pods.
        #[serde(rename = "podCIDR")]
        pod_cidr: Option<String>,
        /// All networks of its pods.
        #[serde(rename = "podCIDRs", deserialize_with = "list")]
        pod_cidrs: Option<Vec<String>>,
        /// Its taints, which keep pods away.
        #[serde(deserialize_with = "list")]
        taints: Option<Vec<Taint>>,
    }
}

object! {
    /// A taint, which keeps pods away from a node.
    Taint {
        /// Its key.
        #[serde(deserialize_with = "or_default")]
        key: String,
    }
}

object! {
    /// The state of a node, as it reports it.
    NodeStatus {
        /// Its addresses.
        #[serde(deserialize_with = "list")]
        addresses: Option<Vec<NodeAddress>>,
    }
}

object! {
    /// An address of a node.
    NodeAddress {
        /// `InternalIP`, `ExternalIP`, `Hostname` and others.
        #[serde(rename = "type", deserialize_with = "or_default")]
        type_: String,
        /// The address, or the name.
        #[serde(deserialize_with = "or_default")]
        address: String,
    }
}

/// A value; null becomes the empty value.
fn or_default<'de, T: Deserialize<'de> + Default, D: Deserializer<'de>>(value: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or_default())
}

/// A value that only some kinds use; `None` if it is invalid.
fn if_good<'de, T: DeserializeOwned, D: Deserializer<'de>>(value: D) -> Result<Option<T>, D::Error> {
    Ok(serde_json::from_value(Value::deserialize(value)?).ok())
}

/// A list; null elements become empty values.
fn list<'de, T: Deserialize<'de> + Default, D: Deserializer<'de>>(value: D) -> Result<Option<Vec<T>>, D::Error> {
    let list = Option::<Vec<Option<T>>>::deserialize(value)?;
    Ok(list.map(|list| list.into_iter().map(Option::unwrap_or_default).collect()))
}

fn list_or_empty<'de, T: Deserialize<'de> + Default, D: Deserializer<'de>>(value: D) -> Result<Vec<T>, D::Error> {
    Ok(list(value)?.unwrap_or_default())
}

/// The labels or annotations that are used.
fn used_texts<'de, D: Deserializer<'de>>(value: D) -> Result<Option<BTreeMap<String, String>>, D::Error> {
    Ok(Option::<UsedTexts>::deserialize(value)?.map(|UsedTexts(texts)| texts))
}

struct UsedTexts(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for UsedTexts {
    fn deserialize<D: Deserializer<'de>>(texts: D) -> Result<Self, D::Error> {
        struct Texts;

        impl<'de> Visitor<'de> for Texts {
            type Value = UsedTexts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UsedTexts, A::Error> {
                let mut texts = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key.starts_with(PREFIX) || label::ALL.contains(&key.as_str()) {
                        texts.insert(key, map.next_value::<Option<String>>()?.unwrap_or_default());
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(UsedTexts(texts))
            }
        }

        texts.deserialize_map(Texts)
    }
}

/// Reads an address as kube-proxy does: numbers may begin with zeros, and are still decimal in IPv4. API servers up to 1.35
/// stored such addresses.
pub(crate) fn parse_address(text: &str) -> Option<IpAddr> {
    let zeros_off = |number: &str| match number.trim_start_matches('0') {
        "" if !number.is_empty() => "0".to_owned(),
        rest => rest.to_owned(),
    };
    let groups = text.split(':').map(|group| group.split('.').map(zeros_off).collect::<Vec<_>>().join("."));
    text.parse().ok().or_else(|| groups.collect::<Vec<_>>().join(":").parse().ok())
}

/// Text that is not a network.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is not a network: expected ADDRESS/LENGTH, such as 10.0.0.0/8 or fd00::/8")]
pub(crate) struct NetworkError(String);

/// Reads a network as Kubernetes does: bits after the prefix may be set and are cleared here, numbers may begin with zeros, and
/// surrounding white space is ignored.
pub(crate) fn parse_network(text: &str) -> Result<IpNet, NetworkError> {
    let network = || {
        let (address, prefix) = text.trim().split_once('/')?;
        let is_number = prefix.bytes().all(|byte| byte.is_ascii_digit());
        let network = IpNet::new(parse_address(address)?, is_number.then(|| prefix.parse().ok())??).ok()?;
        Some(network.trunc())
    };
    network().ok_or_else(|| NetworkError(text.to_owned()))
}

#[cfg(test)]
mod tests;
