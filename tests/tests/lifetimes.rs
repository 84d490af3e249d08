//! A connection lives as long as its pod may live, independent of the service; a pin survives a gap.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Write};
use std::net::IpAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use affinity_tests::lab::{
    Agent, Connection, EndpointState, Family, Lab, Options, Protocol, Service, eventually, pod_name,
};
use affinity_tests::on_every_hook;
use affinity_tests::patience::patience;
use affinity_tests::story::{Hook, tell_in, web};
use anyhow::{Context, Result, bail, ensure};

/// How long a change of the YAML may take until new connections meet it.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);
/// "At once", for what must not wait for a time-out.
const AT_ONCE: Duration = Duration::from_millis(900);
/// For scenarios that check the state after the gap.
const SHORT_GAP: Duration = Duration::from_secs(2);
/// The longest time until a pod that does not answer is noticed, also by its clients.
const SILENCE_PATIENCE: Duration = Duration::from_secs(20);
/// Clients of each family.
const CLIENTS: u32 = 8;

on_every_hook! {
    connections_outlive_a_switch_of_the_selector,
    a_returned_endpoint_keeps_its_connections_and_pins,
    a_recreated_service_keeps_its_connections_and_pins,
    connections_of_a_deleted_service_end_by_themselves,
    connections_to_a_removed_terminating_pod_are_reset_at_once,
    connections_to_a_silent_pod_are_reset_within_seconds,
    an_agent_that_starts_again_keeps_connections_that_linger,
}

/// With a gap that a scenario can wait for.
fn tell_with_short_gap(
    hook: Hook,
    first: &Service,
    story: impl FnOnce(&mut Lab, &mut Agent) -> Result<()>,
) -> Result<()> {
    let gap = format!("{}s", SHORT_GAP.as_secs());
    tell_in(&Options::default(), &[hook.args().as_slice(), &["--gap", &gap]].concat(), &[first], story)
}

fn tell(hook: Hook, first: &Service, story: impl FnOnce(&mut Lab, &mut Agent) -> Result<()>) -> Result<()> {
    tell_in(&Options::default(), &hook.args(), &[first], story)
}

/// An open TCP connection of a client, and the pod at its other end.
struct Line {
    from: IpAddr,
    connection: Connection,
    pod: String,
}

/// One for each client of each family.
fn open_lines(lab: &Lab, service: &Service) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for family in Family::BOTH {
        for number in 0..CLIENTS {
            let from = family.client(number);
            let mut connection = lab.client().connect(Protocol::Tcp, from, service.frontend(family, "http"))?;
            let pod = connection.ask("/")?;
            lines.push(Line { from, connection, pod });
        }
    }
    Ok(lines)
}

fn all_go_on(lines: &mut [Line], when: &str) -> Result<()> {
    for Line { from, connection, pod } in lines {
        let answer = connection.ask("/").with_context(|| format!("the connection of {from} to {pod}, {when}"))?;
        ensure!(answer == *pod, "the connection of {from} to {pod} is at {answer}, {when}");
    }
    Ok(())
}

/// The pod that a new connection of a line's client reaches.
fn dial(lab: &Lab, service: &Service, from: IpAddr) -> Result<String> {
    let family = if from.is_ipv4() { Family::V4 } else { Family::V6 };
    lab.client().http_get(from, service.frontend(family, "http"), "/").with_context(|| format!("{from} dials"))
}

/// The lingering backends: the names of their pods, and the total number of open connections to them.
fn lingering(lab: &Lab) -> Result<(BTreeSet<String>, u64)> {
    let backends = lab.affinity_json(&["get", "backends"])?;
    let backends = backends.as_array().context("a list")?.iter().filter(|backend| backend["state"] == "lingering");
    let mut found = (BTreeSet::new(), 0);
    for backend in backends {
        found.0.insert(backend["name"].as_str().context("a name")?.to_owned());
        found.1 += backend["open"].as_u64().context("a number of open connections")?;
    }
    Ok(found)
}

fn connections_outlive_a_switch_of_the_selector(hook: Hook) -> Result<()> {
    let (blue, green) = (web().client_ip().on([0, 1]), web().client_ip().on([2]));
    tell_with_short_gap(hook, &blue, |lab, _| {
        let mut lines = open_lines(lab, &blue)?;
        lab.publish_and_settle(&green)?;
        all_go_on(&mut lines, "right after the switch")?;
        for line in &lines {
            ensure!(dial(lab, &green, line.from)? == pod_name(2), "a new connection goes where new ones go");
        }
        let pods: BTreeSet<String> = lines.iter().map(|line| line.pod.clone()).collect();
        // The gap must end.
        sleep(2 * SHORT_GAP);
        all_go_on(&mut lines, "after the gap")?;
        eventually("what lingers is shown, with its connections", SYNC_PATIENCE, || {
            Ok(lingering(lab)? == (pods.clone(), lines.len() as u64))
        })?;
        let dump = lab.affinity(&["dump", "backends"])?;
        ensure!(dump.lines().any(|line| line.contains("pod-0") && line.ends_with(" lingering")), "{dump}");
        // They are new clients of the green pod now, and stay there.
        lab.publish_and_settle(&web().client_ip())?;
        all_go_on(&mut lines, "when the pods are back")?;
        for line in &lines {
            ensure!(dial(lab, &green, line.from)? == pod_name(2), "{} has moved", line.from);
        }
        Ok(())
    })
}

fn a_returned_endpoint_keeps_its_connections_and_pins(hook: Hook) -> Result<()> {
    let web = web().client_ip();
    tell(hook, &web, |lab, _| {
        let mut lines = open_lines(lab, &web)?;
        let index = (0..3).find(|index| lines.iter().filter(|line| line.pod == pod_name(*index)).count() > 1);
        let index = index.context("two clients share a pod")?;
        lab.publish_and_settle(&web.clone().without(index))?;
        all_go_on(&mut lines, "in the gap")?;
        // One of its clients opens a connection in the gap.
        let mover = lines.iter().find(|line| line.pod == pod_name(index)).context("a client")?.from;
        let moved_to = dial(lab, &web, mover)?;
        ensure!(moved_to != pod_name(index), "it is not there");
        lab.publish_and_settle(&web)?;
        all_go_on(&mut lines, "after the gap")?;
        for line in &lines {
            let expected = if line.from == mover { &moved_to } else { &line.pod };
            let reached = dial(lab, &web, line.from)?;
            ensure!(reached == *expected, "{} was pinned to {expected}, and reached {reached}", line.from);
        }
        ensure!(lingering(lab)?.0.is_empty(), "who is back lingers no longer");
        Ok(())
    })
}

/// Whether the node handles packets to the service.
fn is_served(lab: &Lab, service: &Service) -> Result<bool> {
    let said = lab.explain(Protocol::Tcp, Family::V4.client(CLIENTS), service.frontend(Family::V4, "http"))?;
    Ok(said.verdict != "pass")
}

fn a_recreated_service_keeps_its_connections_and_pins(hook: Hook) -> Result<()> {
    let web = web().client_ip().annotated("group", "pets");
    tell(hook, &web, |lab, _| {
        let mut lines = open_lines(lab, &web)?;
        let sessions = |lab: &Lab| lab.affinity(&["dump", "sessions_v4"]);
        let before = sessions(lab)?;
        lab.withdraw(&web)?;
        eventually("it is deleted", SYNC_PATIENCE, || Ok(!is_served(lab, &web)?))?;
        all_go_on(&mut lines, "while the service is deleted")?;
        // Time for the sweep, which must leave the pins of a deleted service.
        sleep(Duration::from_secs(3));
        lab.publish_and_settle(&web)?;
        all_go_on(&mut lines, "when it is there again")?;
        ensure!(sessions(lab)? == before, "pins are those that were there");
        for line in &lines {
            ensure!(dial(lab, &web, line.from)? == line.pod, "{} finds its pin", line.from);
        }
        Ok(())
    })
}

fn connections_of_a_deleted_service_end_by_themselves(hook: Hook) -> Result<()> {
    let web = web().client_ip();
    tell_with_short_gap(hook, &web, |lab, _| {
        let mut lines = open_lines(lab, &web)?;
        lab.withdraw(&web)?;
        eventually("it is deleted", SYNC_PATIENCE, || Ok(!is_served(lab, &web)?))?;
        // Longer than the gap, and than the sweep takes to remove unused records.
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(10) {
            all_go_on(&mut lines, &format!("{:?} after the end of the service", began.elapsed()))?;
            sleep(Duration::from_millis(500));
        }
        for Line { connection, pod, .. } in &mut lines {
            ensure!(connection.ask_last("/")? == *pod, "the last answer");
            ensure!(connection.has_ended(), "the server ends the connection");
        }
        Ok(())
    })
}

fn connections_to_a_removed_terminating_pod_are_reset_at_once(hook: Hook) -> Result<()> {
    let web = web().client_ip();
    tell(hook, &web, |lab, _| {
        let mut lines = open_lines(lab, &web)?;
        let pod = lines[0].pod.clone();
        let index = (0..3).find(|index| pod_name(*index) == pod).context("a pod of the lab")?;
        lab.publish_and_settle(&web.clone().endpoint(index, EndpointState::Terminating))?;
        all_go_on(&mut lines, "while it terminates")?;
        lab.kill_pod(index)?;
        lab.publish(&web.clone().without(index))?;
        eventually("it is gone", SYNC_PATIENCE, || Ok(!lab.affinity(&["get", "backends"])?.contains(&pod)))?;
        for line in lines.iter_mut().filter(|line| line.pod == pod) {
            let began = Instant::now();
            let error = line.connection.ask("/").expect_err("its pod is dead");
            ensure!(error.kind() == ErrorKind::ConnectionReset, "{error}");
            ensure!(began.elapsed() < patience(AT_ONCE), "after {:?}", began.elapsed());
        }
        lines.retain(|line| line.pod != pod);
        all_go_on(&mut lines, "to other pods")
    })
}

fn connections_to_a_silent_pod_are_reset_within_seconds(hook: Hook) -> Result<()> {
    let web = web().client_ip();
    tell(hook, &web, |lab, _| {
        let mut lines = open_lines(lab, &web)?;
        let pod = lines[0].pod.clone();
        let index = (0..3).find(|index| pod_name(*index) == pod).context("a pod of the lab")?;
        lab.publish_and_settle(&web.clone().without(index))?;
        all_go_on(&mut lines, "when it has left")?;
        lab.pod(index).namespace().context("it lives")?.ip("link set eth0 down")?;
        let began = Instant::now();
        let line = lines.iter_mut().find(|line| line.pod == pod).context("a client of it")?;
        let Connection::Http { stream, .. } = &mut line.connection else { bail!("TCP") };
        let error = loop {
            // A process that continues to send requests.
            if let Err(error) = stream.get_mut().write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n") {
                break error;
            }
            ensure!(began.elapsed() < patience(SILENCE_PATIENCE), "nobody has told the client");
            sleep(Duration::from_millis(500));
        };
        ensure!(error.kind() == ErrorKind::ConnectionReset, "{error}");
        ensure!(began.elapsed() > Duration::from_secs(4), "a pod may be slow: {:?}", began.elapsed());
        lines.retain(|line| line.pod != pod);
        all_go_on(&mut lines, "to other pods")
    })
}

fn an_agent_that_starts_again_keeps_connections_that_linger(hook: Hook) -> Result<()> {
    let (blue, green) = (web().client_ip().on([0, 1]), web().client_ip().on([2]));
    tell_with_short_gap(hook, &blue, |lab, agent| {
        let mut lines = open_lines(lab, &blue)?;
        lab.publish_and_settle(&green)?;
        agent.kill()?;
        all_go_on(&mut lines, "without an agent")?;
        agent.restart()?;
        let began = Instant::now();
        while began.elapsed() < 3 * SHORT_GAP {
            all_go_on(&mut lines, "with another agent")?;
            sleep(Duration::from_millis(500));
        }
        eventually("they linger", SYNC_PATIENCE, || Ok(lingering(lab)?.1 == lines.len() as u64))?;
        // Unused backends end.
        let unused = [0, 1].map(pod_name).into_iter().filter(|pod| lines.iter().all(|line| line.pod != *pod));
        let shown = lingering(lab)?.0;
        ensure!(unused.into_iter().all(|pod| !shown.contains(&pod)), "{shown:?}");
        Ok(())
    })
}
