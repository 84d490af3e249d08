//! The demo's acts: each shows something and reports whether it held.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use affinity_tests::lab::{Family, Protocol, pod_name};
use affinity_tests::patience::patience;
use anyhow::{Context, Result};

use crate::{
    scene::{EMPTY, HTTP, HTTPS, POD_COUNT, Scene},
    stage::Stage,
};

/// An act.
pub(crate) struct Act {
    /// Its name in the last line.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) tell: fn(&mut Scene, &Stage) -> Result<Finding>,
}

/// What an act found.
pub(crate) struct Finding {
    pub(crate) holds: bool,
    pub(crate) evidence: String,
}

/// In the order in which they are shown: each leaves the scene as the next one needs it.
pub(crate) const ACTS: &[Act] = &[
    Act { name: "spread", title: "Without affinity, one client's requests spread over the pods", tell: spread },
    Act { name: "sticky", title: "With affinity, they stay on one", tell: sticky },
    Act { name: "two-ports", title: "The other port of the service leads to the same pod", tell: two_ports },
    Act { name: "pins", title: "Who is pinned where is no secret", tell: pins },
    Act { name: "explain", title: "Nor is what the next packet would meet", tell: explain },
    Act { name: "expiry", title: "A pin that is not used ends, and the next choice is free", tell: expiry },
    Act { name: "fail-over", title: "A pod dies: its clients go elsewhere at once", tell: fail_over },
    Act { name: "chart", title: "Three thousand clients: an even spread, and no client moves", tell: chart },
    Act { name: "restart", title: "The agent is killed, and nobody notices", tell: restart },
    Act { name: "refusal", title: "A service without endpoints says so at once", tell: refusal },
];

/// The line of the YAML that matters; the default timeout is three hours.
const AFFINITY: &str = "  sessionAffinity: ClientIP\n";
/// The client of most acts.
const CLIENT: u32 = 1;
/// Requests in a row.
const REQUESTS: usize = 10;
/// Clients that the listing of pins shows.
const FEW: u32 = 5;
/// Number of clients in the chart, and the number of the first one.
const MANY: u32 = 3_000;
const FIRST_OF_MANY: u32 = 10_000;
/// A share of the chart may differ from the mean by this part of it: more than seven standard deviations.
const UNEVEN: f64 = 0.2;
/// The short timeout, and a pause that is a little longer, because the programs' clock is coarse.
const TIMEOUT_S: u64 = 2;
const LONGER: Duration = Duration::from_millis(TIMEOUT_S * 1000 + 100);
/// With three pods, this many new choices all select the old one once in 60,000 times.
const TRIES: usize = 10;
/// What a person perceives as immediate.
const AT_ONCE: Duration = Duration::from_millis(500);

fn client() -> IpAddr {
    Family::V4.client(CLIENT)
}

fn url(to: ([u8; 4], u16)) -> String {
    SocketAddr::from(to).to_string()
}

fn distinct(pods: &[String]) -> usize {
    pods.iter().collect::<BTreeSet<_>>().len()
}

fn spread(scene: &mut Scene, stage: &Stage) -> Result<Finding> {
    let pods = scene.ask(client(), HTTP, REQUESTS)?;
    stage.answers(&client().to_string(), &url(HTTP), &pods);
    let reached = distinct(&pods);
    Ok(Finding { holds: reached > 1, evidence: format!("{REQUESTS} requests, {reached} pods") })
}

fn sticky(scene: &mut Scene, stage: &Stage) -> Result<Finding> {
    scene.edit(stage, "  sessionAffinity: None\n", AFFINITY, |scene| Ok(scene.service()?["affinity"] == "ClientIP"))?;
    let pods = scene.ask(client(), HTTP, REQUESTS)?;
    stage.answers(&client().to_string(), &url(HTTP), &pods);
    let reached = distinct(&pods);
    Ok(Finding { holds: reached == 1, evidence: format!("{REQUESTS} requests, {reached} pod") })
}

fn two_ports(scene: &mut Scene, stage: &Stage) -> Result<Finding> {
    let mut same = 0;
    for number in CLIENT..CLIENT + FEW {
        let from = Family::V4.client(number);
        let (http, https) = (scene.ask_once(from, HTTP)?, scene.ask_once(from, HTTPS)?);
        same += u32::from(http == https);
        stage.answers(&from.to_string(), &format!("{}, then :{}", url(HTTP), HTTPS.1), &[http, https]);
    }
    Ok(Finding { holds: same == FEW, evidence: format!("the same pod on both ports for {same} of {FEW} clients") })
}

fn pins(scene: &mut Scene, stage: &Stage) -> Result<Finding> {
    scene.show(stage, &["get", "sessions"])?;
    let sessions = scene.sessions(None)?;
    let mut right = 0;
    for number in CLIENT..CLIENT + FEW {
        let from = Family::V4.client(number);
        let shown = sessions.iter().find(|session| session.client == from.to_string());
        let answered = scene.ask_once(from, HTTP)?;
        right += u32::from(shown.is_some_and(|session| session.backend.name == answered));
    }
    let holds = right == FEW && sessions.len() == FEW as usize;
    Ok(Finding { holds, evidence: format!("{right} of {FEW} clients are answered by the pod that the list names") })
}

fn explain(scene: &mut Scene, stage: &Stage) -> Result<Finding> {
    let to = url(HTTPS);
    let (known, new) = (client(), Family::V4.client(99));
    for from in [known, new] {
        scene.show(stage, &["explain", "--from", &from.to_string(), "--to", &to])?;
    }
    let pinned = scene.explain(known, HTTPS)?.pinned.context("the client has a pin")?["backend"]["name"].clone();
    let pinned = pinned.as_str().unwrap_or("nobody");
    let answered = scene.ask_once(known, HTTPS)?;
    let newcomer = scene.explain(new, HTTPS)?;
    let untouched = scene.sessions(Some(new))?.is_empty();
    let holds = pinned == answered && newcomer.candidates.len() == POD_COUNT && untouched;
    let evidence =
        format!("foretold {pinned}, and {answered} answered; the client that only was asked about has no pin");
    Ok(Finding { holds, evidence })
}

fn expiry(scene: &mut Scene, stage: &Stage) -> Result<Finding> {
    let short = format!("{AFFINITY}  sessionAffinityConfig:\n    clientIP:\n      timeoutSeconds: {TIMEOUT_S}\n");
    scene.edit(stage, AFFINITY, &short, |scene| Ok(scene.service()?["timeoutSeconds"] == TIMEOUT_S))?;
    let mut pods = vec![scene.ask_once(client(), HTTP)?];
    while distinct(&pods) == 1 && pods.len() <= TRIES {
        scene.interrupt.pause(LONGER)?;
        pods.push(scene.ask_once(client(), HTTP)?);
    }
    stage.answers(&client().to_string(), &format!("{}, every {:.1} s", url(HTTP), LONGER.as_secs_f64()), &pods);
    let finding = Finding {
        holds: distinct(&pods) > 1,
        evidence: format!("another pod at expiry {} of at most {TRIES}", pods.len() - 1),
    };
    stage.say("And back to three hours; the pins that are there follow:");
    scene.edit(stage, &short, AFFINITY, |scene| Ok(scene.service()?["timeoutSeconds"] == 10_800))?;
    Ok(finding)
}

fn fail_over(scene: &mut Scene, stage: &Stage) -> Result<Finding> {
    let mut kept = scene.clients().connect(Protocol::Tcp, client(), SocketAddr::from(HTTP))?;
    let victim = kept.ask("/")?;
    let index = (0..POD_COUNT).find(|index| pod_name(*index) == victim).context("a pod of the lab")?;
    stage.say(&format!("{} has a connection open to {victim}. Now {victim} is terminating:", client()));
    let endpoint = format!(
        "  - addresses: [{}]\n    conditions: {{ready: true}}\n    nodeName: node-a\n    \
         targetRef: {{kind: Pod, namespace: default, name: {victim}}}\n",
        Family::V4.pod(index)
    );
    let ending = endpoint.replace("{ready: true}", "{ready: false, serving: true, terminating: true}");
    let before = scene.web().to_owned();
    scene.edit(stage, &endpoint, &ending, |scene| Ok(!scene.candidates()?.contains(&victim)))?;
    stage.say("It dies, and its endpoint goes:");
    scene.lab.kill_pod(index)?;
    scene.edit(stage, &ending, "", |scene| Ok(!scene.lab.affinity(&["get", "backends"])?.contains(&victim)))?;

    let (broken, told) = timed(|| kept.ask("/"));
    let error = broken.err().map_or_else(|| "answered".to_owned(), |error| error.kind().to_string());
    stage.say(&format!("the open connection: {error} after {}", shown(told)));
    let (answer, took) = timed(|| scene.ask_once(client(), HTTP));
    let answer = answer?;
    stage.say(&format!("the next request:    {answer} after {}", shown(took)));
    let about_client = ["events", "--client", &client().to_string()];
    scene.show(stage, &about_client)?;
    let recorded = scene.lab.affinity(&about_client)?.lines().any(|line| line.contains("moved"));

    scene.lab.return_pod(index)?;
    scene.publish(before, |scene| Ok(scene.candidates()?.contains(&victim)))?;
    let after = scene.ask_once(client(), HTTP)?;
    stage.say(&format!("{victim} comes back, and no client moves to it: {after}"));
    Ok(Finding {
        holds: answer != victim
            && error != "answered"
            && told.max(took) < patience(AT_ONCE)
            && recorded
            && after == answer,
        evidence: format!("{victim} -> {answer}, and the move is on record"),
    })
}

fn chart(scene: &mut Scene, stage: &Stage) -> Result<Finding> {
    let (first, second) = (ask_many(scene)?, ask_many(scene)?);
    let mut shares = BTreeMap::new();
    for pod in &first {
        *shares.entry(pod.clone()).or_insert(0) += 1;
    }
    stage.chart(&shares);
    scene.show(stage, &["get", "backends"])?;
    let moved = moved(&first, &second);
    let mean = f64::from(MANY) / POD_COUNT as f64;
    let widest = shares.values().map(|&share| (share as f64 - mean).abs() / mean).fold(0.0, f64::max);
    Ok(Finding {
        holds: shares.len() == POD_COUNT && widest < UNEVEN && moved == 0,
        evidence: format!(
            "shares differ from the mean by {:.1} % at most; asked again, {moved} of {MANY} moved",
            widest * 100.0
        ),
    })
}

fn restart(scene: &mut Scene, stage: &Stage) -> Result<Finding> {
    let before = ask_many(scene)?;
    stage.command("kill -9 %1");
    scene.agent.kill()?;
    let without = ask_many(scene)?;
    stage.say(&format!("without an agent: {} of {MANY} moved", moved(&before, &without)));
    scene.run_again(stage)?;
    let after = ask_many(scene)?;
    stage.say(&format!("with a new one:   {} of {MANY} moved", moved(&before, &after)));
    let holds = moved(&before, &without) + moved(&before, &after) == 0;
    Ok(Finding { holds, evidence: "programs and pins live in the kernel".to_owned() })
}

/// Which pod answers each of many clients, on new connections.
fn ask_many(scene: &Scene) -> Result<Vec<String>> {
    let clients = FIRST_OF_MANY..FIRST_OF_MANY + MANY;
    Ok(scene.clients().ask_all(Protocol::Tcp, clients, SocketAddr::from(HTTP))?)
}

fn moved(before: &[String], after: &[String]) -> usize {
    before.iter().zip(after).filter(|(before, after)| before != after).count()
}

fn refusal(scene: &mut Scene, stage: &Stage) -> Result<Finding> {
    let (answer, took) = timed(|| scene.ask_once(client(), EMPTY));
    let kind = answer.err().map(|error| error.kind());
    let said = kind.map_or_else(|| "answered".to_owned(), |kind| kind.to_string());
    stage.say(&format!("{} -> {}   {said} after {}", client(), url(EMPTY), shown(took)));
    let counters = scene.lab.affinity(&["get", "counters"])?;
    let counted = counters.lines().filter(|line| line.split_whitespace().nth(1) != Some("0"));
    stage.command("affinity get counters | awk '$2 != 0'");
    stage.output(&counted.collect::<Vec<_>>().join("\n"));
    Ok(Finding {
        holds: kind == Some(ErrorKind::ConnectionRefused) && took < patience(AT_ONCE),
        evidence: "refused, not left waiting".to_owned(),
    })
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    let result = work();
    (result, started.elapsed())
}

fn shown(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}
