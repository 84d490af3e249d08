//! Flows: admitting a packet of a known one, following its end, beginning a new one.

use crate::{
    abi::{
        Address, BACKEND_LOCAL, Draft, FLOW_CLOSED, FLOW_FIN_CLIENT, FLOW_FIN_SERVER, FLOW_REMOTE, FLOW_SHADOW, Flow,
        Frontend, FrontendKey, MASQUERADE, MEMBER_READY, MemberKey, Reason, SHADOW, SessionKey, Timer,
    },
    masquerade,
    parse::{ACK, FIN, Headers, RST, SYN, UDP},
    rewrite,
    session::{self, Resolved},
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
    /// The packet belongs to it, and passes: the connection is another proxy's.
    Shadow,
}

/// Judges a packet from the client against its flow.
#[inline(always)]
pub fn admit<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, flow: &T::Entry<Flow<A>>) -> Admission {
    let is_datagram = headers.key.protocol == UDP;
    let (pool, backend, generation, state) = flow.with(|flow| (flow.pool, flow.backend, flow.generation, flow.state));
    let lives = if is_datagram {
        // A datagram has no connection to lose: it goes where new ones would be allowed to go, and to the port that is
        // served there now.
        let port = flow.with(|flow| flow.edit.dport);
        tables.member(&MemberKey { pool, backend }).is_some_and(|member| {
            member.generation == generation && member.state == MEMBER_READY && member.port == port
        })
    } else {
        tables.backend(backend).is_some_and(|backend| backend.generation == generation)
    };
    if state & FLOW_SHADOW != 0 {
        return admit_shadow(tables, headers, lives, state);
    }
    if lives {
        if headers.is_opening() && state != 0 { Admission::Afresh } else { Admission::Established }
    } else if is_datagram || headers.is_opening() {
        Admission::Afresh
    } else {
        Admission::Gone
    }
}

/// A flow that was decided in shadow mode stays another proxy's to its end; which a datagram flow has not, so it comes
/// over once its frontend is ours.
#[inline(never)]
fn admit_shadow<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, lives: bool, state: u8) -> Admission {
    let key = &headers.key;
    let begins = headers.is_opening() && (!lives || state != FLOW_SHADOW);
    let is_datagram = key.protocol == UDP;
    let is_ours = || {
        let frontend = tables.frontend(&FrontendKey::new(key.daddr, key.dport, key.protocol));
        frontend.is_some_and(|frontend| frontend.flags & SHADOW == 0)
    };
    if begins || is_datagram && (!lives || is_ours()) { Admission::Afresh } else { Admission::Shadow }
}

/// Whether a reply begins a connection that never asked for the frontend: its ports were those of a flow that has ended,
/// and whoever opens one anew by a frontend renews that.
#[inline(always)]
pub fn is_past<A: Address, E: Entry<Flow<A>>>(headers: &Headers<A>, flow: &E) -> bool {
    const ENDED: u8 = FLOW_FIN_CLIENT | FLOW_FIN_SERVER | FLOW_CLOSED;
    headers.flags & (SYN | ACK | FIN | RST) == SYN | ACK && flow.with(|flow| flow.state) & ENDED != 0
}

/// Notes that a packet passed: time of last use, the pin's timer where packets restart it, and the connection's end.
#[inline(always)]
pub fn note_packet<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, entry: &T::Entry<Flow<A>>) {
    let now_ns = tables.now_ns();
    let is_stale = now_ns.saturating_sub(entry.with(|flow| flow.last_used_ns)) >= REFRESH_NS;
    if is_stale || headers.flags & (FIN | RST) != 0 {
        note_change(tables, headers, entry, now_ns);
    }
}

/// The seldom part of [`note_packet`].
#[inline(never)]
fn note_change<A: Address, T: FamilyTables<A>>(
    tables: &T,
    headers: &Headers<A>,
    entry: &T::Entry<Flow<A>>,
    now_ns: u64,
) {
    let from_client = headers.key.is_from_client();
    if now_ns.saturating_sub(entry.with(|flow| flow.last_used_ns)) >= REFRESH_NS {
        entry.update(|flow| flow.last_used_ns = now_ns);
        if from_client {
            entry.with(|flow| renew_pin(tables, headers, flow, now_ns));
        }
    }
    if headers.flags & (FIN | RST) != 0 {
        note_end(tables, headers, entry, now_ns);
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
    session::renew(tables, &key, flow.backend, (timer, flow.timeout_ns), now_ns);
}

/// Follows a connection's end in both directions' records.
#[inline(always)]
fn note_end<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, entry: &T::Entry<Flow<A>>, now_ns: u64) {
    let before = entry.with(|flow| flow.state);
    let state = after_end(before, headers);
    if state == before {
        return;
    }
    entry.update(|flow| flow.state = state);
    if state & FLOW_SHADOW == 0
        && let Some(other) = tables.flow(&entry.with(|flow| headers.key.opposite(&flow.edit)))
    {
        other.update(|flow| flow.state = state);
    }
    if state & !before & FLOW_CLOSED != 0 {
        entry.with(|flow| end_of_connection(tables, headers, flow, now_ns));
    }
}

/// A new connection takes the place of one whose end was not seen, or not seen whole.
#[inline(never)]
pub fn supersede<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, entry: &T::Entry<Flow<A>>) {
    if headers.is_opening() && entry.with(|flow| flow.state) & FLOW_CLOSED == 0 {
        entry.with(|flow| end_of_connection(tables, headers, flow, tables.now_ns()));
    }
}

/// Under `alive`, the end of a connection restarts its pin's timeout.
#[inline(always)]
fn end_of_connection<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, flow: &Flow<A>, now_ns: u64) {
    if flow.timer != Timer::Alive as u8 || flow.scope == 0 {
        return;
    }
    let from_client = headers.key.is_from_client();
    let client = if from_client { headers.key.saddr } else { flow.edit.daddr };
    let key = SessionKey::new(flow.scope, client, flow.prefix);
    session::end_connection(tables, &key, (flow.backend, flow.generation), now_ns);
}

/// The state of a flow after a packet with FIN or RST.
#[inline(always)]
const fn after_end<A: Address>(state: u8, headers: &Headers<A>) -> u8 {
    if headers.flags & RST != 0 {
        return state | FLOW_CLOSED;
    }
    let sender = if headers.key.is_from_client() { FLOW_FIN_CLIENT } else { FLOW_FIN_SERVER };
    let state = state | sender;
    // In shadow mode the server's FIN is not seen.
    let is_last = state & FLOW_FIN_CLIENT != 0 && state & (FLOW_FIN_SERVER | FLOW_SHADOW) != 0;
    if is_last { state | FLOW_CLOSED } else { state }
}

/// Stores the records of a new connection; that of the packets to come last, so that no reply finds its own missing. In
/// shadow mode replies are not ours, and have none.
///
/// # Errors
/// [`Reason::FlowNotStored`] where the kernel has no room; [`Reason::PortsExhausted`] where its source has to change and
/// cannot; [`Reason::Inconsistent`] where the backend has no record.
#[inline(never)]
pub fn begin<A: Address, T: FamilyTables<A>>(
    tables: &T,
    headers: &Headers<A>,
    frontend: &Frontend,
    now_ns: u64,
    resolved: &Resolved,
) -> Result<(), Reason> {
    let key = &headers.key;
    let is_shadow = frontend.flags & SHADOW != 0;
    let stored = tables.draft(|draft| {
        draft.flow.created_ns = now_ns;
        draft_backend(tables, draft, resolved.chosen.backend)?;
        draft_flow(draft, headers, frontend, resolved);
        if !is_shadow {
            masquerade::claim_replies(tables, key, draft)?;
            let is_hairpin = key.saddr == draft.flow.edit.daddr;
            if is_hairpin || frontend.flags & MASQUERADE != 0 {
                masquerade::masquerade(tables, key.protocol, draft)?;
            } else {
                masquerade::forget(tables, key.protocol, draft);
            }
        }
        tables.put_flow(&draft.key, &draft.flow).map_err(|NotStored| Reason::FlowNotStored)
    });
    stored.unwrap_or(Err(Reason::Inconsistent))
}

/// Drafts the pod's address, and whether it is on this node.
#[inline(never)]
fn draft_backend<A: Address, T: FamilyTables<A>>(tables: &T, draft: &mut Draft<A>, backend: u32) -> Result<(), Reason> {
    let backend = tables.backend(backend).ok_or(Reason::Inconsistent)?;
    draft.flow.edit.daddr = A::from_mapped(backend.address);
    draft.flow.flags = if backend.flags & BACKEND_LOCAL == 0 { FLOW_REMOTE } else { 0 };
    Ok(())
}

/// Drafts the key and the record of a flow, given when it begins, and the pod's address and whether it is on this node.
/// Apart, because what it needs of the stack is free again when the flow is stored.
#[inline(never)]
fn draft_flow<A: Address>(draft: &mut Draft<A>, headers: &Headers<A>, frontend: &Frontend, resolved: &Resolved) {
    let Headers { key, flags, .. } = headers;
    let now_ns = draft.flow.created_ns;
    let chosen = &resolved.chosen;
    draft.key = *key;
    let state = if frontend.flags & SHADOW != 0 { FLOW_SHADOW } else { 0 };
    draft.flow = Flow {
        created_ns: now_ns,
        last_used_ns: now_ns,
        timeout_ns: frontend.timeout_ns,
        edit: rewrite::edit(key, key.saddr, draft.flow.edit.daddr, key.sport, chosen.member.port),
        backend: chosen.backend,
        generation: chosen.member.generation,
        pool: frontend.pool,
        scope: resolved.scope,
        service: frontend.service,
        // A connection that is not known may be at its end already.
        state: if flags & (FIN | RST) != 0 { after_end(state, headers) } else { state },
        timer: frontend.timer,
        prefix: frontend.prefix,
        flags: draft.flow.flags,
    };
}
