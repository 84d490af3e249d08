//! A directory or file, read again when it has changed and come to rest.
//!
//! Notifications tell *when* to look; a fingerprint of the files tells *whether* anything changed. So an editor's burst
//! of writes, a rename over a file, the swap of a ConfigMap's `..data` link, and a directory that is deleted and made
//! again all come down to one question, and a slow poll asks it where notifications are missing or get lost.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::mpsc as std_mpsc,
    thread,
    time::{Duration, Instant},
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use tokio::sync::mpsc;
use tracing::warn;

use super::{Reader, list};
use crate::{
    load::monotonic_ns,
    source::{Feed, NodeAddresses, Snapshot, View},
};

/// A change is read once nothing has changed for this long,
const QUIET: Duration = Duration::from_millis(50);
/// or once it has waited this long.
const SETTLE_AT_MOST: Duration = Duration::from_millis(500);
/// How often to look without being told.
const POLL: Duration = Duration::from_secs(5);

/// Reads `path` at once and after each change, as the node with this name, in a thread of its own that ends after the
/// receiver is dropped.
///
/// # Errors
/// Where the thread could not be started. Where notifications are not to be had, changes are seen by polling alone.
pub fn watch(path: &Path, node_name: &str) -> io::Result<Feed> {
    let (sender, snapshots) = mpsc::channel(1);
    let view = View::default();
    let nodes = NodeAddresses::default();
    let (path, written, told) = (path.to_owned(), view.clone(), nodes.clone());
    let reader = Reader::new(&path, node_name);
    thread::Builder::new().name("source".to_owned()).spawn(move || run(&path, reader, &sender, &written, &told))?;
    Ok(Feed { snapshots, view, nodes, notices: None })
}

fn run(path: &Path, mut reader: Reader, snapshots: &mpsc::Sender<Snapshot>, view: &View, nodes: &NodeAddresses) {
    let (events, changes) = std_mpsc::channel();
    let mut watches = Watches::new(events);
    let mut last: Option<(Fingerprint, Snapshot)> = None;
    while !snapshots.is_closed() {
        watches.follow(path);
        // Taken before the files are read: what changes meanwhile differs from it.
        let fingerprint = fingerprint(path);
        let looked_ns = monotonic_ns();
        if last.as_ref().is_none_or(|(former, _)| *former != fingerprint) {
            let snapshot = reader.read();
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
        settle(&changes);
    }
}

/// Waits for a change, and then until changes have come to rest; at most until the next poll.
fn settle(changes: &std_mpsc::Receiver<()>) {
    if changes.recv_timeout(POLL).is_err() {
        return;
    }
    let deadline = Instant::now() + SETTLE_AT_MOST;
    while Instant::now() < deadline && changes.recv_timeout(QUIET).is_ok() {}
}

/// Every file that counts, and what identifies its content: device, inode, size, and when it and its inode changed.
type Fingerprint = Option<Vec<(PathBuf, Option<[i64; 7]>)>>;

fn fingerprint(path: &Path) -> Fingerprint {
    let identify = |file: PathBuf| {
        let identity = fs::metadata(&file).ok().map(|m| {
            let (device, inode, size) = (m.dev().cast_signed(), m.ino().cast_signed(), m.size().cast_signed());
            [device, inode, size, m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()]
        });
        (file, identity)
    };
    list(path).ok().map(|files| files.into_iter().map(identify).collect())
}

/// The directories that are watched, each with its device and inode.
struct Watches {
    watcher: Option<RecommendedWatcher>,
    directories: BTreeMap<PathBuf, (u64, u64)>,
}

impl Watches {
    fn new(events: std_mpsc::Sender<()>) -> Self {
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if event.is_ok_and(|event| is_change(event.kind)) {
                // The receiver is gone only when the thread ends, and the watcher with it.
                let _ = events.send(());
            }
        });
        let watcher = watcher.inspect_err(|error| warn!(%error, "no notifications of changed files; polling")).ok();
        Self { watcher, directories: BTreeMap::new() }
    }

    /// Watches the path, if it is a directory, and the directory that it is in: a file is replaced there, and so is a link
    /// to a directory. Watches follow inodes, so one that is not the path's any more is set anew.
    fn follow(&mut self, path: &Path) {
        let Some(watcher) = &mut self.watcher else { return };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        for directory in [parent, path] {
            let metadata = fs::metadata(directory).ok().filter(fs::Metadata::is_dir);
            let present = metadata.map(|metadata| (metadata.dev(), metadata.ino()));
            if self.directories.get(directory) == present.as_ref() {
                continue;
            }
            if self.directories.remove(directory).is_some() {
                // Fails where the kernel has dropped the watch with the directory.
                let _ = watcher.unwatch(directory);
            }
            let Some(identity) = present else { continue };
            match watcher.watch(directory, RecursiveMode::NonRecursive) {
                Ok(()) => _ = self.directories.insert(directory.to_owned(), identity),
                Err(error) => warn!(%error, directory = %directory.display(), "cannot be watched; polling"),
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
