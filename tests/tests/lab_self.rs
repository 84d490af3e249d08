//! The lab itself, without a dataplane: the assumptions of the other tests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use affinity_tests::kubeproxy::Mode;
use affinity_tests::lab::{
    Capture, Direction, FIRST_OF_B, Family, HTTP_PORTS, Lab, Load, Options, Protocol, Service, UDP_PORTS, WIRE,
    eventually, pod_name,
};
use affinity_tests::packet::{Verified, verify_checksums};
use affinity_tests::story::report;
use anyhow::{Context, Result, ensure};

#[test]
fn every_pod_answers_over_both_families_and_protocols_and_on_every_port() -> Result<()> {
    let lab = Lab::with_pods(2)?;
    let client = lab.client();
    for family in Family::BOTH {
        let from = family.client(70_000);
        for (index, pod) in lab.pods().iter().enumerate() {
            for port in HTTP_PORTS {
                let to = SocketAddr::new(family.pod(index), port);
                assert_eq!(client.http_get(from, to, "/")?, pod.name());
                assert_eq!(client.http_get(from, to, "/port")?, port.to_string());
                assert_eq!(client.http_get(from, to, "/client")?, from.to_string());
                assert!(client.http_get(from, to, "/other").is_err());
            }
            for port in UDP_PORTS {
                let to = SocketAddr::new(family.pod(index), port);
                assert_eq!(client.udp_ask(from, to, "/")?, pod.name());
                assert_eq!(client.udp_ask(from, to, "/port")?, port.to_string());
                assert_eq!(client.udp_ask(from, to, "/client")?, from.to_string());
            }
        }
        let pod_to_pod = SocketAddr::new(family.pod(1), HTTP_PORTS[0]);
        assert_eq!(lab.pod_client(0).http_get(family.pod(0), pod_to_pod, "/")?, lab.pods()[1].name());
    }
    Ok(())
}

#[test]
fn a_connection_serves_many_requests_and_large_answers() -> Result<()> {
    let lab = Lab::with_pods(1)?;
    for family in Family::BOTH {
        let to = SocketAddr::new(family.pod(0), HTTP_PORTS[0]);
        let mut connection = lab.client().connect(Protocol::Tcp, family.client(1), to)?;
        for _ in 0..10 {
            assert_eq!(connection.ask("/")?, "pod-0");
        }
        assert_eq!(connection.ask("/bytes/1000000")?.len(), 1_000_000);
        assert_eq!(connection.ask_last("/")?, "pod-0");
        assert!(connection.ask("/").is_err(), "the server closed it");
    }
    Ok(())
}

#[test]
fn a_closed_port_refuses_and_a_lost_pod_is_silent_until_it_returns() -> Result<()> {
    let mut lab = Lab::with_pods(2)?;
    let client = lab.client();
    for family in Family::BOTH {
        let from = family.client(1);
        let closed = SocketAddr::new(family.pod(0), 9);
        for protocol in Protocol::BOTH {
            let refused = client.ask(protocol, from, closed).expect_err("nobody listens there");
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{protocol}");
        }
        let to = SocketAddr::new(family.pod(0), HTTP_PORTS[0]);
        let mut kept = client.connect(Protocol::Tcp, from, to)?;
        assert_eq!(kept.ask("/")?, "pod-0");
        lab.kill_pod(0)?;
        // The node has no route to it any more: silence for the connection, an error for a new one.
        assert!(kept.ask("/").is_err());
        assert!(client.http_get(from, to, "/").is_err());
        assert_eq!(client.http_get(from, SocketAddr::new(family.pod(1), HTTP_PORTS[0]), "/")?, "pod-1");
        lab.return_pod(0)?;
        assert_eq!(client.http_get(from, to, "/")?, "pod-0");
    }
    Ok(())
}

#[test]
fn two_thousand_clients_ask_in_seconds() -> Result<()> {
    let lab = Lab::with_pods(1)?;
    for family in Family::BOTH {
        for protocol in Protocol::BOTH {
            let port = if protocol == Protocol::Tcp { HTTP_PORTS[0] } else { UDP_PORTS[0] };
            let to = SocketAddr::new(family.pod(0), port);
            let names = lab.client().ask_all(protocol, 1000..3000, to)?;
            assert_eq!(names, vec!["pod-0"; 2000]);
        }
    }
    Ok(())
}

#[test]
fn a_load_counts_what_happens_to_its_clients() -> Result<()> {
    let mut lab = Lab::with_pods(1)?;
    let to = SocketAddr::new(Family::V4.pod(0), HTTP_PORTS[0]);
    let load = Load::start(&lab.client(), Protocol::Tcp, 0..20, to);
    load.wait_for(200)?;
    let report = load.stop()?;
    report.undisturbed()?;
    assert_eq!(report.pods.keys().collect::<Vec<_>>(), ["pod-0"]);

    let load = Load::start(&lab.client(), Protocol::Tcp, 0..4, to);
    load.wait_for(40)?;
    lab.kill_pod(0)?;
    load.wait_for(8)?;
    let report = load.stop()?;
    assert!(report.failed > 0 && report.broken > 0, "{report:?}");
    assert!(report.undisturbed().is_err());
    Ok(())
}

#[test]
fn without_offload_every_captured_frame_has_its_checksum() -> Result<()> {
    let lab = Lab::up(&Options { pods: 1, checksum_offload: false, ..Options::default() })?;
    for family in Family::BOTH {
        let file = lab.scratch().join(format!("{family}.pcap"));
        let capture = Capture::start(lab.node(), WIRE, Direction::Out, &file)?;
        let to = SocketAddr::new(family.pod(0), HTTP_PORTS[0]);
        assert_eq!(lab.client().http_get(family.client(1), to, "/bytes/100000")?.len(), 100_000);
        let frames = capture.stop()?;
        let verified = frames.iter().map(|frame| verify_checksums(frame)).collect::<Result<Vec<_>>>()?;
        let verified = verified.into_iter().filter(|verified| *verified == Verified::Transport).count();
        ensure!(verified > 60, "{verified} of {} frames could be verified", frames.len());
    }
    Ok(())
}

#[test]
fn with_two_nodes_all_clients_reach_all_pods() -> Result<()> {
    let lab = Lab::up(&Options { pods: 2, pods_of_b: 2, ..Options::default() })?;
    let all = [0, 1, FIRST_OF_B, FIRST_OF_B + 1];
    for family in Family::BOTH {
        for pod in all {
            let to = SocketAddr::new(family.pod(pod), HTTP_PORTS[0]);
            let from_outside = lab.client().http_get(family.client(1), to, "/who")?;
            assert_eq!(from_outside, format!("{} {}", pod_name(pod), family.client(1)));
            for other in all {
                let who = lab.pod_client(other).http_get(family.pod(other), to, "/who")?;
                assert_eq!(who, format!("{} {}", pod_name(pod), family.pod(other)));
            }
        }
    }
    Ok(())
}

#[test]
fn a_dropped_lab_leaves_nothing() -> Result<()> {
    let (name, pins, scratch) = {
        let lab = Lab::with_pods(2)?;
        fs::create_dir_all(lab.pin_dir().join("below"))?;
        let mut sleeper = lab.node().command("sleep").arg("1000").spawn()?;
        let name = lab.node().name().trim_end_matches("node").to_owned();
        let (pins, scratch) = (lab.pin_dir().to_owned(), lab.scratch().to_owned());
        drop(lab);
        eventually("the process on the node is gone", Duration::from_secs(5), || Ok(sleeper.try_wait()?.is_some()))?;
        (name, pins, scratch)
    };
    assert!(!pins.exists() && !scratch.exists());
    let left: Vec<_> = namespaces()?.into_iter().filter(|namespace| namespace.starts_with(&name)).collect();
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}

#[test]
fn a_panic_leaves_nothing_behind_either() -> Result<()> {
    let (name_out, name_in) = std::sync::mpsc::channel();
    let ended = std::thread::spawn(move || {
        let lab = Lab::with_pods(1).expect("a lab");
        name_out.send(lab.node().name().to_owned()).expect("the test waits");
        panic!("as a failing test does");
    })
    .join();
    assert!(ended.is_err());
    assert!(!namespaces()?.contains(&name_in.recv()?));
    Ok(())
}

#[test]
fn remains_of_a_killed_process_are_removed() -> Result<()> {
    let dead = process_that_has_ended()?;
    let orphan = format!("affinity-lab-{dead}-0-node");
    let made = Command::new("ip").args(["netns", "add", &orphan]).status()?;
    ensure!(made.success(), "ip netns add {orphan}");
    let living = Lab::with_pods(1)?;
    Lab::sweep_stale()?;
    let left = namespaces()?;
    assert!(!left.contains(&orphan));
    assert!(left.contains(living.node().name()));
    Ok(())
}

/// kube-proxy's rules balance and pin; in iptables mode, they forget clients beyond 100 for each endpoint. The README quotes
/// these figures.
#[test]
fn kube_proxys_rules_balance_and_pin() -> Result<()> {
    for mode in [Mode::Iptables, Mode::Nftables] {
        let lab = Lab::with_pods(3)?;
        let service = Service::new("web", 10).tcp("http", 80, 8080).udp("dns", 53, 5353).on(0..3);
        let refused = Service::new("none", 11).tcp("http", 80, 8080);
        mode.install(&lab, &[service.clone(), refused.clone()])?;
        let to = service.frontend(Family::V4, "http");
        let answers: BTreeSet<String> =
            (0..30).map(|_| lab.client().http_get(Family::V4.client(1), to, "/")).collect::<Result<_, _>>()?;
        assert_eq!(answers.len(), 3, "{mode:?} does not balance: {answers:?}");
        let error = lab.client().http_get(Family::V4.client(1), refused.frontend(Family::V4, "http"), "/");
        assert_eq!(error.expect_err("it has no endpoints").kind(), ErrorKind::ConnectionRefused);

        mode.install(&lab, &[service.client_ip()])?;
        for clients in [100, 400] {
            // Other clients each time, so that the lists start without any of them.
            let first = clients * 10;
            let stayed = clients_that_stay(&lab, first..first + clients, to)?;
            report(&format!("{mode:?}: {stayed} of {clients} clients stay on one pod"));
            match (mode, clients) {
                (Mode::Iptables, 400) => assert!(stayed < 200, "{stayed}"),
                _ => assert_eq!(stayed, clients),
            }
        }
    }
    Ok(())
}

/// How many clients are served by one pod in two further rounds.
fn clients_that_stay(lab: &Lab, clients: std::ops::Range<u32>, to: SocketAddr) -> Result<u32> {
    let mut seen: BTreeMap<usize, BTreeSet<String>> = BTreeMap::new();
    for _ in 0..3 {
        for (client, name) in lab.client().ask_all(Protocol::Tcp, clients.clone(), to)?.into_iter().enumerate() {
            seen.entry(client).or_default().insert(name);
        }
    }
    Ok(u32::try_from(seen.values().filter(|names| names.len() == 1).count())?)
}

fn namespaces() -> Result<BTreeSet<String>> {
    let names = fs::read_dir("/run/netns").context("/run/netns")?;
    names.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn process_that_has_ended() -> Result<u32> {
    let mut child = Command::new("true").spawn()?;
    child.wait()?;
    Ok(child.id())
}
