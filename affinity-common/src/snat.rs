//! Source NAT, for connections that cannot keep their source.
//!
//! * *Colliding ports.* A reply is identified by the addresses and ports of the pod and of the client. If one client port has
//!   two connections to one pod, through different frontends or directly ([`crate::foreign`]), their replies would be mixed
//!   up. So the second connection gets another source port ([`reserve_reply`], [`change_port`]).
//! * *Masquerading.* Some replies would not pass this node: to an external client that another node could answer directly, or to
//!   the pod itself. So the source becomes an address of the node ([`assign_node_source`]).
//!
//! The address of the node is set last, where the packet leaves towards the pod ([`Direction::Snat`]), and removed first, where
//! the reply arrives ([`Direction::RevSnat`]). In between, the network stack sees the client's address, as network policies
//! and conntrack expect, and no packet from an address of its own.

use crate::{
    abi::{
        Address, BackendRef, Direction, FLOW_FOREIGN, Flow, FlowKey, FlowScratch, Foreign, NO_BACKEND, Node, Port,
        Reason, V4, filter_bit,
    },
    foreign,
    global::GlobalFunctions,
    headers::{Headers, SCTP, UDP},
    rewrite,
    select::next_draw,
    state,
    tables::{Entry, FamilyTables, NotStored},
};

/// Number of source ports to try for a connection that collides with another.
const TRIES_COLLIDING: u32 = 8;
/// Number of source ports of the node to try for a connection. They are used in turn, so the next one is the one that was used
/// longest ago.
const TRIES: u32 = 64;

/// How long an exchange of datagrams may be silent before another one may have its port: longer than a client waits for an
/// answer.
pub const EXCHANGE_SILENT_NS: u64 = 10_000_000_000;
/// The same for one that has lasted for [`STREAM_NS`]: as long as conntrack keeps a stream (`nf_conntrack_udp_timeout_stream`).
/// Conntrack, too, treats it as a stream after that time (`nf_conntrack_proto_udp.c`).
pub const STREAM_SILENT_NS: u64 = 120_000_000_000;
/// How long an exchange of datagrams must last to be a stream.
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

    /// The source port at a position in the range.
    #[inline(always)]
    fn snat_port(&self, cursor: u64) -> Port {
        let offset = cursor.checked_rem(u64::from(self.port_count)).unwrap_or(0);
        Port::new(self.port_first.get().wrapping_add(offset as u16))
    }
}

/// Stores the record for the replies of a new flow. The scratch memory holds its DNAT, which gets another source port if the key
/// of the replies belongs to another connection.
///
/// # Errors
/// [`Reason::FlowNotStored`], [`Reason::PortsExhausted`].
#[inline(never)]
pub fn reserve_reply<A: Address, T: GlobalFunctions<A>>(
    tables: &T,
    scratch: &mut FlowScratch<A>,
) -> Result<(), Reason> {
    if reserve_reply_of_port(tables, scratch)? {
        return Ok(());
    }
    let is_reserved = find_source_port(tables, scratch) && reserve_reply_of_port(tables, scratch)?;
    if is_reserved { Ok(()) } else { Err(Reason::PortsExhausted) }
}

/// The same with the given source port; false if the key of the replies belongs to another connection.
#[inline(never)]
fn reserve_reply_of_port<A: Address, T: GlobalFunctions<A>>(
    tables: &T,
    scratch: &mut FlowScratch<A>,
) -> Result<bool, Reason> {
    fill_reply_key(scratch);
    rewrite::set_edit(&mut scratch.flow.edit, &scratch.reply_key, &scratch.key);
    let is_reserved = reserve_key(tables, scratch, true);
    rewrite::set_edit(&mut scratch.flow.edit, &scratch.key, &scratch.reply_key);
    is_reserved
}

/// Sets the key of replies. Out of line, as [`fill_direct_keys`]: its stack frame is released before the flow is stored.
#[inline(never)]
fn fill_reply_key<A: Address>(scratch: &mut FlowScratch<A>) {
    scratch.reply_key = scratch.key.opposite(&scratch.flow.edit);
}

/// Sets the key of the client's packets after DNAT.
#[inline(never)]
fn fill_snat_key<A: Address>(scratch: &mut FlowScratch<A>, protocol: u8) {
    scratch.snat_key = FlowKey::translated(&scratch.flow.edit, protocol, Direction::Snat);
}

/// Sets the key of replies to the source after SNAT.
#[inline(never)]
fn fill_rev_snat_key<A: Address>(scratch: &mut FlowScratch<A>) {
    scratch.reply_key = scratch.snat_key.opposite(&scratch.snat.edit);
}

/// Sets the keys of a direct connection.
#[inline(never)]
fn fill_direct_keys<A: Address>(scratch: &mut FlowScratch<A>, headers: &Headers<A>) {
    scratch.key = headers.key;
    scratch.reply_key = headers.key.reply();
}

/// Finds a source port whose reply key is free.
#[inline(never)]
fn find_source_port<A: Address, T: GlobalFunctions<A>>(tables: &T, scratch: &mut FlowScratch<A>) -> bool {
    let mut draw = tables.random();
    for _ in 0..TRIES_COLLIDING {
        // Not a port of a system service. The checksum of SCTP cannot be updated incrementally.
        scratch.reply_key.dport = Port::new(draw as u16 | 1024);
        if scratch.reply_key.protocol != SCTP && tables.is_free(&scratch.reply_key) {
            scratch.flow.edit.sport = scratch.reply_key.dport;
            return true;
        }
        draw = next_draw(draw);
    }
    false
}

/// Handles a packet from a client directly to a pod that is a member. If its replies would match a flow, the connection becomes
/// a flow with another source port: true. Otherwise, or if no port is free, it is noted and passes unchanged: false.
#[inline(never)]
pub fn handle_direct<A: Address, T: GlobalFunctions<A>>(tables: &T, headers: &Headers<A>) -> bool {
    let is_datagram = headers.key.protocol == UDP;
    if !is_datagram && !headers.is_opening() {
        foreign::note_end(tables, headers, headers.key.direction ^ 1, false);
        return false;
    }
    let is_changed = tables.flow_scratch(|scratch| {
        fill_direct_keys(scratch, headers);
        scratch.flow.created_ns = tables.now_ns();
        if tables.flow(&scratch.reply_key).is_none() || tables.is_free(&scratch.reply_key) {
            pass_straight(tables, scratch, is_datagram);
            false
        } else {
            change_port(tables, scratch)
        }
    });
    is_changed.unwrap_or(false)
}

/// The connection keeps its source. A finished flow with the same reply key is removed. Datagrams are not noted: if a flow
/// gets their reply key later, the next datagram finds out.
#[inline(always)]
fn pass_straight<A: Address, T: FamilyTables<A>>(tables: &T, scratch: &mut FlowScratch<A>, is_datagram: bool) {
    delete_conflict(tables, scratch);
    tables.remove_flow(&scratch.reply_key);
    if !is_datagram {
        tables.put_foreign(&scratch.reply_key, &Foreign { last_sent_ns: scratch.flow.created_ns, state: 0, pad: 0 });
    }
}

/// Gives the connection another source port.
#[inline(always)]
fn change_port<A: Address, T: GlobalFunctions<A>>(tables: &T, scratch: &mut FlowScratch<A>) -> bool {
    fill_foreign_flow(scratch);
    if reserve_reply(tables, scratch).is_err() || tables.put_flow(&scratch.key, &scratch.flow).is_err() {
        return false;
    }
    tables.mark(Direction::Dnat, filter_bit(scratch.key.daddr, scratch.key.dport, scratch.key.protocol));
    true
}

/// Sets the record of a flow that is not translated yet. Its creation time is set already.
#[inline(never)]
fn fill_foreign_flow<A: Address>(scratch: &mut FlowScratch<A>) {
    let now_ns = scratch.flow.created_ns;
    let FlowKey { saddr, daddr, sport, dport, .. } = scratch.key;
    scratch.flow = Flow {
        created_ns: now_ns,
        last_used_ns: now_ns,
        segment: 0,
        edit: rewrite::edit(&scratch.key, saddr, daddr, sport, dport),
        backend: BackendRef { index: NO_BACKEND, generation: 0 },
        pool: 0,
        scope: 0,
        timeout_s: 0,
        state: 0,
        timer: 0,
        prefix: 0,
        flags: FLOW_FOREIGN,
    };
}

/// Gives a new flow a source address and port of the node, after its DNAT is final.
///
/// # Errors
/// [`Reason::FlowNotStored`], [`Reason::PortsExhausted`].
#[inline(never)]
pub fn assign_node_source<A: Address, T: GlobalFunctions<A>>(
    tables: &T,
    protocol: u8,
    scratch: &mut FlowScratch<A>,
) -> Result<(), Reason> {
    let Some(address) = tables.node().and_then(|node| node.address()) else { return Ok(()) };
    scratch.snat = scratch.flow;
    (scratch.snat.scope, scratch.snat.segment) = (0, 0);
    fill_snat_key(scratch, protocol);
    if reuse_port(tables, scratch) {
        return Ok(());
    }
    scratch.snat.edit.saddr = address;
    fill_rev_snat_key(scratch);
    if !find_snat_port(tables, scratch) {
        return Err(Reason::PortsExhausted);
    }
    rewrite::set_edit(&mut scratch.snat.edit, &scratch.reply_key, &scratch.snat_key);
    if !reserve_key(tables, scratch, false)? {
        return Err(Reason::PortsExhausted);
    }
    rewrite::set_edit(&mut scratch.snat.edit, &scratch.snat_key, &scratch.reply_key);
    tables.mark(Direction::RevSnat, filter_bit(scratch.reply_key.daddr, scratch.reply_key.dport, protocol));
    tables.mark(Direction::Snat, filter_bit(scratch.snat_key.daddr, scratch.snat_key.dport, protocol));
    tables.put_flow(&scratch.snat_key, &scratch.snat).map_err(|NotStored| Reason::FlowNotStored)
}

/// A new flow keeps its source: removes the SNAT record of an earlier flow with the same addresses and ports.
#[inline(never)]
pub fn remove_stale<A: Address, T: FamilyTables<A>>(tables: &T, protocol: u8, scratch: &mut FlowScratch<A>) {
    fill_snat_key(scratch, protocol);
    let bit = filter_bit(scratch.snat_key.daddr, scratch.snat_key.dport, protocol);
    if tables.filter(Direction::Snat, bit) {
        tables.remove_flow(&scratch.snat_key);
    }
}

/// Finds a free port of the node. SCTP keeps the client's port, because its checksum (CRC-32c) covers the ports and cannot be
/// updated incrementally.
#[inline(never)]
fn find_snat_port<A: Address, T: GlobalFunctions<A>>(tables: &T, scratch: &mut FlowScratch<A>) -> bool {
    if scratch.reply_key.protocol == SCTP {
        return tables.is_free(&scratch.reply_key);
    }
    let Some(node) = tables.node() else { return false };
    for _ in 0..TRIES {
        scratch.reply_key.dport = node.snat_port(tables.next_snat_port(scratch.flow.backend.index));
        if tables.is_free(&scratch.reply_key) {
            return true;
        }
    }
    false
}

/// Keeps the port of the node that the same addresses and ports have already; false if they have none. Out of line, to keep
/// the caller's stack frame small.
#[inline(never)]
fn reuse_port<A: Address, T: FamilyTables<A>>(tables: &T, scratch: &mut FlowScratch<A>) -> bool {
    let Some(known) = tables.flow(&scratch.snat_key) else { return false };
    scratch.reply_key = scratch.snat_key.opposite(&known.read(Flow::EDIT));
    let Some(back) = tables.flow(&scratch.reply_key) else { return false };
    for record in [known, back] {
        record.write(Flow::LAST_USED_NS, scratch.flow.last_used_ns);
        record.write(Flow::BACKEND, scratch.flow.backend.index);
        record.write(Flow::GENERATION, scratch.flow.backend.generation);
        record.write(Flow::SEGMENT, 0);
        record.write(Flow::STATE, scratch.snat.state);
    }
    true
}

/// Whether a reply key is free: no flow and no direct connection has it, or its holder has finished. TCP: it has closed. UDP: it
/// has been silent for long, in both directions.
#[inline(always)]
pub fn is_free<A: Address, T: FamilyTables<A>>(tables: &T, replies: &FlowKey<A>) -> bool {
    // A copy: before Linux 6.2 a map key must not be an argument of a global function.
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

/// Whether a UDP flow has been idle for so long that no answer is expected.
#[inline(always)]
fn is_silent<A: Address>(flow: &impl Entry<Flow<A>>, now_ns: u64) -> bool {
    let last_used_ns = flow.read(Flow::LAST_USED_NS);
    let is_stream = last_used_ns.saturating_sub(flow.read(Flow::CREATED_NS)) >= STREAM_NS;
    let limit_ns = if is_stream { STREAM_SILENT_NS } else { EXCHANGE_SILENT_NS };
    now_ns.saturating_sub(last_used_ns) >= limit_ns
}

/// Removes all records of the flow that has the reply key, so that its next packet opens a new flow.
#[inline(never)]
fn delete_conflict<A: Address, T: FamilyTables<A>>(tables: &T, scratch: &mut FlowScratch<A>) {
    let Some(holder) = tables.flow(&scratch.reply_key) else { return };
    scratch.other_key = scratch.reply_key.opposite(&holder.read(Flow::EDIT));
    tables.remove_flow(&scratch.other_key);
    if scratch.reply_key.direction != Direction::RevSnat as u8 {
        return;
    }
    scratch.other_key = FlowKey::translated(&holder.read(Flow::EDIT), scratch.reply_key.protocol, Direction::RevDnat);
    if let Some(flow) = tables.flow(&scratch.other_key) {
        let forward = scratch.other_key.opposite(&flow.read(Flow::EDIT));
        tables.remove_flow(&scratch.other_key);
        tables.remove_flow(&forward);
    }
}

/// Stores the record for replies, unless an unfinished flow has their key. `is_first`: the DNAT record, which replaces one with
/// the same translation. Otherwise: the SNAT record.
#[inline(always)]
fn reserve_key<A: Address, T: GlobalFunctions<A>>(
    tables: &T,
    scratch: &mut FlowScratch<A>,
    is_first: bool,
) -> Result<bool, Reason> {
    if foreign::holds(tables, &scratch.reply_key, scratch.flow.created_ns) {
        return Ok(false);
    }
    let record = if is_first { &scratch.flow } else { &scratch.snat };
    if tables.add_flow(&scratch.reply_key, record).is_ok() {
        return Ok(true);
    }
    let Some(holder) = tables.flow(&scratch.reply_key) else { return Err(Reason::FlowNotStored) };
    let is_same = is_first && holder.read(Flow::EDIT) == scratch.flow.edit;
    if !is_same {
        if !tables.is_free(&scratch.reply_key) {
            return Ok(false);
        }
        if scratch.reply_key.protocol == UDP {
            delete_conflict(tables, scratch);
        }
    }
    let record = if is_first { &scratch.flow } else { &scratch.snat };
    tables.put_flow(&scratch.reply_key, record).map_err(|NotStored| Reason::FlowNotStored)?;
    Ok(true)
}
