//! Flows: judging a packet by its flow, following the states of a connection, storing a new flow.

use crate::{
    abi::{
        Address, BACKEND_LOCAL, BackendRef, FLOW_EXACT, FLOW_FOREIGN, FLOW_OPEN, FLOW_REMOTE, FLOW_RESET, FLOW_SHADOW,
        Flow, FlowKey, FlowScratch, Frontend, FrontendKey, MASQUERADE, Member, MemberKey, Reason, SHADOW, SessionKey,
        Timer, timeout_ns, timeout_s,
    },
    frontend,
    global::GlobalFunctions,
    headers::{FIN, Headers, RST, TCP, UDP},
    rewrite,
    session::{self, Follower, Resolved},
    snat, state,
    tables::{Entry, FamilyTables, NotStored},
};

/// The time of last use of a flow is written at most this often, nanoseconds. The same holds for a pin whose timeout packets
/// restart, unless the timeout is shorter than [`EXACT_BELOW_NS`].
pub const REFRESH_NS: u64 = 1_000_000_000;
/// A timeout shorter than this is restarted by each packet: a second would be more than a hundredth of it.
pub const EXACT_BELOW_NS: u64 = 100 * REFRESH_NS;

/// What a flow means for a packet of the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admission {
    /// The packet belongs to it.
    Established,
    /// The packet opens a new connection with the same ports.
    Reopen,
    /// The pod of the connection has gone: the packet is rejected.
    Gone,
    /// The packet belongs to it, and passes: another proxy translates the connection.
    Shadow,
}

/// Judges a packet from the client against its flow.
#[inline(always)]
pub fn admit<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, flow: &T::Entry<Flow<A>>) -> Admission {
    let is_datagram = headers.key.protocol == UDP;
    let [state, flags] = state_and_flags(flow);
    let lives = if flags & FLOW_FOREIGN != 0 {
        true
    } else if is_datagram {
        may_go_on(tables, headers, flow) || outlives_frontend(tables, headers, flow)
    } else {
        tables.has_backend(backend_of(flow))
    };
    if state & FLOW_SHADOW != 0 {
        return admit_shadow(tables, headers, lives, state);
    }
    if lives {
        if headers.is_opening() && state::is_ending(state) { Admission::Reopen } else { Admission::Established }
    } else if is_datagram || headers.is_opening() {
        Admission::Reopen
    } else {
        Admission::Gone
    }
}

/// Whether a datagram may go to the same backend as the one before it: only if a new flow could go there, to the port that it
/// serves now, and if the client's pin says so. A datagram has no connection to lose.
#[inline(always)]
fn may_go_on<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, flow: &T::Entry<Flow<A>>) -> bool {
    let key = MemberKey { pool: flow.read(Flow::POOL), backend: flow.read(Flow::BACKEND) };
    let (generation, port) = (flow.read(Flow::GENERATION), flow.read(Flow::NEW_DPORT));
    let is_served = tables.is_member(&key, &Member::ready(generation, port));
    is_served && (flow.read(Flow::SCOPE) == 0 || follows_pin(tables, headers, flow))
}

/// Whether the frontend of a datagram has gone and its backend has not. Then it goes on, as TCP connections do.
#[inline(never)]
fn outlives_frontend<A: Address, T: FamilyTables<A>>(
    tables: &T,
    headers: &Headers<A>,
    flow: &T::Entry<Flow<A>>,
) -> bool {
    let find = |record: &mut Frontend| frontend::copy_for_client(tables, &headers.key, record);
    tables.has_backend(backend_of(flow)) && tables.frontend_scratch(find) == Some(Err(Reason::NotFrontend))
}

/// Whether the flow's pin still leads to its backend.
#[inline(never)]
fn follows_pin<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, flow: &T::Entry<Flow<A>>) -> bool {
    let follower = Follower {
        to: backend_of(flow),
        timer: Timer::from_byte(flow.read(Flow::TIMER)),
        timeout_ns: timeout_ns(flow.read(Flow::TIMEOUT_S)),
        created_ns: flow.read(Flow::CREATED_NS),
        last_used_ns: flow.read(Flow::LAST_USED_NS),
    };
    session::leads(tables, &pin_key(headers, flow), &follower)
}

/// A flow that began in shadow mode belongs to another proxy to its end. A datagram flow has no end, so it is taken over once its
/// frontend leaves shadow mode.
#[inline(never)]
fn admit_shadow<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, lives: bool, state: u8) -> Admission {
    let key = &headers.key;
    let begins = headers.is_opening() && (!lives || state::is_ending(state));
    let is_datagram = key.protocol == UDP;
    let is_ours = || {
        let frontend = tables.frontend(&FrontendKey::new(key.daddr, key.dport, key.protocol));
        frontend.is_ok_and(|frontend| frontend.is_some_and(|frontend| frontend.flags & SHADOW == 0))
    };
    if begins || is_datagram && (!lives || is_ours()) { Admission::Reopen } else { Admission::Shadow }
}

/// Notes a packet: the sequence numbers of its sender, and a change of state or time, if there is one.
#[inline(always)]
pub fn note_packet<A: Address, T: GlobalFunctions<A>>(tables: &T, headers: &Headers<A>, entry: &T::Entry<Flow<A>>) {
    let [state, flags] = state_and_flags(entry);
    if tells(headers, state) || renews(headers, flags) || is_due(entry, tables.now_ns()) {
        tables.note_change(headers);
    }
    if headers.key.protocol != UDP && headers.flags & RST == 0 {
        entry.write(Flow::SEGMENT, headers.segment);
    }
}

/// Whether a packet may change the state of its connection.
#[inline(always)]
fn tells<A: Address>(headers: &Headers<A>, state: u8) -> bool {
    let is_request = headers.key.protocol == UDP && headers.key.is_from_client();
    headers.flags & (FIN | RST) != 0 || state & FLOW_OPEN == 0 && !is_request
}

/// Whether a packet restarts a timeout that is too short for [`REFRESH_NS`].
#[inline(always)]
fn renews<A: Address>(headers: &Headers<A>, flags: u8) -> bool {
    flags & FLOW_EXACT != 0 && headers.key.is_from_client()
}

#[inline(always)]
fn is_due<A: Address>(entry: &impl Entry<Flow<A>>, now_ns: u64) -> bool {
    now_ns.saturating_sub(entry.read(Flow::LAST_USED_NS)) >= REFRESH_NS
}

/// Updates the state of the connection, the time of last use, and the pin's timer if packets restart it.
#[inline(always)]
pub fn note_change<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>) {
    // Scratch memory: before Linux 6.2 a map key must not be an argument of a global function.
    let _ = tables.flow_scratch(|scratch| {
        scratch.key = headers.key;
        let Some(entry) = tables.flow(&scratch.key) else { return };
        let now_ns = tables.now_ns();
        let [state, flags] = state_and_flags(&entry);
        if tells(headers, state) {
            scratch.other_key = headers.key.opposite(&entry.read(Flow::EDIT));
            advance(tables, headers, &entry, &scratch.other_key);
        }
        if renews(headers, flags) || is_due(&entry, now_ns) {
            note_use(tables, headers, &entry, now_ns);
        }
    });
}

/// Writes the time of last use, and restarts the pin's timeout if packets of the client do that.
#[inline(never)]
fn note_use<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, entry: &T::Entry<Flow<A>>, now_ns: u64) {
    entry.write(Flow::LAST_USED_NS, now_ns);
    if headers.key.is_from_client() {
        renew_pin(tables, headers, entry, now_ns);
    }
}

/// Restarts the pin's timeout if its timer says that packets do that. An expired pin stays expired.
#[inline(always)]
fn renew_pin<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, flow: &T::Entry<Flow<A>>, now_ns: u64) {
    let timer = Timer::from_byte(flow.read(Flow::TIMER));
    if flow.read(Flow::SCOPE) == 0 || !packets_restart(timer, headers.key.protocol) {
        return;
    }
    let timeout_ns = timeout_ns(flow.read(Flow::TIMEOUT_S));
    session::renew(tables, &pin_key(headers, flow), flow.read(Flow::BACKEND), (timer, timeout_ns), now_ns);
}

/// Whether packets restart a pin's timeout. The end of a datagram flow cannot be seen, so under `alive` its packets do.
#[inline(always)]
const fn packets_restart(timer: Timer, protocol: u8) -> bool {
    matches!(timer, Timer::Packet) || matches!(timer, Timer::Alive) && protocol == UDP
}

/// Updates the state in the records of both directions, and the pin's count when a connection opens or ends.
///
/// The client's record decides: adding bits to it (an atomic `fetch_or`) returns the bits before, so of two CPUs that see the
/// end of a connection only one counts it. An open connection is counted before other CPUs can see that it is open, and
/// uncounted if another CPU was first, so that the count never misses one.
#[inline(always)]
fn advance<A: Address, T: FamilyTables<A>>(
    tables: &T,
    headers: &Headers<A>,
    entry: &T::Entry<Flow<A>>,
    opposite: &FlowKey<A>,
) {
    let own = entry.read(Flow::STATE);
    // In shadow mode the other direction is not ours.
    let other = if own & FLOW_SHADOW == 0 { tables.flow(opposite) } else { None };
    let added = if headers.flags & RST == 0 {
        state::added(own, headers.key.is_from_client(), headers.key.protocol, headers.flags)
    } else if accepts_reset(headers, entry, other.as_ref()) {
        FLOW_RESET
    } else {
        return;
    };
    let is_counted = is_counted(headers.key.protocol, entry.read(Flow::TIMER), entry.read(Flow::SCOPE));
    let opens = is_counted && own & FLOW_OPEN == 0 && state::is_live(own | added);
    if opens {
        session::add_connection(tables, &pin_key(headers, entry), backend_of(entry));
    }
    let before = match &other {
        Some(other) if headers.key.is_from_client() => {
            let before = add_state(entry, added);
            add_state(other, added);
            before
        }
        Some(other) => {
            let before = add_state(other, added);
            add_state(entry, added);
            before
        }
        None => add_state(entry, added),
    };
    if opens && !state::is_half_open(before) || is_counted && state::is_live(before) && state::is_closed(before | added)
    {
        end_connection(tables, headers, entry);
    }
}

/// Whether the receiver would accept this RST: see [`state::accepts_reset`]. If too little was seen of the connection, it counts.
#[inline(always)]
fn accepts_reset<A: Address, E: Entry<Flow<A>>>(headers: &Headers<A>, entry: &E, other: Option<&E>) -> bool {
    let Some(other) = other.filter(|_| headers.key.protocol == TCP) else { return true };
    let (state, sender) = (entry.read(Flow::STATE), entry.read(Flow::SEGMENT));
    let receiver = other.read(Flow::SEGMENT);
    let is_unknown = state & FLOW_OPEN == 0 || sender == 0 || receiver == 0;
    is_unknown || state::accepts_reset(headers.segment, sender, receiver)
}

/// Ends a flow whose end was not seen, or not completely, because a new connection replaces it.
#[inline(never)]
pub fn supersede<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, entry: &T::Entry<Flow<A>>) {
    let is_counted = is_counted(headers.key.protocol, entry.read(Flow::TIMER), entry.read(Flow::SCOPE));
    if is_counted && state::is_live(add_state(entry, FLOW_RESET)) {
        end_connection(tables, headers, entry);
    }
}

/// Whether the pin counts the connection: under `alive`, if its end can be seen.
#[inline(always)]
const fn is_counted(protocol: u8, timer: u8, scope: u32) -> bool {
    timer == Timer::Alive as u8 && scope != 0 && protocol == TCP
}

/// Adds bits to the flow's state atomically, and returns the state before.
#[inline(always)]
fn add_state<A: Address>(entry: &impl Entry<Flow<A>>, bits: u8) -> u8 {
    let before = entry.add_bits(Flow::STATE_WORD, u32::from_ne_bytes([bits, 0, 0, 0]));
    let [state, ..] = before.to_ne_bytes();
    state
}

/// The flow's state and flags, by one load.
#[inline(always)]
fn state_and_flags<A: Address>(flow: &impl Entry<Flow<A>>) -> [u8; 2] {
    let [state, _, _, flags] = flow.read(Flow::STATE_WORD).to_ne_bytes();
    [state, flags]
}

/// The flow's backend.
#[inline(always)]
fn backend_of<A: Address>(flow: &impl Entry<Flow<A>>) -> BackendRef {
    BackendRef { index: flow.read(Flow::BACKEND), generation: flow.read(Flow::GENERATION) }
}

/// The key of the flow's pin, from a packet of either direction.
#[inline(always)]
fn pin_key<A: Address>(headers: &Headers<A>, flow: &impl Entry<Flow<A>>) -> SessionKey<A> {
    let client = if headers.key.is_from_client() { headers.key.saddr } else { flow.read(Flow::NEW_DADDR) };
    SessionKey::new(flow.read(Flow::SCOPE), client, flow.read(Flow::PREFIX))
}

/// Under `alive`, the end of a connection restarts its pin's timeout.
#[inline(always)]
fn end_connection<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, entry: &T::Entry<Flow<A>>) {
    session::end_connection(tables, &pin_key(headers, entry), backend_of(entry), tables.now_ns());
}

/// Stores the records of a new connection; that of the client's direction last, so that no reply finds its record missing. In
/// shadow mode there is no record for replies.
///
/// # Errors
/// [`Reason::FlowNotStored`] if the kernel has no room; [`Reason::PortsExhausted`] if its source has to change and no port is
/// free; [`Reason::Inconsistent`] if the backend has no record.
#[inline(never)]
pub fn begin<A: Address, T: GlobalFunctions<A>>(
    tables: &T,
    headers: &Headers<A>,
    frontend: &Frontend,
    now_ns: u64,
    resolved: &Resolved,
) -> Result<(), Reason> {
    let key = &headers.key;
    let is_shadow = frontend.flags & SHADOW != 0;
    let stored = tables.flow_scratch(|scratch| {
        scratch.flow.created_ns = now_ns;
        fill_backend(tables, scratch, resolved.chosen.backend.index)?;
        fill_flow(scratch, headers, frontend, resolved);
        if !is_shadow {
            snat::reserve_reply(tables, scratch)?;
            let is_hairpin = key.saddr == scratch.flow.edit.daddr;
            if is_hairpin || frontend.flags & MASQUERADE != 0 {
                snat::assign_node_source(tables, key.protocol, scratch)?;
            } else {
                snat::remove_stale(tables, key.protocol, scratch);
            }
        }
        tables.put_flow(&scratch.key, &scratch.flow).map_err(|NotStored| Reason::FlowNotStored)?;
        count_open(tables, scratch);
        Ok(())
    });
    stored.unwrap_or(Err(Reason::Inconsistent))
}

/// Counts a connection that is open when its flow is stored, because its handshake was not seen.
#[inline(never)]
fn count_open<A: Address, T: FamilyTables<A>>(tables: &T, scratch: &FlowScratch<A>) {
    let FlowScratch { key, flow, .. } = scratch;
    if is_counted(key.protocol, flow.timer, flow.scope) && state::is_live(flow.state) {
        let pin = SessionKey::new(flow.scope, key.saddr, flow.prefix);
        session::add_connection(tables, &pin, flow.backend);
    }
}

/// Sets the pod's address, and whether it is on this node.
#[inline(never)]
fn fill_backend<A: Address, T: FamilyTables<A>>(
    tables: &T,
    scratch: &mut FlowScratch<A>,
    backend: u32,
) -> Result<(), Reason> {
    let backend = tables.backend(backend).ok_or(Reason::Inconsistent)?;
    scratch.flow.edit.daddr = A::from_mapped(backend.address);
    scratch.flow.flags = if backend.flags & BACKEND_LOCAL == 0 { FLOW_REMOTE } else { 0 };
    Ok(())
}

/// Sets the key and the record of a flow. Its creation time, the pod's address, and whether that is on this node, are set
/// already. Out of line: its stack frame is released before the flow is stored.
#[inline(never)]
fn fill_flow<A: Address>(scratch: &mut FlowScratch<A>, headers: &Headers<A>, frontend: &Frontend, resolved: &Resolved) {
    let Headers { key, flags, .. } = headers;
    let now_ns = scratch.flow.created_ns;
    let chosen = &resolved.chosen;
    scratch.key = *key;
    let shadow = if frontend.flags & SHADOW != 0 { FLOW_SHADOW } else { 0 };
    let is_exact =
        frontend.timeout_ns < EXACT_BELOW_NS && packets_restart(Timer::from_byte(frontend.timer), key.protocol);
    scratch.flow = Flow {
        created_ns: now_ns,
        last_used_ns: now_ns,
        segment: headers.segment,
        edit: rewrite::edit(key, key.saddr, scratch.flow.edit.daddr, key.sport, chosen.port),
        backend: chosen.backend,
        pool: frontend.pool,
        scope: resolved.scope,
        timeout_s: timeout_s(frontend.timeout_ns),
        state: state::first(key.protocol, *flags) | shadow,
        timer: frontend.timer,
        prefix: frontend.prefix,
        flags: scratch.flow.flags | if is_exact { FLOW_EXACT } else { 0 },
    };
}
