//! Follows a cluster as the agent does, with tables in memory, and compares the result with the tables that the same objects
//! produce when they are read from files.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use affinity_common::names;
use affinity_tests::apiserver::{ApiServer, Kind};
use affinity_tests::patience::patience;
use affinity_user::desired::{self, desired};
use affinity_user::plan::plan;
use affinity_user::source::{Feed, Snapshot, Source, directory, kubernetes};
use affinity_user::store::memory::MemoryStore;
use affinity_user::store::{Capacity, Store};
use affinity_user::view::{Catalog, Clock, Dump, DumpOptions};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

/// How long a change may take to arrive, on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const NODE: &str = "node-a";

/// The source's view of the API double, snapshot by snapshot.
pub(crate) struct Follower {
    pub(crate) feed: Feed,
    store: MemoryStore,
    scratch: Scratch,
    /// How many snapshots came.
    pub(crate) snapshots: usize,
    /// The last one.
    pub(crate) last: Snapshot,
}

impl Follower {
    /// Begins to follow.
    pub(crate) async fn of(api: &ApiServer) -> Result<Self> {
        let scratch = Scratch::new()?;
        let source = source(Some(api.kubeconfig(&scratch.0)?));
        Ok(Self { feed: source.watch().await?, store: store(), scratch, snapshots: 0, last: Snapshot::default() })
    }

    /// Takes the next snapshot, and carries out the plan that it makes.
    pub(crate) async fn take(&mut self) -> Result<Snapshot> {
        let snapshot = timeout(patience(PATIENCE), self.feed.snapshots.recv()).await.context("no snapshot came")?;
        let snapshot = snapshot.context("the source has ended")?;
        self.snapshots += 1;
        publish(&mut self.store, &snapshot)?;
        self.last = snapshot.clone();
        Ok(snapshot)
    }

    /// Takes snapshots until the tables equal those of the double's objects.
    pub(crate) async fn settle(&mut self, api: &ApiServer) -> Result<()> {
        let deadline = Instant::now() + patience(PATIENCE);
        let wanted = self.wanted(api)?;
        loop {
            if self.dump()? == wanted {
                return Ok(());
            }
            if Instant::now() > deadline || timeout(patience(PATIENCE), self.take()).await.is_err() {
                let (wanted, is) = (wanted.join("\n"), self.dump()?.join("\n"));
                bail!("after {} snapshots\n{is}\nand not\n{wanted}", self.snapshots);
            }
        }
    }

    /// Checks that no snapshot comes for a while.
    pub(crate) async fn quiet(&mut self, time: Duration) -> Result<()> {
        if let Ok(snapshot) = timeout(time, self.feed.snapshots.recv()).await {
            bail!("a snapshot came: {snapshot:?}");
        }
        Ok(())
    }

    /// The current tables.
    pub(crate) fn dump(&self) -> Result<Vec<String>> {
        dump(&self.store)
    }

    /// The tables that files with the double's objects produce.
    pub(crate) fn wanted(&self, api: &ApiServer) -> Result<Vec<String>> {
        let directory = self.scratch.0.join("objects");
        write_objects(api, &directory)?;
        of_files(&directory)
    }
}

/// A cluster as this node sees it.
pub(crate) fn source(kubeconfig: Option<PathBuf>) -> Source {
    Source::Kubernetes(kubernetes::Options { kubeconfig, node_name: NODE.to_owned(), events: true })
}

/// Writes the double's objects as files for `--source`.
pub(crate) fn write_objects(api: &ApiServer, directory: &Path) -> Result<()> {
    write_list(directory, [Kind::Services, Kind::Slices].into_iter().flat_map(|kind| api.objects(kind)).collect())
}

fn write_list(directory: &Path, items: Vec<Value>) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    Ok(std::fs::write(directory.join("objects.json"), list.to_string())?)
}

/// The objects of a snapshot as files.
pub(crate) fn snapshot_as_files(snapshot: &Snapshot) -> Result<Scratch> {
    let typed = |version: &str, kind: &str, mut object: Value| {
        object["apiVersion"] = json!(version);
        object["kind"] = json!(kind);
        object
    };
    let services = snapshot.services.values().map(|service| serde_json::to_value(&*service.object));
    let services = services.map(|service| service.map(|service| typed("v1", "Service", service)));
    let slices = snapshot.slices.values().map(|slice| serde_json::to_value(&*slice.object));
    let slices = slices.map(|slice| slice.map(|slice| typed("discovery.k8s.io/v1", "EndpointSlice", slice)));
    let scratch = Scratch::new()?;
    write_list(scratch.path(), services.chain(slices).collect::<Result<_, _>>()?)?;
    Ok(scratch)
}

/// The tables that the files of a directory produce.
pub(crate) fn of_files(directory: &Path) -> Result<Vec<String>> {
    let snapshot = directory::read(directory, "");
    ensure!(snapshot.problems.is_empty(), "{:?}", snapshot.problems);
    of_snapshot(&snapshot)
}

/// The tables that a snapshot produces on an empty node.
pub(crate) fn of_snapshot(snapshot: &Snapshot) -> Result<Vec<String>> {
    let mut store = store();
    publish(&mut store, snapshot)?;
    dump(&store)
}

fn store() -> MemoryStore {
    MemoryStore::new(Capacity { backends: 1 << 14, slots: 1 << 17, ranges: 1 << 10 }, 1)
}

fn publish(store: &mut MemoryStore, snapshot: &Snapshot) -> Result<()> {
    let options = desired::Options {
        node: desired::NodeFacts { name: Some(NODE.to_owned()), ..desired::NodeFacts::default() },
        ..desired::Options::default()
    };
    let (desired, _) = desired(snapshot, &options);
    let (steps, _) = plan(&store.observe()?, &desired, store.capacity());
    steps.iter().try_for_each(|step| store.apply(step))?;
    Ok(())
}

/// The meaning of the tables: ids depend on the order of events and do not count. Neither do lingering pods that have left,
/// because no object describes them.
fn dump(store: &MemoryStore) -> Result<Vec<String>> {
    let catalog = Catalog::new(store.observe()?, Default::default(), Clock::now());
    let dump = Dump::new(&catalog, DumpOptions::default());
    let maps = [names::FRONTENDS_V4, names::FRONTENDS_V6, names::SLOTS, names::MEMBERS, names::BACKENDS];
    let lines = maps.into_iter().flat_map(|map| dump.small(map).unwrap_or_default());
    Ok(lines.filter(|line| !lingers(line)).collect())
}

/// Whether a line of a dump is about a backend that lingers.
pub(crate) fn lingers(line: &str) -> bool {
    line.starts_with(names::BACKENDS) && line.contains(" lingering")
}

/// A directory that is removed at the end.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("affinity-kubernetes-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
