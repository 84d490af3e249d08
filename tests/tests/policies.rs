//! Which clients reach which pods on a cluster of two nodes, and which address a pod sees: traffic policies, masquerading,
//! hairpins and source ranges, with real sockets, over every kind of frontend, both families and TCP and UDP. The scenarios run
//! with TC. `differential` shows that kube-proxy's rules behave the same.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use affinity_tests::lab::{EndpointState, FIRST_OF_B, Family, Frontend, Policy, Protocol, Service, SocketProcess};
use affinity_tests::proxy::{Failure, Met, Proxy, Scene, Seen, meet, meet_from_node};
use anyhow::{Context, Result, ensure};

const PROCESS: &str = env!("CARGO_BIN_EXE_socket_process");
/// How often each client asks if the result should always be the same.
const TIMES_ALONE: u32 = 4;
/// How often it asks otherwise: with three pods, one of them is missed once in 6,000 times.
const TIMES: u32 = 24;
/// How long a client waits.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a client waits if it expects no answer.
const SHORT_PATIENCE: Duration = Duration::from_millis(400);
/// All frontends that the external policy applies to.
const EXTERNAL: [Frontend; 4] =
    [Frontend::NodePort, Frontend::NodePortInside, Frontend::LoadBalancer, Frontend::ExternalIp];
/// An endpoint on node A.
const A: usize = 0;
/// An endpoint on node B.
const B: usize = FIRST_OF_B;
/// A pod of node A that is no endpoint.
const BYSTANDER: usize = 2;

/// The client.
#[derive(Clone, Copy, Debug)]
enum From {
    /// External clients, by the number of the first.
    Outside(u32),
    /// The pod with this index.
    Pod(usize),
    /// A process on node A.
    Node,
}

/// A service with every frontend. The scenario chooses everything else.
fn web(number: u16) -> Service {
    Service::new(&format!("web-{number}"), number)
        .tcp("http", 80, 8080)
        .udp("dns", 53, 5353)
        .node_ports(30_000 + 2 * number)
        .load_balancer()
        .external_ips()
}

/// A cluster with a working proxy, and a process on node A.
struct Cluster<'a> {
    scene: &'a Scene,
    on_node: SocketProcess,
}

impl Cluster<'_> {
    /// All results of this source at a frontend of a service over one protocol; the expected results determine how often it
    /// asks.
    fn meets(
        &mut self,
        who: From,
        to: SocketAddr,
        protocol: Protocol,
        expected: &BTreeSet<Met>,
    ) -> Result<BTreeSet<Met>> {
        let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
        let times = match expected.len() {
            1 if expected.contains(&Err(Failure::Silence)) => 1,
            1 => TIMES_ALONE,
            _ => TIMES,
        };
        let is_silent = expected.contains(&Err(Failure::Silence));
        let patience = if is_silent { SHORT_PATIENCE } else { PATIENCE };
        let turns: Vec<u32> = (0..times).collect();
        let lab = self.scene.lab();
        let met = match who {
            From::Node => return turns.iter().map(|_| meet_from_node(&mut self.on_node, protocol, to)).collect(),
            From::Outside(first) => {
                let client = lab.client().with_patience(patience);
                client.in_parallel(&turns, |turn| Ok(meet(&client, family.client(first + turn), protocol, to)))
            }
            From::Pod(pod) => {
                let client = lab.pod_client(pod).with_patience(patience);
                client.in_parallel(&turns, |_| Ok(meet(&client, family.pod(pod), protocol, to)))
            }
        };
        Ok(met.with_context(|| format!("{who:?}"))?.into_iter().collect())
    }

    /// Fails unless these are exactly the source's results at these frontends, in both families and over both protocols.
    fn expect(&mut self, who: From, service: &Service, frontends: &[Frontend], expected: &[Met]) -> Result<()> {
        let expected: BTreeSet<Met> = expected.iter().cloned().collect();
        let is_silent = expected.contains(&Err(Failure::Silence));
        for frontend in frontends {
            for (family, protocol) in Family::BOTH.into_iter().flat_map(|family| Protocol::BOTH.map(|of| (family, of)))
            {
                let to = service.address(*frontend, family, protocol).context("it has every frontend")?;
                let met = self.meets(who, to, protocol, &expected)?;
                // A process on the node gets an immediate error from `connect()` where others wait in vain.
                let is_told = matches!(who, From::Node) && is_silent && met == BTreeSet::from(REFUSED);
                ensure!(
                    met == expected || is_told,
                    "{who:?} at {frontend:?} {to} {protocol}: {met:?}, not {expected:?}"
                );
            }
        }
        Ok(())
    }
}

/// Runs a scenario with these services.
fn tell(services: &[&Service], story: impl Fn(&mut Cluster<'_>) -> Result<()>) -> Result<()> {
    let services: Vec<Service> = services.iter().map(|service| (*service).clone()).collect();
    let scene = Proxy::Tc.start(&services)?;
    let on_node = scene.process_on_node(PROCESS)?;
    story(&mut Cluster { scene: &scene, on_node }).with_context(|| scene.log())
}

/// These pods, which all see this kind of address.
fn pods(indices: &[usize], seen: Seen) -> Vec<Met> {
    indices.iter().map(|pod| Ok((*pod, seen))).collect()
}

const NO_ANSWER: [Met; 1] = [Err(Failure::Silence)];
const REFUSED: [Met; 1] = [Err(Failure::Refused)];

#[test]
fn under_cluster_external_traffic_is_masqueraded_to_local_and_remote_pods() -> Result<()> {
    let web = web(1).on([A, B]);
    tell(&[&web], |cluster| {
        let anybody = [From::Outside(0), From::Pod(BYSTANDER), From::Pod(FIRST_OF_B + 2), From::Node];
        anybody.into_iter().try_for_each(|who| cluster.expect(who, &web, &EXTERNAL, &pods(&[A, B], Seen::Node)))
    })
}

#[test]
fn a_cluster_ip_keeps_the_source_of_pods_only() -> Result<()> {
    let web = web(1).on([A, B]);
    tell(&[&web], |cluster| {
        let frontend = [Frontend::ClusterIp];
        cluster.expect(From::Pod(BYSTANDER), &web, &frontend, &pods(&[A, B], Seen::Client))?;
        cluster.expect(From::Outside(0), &web, &frontend, &pods(&[A, B], Seen::Node))?;
        cluster.expect(From::Node, &web, &frontend, &pods(&[A, B], Seen::Node))
    })
}

#[test]
fn under_external_local_the_client_is_seen_and_pods_and_the_node_use_all_pods() -> Result<()> {
    let web = web(1).on([A, 1, B]).external(Policy::Local);
    tell(&[&web], |cluster| {
        cluster.expect(From::Outside(0), &web, &EXTERNAL, &pods(&[A, 1], Seen::Client))?;
        cluster.expect(From::Pod(BYSTANDER), &web, &EXTERNAL, &pods(&[A, 1, B], Seen::Client))?;
        cluster.expect(From::Node, &web, &EXTERNAL, &pods(&[A, 1, B], Seen::Node))
    })
}

#[test]
fn under_external_local_without_a_local_pod_nobody_outside_gets_an_answer() -> Result<()> {
    let (remote, nowhere) = (web(1).on([B]).external(Policy::Local), web(2).external(Policy::Local));
    tell(&[&remote, &nowhere], |cluster| {
        cluster.expect(From::Outside(0), &remote, &EXTERNAL, &NO_ANSWER)?;
        cluster.expect(From::Pod(BYSTANDER), &remote, &EXTERNAL, &pods(&[B], Seen::Client))?;
        let of_node = [Frontend::NodePort, Frontend::NodePortInside];
        cluster.expect(From::Node, &remote, &of_node, &pods(&[B], Seen::Node))?;
        cluster.expect(From::Outside(0), &remote, &[Frontend::ClusterIp], &pods(&[B], Seen::Node))?;
        cluster.expect(From::Outside(0), &nowhere, &Frontend::ALL, &REFUSED)?;
        cluster.expect(From::Pod(BYSTANDER), &nowhere, &Frontend::ALL, &REFUSED)
    })
}

#[test]
fn a_pod_reaches_itself_by_every_frontend() -> Result<()> {
    let (cluster_wide, local) = (web(1).on([A]), web(2).on([A]).external(Policy::Local).internal(Policy::Local));
    tell(&[&cluster_wide, &local], |cluster| {
        for service in [&cluster_wide, &local] {
            cluster.expect(From::Pod(A), service, &Frontend::ALL, &pods(&[A], Seen::Node))?;
        }
        Ok(())
    })
}

#[test]
fn under_internal_local_a_cluster_ip_has_the_pods_of_the_node() -> Result<()> {
    let here = web(1).on([A, 1, B]).internal(Policy::Local);
    let (elsewhere, nowhere) = (web(2).on([B]).internal(Policy::Local), web(3).internal(Policy::Local));
    let frontend = [Frontend::ClusterIp];
    tell(&[&here, &elsewhere, &nowhere], |cluster| {
        cluster.expect(From::Pod(BYSTANDER), &here, &frontend, &pods(&[A, 1], Seen::Client))?;
        cluster.expect(From::Node, &here, &frontend, &pods(&[A, 1], Seen::Node))?;
        for who in [From::Pod(BYSTANDER), From::Node] {
            cluster.expect(who, &elsewhere, &frontend, &NO_ANSWER)?;
        }
        cluster.expect(From::Pod(BYSTANDER), &nowhere, &frontend, &REFUSED)?;
        cluster.expect(From::Outside(0), &elsewhere, &EXTERNAL, &pods(&[B], Seen::Node))
    })
}

#[test]
fn terminating_pods_are_used_by_the_pool_that_has_no_other() -> Result<()> {
    let ends = EndpointState::Terminating;
    let local = web(1).on([B]).endpoint(A, ends).endpoint(1, EndpointState::NotReady).external(Policy::Local);
    let both = web(2).endpoint(A, ends).endpoint(B, ends).endpoint(1, EndpointState::NotReady);
    tell(&[&local, &both], |cluster| {
        cluster.expect(From::Outside(0), &local, &EXTERNAL, &pods(&[A], Seen::Client))?;
        cluster.expect(From::Pod(BYSTANDER), &local, &Frontend::ALL, &pods(&[B], Seen::Client))?;
        cluster.expect(From::Outside(0), &both, &Frontend::ALL, &pods(&[A, B], Seen::Node))
    })
}

#[test]
fn source_ranges_are_for_the_ingress_ip_alone() -> Result<()> {
    const STRANGER: u32 = 1 << 16;
    let web = web(1).on([A, B]).source_ranges(&["198.18.0.0/16", "2001:db8:c::/112"]);
    tell(&[&web], |cluster| {
        let ingress = [Frontend::LoadBalancer];
        cluster.expect(From::Outside(0), &web, &ingress, &pods(&[A, B], Seen::Node))?;
        cluster.expect(From::Outside(STRANGER), &web, &ingress, &NO_ANSWER)?;
        cluster.expect(From::Pod(BYSTANDER), &web, &ingress, &NO_ANSWER)?;
        let others = [Frontend::ClusterIp, Frontend::NodePort, Frontend::ExternalIp];
        cluster.expect(From::Outside(STRANGER), &web, &others, &pods(&[A, B], Seen::Node))
    })
}

#[test]
fn an_ingress_ip_of_mode_proxy_is_left_to_the_load_balancer() -> Result<()> {
    let web = web(1).on([A, B]).load_balancer_proxy();
    tell(&[&web], |cluster| {
        cluster.expect(From::Outside(0), &web, &[Frontend::LoadBalancer], &NO_ANSWER)?;
        cluster.expect(From::Pod(BYSTANDER), &web, &[Frontend::LoadBalancer], &NO_ANSWER)?;
        cluster.expect(From::Outside(0), &web, &[Frontend::NodePort], &pods(&[A, B], Seen::Node))
    })
}

#[test]
fn a_client_meets_one_pod_over_all_frontends() -> Result<()> {
    let (wide, local) = (web(1).on([A, 1, B]).client_ip(), web(2).on([A, 1, B]).external(Policy::Local).client_ip());
    tell(&[&wide, &local], |cluster| {
        for (service, family) in [&wide, &local].into_iter().flat_map(|service| Family::BOTH.map(|of| (service, of))) {
            for client in 0..5 {
                let mut met = BTreeSet::new();
                // The external frontends first: under Local their pool is the smaller one.
                for frontend in Frontend::ALL.into_iter().rev() {
                    let to = service.address(frontend, family, Protocol::Tcp).context("it has every frontend")?;
                    let outside = cluster.scene.lab().client();
                    for _ in 0..4 {
                        let from = family.client(client);
                        let said = outside.in_parallel(&[()], |()| Ok(meet(&outside, from, Protocol::Tcp, to)))?;
                        met.extend(said.into_iter().map(|met| met.map(|(pod, _)| pod)));
                    }
                }
                ensure!(
                    met.len() == 1 && met.iter().all(Result::is_ok),
                    "{}, client {client}: {met:?}",
                    service.name()
                );
            }
        }
        Ok(())
    })
}
