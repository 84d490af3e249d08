//! Pins.

use std::{borrow::Cow, collections::BTreeSet};

use affinity_common::{
    abi::{Address, Reason, Session, SessionKey, TIMEOUT_UNLIMITED, Timer},
    session::is_fresh,
};
use serde::Serialize;

use super::{Catalog, ClientRef, Moment, PodRef, address::ip};

/// A pin: the pod that a client's new connections go to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionView<'a> {
    /// The service with the connection that created the pin, `namespace/name`.
    pub service: Cow<'a, str>,
    /// The client: an address, the network that shares the pin, or a network namespace of this machine.
    pub client: ClientRef<'a>,
    /// The pod.
    pub backend: PodRef<'a>,
    /// When the client was pinned to this pod.
    pub created: Moment,
    /// When the timeout was last restarted.
    pub last_used: Moment,
    /// Seconds left, rounded up; 0: expired, and the next connection selects again; null: never.
    pub expires_in_seconds: Option<u64>,
    /// Why the pin was created: the name of a [`Reason`].
    pub reason: &'static str,
    /// The named group that shares the pin; null: the service alone.
    pub group: Option<&'a str>,
    /// New connections that used the pin, the first one included; wraps at 2³².
    pub uses: u32,
    /// Live connections; null: not counted, because the service's timer is not `alive`.
    pub connections: Option<u32>,
}

impl<'a> SessionView<'a> {
    /// An entry of `sessions_v4` or `sessions_v6`.
    #[must_use]
    pub fn new<A: Address>(catalog: &'a Catalog, key: &SessionKey<A>, session: &Session) -> Self {
        let policy = catalog.policy(session.service);
        let group = policy.filter(|policy| policy.group == key.scope).and_then(|_| catalog.group_name(session.service));
        Self {
            service: catalog.service_name(session.service),
            client: catalog.client(ip(key.client), session.service),
            backend: catalog.backend(session.backend),
            created: catalog.clock.moment(session.created_ns),
            last_used: catalog.clock.moment(session.last_used_ns),
            expires_in_seconds: match policy {
                Some(policy) => expires_in_s(session, policy.timer, policy.timeout_ns, catalog.clock.now_ns),
                // The service has gone: the pin is not followed any more.
                None => Some(0),
            },
            reason: Reason::from_byte(session.reason).map_or("?", Reason::name),
            group,
            uses: session.uses,
            connections: policy.filter(|policy| policy.timer == Timer::Alive).map(|_| session.live_connections()),
        }
    }

    /// Whether the client's next connection will follow the pin, if only its age is considered.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.expires_in_seconds != Some(0)
    }
}

/// Selects the pins of a service: those that its connections created, and those of services that share its scopes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePins {
    /// The service.
    pub service: u32,
    scopes: BTreeSet<u32>,
}

impl ServicePins {
    /// Whether a pin in `scope` is one of them.
    #[must_use]
    pub fn contain(&self, scope: u32, session: &Session) -> bool {
        session.service == self.service || self.scopes.contains(&scope)
    }
}

impl Catalog {
    /// The pins of a service.
    #[must_use]
    pub fn service_pins(&self, service: u32) -> ServicePins {
        ServicePins { service, scopes: self.scopes(service) }
    }
}

/// Seconds until a pin expires, rounded up, so that zero means expired; `None`: never, in its present state.
#[must_use]
pub fn expires_in_s(session: &Session, timer: Timer, timeout_ns: u64, now_ns: u64) -> Option<u64> {
    if timeout_ns == TIMEOUT_UNLIMITED || timer == Timer::Alive && session.live_connections() > 0 {
        return None;
    }
    if !is_fresh(session, timer, timeout_ns, now_ns) {
        return Some(0);
    }
    let since_ns = match timer {
        Timer::Absolute => session.created_ns,
        Timer::Connection | Timer::Packet | Timer::Alive => session.last_used_ns,
    };
    Some(timeout_ns.saturating_sub(now_ns.saturating_sub(since_ns)).div_ceil(1_000_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::fixture::{SECOND, session};

    #[test]
    fn zero_seconds_left_means_expired_and_nothing_else_does() {
        let used = session(100, 160, 0);
        let left = |timer, timeout_s: u64, now_ns| expires_in_s(&used, timer, timeout_s * SECOND, now_ns);
        assert_eq!(left(Timer::Connection, 60, 160 * SECOND), Some(60));
        assert_eq!(left(Timer::Connection, 60, 219 * SECOND + 1), Some(1));
        assert_eq!(left(Timer::Connection, 60, 220 * SECOND - 1), Some(1));
        assert_eq!(left(Timer::Connection, 60, 220 * SECOND), Some(0));
        assert_eq!(left(Timer::Packet, 60, 200 * SECOND), Some(20));
        // Counted from the creation, not from the last use.
        assert_eq!(left(Timer::Absolute, 60, 160 * SECOND - 1), Some(1));
        assert_eq!(left(Timer::Absolute, 60, 160 * SECOND), Some(0));
        // Used after the clock was read.
        assert_eq!(left(Timer::Connection, 60, 150 * SECOND), Some(60));
    }

    #[test]
    fn some_pins_never_expire() {
        let mut used = session(100, 160, 0);
        assert_eq!(expires_in_s(&used, Timer::Connection, TIMEOUT_UNLIMITED, u64::MAX), None);
        assert_eq!(expires_in_s(&used, Timer::Alive, SECOND, u64::MAX), Some(0));
        used.connections = 1;
        assert_eq!(expires_in_s(&used, Timer::Alive, SECOND, u64::MAX), None);
    }
}
