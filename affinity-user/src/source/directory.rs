//! Reads Kubernetes YAML or JSON from a file or a directory of files.
//!
//! In a directory, every `*.yaml`, `*.yml` and `*.json` counts, in the order of their names, except hidden files and files in
//! subdirectories. So a mounted ConfigMap works as expected: its files are links through the hidden `..data`.
//!
//! A bad file never removes running services. A [`Reader`] keeps the objects that the file held when it was last good and that
//! the damaged file does not give again, until the file is good again or gone. If a file was bad from the start, for example
//! after a restart, the snapshot is marked as partial.
//!
//! A file that is open for writing is not read: its former objects stay until its writer has closed it. See [`mod@take`].

mod take;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io, mem,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    ObjectName, Origin, Problem, Severity, Snapshot, Sourced,
    api::Node,
    documents::{self, Entry, Loaded},
    nodes::addresses_of,
};

use take::{Taken, Writing};
pub use watch::watch;

/// Reads `path` once, on the node with this name.
#[must_use]
pub fn read(path: &Path, node_name: &str) -> Snapshot {
    Reader::new(path, node_name).read()
}

/// Reads the text of one file with the name `file`.
#[must_use]
pub fn parse(file: &Path, text: &str) -> Snapshot {
    let content = Content::parse(file, text, None);
    let mut snapshot = Snapshot { problems: content.problems, partial: content.unknown, ..Snapshot::default() };
    content.fresh.iter().for_each(|entry| insert(&mut snapshot, entry, true));
    snapshot
}

/// Reads a path repeatedly, and remembers the last good content.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    node_name: String,
    /// Whether the path itself was ever read.
    listed: bool,
    /// Whether the last reading found no bad file.
    good: bool,
    files: BTreeMap<PathBuf, Content>,
}

/// The content of a file.
#[derive(Debug, Default)]
struct Content {
    /// Objects that the file holds now.
    fresh: Vec<Entry>,
    /// Objects that it held when it was last good, and that its damaged parts may still contain.
    kept: Vec<Entry>,
    /// Whether it is damaged and was never good, so that its content is unknown.
    unknown: bool,
    /// Whether it is being written; then all other fields are as before.
    is_being_written: bool,
    problems: Vec<Problem>,
}

impl Reader {
    /// A reader of `path`, a file or a directory, on the node with this name. It has not read anything yet.
    #[must_use]
    pub fn new(path: &Path, node_name: &str) -> Self {
        let (path, node_name) = (path.to_owned(), node_name.to_owned());
        Self { path, node_name, listed: false, good: false, files: BTreeMap::new() }
    }

    /// Reads everything. If the path itself cannot be read, everything stays as it was.
    pub fn read(&mut self) -> Snapshot {
        self.read_except(&Writing::default())
    }

    /// The same, but if the file system cannot tell whether a file is being written, the notifications decide, and it is not
    /// read if so.
    fn read_except(&mut self, writing: &Writing) -> Snapshot {
        let mut snapshot = Snapshot::default();
        let list = list(&self.path);
        self.good = list.is_ok();
        match list {
            Ok(files) => {
                if files.is_empty() {
                    let message = "no *.yaml, *.yml or *.json file in this directory";
                    snapshot.problems.push(Problem::new(Severity::Info, Some(whole(&self.path)), message));
                }
                self.listed = true;
                self.read_files(files, writing);
            }
            Err(error) => {
                let before = if self.listed { "; the objects that were read before stay in use" } else { "" };
                let message = format!("cannot be read ({error}){before}");
                snapshot.problems.push(Problem::new(Severity::Error, Some(whole(&self.path)), message));
            }
        }
        snapshot.partial = !self.listed || self.files.values().any(|content| content.unknown);
        let is_good = |content: &Content| !content.unknown && !content.is_being_written && content.kept.is_empty();
        self.good &= self.files.values().all(is_good);
        for (file, content) in &self.files {
            snapshot.problems.extend(content.problems.iter().cloned());
            snapshot.problems.extend(content.waiting(file));
            content.fresh.iter().for_each(|entry| insert(&mut snapshot, entry, true));
        }
        if self.has_nothing() {
            snapshot.unreadable = snapshot.problems.first().map(ToString::to_string);
        }
        // After all fresh objects: an object that moved to another file is not a duplicate.
        for entry in self.files.values().flat_map(|content| &content.kept) {
            insert(&mut snapshot, entry, false);
        }
        snapshot.node = self.own_node();
        snapshot
    }

    /// The node that this runs on: the first one with its name.
    fn own_node(&self) -> Option<Sourced<Node>> {
        self.entries().find_map(|Entry { name, origin, loaded }| match loaded {
            Loaded::Node(object) if *name.name == *self.node_name => {
                Some(Sourced { origin: Some(origin.clone()), object: Arc::clone(object) })
            }
            Loaded::Node(_) | Loaded::Service(_) | Loaded::Slice(_) => None,
        })
    }

    /// Whether there should be something to read, but no object of it was ever read. An empty directory is known to hold
    /// nothing.
    fn has_nothing(&self) -> bool {
        let gave_nothing = |content: &Content| content.unknown && content.fresh.is_empty();
        !self.listed || !self.files.is_empty() && self.files.values().all(gave_nothing)
    }

    /// All objects, fresh ones first.
    fn entries(&self) -> impl Iterator<Item = &Entry> {
        let fresh = self.files.values().flat_map(|content| &content.fresh);
        fresh.chain(self.files.values().flat_map(|content| &content.kept))
    }

    /// The addresses of all nodes that the last reading found.
    #[must_use]
    pub fn node_addresses(&self) -> BTreeSet<IpAddr> {
        let nodes =
            self.entries().filter_map(|entry| if let Loaded::Node(node) = &entry.loaded { Some(node) } else { None });
        nodes.flat_map(|node| addresses_of(node)).collect()
    }

    /// Whether the last reading was complete, so that no object in use is older.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.good
    }

    /// The files that were not read because they are being written.
    fn awaited(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().filter(|(_, content)| content.is_being_written).map(|(file, _)| file.as_path())
    }

    fn read_files(&mut self, files: Vec<PathBuf>, writing: &Writing) {
        let mut former = mem::take(&mut self.files);
        for file in files {
            let former = former.remove(&file);
            let content = match take::take(&file, writing) {
                Ok(Taken::Text(text)) => Content::parse(&file, &text, former),
                Ok(Taken::BeingWritten) => Content::being_written(former),
                Err(error) => Content::unreadable(&file, &error, former),
            };
            self.files.insert(file, content);
        }
    }
}

impl Content {
    fn parse(file: &Path, text: &str, former: Option<Self>) -> Self {
        let documents = documents::parse(file, text);
        let mut content = Self { fresh: documents.entries, problems: documents.problems, ..Self::default() };
        if documents.damaged {
            content.keep(file, former);
        }
        content
    }

    fn unreadable(file: &Path, error: &io::Error, former: Option<Self>) -> Self {
        let problem = Problem::new(Severity::Error, Some(whole(file)), format!("cannot be read: {error}"));
        let mut content = Self { problems: vec![problem], ..Self::default() };
        content.keep(file, former);
        content
    }

    /// Keeps the former state; the content of a file that was never read is unknown.
    fn being_written(former: Option<Self>) -> Self {
        let unknown = former.is_none();
        let former = former.unwrap_or_default();
        Self { unknown: unknown || former.unknown, is_being_written: true, ..former }
    }

    /// The message about a file that is being written.
    fn waiting(&self, file: &Path) -> Option<Problem> {
        let (severity, message) = match (self.is_being_written, self.unknown) {
            (false, _) => return None,
            (true, true) => (
                Severity::Warning,
                "is being written, and was never read: until the file is closed, services that are in no other file are \
                 not removed",
            ),
            (true, false) => (
                Severity::Info,
                "is being written; the objects that were read before stay in use until the file is closed",
            ),
        };
        Some(Problem::new(severity, Some(whole(file)), message))
    }

    /// Keeps the former objects that the present content does not give.
    fn keep(&mut self, file: &Path, former: Option<Self>) {
        let Some(former) = former.filter(|former| !former.unknown) else {
            self.unknown = true;
            let message =
                "never read completely: until it is valid, services that are in no other file are not removed";
            self.problems.push(Problem::new(Severity::Warning, Some(whole(file)), message));
            return;
        };
        let given = |entry: &Entry| {
            self.fresh.iter().any(|fresh| fresh.name == entry.name && fresh.loaded.kind() == entry.loaded.kind())
        };
        self.kept = former.fresh.into_iter().chain(former.kept).filter(|entry| !given(entry)).collect();
        if !self.kept.is_empty() {
            let names: Vec<String> =
                self.kept.iter().map(|entry| format!("{} {}", entry.loaded.kind(), entry.name)).collect();
            let message =
                format!("stays in use as last read, until the file is valid or removed: {}", names.join(", "));
            self.problems.push(Problem::new(Severity::Warning, Some(whole(file)), message));
        }
    }
}

fn whole(file: &Path) -> Origin {
    Origin { file: file.to_owned(), document: None }
}

/// The files that count, in order; `path` itself if it is a file.
fn list(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)? {
        let file = entry?.path();
        let hidden = file.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let known = file.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|e| extension == *e));
        // A broken link counts: its file cannot be read, but is not gone either. A pipe is skipped because it would block.
        let usable = fs::metadata(&file).map_or(true, |metadata| metadata.is_file());
        if known && usable && !hidden {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// Adds an object. The first one of a name is used; a later one is reported if it is `fresh`.
fn insert(snapshot: &mut Snapshot, entry: &Entry, fresh: bool) {
    let Entry { name, origin, loaded } = entry;
    let first = match loaded {
        Loaded::Service(object) => put(Arc::make_mut(&mut snapshot.services), name, origin, object),
        Loaded::Slice(object) => put(Arc::make_mut(&mut snapshot.slices), name, origin, object),
        // Nodes are read elsewhere: `Reader::node_addresses`, `Reader::own_node`.
        Loaded::Node(_) => None,
    };
    if let (Some(first), true) = (first, fresh) {
        let message = format!("defined twice; the one in {first} is used, this one is ignored");
        let problem = Problem::new(Severity::Error, Some(origin.clone()), message);
        snapshot.problems.push(problem.of(loaded.kind(), name));
    }
}

/// Stores an object, unless its name is taken: then returns the origin of the other object.
fn put<T>(
    objects: &mut BTreeMap<ObjectName, Sourced<T>>,
    name: &ObjectName,
    origin: &Origin,
    object: &Arc<T>,
) -> Option<Origin> {
    if let Some(first) = objects.get(name) {
        return first.origin.clone();
    }
    let sourced = Sourced { origin: Some(origin.clone()), object: Arc::clone(object) };
    objects.insert(name.clone(), sourced);
    None
}

#[cfg(test)]
mod tests;
