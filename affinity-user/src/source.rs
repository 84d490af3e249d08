//! Sources of services: a [`Snapshot`] of the Kubernetes objects of interest, and what is wrong with them.
//!
//! A source never fails as a whole. What cannot be used becomes a [`Problem`]; everything else takes effect.

mod address;
pub mod annotations;
pub mod api;
pub mod directory;
mod documents;
mod feed;
pub mod kubernetes;
mod nodes;
mod notice;
mod problem;

use std::{collections::BTreeMap, fmt, sync::Arc};

pub(crate) use address::parse_address;
use api::{EndpointSlice, Node, Service};
pub use feed::{Feed, Source, SourceError, View};
pub use nodes::NodeAddresses;
pub use notice::{Notice, Notices};
pub use problem::{Object, Origin, Problem, Severity};

/// Namespace and name of an object. Cheap to clone, because many records contain a service's name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct ObjectName {
    /// The namespace; `default` if the object names none.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// From its parts.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// An object and the place it was read from; cheap to clone.
#[derive(Debug, PartialEq)]
pub struct Sourced<T> {
    /// The place; `None` if the object came from a cluster's API.
    pub origin: Option<Origin>,
    /// The object.
    pub object: Arc<T>,
}

impl<T> Clone for Sourced<T> {
    fn clone(&self) -> Self {
        Self { origin: self.origin.clone(), object: Arc::clone(&self.object) }
    }
}

/// The objects of interest at one moment. The maps are shared: the source may continue to update its own reference, without a
/// copy if there is no other one ([`Arc::make_mut`]).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Services.
    pub services: Arc<BTreeMap<ObjectName, Sourced<Service>>>,
    /// Endpoint slices.
    pub slices: Arc<BTreeMap<ObjectName, Sourced<EndpointSlice>>>,
    /// The node that this process runs on; `None` if the source does not contain it.
    pub node: Option<Sourced<Node>>,
    /// What could not be used.
    pub problems: Vec<Problem>,
    /// Whether objects may be missing that were never read because their place could not be read: what they configured before
    /// must be kept.
    pub partial: bool,
    /// Why nothing was ever read from the source; `None` if something was, or if the source is empty.
    pub unreadable: Option<String>,
}
