//! Events of a node and its cluster: a reboot, and a control plane outage.

use std::fs;
use std::time::Duration;

use affinity_tests::apiserver::{ApiServer, Kind};
use affinity_tests::lab::{Lab, Load, NODE_NAME, Protocol, Service, eventually};
use affinity_tests::story::{Hook, Route, tell, web};
use affinity_user::store::kernel::KernelStore;
use anyhow::{Context, Result, ensure};
use serde_json::json;

/// Clients of each route.
const CLIENTS: u32 = 60;
const PATIENCE: Duration = Duration::from_secs(20);

/// The pods of all clients, by route.
fn dial_all(lab: &Lab, service: &Service) -> Result<Vec<Vec<String>>> {
    Route::all_to(service).iter().map(|route| route.dial_all(lab, 0..CLIENTS)).collect()
}

/// Pins, links, programs and maps are in the kernel, and are lost with it.
#[test]
fn after_a_reboot_the_service_goes_on_with_new_pins() -> Result<()> {
    let web = web().client_ip();
    for hook in Hook::ALL {
        tell(hook, &[&web], |lab, agent| {
            dial_all(lab, &web)?;
            let before = lab.sessions(&web, None)?;
            let map = KernelStore::open(lab.pin_dir())?.events.info().id;
            agent.kill()?;
            fs::remove_dir_all(lab.pin_dir()).context("what a reboot takes away")?;
            // The kernel frees links and programs a moment after their last name is gone, and then their maps.
            eventually("nothing is attached", PATIENCE, || Ok(!is_loaded(map)))?;

            agent.restart()?;
            ensure!(lab.sessions(&web, None)?.is_empty(), "pins have outlived the reboot");
            let first = dial_all(lab, &web)?;
            ensure!(first == dial_all(lab, &web)?, "the new pins do not hold");
            let after = lab.sessions(&web, None)?;
            assert_eq!(after.len(), before.len());
            let newest = before.iter().map(|session| &session.created).max();
            ensure!(after.iter().all(|session| Some(&session.created) > newest), "{after:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Whether the kernel still has the map with this id.
fn is_loaded(map: u32) -> bool {
    aya::maps::loaded_maps().any(|loaded| loaded.is_ok_and(|loaded| loaded.id() == map))
}

/// A lab with an agent that follows a cluster's API with this service.
fn with_cluster(
    hook: Hook,
    web: &Service,
    story: impl FnOnce(&Lab, &mut affinity_tests::lab::Agent, &mut ApiServer) -> Result<()>,
) -> Result<()> {
    let lab = Lab::with_pods(3)?;
    let mut api = ApiServer::start_in(lab.node())?;
    api.put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE_NAME}}))?;
    api.apply(&web.to_yaml())?;
    let kubeconfig = api.kubeconfig(lab.scratch())?.display().to_string();
    let source = ["--source", "kubernetes", "--kubeconfig", &kubeconfig];
    let mut agent = lab.agent_unready(&[source.as_slice(), &hook.args()].concat())?;
    agent.until_ready()?;
    let told = lab.settle(web).and_then(|()| story(&lab, &mut agent, &mut api));
    told.with_context(|| format!("the agent's log:\n{}", agent.log().join("\n")))
}

#[test]
fn while_the_api_is_away_the_dataplane_goes_on_and_then_catches_up() -> Result<()> {
    let web = web().client_ip();
    with_cluster(Hook::XdpNative, &web, |lab, _, api| {
        let before = dial_all(lab, &web)?;
        let loads = Route::all_to(&web).map(|route| {
            let first = if route.protocol == Protocol::Tcp { 1_000 } else { 2_000 };
            Load::start(&lab.client(), route.protocol, first..first + 20, route.to)
        });
        api.vanish();
        // Changes that the agent does not see: one pod fewer, and another service.
        let (fewer, other) =
            (web.clone().on([0, 1]), Service::new("other", 12).tcp("http", 80, 8080).client_ip().on(0..3));
        api.apply(&fewer.to_yaml())?;
        api.apply(&other.to_yaml())?;
        assert_eq!(dial_all(lab, &web)?, before, "known clients");
        loads.iter().try_for_each(|load| load.wait_for(300))?;
        loads.into_iter().try_for_each(|load| load.stop()?.undisturbed())?;

        api.appear()?;
        lab.settle(&fewer)?;
        lab.settle(&other)?;
        assert_moved_from_lost_pods_only(&before, &dial_all(lab, &web)?, "pod-2");
        Ok(())
    })
}

#[test]
fn an_agent_that_starts_while_the_api_is_away_keeps_everything() -> Result<()> {
    let web = web().client_ip();
    with_cluster(Hook::Tc, &web, |lab, agent, api| {
        let before = dial_all(lab, &web)?;
        let sessions = lab.sessions(&web, None)?.len();
        api.vanish();
        agent.kill()?;
        agent.restart_unready()?;
        eventually("the new agent waits", PATIENCE, || {
            Ok(agent.log().iter().any(|line| line.contains("until it answers, the dataplane does not change")))
        })?;
        assert_eq!(dial_all(lab, &web)?, before, "known clients, while the new agent waits");
        assert_eq!(lab.sessions(&web, None)?.len(), sessions);
        api.delete(Kind::Services, "default", "web")?;
        let other = Service::new("other", 12).tcp("http", 80, 8080).client_ip().on(0..3);
        api.apply(&other.to_yaml())?;
        assert_eq!(dial_all(lab, &web)?, before, "nothing is deleted before the lists are complete");

        api.appear()?;
        lab.settle(&other)?;
        eventually("the service that was deleted meanwhile is gone", PATIENCE, || {
            Ok(!lab.affinity(&["get", "services"])?.contains("default/web"))
        })?;
        eventually("the second agent is ready, as the first was", PATIENCE, || {
            Ok(agent.log().iter().filter(|line| line.starts_with("ready")).count() == 2)
        })
    })
}

/// Clients stay unless their pod is this one, which no client reaches any more.
fn assert_moved_from_lost_pods_only(before: &[Vec<String>], after: &[Vec<String>], lost: &str) {
    let pairs = || before.iter().flatten().zip(after.iter().flatten());
    assert!(pairs().any(|(before, _)| before == lost), "nobody was on {lost}");
    for (before, after) in pairs() {
        assert!(after != lost && (before == after || before == lost), "{before} -> {after}");
    }
}
