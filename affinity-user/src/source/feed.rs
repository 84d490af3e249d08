//! The sources of snapshots, and what they provide in addition.

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

/// The source cannot be used at all. Problems of single objects are [`super::Problem`]s instead.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The process lacks a thread or runtime that the source needs.
    #[error("the source cannot be started: {0}")]
    Start(#[from] io::Error),
    /// The cluster's API cannot be used.
    #[error(transparent)]
    Kubernetes(#[from] kubernetes::Error),
}

/// A source of services.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// A file, or a directory of files, of Kubernetes YAML.
    Directory {
        /// Its path.
        path: PathBuf,
        /// Which Node object is the node that this process runs on.
        node_name: String,
    },
    /// A cluster's API.
    Kubernetes(kubernetes::Options),
}

/// The output of a watched source.
#[derive(Debug)]
pub struct Feed {
    /// Complete snapshots: the first as soon as the source is known, then one after each change.
    pub snapshots: Receiver<Snapshot>,
    /// How current the snapshots are.
    pub view: View,
    /// The known addresses of nodes.
    pub nodes: NodeAddresses,
    /// Accepts notices for owners of services; `None` if there is no API to send them to.
    pub notices: Option<Notices>,
}

impl Source {
    /// Watches the source, in a separate thread that ends after the feed is dropped.
    ///
    /// # Errors
    /// [`SourceError`] if it cannot be started. A source that only does not answer is waited for.
    pub async fn watch(&self) -> Result<Feed, SourceError> {
        match self {
            Self::Directory { path, node_name } => Ok(directory::watch(path, node_name)?),
            Self::Kubernetes(options) => Ok(kubernetes::watch(options).await?),
        }
    }

    /// Reads the source once.
    ///
    /// # Errors
    /// [`SourceError`] if there is nothing to read from. What cannot be read in a directory is a problem of the snapshot.
    pub async fn read(&self) -> Result<Snapshot, SourceError> {
        match self {
            Self::Directory { path, node_name } => Ok(directory::read(path, node_name)),
            Self::Kubernetes(options) => Ok(kubernetes::read(options).await?),
        }
    }

    /// The path, if the source is one.
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

/// When a source's content was last known to be current. The source writes it; clones read it.
#[derive(Clone, Debug, Default)]
pub struct View {
    current_ns: Arc<AtomicU64>,
}

impl View {
    /// `CLOCK_MONOTONIC` in nanoseconds; `None` if the source was never read completely.
    #[must_use]
    pub fn current_ns(&self) -> Option<u64> {
        Some(self.current_ns.load(Ordering::Relaxed)).filter(|&current_ns| current_ns != 0)
    }

    /// Records that everything in the source was known at this time.
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
