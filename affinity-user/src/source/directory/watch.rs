//! Watches a directory or file, and reads it again when it has changed and is not being written.
//!
//! Notifications trigger a check, and a slow poll that compares a fingerprint of the files finds changes that they miss. So
//! four cases need only one check: a file that is written and closed, a rename over a file, the swap of a ConfigMap's `..data`
//! link, and a directory that is deleted and created again. Links are followed wherever they lead: [`Places`].

mod places;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::mpsc::{self as std_mpsc, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use tokio::sync::mpsc;
use tracing::warn;

use self::places::Places;
use super::{
    Reader, list,
    take::{self, Writing},
};
use crate::{
    source::{Feed, NodeAddresses, Snapshot, View},
    sys::monotonic_ns,
    threads,
};

/// A change is read once nothing has changed for this long,
const QUIET: Duration = Duration::from_millis(50);
/// or once it has waited this long.
const SETTLE_AT_MOST: Duration = Duration::from_millis(500);
/// How often to check without a notification.
const POLL: Duration = Duration::from_secs(5);
/// How often to check whether a file that is being written has been closed. The notification comes a moment before the close is
/// visible (<https://elixir.bootlin.com/linux/v6.12/source/fs/file_table.c>, `__fput`), and may be for another file.
const POLL_WRITTEN: Duration = Duration::from_millis(250);

/// Reads `path` at once and after each change, on the node with this name, in a separate thread that ends after the receiver is
/// dropped.
///
/// # Errors
/// If the thread could not be started. If notifications are not available, changes are found by polling only.
pub fn watch(path: &Path, node_name: &str) -> io::Result<Feed> {
    let (sender, snapshots) = mpsc::channel(1);
    let view = View::default();
    let nodes = NodeAddresses::default();
    let (path, written, node_addresses) = (path.to_owned(), view.clone(), nodes.clone());
    let reader = Reader::new(&path, node_name);
    threads::spawn("source", move || run(&path, reader, &sender, &written, &node_addresses))?;
    Ok(Feed { snapshots, view, nodes, notices: None })
}

fn run(path: &Path, mut reader: Reader, snapshots: &mpsc::Sender<Snapshot>, view: &View, nodes: &NodeAddresses) {
    let (events, changes) = std_mpsc::channel();
    let mut watches = Watches::new(events);
    let mut last: Option<(Fingerprint, Snapshot)> = None;
    // Whether there was a change that may be missing from the fingerprint: the resolution of file times is coarse.
    let mut is_told = true;
    while !snapshots.is_closed() {
        watches.follow(path);
        // Taken before the files are read, so that a concurrent change makes a difference.
        let fingerprint = fingerprint(path);
        let looked_ns = monotonic_ns();
        if is_told || last.as_ref().is_none_or(|(former, _)| *former != fingerprint) {
            let snapshot = reader.read_except(&watches.writing);
            nodes.tell(reader.node_addresses());
            let changed = last.as_ref().is_none_or(|(_, former)| *former != snapshot);
            if changed && snapshots.blocking_send(snapshot.clone()).is_err() {
                return;
            }
            last = Some((fingerprint, snapshot));
        }
        if reader.is_good() {
            view.is_current_at(looked_ns);
        }
        is_told = wait(&changes, &mut watches, &reader);
    }
}

/// Waits for a change, and then until no more changes follow; at most until the next poll. Returns whether there was a change.
/// The end of a file's writing is one.
fn wait(changes: &std_mpsc::Receiver<Event>, watches: &mut Watches, reader: &Reader) -> bool {
    let poll_at = Instant::now() + POLL;
    let mut settled_at: Option<Instant> = None;
    let is_awaiting = reader.awaited().next().is_some();
    loop {
        let now = Instant::now();
        let pause = match settled_at {
            Some(_) => QUIET,
            None if is_awaiting => POLL_WRITTEN,
            None => POLL,
        };
        let pause = pause.min(settled_at.unwrap_or(poll_at).saturating_duration_since(now));
        match changes.recv_timeout(pause) {
            Ok(event) => {
                if watches.note(&event) {
                    settled_at.get_or_insert(now + SETTLE_AT_MOST);
                }
            }
            Err(RecvTimeoutError::Timeout) if settled_at.is_some() => return true,
            Err(error) => {
                if error == RecvTimeoutError::Disconnected {
                    // Notifications are not available.
                    thread::sleep(pause);
                }
                if reader.awaited().any(|file| take::is_closed(file, &watches.writing)) {
                    return true;
                }
            }
        }
        if Instant::now() >= settled_at.unwrap_or(poll_at) {
            return settled_at.is_some();
        }
    }
}

/// Every file that counts, with the identity of its content.
type Fingerprint = Option<Vec<(PathBuf, Option<[i64; 7]>)>>;

fn fingerprint(path: &Path) -> Fingerprint {
    let identify = |file: PathBuf| {
        let identity = fs::metadata(&file).ok().map(|metadata| take::identity(&metadata));
        (file, identity)
    };
    list(path).ok().map(|files| files.into_iter().map(identify).collect())
}

/// The directories that are watched, each with its device and inode.
struct Watches {
    watcher: Option<RecommendedWatcher>,
    directories: BTreeMap<PathBuf, (u64, u64)>,
    /// Directories that cannot be watched: each is logged once.
    unwatched: BTreeSet<PathBuf>,
    places: Places,
    writing: Writing,
}

impl Watches {
    fn new(events: std_mpsc::Sender<Event>) -> Self {
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if let Some(event) = event.ok().filter(|event| is_change(event.kind)) {
                // The receiver is dropped only when the thread ends, which also drops the watcher.
                let _ = events.send(event);
            }
        });
        let watcher =
            watcher.inspect_err(|error| warn!(%error, "cannot watch for changed files; polling instead")).ok();
        let (directories, unwatched) = Default::default();
        Self { watcher, directories, unwatched, places: Places::default(), writing: Writing::default() }
    }

    /// Processes a notification. Returns whether it may change the content of the path.
    fn note(&mut self, event: &Event) -> bool {
        let is_of_interest = event.need_rescan() || event.paths.iter().any(|path| self.places.concerns(path));
        if is_of_interest {
            self.writing.note(event);
        }
        is_of_interest
    }

    /// Watches every directory in which a change may change the content of the path. A watch belongs to an inode, so it is set
    /// again if the path leads to another inode.
    fn follow(&mut self, path: &Path) {
        let Some(watcher) = &mut self.watcher else { return };
        self.places = Places::of(path, &list(path).unwrap_or_default());
        let wanted = self.places.directories();
        let past: Vec<PathBuf> = self.directories.keys().filter(|known| !wanted.contains(*known)).cloned().collect();
        for directory in wanted.iter().chain(&past) {
            let metadata =
                fs::metadata(directory).ok().filter(|metadata| metadata.is_dir() && wanted.contains(directory));
            let present = metadata.map(|metadata| (metadata.dev(), metadata.ino()));
            if self.directories.get(directory) == present.as_ref() {
                continue;
            }
            if self.directories.remove(directory).is_some() {
                // Fails if the kernel has removed the watch together with the directory.
                let _ = watcher.unwatch(directory);
            }
            let Some(identity) = present else { continue };
            match watcher.watch(directory, RecursiveMode::NonRecursive) {
                Ok(()) => _ = self.directories.insert(directory.clone(), identity),
                Err(error) if self.unwatched.insert(directory.clone()) => {
                    warn!(%error, directory = %directory.display(), "cannot be watched; polling instead");
                }
                Err(_) => {}
            }
        }
    }
}

/// Whether an event may have changed a file; reading one, as this module does, is an event too.
const fn is_change(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        EventKind::Any | EventKind::Create(_) | EventKind::Modify(_) | EventKind::Remove(_) | EventKind::Other => true,
    }
}
