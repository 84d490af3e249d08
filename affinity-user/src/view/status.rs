//! The age of the source's data from which the tables were made.

use std::time::Duration;

use affinity_common::abi::Status;
use serde::Serialize;

use super::{Clock, Moment};

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
    fn a_record_that_nobody_wrote_tells_nothing() {
        let clock = Clock { now_ns: 10_000_000_000, wall: "2026-01-02T03:04:05Z".parse().unwrap() };
        assert_eq!(StatusView::new(&Status::default(), &clock), None);
        let status = Status { started_ns: 1_000_000_000, source: SourceKind::Kubernetes as u32, ..Status::default() };
        let view = StatusView::new(&status, &clock).unwrap();
        assert_eq!((view.source, view.as_of, view.agent_started.age.as_secs()), ("kubernetes", None, 9));
        let view = StatusView::new(&Status { current_ns: 7_000_000_000, ..status }, &clock).unwrap();
        assert_eq!(view.as_of.map(|moment| moment.age.as_secs()), Some(3));
    }
}
