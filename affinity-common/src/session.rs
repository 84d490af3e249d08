//! Pins: finding one, judging it, renewing it, moving it.
//!
//! Two processors may meet one client at once, and must send it to one backend. A new pin is stored only where there is
//! none; who comes second follows it. A stale pin moves in three steps: it is pointed nowhere (to its backend under a
//! generation that no backend in use has), then its times are written, then it is pointed to the new backend. The first
//! and the last step are made only from where the mover believes the pin to point, so one mover succeeds, and the others
//! follow it; only a move to the very backend that it had may be made, and counted, twice. Whoever observes a pin that
//! points somewhere sees the times that belong to that.

#[cfg(test)]
mod tests;

use crate::{
    abi::{
        AFFINITY, Address, Event, EventKind, Frontend, MEMBER_READY, Member, MemberKey, Port, Reason, SHARED, Session,
        SessionKey, TIMEOUT_UNLIMITED, Timer, UsageOf,
    },
    parse::{Headers, RST, TCP},
    select::{Chosen, next_draw, select},
    tables::{Entry, FamilyTables, NotStored, Pin, Tables},
};

/// Whether a pin is still in force: while `now - t < timeout`, where the timer says what `t` is.
#[inline(always)]
#[must_use]
pub fn is_fresh(session: &Session, timer: Timer, timeout_ns: u64, now_ns: u64) -> bool {
    let since_ns = match timer {
        Timer::Absolute => session.created_ns,
        Timer::Alive if session.connections > 0 => return true,
        Timer::Connection | Timer::Packet | Timer::Alive => session.last_used_ns,
    };
    timeout_ns == TIMEOUT_UNLIMITED || now_ns.saturating_sub(since_ns) < timeout_ns
}

/// A client's new connection to a frontend.
#[derive(Clone, Copy)]
pub struct Opening<'a, A> {
    /// The client key, as it stands in a [`SessionKey`]. Its family need not be the frontend's.
    pub client: A,
    /// The frontend.
    pub frontend: &'a Frontend,
    /// Monotonic time.
    pub now_ns: u64,
    /// Connections that a pin under [`Timer::Alive`] counts from here on: one where its end will be seen, else none.
    pub connections: u32,
}

impl<'a, A: Address> Opening<'a, A> {
    /// By a packet: the client key is its source under the frontend's prefix. A datagram's end cannot be seen, and a reset
    /// begins nothing.
    #[inline(always)]
    pub fn by_packet(headers: &Headers<A>, frontend: &'a Frontend, now_ns: u64) -> Self {
        let Headers { key, flags, .. } = headers;
        Self {
            client: key.saddr.masked(frontend.prefix),
            frontend,
            now_ns,
            connections: u32::from(key.protocol == TCP && flags & RST == 0),
        }
    }
}

/// A member for a new connection, and how it came about.
#[derive(Clone, Copy)]
pub struct Resolved {
    /// The member.
    pub chosen: Chosen,
    /// Why this one.
    pub reason: Reason,
    /// Scope of the pin that was followed or made; zero: none.
    pub scope: u32,
}

impl Resolved {
    /// Nothing yet.
    pub const NOTHING: Self = Self {
        chosen: Chosen { backend: 0, member: Member { generation: 0, port: Port::new(0), state: 0, pad: 0 } },
        reason: Reason::Inconsistent,
        scope: 0,
    };
}

/// What the sessions say of a client in one scope.
enum Found<P> {
    Absent,
    Usable(P, Chosen),
    /// To be moved: what was seen of it, and why.
    Stale(P, Session, Reason),
    /// The group's pin is good, but its pod is no member of this pool.
    Elsewhere,
}

/// Restarts the timeout of a pin to `backend`, where a packet does; one that has expired stays so.
#[inline(always)]
pub fn renew<A: Address, T: FamilyTables<A>>(
    tables: &T,
    key: &SessionKey<A>,
    backend: u32,
    (timer, timeout_ns): (Timer, u64),
    now_ns: u64,
) {
    if let Some(entry) = tables.session(key)
        && entry.with(|pin| pin.backend == backend && is_fresh(pin, timer, timeout_ns, now_ns))
    {
        entry.update(|session| session.last_used_ns = now_ns);
    }
}

/// Under `alive`, the end of a connection restarts the timeout of the pin to its backend.
#[inline(always)]
pub fn end_connection<A: Address, T: FamilyTables<A>>(
    tables: &T,
    key: &SessionKey<A>,
    (backend, generation): (u32, u32),
    now_ns: u64,
) {
    if let Some(entry) = tables.session(key)
        && entry.with(|session| session.backend == backend && session.generation == generation)
    {
        entry.update(|session| session.last_used_ns = now_ns);
        if entry.with(|session| session.connections) > 0 {
            entry.add_connections(u32::MAX);
        }
    }
}

/// Finds the member for a new connection, and counts it for the service and the backend; `resolved` becomes what came of
/// it. For callers that are not inlined and return what fits a register: the kernel's verifier refuses a function whose
/// return register holds a pointer to the stack when it ends, and one that returns by pointer is free to leave that
/// there.
///
/// # Errors
/// [`Reason::NoEndpoints`] where the pool has no usable member; [`Reason::Inconsistent`] where its slots name no ready
/// one.
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
    tables.count_usage(UsageOf::Backend, resolved.chosen.backend, resolved.reason);
    Ok(())
}

/// Chooses a member for a connection to a service without affinity.
///
/// # Errors
/// [`Reason::Inconsistent`] where the pool's slots name no ready member.
#[inline(always)]
fn choose<A: Address, T: FamilyTables<A>>(tables: &T, opening: &Opening<'_, A>) -> Result<Resolved, Reason> {
    let chosen = select(tables, opening.frontend, opening.client, tables.random()).ok_or(Reason::Inconsistent)?;
    Ok(Resolved { chosen, reason: Reason::Selected, scope: 0 })
}

/// Follows the client's pin, or makes one.
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
    let (frontend, seen) = (opening.frontend, pin.observe());
    if !is_fresh(&seen, Timer::from_byte(frontend.timer), frontend.timeout_ns, opening.now_ns) {
        return Found::Stale(pin, seen, Reason::Expired);
    }
    match usable(tables, frontend.pool, seen.backend, seen.generation) {
        Ok(member) => Found::Usable(pin, Chosen { backend: seen.backend, member }),
        Err(reason)
            if reason != Reason::BackendGone
                && frontend.flags & SHARED != 0
                && key.scope == frontend.group
                && usable(tables, frontend.group, seen.backend, seen.generation).is_ok() =>
        {
            Found::Elsewhere
        }
        Err(reason) => Found::Stale(pin, seen, reason),
    }
}

/// The pinned backend's member record in `pool`, or why it cannot take a connection there.
#[inline(always)]
fn usable<T: Tables>(tables: &T, pool: u32, backend: u32, generation: u32) -> Result<Member, Reason> {
    match tables.member(&MemberKey { pool, backend }) {
        Some(member) if member.generation == generation => {
            if member.state == MEMBER_READY {
                Ok(member)
            } else {
                Err(Reason::NotReady)
            }
        }
        _ => match tables.backend(backend) {
            Some(record) if record.generation == generation => Err(Reason::NotMember),
            _ => Err(Reason::BackendGone),
        },
    }
}

#[inline(always)]
fn follow<A: Address>(opening: &Opening<'_, A>, pin: &impl Pin, scope: u32, chosen: Chosen) -> Resolved {
    pin.update(|session| {
        session.last_used_ns = opening.now_ns;
        session.uses = session.uses.wrapping_add(1);
    });
    if counted_connections(opening) > 0 {
        pin.add_connections(1);
    }
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
    let from = (seen.backend, seen.generation);
    let nowhere = (seen.backend, seen.generation & !1);
    if pin.repin(from, nowhere) {
        if pin.observe().created_ns != seen.created_ns
            && let Ok(member) = usable(tables, opening.frontend.pool, seen.backend, seen.generation)
        {
            // Another processor has just moved it, to where it was: there it stays.
            chosen = Chosen { backend: seen.backend, member };
        }
    } else if pointed_to(pin) != nowhere {
        return Ok(follow_another(tables, opening, key, pin, chosen));
    }
    pin.update(|session| {
        session.created_ns = opening.now_ns;
        session.last_used_ns = opening.now_ns;
        session.service = opening.frontend.service;
        session.uses = 1;
        session.reason = reason as u8;
        session.draw = next_draw(seen.draw);
    });
    if !pin.repin(nowhere, (chosen.backend, chosen.member.generation)) {
        return Ok(follow_another(tables, opening, key, pin, chosen));
    }
    pin.add_connections(counted_connections(opening).wrapping_sub(seen.connections));
    tables.add_load(seen.backend, -1);
    tables.add_load(chosen.backend, 1);
    let kind = if reason == Reason::Expired { EventKind::Expired } else { EventKind::Moved };
    report(tables, opening, key, from, &chosen, (kind, reason));
    Ok(Resolved { chosen, reason, scope: key.scope })
}

#[inline(always)]
fn pointed_to(pin: &impl Pin) -> (u32, u32) {
    let Session { backend, generation, .. } = pin.observe();
    (backend, generation)
}

/// Another processor was first to move this pin: goes where it now points; to `chosen` where that is no use.
#[inline(always)]
fn follow_another<A: Address, T: FamilyTables<A>>(
    tables: &T,
    opening: &Opening<'_, A>,
    key: &SessionKey<A>,
    pin: &T::Pin,
    chosen: Chosen,
) -> Resolved {
    let (backend, generation) = pointed_to(pin);
    match usable(tables, opening.frontend.pool, backend, generation) {
        Ok(member) => follow(opening, pin, key.scope, Chosen { backend, member }),
        Err(_) => unpinned(tables, chosen),
    }
}

/// The connection goes on without a pin.
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
        // Another processor was first with this client: do as it did.
        return Ok(match find(tables, opening, key) {
            Found::Usable(pin, chosen) => follow(opening, &pin, key.scope, chosen),
            Found::Absent | Found::Stale(..) | Found::Elsewhere => unpinned(tables, chosen),
        });
    }
    tables.add_load(chosen.backend, 1);
    report(tables, opening, key, (0, 0), &chosen, (EventKind::Created, Reason::Created));
    Ok(Resolved { chosen, reason: Reason::Created, scope: key.scope })
}

#[inline(always)]
fn new_session<A: Address>(opening: &Opening<'_, A>, chosen: &Chosen, draw: u32) -> Session {
    Session {
        created_ns: opening.now_ns,
        last_used_ns: opening.now_ns,
        backend: chosen.backend,
        generation: chosen.member.generation,
        service: opening.frontend.service,
        draw,
        connections: counted_connections(opening),
        uses: 1,
        reason: Reason::Created as u8,
        pad: [0; 7],
    }
}

/// Connections are counted only where a pin lives as long as they do.
#[inline(always)]
fn counted_connections<A: Address>(opening: &Opening<'_, A>) -> u32 {
    if opening.frontend.timer == Timer::Alive as u8 { opening.connections } else { 0 }
}

/// Reports what became of a pin; `from` is the backend and generation that it had.
#[inline(always)]
fn report<A: Address, T: Tables>(
    tables: &T,
    opening: &Opening<'_, A>,
    key: &SessionKey<A>,
    from: (u32, u32),
    to: &Chosen,
    (kind, reason): (EventKind, Reason),
) {
    tables.report(&Event {
        time_ns: opening.now_ns,
        client: key.client.to_mapped(),
        service: opening.frontend.service,
        scope: key.scope,
        from_backend: from.0,
        from_generation: from.1,
        to_backend: to.backend,
        to_generation: to.member.generation,
        kind: kind as u8,
        reason: reason as u8,
        pad: [0; 6],
    });
}
