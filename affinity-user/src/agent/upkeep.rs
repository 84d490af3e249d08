//! What is pinned stays as it should be. A start that fails leaves nothing attached and nothing pinned that was not there before.
//!
//! While the agent runs, it notices within seconds when a pin of this agent is removed or replaced, and restores it.
//! The agent holds every map and program open, so a removed pin can be restored without loss. A pin that leads to something
//! else belongs to another dataplane. The agent cannot repair that; the probes report it.

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use affinity_common::names;
use tracing::warn;

use super::AgentError;
use crate::{
    attach,
    pins::{PinDir, Pinned},
    sys::{self, Map, SysError},
};

/// A map or program that this agent uses.
#[derive(Debug)]
struct PinnedObject {
    path: PathBuf,
    id: u32,
    fd: OwnedFd,
    is_map: bool,
}

/// What this agent has pinned.
#[derive(Debug)]
pub(super) struct Upkeep {
    pins: PinDir,
    held: Vec<PinnedObject>,
}

impl Upkeep {
    /// Opens everything that is pinned, right after a load.
    ///
    /// # Errors
    /// [`AgentError`] if a pin cannot be opened.
    pub(super) fn new(pins: &PinDir) -> Result<Self, AgentError> {
        let maps = names::MAPS.iter().map(|name| (pins.map(name), true));
        let programs = pins.list_programs()?.into_iter().map(|path| (path, false));
        let open = |(path, is_map): (PathBuf, bool)| {
            let fd = sys::obj_get(&path)?;
            let id = id(&fd, is_map)?;
            Ok::<_, SysError>(PinnedObject { path, id, fd, is_map })
        };
        Ok(Self { pins: pins.clone(), held: maps.chain(programs).map(open).collect::<Result<_, _>>()? })
    }

    /// Checks every pin, and restores removed ones. Returns their names.
    ///
    /// # Errors
    /// What cannot be repaired, in one line.
    pub(super) fn repair(&self) -> Result<Vec<String>, String> {
        let mut repaired = Vec::new();
        for PinnedObject { path, id: ours, fd, is_map } in &self.held {
            match sys::obj_get(path) {
                Ok(pinned) => match id(&pinned, *is_map) {
                    Ok(id) if id == *ours => {}
                    _ => {
                        return Err(format!(
                            "{} was replaced by another process, which has loaded its own dataplane: restart the agent",
                            path.display()
                        ));
                    }
                },
                Err(error) if error.is_not_found() => {
                    self.pins.create().map_err(|error| error.to_string())?;
                    sys::obj_pin(fd.as_fd(), path)
                        .map_err(|error| format!("a pin was removed and cannot be restored: {error}"))?;
                    let name = path.file_name().unwrap_or_default();
                    repaired.push(name.to_string_lossy().into_owned());
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        if fs::metadata(self.pins.links()).is_err() {
            self.pins.create().map_err(|error| error.to_string())?;
        }
        Ok(repaired)
    }
}

fn id(fd: &OwnedFd, is_map: bool) -> Result<u32, SysError> {
    if is_map {
        let copy = fd.try_clone().map_err(|error| SysError::new("dup", "map", error))?;
        return Ok(Map::from_fd(copy, "pinned")?.info().id);
    }
    Ok(sys::prog_info(fd.as_fd())?.id)
}

/// Runs a start. If it fails, what it has attached and pinned is removed again.
///
/// # Errors
/// The error of the start.
pub(super) async fn all_or_nothing<T>(
    pins: &PinDir,
    start: impl Future<Output = Result<T, AgentError>>,
) -> Result<T, AgentError> {
    let before = pins.pinned()?;
    let outcome = start.await;
    if outcome.is_err()
        && let Err(error) = undo(pins, &before)
    {
        warn!("after a failed start, programs could not be detached: {error}; remove them with `affinity detach`");
    }
    outcome
}

/// A dataplane that existed before keeps its maps, and the programs that are now in its links: they are newer, or the same.
fn undo(pins: &PinDir, before: &Pinned) -> Result<(), AgentError> {
    attach::detach_new(pins, before)?;
    if !before.has_maps() {
        pins.roll_back(before)?;
    }
    Ok(())
}
