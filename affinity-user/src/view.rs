//! The contents of the maps, as objects with names: `affinity get`, `dump` and `explain` print nothing else.
//!
//! A [`Catalog`] is one reading of the small tables. With it, entries of the large tables (sessions, flows) are turned into
//! views one at a time, so a listing of a million rows needs no more memory than a listing of one. Ids become names, monotonic
//! nanoseconds become wall-clock times, masked client addresses become CIDRs. Views borrow from their catalog.
//!
//! The JSON form of a view is stable: fields may be added, but none is renamed or removed within an ABI version.

mod address;
mod backend;
mod catalog;
mod clock;
mod device;
mod dump;
mod event;
mod explanation;
#[cfg(test)]
pub(crate) mod fixture;
mod flow;
mod question;
mod service;
mod session;
mod situation;

use std::time::Duration;

use affinity_common::abi::{REASONS, Status};
use serde::Serialize;

pub use address::{Client, ClientRef, Endpoint, NETNS, NODE, protocol_name};
pub(crate) use address::{from_mapped, ip, mapped};
pub use backend::{BackendState, BackendView, PodRef};
pub(crate) use catalog::KnownNamespace;
pub use catalog::{Catalog, Policy};
pub use clock::{Clock, Moment, short_duration};
pub use device::DeviceView;
pub use dump::{Dump, DumpOptions};
pub use event::EventView;
pub use explanation::{Candidate, ExplainedFrontend, Explanation, Step, explain};
pub use flow::{FlowState, FlowView};
pub use question::{FrontendTables, Question};
pub(crate) use service::policy_text;
pub use service::{Endpoints, FrontendView, LiveSessions, ServiceView};
pub use session::{ServicePins, SessionView, expires_in_s};
pub use situation::Situation;

/// How often a reason occurred.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct CounterView {
    /// The reason.
    pub reason: &'static str,
    /// Packets; for incidents, occurrences.
    pub packets: u64,
    /// What the reason means.
    pub text: &'static str,
}

impl CounterView {
    /// Every reason, in the order of its counter; `packets` is the `counters` map, summed over CPUs.
    #[must_use]
    pub fn all(packets: &[u64]) -> Vec<Self> {
        REASONS
            .iter()
            .map(|&reason| Self {
                reason: reason.name(),
                packets: packets.get(usize::from(reason as u8)).copied().unwrap_or(0),
                text: reason.text(),
            })
            .collect()
    }
}

/// The agent's status.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusView {
    /// `directory` or `kubernetes`.
    pub source: &'static str,
    /// When the source's content was last completely known; null: never.
    pub as_of: Option<Moment>,
    /// When the agent that wrote this was started.
    pub agent_started: Moment,
}

impl StatusView {
    /// A source that was silent for this long is worth a check: an API sends something every minute.
    pub const STALE: Duration = Duration::from_mins(3);

    /// `None` if no agent has written the record yet.
    #[must_use]
    pub fn new(status: &Status, clock: &Clock) -> Option<Self> {
        Some(Self {
            source: status.kind()?.name(),
            as_of: (status.current_ns != 0).then(|| clock.moment(status.current_ns)),
            agent_started: clock.moment(status.started_ns),
        })
    }
}

#[cfg(test)]
mod tests {
    use affinity_common::abi::SourceKind;

    use super::*;

    #[test]
    fn an_unwritten_status_record_has_no_view() {
        let clock = Clock { now_ns: 10_000_000_000, wall: "2026-01-02T03:04:05Z".parse().unwrap() };
        assert_eq!(StatusView::new(&Status::default(), &clock), None);
        let status = Status { started_ns: 1_000_000_000, source: SourceKind::Kubernetes as u32, ..Status::default() };
        let view = StatusView::new(&status, &clock).unwrap();
        assert_eq!((view.source, view.as_of, view.agent_started.age.as_secs()), ("kubernetes", None, 9));
        let view = StatusView::new(&Status { current_ns: 7_000_000_000, ..status }, &clock).unwrap();
        assert_eq!(view.as_of.map(|moment| moment.age.as_secs()), Some(3));
    }
}
