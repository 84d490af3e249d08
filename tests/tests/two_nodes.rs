//! Client-IP affinity on a cluster of two nodes, with endpoints on both: Kubernetes' own tests of it, at node ports and load
//! balancers under both policies and at the ClusterIP, for external clients, for pods, and for processes on the node, which
//! also have the node port on loopback.

use std::collections::BTreeSet;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use affinity_tests::callers::{Call, Callers, Door, Story, Who, tell};
use affinity_tests::in_every_way;
use affinity_tests::lab::{
    EndpointState, FIRST_OF_B, Family, Frontend, Lab, NODE_B_NAME, NODE_NAME, Policy, Protocol, Service, eventually,
    pod_name,
};
use affinity_tests::patience::{patience, timeout_s};
use affinity_tests::proxy::Proxy;
use anyhow::{Result, ensure};

const PROCESS: &str = env!("CARGO_BIN_EXE_socket_process");
/// Endpoints: two on node A, one on node B.
const ENDPOINTS: [usize; 3] = [0, 1, FIRST_OF_B];
/// A pod of node A that is no endpoint.
const BYSTANDER: usize = 2;
/// How many equal answers in a row confirm that a client is pinned.
const CONFIRMATIONS: usize = 15;
/// How many external clients ask at each frontend.
const CLIENTS: u32 = 6;
/// How long a change of the YAML may take until new connections meet it.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);

/// Every kind of client with every kind of address that it has. Each external client has a separate frontend. There is one
/// client of each other kind, with one pin for each family.
const WAYS: [(Who, Door); 9] = [
    (Who::Outside(1), Door::Of(Frontend::NodePort)),
    (Who::Outside(2), Door::Of(Frontend::LoadBalancer)),
    (Who::Outside(3), Door::Of(Frontend::ClusterIp)),
    (Who::Pod(BYSTANDER), Door::Of(Frontend::NodePort)),
    (Who::Pod(BYSTANDER), Door::Of(Frontend::LoadBalancer)),
    (Who::Node, Door::Of(Frontend::ClusterIp)),
    (Who::Node, Door::Of(Frontend::NodePort)),
    (Who::Node, Door::Of(Frontend::LoadBalancer)),
    (Who::Node, Door::Localhost),
];

/// A service with every frontend; each scenario has a separate one for either policy.
fn web(number: u16, policy: Policy) -> Service {
    Service::new(&format!("web-{number}"), number)
        .tcp("http", 80, 8080)
        .udp("dns", 53, 5353)
        .node_ports(30_000 + 2 * number)
        .load_balancer()
        .external(policy)
        .on(ENDPOINTS)
}

/// The same under both policies.
fn under_both(first: u16) -> [(Policy, Service); 2] {
    [(Policy::Cluster, web(first, Policy::Cluster)), (Policy::Local, web(first + 1, Policy::Local))]
}

/// Every way over both protocols.
fn calls(service: &Service) -> Vec<Call> {
    Protocol::BOTH.iter().flat_map(|protocol| Call::all(service, &WAYS, *protocol)).collect()
}

in_every_way!(clients_of_every_kind_are_pinned);

fn clients_of_every_kind_are_pinned(proxy: Proxy) -> Result<()> {
    let stories: [(&str, Story); 5] = [
        ("pinned", every_answer_is_one_pod),
        ("switched", affinity_is_switched_on_a_live_service),
        ("expired", a_pin_expires_and_the_next_connection_may_go_elsewhere),
        ("localhost", the_node_port_on_loopback_is_the_nodes_own),
        ("hints", hints_narrow_what_connections_reach),
    ];
    // A scenario that only waits has the same result with every proxy.
    tell(proxy, PROCESS, stories.into_iter().filter(|(name, _)| proxy == Proxy::Tc || *name != "expired"))
}

fn settle(lab: &Lab, services: &[(Policy, Service)]) -> Result<()> {
    services.iter().try_for_each(|(_, service)| lab.publish(service))?;
    services.iter().try_for_each(|(_, service)| lab.settle(service))
}

/// The pods that answer a client's connections, one after another.
fn reached(callers: &mut Callers<'_>, call: &Call, times: usize) -> Result<BTreeSet<String>> {
    (0..times).map(|_| callers.dial(call, "/")).collect()
}

fn every_answer_is_one_pod(lab: &Lab, callers: &mut Callers<'_>) -> Result<()> {
    let services = under_both(1).map(|(policy, service)| (policy, service.client_ip()));
    settle(lab, &services)?;
    for (policy, service) in &services {
        let local = BTreeSet::from([pod_name(0), pod_name(1)]);
        let all = ENDPOINTS.map(pod_name).into();
        let expected = if *policy == Policy::Local { &local } else { &all };
        let mut by_outsiders = BTreeSet::new();
        let outside = (100..).step_by(100).zip(calls(service));
        for (first, call) in outside.filter(|(_, call)| matches!(call.who, Who::Outside(_))) {
            let pods = pods_of_clients(lab, &call, first)?;
            let is_external = call.door != Door::Of(Frontend::ClusterIp);
            by_outsiders.extend(pods.into_iter().filter(|_| is_external));
        }
        ensure!(by_outsiders == *expected, "clients outside reach {by_outsiders:?} under {policy:?}");
        for who in [Who::Pod(BYSTANDER), Who::Node] {
            for family in Family::BOTH {
                let mut pods = BTreeSet::new();
                let ours = |call: &Call| call.who == who && call.family() == family;
                for call in calls(service).iter().filter(|call| ours(call)) {
                    pods.extend(reached(callers, call, CONFIRMATIONS)?);
                }
                ensure!(pods.len() == 1, "{who:?} reaches {pods:?} by {family} under {policy:?}");
            }
        }
    }
    Ok(())
}

/// Several external clients, each with as many connections as confirm a pin: their pods.
fn pods_of_clients(lab: &Lab, call: &Call, first: u32) -> Result<BTreeSet<String>> {
    let client = lab.client();
    let clients: Vec<u32> = (first..first + CLIENTS).collect();
    let answers = client.in_parallel(&clients, |number| {
        let from = call.family().client(*number);
        let ask = |_| client.open(call.protocol, from, call.to)?.ask_last("/");
        (0..CONFIRMATIONS).map(ask).collect::<io::Result<BTreeSet<String>>>()
    })?;
    for (number, pods) in clients.iter().zip(&answers) {
        ensure!(pods.len() == 1, "client {number} reaches {pods:?} by {call:?}");
    }
    Ok(answers.into_iter().flatten().collect())
}

fn affinity_is_switched_on_a_live_service(lab: &Lab, callers: &mut Callers<'_>) -> Result<()> {
    let plain = under_both(3);
    let pinned = plain.clone().map(|(policy, service)| (policy, service.client_ip()));
    for services in [&plain, &pinned, &plain] {
        settle(lab, services)?;
        for (_, service) in services {
            let wants_one = service.affinity_timeout_s().is_some();
            for call in calls(service) {
                eventually(&format!("{call:?} reaches one pod: {wants_one}"), SYNC_PATIENCE, || {
                    Ok((reached(callers, &call, CONFIRMATIONS)?.len() == 1) == wants_one)
                })?;
            }
        }
    }
    Ok(())
}

fn a_pin_expires_and_the_next_connection_may_go_elsewhere(lab: &Lab, callers: &mut Callers<'_>) -> Result<()> {
    let services = under_both(5).map(|(policy, service)| (policy, service.client_ip_for(timeout_s(1))));
    settle(lab, &services)?;
    let mut met: Vec<(Call, BTreeSet<String>)> = Vec::new();
    for call in services.iter().flat_map(|(_, service)| calls(service)) {
        let pods = reached(callers, &call, CONFIRMATIONS)?;
        ensure!(pods.len() == 1, "sticky at first: {pods:?} by {call:?}");
        met.push((call, BTreeSet::new()));
    }
    for _ in 0..20 {
        // The timeout must pass without a connection.
        sleep(patience(Duration::from_millis(1150)));
        for (call, pods) in &mut met {
            pods.insert(callers.dial(call, "/")?);
        }
        if met.iter().all(|(_, pods)| pods.len() > 1) {
            return Ok(());
        }
    }
    let stuck: Vec<_> = met.iter().filter(|(_, pods)| pods.len() == 1).collect();
    ensure!(stuck.is_empty(), "always the same: {stuck:?}");
    Ok(())
}

fn the_node_port_on_loopback_is_the_nodes_own(lab: &Lab, callers: &mut Callers<'_>) -> Result<()> {
    let service = web(7, Policy::Cluster);
    lab.publish_and_settle(&service)?;
    let mut in_pod = callers.scene().process_in_pod(BYSTANDER, PROCESS)?;
    for call in Protocol::BOTH.iter().flat_map(|of| Call::all(&service, &[(Who::Node, Door::Localhost)], *of)) {
        let all = ENDPOINTS.map(pod_name).into();
        eventually(&format!("{call:?} reaches {all:?}"), SYNC_PATIENCE, || {
            Ok(reached(callers, &call, CONFIRMATIONS)? == all)
        })?;
        // A pod's loopback is its own: there is no listener.
        let (socket, answer) = in_pod.connect(call.protocol, call.to)?;
        let answer = answer.and(in_pod.ask(socket, "/")?);
        ensure!(answer == Err("ConnectionRefused".to_owned()), "a pod reached its own {}: {answer:?}", call.to);
    }
    Ok(())
}

/// Hints are the control plane's result of `trafficDistribution`.
fn hints_narrow_what_connections_reach(lab: &Lab, callers: &mut Callers<'_>) -> Result<()> {
    let all = web(8, Policy::Cluster);
    let near = all
        .clone()
        .hinted_for_node(0, NODE_NAME)
        .hinted_for_node(1, NODE_B_NAME)
        .hinted_for_node(FIRST_OF_B, NODE_B_NAME);
    let unsaid = near.clone().endpoint(1, EndpointState::Ready);
    for (service, expected) in [(&near, &[0][..]), (&unsaid, &ENDPOINTS), (&near, &[0])] {
        lab.publish(service)?;
        let expected: BTreeSet<String> = expected.iter().map(|pod| pod_name(*pod)).collect();
        for call in calls(service) {
            eventually(&format!("{call:?} reaches {expected:?}"), SYNC_PATIENCE, || {
                Ok(reached(callers, &call, 2 * CONFIRMATIONS).is_ok_and(|pods| pods == expected))
            })?;
        }
    }
    Ok(())
}
