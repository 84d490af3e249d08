//! Asking: every question in the lab, from all sources at the same time.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use affinity_tests::lab::{Cgroup, Family, Lab, Protocol, SocketProcess};
use anyhow::{Context, Result};

use crate::cases::{ASKING_PODS, ATTEMPTS, Case, Source};
use crate::oracle::{Answer, Outcome, Seen};

const PROCESS: &str = env!("CARGO_BIN_EXE_socket_process");
/// Processes on the node that share its questions.
const PROCESSES: usize = 6;
/// How often a question is asked at least, so that a pod shows that should not answer.
const ATTEMPTS_MIN: u32 = 16;
/// Answers that a pinned client need not keep to: another question of its may be its first at the same moment, and
/// kube-proxy then has two pods for it.
const SETTLING: u32 = 4;
/// How long a client waits where it is to be answered or refused.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a client waits where nobody is to answer.
const SHORT_PATIENCE: Duration = Duration::from_millis(400);
/// What pods see of node A that is none of its global addresses: what a socket gets that is connected to a pod itself.
const POD_ROUTERS: [&str; 2] = ["169.254.1.1", "fe80::1"];

/// A question, and what it should come to.
pub(crate) struct Question {
    pub(crate) case: Case,
    pub(crate) to: SocketAddr,
    pub(crate) expected: Outcome,
}

impl Question {
    /// Asks until all is met that can be met.
    fn ask(&self, mut once: impl FnMut(u32) -> Answer) -> Outcome {
        let is_pinned = self.is_by_pinned_client();
        let mut met = Outcome::new();
        let mut unanswered = 0;
        for attempt in 0..ATTEMPTS {
            let answer = once(attempt);
            unanswered += u32::from(!matches!(answer, Answer::Pod(..)));
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

    /// Whether that is what it should come to. A client that is pinned meets one pod of those that it might. A process on
    /// the node may be told by its own kernel of what others would not hear of.
    pub(crate) fn is_answered_by(&self, met: &Outcome) -> bool {
        if self.case.source == Source::Node && met.iter().eq([&Answer::KeptBack]) {
            let is_datagram = self.case.protocol == Protocol::Udp;
            return self.expected.iter().all(|answer| match answer {
                Answer::Silence => true,
                Answer::Refused => is_datagram,
                Answer::Pod(..) | Answer::KeptBack | Answer::Failed(_) => false,
            });
        }
        if self.is_by_pinned_client() { met.len() == 1 && met.is_subset(&self.expected) } else { *met == self.expected }
    }

    /// Whether one client asks, which stays where it came to.
    fn is_by_pinned_client(&self) -> bool {
        self.case.spec.has_affinity && !self.case.source.is_outside()
    }

    fn patience(&self) -> Duration {
        if self.expected.contains(&Answer::Silence) { SHORT_PATIENCE } else { PATIENCE }
    }

    /// What one answer says.
    fn read(&self, from: Option<IpAddr>, said: Result<String, String>) -> Answer {
        let body = match said {
            Ok(body) => body,
            Err(kind) if kind == "ConnectionRefused" => return Answer::Refused,
            Err(kind) if kind == "TimedOut" || kind == "WouldBlock" => return Answer::Silence,
            Err(kind) if kind == "PermissionDenied" => return Answer::KeptBack,
            Err(kind) => return Answer::Failed(kind),
        };
        let parsed = body.strip_prefix("pod-").and_then(|rest| rest.split_once(' '));
        let parsed = parsed.and_then(|(pod, seen)| Some((pod.parse().ok()?, seen.parse().ok()?)));
        match parsed {
            Some((pod, seen)) if Some(seen) == from => Answer::Pod(pod, Seen::Client),
            Some((pod, seen)) if is_of_node(self.case.family, seen) => Answer::Pod(pod, Seen::Node),
            Some((pod, _)) => Answer::Pod(pod, Seen::Stranger),
            None => Answer::Failed(body),
        }
    }
}

fn is_of_node(family: Family, address: IpAddr) -> bool {
    family.node_addresses().contains(&address) || POD_ROUTERS.iter().any(|router| router.parse() == Ok(address))
}

/// What is met at each of these questions, in their order.
///
/// # Errors
/// When somebody could not ask.
pub(crate) fn ask_all(lab: &Lab, cgroup: &Cgroup, questions: &[Question]) -> Result<Vec<Outcome>> {
    let processes = (0..PROCESSES).map(|_| cgroup.start(PROCESS, lab.node())).collect::<Result<Vec<_>>>()?;
    let outside = asked_by(questions, Source::is_outside);
    let pods = ASKING_PODS.map(|pod| (pod, asked_by(questions, |source| source == Source::Pod(pod))));
    let node = asked_by(questions, |source| source == Source::Node);
    let shares = node.chunks(node.len().div_ceil(PROCESSES).max(1));
    let outcomes: Result<Vec<_>> = std::thread::scope(|scope| {
        let mut asking = vec![scope.spawn(|| ask_from_outside(lab, &outside))];
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
        let outcome = question.ask(|attempt| {
            let from = question.case.family.client(question.case.first_client + attempt);
            question.read(Some(from), named(request(&client, question, from)))
        });
        Ok((*number, outcome))
    });
    outcomes.context("the clients outside")
}

fn ask_from_pod(lab: &Lab, pod: usize, questions: &[Numbered<'_>]) -> Result<Vec<(usize, Outcome)>> {
    let client = lab.pod_client(pod);
    let outcomes = client.in_parallel(questions, |(number, question)| {
        let client = client.clone().with_patience(question.patience());
        let from = question.case.family.pod(pod);
        let outcome = question.ask(|_| question.read(Some(from), named(request(&client, question, from))));
        Ok((*number, outcome))
    });
    outcomes.with_context(|| format!("pod {pod}"))
}

/// A process on the node: what it sees of itself is one of the node's addresses in any case.
fn ask_from_node(mut process: SocketProcess, questions: &[Numbered<'_>]) -> Result<Vec<(usize, Outcome)>> {
    let mut once = |protocol: Protocol, to| -> Result<Result<String, String>> {
        let (socket, peer) = process.connect(protocol, to)?;
        if let Err(error) = peer {
            return Ok(Err(error));
        }
        let answer = process.ask(socket, "/who")?;
        process.close(socket)?;
        Ok(answer)
    };
    let mut outcomes = Vec::new();
    for (number, question) in questions {
        let outcome = question.ask(|_| match once(question.case.protocol, question.to) {
            Ok(said) => question.read(None, said),
            Err(error) => Answer::Failed(format!("{error:#}")),
        });
        outcomes.push((*number, outcome));
    }
    Ok(outcomes)
}

fn request(client: &affinity_tests::lab::Client, question: &Question, from: IpAddr) -> io::Result<String> {
    client.open(question.case.protocol, from, question.to)?.ask_last("/who")
}

/// An error by its name, as a [`SocketProcess`] tells it.
fn named(said: io::Result<String>) -> Result<String, String> {
    said.map_err(|error| format!("{:?}", error.kind()))
}
