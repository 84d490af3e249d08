//! Connections that are being translated.

use std::borrow::Cow;

use affinity_common::abi::{Address, Direction, FLOW_CLOSED, FLOW_SHADOW, Flow, FlowKey};
use serde::Serialize;

use super::{BackendRef, Catalog, Endpoint, Moment, protocol_name};

/// How far a connection's end has come.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowState {
    /// No end in sight; UDP stays here.
    Open,
    /// One side has sent FIN.
    Closing,
    /// Both have, or one has sent RST.
    Closed,
    /// Decided in shadow mode: another proxy translates it.
    Shadow,
}

impl FlowState {
    /// From a record's bits.
    #[must_use]
    pub fn new(state: u8) -> Self {
        match state {
            0 => Self::Open,
            state if state & FLOW_SHADOW != 0 => Self::Shadow,
            state if state & FLOW_CLOSED != 0 => Self::Closed,
            _ => Self::Closing,
        }
    }

    /// As in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Closing => "closing",
            Self::Closed => "closed",
            Self::Shadow => "shadow",
        }
    }
}

/// A connection, seen from its client.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowView<'a> {
    /// The service, `namespace/name`.
    pub service: Cow<'a, str>,
    /// `TCP` or `UDP`.
    pub protocol: &'static str,
    /// The client's end.
    pub client: Endpoint,
    /// What the client dialled.
    pub frontend: Endpoint,
    /// The pod.
    pub backend: BackendRef<'a>,
    /// The pod's end.
    pub translated: Endpoint,
    /// How far its end has come.
    pub state: FlowState,
    /// When it began.
    pub created: Moment,
    /// When a packet last passed, to within a second.
    pub last_used: Moment,
}

impl<'a> FlowView<'a> {
    /// An entry of `flows_v4` or `flows_v6`; `None` for the record of replies, which says the same again.
    #[must_use]
    pub fn new<A: Address>(catalog: &'a Catalog, key: &FlowKey<A>, flow: &Flow<A>) -> Option<Self> {
        (key.direction == Direction::Forward as u8).then(|| Self {
            service: catalog.service_name(flow.service),
            protocol: protocol_name(key.protocol),
            client: Endpoint::new(key.saddr, key.sport),
            frontend: Endpoint::new(key.daddr, key.dport),
            backend: catalog.backend(flow.backend, flow.generation),
            translated: Endpoint::new(flow.edit.daddr, flow.edit.dport),
            state: FlowState::new(flow.state),
            created: catalog.clock.moment(flow.created_ns),
            last_used: catalog.clock.moment(flow.last_used_ns),
        })
    }
}
