//! The agent's status record, in the `status` map: it outlives the agent.

use std::time::Duration;

use affinity_common::{
    abi::{SourceKind, Status},
    names,
};

use crate::{
    load::{PinDir, monotonic_ns},
    source::{Source, View},
    store::{StoreError, kernel::Table},
};

/// How often it is written, at most.
pub(super) const TELL_EVERY: Duration = Duration::from_secs(1);

/// Writes the record.
pub(super) struct StatusWriter {
    table: Table<u32, Status>,
    view: View,
    told: Status,
}

impl StatusWriter {
    /// Takes over the record. What a former agent knew of the source stays until this one has newer data.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(super) fn new(pins: &PinDir, source: &Source, view: View) -> Result<Self, StoreError> {
        let table: Table<u32, Status> = Table::open(&pins.maps(), names::STATUS)?;
        let former = table.get(&0)?.unwrap_or_default();
        let kind = match source {
            Source::Directory { .. } => SourceKind::Directory,
            Source::Kubernetes(_) => SourceKind::Kubernetes,
        };
        let told = Status { started_ns: monotonic_ns(), source: kind as u32, ..former };
        table.put(&0, &told)?;
        Ok(Self { table, view, told })
    }

    /// Writes how current the view is. Call it only once a snapshot is published: before that, the tables do not have the view.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(super) fn tell(&mut self) -> Result<(), StoreError> {
        let status = Status { current_ns: self.view.current_ns().unwrap_or(self.told.current_ns), ..self.told };
        if status != self.told {
            self.table.put(&0, &status)?;
            self.told = status;
        }
        Ok(())
    }
}
