//! The same questions to every proxy: kube-proxy's rules in both modes, and `affinity`. One function computes the expected
//! outcome for all of them: which pods a client reaches over any frontend, under all policies, with endpoints in every state on
//! two nodes and with every kind of hint; whether it is rejected or gets no answer; and which address the pod sees. `affinity
//! explain` must give the same result before.

mod ask;
mod cases;
mod explain;
mod health;
mod oracle;

use std::collections::BTreeMap;

use affinity_tests::in_every_way;
use affinity_tests::proxy::{Proxy, Scene};
use affinity_tests::story::report;
use anyhow::{Context, Result, ensure};

use ask::{Question, ask_all};
use cases::{Case, Spec, choose};
use explain::{explain_all, objection, objection_to_pinned};
use health::check_health;
use oracle::{DIFFERENCES, Outcome, can_be_asked, outcome};

const SEED: u64 = 6;
/// How many wrong answers are shown.
const SHOWN: usize = 12;

/// Every question, with the difference that is declared for it.
fn questions(proxy: Proxy) -> Result<Vec<(Question, Option<&'static str>)>> {
    let question = |case: Case| {
        let to = case.spec.service(case.service).address(case.frontend, case.family, case.protocol);
        let usual = outcome(&case);
        let known = DIFFERENCES.iter().find(|known| {
            known.of.contains(&proxy) && (known.applies)(&case) && usual != Outcome::from([known.instead.clone()])
        });
        let expected = known.map_or(usual, |known| Outcome::from([known.instead.clone()]));
        Ok((Question { to: to.context("it has every frontend")?, case, expected }, known.map(|known| known.reason)))
    };
    choose(SEED, can_be_asked).into_iter().map(question).collect()
}

/// The services that are asked, by their numbers.
fn services(questions: &[Question]) -> BTreeMap<u16, &Spec> {
    questions.iter().map(|question| (question.case.service, &question.case.spec)).collect()
}

/// Asks this proxy everything; and checks its own explanation of every question, if it has one.
fn tell(proxy: Proxy) -> Result<()> {
    let (questions, known): (Vec<_>, Vec<_>) = questions(proxy)?.into_iter().unzip();
    report_differences(proxy, &known)?;
    let services = services(&questions);
    let scene = proxy.start(&services.iter().map(|(number, spec)| spec.service(*number)).collect::<Vec<_>>())?;
    if scene.has_agent() {
        let asked = check_health(scene.lab(), services.into_iter())?;
        report(&format!("{proxy:?}: {asked} questions of load balancers about this node, all answered"));
        check_explained(&scene, &questions)?;
    }
    let outcomes = ask_all(&scene, &questions)?;
    let wrong = questions.iter().zip(&outcomes).filter(|(question, met)| !question.is_answered_by(met));
    let wrong = wrong.map(|(question, met)| {
        let Question { case, to, expected } = question;
        format!("{case:?}\n  at {to}: met {met:?}, and not {expected:?}")
    });
    let (wrong, of) = (wrong.collect::<Vec<_>>(), questions.len());
    ensure!(wrong.is_empty(), "{proxy:?}: {}\n{}", shown(&wrong, of), scene.log());
    if scene.has_agent() {
        check_explained_to_pinned(&scene, &questions, &outcomes)?;
    }
    report(&format!("{proxy:?}: {of} questions, all answered as kube-proxy would"));
    Ok(())
}

/// Each difference that is declared for a proxy must occur, according to the reasons known for its answers.
fn report_differences(proxy: Proxy, known: &[Option<&'static str>]) -> Result<()> {
    for difference in DIFFERENCES.iter().filter(|difference| difference.of.contains(&proxy)) {
        let met = known.iter().filter(|reason| **reason == Some(difference.reason)).count();
        ensure!(met > 0, "nothing is asked any more that differs because: {}", difference.reason);
        report(&format!("{proxy:?}: {met} of {} answers are to differ: {}", known.len(), difference.reason));
    }
    Ok(())
}

/// Checks the output of `affinity explain` before any client has asked.
fn check_explained(scene: &Scene, questions: &[Question]) -> Result<()> {
    let explained = explain_all(scene.lab(), &questions.iter().collect::<Vec<_>>())?;
    let wrong = questions.iter().zip(&explained).filter_map(|(question, said)| objection(question, said));
    let (wrong, of) = (wrong.collect::<Vec<_>>(), questions.len());
    ensure!(wrong.is_empty(), "explained: {}", shown(&wrong, of));
    report(&format!("{of} questions explained, all as they will be answered"));
    Ok(())
}

/// Checks its output for clients that ask again, and are pinned.
fn check_explained_to_pinned(scene: &Scene, questions: &[Question], outcomes: &[Outcome]) -> Result<()> {
    let is_pinned =
        |(question, met): &(&Question, &Outcome)| question.is_by_pinned_client() && met.iter().any(Result::is_ok);
    let (questions, outcomes): (Vec<_>, Vec<_>) = questions.iter().zip(outcomes).filter(is_pinned).unzip();
    let explained = explain_all(scene.lab(), &questions)?;
    let asked = questions.iter().zip(&outcomes).zip(&explained);
    let wrong = asked.filter_map(|((question, met), said)| objection_to_pinned(question, met, said));
    let (wrong, of) = (wrong.collect::<Vec<_>>(), questions.len());
    ensure!(wrong.is_empty(), "explained to pinned clients: {}", shown(&wrong, of));
    ensure!(of > 0, "nobody who asks is pinned any more");
    report(&format!("{of} questions of pinned clients explained, all as they were answered"));
    Ok(())
}

/// The number of wrong ones, and the first few.
fn shown(wrong: &[String], of: usize) -> String {
    let first = wrong.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("\n");
    format!("{} of {of} answers are wrong:\n{first}", wrong.len())
}

#[test]
fn kube_proxys_iptables_rules_do_what_the_function_says() -> Result<()> {
    tell(Proxy::Iptables)
}

#[test]
fn kube_proxys_nftables_rules_do_what_the_function_says() -> Result<()> {
    tell(Proxy::Nftables)
}

in_every_way!(affinity_does_what_the_function_says);

fn affinity_does_what_the_function_says(proxy: Proxy) -> Result<()> {
    tell(proxy)
}
