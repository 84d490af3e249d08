//! Flows: admitting a packet of a known one, following its end, beginning a new one.

use crate::{
    abi::{
        Address, Direction, Edit, FLOW_CLOSED, FLOW_FIN_CLIENT, FLOW_FIN_SERVER, Flow, Frontend, MEMBER_READY,
        MemberKey, SessionKey, Timer,
    },
    parse::{FIN, Headers, RST, TCP, UDP},
    rewrite,
    session::{Resolved, is_fresh},
    tables::{Entry, FamilyTables, NotStored},
};

/// A flow's time of last use is written at most this often, in nanoseconds.
pub const REFRESH_NS: u64 = 1_000_000_000;

/// What a known flow means for a packet from the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admission {
    /// The packet belongs to it.
    Established,
    /// The packet begins a new connection with the same ports.
    Afresh,
    /// The connection's pod is gone: the client must be told.
    Gone,
}

/// Judges a packet from the client against its flow.
#[inline(always)]
pub fn admit<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, flow: &Flow<A>) -> Admission {
    let lives = if headers.key.protocol == UDP {
        // A datagram has no connection to lose: it goes where new ones would be allowed to go.
        tables
            .member(&MemberKey { pool: flow.pool, backend: flow.backend })
            .is_some_and(|member| member.generation == flow.generation && member.state == MEMBER_READY)
    } else {
        tables.backend(flow.backend).is_some_and(|backend| backend.generation == flow.generation)
    };
    match (lives, headers.is_opening()) {
        (true, true) if flow.state != 0 => Admission::Afresh,
        (true, _) => Admission::Established,
        (false, true) => Admission::Afresh,
        (false, false) if headers.key.protocol == UDP => Admission::Afresh,
        (false, false) => Admission::Gone,
    }
}

/// Notes that a packet passed: time of last use, the pin's timer where packets restart it, and the connection's end.
#[inline(always)]
pub fn note_packet<A: Address, T: FamilyTables<A>>(
    tables: &T,
    headers: &Headers<A>,
    entry: &T::Entry<Flow<A>>,
    flow: &Flow<A>,
) {
    let now_ns = tables.now_ns();
    if now_ns.saturating_sub(flow.last_used_ns) >= REFRESH_NS {
        entry.update(|flow| flow.last_used_ns = now_ns);
        if headers.key.direction == Direction::Forward as u8 {
            renew_pin(tables, headers, flow, now_ns);
        }
    }
    if headers.flags & (FIN | RST) != 0 {
        note_end(tables, headers, entry, flow, now_ns);
    }
}

/// Restarts the pin's timeout where its timer says that packets do; a pin that has expired stays so.
#[inline(always)]
fn renew_pin<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, flow: &Flow<A>, now_ns: u64) {
    let timer = Timer::from_byte(flow.timer);
    // A datagram's end cannot be seen, so under `alive` its packets stand for its life.
    let restarts = timer == Timer::Packet || timer == Timer::Alive && headers.key.protocol == UDP;
    if flow.scope == 0 || !restarts {
        return;
    }
    let key = SessionKey::new(flow.scope, headers.key.saddr, flow.prefix);
    if let Some(entry) = tables.session(&key) {
        let session = entry.get();
        if session.backend == flow.backend && is_fresh(&session, timer, flow.timeout_ns, now_ns) {
            entry.update(|session| session.last_used_ns = now_ns);
        }
    }
}

/// Follows a connection's end in both directions' records.
#[inline(always)]
fn note_end<A: Address, T: FamilyTables<A>>(
    tables: &T,
    headers: &Headers<A>,
    entry: &T::Entry<Flow<A>>,
    flow: &Flow<A>,
    now_ns: u64,
) {
    let state = after_end(flow.state, headers);
    if state == flow.state {
        return;
    }
    entry.update(|flow| flow.state = state);
    if let Some(other) = tables.flow(&headers.key.opposite(&flow.edit)) {
        other.update(|flow| flow.state = state);
    }
    if state & !flow.state & FLOW_CLOSED != 0 && flow.timer == Timer::Alive as u8 && flow.scope != 0 {
        let from_client = headers.key.direction == Direction::Forward as u8;
        let client = if from_client { headers.key.saddr } else { headers.key.daddr };
        if let Some(entry) = tables.session(&SessionKey::new(flow.scope, client, flow.prefix)) {
            let session = entry.get();
            if session.backend == flow.backend && session.generation == flow.generation {
                entry.update(|session| {
                    session.connections = session.connections.saturating_sub(1);
                    session.last_used_ns = now_ns;
                });
            }
        }
    }
}

/// The state of a flow after a packet with FIN or RST.
#[inline(always)]
const fn after_end<A>(state: u8, headers: &Headers<A>) -> u8 {
    if headers.flags & RST != 0 {
        return state | FLOW_CLOSED;
    }
    let sender = if headers.key.direction == Direction::Forward as u8 { FLOW_FIN_CLIENT } else { FLOW_FIN_SERVER };
    let state = state | sender;
    if state & FLOW_FIN_CLIENT != 0 && state & FLOW_FIN_SERVER != 0 { state | FLOW_CLOSED } else { state }
}

/// Stores the two records of a new connection; the reverse one first, so that no reply finds it missing.
///
/// # Errors
/// [`NotStored`] where the kernel has no room.
#[inline(always)]
pub fn begin<A: Address, T: FamilyTables<A>>(
    tables: &T,
    headers: &Headers<A>,
    frontend: &Frontend,
    resolved: &Resolved,
    backend_address: A,
    now_ns: u64,
) -> Result<Edit<A>, NotStored> {
    let key = &headers.key;
    let port = resolved.chosen.member.port;
    let edit = rewrite::edit(key, key.saddr, backend_address, key.sport, port);
    let mut flow = Flow {
        created_ns: now_ns,
        last_used_ns: now_ns,
        timeout_ns: frontend.timeout_ns,
        edit,
        backend: resolved.chosen.backend,
        generation: resolved.chosen.member.generation,
        pool: frontend.pool,
        scope: resolved.scope,
        service: frontend.service,
        // A reset for a connection that is not known closes it as it begins.
        state: if headers.flags & RST != 0 && key.protocol == TCP { FLOW_CLOSED } else { 0 },
        timer: frontend.timer,
        prefix: frontend.prefix,
        pad: 0,
    };
    let reverse_key = key.opposite(&edit);
    flow.edit = rewrite::edit(&reverse_key, key.daddr, key.saddr, key.dport, key.sport);
    tables.put_flow(&reverse_key, &flow)?;
    flow.edit = edit;
    tables.put_flow(key, &flow)?;
    Ok(edit)
}
