//! What the next packet of a client would meet: the pipeline itself, run on copies of the entries that matter.
//!
//! The packet is the first of a connection: a SYN, or a datagram. Where the client's port is known and has a flow, it is
//! the next packet of that flow. Nothing that runs here can change a table of the kernel.
//!
//! A network namespace of this machine can be asked about too: what its next socket would meet. Its client key is an IPv6
//! address whatever it dials, so an IPv4 frontend is looked up as an IPv4-mapped one, as a socket may ask for it.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::IpAddr,
};

use affinity_common::{
    abi::{
        AFFINITY, Address, Direction, FLOW_SHADOW, Flow, FlowKey, Frontend, FrontendKey, MASQUERADE, MemberKey, PODS,
        Port, RangeKey, Reason, SHADOW, SHARED, SPLIT, Selection, Session, SessionKey, V4, V6, filter_bit,
    },
    model::Model,
    parse::{Headers, SYN, TCP},
    pipeline::{self, Decision},
    tables::{Entry, FamilyTables},
};
use serde::Serialize;

use super::{
    Catalog, Client, ClientRef, Endpoint, FlowView, SessionView,
    address::{from_mapped, mapped},
    protocol_name,
    service::policy_text,
    short_duration,
};

/// A packet to ask about; both addresses are of one family. Or a socket: then the client is the key of its network
/// namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Question {
    /// The client.
    pub from: IpAddr,
    /// The client's port; `None`: one that has no connection yet.
    pub from_port: Option<u16>,
    /// What it dials.
    pub to: Endpoint,
    /// IANA protocol number.
    pub protocol: u8,
}

impl Question {
    /// The packet's key. A port that was not given is zero, which no client uses.
    #[must_use]
    pub fn key<A: Address>(&self) -> FlowKey<A> {
        FlowKey {
            saddr: A::from_mapped(mapped(self.from)),
            daddr: A::from_mapped(mapped(self.to.address)),
            sport: Port::new(self.from_port.unwrap_or(0)),
            dport: Port::new(self.to.port),
            protocol: self.protocol,
            direction: Direction::Forward as u8,
            pad: [0; 2],
        }
    }

    /// Whether what it dials is a frontend.
    #[must_use]
    pub fn is_frontend<A: FrontendTables>(&self, catalog: &Catalog) -> bool {
        self.frontend::<A>(catalog).is_some()
    }

    /// Whether this is about a socket, and not a packet.
    #[must_use]
    pub fn is_socket(&self) -> bool {
        Client::new(self.from, u8::MAX).netns().is_some()
    }

    /// The record of the frontend that is dialled, as this client meets it. For a socket the whole client key counts, and nothing that is decided by
    /// where a packet comes from.
    fn frontend<A: FrontendTables>(&self, catalog: &Catalog) -> Option<Frontend> {
        if !self.is_socket() {
            let (key, client) = (self.frontend_key::<A>(), self.key::<A>().saddr);
            let frontend = A::frontend(catalog, &key)?;
            let is_inside =
                || (0..=A::BITS).any(|bits| A::ranges(catalog).contains(&RangeKey::new(PODS, client, bits)));
            return if frontend.flags & SPLIT == 0 || is_inside() {
                Some(Frontend { flags: frontend.flags & !SPLIT, ..frontend })
            } else {
                A::frontend(catalog, &key.outside())
            };
        }
        let frontend = match self.to.address.to_canonical() {
            IpAddr::V4(_) => V4::frontend(catalog, &self.frontend_key()),
            IpAddr::V6(_) => V6::frontend(catalog, &self.frontend_key()),
        }?;
        Some(Frontend { prefix: V6::BITS, flags: frontend.flags & (AFFINITY | SHARED | SHADOW), ..frontend })
    }

    /// The bit of the filter for what is dialled.
    #[must_use]
    pub fn filter_bit(&self) -> u32 {
        let Self { to: Endpoint { address, port }, protocol, .. } = *self;
        match address.to_canonical() {
            IpAddr::V4(address) => filter_bit(V4(address.octets()), Port::new(port), protocol),
            IpAddr::V6(address) => filter_bit(V6(address.octets()), Port::new(port), protocol),
        }
    }

    fn frontend_key<A: Address>(&self) -> FrontendKey<A> {
        let key = self.key::<A>();
        FrontendKey::new(key.daddr, key.dport, key.protocol)
    }
}

/// What the large tables say about a question.
#[derive(Clone, Debug)]
pub struct Situation<A: Address> {
    /// Whether the filter lets the packet in.
    pub in_filter: bool,
    /// The client's pins in the scopes of the frontend.
    pub sessions: BTreeMap<SessionKey<A>, Session>,
    /// The flow that the packet belongs to.
    pub flow: Option<Flow<A>>,
    /// Whether that flow has a source of the node.
    pub is_masqueraded: bool,
    /// Live sessions of the pool's backends.
    pub loads: BTreeMap<u32, u64>,
}

/// The tables of a family in what was read and in the model.
pub trait FrontendTables: Address {
    /// The record of a frontend.
    fn frontend(catalog: &Catalog, key: &FrontendKey<Self>) -> Option<Frontend>;
    /// The ranges of addresses.
    fn ranges(catalog: &Catalog) -> &BTreeSet<RangeKey<Self>>;
    /// Copies a frontend and all ranges into the model.
    fn put_frontend(model: &mut Model, catalog: &Catalog, key: FrontendKey<Self>, frontend: Frontend);
}

impl FrontendTables for V4 {
    fn frontend(catalog: &Catalog, key: &FrontendKey<Self>) -> Option<Frontend> {
        catalog.observed.frontends_v4.get(key).copied()
    }

    fn ranges(catalog: &Catalog) -> &BTreeSet<RangeKey<Self>> {
        &catalog.observed.ranges_v4
    }

    fn put_frontend(model: &mut Model, catalog: &Catalog, key: FrontendKey<Self>, frontend: Frontend) {
        model.frontends_v4.insert(key, frontend);
        model.ranges_v4.clone_from(&catalog.observed.ranges_v4);
    }
}

impl FrontendTables for V6 {
    fn frontend(catalog: &Catalog, key: &FrontendKey<Self>) -> Option<Frontend> {
        catalog.observed.frontends_v6.get(key).copied()
    }

    fn ranges(catalog: &Catalog) -> &BTreeSet<RangeKey<Self>> {
        &catalog.observed.ranges_v6
    }

    fn put_frontend(model: &mut Model, catalog: &Catalog, key: FrontendKey<Self>, frontend: Frontend) {
        model.frontends_v6.insert(key, frontend);
        model.ranges_v6.clone_from(&catalog.observed.ranges_v6);
    }
}

/// Keys under which a client's pins for a frontend may lie: the group's, then the service's own.
#[must_use]
pub fn session_keys<A: FrontendTables>(catalog: &Catalog, question: &Question) -> Vec<SessionKey<A>> {
    let Some(frontend) = question.frontend::<A>(catalog) else { return Vec::new() };
    let client = question.key::<A>().saddr;
    let mut keys: Vec<_> =
        [frontend.group, frontend.own].map(|scope| SessionKey::new(scope, client, frontend.prefix)).to_vec();
    keys.dedup();
    keys
}

/// Indices of the backends in the pool of a question's frontend.
#[must_use]
pub fn pool_backends<A: FrontendTables>(catalog: &Catalog, question: &Question) -> Vec<u32> {
    question
        .frontend::<A>(catalog)
        .map_or_else(Vec::new, |frontend| catalog.members(frontend.pool).map(|(index, _)| index).collect())
}

/// A frontend, as an explanation names it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ExplainedFrontend<'a> {
    /// The service, `namespace/name`.
    pub service: Cow<'a, str>,
    /// Address and port.
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// `TCP` or `UDP`.
    pub protocol: &'static str,
}

/// A pod that the packet may reach.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Candidate<'a> {
    /// The pod's address.
    pub address: IpAddr,
    /// The pod's port.
    pub port: u16,
    /// The pod's name, where the source gave one.
    pub name: Option<&'a str>,
    /// The pod's namespace, where the source gave a name.
    pub namespace: Option<&'a str>,
    /// How likely it is chosen: from 0 to 1.
    pub probability: f64,
}

impl Candidate<'_> {
    fn text(&self) -> String {
        let endpoint = Endpoint { address: self.address, port: self.port };
        self.name.map_or_else(|| endpoint.to_string(), |name| format!("{name} ({endpoint})"))
    }
}

/// One step on the packet's way.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Step {
    /// Where.
    pub step: &'static str,
    /// What it meets there.
    pub finds: String,
}

/// The answer.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Explanation<'a> {
    /// What was dialled; null: no frontend.
    pub frontend: Option<ExplainedFrontend<'a>>,
    /// `forward`, `reject`, `drop` or `pass`.
    pub verdict: &'static str,
    /// Why: the name of a [`Reason`].
    pub reason: &'static str,
    /// The pin that the packet follows; null: none.
    pub pinned: Option<SessionView<'a>>,
    /// The pods that it may reach.
    pub candidates: Vec<Candidate<'a>>,
    /// Whether its source address is translated too.
    pub masquerade: bool,
    /// The connection that the packet belongs to; null: it begins one.
    pub flow: Option<FlowView<'a>>,
    /// How it comes to that.
    pub steps: Vec<Step>,
}

/// Runs the pipeline and tells what it did.
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
        let model = self.model();
        let mut headers = self.headers();
        let outcome = pipeline::to_frontend(&model, &mut headers);
        let decided = outcome.reason;
        let (would, flow) = match outcome.decision {
            Decision::Pass => ("pass", None),
            Decision::Forward(flow) => ("forward", Some(flow.get())),
            Decision::Reject => ("reject", None),
            Decision::Drop => ("drop", None),
        };
        let candidates = flow.map_or_else(Vec::new, |flow| self.candidates(&flow, decided));
        let masquerade = flow.is_some_and(|flow| self.is_masqueraded(&model, &flow, decided, candidates.len()));
        let pinned = flow.and_then(|flow| self.pin(&flow, decided));
        let known = self.situation.flow;
        let established = known.filter(|_| matches!(decided, Reason::Established | Reason::FlowGone | Reason::Shadow));
        let is_new = !matches!(decided, Reason::NotFrontend | Reason::Established | Reason::FlowGone);
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
            steps: self.steps((would, decided), reason, flow.as_ref().map(|flow| (flow, masquerade)), &candidates),
            candidates,
            masquerade,
            flow: established.and_then(|flow| FlowView::new(self.catalog, &headers.key, &flow)),
        }
    }

    fn is_shadow(&self) -> bool {
        self.frontend.is_some_and(|frontend| frontend.flags & SHADOW != 0)
    }

    fn headers(&self) -> Headers<A> {
        let flags = if self.question.protocol == TCP { SYN } else { 0 };
        Headers::new(self.question.key(), flags)
    }

    /// The tables as far as this packet can see them.
    fn model(&self) -> Model {
        let Self { catalog, question, situation, .. } = self;
        let observed = &catalog.observed;
        let mut model = Model::new(16);
        model.now_ns.set(catalog.clock.now_ns);
        let key = question.key::<A>();
        if situation.in_filter {
            model.filter.borrow_mut().insert((Direction::Forward, filter_bit(key.daddr, key.dport, key.protocol)));
        }
        if let Some(mut frontend) = self.frontend {
            // What would be decided without shadow mode; but a connection of that time is another proxy's.
            if situation.flow.is_none_or(|flow| flow.state & FLOW_SHADOW == 0) {
                frontend.flags &= !SHADOW;
            }
            A::put_frontend(&mut model, catalog, question.frontend_key(), frontend);
            let slots = observed.slots.get(&frontend.slot_first).into_iter().flatten();
            model.slots.extend((frontend.slot_first..).zip(slots.copied()));
            for scope in [frontend.pool, frontend.group] {
                let range = MemberKey { pool: scope, backend: 0 }..=MemberKey { pool: scope, backend: u32::MAX };
                model.members.extend(observed.members.range(range).map(|(key, member)| (*key, *member)));
            }
        }
        model.node = observed.node;
        model.backends.clone_from(&observed.backends);
        model.loads.borrow_mut().extend(&situation.loads);
        for (key, session) in &situation.sessions {
            // An empty table of sixteen takes one or two entries.
            let _ = model.add_session(key, session);
        }
        if let Some(flow) = &situation.flow {
            let _ = model.put_flow(&key, flow);
        }
        model
    }

    /// Whether the source is translated too: for all candidates, or for the only one.
    fn is_masqueraded(&self, model: &Model, flow: &Flow<A>, reason: Reason, candidates: usize) -> bool {
        if reason == Reason::Established {
            return self.situation.is_masqueraded;
        }
        let outward = FlowKey::translated(&flow.edit, self.question.protocol, Direction::Outward);
        let is_for_all = self.frontend.is_some_and(|frontend| frontend.flags & MASQUERADE != 0);
        model.flow(&outward).is_some() && (is_for_all || candidates == 1)
    }

    /// The pin that the packet's flow hangs on.
    fn pin(&self, flow: &Flow<A>, reason: Reason) -> Option<SessionView<'a>> {
        if !matches!(reason, Reason::Pinned | Reason::Established) {
            return None;
        }
        let (key, session) = self.situation.sessions.iter().find(|(key, _)| key.scope == flow.scope)?;
        Some(SessionView::new(self.catalog, key, session)).filter(SessionView::is_live)
    }

    fn candidates(&self, flow: &Flow<A>, reason: Reason) -> Vec<Candidate<'a>> {
        if let Some(frontend) = self.frontend.filter(|_| matches!(reason, Reason::Created | Reason::Selected)) {
            let chances = match Selection::from_byte(frontend.select) {
                Selection::Random => self.uniform(&frontend),
                Selection::Least => self.two_choices(&frontend),
                Selection::Consistent => BTreeMap::from([(flow.backend, 1.0)]),
            };
            let candidates = chances.into_iter().filter(|&(_, probability)| probability > 0.0);
            return candidates.filter_map(|(index, chance)| self.candidate(&frontend, index, chance)).collect();
        }
        // A connection that exists, a pin, or a pin's own next draw: there is no choice left.
        let pod = self.catalog.backend(flow.backend, flow.generation);
        let to = destination(flow);
        let (name, namespace) = (pod.name, pod.namespace);
        vec![Candidate { address: to.address, port: to.port, name, namespace, probability: 1.0 }]
    }

    fn candidate(&self, frontend: &Frontend, backend: u32, probability: f64) -> Option<Candidate<'a>> {
        let member = self.catalog.observed.members.get(&MemberKey { pool: frontend.pool, backend })?;
        let pod = self.catalog.backend(backend, member.generation);
        let (port, name, namespace) = (member.port.get(), pod.name, pod.namespace);
        Some(Candidate { address: pod.address?, port, name, namespace, probability })
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

    /// Of each ordered pair of slots the second wins if it has fewer sessions, else the first. So a slot wins against
    /// every slot with more, in both orders, and against its equals when it is drawn first.
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

/// Where a packet of a flow goes to.
fn destination<A: Address>(flow: &Flow<A>) -> Endpoint {
    Endpoint { address: from_mapped(flow.edit.daddr.to_mapped()), port: flow.edit.dport.get() }
}

// ---- in words ----

/// The texts of reasons begin with what becomes of the packet.
fn without_verdict(text: &str) -> &str {
    text.split_once(": ").map_or(text, |(_, cause)| cause)
}

impl<A: FrontendTables> Case<'_, '_, A>
where
    Model: FamilyTables<A>,
{
    /// `decided` is what is decided but for shadow mode, `reason` what is counted for the packet.
    fn steps(
        &self,
        decided: (&str, Reason),
        reason: Reason,
        flow: Option<(&Flow<A>, bool)>,
        candidates: &[Candidate<'_>],
    ) -> Vec<Step> {
        let mut steps = vec![Step { step: "packet", finds: self.packet_text() }];
        let mut step = |step, finds| steps.push(Step { step, finds });
        if !self.situation.in_filter {
            step("filter", "no frontend has this address and port: not looked at any further".to_owned());
        } else {
            step("filter", "this may be a frontend".to_owned());
            if let Some(found) = self.flow_text() {
                step("flow", found);
            }
            step("frontend", self.frontend_text());
            if self.frontend.is_some_and(|frontend| frontend.slot_count > 0)
                && !matches!(
                    decided.1,
                    Reason::Established | Reason::Shadow | Reason::NotInRanges | Reason::PortsExhausted
                )
            {
                step("session", self.session_text(decided.1));
                step("selection", self.selection_text(decided.1, candidates));
            }
        }
        let text =
            |verdict, reason: Reason| format!("{verdict} ({}): {}", reason.name(), without_verdict(reason.text()));
        let mut finds = text(decided.0, decided.1);
        if reason != decided.1 {
            finds = format!("{} Otherwise: {finds}", text("pass", reason));
        }
        if let Some((flow, is_masqueraded)) = flow {
            let _ = match candidates.len() {
                1 => write!(finds, " The destination becomes {}.", destination(flow)),
                _ => write!(finds, " The destination becomes that of one candidate."),
            };
            if is_masqueraded {
                finds += " The source becomes one of the node, where the packet leaves for the pod.";
            }
        }
        step("verdict", finds);
        steps
    }

    fn packet_text(&self) -> String {
        let Question { from, from_port, to, protocol } = self.question;
        if self.question.is_socket() {
            let what = if *protocol == TCP { "TCP" } else { "UDP" };
            return format!("{what} socket of {}, asking for {to}", self.client());
        }
        let what = if *protocol == TCP { "TCP SYN" } else { "UDP datagram" };
        match from_port {
            Some(port) => format!("{what} from {} to {to}", Endpoint { address: *from, port: *port }),
            None => format!("{what} from {from}, a new port, to {to}"),
        }
    }

    fn client(&self) -> ClientRef<'_> {
        self.catalog.client(self.question.from, self.frontend.map_or(0, |frontend| frontend.service))
    }

    /// Nothing where no port was asked about.
    fn flow_text(&self) -> Option<String> {
        self.question.from_port?;
        let Some(flow) = &self.situation.flow else { return Some("none: this begins a connection".to_owned()) };
        let view = FlowView::new(self.catalog, &self.question.key(), flow)?;
        let age = short_duration(view.created.age.as_secs());
        Some(format!("a connection to {} ({}), {} for {age}", view.backend, view.translated, view.state.name()))
    }

    fn frontend_text(&self) -> String {
        let Some(frontend) = &self.frontend else { return "none with this address, port and protocol".to_owned() };
        let ready = self.catalog.members(frontend.pool).filter(|&(_, ready)| ready).count();
        let all = self.catalog.members(frontend.pool).count();
        let service = self.catalog.service_name(frontend.service);
        let affinity = if frontend.flags & AFFINITY != 0 { "ClientIP" } else { "no" };
        format!("{service}: {ready} of {all} pods ready, {affinity} affinity, {}", policy_text(frontend))
    }

    fn session_text(&self, reason: Reason) -> String {
        let Some(frontend) = &self.frontend else { return String::new() };
        if frontend.flags & AFFINITY == 0 {
            return "none is kept: the service has no affinity".to_owned();
        }
        let mut text = String::new();
        for (key, session) in &self.situation.sessions {
            let view = SessionView::new(self.catalog, key, session);
            let left = match view.expires_in_seconds {
                None => "never expires".to_owned(),
                Some(0) => "expired".to_owned(),
                Some(seconds) => format!("expires in {}", short_duration(seconds)),
            };
            let scope = self.catalog.scope_name(key.scope);
            let age = short_duration(view.created.age.as_secs());
            let _ = write!(text, "{} is pinned to {} in {scope} for {age}, {left}; ", view.client, view.backend);
        }
        #[expect(clippy::wildcard_enum_match_arm, reason = "only these reasons say something about pins")]
        let so = match reason {
            Reason::Pinned => "the packet follows",
            Reason::Created if self.situation.sessions.is_empty() => {
                return format!("none of {}: it will be pinned", self.client());
            }
            Reason::Created => "but that pod does not serve here: pinned here by itself",
            Reason::Expired => "selects anew",
            Reason::BackendGone => "but that pod is gone",
            Reason::NotReady => "but that pod takes no new connections",
            Reason::NotMember => "but that pod has left the service",
            _ => "not followed",
        };
        text + so
    }

    fn selection_text(&self, reason: Reason, candidates: &[Candidate<'_>]) -> String {
        let Some(frontend) = &self.frontend else { return String::new() };
        let texts: Vec<_> = candidates
            .iter()
            .map(|candidate| match candidates.len() {
                1 => candidate.text(),
                _ => format!("{} {:.1} %", candidate.text(), candidate.probability * 100.0),
            })
            .collect();
        let how = match (reason, Selection::from_byte(frontend.select)) {
            (Reason::Pinned, _) => "none: the pin names",
            (_, Selection::Consistent) => "consistent: every node chooses",
            (Reason::Created | Reason::Selected, Selection::Random) => "random:",
            (Reason::Created | Reason::Selected, Selection::Least) => "least: the less loaded of two:",
            // The next draw is part of the pin, so that two processors agree.
            (_, Selection::Random) => "random: the pin's next draw is",
            (_, Selection::Least) => "least: by the pin's next draw,",
        };
        format!("{how} {}", texts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use affinity_common::abi::{MEMBER_DRAINING, RANGES, Selection, netns_client};

    use super::*;
    use crate::view::{fixture, ip};

    /// What the first client's packet to the first frontend meets.
    fn ask(
        catalog: &Catalog,
        from: &str,
        to: &str,
        sessions: &[(SessionKey<V4>, Session)],
    ) -> (Question, Situation<V4>) {
        let (to, protocol) = to.split_once('/').unwrap_or((to, "tcp"));
        let to: std::net::SocketAddr = to.parse().unwrap();
        let question = Question {
            from: from.parse().unwrap(),
            from_port: None,
            to: Endpoint { address: to.ip(), port: to.port() },
            protocol: if protocol == "udp" { 17 } else { 6 },
        };
        let keys = session_keys::<V4>(catalog, &question);
        let situation = Situation {
            in_filter: question.is_frontend::<V4>(catalog),
            sessions: sessions.iter().filter(|(key, _)| keys.contains(key)).copied().collect(),
            flow: None,
            is_masqueraded: false,
            loads: BTreeMap::new(),
        };
        (question, situation)
    }

    fn steps(explanation: &Explanation<'_>) -> String {
        let lines = explanation.steps.iter().map(|step| format!("{}: {}", step.step, step.finds));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// What a client outside of the pod networks meets, and what one of them does.
    #[test]
    fn an_outsider_has_a_record_and_a_source_of_its_own() {
        let mut catalog = fixture::catalog();
        let key = FrontendKey::new(V4([10, 96, 0, 10]), Port::new(80), TCP);
        let record = catalog.observed.frontends_v4[&key];
        let (inside, outside) = (record.flags | SPLIT, record.flags | MASQUERADE | RANGES);
        catalog.observed.frontends_v4.insert(key, Frontend { flags: inside, ..record });
        catalog.observed.frontends_v4.insert(key.outside(), Frontend { flags: outside, ..record });
        catalog.observed.ranges_v4.insert(RangeKey::new(PODS, V4([10, 244, 0, 0]), 16));
        catalog.observed.ranges_v4.insert(RangeKey::new(record.service, V4([192, 0, 2, 0]), 24));
        let node = (V4([192, 0, 2, 1]), Port::new(1024));
        (catalog.observed.node.address_v4, catalog.observed.node.port_first) = node;
        catalog.observed.node.port_count = 9;

        let met = |from: &str| {
            let (question, situation) = ask(&catalog, from, "10.96.0.10:80", &[]);
            let explanation = explain(&catalog, &question, &situation);
            (explanation.verdict, explanation.reason, explanation.masquerade)
        };
        assert_eq!(met("10.244.7.7"), ("forward", "created", false));
        assert_eq!(met("192.0.2.77"), ("forward", "created", true));
        assert_eq!(met("198.51.100.1"), ("drop", "not-in-ranges", false));
    }

    #[test]
    fn a_new_client_may_reach_every_ready_pod() {
        let catalog = fixture::catalog();
        let (question, situation) = ask(&catalog, "192.0.2.99", "10.96.0.10:80", &fixture::sessions_v4());
        let answer = explain(&catalog, &question, &situation);
        insta::assert_snapshot!(steps(&answer), @r"
        packet: TCP SYN from 192.0.2.99, a new port, to 10.96.0.10:80
        filter: this may be a frontend
        frontend: default/web: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=random
        session: none of 192.0.2.99: it will be pinned
        selection: random: web-0 (10.244.0.1:8080) 50.0 %, web-1 (10.244.0.2:8080) 50.0 %
        verdict: forward (created): a new client was pinned. The destination becomes that of one candidate.
        ");
        insta::assert_snapshot!(serde_json::to_string_pretty(&answer).unwrap(), @r#"
        {
          "frontend": {
            "service": "default/web",
            "address": "10.96.0.10",
            "port": 80,
            "protocol": "TCP"
          },
          "verdict": "forward",
          "reason": "created",
          "pinned": null,
          "candidates": [
            {
              "address": "10.244.0.1",
              "port": 8080,
              "name": "web-0",
              "namespace": "default",
              "probability": 0.5
            },
            {
              "address": "10.244.0.2",
              "port": 8080,
              "name": "web-1",
              "namespace": "default",
              "probability": 0.5
            }
          ],
          "masquerade": false,
          "flow": null,
          "steps": [
            {
              "step": "packet",
              "finds": "TCP SYN from 192.0.2.99, a new port, to 10.96.0.10:80"
            },
            {
              "step": "filter",
              "finds": "this may be a frontend"
            },
            {
              "step": "frontend",
              "finds": "default/web: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=random"
            },
            {
              "step": "session",
              "finds": "none of 192.0.2.99: it will be pinned"
            },
            {
              "step": "selection",
              "finds": "random: web-0 (10.244.0.1:8080) 50.0 %, web-1 (10.244.0.2:8080) 50.0 %"
            },
            {
              "step": "verdict",
              "finds": "forward (created): a new client was pinned. The destination becomes that of one candidate."
            }
          ]
        }
        "#);
    }

    #[test]
    fn a_pinned_client_reaches_its_pod() {
        let catalog = fixture::catalog();
        let (question, situation) = ask(&catalog, "192.0.2.1", "10.96.0.10:443", &fixture::sessions_v4());
        let answer = explain(&catalog, &question, &situation);
        insta::assert_snapshot!(steps(&answer), @r"
        packet: TCP SYN from 192.0.2.1, a new port, to 10.96.0.10:443
        filter: this may be a frontend
        frontend: default/web: 1 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=random
        session: 192.0.2.1 is pinned to web-0 in default/web for 16m40s, expires in 2h59m; the packet follows
        selection: none: the pin names web-0 (10.244.0.1:8443)
        verdict: forward (pinned): a new connection followed its pin. The destination becomes 10.244.0.1:8443.
        ");
        assert_eq!((answer.verdict, answer.reason), ("forward", "pinned"));
        assert_eq!(answer.candidates.iter().map(|c| (c.name, c.port)).collect::<Vec<_>>(), [(Some("web-0"), 8443)]);
        assert_eq!(answer.pinned.unwrap().backend.name, Some("web-0"));
    }

    #[test]
    fn a_pin_that_cannot_be_followed_is_no_pin() {
        let catalog = fixture::catalog();
        for (client, to, reason) in [
            ("198.51.100.7", "10.96.0.10:80", "backend-gone"),
            ("198.51.100.8", "10.96.0.10:80", "backend-gone"),
            ("192.0.2.20", "10.96.0.10:443", "not-ready"),
        ] {
            let (question, situation) = ask(&catalog, client, to, &fixture::sessions_v4());
            let answer = explain(&catalog, &question, &situation);
            assert_eq!((answer.verdict, answer.reason, answer.candidates.len()), ("forward", reason, 1), "{client}");
            assert!(answer.pinned.is_none());
        }
        let old = vec![(SessionKey::new(1, V4([192, 0, 2, 1]), 32), fixture::session(1, 2, 1))];
        let mut observed = catalog.observed.clone();
        observed.frontends_v4.values_mut().for_each(|frontend| frontend.timeout_ns = 60 * fixture::SECOND);
        let catalog = Catalog::new(observed, BTreeMap::new(), fixture::clock());
        let (question, situation) = ask(&catalog, "192.0.2.1", "10.96.0.10:80", &old);
        let answer = explain(&catalog, &question, &situation);
        insta::assert_snapshot!(steps(&answer), @r"
        packet: TCP SYN from 192.0.2.1, a new port, to 10.96.0.10:80
        filter: this may be a frontend
        frontend: default/web: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=60s select=random
        session: 192.0.2.1 is pinned to web-0 in default/web for 2h46m, expired; selects anew
        selection: random: the pin's next draw is web-0 (10.244.0.1:8080)
        verdict: forward (expired): the pin's timeout had passed; selected anew. The destination becomes 10.244.0.1:8080.
        ");
    }

    #[test]
    fn what_is_no_frontend_passes_and_what_has_no_pod_is_refused() {
        let catalog = fixture::catalog();
        let (question, situation) = ask(&catalog, "192.0.2.1", "10.96.0.10:81", &[]);
        let answer = explain(&catalog, &question, &situation);
        assert_eq!((answer.verdict, answer.reason, answer.frontend.is_none()), ("pass", "not-frontend", true));
        insta::assert_snapshot!(steps(&answer), @r"
        packet: TCP SYN from 192.0.2.1, a new port, to 10.96.0.10:81
        filter: no frontend has this address and port: not looked at any further
        verdict: pass (not-frontend): the destination is no frontend.
        ");
        let (question, situation) = ask(&catalog, "192.0.2.1", "10.96.0.53:53/udp", &[]);
        let answer = explain(&catalog, &question, &situation);
        assert_eq!((answer.verdict, answer.reason, answer.candidates.len()), ("reject", "no-endpoints", 0));
        insta::assert_snapshot!(steps(&answer), @r"
        packet: UDP datagram from 192.0.2.1, a new port, to 10.96.0.53:53
        filter: this may be a frontend
        frontend: kube-system/dns: 0 of 1 pods ready, ClientIP affinity, timer=alive timeout=unlimited select=consistent
        verdict: reject (no-endpoints): the service has no usable endpoint.
        ");
    }

    #[test]
    fn a_flow_keeps_its_pod_whatever_becomes_of_the_pin() {
        let catalog = fixture::catalog();
        let (key, flow) = fixture::flow();
        let (mut question, mut situation) = ask(&catalog, "192.0.2.1", "10.96.0.10:80", &[]);
        question.from_port = Some(key.sport.get());
        situation.flow = Some(Flow { state: 0, ..flow });
        let answer = explain(&catalog, &question, &situation);
        assert_eq!((answer.verdict, answer.reason), ("forward", "established"));
        assert_eq!(answer.flow.as_ref().unwrap().backend.name, Some("web-0"));
        insta::assert_snapshot!(steps(&answer), @r"
        packet: TCP SYN from 192.0.2.1:40000 to 10.96.0.10:80
        filter: this may be a frontend
        flow: a connection to web-0 (10.244.0.1:8080), open for 16m40s
        frontend: default/web: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=random
        verdict: forward (established): a packet of a known flow. The destination becomes 10.244.0.1:8080.
        ");
    }

    #[test]
    fn the_less_loaded_of_two_wins_as_often_as_it_is_drawn() {
        let catalog = fixture::catalog();
        let mut observed = catalog.observed.clone();
        observed.frontends_v4.values_mut().for_each(|frontend| frontend.select = Selection::Least as u8);
        let catalog = Catalog::new(observed, BTreeMap::new(), fixture::clock());
        let (question, mut situation) = ask(&catalog, "192.0.2.99", "10.96.0.10:80", &[]);
        let chances = |situation: &Situation<V4>| -> Vec<_> {
            let answer = explain(&catalog, &question, situation);
            answer.candidates.iter().map(|candidate| (candidate.name, candidate.probability)).collect()
        };
        assert_eq!(chances(&situation), [(Some("web-0"), 0.5), (Some("web-1"), 0.5)]);
        situation.loads = BTreeMap::from([(1, 7), (2, 6)]);
        assert_eq!(chances(&situation), [(Some("web-1"), 1.0)]);
    }

    #[test]
    fn a_socket_follows_the_pin_of_its_namespace() {
        let catalog = fixture::catalog();
        let to = Endpoint { address: "10.96.0.10".parse().unwrap(), port: 80 };
        let from = ip(netns_client(77, 4));
        let question = Question { from, from_port: None, to, protocol: TCP };
        let mut situation = Situation::<V6> {
            in_filter: true,
            sessions: BTreeMap::new(),
            flow: None,
            is_masqueraded: false,
            loads: BTreeMap::new(),
        };
        let answer = explain(&catalog, &question, &situation);
        assert_eq!((answer.verdict, answer.reason, answer.candidates.len()), ("forward", "created", 2));
        insta::assert_snapshot!(steps(&answer), @r"
        packet: TCP socket of netns:77, asking for 10.96.0.10:80
        filter: this may be a frontend
        frontend: default/web: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=random
        session: none of netns:77: it will be pinned
        selection: random: web-0 (10.244.0.1:8080) 50.0 %, web-1 (10.244.0.2:8080) 50.0 %
        verdict: forward (created): a new client was pinned. The destination becomes that of one candidate.
        ");
        let [key] = session_keys::<V6>(&catalog, &question)[..] else { panic!("one scope, one key") };
        assert_eq!(key, SessionKey::new(1, netns_client(77, 4), 128));
        situation.sessions.insert(key, fixture::session(9_000, 9_000, 2));
        let answer = explain(&catalog, &question, &situation);
        assert_eq!(answer.pinned.as_ref().unwrap().client.to_string(), "netns:77");
        insta::assert_snapshot!(steps(&answer), @r"
        packet: TCP socket of netns:77, asking for 10.96.0.10:80
        filter: this may be a frontend
        frontend: default/web: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=random
        session: netns:77 is pinned to web-1 in default/web for 16m40s, expires in 2h43m; the packet follows
        selection: none: the pin names web-1 (10.244.0.2:8080)
        verdict: forward (pinned): a new connection followed its pin. The destination becomes 10.244.0.2:8080.
        ");
    }

    #[test]
    fn a_draining_pod_is_no_candidate() {
        let mut observed = fixture::catalog().observed;
        observed.members.values_mut().for_each(|member| member.state = MEMBER_DRAINING);
        observed.frontends_v4.values_mut().for_each(|frontend| frontend.slot_count = 0);
        let catalog = Catalog::new(observed, BTreeMap::new(), fixture::clock());
        let (question, situation) = ask(&catalog, "192.0.2.99", "10.96.0.10:80", &[]);
        let answer = explain(&catalog, &question, &situation);
        assert_eq!((answer.verdict, answer.candidates.len()), ("reject", 0));
    }
}
