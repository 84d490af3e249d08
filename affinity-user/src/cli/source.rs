//! What YAML alone says: the dataplane that it would make, in memory.

use std::{collections::BTreeMap, fs, path::Path};

use super::error::Error;
use crate::{
    desired::{self, desired},
    load::Sizes,
    plan::plan,
    source::{Problem, Severity, directory},
    store::{Capacity, Store, memory::MemoryStore},
    view::{Catalog, Clock},
};

/// Reads a file or a directory and carries out the plan that it makes for an empty dataplane. What is wrong with the
/// YAML is said on standard error; the rest of it counts.
pub(crate) fn read(path: &Path, node_name: &str) -> Result<MemoryStore, Error> {
    fs::metadata(path).map_err(|error| Error::Failed(format!("{}: {error}", path.display())))?;
    let snapshot = directory::read(path);
    let (desired, of_desired) =
        desired(&snapshot, &desired::Options { node_name: Some(node_name.to_owned()), ..desired::Options::default() });
    let sizes = Sizes::of_this_machine();
    let capacity = Capacity { backends: sizes.backends, slots: sizes.slots };
    // Nobody is pinned and nothing flows.
    let mut store = MemoryStore::new(capacity, 1);
    let (steps, of_plan) = plan(&store.observe()?, &desired, capacity);
    report(snapshot.problems.iter().chain(&of_desired).chain(&of_plan));
    for step in &steps {
        store.apply(step)?;
    }
    Ok(store)
}

/// The catalog of such a dataplane.
pub(crate) fn catalog(store: &MemoryStore) -> Result<Catalog, Error> {
    Ok(Catalog::new(store.observe()?, BTreeMap::new(), Clock::now()))
}

fn report<'a>(problems: impl Iterator<Item = &'a Problem>) {
    for problem in problems.filter(|problem| problem.severity != Severity::Info) {
        eprintln!("{}: {problem}", problem.severity.name());
    }
}
