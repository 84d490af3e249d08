//! Client-IP affinity at node ports and load balancers, under both policies, with real sockets: Kubernetes' own tests of it.
//! Each scenario holds for XDP in the driver and TC; for IPv4 and IPv6; for TCP and UDP. Also the cases that depend on the
//! node: its addresses, and its local endpoints.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::sleep;
use std::time::Duration;

use affinity_tests::lab::{
    EndpointState, FIRST_OF_B, Family, Frontend, Lab, Options, Policy, Protocol, Service, WIRE, eventually,
};
use affinity_tests::on_every_hook;
use affinity_tests::patience::{patience, timeout_s};
use affinity_tests::story::{Hook, Route, tell, tell_in, web};
use anyhow::{Context, Result, ensure};

/// How many equal answers in a row confirm that a client is pinned.
const CONFIRMATIONS: usize = 15;
/// How long a change of the YAML, or of the node, may take until new connections meet it.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);
/// The port for health checks of load balancers.
const HEALTH_PORT: u16 = 32_000;

on_every_hook! {
    ten_dials_reach_one_backend,
    affinity_is_switched_on_a_live_service,
    a_pin_expires_and_the_next_connection_may_go_elsewhere,
    all_frontends_of_a_service_share_the_pin,
}

/// A service at node ports and a load balancer, on three pods of this node.
fn exposed(policy: Policy) -> Service {
    web().node_ports(30_080).load_balancer().external(policy)
}

/// All routes to a kind of frontend.
fn routes(service: &Service, frontend: Frontend) -> Vec<Route> {
    let mut routes = Vec::new();
    for family in [Family::V4, Family::V6] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let to = service.address(frontend, family, protocol).expect("the service has such a frontend");
            routes.push(Route { family, protocol, to });
        }
    }
    routes
}

/// All routes to the frontends of a scenario.
fn external(service: &Service) -> Vec<Route> {
    [Frontend::NodePort, Frontend::LoadBalancer].iter().flat_map(|frontend| routes(service, *frontend)).collect()
}

fn ten_dials_reach_one_backend(hook: Hook) -> Result<()> {
    for policy in Policy::BOTH {
        let service = exposed(policy).client_ip();
        tell(hook, &[&service], |lab, _| {
            for route in external(&service) {
                let mut reached = BTreeSet::new();
                for client in 0..12 {
                    let answers: BTreeSet<String> = route.dial(lab, client, 10)?.into_iter().collect();
                    assert_eq!(answers.len(), 1, "{} by {route:?} under {policy:?}", route.client(client));
                    reached.extend(answers);
                }
                assert!(reached.len() >= 2, "clients are spread: {reached:?} by {route:?} under {policy:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn affinity_is_switched_on_a_live_service(hook: Hook) -> Result<()> {
    for policy in Policy::BOTH {
        let plain = exposed(policy);
        tell(hook, &[&plain], |lab, _| {
            let pinned = plain.clone().client_ip();
            for (number, service) in [&plain, &pinned, &plain].into_iter().enumerate() {
                lab.publish(service)?;
                let wants_one = service.affinity_timeout_s().is_some();
                for (way, route) in external(service).iter().enumerate() {
                    // A datagram from a port that was used before belongs to the flow that was there before.
                    let client = (10 * number + way) as u32;
                    let what = format!("answers of {} by {route:?}", if wants_one { "one pod" } else { "several" });
                    eventually(&what, SYNC_PATIENCE, || {
                        let pods: BTreeSet<String> = route.dial(lab, client, CONFIRMATIONS)?.into_iter().collect();
                        Ok((pods.len() == 1) == wants_one)
                    })?;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn a_pin_expires_and_the_next_connection_may_go_elsewhere(hook: Hook) -> Result<()> {
    for policy in Policy::BOTH {
        let service = exposed(policy).client_ip_for(timeout_s(1));
        tell(hook, &[&service], |lab, _| {
            let routes = external(&service);
            let mut reached = vec![BTreeSet::new(); routes.len()];
            for ((client, route), reached) in (1..).zip(&routes).zip(&mut reached) {
                reached.extend(route.dial(lab, client, CONFIRMATIONS)?);
                assert_eq!(reached.len(), 1, "sticky at first, by {route:?} under {policy:?}");
            }
            for _ in 0..15 {
                // The timeout must pass without a connection.
                sleep(patience(Duration::from_millis(1150)));
                for ((client, route), reached) in (1..).zip(&routes).zip(&mut reached) {
                    reached.extend(route.dial(lab, client, 1)?);
                }
                if reached.iter().all(|pods| pods.len() > 1) {
                    break;
                }
            }
            for (route, reached) in routes.iter().zip(reached) {
                assert!(reached.len() >= 2, "always {reached:?} by {route:?} under {policy:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn all_frontends_of_a_service_share_the_pin(hook: Hook) -> Result<()> {
    let service = exposed(Policy::Cluster).external_ips().client_ip();
    tell(hook, &[&service], |lab, _| {
        for (family, client) in [Family::V4, Family::V6].into_iter().flat_map(|family| (0..8).map(move |n| (family, n)))
        {
            let from = family.client(client);
            let mut reached = BTreeSet::new();
            for frontend in [Frontend::ClusterIp, Frontend::NodePort, Frontend::LoadBalancer, Frontend::ExternalIp] {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    let to = service.address(frontend, family, protocol).context("a frontend")?;
                    reached.insert(lab.client().ask(protocol, from, to).with_context(|| format!("{from} to {to}"))?);
                }
            }
            assert_eq!(reached.len(), 1, "{from}");
        }
        Ok(())
    })
}

/// Node ports are on the node's addresses, even if these change.
#[test]
fn node_ports_follow_the_addresses_of_the_node() -> Result<()> {
    let service = exposed(Policy::Cluster);
    tell(Hook::Tc, &[&service], |lab, _| {
        let dial = |lab: &Lab, to: &str| {
            let to = SocketAddr::new(to.parse()?, 30_080);
            Ok(lab
                .client()
                .with_patience(Duration::from_millis(500))
                .ask(Protocol::Tcp, Family::V4.client(1), to)
                .is_ok())
        };
        assert!(!dial(lab, "192.0.2.77")?);
        change_addresses(lab, "add")?;
        eventually("a node port at the new address", SYNC_PATIENCE, || dial(lab, "192.0.2.77"))?;
        change_addresses(lab, "del")?;
        eventually("no frontend at the old address", SYNC_PATIENCE, || {
            Ok(!lab.affinity(&["dump", "frontends_v4"])?.contains("192.0.2.77"))
        })?;
        assert!(dial(lab, "192.0.2.1")?);
        Ok(())
    })
}

fn change_addresses(lab: &Lab, what: &str) -> Result<()> {
    let status = lab.node().command("ip").args(["address", what, "192.0.2.77/24", "dev", WIRE]).status()?;
    ensure!(status.success(), "ip address {what}: {status}");
    Ok(())
}

#[test]
fn node_ports_are_at_the_addresses_that_are_chosen() -> Result<()> {
    let service = exposed(Policy::Cluster);
    let args = ["--device", WIRE, "--nodeport-addresses", "192.0.2.0/24,::1/128", "--masquerade-ports", "5000-5999"];
    tell_in(&Options::default(), &args, &[&service], |lab, _| {
        let all = lab.affinity(&["dump"])?;
        let at = |what: &str| all.lines().filter(|line| line.starts_with("frontends_") && line.contains(what)).count();
        assert_eq!((at("192.0.2.1:30080/TCP"), at("[::1]:30080/TCP"), at(":30080/TCP")), (1, 1, 2), "{all}");
        assert!(all.contains("node masquerade -> v4=192.0.2.1 v6=2001:db8::1 ports=5000-5999"), "{all}");
        Ok(())
    })
}

/// A node's answer to a load balancer: the status, and the rest.
fn ask_health(lab: &Lab, to: SocketAddr) -> io::Result<String> {
    lab.client_namespace().run(|| {
        let mut stream = TcpStream::connect_timeout(&to, patience(Duration::from_secs(2)))?;
        stream.set_read_timeout(Some(patience(Duration::from_secs(2))))?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?
}

#[test]
fn load_balancers_are_told_whether_endpoints_are_here() -> Result<()> {
    let service = exposed(Policy::Local).endpoint(FIRST_OF_B, EndpointState::Ready).health_check(HEALTH_PORT);
    tell(Hook::Tc, &[&service], |lab, _| {
        for family in [Family::V4, Family::V6] {
            let to = SocketAddr::new(family.node_addresses()[0], HEALTH_PORT);
            let becomes = |lab: &Lab, text: &str| {
                eventually(text, SYNC_PATIENCE, || Ok(ask_health(lab, to).is_ok_and(|answer| answer.contains(text))))
            };
            lab.publish(&service)?;
            becomes(lab, "HTTP/1.1 200 OK")?;
            let answer = ask_health(lab, to)?;
            let body =
                r#"{"service":{"namespace":"default","name":"web"},"localEndpoints":3,"serviceProxyHealthy":true}"#;
            assert!(answer.ends_with(body) && answer.contains("x-load-balancing-endpoint-weight: 3"), "{answer}");
            // Terminating endpoints do not count, and neither do those of other nodes.
            let leaving =
                (0..3).fold(service.clone(), |service, pod| service.endpoint(pod, EndpointState::Terminating));
            lab.publish(&leaving)?;
            becomes(lab, "HTTP/1.1 503")?;
            becomes(lab, "\"localEndpoints\":0")?;
        }
        lab.withdraw(&service)?;
        let to = SocketAddr::new(Family::V4.node_addresses()[0], HEALTH_PORT);
        eventually("nobody answers for a service that is gone", SYNC_PATIENCE, || Ok(ask_health(lab, to).is_err()))
    })
}
