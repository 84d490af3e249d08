//! Sources of services: a [`Snapshot`] of the Kubernetes objects of interest, and what is wrong with them.
//!
//! A source never fails as a whole. What cannot be used becomes a [`Problem`]; everything else takes effect.

pub mod annotations;
pub mod api;
pub mod directory;
mod documents;
mod feed;
pub mod kubernetes;
mod nodes;
mod problem;

use std::{collections::BTreeMap, fmt, sync::Arc};

use tokio::sync::mpsc::Sender;

use api::{EndpointSlice, Node, Service};
pub(crate) use api::{parse_address, parse_network};
pub use feed::{Feed, Source, SourceError, View};
pub use nodes::NodeAddresses;
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

/// A message for the owner of a service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Notice {
    /// The service.
    pub service: ObjectName,
    /// What it is about, in one machine-readable word: `Misconfigured`.
    pub reason: &'static str,
    /// What is wrong and what to do, in one line.
    pub message: String,
}

/// Accepts notices without blocking: notices that do not fit are lost.
#[derive(Clone, Debug)]
pub struct Notices(Sender<Notice>);

impl Notices {
    /// Writes into a queue.
    #[must_use]
    pub fn new(queue: Sender<Notice>) -> Self {
        Self(queue)
    }

    /// Returns whether the queue had space.
    pub fn send(&self, notice: Notice) -> bool {
        self.0.try_send(notice).is_ok()
    }
}
