//! Client-IP affinity with real sockets: Kubernetes' own tests of it, and cases that they do not cover. Each scenario holds for
//! XDP in the driver and for TC; for IPv4 and IPv6; for TCP and UDP.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::IpAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use affinity_tests::lab::{
    Capture, Connection, Direction, EndpointState, Family, Lab, Options, Protocol, Service, WIRE, eventually,
};
use affinity_tests::on_every_hook;
use affinity_tests::packet::{Verified, verify_checksums};
use affinity_tests::patience::{patience, timeout_s};
use affinity_tests::story::{Hook, Route, tell, tell_in, web};
use anyhow::{Context, Result, ensure};

/// How many equal answers in a row confirm that a client is pinned.
const CONFIRMATIONS: usize = 15;
/// "At once", for what must not wait for a time-out.
const AT_ONCE: Duration = Duration::from_millis(900);
/// How long a change of the YAML may take until new connections meet it.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);

on_every_hook! {
    ten_dials_reach_one_backend,
    affinity_is_switched_on_a_live_service,
    a_pin_expires_and_the_next_connection_may_go_elsewhere,
    all_ports_of_a_service_share_the_pin,
    no_client_of_ten_thousand_moves,
    a_lost_endpoint_fails_over_at_once_and_its_return_moves_no_client,
    under_consistent_selection_a_returned_endpoint_regains_its_clients,
    a_service_without_endpoints_refuses_at_once,
    connections_to_a_removed_backend_are_reset,
    a_terminating_endpoint_keeps_its_connections_and_gets_no_new_ones,
    the_timer_restarts_as_the_policy_says,
    a_new_timeout_takes_effect_on_a_live_pin,
    no_captured_frame_has_a_bad_checksum,
    packets_that_are_not_for_a_frontend_stay_as_they_are,
    groups_and_prefixes_widen_a_pin,
}

fn ten_dials_reach_one_backend(hook: Hook) -> Result<()> {
    tell(hook, &[&web().client_ip()], |lab, _| {
        for route in Route::all_to(&web()) {
            let mut reached = BTreeSet::new();
            for client in 0..20 {
                let answers: BTreeSet<String> = route.dial(lab, client, 10)?.into_iter().collect();
                assert_eq!(answers.len(), 1, "{} by {route:?}", route.client(client));
                reached.extend(answers);
            }
            assert_eq!(reached.len(), 3, "twenty clients are spread over all pods: {reached:?} by {route:?}");
        }
        Ok(())
    })
}

fn affinity_is_switched_on_a_live_service(hook: Hook) -> Result<()> {
    tell(hook, &[&web()], |lab, _| {
        for route in Route::all_to(&web()) {
            for (number, service) in [web(), web().client_ip(), web()].into_iter().enumerate() {
                lab.publish(&service)?;
                // A datagram from a port that was used before belongs to the flow that was there before.
                let client = if route.protocol == Protocol::Udp { 1 + number as u32 } else { 1 };
                let wants_one = service.affinity_timeout_s().is_some();
                let what = format!("answers of {} by {route:?}", if wants_one { "one pod" } else { "several" });
                eventually(&what, SYNC_PATIENCE, || {
                    let pods: BTreeSet<String> = route.dial(lab, client, CONFIRMATIONS)?.into_iter().collect();
                    Ok((pods.len() == 1) == wants_one)
                })?;
                if wants_one {
                    // From a client that has not connected before the switch, for the same reason.
                    let client = if route.protocol == Protocol::Udp { 10 } else { client };
                    let pods: BTreeSet<String> = route.dial(lab, client, 2 * CONFIRMATIONS)?.into_iter().collect();
                    assert_eq!(pods.len(), 1, "it holds: {pods:?} by {route:?}");
                }
            }
        }
        Ok(())
    })
}

fn a_pin_expires_and_the_next_connection_may_go_elsewhere(hook: Hook) -> Result<()> {
    tell(hook, &[&web().client_ip_for(timeout_s(1))], |lab, _| {
        let routes = Route::all_to(&web());
        let mut reached = vec![BTreeSet::new(); routes.len()];
        for (route, reached) in routes.iter().zip(&mut reached) {
            reached.extend(route.dial(lab, 1, CONFIRMATIONS)?);
            assert_eq!(reached.len(), 1, "sticky at first, by {route:?}");
        }
        for _ in 0..15 {
            // The timeout must pass without a connection.
            sleep(patience(Duration::from_millis(1150)));
            for (route, reached) in routes.iter().zip(&mut reached) {
                reached.extend(route.dial(lab, 1, 1)?);
            }
            if reached.iter().all(|pods| pods.len() > 1) {
                break;
            }
        }
        for (route, reached) in routes.iter().zip(reached) {
            assert!(reached.len() >= 2, "always {reached:?} by {route:?}");
        }
        Ok(())
    })
}

fn all_ports_of_a_service_share_the_pin(hook: Hook) -> Result<()> {
    let web = web().client_ip();
    tell(hook, &[&web], |lab, _| {
        for family in Family::BOTH {
            let [http, https, dns] = ["http", "https", "dns"].map(|port| web.frontend(family, port));
            for number in 0..30 {
                let (client, from) = (lab.client(), family.client(number));
                let pod = client.http_get(from, http, "/")?;
                assert_eq!(client.http_get(from, https, "/")?, pod, "{from}");
                assert_eq!(client.udp_ask(from, dns, "/")?, pod, "{from}");
                assert_eq!(client.http_get(from, http, "/port")?, "8080");
                assert_eq!(client.http_get(from, https, "/port")?, "8443");
                assert_eq!(client.udp_ask(from, dns, "/port")?, "5353");
                assert_eq!(client.http_get(from, http, "/client")?, from.to_string());
                assert_eq!(client.udp_ask(from, dns, "/client")?, from.to_string());
            }
        }
        Ok(())
    })
}

fn no_client_of_ten_thousand_moves(hook: Hook) -> Result<()> {
    let web = web().client_ip();
    tell(hook, &[&web], |lab, _| {
        for (route, clients) in Route::all_to(&web).into_iter().zip([10_000, 1_000, 10_000, 1_000]) {
            let first = route.dial_all(lab, 0..clients)?;
            let second = route.dial_all(lab, 0..clients)?;
            let moved = first.iter().zip(&second).filter(|(first, second)| first != second).count();
            assert_eq!(moved, 0, "of {clients} clients by {route:?}");
            let shares = shares(&first);
            let fair = first.len() / 3;
            let is_even = |share: &usize| share.abs_diff(fair) < fair / 5;
            assert!(shares.len() == 3 && shares.values().all(is_even), "{shares:?} by {route:?}");
        }
        assert_eq!(lab.sessions(&web, None)?.len(), 22_000);
        Ok(())
    })
}

fn a_lost_endpoint_fails_over_at_once_and_its_return_moves_no_client(hook: Hook) -> Result<()> {
    let web = web().client_ip();
    tell(hook, &[&web], |lab, _| {
        for route in Route::all_to(&web) {
            let before = route.dial_all(lab, 0..100)?;
            lab.kill_pod(1)?;
            lab.publish_and_settle(&web.clone().on([0, 2]))?;
            let without = route.dial_all(lab, 0..100)?;
            for (before, without) in before.iter().zip(&without) {
                assert_ne!(without, "pod-1");
                assert!(before == without || before == "pod-1", "{before} lives, and its client went to {without}");
            }
            lab.return_pod(1)?;
            lab.publish_and_settle(&web)?;
            assert_eq!(route.dial_all(lab, 0..100)?, without, "pins stay where they are, by {route:?}");
            let newcomers = route.dial_all(lab, 100..200)?;
            assert!(newcomers.iter().any(|pod| pod == "pod-1"), "new clients reach it, by {route:?}");
        }
        Ok(())
    })
}

fn under_consistent_selection_a_returned_endpoint_regains_its_clients(hook: Hook) -> Result<()> {
    let web = web().client_ip().annotated("select", "consistent");
    tell(hook, &[&web], |lab, _| {
        for route in Route::all_to(&web) {
            let before = route.dial_all(lab, 0..100)?;
            assert_eq!(shares(&before).len(), 3, "by {route:?}");
            lab.publish_and_settle(&web.clone().on([0, 2]))?;
            assert!(!route.dial_all(lab, 0..100)?.contains(&"pod-1".to_owned()), "by {route:?}");
            lab.publish_and_settle(&web)?;
            lab.affinity(&["unpin", "--service", &web.full_name(), "--all"])?;
            assert_eq!(route.dial_all(lab, 0..100)?, before, "by {route:?}");
        }
        Ok(())
    })
}

fn a_service_without_endpoints_refuses_at_once(hook: Hook) -> Result<()> {
    let empty = web().on([]);
    tell(hook, &[&empty], |lab, _| {
        for route in Route::all_to(&empty) {
            // The first packet of a client may have to wait until its neighbour is found.
            lab.client().ask(route.protocol, route.client(1), route.to).expect_err("nobody serves");
            let started = Instant::now();
            let error = lab.client().ask(route.protocol, route.client(1), route.to).expect_err("nobody serves");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "by {route:?}");
            assert!(started.elapsed() < patience(AT_ONCE), "after {:?} by {route:?}", started.elapsed());
        }
        lab.publish_and_settle(&web())?;
        Route::all_to(&empty).iter().try_for_each(|route| route.dial(lab, 1, 3).map(drop))
    })
}

fn connections_to_a_removed_backend_are_reset(hook: Hook) -> Result<()> {
    let web = web().client_ip();
    tell(hook, &[&web], |lab, _| {
        let mut kept = Vec::new();
        for route in Route::all_to(&web) {
            for number in 0..10 {
                let mut connection = lab.client().connect(route.protocol, route.client(number), route.to)?;
                let pod = connection.ask("/")?;
                kept.push((route, number, connection, pod));
            }
        }
        lab.publish_and_settle(&web.clone().endpoint(0, EndpointState::Terminating))?;
        lab.kill_pod(0)?;
        lab.publish_and_settle(&web.clone().on([1, 2]))?;
        eventually("it is known to be dead", SYNC_PATIENCE, || {
            Ok(!lab.affinity(&["get", "backends"])?.contains("pod-0"))
        })?;
        for (route, number, mut connection, pod) in kept {
            let started = Instant::now();
            let answer = connection.ask("/");
            assert!(started.elapsed() < patience(AT_ONCE), "after {:?} by {route:?}", started.elapsed());
            match (route.protocol, pod.as_str()) {
                (Protocol::Tcp, "pod-0") => {
                    let error = answer.expect_err("its pod has gone");
                    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "by {route:?}");
                }
                (Protocol::Udp, "pod-0") => assert_ne!(answer?, "pod-0", "by {route:?}"),
                _ => assert_eq!(answer?, pod, "other flows stay, by {route:?}"),
            }
            assert_ne!(route.dial(lab, number, 1)?, ["pod-0"]);
        }
        Ok(())
    })
}

fn a_terminating_endpoint_keeps_its_connections_and_gets_no_new_ones(hook: Hook) -> Result<()> {
    let web = web().client_ip();
    tell(hook, &[&web], |lab, _| {
        for family in Family::BOTH {
            let to = web.frontend(family, "http");
            let mut kept = keep_connections(lab, family, to, 30)?;
            lab.publish_and_settle(&web.clone().endpoint(2, EndpointState::Terminating))?;
            for (_, connection, pod) in &mut kept {
                assert_eq!(connection.ask("/")?, *pod, "an established connection goes on");
            }
            for (from, _, pod) in &kept {
                let now = lab.client().http_get(*from, to, "/")?;
                assert!(now != "pod-2" && (now == *pod || pod == "pod-2"), "{from} was on {pod}, is on {now}");
            }
            lab.publish_and_settle(&web)?;
        }
        Ok(())
    })
}

/// Clients use one connection for longer than the timeout, and then each opens a new one. Other clients connect repeatedly
/// within the timeout, for longer than the timeout.
fn the_timer_restarts_as_the_policy_says(hook: Hook) -> Result<()> {
    const CLIENTS: u32 = 30;
    let services: Vec<(&str, Service)> = ["connection", "packet", "absolute", "alive"]
        .into_iter()
        .zip(20..)
        .map(|(timer, number)| {
            let service = Service::new(timer, number).tcp("http", 80, 8080).client_ip_for(timeout_s(2)).on(0..3);
            (timer, service.annotated("timer", timer))
        })
        .collect();
    let all: Vec<&Service> = services.iter().map(|(_, service)| service).collect();
    tell(hook, &all, |lab, _| {
        for family in Family::BOTH {
            let mut busy = Vec::new();
            let mut returning = Vec::new();
            for (timer, service) in &services {
                let to = service.frontend(family, "http");
                busy.push((*timer, to, keep_connections(lab, family, to, CLIENTS)?));
                let first = lab.client().ask_all(Protocol::Tcp, 100..100 + CLIENTS, to)?;
                returning.push((*timer, to, first, BTreeSet::new()));
            }
            let started = Instant::now();
            while started.elapsed() < patience(Duration::from_millis(3500)) {
                for (timer, _, kept) in &mut busy {
                    for (_, connection, pod) in kept {
                        assert_eq!(connection.ask("/")?, *pod, "a connection stays where it is, under {timer}");
                    }
                }
                for (_, to, first, moved) in &mut returning {
                    let again = lab.client().ask_all(Protocol::Tcp, 100..100 + CLIENTS, *to)?;
                    moved.extend((0..again.len()).filter(|client| again[*client] != first[*client]));
                }
                // A pause between requests that is shorter than the timeouts.
                sleep(Duration::from_millis(200));
            }
            for (timer, to, kept) in &busy {
                let mut moved = 0;
                for (from, _, pod) in kept {
                    moved += usize::from(lab.client().http_get(*from, *to, "/")? != *pod);
                }
                let restarts = matches!(*timer, "packet" | "alive");
                assert_eq!(moved == 0, restarts, "{moved} of {CLIENTS} busy clients moved under {timer}, {family}");
            }
            for (timer, _, _, moved) in returning {
                let restarts = timer != "absolute";
                assert_eq!(moved.is_empty(), restarts, "clients {moved:?} moved under {timer}, {family}");
            }
        }
        Ok(())
    })
}

fn a_new_timeout_takes_effect_on_a_live_pin(hook: Hook) -> Result<()> {
    let web = web();
    tell(hook, &[&web.clone().client_ip()], |lab, _| {
        let left = |route: &Route| -> Result<f64> {
            let sessions = lab.sessions(&web, Some(route.client(1)))?;
            let session = sessions.first().context("a session")?;
            session.expires_in_seconds.context("a session that expires")
        };
        for route in Route::all_to(&web) {
            lab.publish(&web.clone().client_ip())?;
            route.dial(lab, 1, 1)?;
            eventually("the default timeout", SYNC_PATIENCE, || Ok(left(&route)? > 10_000.0))?;
            let pod = route.dial(lab, 1, CONFIRMATIONS)?.pop();
            lab.publish(&web.clone().client_ip_for(600))?;
            eventually("a shorter timeout", SYNC_PATIENCE, || Ok(left(&route)? <= 600.0))?;
            assert_eq!(route.dial(lab, 1, CONFIRMATIONS)?.pop(), pod, "it is still pinned, by {route:?}");
            lab.publish(&web.clone().client_ip_for(1200))?;
            eventually("a longer timeout", SYNC_PATIENCE, || Ok(left(&route)? > 600.0))?;
            assert_eq!(route.dial(lab, 1, CONFIRMATIONS)?.pop(), pod, "it is still pinned, by {route:?}");
        }
        Ok(())
    })
}

/// Requests and replies after their translation, rejections, and answers of many segments.
fn no_captured_frame_has_a_bad_checksum(hook: Hook) -> Result<()> {
    let (web, empty) = (web().client_ip(), Service::new("empty", 11).tcp("http", 80, 8080).udp("dns", 53, 5353));
    let options = Options { checksum_offload: false, ..Options::default() };
    tell_in(&options, &hook.args(), &[&web, &empty], |lab, _| {
        let mut captures = vec![("to the clients", capture(lab, WIRE)?)];
        for pod in lab.pods() {
            captures.push(("to a pod", capture(lab, &pod.device())?));
        }
        let refusals = lab.scratch().join("refusals.pcap");
        let refusals = Capture::start(lab.client_namespace(), "eth0", Direction::In, &refusals)?;
        for route in Route::all_to(&web) {
            route.dial_all(lab, 0..50)?;
            let path = if route.protocol == Protocol::Tcp { "/bytes/100000" } else { "/bytes/1001" };
            lab.client().connect(route.protocol, route.client(99), route.to)?.ask(path)?;
        }
        captures.push(("as replies", refusals));
        for route in Route::all_to(&empty) {
            assert!(route.dial(lab, 1, 1).is_err());
        }
        for (where_to, capture) in captures {
            let frames = capture.stop()?;
            // The kernel joins segments of one flow on reception: those have no checksum of their own.
            let frames = frames.iter().filter(|frame| where_to != "as replies" || frame.len() < 1400);
            let mut verified = 0;
            for frame in frames {
                let outcome = verify_checksums(frame).with_context(|| format!("{where_to}: {frame:02x?}"))?;
                verified += usize::from(outcome == Verified::Transport);
            }
            ensure!(verified > 100, "only {verified} frames {where_to} could be verified");
        }
        Ok(())
    })
}

fn packets_that_are_not_for_a_frontend_stay_as_they_are(hook: Hook) -> Result<()> {
    let web = web().client_ip();
    tell(hook, &[&web], |lab, _| {
        for family in Family::BOTH {
            let from = family.client(1);
            for (index, pod) in lab.pods().iter().enumerate() {
                let address = family.pod(index);
                assert_eq!(lab.client().http_get(from, (address, 8080).into(), "/")?, pod.name());
                assert_eq!(lab.client().http_get(from, (address, 8443).into(), "/port")?, "8443");
                assert_eq!(lab.client().http_get(from, (address, 8443).into(), "/client")?, from.to_string());
                assert_eq!(lab.client().udp_ask(from, (address, 5354).into(), "/")?, pod.name());
                let large = lab.client().http_get(from, (address, 8080).into(), "/bytes/1000000")?;
                assert_eq!(large.len(), 1_000_000);
            }
            let other_port = (web.frontend(family, "http").ip(), 81).into();
            let said = lab.explain(Protocol::Tcp, from, other_port)?;
            assert_eq!(said.verdict, "pass", "{said:?}");
        }
        Ok(())
    })
}

fn groups_and_prefixes_widen_a_pin(hook: Hook) -> Result<()> {
    let grouped = |name, number, pods: [usize; 3]| {
        Service::new(name, number).tcp("http", 80, 8080).client_ip().annotated("group", "shop").on(pods)
    };
    let (cart, pay) = (grouped("cart", 20, [0, 1, 2]), grouped("pay", 21, [0, 1, 2]));
    let near = Service::new("near", 22).tcp("http", 80, 8080).client_ip().on(0..3);
    let near = near.annotated("client-prefix-v4", "24").annotated("client-prefix-v6", "112");
    tell(hook, &[&cart, &pay, &near], |lab, _| {
        for family in Family::BOTH {
            let ask = |service: &Service, clients| {
                lab.client().ask_all(Protocol::Tcp, clients, service.frontend(family, "http"))
            };
            assert_eq!(ask(&cart, 0..60)?, ask(&pay, 0..60)?, "two services of a group, {family}");
            // 256 clients to an IPv4 prefix, 65,536 to an IPv6 one; both begin at a multiple of it.
            let neighbours = ask(&near, 65_536..65_536 + 200)?;
            assert_eq!(shares(&neighbours).len(), 1, "one prefix, one pod: {family}");
        }
        let v4 = near.frontend(Family::V4, "http");
        let far: BTreeSet<String> = (0..30)
            .map(|prefix| lab.client().http_get(Family::V4.client(prefix * 256), v4, "/"))
            .collect::<Result<_, _>>()?;
        assert_eq!(far.len(), 3, "other prefixes are other clients");
        Ok(())
    })
}

/// Pods as clients: their packets arrive on the node's end of their veth, with checksums left to the device.
#[test]
fn a_pod_as_a_client_is_pinned_by_tc_on_the_pods_devices() -> Result<()> {
    let web = web().client_ip();
    let options = Options { pods: 5, ..Options::default() };
    tell_in(&options, &["--device", "pod*", "--xdp", "off"], &[&web], |lab, _| {
        for family in Family::BOTH {
            for pod in [3, 4] {
                let (client, from) = (lab.pod_client(pod), family.pod(pod));
                let (http, dns) = (web.frontend(family, "http"), web.frontend(family, "dns"));
                let first = client.http_get(from, http, "/")?;
                for _ in 0..CONFIRMATIONS {
                    assert_eq!(client.http_get(from, http, "/")?, first, "{from}");
                    assert_eq!(client.udp_ask(from, dns, "/")?, first, "{from}");
                }
                assert_eq!(client.http_get(from, http, "/client")?, from.to_string());
                assert_eq!(client.http_get(from, http, "/bytes/1000000")?.len(), 1_000_000);
            }
        }
        Ok(())
    })
}

/// A capture of the translated packets that the node sends on this device.
fn capture(lab: &Lab, device: &str) -> Result<Capture> {
    Capture::start(lab.node(), device, Direction::Out, &lab.scratch().join(format!("{device}.pcap")))
}

/// Connections of this many clients, each with its client's address and the pod at its other end.
fn keep_connections(
    lab: &Lab,
    family: Family,
    to: std::net::SocketAddr,
    clients: u32,
) -> Result<Vec<(IpAddr, Connection, String)>> {
    (0..clients)
        .map(|number| {
            let from = family.client(number);
            let mut connection = lab.client().connect(Protocol::Tcp, from, to)?;
            let pod = connection.ask("/")?;
            Ok((from, connection, pod))
        })
        .collect()
}

/// How many of the answers each pod gave.
fn shares(answers: &[String]) -> BTreeMap<&str, usize> {
    let mut shares = BTreeMap::new();
    for pod in answers {
        *shares.entry(pod.as_str()).or_default() += 1;
    }
    shares
}
