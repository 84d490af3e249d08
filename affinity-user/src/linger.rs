//! How long a backend that has left every pool keeps its index, and with it its connections. Pure functions.
//!
//! Such a backend *lingers*. Its pod may still live: the Service's selector was switched, the endpoint moves from one slice to
//! another, or the Service is deleted and created again. So its connections continue, and if the backend comes back, its pins
//! are still there. It stops lingering when no connection needs it, when it no longer answers, or when it has sent nothing for
//! long. (A pod that is known to be dead does not linger: see [`crate::plan`].)

use std::time::Duration;

/// The limits of lingering.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// How long backends, ids and pins are kept in case they come back, whether or not anything uses them.
    pub gap: Duration,
    /// How long a backend may linger without a packet from its pod.
    pub linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { gap: Duration::from_secs(10), linger: Duration::from_mins(10) }
    }
}

/// A pod is silent if its clients have sent for this long, more than once, and it has not answered.
pub const SILENT_AFTER: Duration = Duration::from_secs(5);

/// The records of the two directions are each updated once a second, so they may differ by this much although each packet was
/// answered at once: one second, and the time that a client takes to acknowledge.
const TOLERANCE: Duration = Duration::from_millis(1_500);

/// The observed traffic of the connections to a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    /// The backend's generation.
    pub generation: u32,
    /// Connections with a record left: late packets may still come of those that have ended.
    pub connections: u64,
    /// Those of them that are open.
    pub open: u64,
    /// When a client last sent something, monotonic nanoseconds.
    pub asked_ns: u64,
    /// When the pod last sent something.
    pub answered_ns: u64,
    /// Sockets of this machine that have retransmitted repeatedly, and got no answer.
    pub unanswered_sockets: u64,
}

/// Why a backend no longer lingers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// It has no connection.
    Unused,
    /// It does not answer.
    Silent,
    /// Its pod has sent nothing for [`Limits::linger`].
    Idle,
}

impl End {
    /// The text for the log.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Unused => "it has no open connection",
            Self::Silent => "it does not answer, so its connections are reset",
            Self::Idle => "it has sent no packet for the time of --linger",
        }
    }
}

/// A backend that lingers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lingerer {
    since_ns: u64,
    /// Since when no slice has listed it.
    unlisted_since_ns: u64,
    /// When the first unanswered packet came; none while the pod answers.
    unanswered_since_ns: Option<u64>,
}

impl Lingerer {
    /// Starts to linger now.
    #[must_use]
    pub const fn new(now_ns: u64) -> Self {
        Self { since_ns: now_ns, unlisted_since_ns: now_ns, unanswered_since_ns: None }
    }

    /// Evaluates the traffic of its connections (none before the first look), and returns the reason if it lingers no longer. A
    /// pod that a slice lists is not judged silent or idle: the slice says that it lives.
    pub fn look(&mut self, traffic: Option<&Traffic>, is_listed: bool, limits: Limits, now_ns: u64) -> Option<End> {
        if is_listed {
            (self.unlisted_since_ns, self.unanswered_since_ns) = (now_ns, None);
        }
        let traffic = traffic?;
        if traffic.connections == 0 && has_passed(limits.gap, self.since_ns, now_ns) {
            return Some(End::Unused);
        }
        if self.is_silent(traffic, now_ns) {
            return Some(End::Silent);
        }
        let last_sign_ns = self.unlisted_since_ns.max(traffic.answered_ns);
        has_passed(limits.linger, last_sign_ns, now_ns).then_some(End::Idle)
    }

    fn is_silent(&mut self, traffic: &Traffic, now_ns: u64) -> bool {
        let &Traffic { asked_ns, answered_ns, unanswered_sockets, .. } = traffic;
        let is_unanswered = has_passed(TOLERANCE, answered_ns, asked_ns) && asked_ns > self.unlisted_since_ns;
        if !is_unanswered {
            self.unanswered_since_ns = None;
            // The sockets have waited that long themselves. If a socket's own network fails, answers to other clients show
            // that.
            return unanswered_sockets > 0 && has_passed(SILENT_AFTER, self.unlisted_since_ns.max(answered_ns), now_ns);
        }
        let since_ns = *self.unanswered_since_ns.get_or_insert(asked_ns);
        asked_ns > since_ns && has_passed(SILENT_AFTER, since_ns, now_ns)
    }
}

const fn has_passed(duration: Duration, since_ns: u64, now_ns: u64) -> bool {
    now_ns.saturating_sub(since_ns) as u128 >= duration.as_nanos()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const START_S: u64 = 10_000;
    const LIMITS: Limits = Limits { gap: Duration::from_secs(10), linger: Duration::from_mins(10) };

    /// One open connection; times in seconds since the backend left.
    fn traffic(asked_s: f64, answered_s: f64) -> Traffic {
        let at = |s: f64| START_S * SECOND - 3600 * SECOND + ((s + 3600.0) * 1e9) as u64;
        let (asked_ns, answered_ns) = (at(asked_s), at(answered_s));
        Traffic { generation: 1, connections: 1, open: 1, asked_ns, answered_ns, unanswered_sockets: 0 }
    }

    fn lingerer() -> Lingerer {
        Lingerer::new(START_S * SECOND)
    }

    fn look(lingerer: &mut Lingerer, traffic: &Traffic, at_s: u64) -> Option<End> {
        lingerer.look(Some(traffic), false, LIMITS, (START_S + at_s) * SECOND)
    }

    #[test]
    fn without_connections_it_lingers_for_the_gap() {
        let mut lingerer = lingerer();
        let none = Traffic::default();
        assert_eq!(look(&mut lingerer, &none, 9), None);
        assert_eq!(look(&mut lingerer, &none, 10), Some(End::Unused));
        assert_eq!(lingerer.look(None, false, LIMITS, (START_S + 60) * SECOND), None, "before the first look");
    }

    #[test]
    fn with_connections_it_lingers_until_they_are_idle() {
        let mut lingerer = lingerer();
        assert_eq!(look(&mut lingerer, &traffic(-50.0, -50.0), 599), None);
        assert_eq!(look(&mut lingerer, &traffic(599.0, 598.0), 700), None);
        assert_eq!(look(&mut lingerer, &traffic(5_000.0, 5_000.5), 5_599), None);
        assert_eq!(look(&mut lingerer, &traffic(5_000.0, 5_000.5), 5_601), Some(End::Idle));
    }

    #[test]
    fn a_backend_that_answers_no_repeated_request_is_silent() {
        // A request after a long rest, and its retransmissions by the client's kernel.
        let mut lingerer = lingerer();
        assert_eq!(look(&mut lingerer, &traffic(20.0, -300.0), 21), None);
        assert_eq!(look(&mut lingerer, &traffic(21.4, -300.0), 22), None);
        assert_eq!(look(&mut lingerer, &traffic(23.0, -300.0), 24), None);
        assert_eq!(look(&mut lingerer, &traffic(23.0, -300.0), 25), Some(End::Silent));
    }

    #[test]
    fn one_unanswered_packet_is_not_silence() {
        let mut lingerer = lingerer();
        for at_s in 21..60 {
            assert_eq!(look(&mut lingerer, &traffic(20.0, -300.0), at_s), None);
        }
        assert_eq!(look(&mut lingerer, &traffic(59.0, 59.1), 60), None);
    }

    #[test]
    fn delayed_updates_of_records_are_not_silence() {
        let mut lingerer = lingerer();
        for at_s in 1..100 {
            assert_eq!(look(&mut lingerer, &traffic(at_s as f64, at_s as f64 - 1.2), at_s), None);
        }
    }

    #[test]
    fn packets_from_before_it_left_are_ignored() {
        let mut lingerer = lingerer();
        for at_s in 1..100 {
            assert_eq!(look(&mut lingerer, &traffic(-1.0, -30.0), at_s), None);
        }
    }

    #[test]
    fn backends_listed_in_a_slice_are_not_checked() {
        let mut lingerer = lingerer();
        for at_s in 0..1_000 {
            let now_ns = (START_S + at_s) * SECOND;
            let unanswered = traffic(at_s as f64, -300.0);
            assert_eq!(lingerer.look(Some(&unanswered), true, LIMITS, now_ns), None);
        }
        let none = Traffic::default();
        assert_eq!(lingerer.look(Some(&none), true, LIMITS, (START_S + 1_000) * SECOND), Some(End::Unused));
    }

    #[test]
    fn an_unanswered_socket_counts_unless_others_are_answered() {
        let mut lingerer = lingerer();
        let unanswered = Traffic { unanswered_sockets: 1, ..traffic(-1.0, -1.0) };
        assert_eq!(look(&mut lingerer, &unanswered, 4), None);
        assert_eq!(look(&mut lingerer, &unanswered, 5), Some(End::Silent));
        let others_are_answered = Traffic { unanswered_sockets: 1, ..traffic(3.0, 3.0) };
        assert_eq!(look(&mut lingerer, &others_are_answered, 5), None);
    }
}
