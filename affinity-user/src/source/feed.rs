//! Where snapshots come from, and what comes with them.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::mpsc::Receiver;

use super::{NodeAddresses, Notices, Snapshot, directory, kubernetes};

/// A source cannot be used at all. What is wrong with single objects is a [`super::Problem`] instead.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The process lacks what a source needs: a thread, a runtime.
    #[error("the source cannot be started: {0}")]
    Start(#[from] io::Error),
    /// The cluster cannot be used.
    #[error(transparent)]
    Kubernetes(#[from] kubernetes::Error),
}

/// Where services come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// A file, or a directory of files, of Kubernetes YAML.
    Directory {
        /// Where it is.
        path: PathBuf,
        /// Which Node object is the node that this process runs on.
        node_name: String,
    },
    /// A cluster's API.
    Kubernetes(kubernetes::Options),
}

/// What a source that is watched gives.
#[derive(Debug)]
pub struct Feed {
    /// Whole snapshots: one at first, as soon as the source is known, and one after each change.
    pub snapshots: Receiver<Snapshot>,
    /// How current they are.
    pub view: View,
    /// What is known of the addresses of nodes.
    pub nodes: NodeAddresses,
    /// Takes notices for owners of services; none if there is no API to send them to.
    pub notices: Option<Notices>,
}

impl Source {
    /// Watches the source, in a thread of its own that ends after the feed is dropped.
    ///
    /// # Errors
    /// [`SourceError`] where it cannot be started. A source that merely does not answer is waited for.
    pub async fn watch(&self) -> Result<Feed, SourceError> {
        match self {
            Self::Directory { path, node_name } => Ok(directory::watch(path, node_name)?),
            Self::Kubernetes(options) => Ok(kubernetes::watch(options).await?),
        }
    }

    /// Reads the source once.
    ///
    /// # Errors
    /// [`SourceError`] where there is nothing to read from. What cannot be read of a directory is a problem of the snapshot.
    pub async fn read(&self) -> Result<Snapshot, SourceError> {
        match self {
            Self::Directory { path, node_name } => Ok(directory::read(path, node_name)),
            Self::Kubernetes(options) => Ok(kubernetes::read(options).await?),
        }
    }

    /// The path, where it is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Directory { path, .. } => Some(path),
            Self::Kubernetes(_) => None,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory { path, .. } => write!(f, "{}", path.display()),
            Self::Kubernetes(_) => f.write_str("the cluster's API"),
        }
    }
}

/// When a source's view was last known to be current: written by the source, read through clones.
#[derive(Clone, Debug, Default)]
pub struct View {
    current_ns: Arc<AtomicU64>,
}

impl View {
    /// `CLOCK_MONOTONIC` in nanoseconds; none where the source was never read as a whole.
    #[must_use]
    pub fn current_ns(&self) -> Option<u64> {
        Some(self.current_ns.load(Ordering::Relaxed)).filter(|&current_ns| current_ns != 0)
    }

    /// Everything that the source held at this time is known.
    pub fn is_current_at(&self, now_ns: u64) {
        self.current_ns.store(now_ns, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_unknown_until_it_was_current() {
        let view = View::default();
        assert_eq!(view.current_ns(), None);
        view.clone().is_current_at(7);
        assert_eq!(view.current_ns(), Some(7));
    }
}
