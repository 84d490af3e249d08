//! A cluster's API: Services, EndpointSlices and this node, listed once and then watched.
//!
//! What this source promises:
//!
//! * No snapshot is sent before every list is complete, and none that is between two states of a list: a list that is
//!   read again takes the place of the former one in a single step. So nothing is ever deleted because it was not read.
//! * A watch that ends, for whatever reason, goes on where it ended. Where the API no longer knows that point (410), the
//!   list is read again. Between the two everything stays as it was.
//! * An event that was overtaken by a later state of its object, or comes twice, changes nothing.
//! * An object that did not change is not allocated again: [`std::sync::Arc::ptr_eq`] between two snapshots tells what did.
//! * An object that cannot be read is reported by name, and takes nothing with it: what was known of it before stays.
//! * Changes that come together are sent together, and no later than [`SETTLE`] after the first, unless the receiver is
//!   still busy: then it gets the latest state as soon as it asks.
//!
//! Headless services are left out by the API itself, as kube-proxy does it.

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

/// How long after a change further ones are waited for.
const SETTLE: Duration = Duration::from_millis(5);

/// How to reach the API, and what to read of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The kubeconfig; without it those of `KUBECONFIG`, and without that the API of the cluster that this runs in.
    pub kubeconfig: Option<PathBuf>,
    /// This node's name.
    pub node_name: String,
    /// Whether owners of services are told by Kubernetes Events what they should know.
    pub events: bool,
}

/// The API cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A kubeconfig cannot be used.
    #[error("{0}: {1}")]
    Kubeconfig(String, KubeconfigError),
    /// No way to the API is given.
    #[error("no cluster: give --kubeconfig, set KUBECONFIG, or run this in a pod ({0})")]
    NotInCluster(InClusterError),
    /// The configuration cannot be used: a certificate, above all.
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

/// Watches the cluster, in a thread of its own that ends after the feed is dropped. Until the API answers there is no
/// snapshot.
///
/// # Errors
/// Where the configuration cannot be used; not where the API does not answer.
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
            // Made here, because its connections belong to the runtime that it was made in.
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

/// Until the receiver of snapshots has gone.
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

/// Sends what has changed, once the lists are complete and whenever there is room.
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
/// [`Error`], also where the API does not answer.
pub async fn read(options: &Options) -> Result<Snapshot, Error> {
    let client = access::client(access::config(options.kubeconfig.as_deref()).await?)?;
    Cluster::new(options.node_name.clone()).read(&client).await
}
