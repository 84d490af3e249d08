//! Keeps the programs for sockets on the cgroup that the user chose, or takes them off.

use std::path::PathBuf;

use tracing::{info, warn};

use super::AgentError;
use crate::{
    attach::{
        AttachError,
        cgroup::{self, SocketPolicy},
    },
    load::{Loaded, PinDir},
    store::kernel::KernelStore,
};

/// How sockets are to be translated.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SocketOptions {
    /// Whether.
    pub policy: SocketPolicy,
    /// For the processes below this cgroup; none: the root of version 2.
    pub cgroup: Option<PathBuf>,
}

/// Attaches the programs, or takes them off, as the options say; under `auto` the log tells why not.
///
/// # Errors
/// [`AgentError`]; under `auto` only where what is attached cannot be listed or taken off.
pub(super) fn reconcile(
    pins: &PinDir,
    options: &SocketOptions,
    loaded: &Loaded,
    store: &KernelStore,
) -> Result<(), AgentError> {
    match options.policy {
        SocketPolicy::Off => take_off(pins, store),
        SocketPolicy::On => attach(pins, options, loaded),
        SocketPolicy::Auto => {
            if options.cgroup.is_none() && !cgroup::in_node_namespace().unwrap_or(false) {
                info!("sockets: not translated, because this is not the node's own network namespace");
                return take_off(pins, store);
            }
            if let Err(error) = attach(pins, options, loaded) {
                warn!("sockets: not translated: {error}; connections of pods are translated on their devices");
                return take_off(pins, store);
            }
            Ok(())
        }
    }
}

fn attach(pins: &PinDir, options: &SocketOptions, loaded: &Loaded) -> Result<(), AgentError> {
    if let Some(refused) = &loaded.without_sockets {
        return Err(AgentError::NoSocketPrograms(refused.clone()));
    }
    let cgroup = options.cgroup.clone().or_else(cgroup::root).ok_or(AttachError::NoCgroup)?;
    cgroup::attach(pins, &cgroup)?;
    info!("sockets: translated for processes of {}", cgroup.display());
    Ok(())
}

/// What is remembered of sockets is forgotten as well: nobody would tell when they close.
fn take_off(pins: &PinDir, store: &KernelStore) -> Result<(), AgentError> {
    if !cgroup::detach(pins)?.is_empty() {
        info!("sockets: no longer translated; connections that were stay where they are");
    }
    store.forget_sockets()?;
    Ok(())
}
