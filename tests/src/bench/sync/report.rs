//! The figures as a table or as JSON.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

/// What was measured.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) services: u32,
    pub(super) endpoints: u32,
    /// From nothing to ready, in seconds.
    pub(super) start_s: f64,
    /// From the maps that a killed agent left to ready, in seconds.
    pub(super) restart_s: f64,
    /// Resident memory of the agent.
    pub(super) memory_mib: u64,
    /// The peak.
    pub(super) memory_peak_mib: u64,
    pub(super) changes: u32,
    /// From an event to its effect; none without changes.
    pub(super) latency: Option<Latency>,
}

/// A distribution, in milliseconds.
#[derive(Serialize)]
pub(super) struct Latency {
    p50_ms: f64,
    p90_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

impl Latency {
    /// Of all samples; none if there are none.
    pub(super) fn of(mut samples: Vec<Duration>) -> Option<Self> {
        samples.sort_unstable();
        let last = samples.len().checked_sub(1)?;
        let at =
            |percent: usize| samples[(samples.len() * percent).div_ceil(100).saturating_sub(1)].as_secs_f64() * 1e3;
        Some(Self { p50_ms: at(50), p90_ms: at(90), p99_ms: at(99), max_ms: samples[last].as_secs_f64() * 1e3 })
    }
}

impl Report {
    /// Prints everything.
    pub(super) fn print(&self, json: bool) -> Result<()> {
        if json {
            println!("{}", serde_json::to_string_pretty(self)?);
            return Ok(());
        }
        println!("{} services, {} endpoints each", self.services, self.endpoints);
        println!("start to ready           {:>8.2} s", self.start_s);
        println!("start over kept maps     {:>8.2} s", self.restart_s);
        println!("memory of the agent      {:>8} MiB (peak {} MiB)", self.memory_mib, self.memory_peak_mib);
        if let Some(Latency { p50_ms, p90_ms, p99_ms, max_ms }) = &self.latency {
            println!("one changed endpoint, from the event to the kernel, {} times:", self.changes);
            println!("  p50 {p50_ms:.1} ms   p90 {p90_ms:.1} ms   p99 {p99_ms:.1} ms   max {max_ms:.1} ms");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples = |count: u64| (1..=count).rev().map(Duration::from_millis).collect();
        let Latency { p50_ms, p90_ms, p99_ms, max_ms } = Latency::of(samples(200)).expect("there are samples");
        assert_eq!([p50_ms, p90_ms, p99_ms, max_ms], [100.0, 180.0, 198.0, 200.0]);
        assert_eq!(Latency::of(samples(1)).map(|latency| latency.p50_ms), Some(1.0));
        assert!(Latency::of(Vec::new()).is_none());
    }
}
