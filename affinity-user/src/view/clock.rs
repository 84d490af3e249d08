//! Times: the maps hold nanoseconds of the monotonic clock; users read wall-clock times and ages.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Serialize, Serializer};

use crate::sys::monotonic_ns;

/// One reading of both clocks, to convert monotonic to wall-clock times.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clock {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub now_ns: u64,
    /// The wall clock at the same time.
    pub wall: Timestamp,
}

impl Clock {
    /// Reads both clocks.
    #[must_use]
    pub fn now() -> Self {
        Self { now_ns: monotonic_ns(), wall: Timestamp::now() }
    }

    /// The wall-clock time of a monotonic time. Times that the programs wrote after this reading count as now.
    #[must_use]
    pub fn moment(&self, time_ns: u64) -> Moment {
        let age_ns = self.now_ns.saturating_sub(time_ns);
        let age = Duration::from_nanos(age_ns);
        let at = SignedDuration::try_from(age).and_then(|age| self.wall.checked_sub(age));
        Moment { at: at.unwrap_or(Timestamp::MIN), age }
    }
}

/// A point in time and how long ago it was. Serialises as RFC 3339 in UTC with milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Moment {
    /// By the wall clock.
    pub at: Timestamp,
    /// How long ago.
    pub age: Duration,
}

impl std::fmt::Display for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3}", self.at)
    }
}

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A duration in at most two units: `45s`, `2m10s`, `3h`, `1d4h`.
#[must_use]
pub fn short_duration(seconds: u64) -> String {
    const UNITS: [(u64, char); 4] = [(86_400, 'd'), (3_600, 'h'), (60, 'm'), (1, 's')];
    let Some(first) = UNITS.iter().position(|&(unit, _)| seconds >= unit) else { return "0s".to_owned() };
    let (unit, letter) = UNITS[first];
    let text = format!("{}{letter}", seconds / unit);
    match UNITS.get(first + 1) {
        Some(&(smaller, letter)) if seconds % unit / smaller > 0 => {
            format!("{text}{}{letter}", seconds % unit / smaller)
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_units() {
        let cases = [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (130, "2m10s"),
            (3_600, "1h"),
            (3_659, "1h"),
            (10_799, "2h59m"),
            (86_400, "1d"),
            (100_000, "1d3h"),
        ];
        for (seconds, text) in cases {
            assert_eq!(short_duration(seconds), text);
        }
    }

    #[test]
    fn monotonic_times_become_wall_times() {
        let clock = Clock { now_ns: 10_000_000_000, wall: "2026-01-02T03:04:05Z".parse().unwrap() };
        let moment = clock.moment(8_500_000_000);
        assert_eq!((moment.to_string().as_str(), moment.age.as_millis()), ("2026-01-02T03:04:03.500Z", 1_500));
        // Written by a program after the clock was read.
        assert_eq!(clock.moment(11_000_000_000).age.as_millis(), 0);
        // Every time in the past can be represented.
        assert_eq!(Clock { now_ns: u64::MAX, ..clock }.moment(0).to_string(), "1441-06-14T03:29:31.290Z");
    }

    #[test]
    fn both_clocks_go_forward() {
        let (one, two) = (Clock::now(), Clock::now());
        assert!(two.now_ns >= one.now_ns && one.now_ns > 0);
    }
}
