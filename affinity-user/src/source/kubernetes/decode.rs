//! The kinds that are watched, and their objects in what the API sends. They are decoded one by one: an object that is invalid
//! does not affect others.

use std::fmt::Debug;

use kube::core::{ObjectList, TypeMeta};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::source::{
    ObjectName, Problem, Severity,
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

/// An object, or why it could not be decoded.
pub(super) type Item<K> = Result<K, Undecodable>;

/// An object that cannot be decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Undecodable {
    pub(super) name: ObjectName,
    /// Its resource version; may be empty.
    pub(super) version: String,
    /// The field that is wrong; may be empty.
    field: String,
    message: String,
}

impl Undecodable {
    /// The problem to report to its owner.
    pub(super) fn problem(&self, kind: &str) -> Problem {
        let message = format!("{}; the object cannot be read, and its last valid state stays in use", self.message);
        Problem::new(Severity::Error, None, message).of(kind, &self.name).field(self.field.clone())
    }
}

/// An object of its kind, and its resource version, which may be empty.
pub(super) fn object<K: DeserializeOwned>(value: Value) -> (String, Item<K>) {
    let text = |field: &str| value.pointer(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    let name = ObjectName::new(&text("/metadata/namespace"), &text("/metadata/name"));
    let version = text("/metadata/resourceVersion");
    let decoded = serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { String::new() } else { path };
        Undecodable { name, version: version.clone(), field, message: error.into_inner().to_string() }
    });
    (version, decoded)
}

/// A page of a list.
pub(super) struct Page<K> {
    pub(super) items: Vec<Item<K>>,
    /// The token of the next page; `None`: this is the last one.
    pub(super) next: Option<String>,
    pub(super) version: String,
}

/// Decodes a page of a list from its text.
///
/// # Errors
/// If it is not a list.
pub(super) fn page<K: Watched>(text: &str) -> Result<Page<K>, serde_json::Error> {
    match serde_json::from_str::<ObjectList<K>>(text) {
        Ok(list) => Ok(paged(list, Ok)),
        // Decode again, object by object.
        Err(_) => Ok(paged(serde_json::from_str::<ObjectList<Value>>(text)?, |value| object(value).1)),
    }
}

fn paged<T: Clone, K>(list: ObjectList<T>, item: impl FnMut(T) -> Item<K>) -> Page<K> {
    let ObjectList { types: TypeMeta { .. }, metadata, items } = list;
    Page {
        items: items.into_iter().map(item).collect(),
        next: metadata.continue_.filter(|token| !token.is_empty()),
        version: metadata.resource_version.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_object_spoils_no_other() {
        let text = r#"{"apiVersion": "v1", "kind": "ServiceList", "metadata": {"resourceVersion": "9", "continue": ""},
            "items": [
                {"metadata": {"namespace": "shop", "name": "a", "resourceVersion": "3"}, "spec": {"clusterIP": "10.96.0.1"}},
                {"metadata": {"namespace": "shop", "name": "b", "resourceVersion": "4"}, "spec": {"ports": [{"port": "x"}]}},
                {"metadata": {"namespace": "shop", "name": 7}},
                {"metadata": {"namespace": "shop", "name": "c"}}]}"#;
        let Page { items, next, version } = page::<Service>(text).expect("a list");
        assert_eq!((next, version.as_str()), (None, "9"));
        let names: Vec<_> = items.iter().flatten().filter_map(|service| service.metadata.name.as_deref()).collect();
        assert_eq!(names, ["a", "c"]);
        let bad: Vec<_> = items.into_iter().filter_map(Result::err).collect();
        assert_eq!((bad[0].name.to_string().as_str(), bad[0].version.as_str()), ("shop/b", "4"));
        let problem = bad[0].problem("Service").to_string();
        assert!(problem.starts_with("Service shop/b: spec.ports[0].port: invalid type: string \"x\""), "{problem}");
        assert_eq!(bad[1].name.to_string(), "shop/");
        assert!(page::<Service>("[]").is_err());
    }
}
