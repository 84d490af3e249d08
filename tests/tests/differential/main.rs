//! The same questions to every dataplane: kube-proxy's rules in both of its modes. Whom a client reaches over any
//! frontend, under all policies and with endpoints in every state on two nodes, whether it is refused or left without an
//! answer, and whose address the pod sees, must be what one function says of all of them.

mod ask;
mod cases;
mod oracle;

use affinity_tests::kubeproxy::Mode;
use affinity_tests::lab::{Cgroup, Lab, Options, Service};
use affinity_tests::story::report;
use anyhow::{Context, Result, ensure};

use ask::{Question, ask_all};
use cases::{Case, choose};
use oracle::{DIFFERENCES, Dataplane, Outcome, can_be_asked, outcome};

const SEED: u64 = 4;
/// How many answers that are wrong are shown.
const SHOWN: usize = 12;

/// Every question, with the difference that is declared for it.
fn questions(dataplane: Dataplane) -> Result<Vec<(Question, Option<&'static str>)>> {
    let question = |case: Case| {
        let to = case.spec.service(case.service).address(case.frontend, case.family, case.protocol);
        let usual = outcome(&case);
        let known = DIFFERENCES.iter().find(|known| {
            known.of == dataplane && (known.applies)(&case) && usual != Outcome::from([known.instead.clone()])
        });
        let expected = known.map_or(usual, |known| Outcome::from([known.instead.clone()]));
        Ok((Question { to: to.context("it has every frontend")?, case, expected }, known.map(|known| known.reason)))
    };
    choose(SEED, can_be_asked).into_iter().map(question).collect()
}

/// The services that are asked.
fn services(questions: &[(Question, Option<&'static str>)]) -> Vec<Service> {
    let mut services: Vec<_> =
        questions.iter().map(|(question, _)| (question.case.service, &question.case.spec)).collect();
    services.dedup_by_key(|(number, _)| *number);
    services.into_iter().map(|(number, spec)| spec.service(number)).collect()
}

/// Asks everything of a dataplane that `put` puts in place.
fn tell(dataplane: Dataplane, put: impl FnOnce(&Lab, &[Service]) -> Result<()>) -> Result<()> {
    let lab = Lab::up(&Options { pods: 3, pods_of_b: 3, ..Options::default() })?;
    let cgroup = Cgroup::create()?;
    let (questions, known): (Vec<_>, Vec<_>) = {
        let questions = questions(dataplane)?;
        put(&lab, &services(&questions))?;
        questions.into_iter().unzip()
    };
    let outcomes = ask_all(&lab, &cgroup, &questions)?;
    let wrong: Vec<String> = questions
        .iter()
        .zip(&outcomes)
        .filter(|(question, met)| !question.is_answered_by(met))
        .map(|(question, met)| {
            let Question { case, to, expected } = question;
            format!("{case:?}\n  at {to}: met {met:?}, and not {expected:?}")
        })
        .collect();
    let shown = wrong.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("\n");
    ensure!(wrong.is_empty(), "{dataplane:?}: {} of {} answers are wrong:\n{shown}", wrong.len(), questions.len());
    for difference in DIFFERENCES.iter().filter(|difference| difference.of == dataplane) {
        let met = known.iter().filter(|reason| **reason == Some(difference.reason)).count();
        ensure!(met > 0, "nothing is asked any more that differs because: {}", difference.reason);
        report(&format!("{dataplane:?}: {met} of {} answers differ: {}", questions.len(), difference.reason));
    }
    report(&format!("{dataplane:?}: {} questions, all answered as kube-proxy would", questions.len()));
    Ok(())
}

fn tell_rules(dataplane: Dataplane, mode: Mode) -> Result<()> {
    if !mode.is_available() {
        report(&format!("{mode:?}: not on this machine, so there is nothing to compare with"));
        return Ok(());
    }
    tell(dataplane, |lab, services| mode.install(lab, services))
}

#[test]
fn kube_proxys_iptables_rules_do_what_the_function_says() -> Result<()> {
    tell_rules(Dataplane::Iptables, Mode::Iptables)
}

#[test]
fn kube_proxys_nftables_rules_do_what_the_function_says() -> Result<()> {
    tell_rules(Dataplane::Nftables, Mode::Nftables)
}
