//! `affinity explain` compared with the result of the kernel programs for the same packet, over random states.
//!
//! Each packet leaves a pin or a connection behind, and the next question is about the resulting state.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use affinity_common::{
    abi::{Direction, Flow, FlowKey, Port, REASONS, Reason, V4, V6},
    headers::TCP,
    model::Model,
    pipeline::Verdict,
    state,
    tables::FamilyTables,
};
use affinity_tests::{
    dice::Dice,
    kernel::{Fixed, Hook, Kernel},
    lab::Family,
    packet::{
        Frame,
        tcp_flags::{ACK, SYN},
    },
};
use affinity_user::{
    store::kernel::Family as StoreFamily,
    view::{Candidate, Catalog, Clock, Endpoint, Explanation, FrontendTables, Question, Situation, explain},
};
use anyhow::{Context, Result, ensure};

use crate::{over_states, world::World};

const STATES_OF_EACH: usize = 20;
const QUESTIONS_TO_A_STATE: usize = 150;
/// Something that occurred less often than this has not been tested.
const OFTEN: u64 = 30;
/// The first port of clients that are asked about without a port.
const FIRST_NEW_PORT: u16 = 50_000;

/// How often each result occurred.
#[derive(Default)]
struct Coverage {
    reasons: BTreeMap<Reason, u64>,
    masqueraded: u64,
    by_chance: u64,
}

#[test]
fn what_is_explained_is_what_the_kernel_does() -> Result<()> {
    let mut coverage = Coverage::default();
    over_states(STATES_OF_EACH, 0, |kernel, fixed, dice| {
        let world = World::published(dice, fixed);
        ask_all(kernel, fixed, &world, dice, &mut coverage)
    })?;
    for (reason, count) in &coverage.reasons {
        println!("{}: {count}", reason.name());
    }
    let Coverage { masqueraded, by_chance, .. } = coverage;
    println!("masqueraded: {masqueraded}; one of several: {by_chance}");
    let seldom: Vec<_> =
        EXPLAINED.iter().filter(|reason| coverage.reasons.get(reason).is_none_or(|count| *count < OFTEN)).collect();
    ensure!(seldom.is_empty() && masqueraded >= OFTEN && by_chance >= OFTEN, "seldom met: {seldom:?}");
    Ok(())
}

/// The possible results of a question.
const EXPLAINED: [Reason; 15] = [
    Reason::NotFrontend,
    Reason::Established,
    Reason::Selected,
    Reason::Created,
    Reason::Pinned,
    Reason::Expired,
    Reason::BackendGone,
    Reason::NotReady,
    Reason::NotMember,
    Reason::NoEndpoints,
    Reason::FlowGone,
    Reason::NotAnswered,
    Reason::Shadow,
    Reason::NotInRanges,
    Reason::NoLocalEndpoints,
];

fn ask_all(kernel: &mut Kernel, fixed: Fixed, world: &World, dice: &mut Dice, coverage: &mut Coverage) -> Result<()> {
    kernel.put(&world.model)?;
    let observed = Catalog::read(&kernel.store)?.observed().clone();
    let catalog = Catalog::new(observed, BTreeMap::new(), Clock { now_ns: fixed.now_ns, ..Clock::now() });
    for new_port in (FIRST_NEW_PORT..).take(QUESTIONS_TO_A_STATE) {
        let question = question(dice, world);
        let port = question.from_port.unwrap_or(new_port);
        let asked = match question.from {
            IpAddr::V4(_) => ask::<V4>(kernel, &catalog, &question, port, coverage),
            IpAddr::V6(_) => ask::<V6>(kernel, &catalog, &question, port, coverage),
        };
        asked.with_context(|| format!("{question:?} from port {port}"))?;
    }
    Ok(())
}

/// A connection that may be known, or a new one.
fn question(dice: &mut Dice, world: &World) -> Question {
    let (from, from_port, to, protocol) = if dice.percent(50) {
        let known = dice.pick(&world.connections);
        (known.client.ip(), Some(known.client.port()), known.service, known.protocol)
    } else {
        let (service, protocol) = dice.pick(&world.frontends);
        let family = if service.is_ipv4() { Family::V4 } else { Family::V6 };
        let pods: Vec<_> = world.pods.iter().filter(|pod| pod.is_ipv4() == service.is_ipv4()).collect();
        let from = if dice.percent(20) { dice.pick(&pods).ip() } else { World::client(dice, family) };
        (from, None, service, protocol)
    };
    Question { from, from_port, to: Endpoint { address: to.ip(), port: to.port() }, protocol }
}

fn ask<A: FrontendTables + StoreFamily>(
    kernel: &Kernel,
    catalog: &Catalog,
    question: &Question,
    port: u16,
    coverage: &mut Coverage,
) -> Result<()>
where
    Model: FamilyTables<A>,
{
    let situation = Situation::<A>::of_kernel(&kernel.store, catalog, question)?;
    let said = explain(catalog, question, &situation);
    let met = Met::by(kernel, question, port, situation.flow.as_ref())?;
    *coverage.reasons.entry(met.reason).or_default() += 1;
    ensure!(met.is_as_said(&said), "met {met:?}, said {said:?}");
    coverage.masqueraded += u64::from(met.is_masqueraded);
    coverage.by_chance += u64::from(said.candidates.len() > 1);
    Ok(())
}

/// The result of the packet in the kernel.
#[derive(Debug)]
struct Met {
    verdict: &'static str,
    reason: Reason,
    /// Its destination, if it is translated.
    to: SocketAddr,
    is_masqueraded: bool,
}

impl Met {
    fn by<A: FrontendTables + StoreFamily>(
        kernel: &Kernel,
        question: &Question,
        port: u16,
        flow: Option<&Flow<A>>,
    ) -> Result<Self> {
        let from = SocketAddr::new(question.from, port);
        let to = SocketAddr::new(question.to.address, question.to.port);
        let frame = match (question.protocol, flow) {
            (TCP, Some(flow)) if !state::is_closed(flow.state) => Frame::tcp(from, to, ACK),
            (TCP, _) => Frame::tcp(from, to, SYN),
            _ => Frame::udp(from, to),
        };
        let before = kernel.store.counter_sums()?;
        let ran = kernel.run(Hook::TcForward, &frame.build())?;
        let after = kernel.store.counter_sums()?;
        let is_counted = |reason: &&Reason| {
            after[**reason as usize] > before[**reason as usize] && **reason != Reason::SessionNotStored
        };
        let mut counted = REASONS.iter().filter(is_counted);
        let (reason, others) = (*counted.next().context("no reason")?, counted.count());
        ensure!(others == 0, "more than one reason");
        let verdict = match ran.verdict {
            Verdict::Pass => "pass",
            Verdict::Forward | Verdict::Redirect => "forward",
            Verdict::Answer => "reject",
            Verdict::Drop => "drop",
        };
        let mut met = Self { verdict, reason, to, is_masqueraded: false };
        if verdict == "forward" {
            let flows = &kernel.store.family::<A>().flows;
            let key = FlowKey { sport: Port::new(port), ..question.key::<A>() };
            let edit = flows.get(&key)?.context("a flow")?.edit;
            met.to = SocketAddr::new(IpAddr::from(edit.daddr.to_mapped()).to_canonical(), edit.dport.get());
            let outward = FlowKey::translated(&edit, question.protocol, Direction::Snat);
            met.is_masqueraded = flows.get(&outward)?.is_some();
        }
        Ok(met)
    }

    /// Whether that is what the explanation says.
    fn is_as_said(&self, said: &Explanation<'_>) -> bool {
        let is_told = |pod: &Candidate<'_>| {
            (pod.address, pod.port, pod.masquerade) == (self.to.ip(), self.to.port(), self.is_masqueraded)
        };
        // The explanation also contains what shadow mode would do.
        let is_there = self.verdict != "forward" || said.candidates.iter().any(is_told);
        let is_for_all = said.candidates.iter().all(|pod| pod.masquerade) && !said.candidates.is_empty();
        (said.verdict, said.reason) == (self.verdict, self.reason.name()) && is_there && said.masquerade == is_for_all
    }
}
