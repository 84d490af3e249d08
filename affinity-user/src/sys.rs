//! System calls that no safe crate has, behind safe functions on file descriptors and byte slices: what the store, the loader
//! and the attachments need of bpf(2), and a few others. All `unsafe` code of user space is in the files of `sys/`. Errors name
//! the call and the object.

mod bpf;
mod map;
mod memory;
mod node;
mod program;

use std::io;

use rustix::time::{ClockId, clock_gettime};

pub use self::{
    bpf::{obj_get, obj_pin},
    map::{Batch, Map, MapInfo, Write, possible_cpus, synchronize},
    memory::{Ring, RingConsumer, Words},
    node::{card_driver, card_flags, card_queues, is_open_for_writing, netns_cookie},
    program::{
        CgroupLinkInfo, LinkInfo, ProgInfo, TestRun, cgroup_link_info, link_create, link_create_cgroup, link_detach,
        link_info, link_update, prog_info, tcx_programs, test_run,
    },
};

/// A call failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} {object}: {source}")]
pub struct SysError {
    /// The command or system call.
    pub call: &'static str,
    /// The object of the call.
    pub object: String,
    /// The kernel's error.
    pub source: io::Error,
}

impl SysError {
    /// From a call, its object and the kernel's error.
    pub fn new(call: &'static str, object: impl Into<String>, source: io::Error) -> Self {
        Self { call, object: object.into(), source }
    }

    /// Whether there is no such object.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// What the functions of this module return.
pub type Result<T> = std::result::Result<T, SysError>;

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of every time in the maps.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
