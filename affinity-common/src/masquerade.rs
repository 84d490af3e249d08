//! The source of a connection, where it cannot stay as it is.
//!
//! A reply is told from others by the pod's address and port, and by the client's. So two connections of one client's
//! port that reach one pod, by different frontends or straight ([`crate::foreign`]), would be mixed up: the second one gets
//! another source port ([`claim_replies`], [`change_port`]). And replies that would not come back by this node at all - to
//! a client outside that another node could answer directly, or to the pod itself - are made to: the source becomes the
//! node's ([`masquerade`]).
//!
//! The node's address is put in last, where the packet leaves towards the pod ([`Direction::Snat`]), and taken out
//! first, where the reply enters ([`Direction::RevSnat`]). In between the node's stack sees the client, as its policies
//! and its connection tracking expect, and nothing that would come from one of its own addresses.

use crate::{
    abi::{
        Address, Direction, Draft, FLOW_FOREIGN, Flow, FlowKey, Foreign, NO_BACKEND, Node, Port, Reason, V4, filter_bit,
    },
    foreign,
    parse::{Headers, SCTP, UDP},
    rewrite,
    select::next_draw,
    state,
    tables::{Entry, FamilyTables, NotStored},
};

/// Source ports that are tried for a connection which collides with another.
const TRIES_COLLIDING: u32 = 8;
/// Source ports of the node that are tried for a connection. They are taken in turn, so the next one is the one that was
/// taken longest ago.
const TRIES: u32 = 64;

/// How long an exchange of datagrams may be silent before another one may have its port: longer than anybody waits for an
/// answer.
pub const EXCHANGE_SILENT_NS: u64 = 10_000_000_000;
/// The same for one that has lasted for [`STREAM_NS`]: as long as the kernel's connection tracking holds a stream
/// (`nf_conntrack_udp_timeout_stream`), which it takes for one after as long (`nf_conntrack_proto_udp.c`).
pub const STREAM_SILENT_NS: u64 = 120_000_000_000;
/// How long datagrams go on where they are a stream.
pub const STREAM_NS: u64 = 2_000_000_000;

impl Node {
    /// The address of a family; none: nothing is masqueraded.
    #[inline(always)]
    #[must_use]
    pub fn address<A: Address>(&self) -> Option<A> {
        let is_v4 = A::BITS == V4::BITS;
        let address = A::from_mapped(if is_v4 { self.address_v4.to_mapped() } else { self.address_v6.0 });
        let is_there = if is_v4 { self.address_v4.0 != [0; 4] } else { self.address_v6.0 != [0; 16] };
        (is_there && self.port_count > 0).then_some(address)
    }

    /// The source port of a try.
    #[inline(always)]
    fn port(&self, tried: u64) -> Port {
        let offset = tried.checked_rem(u64::from(self.port_count)).unwrap_or(0);
        Port::new(self.port_first.get().wrapping_add(offset as u16))
    }
}

/// Stores the record of a new flow's replies. The draft holds its translation forward, which gets another source port
/// where the replies would be those of another connection.
///
/// # Errors
/// [`Reason::FlowNotStored`], [`Reason::PortsExhausted`].
#[inline(never)]
pub fn claim_replies<A: Address, T: FamilyTables<A>>(tables: &T, draft: &mut Draft<A>) -> Result<(), Reason> {
    if claim_replies_to(tables, draft)? {
        return Ok(());
    }
    let is_claimed = find_source_port(tables, draft) && claim_replies_to(tables, draft)?;
    if is_claimed { Ok(()) } else { Err(Reason::PortsExhausted) }
}

/// The same for the source port of the draft; false where its replies are another connection's.
#[inline(never)]
fn claim_replies_to<A: Address, T: FamilyTables<A>>(tables: &T, draft: &mut Draft<A>) -> Result<bool, Reason> {
    draft_replies(draft);
    rewrite::set_edit(&mut draft.flow.edit, &draft.back, &draft.key);
    let is_claimed = claim(tables, draft, true);
    rewrite::set_edit(&mut draft.flow.edit, &draft.key, &draft.back);
    is_claimed
}

/// Drafts the key of replies. Apart, as [`draft_straight`] is: a key on the stack is free again when the flow is stored.
#[inline(never)]
fn draft_replies<A: Address>(draft: &mut Draft<A>) {
    draft.back = draft.key.opposite(&draft.flow.edit);
}

/// Drafts the key of the client's packets after their translation.
#[inline(never)]
fn draft_outward<A: Address>(draft: &mut Draft<A>, protocol: u8) {
    draft.forth = FlowKey::translated(&draft.flow.edit, protocol, Direction::Snat);
}

/// Drafts the key of replies to the source of the second translation.
#[inline(never)]
fn draft_returning<A: Address>(draft: &mut Draft<A>) {
    draft.back = draft.forth.opposite(&draft.second.edit);
}

/// Drafts the keys of a connection that is not translated.
#[inline(never)]
fn draft_straight<A: Address>(draft: &mut Draft<A>, headers: &Headers<A>) {
    draft.key = headers.key;
    draft.back = headers.key.reply();
}

/// Finds a source port with which replies are nobody else's.
#[inline(never)]
fn find_source_port<A: Address, T: FamilyTables<A>>(tables: &T, draft: &mut Draft<A>) -> bool {
    let mut draw = tables.random();
    for _ in 0..TRIES_COLLIDING {
        // Not a port of a system service. The checksum of SCTP is not one that could be kept in step.
        draft.back.dport = Port::new(draw as u16 | 1024);
        if draft.back.protocol != SCTP && tables.is_free(&draft.back) {
            draft.flow.edit.sport = draft.back.dport;
            return true;
        }
        draw = next_draw(draw);
    }
    false
}

/// A packet that enters from a client straight to a pod that is a member: a connection to no frontend. Where the pod's
/// replies would be taken for those of a flow, it gets another source port, and becomes a flow itself; true. Else it is
/// noted, and passes as it is; so it does where no port is to be had.
#[inline(never)]
pub fn enter<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>) -> bool {
    let is_datagram = headers.key.protocol == UDP;
    if !is_datagram && !headers.is_opening() {
        foreign::note_end(tables, headers, headers.key.direction ^ 1, false);
        return false;
    }
    let is_changed = tables.draft(|draft| {
        draft_straight(draft, headers);
        draft.flow.created_ns = tables.now_ns();
        if tables.flow(&draft.back).is_none() || tables.is_free(&draft.back) {
            pass_straight(tables, draft, is_datagram);
            false
        } else {
            change_port(tables, draft)
        }
    });
    is_changed.unwrap_or(false)
}

/// The draft's connection keeps its source; a flow that had its replies, and is over, is forgotten. Of datagrams alone nothing
/// is noted: where a flow comes to have their replies, the next one finds that out.
#[inline(always)]
fn pass_straight<A: Address, T: FamilyTables<A>>(tables: &T, draft: &mut Draft<A>, is_datagram: bool) {
    dissolve(tables, draft);
    tables.remove_flow(&draft.back);
    if !is_datagram {
        tables.put_foreign(&draft.back, &Foreign { last_sent_ns: draft.flow.created_ns, state: 0, pad: 0 });
    }
}

/// Gives the connection of the draft's key another source port.
#[inline(always)]
fn change_port<A: Address, T: FamilyTables<A>>(tables: &T, draft: &mut Draft<A>) -> bool {
    draft_foreign_flow(draft);
    if claim_replies(tables, draft).is_err() || tables.put_flow(&draft.key, &draft.flow).is_err() {
        return false;
    }
    tables.mark(Direction::Dnat, filter_bit(draft.key.daddr, draft.key.dport, draft.key.protocol));
    true
}

/// Drafts a flow of the draft's key that is not translated, yet; when it begins is there already.
#[inline(never)]
fn draft_foreign_flow<A: Address>(draft: &mut Draft<A>) {
    let now_ns = draft.flow.created_ns;
    let FlowKey { saddr, daddr, sport, dport, .. } = draft.key;
    draft.flow = Flow {
        created_ns: now_ns,
        last_used_ns: now_ns,
        timeout_ns: 0,
        segment: 0,
        edit: rewrite::edit(&draft.key, saddr, daddr, sport, dport),
        backend: NO_BACKEND,
        generation: 0,
        pool: 0,
        scope: 0,
        service: 0,
        state: 0,
        timer: 0,
        prefix: 0,
        flags: FLOW_FOREIGN,
    };
}

/// Gives a new flow, whose translation forward is final, a source of the node.
///
/// # Errors
/// [`Reason::FlowNotStored`], [`Reason::PortsExhausted`].
#[inline(never)]
pub fn masquerade<A: Address, T: FamilyTables<A>>(
    tables: &T,
    protocol: u8,
    draft: &mut Draft<A>,
) -> Result<(), Reason> {
    let Some(address) = tables.node().and_then(|node| node.address()) else { return Ok(()) };
    draft.second = draft.flow;
    (draft.second.scope, draft.second.segment, draft.second.state) = (0, 0, 0);
    draft_outward(draft, protocol);
    if renew(tables, draft) {
        return Ok(());
    }
    draft.second.edit.saddr = address;
    draft_returning(draft);
    if !find_port(tables, draft) {
        return Err(Reason::PortsExhausted);
    }
    rewrite::set_edit(&mut draft.second.edit, &draft.back, &draft.forth);
    if !claim(tables, draft, false)? {
        return Err(Reason::PortsExhausted);
    }
    rewrite::set_edit(&mut draft.second.edit, &draft.forth, &draft.back);
    tables.mark(Direction::RevSnat, filter_bit(draft.back.daddr, draft.back.dport, protocol));
    tables.mark(Direction::Snat, filter_bit(draft.forth.daddr, draft.forth.dport, protocol));
    tables.put_flow(&draft.forth, &draft.second).map_err(|NotStored| Reason::FlowNotStored)
}

/// A new flow keeps its source: what another one of the same addresses and ports had is no more.
#[inline(never)]
pub fn forget<A: Address, T: FamilyTables<A>>(tables: &T, protocol: u8, draft: &mut Draft<A>) {
    draft_outward(draft, protocol);
    let bit = filter_bit(draft.forth.daddr, draft.forth.dport, protocol);
    if tables.filter(Direction::Snat, bit) {
        tables.remove_flow(&draft.forth);
    }
}

/// Finds a port of the node for replies to come back to. SCTP keeps the client's: its checksum covers ports, and is not
/// one that could be kept in step.
#[inline(never)]
fn find_port<A: Address, T: FamilyTables<A>>(tables: &T, draft: &mut Draft<A>) -> bool {
    if draft.back.protocol == SCTP {
        return tables.is_free(&draft.back);
    }
    let Some(node) = tables.node() else { return false };
    for _ in 0..TRIES {
        draft.back.dport = node.port(tables.tried(draft.flow.backend));
        if tables.is_free(&draft.back) {
            return true;
        }
    }
    false
}

/// Whether the same addresses and ports have a port of the node already: then they keep it. Out of line, for the sake of
/// its caller's stack frame.
#[inline(never)]
fn renew<A: Address, T: FamilyTables<A>>(tables: &T, draft: &mut Draft<A>) -> bool {
    let Some(known) = tables.flow(&draft.forth) else { return false };
    draft.back = draft.forth.opposite(&known.read(Flow::EDIT));
    let Some(back) = tables.flow(&draft.back) else { return false };
    for record in [known, back] {
        record.write(Flow::LAST_USED_NS, draft.flow.last_used_ns);
        record.write(Flow::BACKEND, draft.flow.backend);
        record.write(Flow::GENERATION, draft.flow.generation);
        record.write(Flow::SEGMENT, 0);
        record.write(Flow::STATE, 0);
    }
    true
}

/// Whether this key for replies is free: neither a flow nor a connection to no frontend has it, or its holder is over: it has
/// closed, or, where no end can be seen, it has been silent for long, at the pod too.
#[inline(always)]
pub fn is_free<A: Address, T: FamilyTables<A>>(tables: &T, replies: &FlowKey<A>) -> bool {
    // A copy, because a map's key may not be memory that a global function was given.
    let mut key = *replies;
    let now_ns = tables.now_ns();
    if foreign::holds(tables, &key, now_ns) {
        return false;
    }
    let Some(holder) = tables.flow(&key) else { return true };
    let is_closed = state::is_closed(holder.read(Flow::STATE));
    if is_closed || key.protocol != UDP {
        return is_closed;
    }
    if key.direction == Direction::RevSnat as u8 {
        key = FlowKey::translated(&holder.read(Flow::EDIT), UDP, Direction::RevDnat);
        if tables.flow(&key).is_some_and(|flow| !is_silent(&flow, now_ns)) {
            return false;
        }
    }
    is_silent(&holder, now_ns)
}

/// Whether datagrams have not been seen for so long that nobody waits for more.
#[inline(always)]
fn is_silent<A: Address>(flow: &impl Entry<Flow<A>>, now_ns: u64) -> bool {
    let last_used_ns = flow.read(Flow::LAST_USED_NS);
    let is_stream = last_used_ns.saturating_sub(flow.read(Flow::CREATED_NS)) >= STREAM_NS;
    let limit_ns = if is_stream { STREAM_SILENT_NS } else { EXCHANGE_SILENT_NS };
    now_ns.saturating_sub(last_used_ns) >= limit_ns
}

/// Removes all records of the flow that had the draft's key for replies, so that its next packet, if there is one, begins
/// another.
#[inline(never)]
fn dissolve<A: Address, T: FamilyTables<A>>(tables: &T, draft: &mut Draft<A>) {
    let Some(holder) = tables.flow(&draft.back) else { return };
    draft.other = draft.back.opposite(&holder.read(Flow::EDIT));
    tables.remove_flow(&draft.other);
    if draft.back.direction != Direction::RevSnat as u8 {
        return;
    }
    draft.other = FlowKey::translated(&holder.read(Flow::EDIT), draft.back.protocol, Direction::RevDnat);
    if let Some(flow) = tables.flow(&draft.other) {
        let forward = draft.other.opposite(&flow.read(Flow::EDIT));
        tables.remove_flow(&draft.other);
        tables.remove_flow(&forward);
    }
}

/// Stores a record for packets that come back, unless another flow has them that is not over: the draft's flow, which renews
/// one of the same translation; else its second translation.
#[inline(always)]
fn claim<A: Address, T: FamilyTables<A>>(tables: &T, draft: &mut Draft<A>, is_first: bool) -> Result<bool, Reason> {
    if foreign::holds(tables, &draft.back, draft.flow.created_ns) {
        return Ok(false);
    }
    let record = if is_first { &draft.flow } else { &draft.second };
    if tables.add_flow(&draft.back, record).is_ok() {
        return Ok(true);
    }
    let Some(holder) = tables.flow(&draft.back) else { return Err(Reason::FlowNotStored) };
    let is_same = is_first && holder.read(Flow::EDIT) == draft.flow.edit;
    if !is_same {
        if !tables.is_free(&draft.back) {
            return Ok(false);
        }
        if draft.back.protocol == UDP {
            dissolve(tables, draft);
        }
    }
    let record = if is_first { &draft.flow } else { &draft.second };
    tables.put_flow(&draft.back, record).map_err(|NotStored| Reason::FlowNotStored)?;
    Ok(true)
}
