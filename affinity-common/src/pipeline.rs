//! The story of a packet.
//!
//! [`forward`] runs where a client's packet enters a device, [`reverse`] where a reply leaves one. Both name what
//! happens to the packet ([`Outcome`]) before anything is changed; [`carry_out`] then does it, and each program turns
//! the resulting [`Verdict`] into its hook's return code in one `match`.

#[cfg(test)]
mod tests;

use crate::{
    abi::{Address, BESIDE, Direction, Flow, Frontend, FrontendKey, Reason, SHADOW, V4, V6, filter_bit},
    flow::{self, Admission},
    icmp,
    packet::Packet,
    parse::{self, Headers, Network, TCP},
    refuse,
    session::{self, Opening, Resolved},
    tables::{Entry, FamilyTables, Tables},
};

/// What happens to a packet. `F` is its flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision<F> {
    /// It goes on as it is.
    Pass,
    /// It goes on with the addresses and ports of its flow's edit.
    Forward(F),
    /// Its sender is told that nobody is there.
    Reject,
    /// It vanishes.
    Drop,
}

/// A decision and its cause.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome<F> {
    /// What happens.
    pub decision: Decision<F>,
    /// Why.
    pub reason: Reason,
}

impl<F> Outcome<F> {
    const fn new(decision: Decision<F>, reason: Reason) -> Self {
        Self { decision, reason }
    }
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
            Err(Reason::OtherProtocol) => related(tables, icmp::ipv4(packet, tables, l3, Direction::Forward)),
            Err(reason) => pass(tables, reason),
        },
        Ok(Network::V6(l3)) => match parse::ipv6(packet, l3, Direction::Forward) {
            Ok(headers) => carry_out(packet, tables, &headers, &to_frontend(tables, &headers)),
            Err(Reason::OtherProtocol) => related(tables, icmp::ipv6(packet, tables, l3, Direction::Forward)),
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
            Err(Reason::OtherProtocol) => related(tables, icmp::ipv4(packet, tables, l3, Direction::Reverse)),
            Err(reason) => pass(tables, reason),
        },
        Ok(Network::V6(l3)) => match parse::ipv6(packet, l3, Direction::Reverse) {
            Ok(headers) => carry_out(packet, tables, &headers, &from_backend(tables, &headers)),
            Err(Reason::OtherProtocol) => related(tables, icmp::ipv6(packet, tables, l3, Direction::Reverse)),
            Err(reason) => pass(tables, reason),
        },
        Err(reason) => pass(tables, reason),
    }
}

/// Decides about a client's packet: filter, flow, else a new connection, which then is a flow.
#[inline(always)]
pub fn to_frontend<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>) -> Outcome<T::Entry<Flow<A>>> {
    let key = &headers.key;
    if !tables.filter(Direction::Forward, filter_bit(key.daddr, key.dport, key.protocol)) {
        return Outcome::new(Decision::Pass, Reason::NotFrontend);
    }
    if let Some(flow) = tables.flow(key) {
        match flow::admit(tables, headers, &flow) {
            Admission::Established => {
                flow::note_packet(tables, headers, &flow);
                return Outcome::new(Decision::Forward(flow), Reason::Established);
            }
            Admission::Gone => return rejected(headers, Reason::FlowGone),
            Admission::Shadow => {
                flow::note_packet(tables, headers, &flow);
                return Outcome::new(Decision::Pass, Reason::Shadow);
            }
            Admission::Afresh => flow::supersede(tables, headers, &flow),
        }
    }
    let opened = open(tables, headers);
    match opened {
        Opened::As(reason) => match tables.flow(key) {
            Some(flow) => Outcome::new(Decision::Forward(flow), reason),
            None => Outcome::new(Decision::Drop, Reason::FlowNotStored),
        },
        Opened::NotOurs(reason) => Outcome::new(Decision::Pass, reason),
        Opened::NobodyThere => rejected(headers, Reason::NoEndpoints),
        Opened::Failed(reason) => Outcome::new(Decision::Drop, reason),
    }
}

/// What came of a new connection.
enum Opened {
    /// It is a flow now, for this reason.
    As(Reason),
    /// The packet is somebody else's business.
    NotOurs(Reason),
    NobodyThere,
    Failed(Reason),
}

/// Opens a new connection: frontend, session or selection, and remembers it as a flow.
#[inline(never)]
fn open<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>) -> Opened {
    let key = &headers.key;
    let Some(frontend) = tables.frontend(&FrontendKey::new(key.daddr, key.dport, key.protocol)) else {
        return Opened::NotOurs(Reason::NotFrontend);
    };
    if is_of_another_proxy(headers, frontend) {
        return Opened::NotOurs(Reason::OtherProxy);
    }
    let now_ns = tables.now_ns();
    let mut resolved = Resolved::NOTHING;
    let found = member_for(tables, headers, frontend, now_ns, &mut resolved);
    match found.and_then(|()| flow::begin(tables, headers, frontend, now_ns, &resolved)) {
        _ if frontend.flags & SHADOW != 0 => Opened::NotOurs(Reason::Shadow),
        Ok(()) => Opened::As(resolved.reason),
        Err(Reason::NoEndpoints) => Opened::NobodyThere,
        Err(reason) => Opened::Failed(reason),
    }
}

/// The member for a packet's new connection: apart, because what it needs of the stack is free again when the flow begins.
#[inline(never)]
fn member_for<A: Address, T: FamilyTables<A>>(
    tables: &T,
    headers: &Headers<A>,
    frontend: &Frontend,
    now_ns: u64,
    resolved: &mut Resolved,
) -> Result<(), Reason> {
    session::open(tables, &Opening::by_packet(headers, frontend, now_ns), resolved)
}

/// Whether a packet that belongs to no known flow is in the middle of a connection that another proxy has made.
#[inline(always)]
fn is_of_another_proxy<A: Address>(headers: &Headers<A>, frontend: &Frontend) -> bool {
    frontend.flags & (BESIDE | SHADOW) != 0 && headers.key.protocol == TCP && !headers.is_opening()
}

/// Decides about a packet that leaves: filter, then flow. It is translated for as long as its flow is known, even if
/// its pod has just gone: what the client is sent must be from whom it asked.
#[inline(always)]
pub fn from_backend<A: Address, T: FamilyTables<A>>(tables: &T, headers: &Headers<A>) -> Outcome<T::Entry<Flow<A>>> {
    let key = &headers.key;
    if tables.filter(Direction::Reverse, filter_bit(key.saddr, key.sport, key.protocol))
        && let Some(flow) = tables.flow(key)
    {
        flow::note_packet(tables, headers, &flow);
        return Outcome::new(Decision::Forward(flow), Reason::Reply);
    }
    Outcome::new(Decision::Pass, Reason::NotReply)
}

#[inline(always)]
fn rejected<A: Address, F>(headers: &Headers<A>, reason: Reason) -> Outcome<F> {
    if refuse::may_answer(headers) {
        Outcome::new(Decision::Reject, reason)
    } else {
        Outcome::new(Decision::Drop, Reason::NotAnswered)
    }
}

/// Does to the frame what was decided, and counts why.
#[inline(always)]
fn carry_out<A: Address, P: Packet, T: FamilyTables<A>>(
    packet: &mut P,
    tables: &T,
    headers: &Headers<A>,
    outcome: &Outcome<T::Entry<Flow<A>>>,
) -> Verdict {
    let (verdict, reason) = match &outcome.decision {
        Decision::Pass => (Verdict::Pass, outcome.reason),
        Decision::Drop => (Verdict::Drop, outcome.reason),
        Decision::Forward(flow) if flow.with(|flow| packet.rewrite(headers, &flow.edit)) => {
            (Verdict::Forward, outcome.reason)
        }
        Decision::Forward(_) => (Verdict::Drop, Reason::NotRewritten),
        Decision::Reject if refuse::refuse(packet, headers) => (Verdict::Answer, outcome.reason),
        Decision::Reject => (Verdict::Drop, Reason::NoReplyBuilt),
    };
    tables.conclude(reason);
    verdict
}

/// An ICMP error about a flow is translated with it; any other packet that is not for us passes.
#[inline(always)]
fn related<T: Tables>(tables: &T, translated: Result<(), Reason>) -> Verdict {
    let (verdict, reason) = match translated {
        Ok(()) => (Verdict::Forward, Reason::RelatedError),
        Err(Reason::NotRewritten) => (Verdict::Drop, Reason::NotRewritten),
        Err(reason) => (Verdict::Pass, reason),
    };
    tables.conclude(reason);
    verdict
}

#[inline(always)]
fn pass<T: Tables>(tables: &T, reason: Reason) -> Verdict {
    tables.conclude(reason);
    Verdict::Pass
}
