//! All pods of a service are replaced, one after another, under the load of clients with new connections, with kept ones, and
//! with datagrams: every request gets an answer.

use std::collections::BTreeSet;
use std::time::Duration;

use affinity_tests::lab::{
    EndpointState, Explanation, Family, Frontend, Lab, Load, Options, Policy, Protocol, Service, eventually, pod_name,
};
use affinity_tests::story::{Hook, Route, report, tell_in, web};
use anyhow::{Context, Result, ensure};

/// Pods of the service, and as many that replace them.
const PODS: usize = 3;
/// Clients of each route, for the load.
const CLIENTS: u32 = 30;
/// Clients that have a datagram socket and send on request, in addition to those of the load.
const WITNESSES: std::ops::Range<u32> = 200..240;
/// A client that never connects, so no pin restricts its candidates.
const NEVER_DIALS: u32 = 30_000;
/// How long a change of the YAML may take until new connections meet it.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);
/// How long a pod's clients may take to leave it after it has announced its end.
const DRAIN_PATIENCE: Duration = Duration::from_secs(20);

/// A load of clients on each route.
struct Loads {
    routes: Vec<Route>,
    loads: Vec<Load>,
}

impl Loads {
    /// One for each family and protocol, to this kind of address.
    fn start(lab: &Lab, service: &Service, frontend: Frontend) -> Result<Self> {
        let mut routes = Vec::new();
        for family in Family::BOTH {
            for protocol in Protocol::BOTH {
                let to = service.address(frontend, family, protocol).context("the service has no such address")?;
                routes.push(Route { family, protocol, to });
            }
        }
        let load = |route: &Route| {
            let first = if route.protocol == Protocol::Tcp { 0 } else { 1_000 };
            Load::start(&lab.client(), route.protocol, first..first + CLIENTS, route.to)
        };
        let loads = routes.iter().map(load).collect();
        Ok(Self { routes, loads })
    }

    fn go_on(&self) -> Result<()> {
        self.loads.iter().try_for_each(|load| load.wait_for(200))
    }

    /// Publishes a change, and waits until each route leads only to the ready pods.
    fn publish(&self, lab: &Lab, service: &Service) -> Result<()> {
        lab.publish_and_settle(service)?;
        let ready: BTreeSet<String> = service.ready_pods().map(pod_name).collect();
        Family::BOTH.into_iter().try_for_each(|family| {
            let routes = self.routes.iter().filter(|route| route.family == family);
            let to: Vec<_> = routes.map(|route| (route.protocol, route.to)).collect();
            eventually(&format!("{to:?} lead to {ready:?}"), SYNC_PATIENCE, || {
                let said = lab.explain_each(family.client(NEVER_DIALS), &to)?;
                let names = |said: Explanation| said.candidates.into_iter().map(|pod| pod.name).collect();
                Ok(said.into_iter().map(names).all(|names: BTreeSet<_>| names == ready))
            })
        })?;
        // Members are demoted only after the slots have changed and all readers of the old ones are done.
        eventually(&format!("{ready:?} alone are ready members"), SYNC_PATIENCE, || {
            let members = lab.affinity(&["dump", "members"])?;
            let is_right = |line: &str| ready.iter().any(|pod| line.contains(&format!("/{pod} ")));
            Ok(members.lines().filter(|line| line.contains("state=ready")).all(is_right))
        })
    }
}

/// As a Deployment does: the new pod is ready; the old one gets no new clients, then ends its connections and goes.
fn replace(lab: &mut Lab, service: Service, old: usize, loads: &Loads) -> Result<Service> {
    let service = service.endpoint(old + PODS, EndpointState::Ready);
    loads.publish(lab, &service)?;
    let mut witnesses = Vec::new();
    for route in loads.routes.iter().filter(|route| route.protocol == Protocol::Udp) {
        for number in WITNESSES {
            let mut socket = lab.client().connect(Protocol::Udp, route.client(number), route.to)?;
            socket.ask("/")?;
            witnesses.push(socket);
        }
    }
    loads.go_on()?;

    let service = service.endpoint(old, EndpointState::Terminating);
    loads.publish(lab, &service)?;
    let gone = pod_name(old);
    for socket in &mut witnesses {
        ensure!(socket.ask("/")? != gone, "the first datagram after the update went to {gone}");
    }
    lab.pods()[old].drain();
    eventually(&format!("{gone} has no connection left"), DRAIN_PATIENCE, || Ok(lab.pods()[old].connections() == 0))?;
    lab.kill_pod(old)?;
    loads.go_on()?;

    let service = service.without(old);
    loads.publish(lab, &service)?;
    Ok(service)
}

fn no_request_fails(hook: Hook, first: &Service, frontend: Frontend) -> Result<()> {
    let options = Options { pods: 2 * PODS, ..Options::default() };
    tell_in(&options, &hook.args(), &[first], |lab, _| {
        let loads = Loads::start(lab, first, frontend)?;
        loads.go_on()?;
        (0..PODS).try_fold(first.clone(), |service, old| replace(lab, service, old, &loads))?;
        loads.go_on()?;
        for (route, load) in loads.routes.iter().zip(loads.loads) {
            let told = load.stop()?;
            report(&format!(
                "{hook:?}, {frontend:?}, {} {}: {} requests, {} failed, {} broken; {} connections ended by their pod, \
                 {} moves to another pod",
                route.family, route.protocol, told.requests, told.failed, told.broken, told.handed_over, told.moved
            ));
            told.answered()?;
            ensure!(told.pods.len() == 2 * PODS, "not every pod was asked: {told:?}");
            match route.protocol {
                Protocol::Tcp => ensure!(told.switched == 0 && told.handed_over >= u64::from(CLIENTS), "{told:?}"),
                Protocol::Udp => ensure!(told.switched > 0, "{told:?}"),
            }
        }
        Ok(())
    })
}

#[test]
fn a_rolling_update_fails_no_request_of_pinned_clients() -> Result<()> {
    Hook::ALL.into_iter().try_for_each(|hook| no_request_fails(hook, &web().client_ip(), Frontend::ClusterIp))
}

#[test]
fn a_rolling_update_fails_no_request_without_affinity() -> Result<()> {
    Hook::ALL.into_iter().try_for_each(|hook| no_request_fails(hook, &web(), Frontend::ClusterIp))
}

#[test]
fn a_rolling_update_fails_no_request_to_node_ports() -> Result<()> {
    for policy in Policy::BOTH {
        let web = web().client_ip().node_ports(30_080).external(policy);
        for hook in [Hook::XdpNative, Hook::Tc] {
            no_request_fails(hook, &web, Frontend::NodePort).with_context(|| format!("{policy:?}"))?;
        }
    }
    Ok(())
}
