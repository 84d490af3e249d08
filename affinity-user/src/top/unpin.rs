//! Unpins on request of an operator: one client at once, all clients of a service in slices.

use std::collections::BTreeSet;

use affinity_common::abi::{Session, SessionKey};

use crate::{
    store::{
        StoreError,
        kernel::{Family, KernelStore, PinKey, Table, Walk},
    },
    sys::monotonic_ns,
    view::{Catalog, ServicePins},
};

/// The number of session batches in one slice.
const SLICE_BATCHES: usize = 8;

/// What to unpin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// One client.
    Client {
        /// Its pin.
        key: PinKey,
        /// Its name on the screen.
        client: String,
        /// The service's name.
        service: String,
    },
    /// All clients.
    Service {
        /// The service's id.
        id: u32,
        /// Its name.
        service: String,
        /// The group with other services that lose the pin as well.
        group: Option<String>,
    },
}

/// Unpins all clients of a service.
#[derive(Debug)]
pub(super) struct Unpin {
    pins: ServicePins,
    service: String,
    v4: Option<Walk>,
    v6: Option<Walk>,
    unpinned: BTreeSet<PinKey>,
}

impl Unpin {
    pub(super) fn new(store: &KernelStore, catalog: &Catalog, id: u32, service: String) -> Self {
        let (v4, v6) = (Some(store.v4.sessions.walk()), Some(store.v6.sessions.walk()));
        Self { pins: catalog.service_pins(id), service, v4, v6, unpinned: BTreeSet::new() }
    }

    /// Processes one slice; false if nothing is left to do.
    pub(super) fn step(&mut self, store: &KernelStore) -> Result<bool, StoreError> {
        for _ in 0..SLICE_BATCHES {
            if let Some(mut walk) = self.v4.take() {
                self.v4 = self.batch(store, &store.v4.sessions, &mut walk)?.then_some(walk);
            } else if let Some(mut walk) = self.v6.take() {
                self.v6 = self.batch(store, &store.v6.sessions, &mut walk)?.then_some(walk);
            } else {
                store.forget_datagrams(&self.unpinned)?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn batch<A: Family>(
        &mut self,
        store: &KernelStore,
        sessions: &Table<SessionKey<A>, Session>,
        walk: &mut Walk,
    ) -> Result<bool, StoreError>
    where
        PinKey: From<SessionKey<A>>,
    {
        let Some(batch) = sessions.next_batch(walk)? else { return Ok(false) };
        for (key, session) in batch {
            if self.pins.contain(key.scope, &session) && store.unpin(&key.into(), monotonic_ns())? {
                self.unpinned.insert(key.into());
            }
        }
        Ok(true)
    }

    /// The message about the progress.
    pub(super) fn progress(&self) -> String {
        let count = self.unpinned.len();
        let clients = if count == 1 { "client" } else { "clients" };
        format!("unpinned {count} {clients} of {}", self.service)
    }
}
