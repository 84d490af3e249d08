//! When to try again: later after each failure, and not before the time that the API asks for.

use std::time::Duration;

use kube::Error;

/// The pause after the first failure, and the longest one.
const FIRST: Duration = Duration::from_millis(200);
const AT_MOST: Duration = Duration::from_secs(15);
/// The pause if the API receives too many requests and gives no time.
const TOO_MANY: Duration = Duration::from_secs(1);
/// The longest pause, whatever the API asks for.
const LONGEST: Duration = Duration::from_mins(5);

/// The number of failures since the last success.
#[derive(Debug)]
pub(super) struct Backoff {
    failures: u32,
    /// Spreads the nodes of a cluster: from 0 to 255.
    spread: u8,
}

impl Backoff {
    /// `seed` should differ from node to node.
    pub(super) fn new(seed: u32) -> Self {
        Self { failures: 0, spread: seed as u8 }
    }

    /// Records a success.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// The number of consecutive failures.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// How long to wait after one more failure; `error` is its cause, if known.
    pub(super) fn next(&mut self, error: Option<&Error>) -> Duration {
        let doubled = FIRST * (1 << self.failures.min(10));
        self.failures += 1;
        let spread = |pause: Duration| pause + pause * u32::from(self.spread) / 512;
        spread(doubled.min(AT_MOST)).max(asked_for(error))
    }
}

/// The pause that the API asks for.
fn asked_for(error: Option<&Error>) -> Duration {
    let Some(Error::Api(status)) = error else { return Duration::ZERO };
    match status.details.as_ref().map_or(0, |details| details.retry_after_seconds) {
        0 if status.code == 429 => TOO_MANY,
        seconds => Duration::from_secs(seconds.into()).min(LONGEST),
    }
}

#[cfg(test)]
mod tests {
    use kube::core::{Status, response::StatusDetails};

    use super::*;

    fn status(code: u16, retry_after_seconds: u32) -> Error {
        let details = StatusDetails { retry_after_seconds, ..serde_json::from_str("{}").expect("no field is needed") };
        Error::Api(Box::new(Status { details: Some(details), ..Status::failure("", "").with_code(code) }))
    }

    #[test]
    fn pauses_grow_to_a_bound_and_start_over() {
        let mut backoff = Backoff::new(0);
        let pauses: Vec<_> = (0..9).map(|_| backoff.next(None).as_millis()).collect();
        assert_eq!(pauses, [200, 400, 800, 1_600, 3_200, 6_400, 12_800, 15_000, 15_000]);
        backoff.reset();
        assert_eq!(backoff.next(None), FIRST);
    }

    #[test]
    fn nodes_reconnect_at_different_times() {
        let first = |seed| Backoff::new(seed).next(None);
        assert!(first(0) < first(100) && first(100) < first(255) && first(255) < FIRST * 3 / 2);
    }

    #[test]
    fn the_api_is_given_the_time_that_it_asks_for() {
        let after = |error: Error| Backoff::new(0).next(Some(&error));
        assert_eq!(after(status(429, 0)), TOO_MANY);
        assert_eq!(after(status(429, 7)), Duration::from_secs(7));
        assert_eq!(after(status(503, 3)), Duration::from_secs(3));
        assert_eq!(after(status(500, 0)), FIRST);
        assert_eq!(after(status(429, u32::MAX)), LONGEST);
    }
}
