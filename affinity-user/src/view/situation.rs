//! The entries of the large tables for a question, copied: a client's pins, its connection, and the load of the pods.

use std::collections::BTreeMap;

use affinity_common::abi::{Address, Direction, Flow, FlowKey, Foreign, Session, SessionKey};

use super::{
    Catalog, Question,
    question::{FrontendTables, pool_backends, session_keys},
};
use crate::store::{
    StoreError,
    kernel::{Family, KernelStore, filter_word},
};

/// The entries of the large tables for a question.
#[derive(Clone, Debug)]
pub struct Situation<A: Address> {
    /// Whether the filter lets the packet in.
    pub in_filter: bool,
    /// The client's pins in the scopes of the frontend.
    pub sessions: BTreeMap<SessionKey<A>, Session>,
    /// The flow that the packet belongs to.
    pub flow: Option<Flow<A>>,
    /// The pin of that flow; it may be in a scope that the frontend had before.
    pub flow_pin: Option<(SessionKey<A>, Session)>,
    /// The connection to no frontend, if the packet would be a reply of it.
    pub foreign: Option<Foreign>,
    /// Whether `flow` has a source address of the node.
    pub is_masqueraded: bool,
    /// Live sessions of the pool's backends.
    pub loads: BTreeMap<u32, u64>,
}

impl<A: Address + FrontendTables> Situation<A> {
    /// The situation in a dataplane that has seen no packet yet.
    #[must_use]
    pub fn untouched(catalog: &Catalog, question: &Question) -> Self {
        Self {
            in_filter: question.is_frontend::<A>(catalog),
            sessions: BTreeMap::new(),
            flow: None,
            flow_pin: None,
            foreign: None,
            is_masqueraded: false,
            loads: BTreeMap::new(),
        }
    }
}

impl<A: Family + FrontendTables> Situation<A> {
    /// The situation in a running dataplane.
    ///
    /// # Errors
    /// [`StoreError`] if a map could not be read.
    pub fn of_kernel(store: &KernelStore, catalog: &Catalog, question: &Question) -> Result<Self, StoreError> {
        let tables = store.family::<A>();
        let mut sessions = BTreeMap::new();
        for key in session_keys::<A>(catalog, question) {
            if let Some(session) = tables.sessions.get(&key)? {
                sessions.insert(key, session);
            }
        }
        let (word, bit) = filter_word(Direction::Dnat, question.filter_bit());
        let backends = pool_backends::<A>(catalog, question).into_iter().filter(|&index| index < store.loads.len());
        let flow = if question.from_port.is_some() { tables.flows.get(&question.key())? } else { None };
        let pin_key = flow.filter(|flow| flow.scope != 0);
        let pin_key = pin_key.map(|flow| SessionKey::new(flow.scope, question.key::<A>().saddr, flow.prefix));
        let flow_pin = match pin_key {
            Some(key) => tables.sessions.get(&key)?.map(|pin| (key, pin)),
            None => None,
        };
        let outward = flow.map(|flow| FlowKey::translated(&flow.edit, question.protocol, Direction::Snat));
        Ok(Self {
            in_filter: store.filter.load_u64(word) & bit != 0,
            sessions,
            flow,
            flow_pin,
            foreign: if question.from_port.is_some() { tables.foreign.get(&question.key())? } else { None },
            is_masqueraded: outward.map(|outward| tables.flows.get(&outward)).transpose()?.flatten().is_some(),
            loads: backends
                .map(|index| (index, store.loads.load_u64(index).cast_signed().max(0).cast_unsigned()))
                .collect(),
        })
    }
}
