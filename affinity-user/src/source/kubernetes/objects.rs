//! The kinds that are watched.

use std::fmt::Debug;

use serde::de::DeserializeOwned;

use crate::source::{
    ObjectName,
    api::{EndpointSlice, Metadata, Node, Service},
};

/// The label selector that kube-proxy uses.
const NOT_HEADLESS: &str = "!service.kubernetes.io/headless";

/// A kind that is watched.
pub(super) trait Watched: DeserializeOwned + Clone + Debug + PartialEq + 'static {
    /// Its name.
    const KIND: &'static str;
    /// The path of the list of all its objects.
    const PATH: &'static str;
    /// The label selector; empty: all objects.
    const LABELS: &'static str;

    /// The metadata of an object.
    fn meta(&mut self) -> &mut Metadata;
}

impl Watched for Service {
    const KIND: &'static str = "Service";
    const PATH: &'static str = "/api/v1/services";
    const LABELS: &'static str = NOT_HEADLESS;

    fn meta(&mut self) -> &mut Metadata {
        &mut self.metadata
    }
}

impl Watched for EndpointSlice {
    const KIND: &'static str = "EndpointSlice";
    const PATH: &'static str = "/apis/discovery.k8s.io/v1/endpointslices";
    const LABELS: &'static str = NOT_HEADLESS;

    fn meta(&mut self) -> &mut Metadata {
        &mut self.metadata
    }
}

impl Watched for Node {
    const KIND: &'static str = "Node";
    const PATH: &'static str = "/api/v1/nodes";
    const LABELS: &'static str = "";

    fn meta(&mut self) -> &mut Metadata {
        &mut self.metadata
    }
}

/// The version of an object, a list or a bookmark. The API promises that they can be compared as numbers.
pub(super) fn version(text: Option<&str>) -> Option<u64> {
    text?.parse().ok()
}

/// The name of an object; nodes have no namespace.
pub(super) fn name_of(meta: &Metadata) -> ObjectName {
    ObjectName::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}
