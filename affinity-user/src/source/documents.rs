//! Splits the text of one file into documents, and reads objects and problems from them.
//!
//! A stream of YAML is split at its `---` lines before it is parsed, as in `kubectl`, so that a bad document does not affect
//! others. JSON has no marker between documents; everything after a bad one is lost.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde::de::DeserializeOwned;
use serde_ignored::Path as FieldPath;
use serde_json::{Map, Value};
use serde_saphyr::UserMessageFormatter;

use super::{
    ObjectName, Origin, Problem, Severity,
    api::{EndpointSlice, Node, Service},
};

/// An object of interest.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Loaded {
    Service(Arc<Service>),
    Slice(Arc<EndpointSlice>),
    Node(Arc<Node>),
}

impl Loaded {
    pub(super) const fn kind(&self) -> &'static str {
        match self {
            Self::Service(_) => SERVICE,
            Self::Slice(_) => SLICE,
            Self::Node(_) => NODE,
        }
    }
}

/// An object, its name, and its place.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) name: ObjectName,
    pub(super) origin: Origin,
    pub(super) loaded: Loaded,
}

/// The content of a file.
#[derive(Debug, Default)]
pub(super) struct Documents {
    /// The objects of its good documents.
    pub(super) entries: Vec<Entry>,
    pub(super) problems: Vec<Problem>,
    /// Whether a document could not be used, so that objects may be missing from `entries`.
    pub(super) damaged: bool,
    /// How many objects of each other kind were ignored.
    others: BTreeMap<String, u32>,
}

const SERVICE: &str = "Service";
const SLICE: &str = "EndpointSlice";
const NODE: &str = "Node";

/// Reads the text of `file`; as JSON if its name says so.
pub(super) fn parse(file: &Path, text: &str) -> Documents {
    let json = file.extension().is_some_and(|extension| extension == "json");
    let values = if json { json_values(text) } else { yaml_values(text) };
    let single = values.len() == 1;

    let mut documents = Documents::default();
    for (number, value) in (1..).zip(values) {
        let origin = Origin { file: file.to_owned(), document: (!single).then_some(number) };
        match value {
            Ok(Value::Null) => {}
            Ok(value) => documents.add(&origin, value, None),
            Err(message) => documents.reject(Problem::new(Severity::Error, Some(origin), message)),
        }
    }
    documents.report_others(file);
    documents
}

impl Documents {
    fn reject(&mut self, problem: Problem) {
        self.damaged = true;
        self.problems.push(problem);
    }

    /// Adds an object, or the items of a list. Items of a typed list may omit the kind that the list implies.
    fn add(&mut self, origin: &Origin, value: Value, implied: Option<(&str, &str)>) {
        let Value::Object(mut map) = value else {
            self.reject(problem(origin, "not an object: expected a mapping with apiVersion, kind and metadata"));
            return;
        };
        if let Some((version, kind)) = implied {
            map.entry("apiVersion").or_insert_with(|| version.into());
            map.entry("kind").or_insert_with(|| kind.into());
        }
        let (Some(version), Some(kind)) = (text(&map, "apiVersion"), text(&map, "kind")) else {
            self.reject(problem(origin, "not a Kubernetes object: apiVersion or kind is missing"));
            return;
        };
        if let (Some(item_kind), Some(Value::Array(items))) = (kind.strip_suffix("List"), map.get_mut("items")) {
            let implied = (!item_kind.is_empty()).then_some((version.as_str(), item_kind));
            for item in std::mem::take(items) {
                self.add(origin, item, implied);
            }
            return;
        }
        match (version.as_str(), kind.as_str()) {
            ("v1", SERVICE) => self.decode::<_, core::Service>(origin, SERVICE, map, Loaded::Service),
            ("discovery.k8s.io/v1", SLICE) => {
                self.decode::<_, discovery::EndpointSlice>(origin, SLICE, map, Loaded::Slice);
            }
            ("v1", NODE) => self.decode::<_, core::Node>(origin, NODE, map, Loaded::Node),
            (version, SERVICE) if !version.contains('/') => self.reject_version(origin, SERVICE, &map, version, "v1"),
            (version, SLICE) if version.starts_with("discovery.k8s.io/") => {
                self.reject_version(origin, SLICE, &map, version, "discovery.k8s.io/v1");
            }
            (_, other) => *self.others.entry(other.to_owned()).or_default() += 1,
        }
    }

    /// Reads the used fields of an object as `T`, and checks the rest against `Full`, Kubernetes' own type.
    fn decode<T: DeserializeOwned, Full: DeserializeOwned>(
        &mut self,
        origin: &Origin,
        kind: &str,
        map: Map<String, Value>,
        wrap: fn(Arc<T>) -> Loaded,
    ) {
        let Some(name) = object_name(&map) else {
            self.reject(problem(origin, format!("{kind}: metadata.name: missing")));
            return;
        };
        let value = Value::Object(map);
        match serde_path_to_error::deserialize::<_, T>(&value) {
            Ok(object) => {
                for (field, message) in unused::<Full>(value) {
                    let problem = Problem::new(Severity::Warning, Some(origin.clone()), message);
                    self.problems.push(problem.of(kind, &name).field(field));
                }
                self.entries.push(Entry { name, origin: origin.clone(), loaded: wrap(Arc::new(object)) });
            }
            Err(error) => {
                let field = field_of(&error.path().to_string());
                self.reject(problem(origin, error.inner().to_string()).of(kind, &name).field(field));
            }
        }
    }

    fn reject_version(
        &mut self,
        origin: &Origin,
        kind: &str,
        map: &Map<String, Value>,
        version: &str,
        supported: &str,
    ) {
        let problem = problem(origin, format!("{version} is not supported; use {supported}")).field("apiVersion");
        self.reject(match object_name(map) {
            Some(name) => problem.of(kind, &name),
            None => problem,
        });
    }

    /// One message for each kind, whatever its count.
    fn report_others(&mut self, file: &Path) {
        for (kind, count) in &self.others {
            let origin = Origin { file: file.to_owned(), document: None };
            if kind == "Endpoints" {
                let message = format!("{count} of kind {kind} ignored: write the addresses as {SLICE}s");
                self.problems.push(Problem::new(Severity::Warning, Some(origin), message));
                continue;
            }
            let message = format!("{count} of kind {kind} ignored: only {SERVICE}, {SLICE} and {NODE} are used");
            self.problems.push(Problem::new(Severity::Info, Some(origin), message));
        }
    }
}

/// Unused fields that are wrong, each with a message: the fields that `Full` does not have, and the first field with another
/// type there.
fn unused<Full: DeserializeOwned>(value: Value) -> Vec<(String, String)> {
    let mut wrong = Vec::new();
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
    let decoded = serde_ignored::deserialize::<_, _, Full>(tracked, |path| {
        wrong.push((field_path(&path), "unknown field; it is ignored".to_owned()));
    });
    // API servers write null in fields that must not be null, and `kubectl get -o yaml` passes it on.
    let error = decoded.err().map(|error| error.to_string()).filter(|error| !error.starts_with("invalid type: null"));
    wrong.extend(error.map(|error| (field_of(&track.path().to_string()), format!("{error}; it is ignored"))));
    wrong
}

/// A path of `serde_path_to_error`; empty if it is the whole object.
fn field_of(path: &str) -> String {
    if path == "." { String::new() } else { path.to_owned() }
}

fn problem(origin: &Origin, message: impl Into<String>) -> Problem {
    Problem::new(Severity::Error, Some(origin.clone()), message)
}

fn text(map: &Map<String, Value>, key: &str) -> Option<String> {
    map.get(key).and_then(Value::as_str).map(str::to_owned)
}

fn object_name(map: &Map<String, Value>) -> Option<ObjectName> {
    let metadata = map.get("metadata")?;
    let field = |name: &str| metadata.get(name).and_then(Value::as_str).filter(|value| !value.is_empty());
    Some(ObjectName::new(field("namespace").unwrap_or("default"), field("name")?))
}

/// The path of an unknown field, in the notation of `serde_path_to_error`.
fn field_path(path: &FieldPath<'_>) -> String {
    match path {
        FieldPath::Root => String::new(),
        FieldPath::Seq { parent, index } => format!("{}[{index}]", field_path(parent)),
        FieldPath::Map { parent, key } => match field_path(parent) {
            parent if parent.is_empty() => key.clone(),
            parent => format!("{parent}.{key}"),
        },
        FieldPath::Some { parent } | FieldPath::NewtypeStruct { parent } | FieldPath::NewtypeVariant { parent } => {
            field_path(parent)
        }
    }
}

fn json_values(text: &str) -> Vec<Result<Value, String>> {
    let stream = serde_json::Deserializer::from_str(text).into_iter();
    stream.map(|value| value.map_err(|error| format!("not valid JSON: {error}"))).collect()
}

fn yaml_values(text: &str) -> Vec<Result<Value, String>> {
    let chunks = chunks(text);
    chunks.iter().filter(|(_, chunk)| !is_blank(chunk)).map(|(line, chunk)| yaml_value(*line, chunk)).collect()
}

/// The documents of a YAML stream, each with the number of lines before it. A line that begins with `---` begins a
/// document, even inside a block scalar (YAML 1.2.2, section 9.1.2).
fn chunks(text: &str) -> Vec<(usize, String)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut chunks = Vec::new();
    let mut chunk = (0, String::new());
    for (number, line) in text.split_inclusive('\n').enumerate() {
        match line.strip_prefix("---") {
            Some(rest) if rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']) => {
                // The rest of the marker's line keeps its column.
                chunks.push(std::mem::replace(&mut chunk, (number, format!("   {rest}"))));
            }
            _ => chunk.1.push_str(line),
        }
    }
    chunks.push(chunk);
    chunks
}

/// Whether a chunk is only comments, directives, blank lines, and the marker of a document's end.
fn is_blank(chunk: &str) -> bool {
    chunk.lines().all(|line| {
        line.trim().is_empty() || line.trim_start().starts_with('#') || line.starts_with('%') || line.trim() == "..."
    })
}

fn yaml_value(line: usize, chunk: &str) -> Result<Value, String> {
    serde_saphyr::from_str_with_options(chunk, options()).or_else(|_| {
        // Parsed again with the lines before it, so that the message has the line numbers of the file.
        let padded = "\n".repeat(line) + chunk;
        serde_saphyr::from_str_with_options(&padded, options())
            .map_err(|error| format!("not valid YAML: {}", error.render_with_formatter(&UserMessageFormatter)))
    })
}

/// No limit on the size of a document, because its owner chooses it; the limits on aliases stay.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        with_snippet: false,
        strict_booleans: true,
        budget: serde_saphyr::budget! {
            max_events: usize::MAX,
            max_nodes: usize::MAX,
            max_total_scalar_bytes: usize::MAX,
        },
    }
}
