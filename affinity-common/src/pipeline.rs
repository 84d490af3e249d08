//! What happens to a packet.
//!
//! [`forward`] runs where a client's packet arrives on a device, [`reverse`] where a reply leaves one. Both decide
//! ([`Outcome`]) before they change anything. [`carry_out`] then rewrites or rejects the packet, and each program maps the
//! resulting [`Verdict`] to the return code of its hook in one `match`.

#[cfg(test)]
mod tests;

use crate::{
    abi::{
        Address, COEXIST, DROP_IF_NO_LOCAL, Direction, FLOW_FOREIGN, FLOW_REMOTE, Flow, FlowKey, Frontend, NODE,
        RANGES, Reason, SHADOW, V4, V6, filter_bit,
    },
    flow::{self, Admission},
    foreign, fragment, frontend,
    global::{GlobalFunctions, Opened},
    headers::{Headers, UDP},
    icmp,
    packet::Packet,
    parse::{self, Network},
    reject,
    session::{self, Opening, Resolved},
    snat,
    tables::{Entry, Tables},
};

/// What happens to a packet. `F` is its flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision<F> {
    /// Passed unchanged.
    Pass,
    /// Forwarded with the addresses and ports of its flow.
    Forward(F),
    /// Rejected with RST or ICMP unreachable.
    Reject,
    /// Dropped.
    Drop,
}

/// A decision and its reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome<F> {
    /// The decision.
    pub decision: Decision<F>,
    /// The reason.
    pub reason: Reason,
}

impl<F> Outcome<F> {
    const fn new(decision: Decision<F>, reason: Reason) -> Self {
        Self { decision, reason }
    }
}

/// What a hook returns for the frame.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Verdict {
    /// Unchanged, to the next program or the stack.
    Pass,
    /// Translated, to the next program or the stack.
    Forward,
    /// Translated, to or from a pod on another node: redirected, if the hook can do that ([`crate::redirect`]).
    Redirect,
    /// Replaced by an RST or ICMP error, to be sent out of the device that it arrived on.
    Answer,
    /// Dropped.
    Drop,
}

/// Handles a packet that arrives on a device: it may be a client's, to a frontend, or a reply to the node's address.
#[inline(always)]
pub fn forward<P: Packet, T: GlobalFunctions<V4> + GlobalFunctions<V6>>(packet: &mut P, tables: &T) -> Verdict {
    match parse::network(packet) {
        Ok(Network::V4(l3)) => match parse::ipv4(packet, l3, Direction::Dnat) {
            Ok(headers) => enter(packet, tables, headers),
            Err(reason) => icmp_or_fragment::<V4, P, T>(packet, tables, l3, (reason, Direction::Dnat)),
        },
        Ok(Network::V6(l3)) => match parse::ipv6(packet, l3, Direction::Dnat) {
            Ok(headers) => enter(packet, tables, headers),
            Err(reason) => icmp_or_fragment::<V6, P, T>(packet, tables, l3, (reason, Direction::Dnat)),
        },
        Err(reason) => pass(tables, reason),
    }
}

/// Handles a packet that leaves a device: it may be a reply of a backend, or a client's that gets the node's address.
#[inline(always)]
pub fn reverse<P: Packet, T: GlobalFunctions<V4> + GlobalFunctions<V6>>(packet: &mut P, tables: &T) -> Verdict {
    match parse::network(packet) {
        Ok(Network::V4(l3)) => match parse::ipv4(packet, l3, Direction::RevDnat) {
            Ok(headers) => leave(packet, tables, headers),
            Err(reason) => icmp_or_fragment::<V4, P, T>(packet, tables, l3, (reason, Direction::RevDnat)),
        },
        Ok(Network::V6(l3)) => match parse::ipv6(packet, l3, Direction::RevDnat) {
            Ok(headers) => leave(packet, tables, headers),
            Err(reason) => icmp_or_fragment::<V6, P, T>(packet, tables, l3, (reason, Direction::RevDnat)),
        },
        Err(reason) => pass(tables, reason),
    }
}

/// Frontends on loopback addresses are for the node's own sockets. The stack drops packets to them that arrive on a device.
#[inline(always)]
fn enter<A: Address, P: Packet, T: GlobalFunctions<A>>(packet: &mut P, tables: &T, mut headers: Headers<A>) -> Verdict {
    if headers.key.daddr.is_loopback() {
        return pass(tables, Reason::NotFrontend);
    }
    let outcome = to_frontend(tables, &mut headers, || packet.ifindex());
    carry_out(packet, tables, &headers, &outcome)
}

#[inline(always)]
fn leave<A: Address, P: Packet, T: GlobalFunctions<A>>(packet: &mut P, tables: &T, mut headers: Headers<A>) -> Verdict {
    let outcome = from_backend(tables, &mut headers);
    carry_out(packet, tables, &headers, &outcome)
}

/// Handles a packet without ports: ICMP errors about a flow, and later fragments, are translated with it; all others pass.
#[inline(always)]
fn icmp_or_fragment<A: Address, P: Packet, T: GlobalFunctions<V4> + GlobalFunctions<V6> + GlobalFunctions<A>>(
    packet: &mut P,
    tables: &T,
    l3: usize,
    (reason, direction): (Reason, Direction),
) -> Verdict {
    let is_v4 = A::BITS == V4::BITS;
    let translated = if reason == Reason::Fragment {
        let is_leaving = matches!(direction, Direction::RevDnat);
        fragment::follow::<A, P, T>(packet, tables, l3, is_leaving).map(|()| Reason::LaterFragment)
    } else if reason != Reason::OtherProtocol {
        Err(reason)
    } else if is_v4 {
        icmp::ipv4(packet, tables, l3, direction).map(|()| Reason::RelatedError)
    } else {
        icmp::ipv6(packet, tables, l3, direction).map(|()| Reason::RelatedError)
    };
    let (verdict, reason) = match translated {
        Ok(reason) => (Verdict::Forward, reason),
        Err(Reason::NotRewritten) => (Verdict::Drop, Reason::NotRewritten),
        Err(reason) => (Verdict::Pass, reason),
    };
    tables.conclude(reason);
    verdict
}

/// Decides about a packet that arrives on a device: the filter, then the flow, otherwise it may open a new flow.
#[inline(always)]
pub fn to_frontend<A: Address, T: GlobalFunctions<A>>(
    tables: &T,
    headers: &mut Headers<A>,
    ifindex: impl FnOnce() -> u32,
) -> Outcome<T::Entry<Flow<A>>> {
    let bit = filter_bit(headers.key.daddr, headers.key.dport, headers.key.protocol);
    let may_be_frontend = tables.filter(Direction::Dnat, bit);
    if may_be_frontend && let Some(flow) = tables.flow(&headers.key) {
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
            Admission::Reopen => flow::supersede(tables, headers, &flow),
        }
    }
    if tables.filter(Direction::RevSnat, bit) {
        if let Some(flow) = snat_flow(tables, headers, Direction::RevSnat) {
            return Outcome::new(Decision::Forward(flow), Reason::Returned);
        }
        headers.key.direction = Direction::Dnat as u8;
    }
    let may_be_to_member = || foreign::is_telling(headers) && tables.filter(Direction::RevDnat, bit);
    if !may_be_frontend && !may_be_to_member() {
        return Outcome::new(Decision::Pass, Reason::NotFrontend);
    }
    if tables.is_above_another(ifindex()) {
        headers.set_seen_below();
    }
    match tables.open_connection(headers) {
        Opened::As(reason) => match tables.opened_flow() {
            Some(flow) => Outcome::new(Decision::Forward(flow), reason),
            None => Outcome::new(Decision::Drop, Reason::Inconsistent),
        },
        Opened::NotOurs(reason) => Outcome::new(Decision::Pass, reason),
        Opened::Rejected(reason) => rejected(headers, reason),
        Opened::Failed(reason) => Outcome::new(Decision::Drop, reason),
    }
}

/// The SNAT record of a packet: see [`crate::snat`].
#[inline(always)]
fn snat_flow<A: Address, T: GlobalFunctions<A>>(
    tables: &T,
    headers: &mut Headers<A>,
    direction: Direction,
) -> Option<T::Entry<Flow<A>>> {
    headers.key.direction = direction as u8;
    let flow = tables.flow(&headers.key)?;
    flow::note_packet(tables, headers, &flow);
    Some(flow)
}

/// Opens a new connection: finds the frontend, then the pinned or a selected backend, and stores the flow.
#[inline(always)]
pub fn open<A: Address, T: GlobalFunctions<A>>(tables: &T, headers: &Headers<A>) -> Opened {
    let opened = tables.frontend_scratch(|record| match frontend::copy_for_client(tables, &headers.key, record) {
        Ok(()) => open_at(tables, headers, record),
        Err(Reason::NotFrontend) => to_no_frontend(tables, headers),
        Err(reason) => Opened::Failed(reason),
    });
    opened.unwrap_or(Opened::Failed(Reason::Inconsistent))
}

#[inline(always)]
fn open_at<A: Address, T: GlobalFunctions<A>>(tables: &T, headers: &Headers<A>, frontend: &Frontend) -> Opened {
    if is_anothers(tables, headers) {
        return Opened::NotOurs(Reason::NotOurs);
    }
    if is_of_another_proxy(headers, frontend) {
        return Opened::NotOurs(Reason::OtherProxy);
    }
    let now_ns = tables.now_ns();
    let mut resolved = Resolved::NOTHING;
    let found = member_for(tables, headers, frontend, now_ns, &mut resolved);
    match found.and_then(|()| flow::begin(tables, headers, frontend, now_ns, &resolved)) {
        _ if frontend.flags & SHADOW != 0 => Opened::NotOurs(Reason::Shadow),
        Ok(()) => Opened::As(resolved.reason),
        Err(reason @ (Reason::NoEndpoints | Reason::PortsExhausted)) => Opened::Rejected(reason),
        Err(reason) => Opened::Failed(reason),
    }
}

/// Handles a packet to no frontend. If it goes directly to a member, its replies must be told apart from those of flows. A packet
/// that arrives on an upper device may be translated already.
#[inline(always)]
fn to_no_frontend<A: Address, T: GlobalFunctions<A>>(tables: &T, headers: &Headers<A>) -> Opened {
    let FlowKey { daddr, dport, protocol, .. } = headers.key;
    let is_to_member = tables.filter(Direction::RevDnat, filter_bit(daddr, dport, protocol));
    if is_to_member && !headers.is_seen_below() && snat::handle_direct(tables, headers) {
        Opened::As(Reason::PortChanged)
    } else {
        Opened::NotOurs(Reason::NotFrontend)
    }
}

/// Whether a packet to a frontend, without a flow, belongs to another connection. Addresses of the node are shared with the
/// node's own connections, and with those that it masquerades. There a TCP connection of ours begins with SYN, and datagrams that
/// leave from the address and port of a frontend are noted. Connections to an address that only a service has may have begun
/// before the programs were attached.
#[inline(never)]
fn is_anothers<A: Address, T: GlobalFunctions<A>>(tables: &T, headers: &Headers<A>) -> bool {
    if headers.key.protocol == UDP {
        // A copy of the key: before Linux 6.2 a map key must not be an argument of a global function.
        tables.flow_scratch(|scratch| {
            scratch.key = headers.key;
            foreign::holds(tables, &scratch.key, tables.now_ns())
        }) == Some(true)
    } else {
        !headers.is_opening() && tables.is_within(NODE, headers.key.daddr)
    }
}

/// Finds the member for a new connection. Out of line: its stack frame is released before [`flow::begin`] runs (512-byte BPF
/// stack).
#[inline(never)]
fn member_for<A: Address, T: GlobalFunctions<A>>(
    tables: &T,
    headers: &Headers<A>,
    frontend: &Frontend,
    now_ns: u64,
    resolved: &mut Resolved,
) -> Result<(), Reason> {
    if frontend.flags & RANGES != 0 && !tables.is_within(frontend.service, headers.key.saddr) {
        return Err(Reason::NotInRanges);
    }
    let is_silent = frontend.flags & DROP_IF_NO_LOCAL != 0;
    let opened = session::open(tables, &Opening::by_packet(headers, frontend, now_ns), resolved);
    if is_silent && opened == Err(Reason::NoEndpoints) { Err(Reason::NoLocalEndpoints) } else { opened }
}

/// Whether a packet without a flow belongs to a connection that another proxy translates.
#[inline(always)]
fn is_of_another_proxy<A: Address>(headers: &Headers<A>, frontend: &Frontend) -> bool {
    frontend.flags & (COEXIST | SHADOW) != 0 && headers.key.protocol != UDP && !headers.is_opening()
}

/// Decides about a packet that leaves a device: the filter, then the flow. It is translated as long as its flow exists, even if
/// its pod has gone, because the client expects it from the frontend.
#[inline(always)]
pub fn from_backend<A: Address, T: GlobalFunctions<A>>(
    tables: &T,
    headers: &mut Headers<A>,
) -> Outcome<T::Entry<Flow<A>>> {
    let FlowKey { saddr, daddr, sport, dport, protocol, .. } = headers.key;
    if tables.filter(Direction::RevDnat, filter_bit(saddr, sport, protocol))
        && let Some(flow) = tables.flow(&headers.key)
    {
        flow::note_packet(tables, headers, &flow);
        return Outcome::new(Decision::Forward(flow), Reason::Reply);
    }
    if tables.filter(Direction::Snat, filter_bit(daddr, dport, protocol))
        && let Some(flow) = snat_flow(tables, headers, Direction::Snat)
    {
        return Outcome::new(Decision::Forward(flow), Reason::Masqueraded);
    }
    headers.key.direction = Direction::RevDnat as u8;
    if foreign::is_telling(headers) {
        tables.note_leaving(headers);
    }
    Outcome::new(Decision::Pass, Reason::NotReply)
}

#[inline(always)]
fn rejected<A: Address, F>(headers: &Headers<A>, reason: Reason) -> Outcome<F> {
    if reject::may_answer(headers) {
        Outcome::new(Decision::Reject, reason)
    } else {
        Outcome::new(Decision::Drop, Reason::NotAnswered)
    }
}

/// Carries out the decision, and counts the reason.
#[inline(always)]
fn carry_out<A: Address, P: Packet, T: GlobalFunctions<A>>(
    packet: &mut P,
    tables: &T,
    headers: &Headers<A>,
    outcome: &Outcome<T::Entry<Flow<A>>>,
) -> Verdict {
    let (verdict, reason) = match &outcome.decision {
        Decision::Pass => (Verdict::Pass, outcome.reason),
        Decision::Drop => (Verdict::Drop, outcome.reason),
        Decision::Forward(flow) => {
            if headers.is_first_fragment() {
                fragment::remember(packet, tables, headers);
            }
            translate(packet, headers, flow, outcome.reason)
        }
        Decision::Reject if !tables.may_reject() => (Verdict::Drop, Reason::RejectionLimited),
        Decision::Reject if reject::reject(packet, headers) => (Verdict::Answer, outcome.reason),
        Decision::Reject => (Verdict::Drop, Reason::NoReplyBuilt),
    };
    tables.conclude(reason);
    verdict
}

/// Rewrites the addresses and ports of a frame.
#[inline(always)]
fn translate<A: Address, P: Packet>(
    packet: &mut P,
    headers: &Headers<A>,
    flow: &impl Entry<Flow<A>>,
    reason: Reason,
) -> (Verdict, Reason) {
    let flags = flow.read(Flow::FLAGS);
    let is_rewritten = packet.rewrite(headers, &flow.read(Flow::EDIT));
    if flags & FLOW_FOREIGN != 0 && !headers.key.is_entering() {
        // It now looks like a reply of the flow that has its port: a second egress program must not translate it.
        packet.mark_final();
    }
    match (is_rewritten, flags & FLOW_REMOTE) {
        (false, _) => (Verdict::Drop, Reason::NotRewritten),
        (true, 0) => (Verdict::Forward, reason),
        (true, _) => (Verdict::Redirect, reason),
    }
}

#[inline(always)]
fn pass<T: Tables>(tables: &T, reason: Reason) -> Verdict {
    tables.conclude(reason);
    Verdict::Pass
}
