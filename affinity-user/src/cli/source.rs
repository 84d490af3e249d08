//! Creates in memory the dataplane that a source describes.

use std::{collections::BTreeMap, convert::Infallible, fs, path::PathBuf, str::FromStr};

use clap::Args;

use super::{Global, error::Error};
use crate::{
    agent::AgentError,
    desired::{self, desired},
    load::{MAX_RANGES, Sizes},
    plan::plan,
    source::{Problem, Severity, Source, kubernetes},
    store::{Capacity, Store, memory::MemoryStore},
    view::{Catalog, Clock},
};

/// The value of `--source`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum SourceName {
    /// `kubernetes`; a file with that name is `./kubernetes`.
    Kubernetes,
    Path(PathBuf),
}

impl FromStr for SourceName {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(if text == "kubernetes" { Self::Kubernetes } else { Self::Path(text.into()) })
    }
}

/// How a cluster is reached.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct ClusterArgs {
    /// With --source kubernetes: kubeconfig file for the API [default: KUBECONFIG, else the pod's service account]
    #[arg(long, value_name = "PATH")]
    kubeconfig: Option<PathBuf>,
}

impl ClusterArgs {
    /// The source with this name.
    pub(crate) fn source(&self, name: &SourceName, global: &Global) -> Result<Source, Error> {
        match (name, &self.kubeconfig) {
            (SourceName::Path(path), None) => {
                Ok(Source::Directory { path: path.clone(), node_name: global.node_name() })
            }
            (SourceName::Path(_), Some(_)) => Err(Error::Usage("--kubeconfig needs --source kubernetes".to_owned())),
            (SourceName::Kubernetes, kubeconfig) => Ok(Source::Kubernetes(kubernetes::Options {
                kubeconfig: kubeconfig.clone(),
                node_name: global.node_name(),
                events: false,
            })),
        }
    }
}

/// Reads a source once and carries out its plan for an empty dataplane. Problems of its objects are printed to standard error;
/// all other objects take effect.
pub(crate) fn read(source: &Source, node: desired::NodeFacts) -> Result<MemoryStore, Error> {
    if let Some(path) = source.path() {
        fs::metadata(path).map_err(|error| Error::Failed(format!("{}: {error}", path.display())))?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| AgentError::System("runtime", error))?;
    let snapshot = runtime.block_on(source.read()).map_err(AgentError::Source)?;
    let (desired, of_desired) = desired(&snapshot, &desired::Options { node, ..desired::Options::default() });
    let sizes = Sizes::of_this_machine();
    let capacity = Capacity { backends: sizes.backends, slots: sizes.slots, ranges: MAX_RANGES };
    // There are no pins and no flows.
    let mut store = MemoryStore::new(capacity, 1);
    let (steps, of_plan) = plan(&store.observe()?, &desired, capacity);
    report(snapshot.problems.iter().chain(&of_desired).chain(&of_plan));
    for step in &steps {
        store.apply(step)?;
    }
    Ok(store)
}

/// The catalog of this dataplane.
pub(crate) fn catalog(store: &MemoryStore) -> Result<Catalog, Error> {
    Ok(Catalog::new(store.observe()?, BTreeMap::new(), Clock::now()))
}

fn report<'a>(problems: impl Iterator<Item = &'a Problem>) {
    for problem in problems.filter(|problem| problem.severity != Severity::Info) {
        eprintln!("{}: {problem}", problem.severity.name());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_called_kubernetes_is_given_as_one() {
        assert_eq!("kubernetes".parse(), Ok(SourceName::Kubernetes));
        assert_eq!("./kubernetes".parse(), Ok(SourceName::Path("./kubernetes".into())));
    }
}
