//! All pods of a service are replaced, one after another, under the load of clients with new connections, with kept ones,
//! and with datagrams: no request is without an answer.

use std::time::Duration;

use affinity_tests::lab::{EndpointState, Family, Lab, Load, Options, Protocol, Service, eventually};
use affinity_tests::story::{Hook, Route, report, tell_in, web};
use anyhow::{Result, ensure};

/// Pods of the service, and as many that replace them.
const PODS: usize = 3;
/// Clients of each route, for the load.
const CLIENTS: u32 = 30;
/// Clients that have a datagram socket and speak when they are asked to, beyond those of the load.
const WITNESSES: std::ops::Range<u32> = 200..240;
/// How long a pod's clients may take to leave it, when it has asked them to.
const DRAIN_PATIENCE: Duration = Duration::from_secs(20);

/// As a Deployment does: the new pod is ready, the old one gets no new clients, then ends its connections and goes.
fn replace(lab: &mut Lab, service: Service, old: usize, loads: &[Load]) -> Result<Service> {
    let service = service.endpoint(old + PODS, EndpointState::Ready);
    lab.publish_and_settle(&service)?;
    let mut witnesses = Vec::new();
    for family in Family::BOTH {
        let to = service.frontend(family, "dns");
        for number in WITNESSES {
            let mut socket = lab.client().connect(Protocol::Udp, family.client(number), to)?;
            socket.ask("/")?;
            witnesses.push(socket);
        }
    }
    loads.iter().try_for_each(|load| load.wait_for(200))?;

    let service = service.endpoint(old, EndpointState::Terminating);
    lab.publish_and_settle(&service)?;
    let gone = affinity_tests::lab::pod_name(old);
    for socket in &mut witnesses {
        ensure!(socket.ask("/")? != gone, "the first datagram after the update went to {gone}");
    }
    lab.pods()[old].drain();
    eventually(&format!("{gone} has no connection left"), DRAIN_PATIENCE, || Ok(lab.pods()[old].connections() == 0))?;
    lab.kill_pod(old)?;
    loads.iter().try_for_each(|load| load.wait_for(200))?;

    let service = service.without(old);
    lab.publish_and_settle(&service)?;
    Ok(service)
}

fn no_request_fails(hook: Hook, first: &Service) -> Result<()> {
    let options = Options { pods: 2 * PODS, ..Options::default() };
    tell_in(&options, &hook.args(), &[first], |lab, _| {
        let loads = Route::all_to(first).map(|route| {
            let first = if route.protocol == Protocol::Tcp { 0 } else { 1_000 };
            (route, Load::start(&lab.client(), route.protocol, first..first + CLIENTS, route.to))
        });
        let (routes, loads): (Vec<Route>, Vec<Load>) = loads.into_iter().unzip();
        loads.iter().try_for_each(|load| load.wait_for(200))?;
        (0..PODS).try_fold(first.clone(), |service, old| replace(lab, service, old, &loads))?;
        loads.iter().try_for_each(|load| load.wait_for(200))?;
        for (route, load) in routes.iter().zip(loads) {
            let told = load.stop()?;
            report(&format!(
                "{hook:?}, {} {}: {} requests, {} failed, {} broken; {} connections ended by their pod, {} moves to another pod",
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
    Hook::ALL.into_iter().try_for_each(|hook| no_request_fails(hook, &web().client_ip()))
}

#[test]
fn a_rolling_update_fails_no_request_without_affinity() -> Result<()> {
    Hook::ALL.into_iter().try_for_each(|hook| no_request_fails(hook, &web()))
}
