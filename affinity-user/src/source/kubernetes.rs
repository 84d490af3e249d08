//! A cluster's API: Services, EndpointSlices and this node. They are listed once and then watched.
//!
//! Guarantees of this source:
//!
//! * No snapshot is sent before every list is complete, and none shows a state between two lists: when a list is read again, it
//!   replaces the former one in a single step. So nothing is ever deleted because it was not read.
//! * A watch that ends, for whatever reason, continues where it ended. If the API no longer knows that point (410), the list is
//!   read again. Until then everything stays as it was.
//! * An event that is older than a known state of its object, or is repeated, changes nothing.
//! * An object that did not change is not allocated again: [`std::sync::Arc::ptr_eq`] shows what differs between two snapshots.
//! * An object that cannot be read is reported by name and does not affect others: its former state stays.
//! * Changes that come together are sent together, no later than [`SETTLE`] after the first. If the receiver is still busy, it
//!   gets the latest state as soon as it asks.
//!
//! The API itself leaves out headless services, as for kube-proxy.

mod access;
mod backoff;
mod cluster;
mod decode;
mod events;
mod object_cache;
mod objects;
mod reflector;

use std::{io, path::PathBuf, thread, time::Duration};

use kube::{
    Client,
    config::{InClusterError, KubeconfigError},
};
use tokio::sync::{mpsc, oneshot};

use self::{cluster::Cluster, events::Poster};
use super::{Feed, NodeAddresses, Notice, Notices, Snapshot, View};

/// How long to wait for further changes after a change.
const SETTLE: Duration = Duration::from_millis(5);

/// How to reach the API, and what to read from it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The kubeconfig. Without it: the kubeconfigs of `KUBECONFIG`; without these: the API of the cluster that this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// This node's name.
    pub node_name: String,
    /// Whether to send Kubernetes Events to inform owners of services.
    pub events: bool,
}

/// The API cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A kubeconfig cannot be used.
    #[error("{0}: {1}")]
    Kubeconfig(String, KubeconfigError),
    /// No API is configured.
    #[error("no cluster: give --kubeconfig, set KUBECONFIG, or run this in a pod ({0})")]
    NotInCluster(InClusterError),
    /// The configuration cannot be used; usually because of a certificate.
    #[error("the cluster's API: {0}")]
    Client(#[source] kube::Error),
    /// A thread or runtime could not be started.
    #[error("the cluster's API: {0}")]
    Start(#[from] io::Error),
    /// A list could not be read.
    #[error("{kind}s cannot be listed: {message}")]
    List {
        /// The kind of its objects.
        kind: &'static str,
        /// Why.
        message: String,
    },
}

/// Watches the cluster, in a separate thread that ends after the feed is dropped. There is no snapshot until the API answers.
///
/// # Errors
/// If the configuration cannot be used. An API that does not answer is no error.
pub async fn watch(options: &Options) -> Result<Feed, Error> {
    let config = access::config(options.kubeconfig.as_deref()).await?;
    let (sender, snapshots) = mpsc::channel(1);
    let view = View::default();
    let (queue, notices) = mpsc::channel(events::QUEUE);
    let nodes = NodeAddresses::default();
    let (cluster, written, told) = (Cluster::new(options.node_name.clone()), view.clone(), nodes.clone());
    let (started, outcome) = oneshot::channel();
    thread::Builder::new().name("source".to_owned()).spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(started.send(Err(error.into()))),
        };
        runtime.block_on(async {
            // Created here, because its connections belong to the runtime in which it is created.
            match access::client(config) {
                Ok(client) => {
                    drop(started.send(Ok(())));
                    run(&client, &cluster, &sender, (&written, &told), notices).await;
                }
                Err(error) => drop(started.send(Err(error))),
            }
        });
    })?;
    outcome.await.unwrap_or_else(|_| Err(io::Error::other("its thread has ended").into()))?;
    let notices = options.events.then(|| Notices::new(queue));
    Ok(Feed { snapshots, view, nodes, notices })
}

/// Runs until the receiver of snapshots is dropped.
async fn run(
    client: &Client,
    cluster: &Cluster,
    snapshots: &mpsc::Sender<Snapshot>,
    (view, nodes): (&View, &NodeAddresses),
    notices: mpsc::Receiver<Notice>,
) {
    let poster = Poster { client, cluster };
    tokio::select! {
        () = snapshots.closed() => {}
        () = cluster.reflect(client, view) => {}
        () = publish(cluster, snapshots) => {}
        () = poster.run(notices) => {}
        () = cluster.find_nodes(client, nodes) => {}
    }
}

/// Sends what has changed, once the lists are complete and whenever the channel has space.
async fn publish(cluster: &Cluster, snapshots: &mpsc::Sender<Snapshot>) {
    loop {
        cluster.changed().await;
        tokio::time::sleep(SETTLE).await;
        let Ok(permit) = snapshots.reserve().await else { return };
        if let Some(snapshot) = cluster.snapshot() {
            permit.send(snapshot);
        }
    }
}

/// Lists everything once.
///
/// # Errors
/// [`Error`], also if the API does not answer.
pub async fn read(options: &Options) -> Result<Snapshot, Error> {
    let client = access::client(access::config(options.kubeconfig.as_deref()).await?)?;
    Cluster::new(options.node_name.clone()).read(&client).await
}
