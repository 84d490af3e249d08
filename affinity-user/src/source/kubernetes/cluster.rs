//! Combines all kinds: what is known about the cluster, and when to make a snapshot.

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use kube::Client;
use tokio::{sync::Notify, time::sleep};
use tracing::warn;

use super::{
    Error,
    decode::{Item, Watched},
    object_cache::ObjectCache,
    reflector::{self, Reflector},
};
use crate::{
    hash::hash32,
    source::{
        NodeAddresses, ObjectName, Problem, Severity, Snapshot, View,
        api::{EndpointSlice, Node, Service},
        nodes::addresses_of,
    },
    sys::monotonic_ns,
};

/// How often the addresses of all nodes are read, on average, if they are requested.
const NODES_EVERY: Duration = Duration::from_hours(1);

/// What is known about the cluster.
pub(super) struct Cluster {
    node_name: String,
    services: RefCell<ObjectCache<Service>>,
    slices: RefCell<ObjectCache<EndpointSlice>>,
    nodes: RefCell<ObjectCache<Node>>,
    /// Why the API does not permit reading this node: everything except topology works without it.
    node_refused: RefCell<Option<String>>,
    /// Whether anything has changed since the last snapshot.
    is_changed: Cell<bool>,
    changed: Notify,
}

impl Cluster {
    /// A cluster about which nothing is known yet.
    pub(super) fn new(node_name: String) -> Self {
        Self {
            node_name,
            services: RefCell::default(),
            slices: RefCell::default(),
            nodes: RefCell::default(),
            node_refused: RefCell::new(None),
            is_changed: Cell::new(false),
            changed: Notify::new(),
        }
    }

    /// This node's name.
    pub(super) fn node_name(&self) -> &str {
        &self.node_name
    }

    /// The UID distinguishes a service from an earlier one with the same name.
    pub(super) fn uid(&self, service: &ObjectName) -> Option<String> {
        self.services.borrow().get(service)?.metadata.uid.clone()
    }

    fn this_node(&self) -> String {
        format!("metadata.name={}", self.node_name)
    }

    /// Keeps everything in sync with the API, and updates the view; never returns.
    pub(super) async fn reflect(&self, client: &Client, view: &View) {
        let on_event = |differs: bool| self.on_event(differs, view);
        let without_node = |message: String| self.refuse_node(message, view);
        let services = reflector(client, &self.services, &on_event);
        let slices = reflector(client, &self.slices, &on_event);
        let node = Reflector {
            fields: self.this_node(),
            do_without: Some(&without_node),
            ..reflector(client, &self.nodes, &on_event)
        };
        let seed = hash32(&self.node_name);
        tokio::join!(services.run(seed), slices.run(seed), node.run(seed));
    }

    fn on_event(&self, differs: bool, view: &View) {
        if let Some(current_ns) = self.current_ns() {
            view.is_current_at(current_ns);
        }
        if differs {
            self.is_changed.set(true);
            self.changed.notify_one();
        }
    }

    fn refuse_node(&self, message: String, view: &View) {
        if self.nodes.borrow().current_ns().is_none() && self.node_refused.borrow().is_none() {
            *self.node_refused.borrow_mut() = Some(message);
            self.on_event(true, view);
        }
    }

    /// When everything was last known to be current; `None` until every list was complete.
    fn current_ns(&self) -> Option<u64> {
        let (services, slices) = (self.services.borrow().current_ns()?, self.slices.borrow().current_ns()?);
        let both = services.min(slices);
        match self.nodes.borrow().current_ns() {
            Some(node) => Some(both.min(node)),
            None if self.node_refused.borrow().is_some() => Some(both),
            None => None,
        }
    }

    /// Waits until something has changed since the last snapshot.
    pub(super) async fn changed(&self) {
        while !self.is_changed.get() {
            self.changed.notified().await;
        }
    }

    /// The current state; `None` until every list was complete.
    pub(super) fn snapshot(&self) -> Option<Snapshot> {
        self.is_changed.set(false);
        self.current_ns()?;
        let nodes = self.nodes.borrow().objects();
        let node = nodes.values().next().cloned();
        let mut problems = if node.is_some() { Vec::new() } else { vec![self.without_node()] };
        problems.extend(self.services.borrow().problems());
        problems.extend(self.slices.borrow().problems());
        problems.extend(self.nodes.borrow().problems());
        let (services, slices) = (self.services.borrow().objects(), self.slices.borrow().objects());
        Some(Snapshot { services, slices, node, problems, ..Snapshot::default() })
    }

    fn without_node(&self) -> Problem {
        let reason = self.node_refused.borrow().clone();
        let reason = reason.as_deref().unwrap_or("not found in the cluster; set the name with --node-name");
        Problem::new(Severity::Warning, None, format!("node {}: {reason}", self.node_name))
    }

    /// Reads the addresses of all nodes when they are requested, but not often; never returns.
    pub(super) async fn find_nodes(&self, client: &Client, nodes: &NodeAddresses) {
        // Spreads the requests of a large cluster's nodes over time.
        let spread = NODES_EVERY.mul_f64(f64::from(hash32(&self.node_name)) / f64::from(u32::MAX));
        loop {
            nodes.wanted().await;
            let pause = match reflector::list_once::<Node>(client, "").await {
                Ok(listed) => {
                    nodes.tell(listed.iter().flatten().flat_map(addresses_of).collect());
                    NODES_EVERY / 2 + spread
                }
                Err((message, _)) => {
                    warn!("cannot check whether clients have addresses of nodes: Nodes: {message}");
                    NODES_EVERY / 4
                }
            };
            sleep(pause).await;
        }
    }

    /// Lists everything once.
    pub(super) async fn read(&self, client: &Client) -> Result<Snapshot, Error> {
        let now_ns = monotonic_ns();
        let services = list::<Service>(client, "").await.map_err(|(error, _)| error)?;
        let slices = list::<EndpointSlice>(client, "").await.map_err(|(error, _)| error)?;
        self.services.borrow_mut().replace(services, None, now_ns);
        self.slices.borrow_mut().replace(slices, None, now_ns);
        match list::<Node>(client, &self.this_node()).await {
            Ok(nodes) => _ = self.nodes.borrow_mut().replace(nodes, None, now_ns),
            Err((error, true)) => *self.node_refused.borrow_mut() = Some(error.to_string()),
            Err((error, false)) => return Err(error),
        }
        Ok(self.snapshot().unwrap_or_default())
    }
}

/// A reflector of all objects of a kind that is required.
fn reflector<'a, K: Watched>(
    client: &Client,
    cache: &'a RefCell<ObjectCache<K>>,
    on_event: &'a dyn Fn(bool),
) -> Reflector<'a, K> {
    Reflector { client: client.clone(), fields: String::new(), cache, on_event, do_without: None }
}

/// All objects of a kind; or the error, and whether the API does not permit reading them.
async fn list<K: Watched>(client: &Client, fields: &str) -> Result<Vec<Item<K>>, (Error, bool)> {
    let listed = reflector::list_once::<K>(client, fields).await;
    listed.map_err(|(message, is_refused)| (Error::List { kind: K::KIND, message }, is_refused))
}
