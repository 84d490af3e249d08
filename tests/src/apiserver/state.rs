//! The state of the API double: objects, their history, watches, and planned failures.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

use super::{Answer, Gone};

/// The kinds that it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Services.
    Services,
    /// EndpointSlices.
    Slices,
    /// Nodes.
    Nodes,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Services, Self::Slices, Self::Nodes];

    /// Version and kind in objects, and the path of the list.
    pub(super) const fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Services => ("v1", "Service", "/api/v1/services"),
            Self::Slices => ("discovery.k8s.io/v1", "EndpointSlice", "/apis/discovery.k8s.io/v1/endpointslices"),
            Self::Nodes => ("v1", "Node", "/api/v1/nodes"),
        }
    }

    /// The kind of an object.
    pub fn of(object: &Value) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| object["kind"] == kind.names().1)
    }
}

/// The type of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verb {
    /// A list, or a further page of one.
    List,
    /// A watch.
    Watch,
}

/// The type of a watch event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// An object was created.
    Added,
    /// It was modified.
    Modified,
    /// It was deleted.
    Deleted,
}

impl Change {
    const fn name(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

/// A request to the server.
#[derive(Clone, Debug)]
pub struct Request {
    /// When.
    pub at: Instant,
    /// Of which kind.
    pub kind: Kind,
    /// Its type.
    pub verb: Verb,
    /// Its parameters.
    pub query: BTreeMap<String, String>,
}

/// A piece of a watch's answer; an error breaks the connection.
pub(super) type Piece = io::Result<String>;

/// An open watch.
struct Watch {
    kind: Kind,
    query: BTreeMap<String, String>,
    pieces: UnboundedSender<Piece>,
}

/// The whole state.
#[derive(Default)]
pub(super) struct State {
    version: u64,
    objects: BTreeMap<(Kind, String, String), Value>,
    history: Vec<(u64, Kind, Change, Value)>,
    /// Changes up to this version are forgotten.
    compacted: u64,
    gone: Option<Gone>,
    watches: Vec<Watch>,
    /// The rest of lists that were begun, by token.
    pages: BTreeMap<String, (u64, Vec<Value>)>,
    answers: BTreeMap<(Kind, Verb), VecDeque<Answer>>,
    pub(super) requests: Vec<Request>,
    pub(super) events: BTreeMap<String, Value>,
    pub(super) event_requests: usize,
    /// Namespaces that are being deleted.
    pub(super) terminating: BTreeSet<String>,
}

/// The state, even after a panic while it was locked.
pub(super) fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    pub(super) fn put(&mut self, kind: Kind, object: Value) {
        let (change, object) = self.record(kind, object);
        self.send(kind, change, &object);
    }

    /// Changes the objects, without notifying watches.
    fn record(&mut self, kind: Kind, mut object: Value) -> (Change, Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        if kind != Kind::Nodes && object["metadata"]["namespace"].is_null() {
            object["metadata"]["namespace"] = "default".into();
        }
        let former = self.objects.insert(key(kind, &object), object.clone());
        let change = if former.is_some() { Change::Modified } else { Change::Added };
        self.history.push((self.version, kind, change, object.clone()));
        (change, object)
    }

    pub(super) fn put_and_break(&mut self, kind: Kind, object: Value) {
        let (change, object) = self.record(kind, object);
        let line = event(change.name(), &object);
        let half = line[..line.len() / 2].to_owned();
        for watch in self.take_watches(kind) {
            // A watch that has ended needs no breaking.
            let _ = watch.pieces.send(Ok(half.clone()));
            let _ = watch.pieces.send(Err(io::ErrorKind::ConnectionReset.into()));
        }
    }

    pub(super) fn delete(&mut self, kind: Kind, namespace: &str, name: &str) -> bool {
        let Some(mut object) = self.objects.remove(&(kind, namespace.to_owned(), name.to_owned())) else {
            return false;
        };
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.history.push((self.version, kind, Change::Deleted, object.clone()));
        self.send(kind, Change::Deleted, &object);
        true
    }

    pub(super) fn objects(&self, kind: Kind) -> Vec<Value> {
        self.objects.iter().filter(|((of, _, _), _)| *of == kind).map(|(_, object)| object.clone()).collect()
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn send(&mut self, kind: Kind, change: Change, object: &Value) {
        let line = event(change.name(), object);
        self.watches.retain(|watch| {
            watch.kind != kind || !selects(&watch.query, object) || watch.pieces.send(Ok(line.clone())).is_ok()
        });
    }

    pub(super) fn bookmark(&mut self, kind: Kind) {
        let (api_version, name, _) = kind.names();
        let version = self.version.to_string();
        let object =
            json!({"apiVersion": api_version, "kind": name, "metadata": {"resourceVersion": version}, "spec": {}});
        let line = event("BOOKMARK", &object);
        self.watches.retain(|watch| watch.kind != kind || watch.pieces.send(Ok(line.clone())).is_ok());
    }

    pub(super) fn end_watches(&mut self, kind: Kind) {
        drop(self.take_watches(kind));
    }

    fn take_watches(&mut self, kind: Kind) -> Vec<Watch> {
        self.watches.extract_if(.., |watch| watch.kind == kind).collect()
    }

    pub(super) fn forget_watches(&mut self) {
        self.watches.clear();
    }

    pub(super) fn compact(&mut self, gone: Gone) {
        (self.compacted, self.gone) = (self.version, Some(gone));
        self.history.clear();
        self.pages.clear();
    }

    pub(super) fn misbehave(&mut self, kind: Kind, verb: Verb, answers: impl IntoIterator<Item = Answer>) {
        self.answers.entry((kind, verb)).or_default().extend(answers);
    }

    /// Records a request, and returns its failure, if one is planned.
    pub(super) fn begin(&mut self, kind: Kind, verb: Verb, query: &BTreeMap<String, String>) -> Option<Answer> {
        self.requests.push(Request { at: Instant::now(), kind, verb, query: query.clone() });
        self.answers.get_mut(&(kind, verb))?.pop_front()
    }

    pub(super) fn watches(&mut self, kind: Kind) -> usize {
        self.watches.retain(|watch| !watch.pieces.is_closed());
        self.watches.iter().filter(|watch| watch.kind == kind).count()
    }

    /// A page of a list as JSON; none if its list is no longer known.
    pub(super) fn page(&mut self, kind: Kind, query: &BTreeMap<String, String>) -> Option<Value> {
        let (version, mut items) = match query.get("continue") {
            Some(token) => self.pages.remove(token)?,
            None => {
                let selected = self.objects(kind).into_iter().filter(|object| selects(query, object));
                (self.version, selected.collect())
            }
        };
        let limit = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
        let mut metadata = json!({"resourceVersion": version.to_string()});
        if items.len() > limit {
            let rest = items.split_off(limit);
            let token = format!("{kind:?}-{version}-{}", rest.len());
            metadata["continue"] = token.clone().into();
            self.pages.insert(token, (version, rest));
        }
        let (api_version, name, _) = kind.names();
        Some(json!({"apiVersion": api_version, "kind": format!("{name}List"), "metadata": metadata, "items": items}))
    }

    /// Begins a watch: changes since its version come first. If that is no longer known, returns how to notify the client.
    pub(super) fn watch(
        &mut self,
        kind: Kind,
        query: BTreeMap<String, String>,
        pieces: UnboundedSender<Piece>,
    ) -> Result<(), Gone> {
        let from: u64 = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
        if from < self.compacted {
            return Err(self.gone.unwrap_or(Gone::Http));
        }
        for (version, of, change, object) in &self.history {
            if *version > from && *of == kind && selects(&query, object) {
                // Cannot fail: the caller still has the receiver.
                let _ = pieces.send(Ok(event(change.name(), object)));
            }
        }
        self.watches.push(Watch { kind, query, pieces });
        Ok(())
    }
}

fn key(kind: Kind, object: &Value) -> (Kind, String, String) {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (kind, text("namespace"), text("name"))
}

/// One line of a watch's answer.
pub(super) fn event(kind: &str, object: &Value) -> String {
    format!("{}\n", json!({"type": kind, "object": object}))
}

/// Whether an object passes the selectors `!label` and `metadata.name=NAME`; there are no others here.
fn selects(query: &BTreeMap<String, String>, object: &Value) -> bool {
    let by_label = query.get("labelSelector").is_none_or(|selector| {
        let label = selector.strip_prefix('!').unwrap_or_else(|| panic!("labelSelector {selector}"));
        object["metadata"]["labels"].get(label).is_none()
    });
    let by_field = query.get("fieldSelector").is_none_or(|selector| {
        let name = selector.strip_prefix("metadata.name=").unwrap_or_else(|| panic!("fieldSelector {selector}"));
        object["metadata"]["name"] == name
    });
    by_label && by_field
}
