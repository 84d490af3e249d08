//! The clients of one service, collected from the sessions in bounded slices.
//!
//! Only the screen of a service needs them. A pass over a million sessions is split into slices, with time for keys and frames
//! in between. It keeps at most [`LIMIT`] rows that match the filter: the first ones in the requested order. All matching rows
//! are counted.

use std::{cmp::Ordering, mem};

use affinity_common::abi::SessionKey;

use super::list::Row;
use crate::{
    store::{
        StoreError,
        kernel::{Family, KernelStore, PinKey, Walk},
    },
    view::{Catalog, Client, ClientRef, ServicePins, SessionView},
};

/// The maximum number of listed clients.
pub const LIMIT: usize = 1_000;
/// Batches of sessions that one slice reads.
const SLICE_BATCHES: usize = 16;

/// A client of a service: a pin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientRow {
    /// The key of the pin.
    pub key: PinKey,
    /// The client, or the network that shares the pin.
    pub client: Client,
    /// For a network namespace: its name in listings.
    pub name: Option<String>,
    /// The pod's name, else its address.
    pub pod: String,
    /// When it was pinned to this pod: monotonic nanoseconds.
    pub created_ns: u64,
    /// When its timeout was last restarted: monotonic nanoseconds.
    pub last_used_ns: u64,
    /// Seconds left when it was read; 0: expired; `None`: it never expires.
    pub expires_in_s: Option<u64>,
    /// Why it was created.
    pub reason: &'static str,
}

/// The sort orders of clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClientOrder {
    /// Last used first.
    Idle,
    /// Newest pin first.
    Age,
    /// First to expire first.
    Expires,
    /// By address.
    Client,
    /// By the pod's name.
    Pod,
}

impl ClientRow {
    /// The client's name in listings.
    #[must_use]
    pub fn client_text(&self) -> String {
        ClientRef { key: self.client, name: self.name.as_deref(), addresses: &[] }.to_string()
    }
}

impl Row for ClientRow {
    type Key = PinKey;
    type Order = ClientOrder;
    const ORDERS: &'static [ClientOrder] =
        &[ClientOrder::Idle, ClientOrder::Age, ClientOrder::Expires, ClientOrder::Client, ClientOrder::Pod];

    fn key(&self) -> PinKey {
        self.key
    }

    fn matches(&self, filter: &str) -> bool {
        filter.is_empty()
            || self.pod.to_lowercase().contains(filter)
            || self.reason.contains(filter)
            || self.client_text().contains(filter)
    }

    fn compare(&self, other: &Self, order: ClientOrder) -> Ordering {
        let left = |row: &Self| row.expires_in_s.unwrap_or(u64::MAX);
        let first = match order {
            ClientOrder::Idle => other.last_used_ns.cmp(&self.last_used_ns),
            ClientOrder::Age => other.created_ns.cmp(&self.created_ns),
            ClientOrder::Expires => left(self).cmp(&left(other)),
            ClientOrder::Client => Ordering::Equal,
            ClientOrder::Pod => self.pod.cmp(&other.pod),
        };
        first.then_with(|| self.client.cmp(&other.client)).then_with(|| self.key.cmp(&other.key))
    }
}

/// Selects the clients to list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Query {
    /// Clients of this service.
    pub service: u32,
    /// Clients that match this text, in lower case.
    pub filter: String,
    /// Sorted in this order ...
    pub order: ClientOrder,
    /// ... or in reverse.
    pub reversed: bool,
}

/// The result of a query, so far.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Clients {
    /// The query.
    pub query: Query,
    /// The first rows, [`LIMIT`] at most.
    pub rows: Vec<ClientRow>,
    /// The number of matching clients, listed or not.
    pub matching: u64,
    /// The number of sessions, of all services, that were read.
    pub read: u64,
    /// Whether the pass is complete.
    pub complete: bool,
}

/// A pass over the sessions.
#[derive(Debug)]
pub(super) struct Scan {
    pins: ServicePins,
    stage: Stage,
    clients: Clients,
}

#[derive(Debug)]
enum Stage {
    V4(Walk),
    V6(Walk),
    Done,
}

impl Scan {
    pub(super) fn new(store: &KernelStore, catalog: &Catalog, query: Query) -> Self {
        let pins = catalog.service_pins(query.service);
        let clients = Clients { query, rows: Vec::new(), matching: 0, read: 0, complete: false };
        Self { pins, stage: Stage::V4(store.v4.sessions.walk()), clients }
    }

    /// Processes one more slice.
    pub(super) fn step(&mut self, store: &KernelStore, catalog: &Catalog) -> Result<(), StoreError> {
        for _ in 0..SLICE_BATCHES {
            self.stage = match mem::replace(&mut self.stage, Stage::Done) {
                Stage::V4(mut walk) => match self.batch(&store.v4.sessions, &mut walk, catalog)? {
                    true => Stage::V4(walk),
                    false => Stage::V6(store.v6.sessions.walk()),
                },
                Stage::V6(mut walk) => match self.batch(&store.v6.sessions, &mut walk, catalog)? {
                    true => Stage::V6(walk),
                    false => Stage::Done,
                },
                Stage::Done => {
                    self.clients.complete = true;
                    break;
                }
            };
        }
        self.keep_first();
        Ok(())
    }

    pub(super) fn clients(&self) -> &Clients {
        &self.clients
    }

    /// Processes one batch; false at the end of the walk.
    fn batch<A: Family>(
        &mut self,
        sessions: &crate::store::kernel::Table<SessionKey<A>, affinity_common::abi::Session>,
        walk: &mut Walk,
        catalog: &Catalog,
    ) -> Result<bool, StoreError>
    where
        PinKey: From<SessionKey<A>>,
    {
        let Some(batch) = sessions.next_batch(walk)? else { return Ok(false) };
        self.clients.read += batch.len() as u64;
        for (key, session) in batch {
            if self.pins.contain(key.scope, &session) {
                self.take(
                    key.into(),
                    &SessionView::new(catalog, &key, &session),
                    session.created_ns,
                    session.last_used_ns,
                );
            }
        }
        Ok(true)
    }

    fn take(&mut self, key: PinKey, view: &SessionView<'_>, created_ns: u64, last_used_ns: u64) {
        let row = ClientRow {
            key,
            client: view.client.key,
            name: view.client.key.netns().map(|_| view.client.to_string()),
            pod: view.backend.to_string(),
            created_ns,
            last_used_ns,
            expires_in_s: view.expires_in_seconds,
            reason: view.reason,
        };
        if row.matches(&self.clients.query.filter) {
            self.clients.matching += 1;
            self.clients.rows.push(row);
            // Sorts rarely, so that each row is cheap, however many there are.
            if self.clients.rows.len() >= 4 * LIMIT {
                self.keep_first();
            }
        }
    }

    fn keep_first(&mut self) {
        let Clients { query, rows, .. } = &mut self.clients;
        rows.sort_by(|one, other| {
            let order = one.compare(other, query.order);
            if query.reversed { order.reverse() } else { order }
        });
        rows.truncate(LIMIT);
    }
}
