//! The output of commands about pins, and their effect on pins, with traffic.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use affinity_tests::lab::{Family, Lab, Protocol, Service, eventually};
use affinity_tests::patience::patience;
use affinity_tests::story::{Hook, Route, tell, web};
use anyhow::{Context, Result, ensure};

/// How long the sweep may take for a few passes.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn sessions_name_client_service_pod_and_time_left() -> Result<()> {
    let web = web().client_ip_for(600);
    tell(Hook::XdpNative, &[&web], |lab, _| {
        for route in Route::all_to(&web) {
            let from = route.client(7);
            let pod = route.dial(lab, 7, 1)?.remove(0);
            let sessions = lab.sessions(&web, Some(from))?;
            let [session] = sessions.as_slice() else { panic!("one session of {from}, not {sessions:?}") };
            assert_eq!(session.service, web.full_name());
            assert_eq!(session.client, from.to_string());
            assert_eq!(session.backend.name, pod);
            let index = lab.pods().iter().position(|candidate| candidate.name() == pod).context("a pod of ours")?;
            assert_eq!(session.backend.address, route.family.pod(index));
            let left = session.expires_in_seconds.context("it expires")?;
            assert!((590.0..=600.0).contains(&left), "{left} s left");
            assert!(session.created <= session.last_used && session.created.ends_with('Z'), "{session:?}");
            assert!(!session.reason.is_empty());
        }
        let table = lab.affinity(&["get", "sessions", "--service", &web.full_name()])?;
        for route in Route::all_to(&web) {
            assert!(table.contains(&route.client(7).to_string()), "{table}");
        }
        Ok(())
    })
}

#[test]
fn explain_tells_the_next_packet_and_changes_nothing() -> Result<()> {
    let (web, empty) = (web().client_ip(), affinity_tests::lab::Service::new("empty", 11).tcp("http", 80, 8080));
    tell(Hook::XdpNative, &[&web, &empty], |lab, _| {
        for route in Route::all_to(&web) {
            let said = lab.explain(route.protocol, route.client(1), route.to)?;
            assert_eq!((said.verdict.as_str(), said.pinned.is_none()), ("forward", true), "{said:?}");
            assert_eq!(said.candidates.len(), 3, "{said:?}");
            assert!(lab.sessions(&web, Some(route.client(1)))?.is_empty(), "explain has pinned the client");

            let pod = route.dial(lab, 1, 1)?.remove(0);
            let said = lab.explain(route.protocol, route.client(1), route.to)?;
            let pinned = said.pinned.context("a pinned client")?.to_string();
            assert!(pinned.contains(&format!("\"{pod}\"")), "{pinned} names {pod}");
        }
        let said = lab.explain(Protocol::Tcp, Family::V4.client(1), empty.frontend(Family::V4, "http"))?;
        assert_eq!(said.verdict, "reject", "{said:?}");
        Ok(())
    })
}

#[test]
fn explain_needs_no_kernel_where_it_is_given_yaml() -> Result<()> {
    let (lab, web) = (Lab::with_pods(0)?, web().client_ip());
    lab.publish(&web)?;
    let (source, to) = (lab.source().display().to_string(), web.frontend(Family::V6, "dns"));
    let from = Family::V6.client(1).to_string();
    let said = lab.affinity_json(&["explain", "--source", &source, "--from", &from, "--to", &format!("{to}/udp")])?;
    assert_eq!(said["verdict"], "forward", "{said}");
    let candidates = said["candidates"].as_array().context("candidates")?;
    let ports: BTreeSet<_> = candidates.iter().filter_map(|candidate| candidate["port"].as_u64()).collect();
    assert_eq!((candidates.len(), ports), (3, BTreeSet::from([5353])), "{said}");
    ensure!(!lab.pin_dir().exists(), "nothing was loaded");
    Ok(())
}

#[test]
fn pin_and_unpin_say_where_the_next_connection_goes() -> Result<()> {
    let web = web().client_ip();
    tell(Hook::Tc, &[&web], |lab, _| {
        let service = web.full_name();
        for route in Route::all_to(&web) {
            // Datagrams from a port that is used again belong to the earlier exchange, independent of the current pin.
            let number = |turn: u32| if route.protocol == Protocol::Udp { turn } else { 1 };
            for (turn, pod) in (1..).zip(["pod-2", "pod-0", "pod-1"]) {
                let client = route.client(number(turn)).to_string();
                lab.affinity(&["pin", "--service", &service, "--client", &client, "--backend", pod])?;
                assert_eq!(route.dial(lab, number(turn), 5)?, [pod; 5], "by {route:?}");
            }
            let last = route.client(number(3));
            lab.affinity(&["unpin", "--service", &service, "--client", &last.to_string()])?;
            assert!(lab.sessions(&web, Some(last))?.is_empty());
        }
        let route = Route::all_to(&web)[0];
        route.dial_all(lab, 0..60)?;
        lab.affinity(&["unpin", "--service", &service, "--backend", "pod-0"])?;
        let left = lab.sessions(&web, None)?;
        assert!(!left.is_empty() && left.iter().all(|session| session.backend.name != "pod-0"), "{left:?}");
        lab.affinity(&["unpin", "--service", &service, "--all"])?;
        assert!(lab.sessions(&web, None)?.is_empty());
        Ok(())
    })
}

#[test]
fn a_service_that_has_gone_keeps_its_name_while_it_has_pins() -> Result<()> {
    let (web, idle) = (web().client_ip(), Service::new("idle", 11).tcp("http", 80, 8080).client_ip());
    tell(Hook::Tc, &[&web, &idle], |lab, _| {
        let route = Route::all_to(&web)[0];
        route.dial(lab, 1, 1)?;
        lab.withdraw(&web)?;
        lab.withdraw(&idle)?;
        let names = || lab.affinity(&["dump", "names"]);
        eventually("the name of a service that nobody refers to is gone", PATIENCE, || {
            Ok(!names()?.contains(&idle.full_name()))
        })?;
        assert!(!lab.affinity(&["get", "services"])?.contains(&web.full_name()));
        assert!(names()?.contains(&format!("-> {}", web.full_name())));
        let [session] = &lab.sessions(&web, None)?[..] else { panic!("the one client of a service that has gone") };
        assert_eq!((&session.service, &session.client), (&web.full_name(), &route.client(1).to_string()));
        lab.affinity(&["unpin", "--service", &web.full_name(), "--all"])?;
        assert!(lab.sessions(&web, None)?.is_empty());
        Ok(())
    })
}

/// A Node object with an address.
fn node(address: IpAddr) -> String {
    let name = address.to_string().replace([':', '.'], "-");
    format!(
        "---\napiVersion: v1\nkind: Node\nmetadata: {{name: node-{name}}}\n\
         status: {{addresses: [{{type: InternalIP, address: '{address}'}}, {{type: Hostname, address: node}}]}}\n"
    )
}

#[test]
fn warns_when_all_clients_have_node_addresses() -> Result<()> {
    let web = web().client_ip();
    tell(Hook::Tc, &[&web], |lab, _| {
        let routes = Route::all_to(&web);
        let nodes = [routes[0].client(1), routes[0].client(2), routes[2].client(1)].map(node);
        lab.publish_text("nodes.yaml", &nodes.concat())?;
        for (route, client) in [(routes[0], 1), (routes[0], 2), (routes[2], 1)] {
            route.dial(lab, client, 1)?;
        }
        let told = || Ok::<_, anyhow::Error>(lab.affinity_json(&["get", "services"])?[0]["clientsAreNodes"] == true);
        eventually("all clients look like nodes", PATIENCE, told)?;
        let table = lab.affinity(&["get", "services"])?;
        assert!(
            table.contains(&format!("{}: all clients have addresses of cluster nodes", web.full_name())),
            "{table}"
        );
        assert!(lab.affinity(&["dump", "service_conditions"])?.contains(&web.full_name()));
        routes[0].dial(lab, 3, 1)?;
        eventually("one client is none", PATIENCE, || Ok(!told()?))?;
        assert!(!lab.affinity(&["get", "services"])?.contains("have addresses of cluster nodes"));
        Ok(())
    })
}

#[test]
fn events_tell_of_new_and_of_moved_pins() -> Result<()> {
    let web = web().client_ip();
    tell(Hook::XdpNative, &[&web], |lab, _| {
        let mut follow = lab.affinity_command()?;
        follow.args(["events", "--follow", "-o", "json"]).stdout(Stdio::piped());
        let mut follow = follow.spawn()?;
        let stream = BufReader::new(follow.stdout.take().context("its standard output")?);
        let (lines_out, lines) = mpsc::channel();
        let reader =
            thread::spawn(move || stream.lines().map_while(Result::ok).try_for_each(|line| lines_out.send(line)));
        let told = expect_events(lab, &lines);
        follow.kill()?;
        follow.wait()?;
        drop(lines);
        let _ = reader.join();
        told
    })
}

/// Creates pins, moves one, and looks for a line about each.
fn expect_events(lab: &Lab, lines: &mpsc::Receiver<String>) -> Result<()> {
    let web = web().client_ip();
    let route = Route::all_to(&web)[0];
    let line_about = |kind: &str, client: u32| -> Result<()> {
        let client = format!("\"{}\"", route.client(client));
        let mut seen = Vec::new();
        loop {
            let line = lines.recv_timeout(patience(Duration::from_secs(5)));
            let line = line.with_context(|| format!("no event {kind} of {client} among {seen:#?}"))?;
            if line.contains(kind) && line.contains(&client) {
                return Ok(());
            }
            seen.push(line);
        }
    };
    // It takes a moment until the command follows events: clients connect until one is seen.
    let mut client = 100;
    eventually("events are followed", Duration::from_secs(5), || {
        client += 1;
        route.dial(lab, client, 1)?;
        Ok(lines.recv_timeout(Duration::from_millis(100)).is_ok())
    })?;
    let pod = route.dial(lab, 1, 1)?.remove(0);
    line_about("created", 1)?;
    let others: Vec<usize> = (0..3).filter(|index| lab.pods()[*index].name() != pod).collect();
    lab.publish_and_settle(&web.clone().on(others))?;
    route.dial(lab, 1, 1)?;
    line_about("moved", 1)
}

/// As `kubectl exec` without a terminal starts a command: in the container's environment, which is nearly empty.
#[test]
fn commands_need_neither_terminal_nor_environment() -> Result<()> {
    let web = web().client_ip();
    tell(Hook::XdpNative, &[&web], |lab, _| {
        Route::all_to(&web)[0].dial(lab, 1, 1)?;
        let command = lab.affinity_command()?;
        let args: Vec<_> = command.get_args().collect();
        let program = args.iter().position(|arg| *arg == "--").context("nsenter ... -- affinity ...")? + 1;
        for (ask, wanted) in
            [("get sessions", "198.18.0.1"), ("get services", "default/web"), ("top --once", "1 service")]
        {
            let mut bare = Command::new(command.get_program());
            bare.args(&args[..program]).args(["env", "-i"]).args(&args[program..]).args(ask.split(' '));
            let done = bare.stdin(Stdio::null()).output()?;
            let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
            ensure!(done.status.success() && out.contains(wanted) && err.is_empty(), "{ask}: {out}{err}");
        }
        Ok(())
    })
}
