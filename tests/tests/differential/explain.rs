//! The output of `affinity explain` must match the outcome: which pods a client may reach, which address they see, whether it
//! is rejected or gets no answer, and why.

use std::collections::BTreeMap;

use affinity_tests::lab::{CLIENT_COUNT, Candidate, Explanation, Frontend, Lab, pod_index};
use affinity_tests::proxy::{Failure, Seen};
use anyhow::{Context, Result, bail, ensure};

use crate::ask::Question;
use crate::cases::{Case, FIRST_STRANGER, IpMode, Source};
use crate::oracle::{Outcome, usable};

/// The explanation of each of these questions, in their order; those of one client all at one moment.
///
/// # Errors
/// When a command fails.
pub(crate) fn explain_all(lab: &Lab, questions: &[&Question]) -> Result<Vec<Explanation>> {
    let mut by_client: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (number, question) in questions.iter().enumerate() {
        by_client.entry(client(&question.case)).or_default().push(number);
    }
    let mut explained = BTreeMap::new();
    for (client, numbers) in by_client {
        let asked = |number: &usize| (questions[*number].case.protocol, questions[*number].to);
        let to: Vec<_> = numbers.iter().map(asked).collect();
        let said = lab.explain_each(&client, &to).with_context(|| format!("explain --from {client}"))?;
        explained.extend(numbers.into_iter().zip(said));
    }
    Ok(explained.into_values().collect())
}

/// The client to explain for: of the external ones, one that never connects.
fn client(case: &Case) -> String {
    match case.source {
        Source::Outside => case.family.client(FIRST_STRANGER - 1).to_string(),
        Source::Stranger => case.family.client(CLIENT_COUNT - 1).to_string(),
        Source::Pod(pod) => case.family.pod(pod).to_string(),
        Source::Node => "node".to_owned(),
        Source::NodeB => case.family.node_b().to_string(),
    }
}

/// The error in the explanation of a question before any client has asked; None: there is none.
pub(crate) fn objection(question: &Question, said: &Explanation) -> Option<String> {
    let is_as_expected = implied(question.case.source, said).is_ok_and(|implied| implied == question.expected);
    let (verdict, reason) = cause(question);
    let is_so = is_as_expected && said.verdict == verdict && said.reason == reason;
    (!is_so).then(|| format!("expected {verdict} ({reason}), said {said:?}"))
}

/// The same for a pinned client, after it has asked, with this outcome.
pub(crate) fn objection_to_pinned(question: &Question, met: &Outcome, said: &Explanation) -> Option<String> {
    let is_as_met = implied(question.case.source, said).is_ok_and(|implied| implied == *met);
    let is_so = is_as_met && said.reason == "pinned" && said.pinned.is_some();
    (!is_so).then(|| format!("met {met:?}, said {said:?}"))
}

/// The outcome that the explanation implies.
fn implied(source: Source, said: &Explanation) -> Result<Outcome> {
    let met = |candidate: &Candidate| {
        let pod = pod_index(&candidate.name).with_context(|| format!("{} is no pod", candidate.name))?;
        // A process on the node is the node.
        let is_of_node = candidate.masquerade || source == Source::Node;
        Ok(Ok((pod, if is_of_node { Seen::Node } else { Seen::Client })))
    };
    let is_for_all = said.candidates.iter().all(|candidate| candidate.masquerade) && !said.candidates.is_empty();
    ensure!(said.masquerade == is_for_all, "masquerade contradicts the candidates");
    match (said.verdict.as_str(), said.candidates.as_slice()) {
        ("forward", candidates @ [_, ..]) => candidates.iter().map(met).collect(),
        ("reject", []) => Ok(Outcome::from([Err(Failure::Refused)])),
        // Only a service proxy handles these addresses.
        ("drop" | "pass", []) => Ok(Outcome::from([Err(Failure::Silence)])),
        (verdict, _) => bail!("{verdict}, and such candidates"),
    }
}

/// The verdict, and its reason, with which a client without a pin gets the expected outcome.
fn cause(Question { case, expected, .. }: &Question) -> (&'static str, &'static str) {
    let Case { spec, frontend, family, source, .. } = case;
    let has_ranges = spec.ranges.all_of(*family).next().is_some();
    match (frontend, source) {
        (Frontend::Unclaimed, _) => ("pass", "not-frontend"),
        (Frontend::LoadBalancer, _) if spec.ip_mode == IpMode::Proxy => ("pass", "not-frontend"),
        // Source ranges are left to the load balancer.
        (Frontend::LoadBalancer, Source::Node) if has_ranges => ("pass", "not-in-ranges"),
        (Frontend::LoadBalancer, _) if !spec.ranges.let_in(*source, *family) => ("drop", "not-in-ranges"),
        _ if expected.iter().any(Result::is_ok) => ("forward", if spec.has_affinity { "created" } else { "selected" }),
        // A process on the node does not have to wait.
        (_, Source::Node) => ("reject", "no-endpoints"),
        _ if usable(spec, |_| true).is_empty() => ("reject", "no-endpoints"),
        _ => ("drop", "no-local-endpoints"),
    }
}
