//! Counters by reason.

use affinity_common::abi::REASONS;
use serde::Serialize;

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
