//! Pins of either family, as operators handle them.

use affinity_common::abi::{EventKind, Reason, SessionKey, V4, V6};

use super::KernelStore;
use crate::store::StoreError;

/// The key of a pin of either family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum PinKey {
    /// In `sessions_v4`.
    V4(SessionKey<V4>),
    /// In `sessions_v6`.
    V6(SessionKey<V6>),
}

impl From<SessionKey<V4>> for PinKey {
    fn from(key: SessionKey<V4>) -> Self {
        Self::V4(key)
    }
}

impl From<SessionKey<V6>> for PinKey {
    fn from(key: SessionKey<V6>) -> Self {
        Self::V6(key)
    }
}

impl KernelStore {
    /// Removes a pin, and reports that an operator did; false where there is none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn unpin(&self, key: &PinKey, now_ns: u64) -> Result<bool, StoreError> {
        let (kind, reason) = (EventKind::Unpinned, Reason::OperatorPinned);
        let removed = match key {
            PinKey::V4(key) => self.remove_session(key, kind, reason, now_ns)?,
            PinKey::V6(key) => self.remove_session(key, kind, reason, now_ns)?,
        };
        Ok(removed.is_some())
    }
}
