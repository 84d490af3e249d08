//! Explains the next packet of a client: runs the pipeline itself on copies of the entries that matter.
//!
//! The packet is the first of a connection: a SYN, an INIT, or a datagram. If the client's port is given and has an open flow,
//! it is the next packet of that flow. Nothing that runs here can change a table of the kernel. Full tables are not considered:
//! they only show when the packet arrives.
//!
//! A question can also be about a network namespace of this machine: the outcome for its next socket. Its client key is an IPv6
//! address for destinations of both families, so an IPv4 frontend is looked up as an IPv4-mapped one, as a socket may ask for
//! it. Decisions by a packet's source do not apply, because there is no packet yet.

#[cfg(test)]
mod tests;
mod words;

use std::{borrow::Cow, collections::BTreeMap, net::IpAddr};

use affinity_common::{
    abi::{
        AFFINITY, Address, BackendRef, Direction, FLOW_SHADOW, Flow, Frontend, MASQUERADE, MemberKey, RANGES, Reason,
        SHADOW, Selection, filter_bit,
    },
    headers::{ACK, Headers, SYN, UDP},
    model::Model,
    pipeline::{self, Decision},
    state,
    tables::{Entry, FamilyTables},
};
use serde::Serialize;

use super::{
    Catalog, Endpoint, FlowView, FrontendTables, Question, SessionView, Situation,
    address::{from_mapped, mapped},
    protocol_name,
};

/// A frontend in an explanation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ExplainedFrontend<'a> {
    /// The service, `namespace/name`.
    pub service: Cow<'a, str>,
    /// Address and port.
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: &'static str,
}

/// A pod that the packet may reach.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Candidate<'a> {
    /// The pod's address.
    pub address: IpAddr,
    /// The pod's port.
    pub port: u16,
    /// The pod's name, if the source gave one.
    pub name: Option<&'a str>,
    /// The pod's namespace, if the source gave a name.
    pub namespace: Option<&'a str>,
    /// The probability of its selection: from 0 to 1.
    pub probability: f64,
    /// Whether it sees the node's address instead of the client's.
    pub masquerade: bool,
}

impl Candidate<'_> {
    fn text(&self) -> String {
        let endpoint = Endpoint { address: self.address, port: self.port };
        self.name.map_or_else(|| endpoint.to_string(), |name| format!("{name} ({endpoint})"))
    }
}

/// One step of the packet's path.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Step {
    /// The name of the step.
    pub step: &'static str,
    /// What the packet finds there.
    pub finds: String,
}

/// The answer.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Explanation<'a> {
    /// The frontend that the client connects to; null: no frontend.
    pub frontend: Option<ExplainedFrontend<'a>>,
    /// `forward`, `reject`, `drop` or `pass`.
    pub verdict: &'static str,
    /// The name of a [`Reason`].
    pub reason: &'static str,
    /// The pin that the packet uses; null: none.
    pub pinned: Option<SessionView<'a>>,
    /// The pods that it may reach.
    pub candidates: Vec<Candidate<'a>>,
    /// Whether its source address is translated too, for every pod that it may reach.
    pub masquerade: bool,
    /// The connection that the packet belongs to; null: it begins one.
    pub flow: Option<FlowView<'a>>,
    /// The steps that lead to the verdict.
    pub steps: Vec<Step>,
}

/// Runs the pipeline and describes what it did.
#[must_use]
pub fn explain<'a, A: FrontendTables>(
    catalog: &'a Catalog,
    question: &Question,
    situation: &Situation<A>,
) -> Explanation<'a>
where
    Model: FamilyTables<A>,
{
    Case { catalog, question, situation, frontend: question.frontend::<A>(catalog) }.explain()
}

/// A question names no device.
const NO_DEVICE: u32 = 0;

struct Case<'a, 'q, A: Address> {
    catalog: &'a Catalog,
    question: &'q Question,
    situation: &'q Situation<A>,
    frontend: Option<Frontend>,
}

impl<'a, A: FrontendTables> Case<'a, '_, A>
where
    Model: FamilyTables<A>,
{
    fn explain(&self) -> Explanation<'a> {
        let (would, decided, flow) = self.decide();
        let candidates = flow.map_or_else(Vec::new, |flow| self.candidates(&flow, decided));
        let masquerade = !candidates.is_empty() && candidates.iter().all(|candidate| candidate.masquerade);
        let pinned = flow.and_then(|flow| self.pin(&flow, decided));
        let known = self.situation.flow;
        let established = known.filter(|_| matches!(decided, Reason::Established | Reason::FlowGone | Reason::Shadow));
        let is_new =
            !self.is_in_connection() && !matches!(decided, Reason::NotFrontend | Reason::NotOurs | Reason::Established);
        let (verdict, reason) = if self.is_shadow() && is_new { ("pass", Reason::Shadow) } else { (would, decided) };
        Explanation {
            frontend: self.frontend.map(|record| ExplainedFrontend {
                service: self.catalog.service_name(record.service),
                endpoint: self.question.to,
                protocol: protocol_name(self.question.protocol),
            }),
            verdict,
            reason: reason.name(),
            pinned,
            steps: self.steps((would, decided), reason, flow.as_ref(), &candidates),
            candidates,
            masquerade,
            flow: established.and_then(|flow| FlowView::new(self.catalog, &self.question.key(), &flow)),
        }
    }

    /// The verdict without shadow mode, its reason, and the flow that the packet then belongs to.
    fn decide(&self) -> (&'static str, Reason, Option<Flow<A>>) {
        if self.is_left_to_packets() {
            return ("pass", Reason::NotInRanges, None);
        }
        let (model, mut headers) = (self.model(), self.headers());
        let outcome = pipeline::to_frontend(&model, &mut headers, || NO_DEVICE);
        let (would, flow) = match outcome.decision {
            Decision::Pass => ("pass", None),
            Decision::Forward(flow) => ("forward", Some(flow.get())),
            Decision::Reject => ("reject", None),
            Decision::Drop => ("drop", None),
        };
        (would, outcome.reason, flow)
    }

    /// Whether a socket's packets are judged only where they enter a device, because their source matters.
    fn is_left_to_packets(&self) -> bool {
        let has_ranges = self.frontend.is_some_and(|frontend| frontend.flags & RANGES != 0);
        self.question.is_socket() && self.situation.in_filter && has_ranges
    }

    fn is_shadow(&self) -> bool {
        self.frontend.is_some_and(|frontend| frontend.flags & SHADOW != 0)
    }

    fn headers(&self) -> Headers<A> {
        let flags = match self.question.protocol {
            UDP => 0,
            _ if self.is_in_connection() => ACK,
            _ => SYN,
        };
        Headers::new(self.question.key(), flags)
    }

    /// Whether the packet belongs to a connection that has begun and not ended.
    fn is_in_connection(&self) -> bool {
        self.question.protocol != UDP && self.situation.flow.is_some_and(|flow| !state::is_closed(flow.state))
    }

    /// The tables, with the entries that matter to this packet.
    fn model(&self) -> Model {
        let Self { catalog, question, situation, .. } = self;
        let observed = &catalog.observed;
        let mut model = Model::new(16);
        model.now_ns.set(catalog.clock.now_ns);
        let key = question.key::<A>();
        if situation.in_filter {
            model.filter.borrow_mut().insert((Direction::Dnat, filter_bit(key.daddr, key.dport, key.protocol)));
        }
        if let Some(mut frontend) = self.frontend {
            // The decision without shadow mode. But a connection from shadow mode belongs to another proxy.
            if situation.flow.is_none_or(|flow| flow.state & FLOW_SHADOW == 0) {
                frontend.flags &= !SHADOW;
            }
            A::put_frontend(&mut model, catalog, question.frontend_key(), frontend);
            let slots = observed.slots.get(&frontend.slot_first).into_iter().flatten();
            model.slots.extend((frontend.slot_first..).zip(slots.copied()));
        }
        let pools = self.frontend.map(|frontend| [frontend.pool, frontend.group]).into_iter().flatten();
        for pool in pools.chain(situation.flow.map(|flow| flow.pool)) {
            let range = MemberKey { pool, backend: 0 }..=MemberKey { pool, backend: u32::MAX };
            model.members.extend(observed.members.range(range).map(|(key, member)| (*key, *member)));
        }
        model.node = observed.node;
        model.backends.clone_from(&observed.backends);
        model.loads.borrow_mut().extend(&situation.loads);
        let flow_pin = situation.flow_pin.as_ref().map(|(key, pin)| (key, pin));
        for (key, session) in situation.sessions.iter().chain(flow_pin) {
            // An empty table of sixteen has space for these few entries; one that occurs twice is there already.
            let _ = model.add_session(key, session);
        }
        if let Some(flow) = &situation.flow {
            let _ = model.put_flow(&key, flow);
        }
        if let Some(foreign) = &situation.foreign {
            model.put_foreign(&key, foreign);
        }
        model
    }

    /// Whether a new connection to a pod gets a source address of the node.
    fn is_masqueraded(&self, pod: A) -> bool {
        let is_for_all = self.frontend.is_some_and(|frontend| frontend.flags & MASQUERADE != 0);
        let is_hairpin = self.question.key::<A>().saddr == pod;
        (is_for_all || is_hairpin) && self.catalog.observed.node.address::<A>().is_some()
    }

    /// The pin of the packet's flow.
    fn pin(&self, flow: &Flow<A>, reason: Reason) -> Option<SessionView<'a>> {
        if !matches!(reason, Reason::Pinned | Reason::Established) {
            return None;
        }
        let (key, session) = self.situation.sessions.iter().find(|(key, _)| key.scope == flow.scope)?;
        Some(SessionView::new(self.catalog, key, session)).filter(SessionView::is_live)
    }

    fn candidates(&self, flow: &Flow<A>, reason: Reason) -> Vec<Candidate<'a>> {
        if let Some(frontend) = self.frontend.filter(|_| matches!(reason, Reason::Created | Reason::Selected)) {
            // Selected by the packet's source: see `select::connection_hash`.
            let is_by_port =
                frontend.flags & AFFINITY == 0 && self.question.from_port.is_some() && !self.question.is_socket();
            let chances = match Selection::from_byte(frontend.select) {
                Selection::Random if is_by_port => BTreeMap::from([(flow.backend.index, 1.0)]),
                Selection::Random => self.uniform(&frontend),
                Selection::Least => self.two_choices(&frontend),
                Selection::Consistent => BTreeMap::from([(flow.backend.index, 1.0)]),
            };
            let candidates = chances.into_iter().filter(|&(_, probability)| probability > 0.0);
            return candidates.filter_map(|(index, chance)| self.candidate(&frontend, index, chance)).collect();
        }
        // An existing connection, a pin, or a pin's own next draw: the pod is determined.
        let pod = self.catalog.backend(flow.backend);
        let Endpoint { address, port } = destination(flow);
        let (name, namespace) = (pod.name, pod.namespace);
        let masquerade = if reason == Reason::Established {
            self.situation.is_masqueraded
        } else {
            self.is_masqueraded(flow.edit.daddr)
        };
        vec![Candidate { address, port, name, namespace, probability: 1.0, masquerade }]
    }

    fn candidate(&self, frontend: &Frontend, backend: u32, probability: f64) -> Option<Candidate<'a>> {
        let member = self.catalog.observed.members.get(&MemberKey { pool: frontend.pool, backend })?;
        let pod = self.catalog.backend(BackendRef { index: backend, generation: member.generation });
        let (address, port) = (pod.address?, member.port.get());
        let masquerade = self.is_masqueraded(A::from_mapped(mapped(address)));
        Some(Candidate { address, port, name: pod.name, namespace: pod.namespace, probability, masquerade })
    }

    fn slots(&self, frontend: &Frontend) -> &'a [u32] {
        self.catalog.observed.slots.get(&frontend.slot_first).map_or(&[], Vec::as_slice)
    }

    fn uniform(&self, frontend: &Frontend) -> BTreeMap<u32, f64> {
        let slots = self.slots(frontend);
        let mut chances = BTreeMap::new();
        for &backend in slots {
            *chances.entry(backend).or_default() += 1.0 / slots.len() as f64;
        }
        chances
    }

    /// Of each ordered pair of slots the second wins if it has fewer sessions, otherwise the first. So a slot wins against
    /// every slot with more sessions, in both orders, and against equal slots when it is drawn first.
    fn two_choices(&self, frontend: &Frontend) -> BTreeMap<u32, f64> {
        let slots = self.slots(frontend);
        if slots.len() < 2 {
            return self.uniform(frontend);
        }
        let load = |backend: u32| self.situation.loads.get(&backend).copied().unwrap_or(0);
        let mut loads: Vec<_> = slots.iter().map(|&backend| load(backend)).collect();
        loads.sort_unstable();
        let pairs = (slots.len() * (slots.len() - 1)) as f64;
        let mut chances = BTreeMap::new();
        for &backend in slots {
            let from = loads.partition_point(|&other| other < load(backend));
            let to = loads.partition_point(|&other| other <= load(backend));
            let wins = 2 * (loads.len() - to) + (to - from - 1);
            *chances.entry(backend).or_default() += wins as f64 / pairs;
        }
        chances
    }
}

/// The destination of a flow's packets.
fn destination<A: Address>(flow: &Flow<A>) -> Endpoint {
    Endpoint { address: from_mapped(flow.edit.daddr.to_mapped()), port: flow.edit.dport.get() }
}
