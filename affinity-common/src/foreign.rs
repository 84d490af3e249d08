//! Foreign connections: those that do not go to a frontend, but whose packets look as if they did.
//!
//! They must never be changed, rejected or dropped. A packet alone does not show which connection it belongs to:
//!
//! * *Directly to a pod* ([`crate::snat::handle_direct`]). A client may use one source port for a connection to a service and, at
//!   the same time, for one to the pod behind it (a headless service, a scraper). The replies of the pod look the same.
//! * *From the address and port of a frontend* ([`note_leaving`]). A process of the node, or a pod that the node masquerades, may
//!   send datagrams from a source port that is also a node port. The answers look like datagrams of a client.
//! * *From the node to a pod* ([`note_leaving`]), from a source port in the range for SNAT.
//!
//! Each is noted when it begins, under the key of its replies. If the replies of two connections have the same key, the second
//! connection gets another source port: see [`crate::snat`].
//!
//! The decision depends on what was seen of the connection, not on a lookup of sockets or in conntrack: see docs/adr/0015. A
//! connection that began before the programs were attached was not seen: TCP is recognised because its first packet is no SYN
//! ([`crate::pipeline::open`]), and datagrams are noted when the next one leaves. The notes are in an LRU map of their own, so
//! they never evict flows.

#[cfg(test)]
mod tests;

use crate::{
    abi::{Address, Direction, FLOW_ANSWERED, FLOW_OPEN, FLOW_RESET, FlowKey, Foreign, Port, filter_bit},
    headers::{FIN, Headers, RST, SYN, UDP},
    state::{self, Phase},
    tables::{Entry, FamilyTables},
};

/// How long a TCP connection keeps its key while its end is not seen (`nf_conntrack_tcp_timeout_established` is longer).
pub const TCP_NS: u64 = 86_400_000_000_000;
/// The same once one side has ended it.
pub const CLOSING_NS: u64 = 600_000_000_000;
/// The same for datagrams, since the last one was sent (`nf_conntrack_udp_timeout_stream`).
pub const UDP_NS: u64 = 120_000_000_000;

/// Whether a packet shows that a connection begins or ends.
#[inline(always)]
#[must_use]
pub const fn is_telling<A>(headers: &Headers<A>) -> bool {
    headers.key.protocol == UDP || headers.flags & (SYN | FIN | RST) != 0
}

/// Whether a foreign connection has this key for its replies. Out of line, to keep the callers' stack frames small.
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

/// Notes a packet that leaves and has no flow, under the key that its replies will have when they arrive.
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

/// Notes a packet of the side that began the connection; its replies arrive in direction `replies`.
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

/// Whether SNAT could give a connection this source.
#[inline(always)]
fn is_from_node<A: Address, T: FamilyTables<A>>(tables: &T, saddr: A, sport: Port) -> bool {
    let Some(node) = tables.node() else { return false };
    node.address() == Some(saddr) && sport.get().wrapping_sub(node.port_first.get()) < node.port_count
}

/// Notes the end of a connection, seen in a packet: a reply, or a packet whose replies have this direction.
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
