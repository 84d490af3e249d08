//! SCTP on a cluster of two nodes, with hand-made packets: associations with pods of both nodes through every frontend that
//! changes no port. The addresses are translated; the ports and the checksum do not change.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use affinity_tests::in_every_way;
use affinity_tests::lab::{
    Association, Client, FIRST_OF_B, Family, Frontend, Policy, Protocol, Service, eventually, pod_name,
};
use affinity_tests::proxy::{Proxy, Scene};
use anyhow::{Context, Result, ensure};

/// Endpoints: two on node A, one on node B.
const ENDPOINTS: [usize; 3] = [0, 1, FIRST_OF_B];
/// A pod of node A that is no endpoint.
const BYSTANDER: usize = 2;
/// The port of pods, of their services, and of the nodes: it cannot be translated.
const PORT: u16 = 30_132;
/// Associations of one client, one after another.
const TIMES: u16 = 5;
const CLIENTS: u32 = 20;
const SYNC_PATIENCE: Duration = Duration::from_secs(10);
const SHORT_PATIENCE: Duration = Duration::from_millis(400);

/// A service with client-IP affinity and every frontend.
fn service(number: u16, port: u16, node_port: u16) -> Service {
    Service::new(&format!("peers-{number}"), number)
        .udp("peer", port, PORT)
        .node_ports(node_port)
        .load_balancer()
        .client_ip()
        .on(ENDPOINTS)
}

/// The YAML supports SCTP; the lab's services do not.
fn publish(scene: &Scene, service: &Service) -> Result<()> {
    let yaml = service.to_yaml().replace("protocol: UDP", "protocol: SCTP");
    scene.lab().publish_text(&format!("{}.yaml", service.name()), &yaml)
}

/// All associations of one client: each from a separate port.
fn associations(client: &Client, from: IpAddr, first_port: u16, to: SocketAddr) -> Result<BTreeSet<Association>> {
    let begin = |port| client.associate(SocketAddr::new(from, port), to).with_context(|| format!("{from} to {to}"));
    (first_port..first_port + TIMES).map(begin).collect()
}

fn address(service: &Service, frontend: Frontend, family: Family) -> Result<SocketAddr> {
    service.address(frontend, family, Protocol::Udp).context("it has every frontend")
}

in_every_way!(associations_reach_one_pod);

fn associations_reach_one_pod(proxy: Proxy) -> Result<()> {
    let scene = proxy.start(&[])?;
    let lab = scene.lab();
    let _servers = ENDPOINTS.iter().map(|pod| lab.serve_sctp(*pod)).collect::<Result<Vec<_>>>()?;
    let (wide, local) = (service(1, PORT, PORT), service(2, PORT, PORT + 1).external(Policy::Local));
    [&wide, &local].into_iter().try_for_each(|service| publish(&scene, service))?;
    let told = || -> Result<()> {
        clients_outside_are_pinned(&scene, &wide, &local)?;
        a_pod_is_pinned_and_seen(&scene, &wide)?;
        where_a_port_would_change_nobody_is_served(&scene)
    };
    told().with_context(|| scene.log())
}

fn clients_outside_are_pinned(scene: &Scene, wide: &Service, local: &Service) -> Result<()> {
    let client = scene.lab().client();
    let frontends = [
        (wide, Frontend::ClusterIp, &ENDPOINTS[..]),
        (wide, Frontend::NodePort, &ENDPOINTS),
        (wide, Frontend::LoadBalancer, &ENDPOINTS),
        (local, Frontend::LoadBalancer, &ENDPOINTS[..2]),
    ];
    for (first, (service, frontend, pods)) in (0..).step_by(CLIENTS as usize).zip(frontends) {
        for family in Family::BOTH {
            let to = address(service, frontend, family)?;
            let quick = client.clone().with_patience(SHORT_PATIENCE);
            // A client cannot use one port for two frontends of one pod: the replies would be ambiguous.
            let probe = SocketAddr::new(family.client(1_000), 10_000 + first as u16);
            eventually(&format!("{to} is served"), SYNC_PATIENCE, || Ok(quick.associate(probe, to).is_ok()))?;
            let mut reached = BTreeSet::new();
            for number in first..first + CLIENTS {
                let from = family.client(number);
                // Masquerading keeps the port, so no two clients may use the same one.
                let met = associations(&client, from, 20_000 + TIMES * number as u16, to)?;
                ensure!(met.len() == 1, "{from} reached {met:?} by {to}");
                let is_masqueraded = service.name() == wide.name();
                let is_expected = |seen: &IpAddr| match is_masqueraded {
                    true => family.node_addresses().contains(seen),
                    false => *seen == from,
                };
                ensure!(met.iter().all(|met| is_expected(&met.client)), "{from} was seen otherwise: {met:?}");
                reached.extend(met.into_iter().map(|met| met.pod));
            }
            let expected: BTreeSet<String> = pods.iter().map(|pod| pod_name(*pod)).collect();
            ensure!(reached.is_subset(&expected) && reached.len() > 1, "{reached:?} by {to}, of {expected:?}");
        }
    }
    Ok(())
}

fn a_pod_is_pinned_and_seen(scene: &Scene, wide: &Service) -> Result<()> {
    let client = scene.lab().pod_client(BYSTANDER);
    for family in Family::BOTH {
        let from = family.pod(BYSTANDER);
        let met = associations(&client, from, 20_000, address(wide, Frontend::ClusterIp, family)?)?;
        ensure!(met.len() == 1 && met.iter().all(|met| met.client == from), "{from} met {met:?}");
    }
    Ok(())
}

/// Also, the owner gets a message.
fn where_a_port_would_change_nobody_is_served(scene: &Scene) -> Result<()> {
    let other = service(3, PORT + 10, PORT + 2);
    publish(scene, &other)?;
    eventually("the owner is told", SYNC_PATIENCE, || {
        Ok(scene.log().contains("default/peers-3: spec.ports[0]: endpoints do not serve port 30134 itself"))
    })?;
    let client = scene.lab().client().with_patience(SHORT_PATIENCE);
    for family in Family::BOTH {
        let from = SocketAddr::new(family.client(2_000), 10_000);
        let answer = client.associate(from, address(&other, Frontend::ClusterIp, family)?);
        let kind = answer.map_err(|error| error.kind());
        ensure!(kind == Err(ErrorKind::TimedOut), "{kind:?}");
    }
    Ok(())
}
