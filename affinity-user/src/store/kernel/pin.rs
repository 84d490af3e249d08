//! Pins of either family, for operators' commands.

use std::collections::BTreeSet;

use affinity_common::{
    abi::{Address, Direction, EventKind, Reason, SessionKey, SocketRole, V4, V6},
    headers::UDP,
};

use super::{Family, KernelStore};
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
    /// Removes a pin, and reports that an operator did this; false if there is none.
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

    /// Removes the datagram flows and socket entries of unpinned clients, so that the next datagram looks for a pin.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn forget_datagrams(&self, unpinned: &BTreeSet<PinKey>) -> Result<(), StoreError> {
        if unpinned.is_empty() {
            return Ok(());
        }
        self.forget_flows::<V4>(unpinned)?;
        self.forget_flows::<V6>(unpinned)?;
        let sockets: Vec<_> = self.sockets.iter().collect::<Result<_, _>>()?;
        for (key, socket) in sockets {
            let pin = SessionKey::new(socket.scope, socket.client, V6::BITS);
            if key.role != SocketRole::Connected as u8 && unpinned.contains(&PinKey::V6(pin)) {
                self.sockets.remove(&key)?;
            }
        }
        Ok(())
    }

    fn forget_flows<A: Family>(&self, unpinned: &BTreeSet<PinKey>) -> Result<(), StoreError>
    where
        PinKey: From<SessionKey<A>>,
    {
        let flows = &self.family::<A>().flows;
        let all: Vec<_> = flows.iter().collect::<Result<_, _>>()?;
        for (key, flow) in all {
            let pin = SessionKey::new(flow.scope, key.saddr, flow.prefix);
            let is_of_client = key.protocol == UDP && key.direction == Direction::Dnat as u8;
            if is_of_client && unpinned.contains(&pin.into()) {
                flows.remove(&key)?;
                flows.remove(&key.opposite(&flow.edit))?;
            }
        }
        Ok(())
    }
}
