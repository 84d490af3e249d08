//! Connections to no frontend that could be taken for one to a frontend.
//!
//! They must never be changed, answered or dropped because of ours, and a packet alone does not tell which it belongs to:
//!
//! * *Straight to a pod* ([`crate::snat::handle_direct`]). A client may use one port for a connection to a service and, at
//!   the same time, for one to the pod behind it (a headless service, a scraper). The pod's replies look the same.
//! * *From the address and port of a frontend* ([`note_leaving`]). A process of the node, or a pod by the node's NAT, may send
//!   datagrams from a source port that is also a node port. The answers look like a client's datagrams.
//! * *From the node to a pod* ([`note_leaving`]), by a source port that SNAT could give to a masqueraded connection.
//!
//! Each is noted where it begins, under the key that its replies have. Of two connections whose replies would have one
//! key, the second one gets another source port: see [`crate::snat`].
//!
//! What decides is what was seen of the connection, not a look at sockets or at the stack's connection tracking: see
//! docs/adr/0015. What began before the programs were attached was not seen. Of TCP it is known by having no SYN
//! ([`crate::pipeline::open`]); datagrams are noted when the next one leaves. The table is an LRU map of its own, so these
//! connections never push ours out of theirs.

#[cfg(test)]
mod tests;

use crate::{
    abi::{Address, Direction, FLOW_ANSWERED, FLOW_OPEN, FLOW_RESET, FlowKey, Foreign, Port, filter_bit},
    parse::{FIN, Headers, RST, SYN, UDP},
    state::{self, Phase},
    tables::{Entry, FamilyTables},
};

/// How long a TCP connection keeps its key without a word of its end (`nf_conntrack_tcp_timeout_established` is longer).
pub const TCP_NS: u64 = 86_400_000_000_000;
/// The same once one side has ended it.
pub const CLOSING_NS: u64 = 600_000_000_000;
/// The same of datagrams, since the last one was sent (`nf_conntrack_udp_timeout_stream`).
pub const UDP_NS: u64 = 120_000_000_000;

/// Whether a packet says something about where a connection begins or ends.
#[inline(always)]
#[must_use]
pub const fn is_telling<A>(headers: &Headers<A>) -> bool {
    headers.key.protocol == UDP || headers.flags & (SYN | FIN | RST) != 0
}

/// Whether a connection to no frontend has this key for its replies. Out of line, for the sake of its callers' stack frames.
#[inline(never)]
pub fn holds<A: Address, T: FamilyTables<A>>(tables: &T, replies: &FlowKey<A>, now_ns: u64) -> bool {
    let Some(known) = tables.foreign(replies) else { return false };
    let limit_ns = match Phase::of(replies.protocol, known.read(Foreign::STATE) as u8) {
        Phase::Unanswered | Phase::Answered => UDP_NS,
        Phase::HalfOpen | Phase::Open => TCP_NS,
        Phase::Closing => CLOSING_NS,
        Phase::Closed => 0,
    };
    now_ns.saturating_sub(known.read(Foreign::LAST_SENT_NS)) < limit_ns
}

/// Notes a packet that leaves and is of none of our flows, under the key that its replies have where they enter.
#[inline(always)]
pub fn note_leaving<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>) {
    let FlowKey { saddr, daddr, sport, dport, protocol, .. } = headers.key;
    let (from, to) = (filter_bit(saddr, sport, protocol), filter_bit(daddr, dport, protocol));
    if protocol == UDP && tables.filter(Direction::Dnat, from) {
        note_first(tables, headers, Direction::Dnat);
    } else if tables.filter(Direction::RevDnat, to) && is_from_node(tables, saddr, sport) {
        note_first(tables, headers, Direction::RevSnat);
    } else if tables.filter(Direction::RevDnat, from) && headers.flags & (FIN | RST) != 0 {
        note_end(tables, headers, headers.key.direction, true);
    }
}

/// Notes a packet of the side that began a connection, whose replies enter as those of `replies` do.
#[inline(always)]
fn note_first<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, replies: Direction) {
    if headers.key.protocol != UDP && !headers.is_opening() {
        note_end(tables, headers, replies as u8, false);
        return;
    }
    // Scratch memory: before Linux 6.2 a map key must not be an argument of a global function.
    let _ = tables.flow_scratch(|scratch| {
        scratch.reply_key = headers.key.reply();
        scratch.reply_key.direction = replies as u8;
        if tables.flow(&scratch.reply_key).is_none() {
            tables.put_foreign(&scratch.reply_key, &Foreign { last_sent_ns: tables.now_ns(), state: 0, pad: 0 });
        }
    });
}

/// Whether a source is one that SNAT could give to a connection.
#[inline(always)]
fn is_from_node<A: Address, T: FamilyTables<A>>(tables: &T, saddr: A, sport: Port) -> bool {
    let Some(node) = tables.node() else { return false };
    node.address() == Some(saddr) && sport.get().wrapping_sub(node.port_first.get()) < node.port_count
}

/// Notes the end of a connection by one of its packets, which is a reply or has replies of this direction.
#[inline(never)]
pub fn note_end<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>, direction: u8, is_reply: bool) {
    let _ = tables.flow_scratch(|scratch| {
        scratch.reply_key = if is_reply { headers.key } else { headers.key.reply() };
        scratch.reply_key.direction = direction;
        let Some(known) = tables.foreign(&scratch.reply_key) else { return };
        let added = if headers.flags & RST != 0 {
            FLOW_RESET
        } else {
            state::added(FLOW_ANSWERED | FLOW_OPEN, !is_reply, headers.key.protocol, headers.flags)
        };
        known.add_bits(Foreign::STATE, added.into());
        known.write(Foreign::LAST_SENT_NS, tables.now_ns());
    });
}
