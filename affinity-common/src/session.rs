//! Pins: finding one, judging it, renewing it, moving it.

use crate::{
    abi::{
        Address, Event, EventKind, Frontend, MEMBER_READY, Member, MemberKey, Reason, SHARED, Session, SessionKey,
        TIMEOUT_UNLIMITED, Timer, UsageOf,
    },
    parse::TCP,
    select::{Chosen, next_draw, select},
    tables::{Entry, FamilyTables, NotStored, Tables},
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
    /// The frontend.
    pub frontend: &'a Frontend,
    /// The client's address, not masked.
    pub client: A,
    /// IANA protocol number.
    pub protocol: u8,
    /// Monotonic time.
    pub now_ns: u64,
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

/// What the sessions say of a client in one scope.
enum Found<E> {
    Absent,
    Usable(E, Chosen),
    /// To be pinned anew, and why.
    Stale(E, Reason),
    /// The group's pin is good, but its pod is no member of this pool.
    Elsewhere,
}

/// Follows the client's pin, or makes one.
///
/// # Errors
/// [`Reason::Inconsistent`] where the pool's slots name no ready member.
#[inline(always)]
pub fn resolve<A: Address, T: FamilyTables<A>>(tables: &T, opening: &Opening<'_, A>) -> Result<Resolved, Reason> {
    let mut key = SessionKey::new(opening.frontend.group, opening.client, opening.frontend.prefix);
    let mut found = find(tables, opening, &key);
    if let Found::Elsewhere = found {
        key.scope = opening.frontend.own;
        found = find(tables, opening, &key);
    }
    match found {
        Found::Usable(entry, chosen) => Ok(follow(opening, &entry, key.scope, chosen)),
        Found::Stale(entry, reason) => move_pin(tables, opening, &key, &entry, reason),
        Found::Absent | Found::Elsewhere => pin(tables, opening, &key),
    }
}

#[inline(always)]
fn find<A: Address, T: FamilyTables<A>>(
    tables: &T,
    opening: &Opening<'_, A>,
    key: &SessionKey<A>,
) -> Found<T::Entry<Session>> {
    let Some(entry) = tables.session(key) else { return Found::Absent };
    let session = entry.get();
    let frontend = opening.frontend;
    if !is_fresh(&session, Timer::from_byte(frontend.timer), frontend.timeout_ns, opening.now_ns) {
        return Found::Stale(entry, Reason::Expired);
    }
    match usable(tables, frontend.pool, &session) {
        Ok(member) => Found::Usable(entry, Chosen { backend: session.backend, member }),
        Err(reason) if reason != Reason::BackendGone && serves_the_group(tables, frontend, key, &session) => {
            Found::Elsewhere
        }
        Err(reason) => Found::Stale(entry, reason),
    }
}

/// The pinned backend's member record in `pool`, or why it cannot take a connection there.
#[inline(always)]
fn usable<T: Tables>(tables: &T, pool: u32, session: &Session) -> Result<Member, Reason> {
    match tables.member(&MemberKey { pool, backend: session.backend }) {
        Some(member) if member.generation == session.generation => {
            if member.state == MEMBER_READY {
                Ok(member)
            } else {
                Err(Reason::NotReady)
            }
        }
        _ => match tables.backend(session.backend) {
            Some(backend) if backend.generation == session.generation => Err(Reason::NotMember),
            _ => Err(Reason::BackendGone),
        },
    }
}

/// Whether a pin that this pool cannot follow serves other pools of its group, and so must stay as it is.
#[inline(always)]
fn serves_the_group<A: Address, T: Tables>(
    tables: &T,
    frontend: &Frontend,
    key: &SessionKey<A>,
    session: &Session,
) -> bool {
    frontend.flags & SHARED != 0
        && key.scope == frontend.group
        && tables
            .member(&MemberKey { pool: frontend.group, backend: session.backend })
            .is_some_and(|member| member.generation == session.generation && member.state == MEMBER_READY)
}

#[inline(always)]
fn follow<A: Address>(opening: &Opening<'_, A>, entry: &impl Entry<Session>, scope: u32, chosen: Chosen) -> Resolved {
    let connections = counted_connections(opening);
    entry.update(|session| {
        session.last_used_ns = opening.now_ns;
        session.uses = session.uses.wrapping_add(1);
        session.connections = session.connections.wrapping_add(connections);
    });
    Resolved { chosen, reason: Reason::Pinned, scope }
}

#[inline(always)]
fn move_pin<A: Address, T: FamilyTables<A>>(
    tables: &T,
    opening: &Opening<'_, A>,
    key: &SessionKey<A>,
    entry: &T::Entry<Session>,
    reason: Reason,
) -> Result<Resolved, Reason> {
    let old = entry.get();
    let chosen = select(tables, opening.frontend, key.client, old.draw).ok_or(Reason::Inconsistent)?;
    let new = fresh_session(opening, &chosen, next_draw(old.draw), reason);
    entry.update(|session| *session = new);
    tables.add_load(old.backend, -1);
    tables.add_load(chosen.backend, 1);
    let kind = if reason == Reason::Expired { EventKind::Expired } else { EventKind::Moved };
    tables.report(&event(key, &new, Some(&old), kind));
    Ok(Resolved { chosen, reason, scope: key.scope })
}

#[inline(always)]
fn pin<A: Address, T: FamilyTables<A>>(
    tables: &T,
    opening: &Opening<'_, A>,
    key: &SessionKey<A>,
) -> Result<Resolved, Reason> {
    let draw = tables.random();
    let chosen = select(tables, opening.frontend, key.client, draw).ok_or(Reason::Inconsistent)?;
    let new = fresh_session(opening, &chosen, next_draw(draw), Reason::Created);
    if let Err(NotStored) = tables.add_session(key, &new) {
        // Another processor was first with this client: do as it did.
        if let Found::Usable(entry, chosen) = find(tables, opening, key) {
            return Ok(follow(opening, &entry, key.scope, chosen));
        }
        tables.count(Reason::SessionNotStored);
        return Ok(Resolved { chosen, reason: Reason::Selected, scope: 0 });
    }
    tables.add_load(chosen.backend, 1);
    tables.report(&event(key, &new, None, EventKind::Created));
    Ok(Resolved { chosen, reason: Reason::Created, scope: key.scope })
}

#[inline(always)]
fn fresh_session<A: Address>(opening: &Opening<'_, A>, chosen: &Chosen, draw: u32, reason: Reason) -> Session {
    Session {
        created_ns: opening.now_ns,
        last_used_ns: opening.now_ns,
        backend: chosen.backend,
        generation: chosen.member.generation,
        service: opening.frontend.service,
        draw,
        connections: counted_connections(opening),
        uses: 1,
        reason: reason as u8,
        pad: [0; 7],
    }
}

/// Connections are counted where a pin lives as long as they do, and where their end can be seen.
#[inline(always)]
fn counted_connections<A: Address>(opening: &Opening<'_, A>) -> u32 {
    u32::from(opening.frontend.timer == Timer::Alive as u8 && opening.protocol == TCP)
}

#[inline(always)]
fn event<A: Address>(key: &SessionKey<A>, new: &Session, old: Option<&Session>, kind: EventKind) -> Event {
    Event {
        time_ns: new.created_ns,
        client: key.client.to_mapped(),
        service: new.service,
        scope: key.scope,
        from_backend: old.map_or(0, |session| session.backend),
        from_generation: old.map_or(0, |session| session.generation),
        to_backend: new.backend,
        to_generation: new.generation,
        kind: kind as u8,
        reason: new.reason,
        pad: [0; 6],
    }
}

/// Counts a new connection for its service and backend.
#[inline(always)]
pub fn count_usage<T: Tables>(tables: &T, frontend: &Frontend, resolved: &Resolved) {
    tables.count_usage(UsageOf::Service, frontend.service, resolved.reason);
    tables.count_usage(UsageOf::Backend, resolved.chosen.backend, resolved.reason);
}
