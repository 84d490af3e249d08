//! The allowed effects of a connection on a client's pins, checked with the tables before and after it.

use affinity_common::{
    abi::{
        AFFINITY, Address as _, BackendRef, Frontend, MEMBER_READY, Member, MemberKey, Reason, SHARED, Session,
        SessionKey, TIMEOUT_UNLIMITED, Timer, V4, V6,
    },
    model::Model,
};

use crate::{frame::Reading, state::GROUP};

/// The pins of a client that can matter for a connection to one frontend.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pins {
    frontend: Frontend,
    now_ns: u64,
    group: Option<Session>,
    own: Option<Session>,
    /// The group's pinned pod as a member of the frontend's pool, and of the group.
    in_pool: Option<Member>,
    in_group: Option<Member>,
}

impl Pins {
    /// The current pins; `None` if the frontend has no affinity.
    pub(crate) fn now(model: &Model, reading: &Reading, frontend: Frontend) -> Option<Self> {
        if frontend.flags & AFFINITY == 0 {
            return None;
        }
        let group = pin(model, reading, GROUP, frontend.prefix);
        let member = |pool: u32| {
            let key = MemberKey { pool, backend: group?.backend.index };
            model.members.get(&key).copied()
        };
        Some(Self {
            frontend,
            now_ns: model.now_ns.get(),
            group,
            own: pin(model, reading, frontend.own, frontend.prefix),
            in_pool: member(frontend.pool),
            in_group: member(GROUP),
        })
    }

    /// The backend that a new connection must reach: the one of the group's pin, if it may be followed here.
    pub(crate) fn must_reach(&self) -> Option<u32> {
        let pin = self.group.filter(|pin| self.is_fresh(pin))?;
        serves(&pin, self.in_pool).then_some(pin.backend.index)
    }

    /// Checks the effects of a new connection to `backend`.
    pub(crate) fn judge(&self, after: &Self, reason: Reason, backend: BackendRef) {
        if let Some(expected) = self.must_reach() {
            assert_eq!((reason, backend.index), (Reason::Pinned, expected), "a pin is followed");
        }
        let kept = |pin: &&Session| pin.backend == backend;
        let made = [after.group, after.own];
        let made = made.iter().flatten().find(kept).expect("the connection's backend is pinned");
        assert_eq!(made.last_used_ns, self.now_ns, "a connection restarts the timer");
        if self.frontend.flags & SHARED == 0 {
            assert!(after.group.as_ref().is_some_and(|pin| kept(&pin)), "the pin is shared by all ports");
        }
        if reason == Reason::Pinned {
            let followed = [self.group, self.own].into_iter().flatten().find(|pin| kept(&pin));
            let followed = followed.expect("what is followed was there before");
            assert!(self.is_fresh(&followed), "an expired pin is not followed");
        }
        if let Some(pin) = self.group
            && self.frontend.flags & SHARED != 0
            && self.is_fresh(&pin)
            && serves(&pin, self.in_group)
        {
            let now = after.group.expect("a pin that serves the group stays");
            assert_eq!(
                (now.backend, now.created_ns),
                (pin.backend, pin.created_ns),
                "a pin that serves the group stays"
            );
        }
    }

    fn is_fresh(&self, pin: &Session) -> bool {
        let age_ns = |since_ns: u64| self.now_ns.saturating_sub(since_ns);
        self.frontend.timeout_ns == TIMEOUT_UNLIMITED
            || match Timer::from_byte(self.frontend.timer) {
                Timer::Connection | Timer::Packet => age_ns(pin.last_used_ns) < self.frontend.timeout_ns,
                Timer::Absolute => age_ns(pin.created_ns) < self.frontend.timeout_ns,
                Timer::Alive => pin.live_connections() > 0 || age_ns(pin.last_used_ns) < self.frontend.timeout_ns,
            }
    }
}

fn serves(pin: &Session, member: Option<Member>) -> bool {
    member.is_some_and(|member| member.state == MEMBER_READY && member.generation == pin.backend.generation)
}

fn pin(model: &Model, reading: &Reading, scope: u32, prefix: u8) -> Option<Session> {
    let mut client = reading.addresses[0].clone();
    for bit in usize::from(prefix)..8 * client.len() {
        client[bit / 8] &= !(0x80 >> (bit % 8));
    }
    let client = client.as_slice();
    if reading.is_v6 {
        model.sessions_v6.borrow().get(&SessionKey::new(scope, V6(client.try_into().ok()?), V6::BITS))
    } else {
        model.sessions_v4.borrow().get(&SessionKey::new(scope, V4(client.try_into().ok()?), V4::BITS))
    }
}
