//! The effect of changes of a live service on its clients, on a cluster of two nodes: on external clients and pods, which send
//! packets that are translated, and on processes on the node, with translated sockets; through the ClusterIP, through the node
//! port, which masquerades external clients, and through the node port on loopback.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use affinity_tests::callers::{Call, Callers, Door, Line, Story, Who, tell};
use affinity_tests::in_every_way;
use affinity_tests::lab::{EndpointState, FIRST_OF_B, Family, Frontend, Lab, Protocol, Service, eventually, pod_name};
use affinity_tests::patience::patience;
use affinity_tests::proxy::Proxy;
use anyhow::{Result, ensure};

const PROCESS: &str = env!("CARGO_BIN_EXE_socket_process");
/// An endpoint on node A.
const A: usize = 0;
/// An endpoint on node B.
const B: usize = FIRST_OF_B;
/// A pod of node A that is no endpoint.
const BYSTANDER: usize = 2;
/// "At once", for what must not wait for a time-out.
const AT_ONCE: Duration = Duration::from_millis(900);
/// How long a change of the YAML may take until new connections meet it.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);
/// How long a client waits if there may be no answer.
const SHORT_PATIENCE: Duration = Duration::from_millis(400);

/// Every kind of client with every kind of address.
const WAYS: [(Who, Door); 7] = [
    (Who::Outside(1), Door::Of(Frontend::ClusterIp)),
    (Who::Outside(2), Door::Of(Frontend::NodePort)),
    (Who::Pod(BYSTANDER), Door::Of(Frontend::ClusterIp)),
    (Who::Pod(BYSTANDER), Door::Of(Frontend::NodePort)),
    (Who::Node, Door::Of(Frontend::ClusterIp)),
    (Who::Node, Door::Of(Frontend::NodePort)),
    (Who::Node, Door::Localhost),
];

/// A service by its number; each scenario has a separate one.
fn web(number: u16) -> Service {
    Service::new(&format!("web-{number}"), number)
        .tcp("http", 80, 8080)
        .udp("dns", 53, 5353)
        .node_ports(node_port(number))
}

fn node_port(number: u16) -> u16 {
    30_000 + 2 * number
}

in_every_way!(live_services_change_under_their_clients);

/// Each with a separate service, which is removed with it: an endpoint is gone when no service lists it.
fn live_services_change_under_their_clients(proxy: Proxy) -> Result<()> {
    let stories: [(&str, Story); 5] = [
        ("datagrams of an endpoint that has gone", datagrams_of_an_endpoint_that_has_gone_go_elsewhere_at_once),
        ("connections to a terminating endpoint", connections_to_a_terminating_endpoint_go_on_until_it_has_gone),
        ("a changed target port", a_changed_target_port_takes_effect),
        ("a changed type", a_live_service_changes_its_type),
        ("several slices", slices_with_target_ports_of_their_own_make_one_service),
    ];
    tell(proxy, PROCESS, stories)
}

/// A connection of each way, each with this pod at its other end.
fn open_all(callers: &mut Callers<'_>, service: &Service, protocol: Protocol, pod: usize) -> Result<Vec<(Call, Line)>> {
    let mut lines = Vec::new();
    for call in Call::all(service, &WAYS, protocol) {
        let mut line = callers.open(&call)?;
        let answer = callers.ask(&mut line, "/")?;
        ensure!(answer == Ok(pod_name(pod)), "{call:?}: {answer:?}, not {}", pod_name(pod));
        lines.push((call, line));
    }
    Ok(lines)
}

fn datagrams_of_an_endpoint_that_has_gone_go_elsewhere_at_once(lab: &Lab, callers: &mut Callers<'_>) -> Result<()> {
    let web = web(1).client_ip();
    lab.publish_and_settle(&web.clone().on([A]))?;
    let mut lines = open_all(callers, &web, Protocol::Udp, A)?;
    // Removed, and then only unready: the serving endpoint is on the other node, and then on this one again.
    let terminating = web.clone().on([A]).endpoint(B, EndpointState::Terminating);
    for (service, pod) in [(web.clone().on([B]), B), (terminating, A)] {
        lab.publish_and_settle(&service)?;
        for (call, line) in &mut lines {
            let began = Instant::now();
            let answer = callers.ask(line, "/")?;
            ensure!(answer == Ok(pod_name(pod)), "{call:?}: {answer:?}, not {}", pod_name(pod));
            ensure!(began.elapsed() < patience(AT_ONCE), "{call:?}: after {:?}", began.elapsed());
        }
    }
    lab.withdraw(&web)
}

fn connections_to_a_terminating_endpoint_go_on_until_it_has_gone(lab: &Lab, callers: &mut Callers<'_>) -> Result<()> {
    let web = web(2).client_ip();
    lab.publish_and_settle(&web.clone().on([A]))?;
    for (old, new) in [(A, B), (B, A)] {
        let mut lines = open_all(callers, &web, Protocol::Tcp, old)?;
        lab.publish_and_settle(&web.clone().on([new]).endpoint(old, EndpointState::Terminating))?;
        for (call, line) in &mut lines {
            let answer = callers.ask(line, "/")?;
            ensure!(answer == Ok(pod_name(old)), "{call:?} goes on: {answer:?}, not {}", pod_name(old));
            let other = callers.dial(call, "/")?;
            ensure!(other == pod_name(new), "a new {call:?} reached {other}");
        }
        lab.publish(&web.clone().on([new]))?;
        eventually("the endpoint has gone", SYNC_PATIENCE, || {
            Ok(!lab.affinity(&["get", "backends"])?.contains(&pod_name(old)))
        })?;
        for (call, line) in &mut lines {
            eventually(&format!("{call:?} ends"), AT_ONCE, || Ok(callers.ask(line, "/")?.is_err()))?;
        }
    }
    lab.withdraw(&web)
}

fn a_changed_target_port_takes_effect(lab: &Lab, callers: &mut Callers<'_>) -> Result<()> {
    let before = web(3).on([A, B]);
    let after = Service::new("web-3", 3).tcp("http", 80, 8443).udp("dns", 53, 5354);
    let after = after.node_ports(node_port(3)).on([A, B]);
    lab.publish_and_settle(&before)?;
    let mut kept = Vec::new();
    for (protocol, port) in [(Protocol::Tcp, "8080"), (Protocol::Udp, "5353")] {
        for call in Call::all(&before, &WAYS, protocol) {
            let mut line = callers.open(&call)?;
            let answer = callers.ask(&mut line, "/port")?;
            ensure!(answer == Ok(port.to_owned()), "{call:?}: {answer:?}");
            kept.push((call, line));
        }
    }
    let mut on_node = callers.scene().process_on_node(PROCESS)?;
    let (connected, _) = on_node.connect(Protocol::Udp, before.frontend(Family::V4, "dns"))?;
    lab.publish(&after)?;
    for (call, line) in &mut kept {
        let (old, new) = if call.protocol == Protocol::Tcp { ("8080", "8443") } else { ("5353", "5354") };
        eventually(&format!("{call:?} reaches {new}"), SYNC_PATIENCE, || Ok(callers.dial(call, "/port")? == new))?;
        for _ in 0..10 {
            ensure!(callers.dial(call, "/port")? == new, "{call:?} reaches {old} again");
        }
        let answer = callers.ask(line, "/port")?;
        // A connection stays with its peer; datagrams have no connection.
        let expected = if call.protocol == Protocol::Tcp { old } else { new };
        ensure!(answer == Ok(expected.to_owned()), "{call:?}, kept: {answer:?}");
    }
    let told = on_node.await_end(connected)?;
    ensure!(told == Ok("ConnectionAborted".to_owned()), "whoever sends to the old port is told: {told:?}");
    lab.withdraw(&web(3))
}

fn a_live_service_changes_its_type(lab: &Lab, callers: &mut Callers<'_>) -> Result<()> {
    let plain = || Service::new("web-4", 4).tcp("http", 80, 8080).on([A, B]);
    let on_nodes = plain().node_ports(node_port(4));
    let balanced = on_nodes.clone().load_balancer();
    let client = lab.client().with_patience(SHORT_PATIENCE);
    for (service, reached) in [(plain(), 1), (on_nodes, 2), (balanced.clone(), 3), (plain(), 1)] {
        lab.publish(&service)?;
        let doors = [Frontend::ClusterIp, Frontend::NodePort, Frontend::LoadBalancer].into_iter().enumerate();
        for (index, door) in doors {
            for call in Call::all(&balanced, &[(Who::Outside(1), Door::Of(door))], Protocol::Tcp) {
                eventually(&format!("{call:?}, answered: {}", index < reached), SYNC_PATIENCE, || {
                    let answer = client.ask(Protocol::Tcp, call.family().client(1), call.to);
                    Ok(answer.is_ok() == (index < reached))
                })?;
            }
        }
        for call in Call::all(&service, &WAYS, Protocol::Tcp).iter().filter(|call| call.who == Who::Node) {
            callers.dial(call, "/")?;
        }
    }
    lab.withdraw(&web(4))
}

/// TCP and UDP share a number, too.
fn slices_with_target_ports_of_their_own_make_one_service(lab: &Lab, callers: &mut Callers<'_>) -> Result<()> {
    let bare = || Service::new("web-5", 5);
    let first = bare().tcp("http", 53, 8080).udp("dns", 53, 5353).node_ports(node_port(5)).on([A]);
    lab.publish_and_settle(&first)?;
    let more = bare().tcp("http", 53, 8443).udp("dns", 53, 5354).on([B]);
    lab.publish_text("more.yaml", &more.slices_yaml("more"))?;
    let (tcp, udp) = ([(A, "8080"), (B, "8443")], [(A, "5353"), (B, "5354")]);
    for (protocol, expected) in [(Protocol::Tcp, tcp), (Protocol::Udp, udp)] {
        let expected = BTreeSet::from(expected.map(|(pod, port)| (pod_name(pod), port.to_owned())));
        for call in Call::all(&first, &WAYS, protocol) {
            let mut met = BTreeSet::new();
            eventually(&format!("{call:?} meets {expected:?}"), SYNC_PATIENCE, || {
                let mut line = callers.open(&call)?;
                let [pod, port] = ["/", "/port"].map(|path| callers.ask(&mut line, path));
                met.insert((pod?.unwrap_or_default(), port?.unwrap_or_default()));
                callers.close(line)?;
                ensure!(met.is_subset(&expected), "{call:?}: {met:?}");
                Ok(met == expected)
            })?;
        }
    }
    lab.withdraw(&web(5))
}
