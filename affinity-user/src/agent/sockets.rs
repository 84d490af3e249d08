//! Keeps the socket programs attached to the cgroup that the user chose, or detaches them.

use std::path::PathBuf;

use affinity_common::names::SOCKET_PROGRAMS;
use tracing::{info, warn};

use super::AgentError;
use crate::{
    attach::{
        AttachError,
        cgroup::{self, SocketPolicy},
    },
    load::Loaded,
    pins::PinDir,
    store::kernel::KernelStore,
};

/// How sockets are to be translated.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SocketOptions {
    /// Whether they are translated.
    pub policy: SocketPolicy,
    /// The cgroup of the processes; none: the root of cgroup v2.
    pub cgroup: Option<PathBuf>,
}

impl SocketOptions {
    /// Whether these options may lead to an attachment on this machine.
    #[must_use]
    pub fn may_attach(&self) -> bool {
        match self.policy {
            SocketPolicy::Off => false,
            SocketPolicy::On => true,
            SocketPolicy::Auto => self.cgroup.is_some() || cgroup::in_node_namespace().unwrap_or(false),
        }
    }
}

/// Attaches the programs or detaches them, as the options say. Under `auto` the log says why they are not attached. Returns the
/// cgroup that they are attached to.
///
/// # Errors
/// [`AgentError`]; under `auto` only if attachments cannot be listed or removed.
pub(super) fn reconcile(
    pins: &PinDir,
    options: &SocketOptions,
    loaded: &Loaded,
    store: &KernelStore,
) -> Result<Option<PathBuf>, AgentError> {
    match options.policy {
        SocketPolicy::Off => take_off(pins, store),
        SocketPolicy::On => attach(pins, options, loaded).map(Some),
        SocketPolicy::Auto => {
            if !options.may_attach() {
                info!("sockets: not translated at connect(), because this is not the node's own network namespace");
                return take_off(pins, store);
            }
            match attach(pins, options, loaded) {
                Ok(cgroup) => Ok(Some(cgroup)),
                Err(error) => {
                    warn!(
                        "sockets: not translated at connect(): {error}; connections of pods are translated on their devices"
                    );
                    take_off(pins, store)
                }
            }
        }
    }
}

fn attach(pins: &PinDir, options: &SocketOptions, loaded: &Loaded) -> Result<PathBuf, AgentError> {
    if let Some(refused) = &loaded.without_sockets {
        return Err(AgentError::NoSocketPrograms(refused.clone()));
    }
    let cgroup = options.cgroup.clone().or_else(cgroup::root).ok_or(AttachError::NoCgroup)?;
    let cgroup = cgroup::attach(pins, &cgroup)?;
    info!("sockets: translated at connect() for the processes of {}", cgroup.display());
    Ok(cgroup)
}

/// Removes the entries of sockets too, because no program sees any longer when sockets close.
fn take_off(pins: &PinDir, store: &KernelStore) -> Result<Option<PathBuf>, AgentError> {
    if !cgroup::detach(pins)?.is_empty() {
        info!("sockets: no longer translated at connect(); open connections keep their pods");
    }
    store.forget_sockets()?;
    Ok(None)
}

/// The socket programs, once they are attached.
#[derive(Debug)]
pub(super) struct Sockets {
    pins: PinDir,
    /// None if they are not attached.
    cgroup: Option<PathBuf>,
}

impl Sockets {
    pub(super) const fn new(pins: PinDir, cgroup: Option<PathBuf>) -> Self {
        Self { pins, cgroup }
    }

    /// Restores removed attachments.
    ///
    /// # Errors
    /// What cannot be attached, in one line.
    pub(super) fn repair(&self) -> Result<(), String> {
        let Some(cgroup) = &self.cgroup else { return Ok(()) };
        let attached = |pins: &PinDir| -> Result<usize, AttachError> {
            Ok(cgroup::attachments(pins)?.iter().filter(|attachment| attachment.cgroup != 0).count())
        };
        let repair = || -> Result<(), AttachError> {
            if attached(&self.pins)? < SOCKET_PROGRAMS.len() {
                cgroup::attach(&self.pins, cgroup)?;
                warn!("sockets: programs had been detached; attached them again to {}", cgroup.display());
            }
            Ok(())
        };
        repair().map_err(|error| format!("sockets: {error}"))
    }
}
