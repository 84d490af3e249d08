//! A start that fails leaves nothing attached and nothing pinned that was not there before.

use tracing::warn;

use super::AgentError;
use crate::{
    attach,
    load::{PinDir, Pinned},
};

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
        warn!("{error}: something that this start has attached may still be there; `affinity detach` takes it away");
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
