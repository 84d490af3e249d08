//! The story of a packet.
//!
//! [`forward`] runs where a client's packet enters a device, [`reverse`] where a reply leaves one. Both name what
//! happens to the packet ([`Outcome`]) before anything is changed; [`carry_out`] then does it, and each program turns
//! the resulting [`Verdict`] into its hook's return code in one `match`.

use crate::{
    abi::{AFFINITY, Address, Direction, Edit, FrontendKey, Reason, UsageOf, V4, V6, filter_bit},
    flow::{self, Admission},
    packet::Packet,
    parse::{self, Headers, Network},
    refuse,
    select::select,
    session::{self, Opening, Resolved},
    tables::{Entry, FamilyTables, Tables},
};

/// What happens to a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision<A> {
    /// It goes on as it is.
    Pass,
    /// It goes on with these addresses and ports.
    Forward(Edit<A>),
    /// Its sender is told that nobody is there.
    Reject,
    /// It vanishes.
    Drop,
}

/// A decision and its cause.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome<A> {
    /// What happens.
    pub decision: Decision<A>,
    /// Why.
    pub reason: Reason,
}

/// What has become of the frame: what a hook returns.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Verdict {
    /// Untouched, to the next program or the stack.
    Pass,
    /// Translated, to the next program or the stack.
    Forward,
    /// Now its own refusal, to be sent out where it came in.
    Answer,
    /// To be dropped.
    Drop,
}

/// A packet that enters a device: perhaps a client's, to a frontend.
#[inline(always)]
pub fn forward<P: Packet, T: FamilyTables<V4> + FamilyTables<V6>>(packet: &mut P, tables: &T) -> Verdict {
    match parse::network(packet) {
        Ok(Network::V4(l3)) => match parse::ipv4(packet, l3, Direction::Forward) {
            Ok(headers) => carry_out(packet, tables, &headers, &to_frontend(tables, &headers)),
            Err(reason) => pass(tables, reason),
        },
        Ok(Network::V6(l3)) => match parse::ipv6(packet, l3, Direction::Forward) {
            Ok(headers) => carry_out(packet, tables, &headers, &to_frontend(tables, &headers)),
            Err(reason) => pass(tables, reason),
        },
        Err(reason) => pass(tables, reason),
    }
}

/// A packet that leaves a device: perhaps a backend's reply.
#[inline(always)]
pub fn reverse<P: Packet, T: FamilyTables<V4> + FamilyTables<V6>>(packet: &mut P, tables: &T) -> Verdict {
    match parse::network(packet) {
        Ok(Network::V4(l3)) => match parse::ipv4(packet, l3, Direction::Reverse) {
            Ok(headers) => carry_out(packet, tables, &headers, &from_backend(tables, &headers)),
            Err(reason) => pass(tables, reason),
        },
        Ok(Network::V6(l3)) => match parse::ipv6(packet, l3, Direction::Reverse) {
            Ok(headers) => carry_out(packet, tables, &headers, &from_backend(tables, &headers)),
            Err(reason) => pass(tables, reason),
        },
        Err(reason) => pass(tables, reason),
    }
}

/// Decides about a client's packet: filter, flow, then a new connection.
#[inline(always)]
pub fn to_frontend<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>) -> Outcome<A> {
    let key = &headers.key;
    if !tables.filter(Direction::Forward, filter_bit(key.daddr, key.dport, key.protocol)) {
        return Outcome { decision: Decision::Pass, reason: Reason::NotFrontend };
    }
    if let Some(entry) = tables.flow(key) {
        let flow = entry.get();
        match flow::admit(tables, headers, &flow) {
            Admission::Established => {
                flow::note_packet(tables, headers, &entry, &flow);
                return Outcome { decision: Decision::Forward(flow.edit), reason: Reason::Established };
            }
            Admission::Gone => return reject(headers, Reason::FlowGone),
            Admission::Afresh => {}
        }
    }
    open(tables, headers)
}

/// Decides about a new connection: frontend, session or selection, and remembers it.
#[inline(always)]
pub fn open<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>) -> Outcome<A> {
    let key = &headers.key;
    let Some(frontend) = tables.frontend(&FrontendKey::new(key.daddr, key.dport, key.protocol)) else {
        return Outcome { decision: Decision::Pass, reason: Reason::NotFrontend };
    };
    if frontend.slot_count == 0 {
        tables.count_usage(UsageOf::Service, frontend.service, Reason::NoEndpoints);
        return reject(headers, Reason::NoEndpoints);
    }
    let now_ns = tables.now_ns();
    let opening = Opening { frontend: &frontend, client: key.saddr, protocol: key.protocol, now_ns };
    let resolved = if frontend.flags & AFFINITY != 0 {
        session::resolve(tables, &opening)
    } else {
        select(tables, &frontend, key.saddr.masked(frontend.prefix), tables.random())
            .map(|chosen| Resolved { chosen, reason: Reason::Selected, scope: 0 })
            .ok_or(Reason::Inconsistent)
    };
    let resolved = match resolved {
        Ok(resolved) => resolved,
        Err(reason) => return Outcome { decision: Decision::Drop, reason },
    };
    let Some(backend) = tables.backend(resolved.chosen.backend) else {
        return Outcome { decision: Decision::Drop, reason: Reason::Inconsistent };
    };
    session::count_usage(tables, &frontend, &resolved);
    match flow::begin(tables, headers, &frontend, &resolved, A::from_mapped(backend.address), now_ns) {
        Ok(edit) => Outcome { decision: Decision::Forward(edit), reason: resolved.reason },
        Err(_) => Outcome { decision: Decision::Drop, reason: Reason::FlowNotStored },
    }
}

/// Decides about a packet that leaves: filter, then flow. It is translated for as long as its flow is known, even if
/// its pod has just gone: what the client was sent must be from whom it asked.
#[inline(always)]
pub fn from_backend<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>) -> Outcome<A> {
    let key = &headers.key;
    if tables.filter(Direction::Reverse, filter_bit(key.saddr, key.sport, key.protocol)) {
        if let Some(entry) = tables.flow(key) {
            let flow = entry.get();
            flow::note_packet(tables, headers, &entry, &flow);
            return Outcome { decision: Decision::Forward(flow.edit), reason: Reason::Reply };
        }
    }
    Outcome { decision: Decision::Pass, reason: Reason::NotReply }
}

#[inline(always)]
fn reject<A: Address>(headers: &Headers<A>, reason: Reason) -> Outcome<A> {
    if refuse::may_answer(headers) {
        Outcome { decision: Decision::Reject, reason }
    } else {
        Outcome { decision: Decision::Drop, reason: Reason::NotAnswered }
    }
}

/// Does to the frame what was decided, and counts why.
#[inline(always)]
fn carry_out<A: Address, P: Packet, T: FamilyTables<A>>(
    packet: &mut P,
    tables: &T,
    headers: &Headers<A>,
    outcome: &Outcome<A>,
) -> Verdict {
    let (verdict, reason) = match outcome.decision {
        Decision::Pass => (Verdict::Pass, outcome.reason),
        Decision::Drop => (Verdict::Drop, outcome.reason),
        Decision::Forward(edit) if packet.rewrite(headers, &edit) => (Verdict::Forward, outcome.reason),
        Decision::Forward(_) => (Verdict::Drop, Reason::NotRewritten),
        Decision::Reject if refuse::refuse(packet, headers) => (Verdict::Answer, outcome.reason),
        Decision::Reject => (Verdict::Drop, Reason::NoReplyBuilt),
    };
    tables.count(reason);
    verdict
}

#[inline(always)]
fn pass<T: Tables>(tables: &T, reason: Reason) -> Verdict {
    tables.count(reason);
    Verdict::Pass
}
