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

mod backoff;
mod cluster;
mod decode;
mod events;
mod object_cache;
mod reflector;

use std::{
    env, io,
    path::{Path, PathBuf},
    time::Duration,
};

use kube::{
    Client, Config,
    client::{ClientBuilder, retry::RetryPolicy},
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tokio::sync::{mpsc, oneshot};
use tower::{buffer::BufferLayer, retry::RetryLayer};

use self::{cluster::Cluster, events::Poster};
use super::{Feed, NodeAddresses, Notice, Notices, Snapshot, View};
use crate::threads;

/// How long to wait for further changes after a change.
const SETTLE: Duration = Duration::from_millis(5);

/// How many requests may wait for the connection.
const REQUESTS: usize = 64;
/// How often a request is repeated that the API rejects as overloaded. The first pause is the shorter time, the longest pause
/// is the longer one, unless the API gives a time. [`backoff`] handles what still fails.
const RETRIES: u32 = 3;
const RETRY_AFTER: Duration = Duration::from_millis(100);
const RETRY_AT_MOST: Duration = Duration::from_secs(5);

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
    #[error("no cluster: use --kubeconfig, set KUBECONFIG, or run affinity in a pod ({0})")]
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
    let config = config(options.kubeconfig.as_deref()).await?;
    let (sender, snapshots) = mpsc::channel(1);
    let view = View::default();
    let (queue, notices) = mpsc::channel(events::QUEUE);
    let nodes = NodeAddresses::default();
    let (cluster, written, node_addresses) = (Cluster::new(options.node_name.clone()), view.clone(), nodes.clone());
    let (started, outcome) = oneshot::channel();
    threads::spawn("source", move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(started.send(Err(error.into()))),
        };
        runtime.block_on(async {
            // Created here, because its connections belong to the runtime in which it is created.
            match client_of(config) {
                Ok(client) => {
                    drop(started.send(Ok(())));
                    run(&client, &cluster, &sender, (&written, &node_addresses), notices).await;
                }
                Err(error) => drop(started.send(Err(error))),
            }
        });
    })?;
    outcome.await.unwrap_or_else(|_| Err(io::Error::other("its thread has ended unexpectedly").into()))?;
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
    let client = client_of(config(options.kubeconfig.as_deref()).await?)?;
    Cluster::new(options.node_name.clone()).read(&client).await
}

/// The configuration from a kubeconfig, from `KUBECONFIG`, or from the cluster that this process is in.
async fn config(kubeconfig: Option<&Path>) -> Result<Config, Error> {
    let variable = env::var_os("KUBECONFIG").filter(|paths| !paths.is_empty());
    let (name, read) = match (kubeconfig, variable) {
        (Some(path), _) => (path.display().to_string(), Kubeconfig::read_from(path)),
        (None, Some(paths)) => {
            let read = Kubeconfig::from_env().and_then(|found| found.ok_or(KubeconfigError::FindPath));
            (format!("KUBECONFIG={}", paths.display()), read)
        }
        (None, None) => return Config::incluster().map_err(Error::NotInCluster),
    };
    let failed = |error| Error::Kubeconfig(name.clone(), error);
    Config::from_custom_kubeconfig(read.map_err(failed)?, &KubeConfigOptions::default()).await.map_err(failed)
}

/// A client with connections that belong to the current runtime.
fn client_of(mut config: Config) -> Result<Client, Error> {
    // The client's own retries continue for minutes without a log line.
    config.default_retry = false;
    let policy = RetryPolicy::new(RETRY_AFTER, RETRY_AT_MOST, RETRIES, true)
        .map_err(|error| Error::Client(kube::Error::Service(error.into())))?;
    let builder = ClientBuilder::try_from(config).map_err(Error::Client)?;
    Ok(builder.with_layer(&BufferLayer::new(REQUESTS)).with_layer(&RetryLayer::new(policy)).build())
}
