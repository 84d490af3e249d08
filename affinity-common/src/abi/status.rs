//! The agent's status. No program reads it.

use bytemuck::{Pod, Zeroable};

/// The one value of the `status` map. All zero: no agent has written it yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Status {
    /// When the agent last knew everything that the source contained, `CLOCK_MONOTONIC` in nanoseconds; zero: never.
    pub current_ns: u64,
    /// When the agent that wrote this was started, `CLOCK_MONOTONIC` in nanoseconds.
    pub started_ns: u64,
    /// A [`SourceKind`].
    pub source: u32,
    /// Zero.
    pub pad: u32,
}

/// Where services come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum SourceKind {
    /// Files.
    Directory = 1,
    /// A cluster's API.
    Kubernetes = 2,
}

impl SourceKind {
    /// Its name in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Kubernetes => "kubernetes",
        }
    }
}

impl Status {
    /// The kind of the source; `None` if it is not known.
    #[must_use]
    pub fn kind(&self) -> Option<SourceKind> {
        [SourceKind::Directory, SourceKind::Kubernetes].into_iter().find(|kind| *kind as u32 == self.source)
    }
}
