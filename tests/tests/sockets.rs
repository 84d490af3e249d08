//! Translation at `connect()`, with the sockets of processes in a cgroup: on the node and in a pod, TCP and UDP, connected and
//! not, IPv4, IPv6 and IPv4-mapped.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use affinity_tests::lab::{
    Agent, Cgroup, EndpointState, Family, Lab, Options, Protocol, Service, SocketProcess, eventually,
};
use affinity_tests::patience::{patience, timeout_s};
use affinity_tests::story::{tell_in, web};
use anyhow::{Context, Error, Result, anyhow, bail, ensure};

const PROCESS: &str = env!("CARGO_BIN_EXE_socket_process");
/// How many equal answers in a row confirm that a client is pinned.
const CONFIRMATIONS: usize = 15;
/// How long a change of the YAML may take until new connections meet it.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);
/// No device at all: all translation happens at the socket.
const NO_DEVICE: [&str; 2] = ["--device", "none*"];
/// Every device that carries packets of pods and of external clients.
const ALL_DEVICES: [&str; 5] = ["--device", "wire0", "pod*", "--xdp", "off"];

/// A lab with processes on the node and in the first pod.
struct Scene<'a> {
    lab: &'a mut Lab,
    agent: &'a mut Agent,
    cgroup: &'a Cgroup,
    node: SocketProcess,
    pod: SocketProcess,
}

fn tell(devices: &[&str], services: &[&Service], story: impl FnOnce(&mut Scene<'_>) -> Result<()>) -> Result<()> {
    let cgroup = Cgroup::create()?;
    let args = Lab::socket_args(&cgroup, devices)?;
    tell_in(&Options::default(), &args, services, |lab, agent| {
        let node = cgroup.start(PROCESS, lab.node())?;
        let pod = cgroup.start(PROCESS, lab.pods()[0].namespace().context("it lives")?)?;
        story(&mut Scene { lab, agent, cgroup: &cgroup, node, pod })
    })
}

/// The frontend of a port as each kind of socket names it: IPv4, IPv6, and IPv4-mapped.
fn forms(service: &Service, port: &str) -> [SocketAddr; 3] {
    let [v4, v6] = Family::BOTH.map(|family| service.frontend(family, port));
    let IpAddr::V4(address) = v4.ip() else { panic!("{v4}") };
    [v4, v6, SocketAddr::new(address.to_ipv6_mapped().into(), v4.port())]
}

/// The pod that answers a datagram of a new unconnected socket.
fn ask_unconnected(process: &mut SocketProcess, to: SocketAddr) -> Result<String> {
    let socket = process.bind(to)?;
    let answer = process.ask_to(socket, to, "/")?.map_err(|error| anyhow!("{to}: {error}"))?;
    process.close(socket)?;
    let (pod, from) = answer.split_once(" from ").context("a sender")?;
    ensure!(from == to.to_string(), "from {from} and not from {to}");
    Ok(pod.to_owned())
}

#[test]
fn operators_name_the_node_and_pods_as_listings_do() -> Result<()> {
    let web = web().client_ip();
    tell(&NO_DEVICE, &[&web], |scene| {
        let service = web.full_name();
        let to = forms(&web, "http");
        for (process, names) in [(&mut scene.node, ["node"; 2]), (&mut scene.pod, ["pod-0", "default/pod-0"])] {
            for (name, pod) in names.into_iter().flat_map(|name| ["pod-2", "pod-0", "pod-1"].map(|pod| (name, pod))) {
                let said = scene.lab.affinity(&["pin", "--service", &service, "--client", name, "--backend", pod])?;
                assert_eq!(said, format!("pinned {} to {pod} for {service}\n", names[1]));
                for form in to {
                    assert_eq!(process.dial(Protocol::Tcp, form)?, pod, "{name} by {form}");
                }
                for form in &to[..2] {
                    let to = form.to_string();
                    let said = scene.lab.affinity_json(&["explain", "--from", name, "--to", &to])?;
                    let pinned = &said["pinned"]["backend"]["name"];
                    assert_eq!((said["reason"].as_str(), pinned.as_str()), (Some("pinned"), Some(pod)), "{said}");
                }
            }
            scene.lab.affinity(&["unpin", "--service", &service, "--client", names[1]])?;
            let said = scene.lab.affinity_json(&["explain", "--from", names[1], "--to", &to[0].to_string()])?;
            assert_eq!(said["candidates"].as_array().map(Vec::len), Some(3), "{said}");
        }
        Ok(())
    })
}

#[test]
fn a_pod_that_is_no_endpoint_is_known_by_its_address() -> Result<()> {
    let web = web().client_ip().on(1..3);
    tell(&NO_DEVICE, &[&web], |scene| {
        let service = web.full_name();
        let shown = Family::V4.pod(0).to_string();
        for family in Family::BOTH {
            let (address, to) = (family.pod(0).to_string(), web.frontend(family, "http"));
            let pod = scene.pod.dial(Protocol::Tcp, to)?;
            let asked = ["explain", "--from", &address, "--to", &to.to_string()].map(str::to_owned);
            let explain = |lab: &Lab| lab.affinity_json(&asked.each_ref().map(String::as_str));
            let said = explain(scene.lab)?;
            let pinned = &said["pinned"]["backend"]["name"];
            assert_eq!((said["reason"].as_str(), pinned.as_str()), (Some("pinned"), Some(&*pod)), "{said}");

            let listed = |lab: &Lab, client: &str| lab.affinity_json(&["get", "sessions", "--client", client]);
            let sessions = listed(scene.lab, &address)?;
            let sessions = sessions.as_array().context("a list")?;
            let is_it = |session: &serde_json::Value| session["backend"]["name"] == *pod && session["client"] == *shown;
            assert!(sessions.iter().any(is_it), "{sessions:?}");
            let mapped = listed(scene.lab, &format!("::ffff:{shown}"))?;
            assert!(mapped.as_array().is_some_and(|sessions| sessions.iter().any(is_it)), "{mapped}");

            scene.lab.affinity(&["unpin", "--service", &service, "--client", &address])?;
            assert_eq!(listed(scene.lab, &address)?, serde_json::json!([]));
            let said = explain(scene.lab)?;
            assert_eq!(said["candidates"].as_array().map(Vec::len), Some(2), "{said}");
            for pod in ["pod-2", "pod-1"] {
                scene.lab.affinity(&["pin", "--service", &service, "--client", &address, "--backend", pod])?;
                assert_eq!(scene.pod.dial(Protocol::Tcp, to)?, pod);
            }
            scene.lab.affinity(&["unpin", "--service", &service, "--all"])?;
        }
        Ok(())
    })
}

#[test]
fn ten_dials_reach_one_backend_from_the_node_and_from_a_pod() -> Result<()> {
    let web = web().client_ip();
    tell(&NO_DEVICE, &[&web], |scene| {
        for (process, name) in [(&mut scene.node, "node"), (&mut scene.pod, "default/pod-0")] {
            let [http, dns] = ["http", "dns"].map(|port| forms(&web, port));
            let mut pods = Vec::new();
            for form in 0..3 {
                let mut reached = BTreeSet::new();
                for _ in 0..CONFIRMATIONS {
                    reached.insert(process.dial(Protocol::Tcp, http[form])?);
                    reached.insert(process.dial(Protocol::Udp, dns[form])?);
                    reached.insert(ask_unconnected(process, dns[form])?);
                }
                assert_eq!(reached.len(), 1, "{name} by {}: {reached:?}", http[form]);
                pods.extend(reached);
            }
            assert_eq!(pods[0], pods[2], "an IPv4-mapped address is the IPv4 frontend");
            let sessions = scene.lab.affinity_json(&["get", "sessions", "--client", name])?;
            let sessions = sessions.as_array().context("a list")?;
            assert_eq!(sessions.len(), 2, "one pin for each family: {sessions:?}");
            assert!(sessions.iter().all(|session| session["client"] == name), "{sessions:?}");
            let named = |session: &serde_json::Value, pod: &str| session["backend"]["name"] == pod;
            assert!(pods.iter().all(|pod| sessions.iter().any(|session| named(session, pod))), "{pods:?} {sessions:?}");
        }
        Ok(())
    })
}

#[test]
fn without_affinity_connections_spread_and_a_datagram_socket_keeps_its_backend() -> Result<()> {
    tell(&NO_DEVICE, &[&web()], |scene| {
        for process in [&mut scene.node, &mut scene.pod] {
            for (http, dns) in forms(&web(), "http").into_iter().zip(forms(&web(), "dns")) {
                let mut reached = [BTreeSet::new(), BTreeSet::new(), BTreeSet::new()];
                for _ in 0..30 {
                    reached[0].insert(process.dial(Protocol::Tcp, http)?);
                    reached[1].insert(process.dial(Protocol::Udp, dns)?);
                    reached[2].insert(ask_unconnected(process, dns)?);
                }
                assert!(reached.iter().all(|pods| pods.len() == 3), "{reached:?}");
                let socket = process.bind(dns)?;
                let first = process.ask_to(socket, dns, "/")?;
                for _ in 0..30 {
                    assert_eq!(process.ask_to(socket, dns, "/")?, first);
                }
            }
        }
        Ok(())
    })
}

#[test]
fn affinity_is_switched_on_a_live_service() -> Result<()> {
    tell(&NO_DEVICE, &[&web()], |scene| {
        for process in [&mut scene.node, &mut scene.pod] {
            for service in [web(), web().client_ip(), web()] {
                scene.lab.publish(&service)?;
                for (port, protocol) in [("http", Protocol::Tcp), ("dns", Protocol::Udp)] {
                    for to in forms(&service, port) {
                        let wants_one = service.affinity_timeout_s().is_some();
                        eventually(&format!("one pod: {wants_one}, by {to}"), SYNC_PATIENCE, || {
                            let mut pods = BTreeSet::new();
                            for _ in 0..CONFIRMATIONS {
                                pods.insert(process.dial(protocol, to)?);
                            }
                            Ok((pods.len() == 1) == wants_one)
                        })?;
                    }
                }
            }
        }
        Ok(())
    })
}

#[test]
fn a_pin_expires_and_the_next_connection_may_go_elsewhere() -> Result<()> {
    let web = web().client_ip_for(timeout_s(1));
    tell(&NO_DEVICE, &[&web], |scene| {
        let [v4, v6] = Family::BOTH.map(|family| web.frontend(family, "http"));
        let mut reached = [BTreeSet::new(), BTreeSet::new()];
        for _ in 0..CONFIRMATIONS {
            reached[0].insert(scene.node.dial(Protocol::Tcp, v4)?);
            reached[1].insert(scene.pod.dial(Protocol::Tcp, v6)?);
        }
        assert!(reached.iter().all(|pods| pods.len() == 1), "sticky at first: {reached:?}");
        for _ in 0..15 {
            // The timeout must pass without a connection.
            sleep(patience(Duration::from_millis(1150)));
            reached[0].insert(scene.node.dial(Protocol::Tcp, v4)?);
            reached[1].insert(scene.pod.dial(Protocol::Tcp, v6)?);
            if reached.iter().all(|pods| pods.len() > 1) {
                return Ok(());
            }
        }
        bail!("always the same: {reached:?}")
    })
}

#[test]
fn a_service_without_endpoints_refuses_at_once() -> Result<()> {
    let empty = Service::new("empty", 11).tcp("http", 80, 8080).udp("dns", 53, 5353).client_ip();
    tell(&NO_DEVICE, &[&empty], |scene| {
        for process in [&mut scene.node, &mut scene.pod] {
            for (http, dns) in forms(&empty, "http").into_iter().zip(forms(&empty, "dns")) {
                let began = Instant::now();
                for (protocol, to) in [(Protocol::Tcp, http), (Protocol::Udp, dns)] {
                    let (_, answer) = process.connect(protocol, to)?;
                    assert_eq!(answer, Err("ConnectionRefused".to_owned()), "{protocol} {to}");
                }
                let socket = process.bind(dns)?;
                assert_eq!(process.ask_to(socket, dns, "/")?, Err("ConnectionRefused".to_owned()), "{dns}");
                assert!(began.elapsed() < patience(Duration::from_millis(500)), "{:?}", began.elapsed());
            }
        }
        Ok(())
    })
}

#[test]
fn under_alive_a_pin_lives_as_long_as_its_sockets() -> Result<()> {
    let web = web().client_ip_for(timeout_s(1)).annotated("timer", "alive");
    tell(&NO_DEVICE, &[&web], |scene| {
        let to = web.frontend(Family::V4, "http");
        let (socket, _) = scene.node.connect(Protocol::Tcp, to)?;
        let pod = scene.node.ask(socket, "/")?.map_err(|error| anyhow!(error))?;
        let connections = |lab: &Lab| -> Result<serde_json::Value> {
            let sessions = lab.affinity_json(&["get", "sessions", "--client", "node"])?;
            Ok(sessions[0]["connections"].clone())
        };
        assert_eq!(connections(scene.lab)?, 1);
        // Longer than the timeout, and than a pass of the sweep, which corrects wrong counts.
        sleep(patience(Duration::from_secs(6)));
        assert_eq!(connections(scene.lab)?, 1);
        for _ in 0..CONFIRMATIONS {
            assert_eq!(scene.node.dial(Protocol::Tcp, to)?, pod);
        }
        assert_eq!(connections(scene.lab)?, 1);
        scene.node.close(socket)?;
        assert_eq!(connections(scene.lab)?, 0);
        eventually("the pin expires", SYNC_PATIENCE, || {
            // Each connection restarts the timeout.
            sleep(patience(Duration::from_millis(1100)));
            Ok(scene.node.dial(Protocol::Tcp, to)? != pod)
        })
    })
}

#[test]
fn sockets_survive_agent_restart_and_repeated_attach() -> Result<()> {
    let web = web().client_ip();
    tell(&NO_DEVICE, &[&web], |scene| {
        let to = web.frontend(Family::V6, "http");
        let (socket, _) = scene.node.connect(Protocol::Tcp, to)?;
        let pod = scene.node.dial(Protocol::Tcp, to)?;
        for _ in 0..2 {
            scene.agent.kill()?;
            for _ in 0..CONFIRMATIONS {
                assert_eq!(scene.node.dial(Protocol::Tcp, to)?, pod, "without an agent");
            }
            scene.agent.restart()?;
            for _ in 0..CONFIRMATIONS {
                assert_eq!(scene.node.dial(Protocol::Tcp, to)?, pod);
            }
        }
        assert_eq!(scene.node.peer(socket)?, Ok(to.to_string()));
        assert_eq!(scene.node.ask(socket, "/")?, Ok(pod));
        Ok(())
    })
}

#[test]
fn sockets_and_packet_programs_do_not_translate_twice() -> Result<()> {
    // Not on the client's own pod, because the client's own packets do not reach it.
    let web = web().client_ip().on(1..3);
    tell(&ALL_DEVICES, &[&web], |scene| {
        let pod_0 = Family::BOTH.map(|family| family.pod(0));
        for (family, from) in Family::BOTH.into_iter().zip(pod_0) {
            for (port, protocol) in [("http", Protocol::Tcp), ("dns", Protocol::Udp)] {
                let to = web.frontend(family, port);
                let before = scene.lab.affinity_json(&["get", "flows"])?;
                for _ in 0..CONFIRMATIONS {
                    scene.pod.dial(protocol, to)?;
                    scene.node.dial(protocol, to)?;
                }
                assert_eq!(scene.lab.affinity_json(&["get", "flows"])?, before, "a flow was made for a socket");
                // The same namespace, outside the cgroup: its packets are translated on the pod's device.
                let outside = scene.lab.pod_client(0).ask(protocol, from, to)?;
                let sessions = scene.lab.sessions(&web, Some(from))?;
                assert!(sessions.iter().any(|session| session.backend.name == outside), "{outside} {sessions:?}");
                assert_ne!(scene.lab.affinity_json(&["get", "flows"])?, before);
            }
        }
        Ok(())
    })
}

#[test]
fn sockets_of_a_backend_that_has_gone_are_closed() -> Result<()> {
    let web = web().client_ip();
    tell(&NO_DEVICE, &[&web], |scene| {
        for to in 0..3 {
            let (http, dns) = (forms(&web, "http")[to], forms(&web, "dns")[to]);
            for process in [&mut scene.node, &mut scene.pod] {
                let (tcp, _) = process.connect(Protocol::Tcp, http)?;
                let (udp, _) = process.connect(Protocol::Udp, dns)?;
                let free = process.bind(dns)?;
                let pod = process.ask(tcp, "/")?.map_err(|error| anyhow!(error))?;
                let datagram = process.ask_to(free, dns, "/")?;
                assert_eq!(process.ask(udp, "/")?, Ok(pod.clone()));
                let index = scene.lab.pods().iter().position(|known| known.name() == pod).context("a pod of ours")?;
                let others = web.clone().without(index);
                scene.lab.publish_and_settle(&others.clone().endpoint(index, EndpointState::Terminating))?;
                assert_eq!(process.await_end(udp)?, Ok("ConnectionAborted".to_owned()), "UDP {http}");
                scene.lab.publish_and_settle(&others)?;
                let began = Instant::now();
                assert_eq!(process.await_end(tcp)?, Ok("ConnectionAborted".to_owned()), "TCP {http}");
                assert!(began.elapsed() < patience(Duration::from_millis(900)), "{:?}", began.elapsed());
                let elsewhere = process.ask_to(free, dns, "/")?;
                assert!(elsewhere.is_ok() && elsewhere != datagram, "{elsewhere:?}, before {datagram:?}");
                assert_ne!(process.dial(Protocol::Tcp, http)?, pod);
                scene.lab.publish_and_settle(&web)?;
            }
        }
        Ok(())
    })
}

#[test]
fn sockets_of_a_backend_that_left_go_on_until_it_does_not_answer() -> Result<()> {
    let web = web().client_ip();
    tell(&NO_DEVICE, &[&web], |scene| {
        let http = web.frontend(Family::V4, "http");
        let (tcp, _) = scene.node.connect(Protocol::Tcp, http)?;
        let pod = scene.node.ask(tcp, "/")?.map_err(|error| anyhow!(error))?;
        let index = scene.lab.pods().iter().position(|known| known.name() == pod).context("a pod of ours")?;
        scene.lab.publish_and_settle(&web.clone().without(index))?;
        // Longer than the gap, and than any number of checks of it.
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(14) {
            assert_eq!(scene.node.ask(tcp, "/")?, Ok(pod.clone()));
            sleep(Duration::from_secs(1));
        }
        let backends = scene.lab.affinity_json(&["get", "backends"])?;
        let lingers = |backend: &serde_json::Value| backend["state"] == "lingering" && backend["open"] == 1;
        assert!(backends.as_array().is_some_and(|backends| backends.iter().any(lingers)), "{backends}");
        scene.lab.pod(index).namespace().context("it lives")?.ip("link set eth0 down")?;
        eventually("the socket is closed", Duration::from_secs(30), || {
            Ok(scene.node.ask(tcp, "/")? == Err("ConnectionAborted".to_owned()))
        })
    })
}

#[test]
fn sockets_of_a_service_that_has_gone_go_on() -> Result<()> {
    let web = web().client_ip();
    tell(&NO_DEVICE, &[&web], |scene| {
        let [http, dns] = ["http", "dns"].map(|port| web.frontend(Family::V6, port));
        let (tcp, _) = scene.node.connect(Protocol::Tcp, http)?;
        let (udp, _) = scene.node.connect(Protocol::Udp, dns)?;
        let unconnected = scene.node.bind(dns)?;
        let mut ask = || {
            let answers = [scene.node.ask(tcp, "/")?, scene.node.ask(udp, "/")?];
            Ok::<_, Error>((answers, scene.node.ask_to(unconnected, dns, "/")?))
        };
        let first = ask()?;
        ensure!(first.0.iter().all(Result::is_ok) && first.1.is_ok(), "{first:?}");
        scene.lab.withdraw(&web)?;
        scene.lab.settle_deleted(&web)?;
        // Longer than the gap, and than any number of checks of lingering backends.
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(14) {
            assert_eq!(ask()?, first, "after {:?}", began.elapsed());
            sleep(Duration::from_secs(1));
        }
        scene.lab.publish_and_settle(&web)?;
        assert_eq!(ask()?, first, "the service is back");
        Ok(())
    })
}

#[test]
fn a_terminating_backend_keeps_its_tcp_sockets_alone() -> Result<()> {
    let web = web().client_ip();
    tell(&NO_DEVICE, &[&web], |scene| {
        let [http, dns] = ["http", "dns"].map(|port| web.frontend(Family::V4, port));
        let (tcp, _) = scene.node.connect(Protocol::Tcp, http)?;
        let (udp, _) = scene.node.connect(Protocol::Udp, dns)?;
        let pod = scene.node.ask(tcp, "/")?.map_err(|error| anyhow!(error))?;
        let index = scene.lab.pods().iter().position(|known| known.name() == pod).context("a pod of ours")?;
        let others = web.clone().on((0..3).filter(|other| *other != index));
        scene.lab.publish_and_settle(&others.endpoint(index, EndpointState::Terminating))?;
        assert_eq!(scene.node.await_end(udp)?, Ok("ConnectionAborted".to_owned()));
        assert_eq!(scene.node.ask(tcp, "/")?, Ok(pod.clone()));
        assert_eq!(scene.node.peer(tcp)?, Ok(http.to_string()));
        assert_ne!(scene.node.dial(Protocol::Tcp, http)?, pod);
        Ok(())
    })
}

#[test]
fn what_is_attached_is_listed_and_can_be_taken_away() -> Result<()> {
    let web = web().client_ip();
    tell(&NO_DEVICE, &[&web], |scene| {
        let to = web.frontend(Family::V4, "http");
        scene.node.dial(Protocol::Tcp, to)?;
        let devices = scene.lab.affinity_json(&["get", "devices"])?;
        assert_eq!(devices[0]["device"], scene.cgroup.path().to_str().context("UTF-8")?, "{devices}");
        assert_eq!(devices[0]["programs"].as_array().map(Vec::len), Some(9), "{devices}");
        scene.lab.affinity(&["unpin", "--service", &web.full_name(), "--client", "node"])?;
        assert!(scene.lab.affinity(&["get", "sessions"])?.is_empty());
        scene.agent.kill()?;
        let said = scene.lab.affinity(&["detach"])?;
        assert!(said.contains("detached sockets: connect4, connect6"), "{said}");
        let (_, answer) = scene.node.connect(Protocol::Tcp, to)?;
        assert!(answer.is_err(), "{answer:?}");
        Ok(())
    })
}

#[test]
fn auto_leaves_the_machine_alone_from_another_network_namespace() -> Result<()> {
    tell_in(&Options::default(), &["--device", "wire0", "--socket", "auto"], &[], |lab, agent| {
        let devices = lab.affinity_json(&["get", "devices"])?;
        assert_eq!(devices.as_array().map(Vec::len), Some(1), "{devices}");
        let log = agent.log();
        assert!(log.iter().any(|line| line.contains("not the node's own network namespace")), "{log:?}");
        Ok(())
    })
}
