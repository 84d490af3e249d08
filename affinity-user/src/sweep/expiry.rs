//! Decides whether sessions and flows have expired. Pure functions.

use std::time::Duration;

use affinity_common::{
    abi::{Session, Timer},
    session::is_fresh,
    state::Phase,
};

/// A TCP connection with an incomplete handshake: as long as a client retries with default settings.
pub const HALF_OPEN_FLOW: Duration = Duration::from_secs(60);
/// A TCP connection that both ends have closed, or that one has reset: late packets may still arrive
/// (`nf_conntrack_tcp_timeout_time_wait`).
pub const CLOSED_FLOW: Duration = Duration::from_secs(120);
/// A TCP connection that one end has closed; the other end may still send.
pub const CLOSING_FLOW: Duration = Duration::from_mins(10);
/// An open TCP connection: idle for a day.
pub const IDLE_TCP_FLOW: Duration = Duration::from_hours(24);
/// Datagrams without an answer (`nf_conntrack_udp_timeout`).
pub const UNANSWERED_UDP_FLOW: Duration = Duration::from_secs(30);
/// Datagrams in both directions.
pub const IDLE_UDP_FLOW: Duration = Duration::from_secs(180);
/// A flow to a backend that has gone: its client was rejected, or was moved.
pub const DEAD_FLOW: Duration = Duration::from_secs(60);
/// Sessions that no frontend leads to: their service is gone or does not pin any more. If it comes back soon, its pins are
/// valid again. At least as long as [`crate::linger::Limits::gap`].
pub const ORPHANED_SESSION: Duration = Duration::from_secs(60);

/// How a service's pins expire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// What restarts the timeout.
    pub timer: Timer,
    /// The timeout, or [`affinity_common::abi::TIMEOUT_UNLIMITED`].
    pub timeout_ns: u64,
}

/// Determines how long a pin stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keeping {
    /// Its service's policy.
    By(Policy),
    /// No frontend leads to it: it stays until this time, monotonic nanoseconds.
    OrphanedUntil(u64),
}

/// Whether a pin has expired and will not be followed any more.
#[must_use]
pub fn is_expired(session: &Session, keeping: Keeping, now_ns: u64) -> bool {
    match keeping {
        Keeping::By(Policy { timer, timeout_ns }) => !is_fresh(session, timer, timeout_ns, now_ns),
        Keeping::OrphanedUntil(until_ns) => now_ns >= until_ns,
    }
}

/// Whether a flow is over if no packet has used it for `idle_ns`, in either direction.
#[must_use]
pub fn flow_is_over(protocol: u8, state: u8, idle_ns: u64, backend_lives: bool) -> bool {
    let limit = match Phase::of(protocol, state) {
        Phase::HalfOpen => HALF_OPEN_FLOW,
        Phase::Open => IDLE_TCP_FLOW,
        Phase::Closing => CLOSING_FLOW,
        Phase::Closed => CLOSED_FLOW,
        Phase::Unanswered => UNANSWERED_UDP_FLOW,
        Phase::Answered => IDLE_UDP_FLOW,
    };
    let limit = if backend_lives { limit } else { limit.min(DEAD_FLOW) };
    idle_ns >= nanoseconds(limit)
}

const fn nanoseconds(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use affinity_common::{
        abi::{FLOW_ANSWERED, FLOW_FIN_CLIENT, FLOW_FIN_SERVER, FLOW_OPEN, FLOW_RESET, TIMEOUT_UNLIMITED},
        headers::{TCP, UDP},
    };
    use bytemuck::Zeroable;

    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const NOW: u64 = 1_000_000 * SECOND;

    fn session(created_ago_s: u64, used_ago_s: u64, connections: u32) -> Session {
        let created_ns = NOW - created_ago_s * SECOND;
        Session { created_ns, last_used_ns: NOW - used_ago_s * SECOND, connections, ..Zeroable::zeroed() }
    }

    #[test]
    fn a_session_expires_by_its_services_policy() {
        let expired = |session: &Session, timer, timeout_s: u64| {
            is_expired(session, Keeping::By(Policy { timer, timeout_ns: timeout_s * SECOND }), NOW)
        };
        assert!(!expired(&session(100, 9, 0), Timer::Connection, 10));
        assert!(expired(&session(100, 10, 0), Timer::Connection, 10));
        assert!(expired(&session(100, 10, 0), Timer::Packet, 10));
        assert!(expired(&session(10, 0, 0), Timer::Absolute, 10));
        assert!(!expired(&session(9, 9, 0), Timer::Absolute, 10));
        assert!(!expired(&session(1000, 1000, 1), Timer::Alive, 10));
        assert!(expired(&session(1000, 1000, 0), Timer::Alive, 10));
        let for_ever = Keeping::By(Policy { timer: Timer::Connection, timeout_ns: TIMEOUT_UNLIMITED });
        assert!(!is_expired(&session(1000, 1000, 0), for_ever, NOW));
    }

    #[test]
    fn an_orphan_waits_for_its_service_to_come_back_however_old_it_is() {
        assert!(!is_expired(&session(1000, 900, 0), Keeping::OrphanedUntil(NOW + 1), NOW));
        assert!(is_expired(&session(1000, 0, 0), Keeping::OrphanedUntil(NOW), NOW));
    }

    #[test]
    fn a_flow_is_over_after_the_time_of_its_state() {
        for (protocol, state, backend_lives, limit_s) in [
            (TCP, FLOW_FIN_CLIENT | FLOW_FIN_SERVER, true, 120),
            (TCP, FLOW_RESET, false, 60),
            (TCP, FLOW_FIN_SERVER, true, 600),
            (TCP, FLOW_FIN_CLIENT, false, 60),
            (TCP, 0, true, 60),
            (TCP, FLOW_ANSWERED, true, 60),
            (TCP, FLOW_ANSWERED | FLOW_OPEN, true, 24 * 3600),
            (TCP, FLOW_ANSWERED | FLOW_OPEN, false, 60),
            (UDP, 0, true, 30),
            (UDP, FLOW_ANSWERED | FLOW_OPEN, true, 180),
            (UDP, FLOW_ANSWERED | FLOW_OPEN, false, 60),
        ] {
            let over = |idle_ns| flow_is_over(protocol, state, idle_ns, backend_lives);
            assert!(!over(limit_s * SECOND - 1), "{protocol} {state} {backend_lives}");
            assert!(over(limit_s * SECOND), "{protocol} {state} {backend_lives}");
        }
    }
}
