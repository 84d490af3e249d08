//! A test double of a cluster's API, over real HTTP: the lists, watches and events that `--source kubernetes` uses, and every
//! failure of them, at the right moment.
//!
//! Its contents outlive its connections: it may go away ([`ApiServer::vanish`]) and come back, as a real one does. Objects are
//! JSON, so that a test can send what no type would allow.
//!
//! ```
//! use affinity_tests::apiserver::{ApiServer, Kind};
//! # fn main() -> anyhow::Result<()> {
//! let api = ApiServer::start()?;
//! api.apply("{apiVersion: v1, kind: Service, metadata: {name: web, namespace: default}, spec: {}}")?;
//! assert_eq!(api.objects(Kind::Services).len(), 1);
//! # Ok(())
//! # }
//! ```

mod http;
mod state;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use self::state::State;
pub use self::state::{Change, Kind, Request, Verb};
use crate::lab::Namespace;

/// The failure of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// This code, with a Status object.
    Status(u16),
    /// Code 429 in plain text, as the API's own filters send it, with the time to wait in a header.
    TooManyRequests {
        /// The time, in seconds.
        retry_after_s: u64,
    },
    /// The right answer, but this late.
    Late(Duration),
}

/// How a watch is notified that its start version is no longer known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// By the code of the answer.
    Http,
    /// By an event of type ERROR.
    Event,
}

/// The double. Dropping it ends every connection.
pub struct ApiServer {
    state: Arc<Mutex<State>>,
    address: SocketAddr,
    listen: Box<dyn Fn(SocketAddr) -> io::Result<TcpListener> + Send + Sync>,
    running: Option<Running>,
}

struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl ApiServer {
    /// Starts on the loopback device of the caller's network namespace.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start() -> Result<Self> {
        Self::listening(Box::new(TcpListener::bind))
    }

    /// Starts on the loopback device of a namespace.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start_in(namespace: &Namespace) -> Result<Self> {
        let door = namespace.door().clone();
        Self::listening(Box::new(move |address| door.run(|| TcpListener::bind(address))?))
    }

    fn listening(listen: Box<dyn Fn(SocketAddr) -> io::Result<TcpListener> + Send + Sync>) -> Result<Self> {
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut server = Self { state: Arc::default(), address: any_port, listen, running: None };
        server.appear()?;
        Ok(server)
    }

    /// Accepts connections again, at its old address.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn appear(&mut self) -> Result<()> {
        if self.running.is_some() {
            return Ok(());
        }
        let listener = (self.listen)(self.address).with_context(|| format!("listen on {}", self.address))?;
        listener.set_nonblocking(true)?;
        self.address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let state = Arc::clone(&self.state);
        let thread =
            thread::Builder::new().name("apiserver".to_owned()).spawn(move || serve(listener, state, stopped))?;
        self.running = Some(Running { stop, thread });
        Ok(())
    }

    /// Ends every connection, and accepts none until [`ApiServer::appear`].
    pub fn vanish(&mut self) {
        if let Some(Running { stop, thread }) = self.running.take() {
            // Fails if the thread has ended by itself; then there is nothing to stop.
            let _ = stop.send(());
            let _ = thread.join();
            self.state().forget_watches();
        }
    }

    /// Its address, even while it does not answer.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Writes a kubeconfig for this server.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn kubeconfig(&self, directory: &Path) -> Result<PathBuf> {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "double",
            "clusters": [{"name": "double", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "double", "user": {}}],
            "contexts": [{"name": "double", "context": {"cluster": "double", "user": "double"}}],
        });
        let path = directory.join("kubeconfig");
        std::fs::write(&path, config.to_string())?;
        Ok(path)
    }

    /// Creates or modifies the objects of a YAML stream, as `kubectl apply` does.
    ///
    /// # Errors
    /// When the text is not YAML with objects of known kinds.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        for document in yaml.split("---\n").filter(|document| !document.trim().is_empty()) {
            let object: Value = serde_saphyr::from_str(document).with_context(|| document.to_owned())?;
            self.put(object)?;
        }
        Ok(())
    }

    /// Creates or modifies one object.
    ///
    /// # Errors
    /// When it is of no known kind.
    pub fn put(&self, object: Value) -> Result<()> {
        let Some(kind) = Kind::of(&object) else { bail!("of no known kind: {object}") };
        self.state().put(kind, object);
        Ok(())
    }

    /// Deletes an object; `namespace` is empty for a node.
    ///
    /// # Errors
    /// When it is not there.
    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) -> Result<()> {
        if !self.state().delete(kind, namespace, name) {
            bail!("no {kind:?} {namespace}/{name}");
        }
        Ok(())
    }

    /// The objects of a kind, by namespace and name.
    pub fn objects(&self, kind: Kind) -> Vec<Value> {
        self.state().objects(kind)
    }

    /// The version of the latest change.
    pub fn version(&self) -> u64 {
        self.state().version()
    }

    /// Sends a bookmark with the current version to every watch of a kind.
    pub fn bookmark(&self, kind: Kind) {
        self.state().bookmark(kind);
    }

    /// Sends an event to every watch of a kind, regardless of the objects. Later watches do not see it.
    pub fn send(&self, kind: Kind, change: Change, object: &Value) {
        self.state().send(kind, change, object);
    }

    /// Ends every watch of a kind, as the API does after some minutes.
    pub fn end_watches(&self, kind: Kind) {
        self.state().end_watches(kind);
    }

    /// Changes an object, and breaks the connection of every watch of its kind in the middle of the event.
    ///
    /// # Errors
    /// When it is of no known kind.
    pub fn put_and_break(&self, object: Value) -> Result<()> {
        let Some(kind) = Kind::of(&object) else { bail!("of no known kind: {object}") };
        self.state().put_and_break(kind, object);
        Ok(())
    }

    /// Forgets all changes up to now: neither earlier watches nor lists in progress can continue.
    pub fn compact(&self, gone: Gone) {
        self.state().compact(gone);
    }

    /// Makes the next requests of this sort fail, each in its own way.
    pub fn misbehave(&self, kind: Kind, verb: Verb, answers: impl IntoIterator<Item = Answer>) {
        self.state().misbehave(kind, verb, answers);
    }

    /// Accepts no new objects in a namespace from now on, as while it is being deleted.
    pub fn terminate_namespace(&self, namespace: &str) {
        self.state().terminating.insert(namespace.to_owned());
    }

    /// How many watches of a kind are open.
    pub fn watches(&self, kind: Kind) -> usize {
        self.state().watches(kind)
    }

    /// Every request so far.
    pub fn requests(&self) -> Vec<Request> {
        self.state().requests.clone()
    }

    /// How often a Kubernetes Event was posted, including those that existed already.
    pub fn event_requests(&self) -> usize {
        self.state().event_requests
    }

    /// Kubernetes Events, by name.
    pub fn events(&self) -> Vec<Value> {
        self.state().events.values().cloned().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        state::lock(&self.state)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.vanish();
    }
}

/// Runs until it is stopped: then the runtime ends, and every connection with it.
fn serve(listener: TcpListener, state: Arc<Mutex<State>>, stopped: oneshot::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
        tokio::select! {
            _ = stopped => {}
            ended = axum::serve(listener, http::router(state)).into_future() => ended.expect("serving"),
        }
    });
}
