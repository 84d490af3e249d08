//! Every question in the lab, asked from all sources at the same time.

use std::net::SocketAddr;
use std::time::Duration;

use affinity_tests::lab::{Lab, Protocol, SocketProcess};
use affinity_tests::proxy::{Failure, Met, Scene, meet, meet_from_node};
use anyhow::{Context, Result};

use crate::cases::{ASKING_PODS, ATTEMPTS, Case, Source};
use crate::oracle::Outcome;

const PROCESS: &str = env!("CARGO_BIN_EXE_socket_process");
/// Processes on the node that share its questions.
const PROCESSES: usize = 6;
/// How often a question is asked at least, so that a pod that should not answer shows up.
const ATTEMPTS_MIN: u32 = 16;
/// Answers in which a pinned client may still change: another question of it may be its first at the same moment, and
/// kube-proxy then has two pods for it.
const SETTLING: u32 = 4;
/// How long a client waits if it should be answered or rejected.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a client waits if there should be no answer.
const SHORT_PATIENCE: Duration = Duration::from_millis(400);

/// A question, and its expected outcome.
pub(crate) struct Question {
    pub(crate) case: Case,
    pub(crate) to: SocketAddr,
    pub(crate) expected: Outcome,
}

impl Question {
    /// Asks until everything has been met that can be met.
    fn ask(&self, mut once: impl FnMut(u32) -> Met) -> Outcome {
        let is_pinned = self.is_by_pinned_client();
        let mut met = Outcome::new();
        let mut unanswered = 0;
        for attempt in 0..ATTEMPTS {
            let answer = once(attempt);
            unanswered += u32::from(answer.is_err());
            if is_pinned && attempt == SETTLING {
                met.clear();
            }
            met.insert(answer);
            let is_complete = is_pinned || self.expected.is_subset(&met);
            if unanswered == 2 || (attempt + 1 >= ATTEMPTS_MIN && is_complete) {
                break;
            }
        }
        met
    }

    /// Whether the outcome is the expected one. A pinned client meets one of its possible pods. A process on the node may get
    /// an error from its own kernel where other clients would get silence.
    pub(crate) fn is_answered_by(&self, met: &Outcome) -> bool {
        if self.case.source == Source::Node && met.iter().eq([&Err(Failure::KeptBack)]) {
            let is_datagram = self.case.protocol == Protocol::Udp;
            return self.expected.iter().all(|answer| match answer {
                Err(Failure::Silence) => true,
                Err(Failure::Refused) => is_datagram,
                Ok(_) | Err(Failure::KeptBack | Failure::Other(_)) => false,
            });
        }
        if self.is_by_pinned_client() { met.len() == 1 && met.is_subset(&self.expected) } else { *met == self.expected }
    }

    /// Whether a single client asks, which stays with its pod.
    pub(crate) fn is_by_pinned_client(&self) -> bool {
        self.case.spec.has_affinity && !self.case.source.is_outside()
    }

    fn patience(&self) -> Duration {
        if self.expected.contains(&Err(Failure::Silence)) { SHORT_PATIENCE } else { PATIENCE }
    }
}

/// The outcomes of these questions, in their order.
///
/// # Errors
/// When a client could not ask.
pub(crate) fn ask_all(scene: &Scene, questions: &[Question]) -> Result<Vec<Outcome>> {
    let processes = (0..PROCESSES).map(|_| scene.process_on_node(PROCESS)).collect::<Result<Vec<_>>>()?;
    let lab = scene.lab();
    let outside = asked_by(questions, Source::is_outside);
    let pods = ASKING_PODS.map(|pod| (pod, asked_by(questions, |source| source == Source::Pod(pod))));
    let node_b = asked_by(questions, |source| source == Source::NodeB);
    let node = asked_by(questions, |source| source == Source::Node);
    let shares = node.chunks(node.len().div_ceil(PROCESSES).max(1));
    let outcomes: Result<Vec<_>> = std::thread::scope(|scope| {
        let mut asking = vec![scope.spawn(|| ask_from_outside(lab, &outside))];
        asking.push(scope.spawn(|| ask_from_node_b(lab, &node_b)));
        asking.extend(pods.iter().map(|(pod, asked)| scope.spawn(|| ask_from_pod(lab, *pod, asked))));
        asking.extend(shares.zip(processes).map(|(share, process)| scope.spawn(|| ask_from_node(process, share))));
        asking.into_iter().map(|asked| asked.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut outcomes = outcomes?.concat();
    outcomes.sort_by_key(|(number, _)| *number);
    Ok(outcomes.into_iter().map(|(_, outcome)| outcome).collect())
}

/// A question with its number.
type Numbered<'a> = (usize, &'a Question);

fn asked_by(questions: &[Question], is_meant: impl Fn(Source) -> bool) -> Vec<Numbered<'_>> {
    questions.iter().enumerate().filter(|(_, question)| is_meant(question.case.source)).collect()
}

fn ask_from_outside(lab: &Lab, questions: &[Numbered<'_>]) -> Result<Vec<(usize, Outcome)>> {
    let client = lab.client();
    let outcomes = client.in_parallel(questions, |(number, question)| {
        let client = client.clone().with_patience(question.patience());
        let Case { family, protocol, first_client, .. } = question.case;
        let from = |attempt| family.client(first_client + attempt);
        Ok((*number, question.ask(|attempt| meet(&client, from(attempt), protocol, question.to))))
    });
    outcomes.context("the clients outside")
}

fn ask_from_node_b(lab: &Lab, questions: &[Numbered<'_>]) -> Result<Vec<(usize, Outcome)>> {
    let client = lab.node_b_client();
    let outcomes = client.in_parallel(questions, |(number, question)| {
        let client = client.clone().with_patience(question.patience());
        let Case { family, protocol, .. } = question.case;
        Ok((*number, question.ask(|_| meet(&client, family.node_b(), protocol, question.to))))
    });
    outcomes.context("node B")
}

fn ask_from_pod(lab: &Lab, pod: usize, questions: &[Numbered<'_>]) -> Result<Vec<(usize, Outcome)>> {
    let client = lab.pod_client(pod);
    let outcomes = client.in_parallel(questions, |(number, question)| {
        let client = client.clone().with_patience(question.patience());
        let Case { family, protocol, .. } = question.case;
        Ok((*number, question.ask(|_| meet(&client, family.pod(pod), protocol, question.to))))
    });
    outcomes.with_context(|| format!("pod {pod}"))
}

fn ask_from_node(mut process: SocketProcess, questions: &[Numbered<'_>]) -> Result<Vec<(usize, Outcome)>> {
    let mut outcomes = Vec::new();
    for (number, question) in questions {
        let mut once = || meet_from_node(&mut process, question.case.protocol, question.to);
        let outcome = question.ask(|_| once().unwrap_or_else(|error| Err(Failure::Other(format!("{error:#}")))));
        outcomes.push((*number, outcome));
    }
    Ok(outcomes)
}
