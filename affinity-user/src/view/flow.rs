//! Connections that are translated.

use std::borrow::Cow;

use affinity_common::{
    abi::{Address, Direction, FLOW_FOREIGN, FLOW_SHADOW, Flow, FlowKey},
    state::Phase,
};
use serde::Serialize;

use super::{Catalog, Endpoint, Moment, PodRef, protocol_name};

/// The state of a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowState {
    /// TCP: the handshake is not complete.
    HalfOpen,
    /// TCP: the handshake is complete. UDP: there are datagrams in both directions.
    Open,
    /// One side has sent FIN.
    Closing,
    /// Both have, or one has sent RST.
    Closed,
    /// UDP: there was no reply to the client's datagrams yet.
    Unanswered,
    /// Decided in shadow mode: another proxy translates it.
    Shadow,
}

impl FlowState {
    /// From a record's bits.
    #[must_use]
    pub fn new(protocol: u8, state: u8) -> Self {
        if state & FLOW_SHADOW != 0 {
            return Self::Shadow;
        }
        match Phase::of(protocol, state) {
            Phase::HalfOpen => Self::HalfOpen,
            Phase::Open | Phase::Answered => Self::Open,
            Phase::Closing => Self::Closing,
            Phase::Closed => Self::Closed,
            Phase::Unanswered => Self::Unanswered,
        }
    }

    /// The state of a connection to no frontend: only its beginning and its end are known.
    #[must_use]
    pub fn of_foreign(protocol: u8, state: u32) -> Self {
        match Self::new(protocol, state as u8) {
            Self::HalfOpen | Self::Unanswered => Self::Open,
            state @ (Self::Open | Self::Closing | Self::Closed | Self::Shadow) => state,
        }
    }

    /// The name in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::HalfOpen => "half-open",
            Self::Open => "open",
            Self::Closing => "closing",
            Self::Closed => "closed",
            Self::Unanswered => "unanswered",
            Self::Shadow => "shadow",
        }
    }
}

/// A connection, in the client's direction.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowView<'a> {
    /// The service, `namespace/name`.
    pub service: Cow<'a, str>,
    /// `TCP` or `UDP`.
    pub protocol: &'static str,
    /// The client's address and port.
    pub client: Endpoint,
    /// The frontend that the client connected to.
    pub frontend: Endpoint,
    /// The pod.
    pub backend: PodRef<'a>,
    /// The pod's address and port.
    pub translated: Endpoint,
    /// Its state.
    pub state: FlowState,
    /// When it began.
    pub created: Moment,
    /// When a packet last passed, within a second.
    pub last_used: Moment,
}

impl<'a> FlowView<'a> {
    /// An entry of `flows_v4` or `flows_v6`; `None` for the record of replies, which contains the same, and for a connection to
    /// no frontend.
    #[must_use]
    pub fn new<A: Address>(catalog: &'a Catalog, key: &FlowKey<A>, flow: &Flow<A>) -> Option<Self> {
        (key.direction == Direction::Dnat as u8 && flow.flags & FLOW_FOREIGN == 0).then(|| Self {
            service: catalog.service_of_pool(flow.pool),
            protocol: protocol_name(key.protocol),
            client: Endpoint::new(key.saddr, key.sport),
            frontend: Endpoint::new(key.daddr, key.dport),
            backend: catalog.backend(flow.backend),
            translated: Endpoint::new(flow.edit.daddr, flow.edit.dport),
            state: FlowState::new(key.protocol, flow.state),
            created: catalog.clock.moment(flow.created_ns),
            last_used: catalog.clock.moment(flow.last_used_ns),
        })
    }
}
