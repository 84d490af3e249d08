//! Pins: finding one, judging it, renewing it, moving it.
//!
//! Two CPUs may handle packets of one client at once, and must choose one backend. A new pin is inserted only if there is none
//! (`BPF_NOEXIST`); the second CPU follows it. A stale pin moves in three steps: it is marked as moving (its backend with a
//! generation that no backend in use has), then its times are written and its connections reset, then it gets the new backend.
//! The first and the last step are compare-and-swap operations, so one mover succeeds and the others follow it. A snapshot of a
//! pin that is not moving has the times of its backend.
//!
//! An expired pin that stays with its backend is only given new times, without the mark: connections to the backend may be
//! counted meanwhile, and must not wait for a CPU that an interrupt holds up between two steps. Such a move may happen, and be
//! counted, twice.
//!
//! Connections are counted separately, as they open and end ([`add_connection`], [`end_connection`]), and never for
//! another backend than theirs.
//!
//! Timer and timeout are in the frontend's record, not in the pin. So a change of either applies to existing pins, at the next
//! connection of each client.

#[cfg(test)]
mod tests;

use crate::{
    abi::{
        AFFINITY, Address, BackendRef, Correction, Event, EventKind, FlowKey, Frontend, MEMBER_READY, MOVES, MemberKey,
        Port, Reason, SHARED, Session, SessionKey, TIMEOUT_UNLIMITED, Timer, UsageOf,
    },
    headers::Headers,
    select::{Chosen, connection_hash, next_draw, select},
    tables::{Entry, FamilyTables, NotStored, Pin, Tables},
};

/// Whether a pin is still in force: while `now - t < timeout`, where the timer says what `t` is.
#[inline(always)]
#[must_use]
pub fn is_fresh(session: &Session, timer: Timer, timeout_ns: u64, now_ns: u64) -> bool {
    let since_ns = match timer {
        Timer::Absolute => session.created_ns,
        Timer::Alive if session.live_connections() > 0 => return true,
        Timer::Connection | Timer::Packet | Timer::Alive => session.last_used_ns,
    };
    timeout_ns == TIMEOUT_UNLIMITED || now_ns.saturating_sub(since_ns) < timeout_ns
}

/// A client's new connection to a frontend.
#[derive(Clone, Copy)]
pub struct Opening<'a, A> {
    /// The client key of the [`SessionKey`]. Its family may differ from the frontend's.
    pub client: A,
    /// The frontend.
    pub frontend: &'a Frontend,
    /// Monotonic time.
    pub now_ns: u64,
    /// The number that selects a member if there is no affinity.
    pub draw: u32,
}

impl<'a, A: Address> Opening<'a, A> {
    /// From a packet: the client key is its source address, masked by the frontend's prefix.
    #[inline(always)]
    pub fn by_packet(headers: &Headers<A>, frontend: &'a Frontend, now_ns: u64) -> Self {
        let FlowKey { saddr, sport, .. } = headers.key;
        Self {
            client: saddr.masked(frontend.prefix),
            frontend,
            now_ns,
            draw: connection_hash(saddr, sport, frontend.seed),
        }
    }
}

/// The member for a new connection, and the reason.
#[derive(Clone, Copy)]
pub struct Resolved {
    /// The member.
    pub chosen: Chosen,
    /// The reason.
    pub reason: Reason,
    /// Scope of the pin; zero: none.
    pub scope: u32,
}

impl Resolved {
    /// Nothing yet.
    pub const NOTHING: Self = Self {
        chosen: Chosen { backend: BackendRef { index: 0, generation: 0 }, port: Port::new(0) },
        reason: Reason::Inconsistent,
        scope: 0,
    };
}

/// The pin of a client in one scope.
enum Found<P> {
    Absent,
    Usable(P, Chosen),
    /// It must move: a snapshot, and the reason.
    Stale(P, Session, Reason),
    /// The group's pin is usable, but its pod is not a member of this pool.
    Elsewhere,
}

/// A flow or socket of datagrams, which keeps its backend without a lookup of the frontend, but follows its pin.
#[derive(Clone, Copy)]
pub struct Follower {
    /// The backend.
    pub to: BackendRef,
    /// The pin's timer when it began.
    pub timer: Timer,
    /// The pin's timeout when it began.
    pub timeout_ns: u64,
    /// When it began.
    pub created_ns: u64,
    /// When it was last used.
    pub last_used_ns: u64,
}

/// Whether a pin still has the follower's backend. If the pin is gone, it was evicted, and the follower goes on by its own times:
/// unpinning a client removes its followers as well.
#[inline(always)]
pub fn leads<A: Address, T: FamilyTables<A>>(tables: &T, key: &SessionKey<A>, follower: &Follower) -> bool {
    let now_ns = tables.now_ns();
    let &Follower { to, timer, timeout_ns, created_ns, last_used_ns } = follower;
    if let Some(pin) = tables.session(key) {
        return pin.backend() == to && is_fresh(&pin.snapshot(), timer, timeout_ns, now_ns);
    }
    let since_ns = match timer {
        Timer::Connection | Timer::Absolute => created_ns,
        Timer::Packet | Timer::Alive => last_used_ns,
    };
    timeout_ns == TIMEOUT_UNLIMITED || now_ns.saturating_sub(since_ns) < timeout_ns
}

/// Restarts the timeout of a pin to `backend`. An expired pin stays expired.
#[inline(always)]
pub fn renew<A: Address, T: FamilyTables<A>>(
    tables: &T,
    key: &SessionKey<A>,
    backend: u32,
    (timer, timeout_ns): (Timer, u64),
    now_ns: u64,
) {
    if let Some(pin) = tables.session(key)
        && pin.backend().index == backend
        && is_fresh(&pin.snapshot(), timer, timeout_ns, now_ns)
    {
        pin.write(Session::LAST_USED_NS, now_ns);
    }
}

/// Counts an open connection for the pin to its backend. Under `alive` the pin stays fresh until [`end_connection`].
#[inline(always)]
pub fn add_connection<A: Address, T: FamilyTables<A>>(tables: &T, key: &SessionKey<A>, to: BackendRef) {
    if let Some(pin) = tables.session(key) {
        change_connections(&pin, to, |live| if live < MOVES - 1 { live + 1 } else { live });
    }
}

/// Uncounts a connection. Under `alive` its end restarts the timeout of the pin to its backend.
#[inline(always)]
pub fn end_connection<A: Address, T: FamilyTables<A>>(tables: &T, key: &SessionKey<A>, to: BackendRef, now_ns: u64) {
    if let Some(pin) = tables.session(key)
        && pin.backend() == to
    {
        pin.write(Session::LAST_USED_NS, now_ns);
        change_connections(&pin, to, |live| live.saturating_sub(1));
    }
}

/// Corrects the number of live connections, for the agent, which has counted them. No effect if the number has changed or the pin
/// has moved since.
#[inline(always)]
pub fn correct_connections<A: Address, T: FamilyTables<A>>(tables: &T, correction: &Correction) {
    let Correction { scope, backend, connections, live, .. } = *correction;
    let key = SessionKey::new(scope, A::from_mapped(correction.client), A::BITS);
    if let Some(pin) = tables.session(&key)
        && pin.connections() == connections
        && pin.backend() == backend
    {
        pin.swap_connections(connections, connections - connections % MOVES + live % MOVES);
    }
}

/// Number of attempts to change a number that other CPUs change too. If all fail, the sweep corrects the number.
const TRIES: u32 = 8;

/// Changes the number of live connections of a pin, if it has their backend. The number is read before the backend: a move in
/// between changes the number ([`reset_connections`]), so that the compare-and-swap fails. A pin that is marked as moving may get
/// its backend back.
#[inline(always)]
fn change_connections(pin: &impl Pin, to: BackendRef, change: impl Fn(u32) -> u32) {
    for _ in 0..TRIES {
        let before = pin.connections();
        let backend = pin.backend();
        if backend == moving(to) {
            continue;
        }
        if backend != to {
            return;
        }
        let live = before % MOVES;
        if pin.swap_connections(before, before - live + change(live)) {
            return;
        }
    }
}

/// Resets the connections of a pin that is marked as moving, and counts the move. Of several CPUs that move it, one succeeds, so
/// that no connection is lost that is counted after the move.
#[inline(always)]
fn reset_connections(pin: &impl Pin, moving: BackendRef, seen: u32) {
    for _ in 0..TRIES {
        let before = pin.connections();
        if before / MOVES != seen / MOVES || pin.backend() != moving {
            return;
        }
        if pin.swap_connections(before, (before - before % MOVES).wrapping_add(MOVES)) {
            return;
        }
    }
}

/// The mark of a pin that moves away from this backend: a generation that no backend in use has.
#[inline(always)]
const fn moving(BackendRef { index, generation }: BackendRef) -> BackendRef {
    BackendRef { index, generation: generation & !1 }
}

/// Finds the member for a new connection, writes it to `resolved`, and counts it for the service and the backend. The result fits
/// a register, because callers are not inlined: the verifier rejects a function that ends with a pointer to its stack in the
/// return register, which happens to one that returns a value by pointer.
///
/// # Errors
/// [`Reason::NoEndpoints`] if the pool has no usable member; [`Reason::Inconsistent`] if its slots have no ready one.
#[inline(always)]
pub fn open<A: Address, T: FamilyTables<A>>(
    tables: &T,
    opening: &Opening<'_, A>,
    resolved: &mut Resolved,
) -> Result<(), Reason> {
    let frontend = opening.frontend;
    if frontend.slot_count == 0 {
        tables.count_usage(UsageOf::Service, frontend.service, Reason::NoEndpoints);
        return Err(Reason::NoEndpoints);
    }
    let is_pinned = frontend.flags & AFFINITY != 0;
    *resolved = if is_pinned { follow_or_pin(tables, opening) } else { choose(tables, opening) }?;
    tables.count_usage(UsageOf::Service, frontend.service, resolved.reason);
    tables.count_usage(UsageOf::Backend, resolved.chosen.backend.index, resolved.reason);
    Ok(())
}

/// Chooses a member for a connection to a service without affinity.
///
/// # Errors
/// [`Reason::Inconsistent`] if the pool's slots have no ready member.
#[inline(always)]
fn choose<A: Address, T: FamilyTables<A>>(tables: &T, opening: &Opening<'_, A>) -> Result<Resolved, Reason> {
    let chosen = select(tables, opening.frontend, opening.client, opening.draw).ok_or(Reason::Inconsistent)?;
    Ok(Resolved { chosen, reason: Reason::Selected, scope: 0 })
}

/// Follows the client's pin, or creates one.
#[inline(always)]
fn follow_or_pin<A: Address, T: FamilyTables<A>>(tables: &T, opening: &Opening<'_, A>) -> Result<Resolved, Reason> {
    let mut key = SessionKey::new(opening.frontend.group, opening.client, A::BITS);
    let mut found = find(tables, opening, &key);
    if let Found::Elsewhere = found {
        key.scope = opening.frontend.own;
        found = find(tables, opening, &key);
    }
    match found {
        Found::Usable(pin, chosen) => Ok(follow(opening, &pin, key.scope, chosen)),
        Found::Stale(pin, seen, reason) => move_pin(tables, opening, &key, (&pin, &seen), reason),
        Found::Absent | Found::Elsewhere => add_pin(tables, opening, &key),
    }
}

#[inline(always)]
fn find<A: Address, T: FamilyTables<A>>(tables: &T, opening: &Opening<'_, A>, key: &SessionKey<A>) -> Found<T::Pin> {
    let Some(pin) = tables.session(key) else { return Found::Absent };
    let (frontend, seen) = (opening.frontend, pin.snapshot());
    if !is_fresh(&seen, Timer::from_byte(frontend.timer), frontend.timeout_ns, opening.now_ns) {
        return Found::Stale(pin, seen, Reason::Expired);
    }
    match usable(tables, frontend.pool, seen.backend) {
        Ok(chosen) => Found::Usable(pin, chosen),
        Err(reason)
            if reason != Reason::BackendGone
                && frontend.flags & SHARED != 0
                && key.scope == frontend.group
                && usable(tables, frontend.group, seen.backend).is_ok() =>
        {
            Found::Elsewhere
        }
        Err(reason) => Found::Stale(pin, seen, reason),
    }
}

/// The pinned backend as a member of `pool`, or the reason why it cannot take a connection.
#[inline(always)]
fn usable<T: Tables>(tables: &T, pool: u32, backend: BackendRef) -> Result<Chosen, Reason> {
    match tables.member(&MemberKey { pool, backend: backend.index }) {
        Some(member) if member.generation == backend.generation => {
            if member.state == MEMBER_READY {
                Ok(Chosen { backend, port: member.port })
            } else {
                Err(Reason::NotReady)
            }
        }
        _ if tables.has_backend(backend) => Err(Reason::NotMember),
        _ => Err(Reason::BackendGone),
    }
}

#[inline(always)]
fn follow<A: Address>(opening: &Opening<'_, A>, pin: &impl Pin, scope: u32, chosen: Chosen) -> Resolved {
    pin.write(Session::LAST_USED_NS, opening.now_ns);
    // Not atomic: two CPUs may count once. The number is only shown in listings.
    pin.write(Session::USES, pin.read(Session::USES).wrapping_add(1));
    Resolved { chosen, reason: Reason::Pinned, scope }
}

#[inline(always)]
fn move_pin<A: Address, T: FamilyTables<A>>(
    tables: &T,
    opening: &Opening<'_, A>,
    key: &SessionKey<A>,
    (pin, seen): (&T::Pin, &Session),
    reason: Reason,
) -> Result<Resolved, Reason> {
    let mut chosen = select(tables, opening.frontend, key.client, seen.draw).ok_or(Reason::Inconsistent)?;
    let from = seen.backend;
    let moving = moving(from);
    let stays = chosen.backend == from;
    if !stays && pin.cas_backend(from, moving) {
        if pin.snapshot().created_ns != seen.created_ns
            && let Ok(former) = usable(tables, opening.frontend.pool, from)
        {
            // Another CPU has just renewed it with the backend that it had before: it stays there.
            chosen = former;
        }
    } else {
        let now = pin.backend();
        if now != moving && !(stays && now == from) {
            return Ok(follow_another(tables, opening, key, pin, chosen));
        }
    }
    pin.write(Session::CREATED_NS, opening.now_ns);
    pin.write(Session::LAST_USED_NS, opening.now_ns);
    pin.write(Session::SERVICE, opening.frontend.service);
    pin.write(Session::USES, 1);
    pin.write(Session::REASON, reason as u8);
    pin.write(Session::DRAW, next_draw(seen.draw));
    if !stays || pin.backend() != from {
        reset_connections(pin, moving, seen.connections);
        if !pin.cas_backend(moving, chosen.backend) {
            return Ok(follow_another(tables, opening, key, pin, chosen));
        }
    }
    tables.add_load(from.index, -1);
    tables.add_load(chosen.backend.index, 1);
    let kind = if reason == Reason::Expired { EventKind::Expired } else { EventKind::Moved };
    report(tables, opening, key, from, chosen.backend, (kind, reason));
    Ok(Resolved { chosen, reason, scope: key.scope })
}

/// Another CPU moved this pin first: takes its backend, or `chosen` if that one cannot be used.
#[inline(always)]
fn follow_another<A: Address, T: FamilyTables<A>>(
    tables: &T,
    opening: &Opening<'_, A>,
    key: &SessionKey<A>,
    pin: &T::Pin,
    chosen: Chosen,
) -> Resolved {
    match usable(tables, opening.frontend.pool, pin.backend()) {
        Ok(chosen) => follow(opening, pin, key.scope, chosen),
        Err(_) => unpinned(tables, chosen),
    }
}

/// Resolves a connection without a pin.
#[inline(always)]
fn unpinned<T: Tables>(tables: &T, chosen: Chosen) -> Resolved {
    tables.count(Reason::SessionNotStored);
    Resolved { chosen, reason: Reason::Selected, scope: 0 }
}

#[inline(always)]
fn add_pin<A: Address, T: FamilyTables<A>>(
    tables: &T,
    opening: &Opening<'_, A>,
    key: &SessionKey<A>,
) -> Result<Resolved, Reason> {
    let draw = tables.random();
    let chosen = select(tables, opening.frontend, key.client, draw).ok_or(Reason::Inconsistent)?;
    let new = new_session(opening, &chosen, next_draw(draw));
    if let Err(NotStored) = tables.add_session(key, &new) {
        // Another CPU pinned this client first: follow its pin.
        return Ok(match find(tables, opening, key) {
            Found::Usable(pin, chosen) => follow(opening, &pin, key.scope, chosen),
            Found::Absent | Found::Stale(..) | Found::Elsewhere => unpinned(tables, chosen),
        });
    }
    tables.add_load(chosen.backend.index, 1);
    report(tables, opening, key, BackendRef::default(), chosen.backend, (EventKind::Created, Reason::Created));
    Ok(Resolved { chosen, reason: Reason::Created, scope: key.scope })
}

#[inline(always)]
fn new_session<A: Address>(opening: &Opening<'_, A>, chosen: &Chosen, draw: u32) -> Session {
    Session {
        created_ns: opening.now_ns,
        last_used_ns: opening.now_ns,
        backend: chosen.backend,
        service: opening.frontend.service,
        draw,
        connections: 0,
        uses: 1,
        reason: Reason::Created as u8,
        pad: [0; 7],
    }
}

/// Reports an event of a pin; `from` is its backend before.
#[inline(always)]
fn report<A: Address, T: Tables>(
    tables: &T,
    opening: &Opening<'_, A>,
    key: &SessionKey<A>,
    from: BackendRef,
    to: BackendRef,
    (kind, reason): (EventKind, Reason),
) {
    tables.report(|| Event {
        time_ns: opening.now_ns,
        client: key.client.to_mapped(),
        service: opening.frontend.service,
        scope: key.scope,
        from,
        to,
        kind: kind as u8,
        reason: reason as u8,
        pad: [0; 6],
    });
}
