//! The real agent, with the kernel's maps, and an API that comes and goes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use affinity_tests::apiserver::{Answer, ApiServer, Gone, Kind, Verb};
use affinity_tests::lab::{Agent, Family, Lab, Load, Protocol, Service, eventually};
use affinity_tests::patience::patience;
use affinity_tests::story::web;
use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::follower::{lingers, write_objects};
use crate::objects::node;

const PATIENCE: Duration = Duration::from_secs(20);
/// Instead of another proxy, as with files.
const ARGS: [&str; 4] = ["--device", "wire0", "--services", "all"];

/// A lab, and an API for its agent.
struct Scene {
    lab: Lab,
    api: ApiServer,
    kubeconfig: String,
}

impl Scene {
    fn new(services: &[&Service]) -> Result<Self> {
        let lab = Lab::with_pods(3)?;
        let api = ApiServer::start_in(lab.node())?;
        api.put(node())?;
        services.iter().try_for_each(|service| api.apply(&service.to_yaml()))?;
        let kubeconfig = api.kubeconfig(lab.scratch())?.display().to_string();
        Ok(Self { lab, api, kubeconfig })
    }

    /// Starts the agent.
    fn agent(&self, args: &[&str]) -> Result<Agent> {
        let source = ["--source", "kubernetes", "--kubeconfig", &self.kubeconfig];
        self.lab.agent_unready(&[&source, ARGS.as_slice(), args].concat())
    }

    /// Waits until the maps equal those that files with the API's objects produce.
    fn settle(&self) -> Result<()> {
        let directory = self.lab.scratch().join("objects");
        write_objects(&self.api, &directory)?;
        let files = directory.display().to_string();
        for map in ["frontends_v4", "frontends_v6", "slots", "members", "backends"] {
            let wanted = self.lab.affinity(&["dump", map, "--source", &files])?;
            let mut is = String::new();
            let equal = eventually(&format!("map {map} is as files make it"), PATIENCE, || {
                let dump = self.lab.affinity(&["dump", map])?;
                is = dump.lines().filter(|line| !lingers(line)).map(|line| format!("{line}\n")).collect();
                Ok(is == wanted)
            });
            equal.with_context(|| format!("{is}\nand not\n{wanted}"))?;
        }
        Ok(())
    }

    /// Clients that must not notice anything.
    fn load(&self, service: &Service) -> Load {
        Load::start(&self.lab.client(), Protocol::Tcp, 0..20, service.frontend(Family::V4, "http"))
    }

    /// When the source's view was last known to be current, from `get services`.
    fn as_of(&self) -> Result<String> {
        let services = self.lab.affinity_json(&["get", "services"])?;
        Ok(services[0]["asOf"].as_str().unwrap_or_default().to_owned())
    }
}

#[test]
fn the_kernels_maps_follow_the_cluster() -> Result<()> {
    let (web, other) = (web().client_ip(), Service::new("other", 11).tcp("http", 80, 8080).client_ip().on([0]));
    let scene = Scene::new(&[&web, &other])?;
    let mut agent = scene.agent(&[])?;
    agent.until_ready()?;
    scene.settle()?;
    let load = scene.load(&web);
    load.wait_for(50)?;

    scene.api.apply(&other.clone().on([1, 2]).to_yaml())?;
    scene.settle()?;
    scene.api.delete(Kind::Services, "default", "other")?;
    scene.settle()?;
    scene.api.apply(&other.to_yaml())?;
    scene.api.put_and_break(scene.api.objects(Kind::Slices)[0].clone())?;
    scene.settle()?;
    // Everything is forgotten, and listed again.
    scene.api.misbehave(Kind::Slices, Verb::List, [Answer::Status(500), Answer::Late(Duration::from_millis(300))]);
    Kind::ALL.iter().for_each(|kind| scene.api.end_watches(*kind));
    scene.api.apply(&other.on([2]).to_yaml())?;
    scene.api.compact(Gone::Event);
    scene.settle()?;

    load.wait_for(50)?;
    load.stop()?.undisturbed()?;
    agent.terminate()
}

#[test]
fn an_agent_without_its_api_keeps_what_is_there_and_says_how_old_it_is() -> Result<()> {
    let web = web().client_ip();
    let mut scene = Scene::new(&[&web])?;
    let mut agent = scene.agent(&[])?;
    agent.until_ready()?;
    scene.settle()?;
    eventually("the view has an age", PATIENCE, || Ok(!scene.as_of()?.is_empty()))?;
    ensure!(scene.lab.affinity(&["get", "services"])?.contains("source: kubernetes, as of "));

    let load = scene.load(&web);
    load.wait_for(50)?;
    scene.api.vanish();
    agent.kill()?;
    let as_of = scene.as_of()?;
    let written = agent.log().len();
    agent.restart_unready()?;
    eventually("the log says that nobody answers", PATIENCE, || {
        Ok(agent.log()[written..].iter().any(|line| line.contains("waiting for the cluster's API")))
    })?;
    load.wait_for(50)?;
    ensure!(scene.as_of()? == as_of, "the view is as old as it was");
    ensure!(!agent.log()[written..].iter().any(|line| line.starts_with("ready")), "ready without a source");

    scene.api.apply(&web.clone().on([0, 1]).to_yaml())?;
    scene.api.appear()?;
    scene.settle()?;
    eventually("the view is young again", PATIENCE, || Ok(scene.as_of()? > as_of))?;
    ensure!(agent.log()[written..].iter().any(|line| line.starts_with("ready")), "the agent does not say so");
    load.wait_for(50)?;
    drop(load);
    agent.terminate()
}

#[test]
fn a_fresh_node_waits_for_its_api() -> Result<()> {
    let web = web().client_ip();
    let mut scene = Scene::new(&[&web])?;
    scene.api.vanish();
    let mut agent = scene.agent(&[])?;
    eventually("the device is attached", PATIENCE, || {
        // Before the maps are made there is nothing to ask.
        Ok(scene.lab.affinity(&["get", "devices"]).is_ok_and(|devices| devices.contains("wire0")))
    })?;
    scene.api.appear()?;
    agent.until_ready()?;
    scene.settle()?;
    let from = Family::V4.client(1);
    let asked = |kubeconfig: &str| {
        let to = web.frontend(Family::V4, "http").to_string();
        let from = from.to_string();
        let source = ["--source", "kubernetes", "--kubeconfig", kubeconfig];
        scene.lab.affinity_json(&[["explain", "--from", &from, "--to", &to].as_slice(), &source].concat())
    };
    let said = asked(&scene.kubeconfig)?;
    ensure!(said["verdict"] == "forward" && said["candidates"].as_array().is_some_and(|all| all.len() == 3), "{said}");
    ensure!(asked("/nowhere").is_err(), "there is no such kubeconfig");
    agent.terminate()
}

/// The status line of the node's answer on kube-proxy's port.
fn node_health(lab: &Lab, path: &str) -> Result<String> {
    lab.node().door().run(|| {
        let mut stream = TcpStream::connect(("127.0.0.1", 10_256))?;
        stream.set_read_timeout(Some(patience(PATIENCE)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text.lines().next().unwrap_or_default().to_owned())
    })?
}

#[test]
fn load_balancers_are_told_that_the_node_is_being_taken_away() -> Result<()> {
    let scene = Scene::new(&[&web().client_ip()])?;
    let mut agent = scene.agent(&[])?;
    agent.until_ready()?;
    let comes_to = |code: &str| {
        eventually(&format!("/healthz answers {code}"), PATIENCE, || {
            Ok(node_health(&scene.lab, "/healthz")?.contains(code))
        })
    };
    comes_to("200")?;
    let mut tainted = node();
    tainted["spec"]["taints"] = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
    let mut deleted = node();
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-02T03:04:05Z");
    for leaving in [tainted, deleted] {
        scene.api.put(leaving)?;
        comes_to("503")?;
        ensure!(node_health(&scene.lab, "/livez")?.contains("200"), "the agent itself is well");
        scene.api.put(node())?;
        comes_to("200")?;
    }
    agent.terminate()
}

#[test]
fn attach_takes_a_cluster_once() -> Result<()> {
    let web = web().client_ip();
    let scene = Scene::new(&[&web])?;
    let source = ["--source", "kubernetes", "--kubeconfig", &scene.kubeconfig];
    scene.lab.affinity(&[["attach"].as_slice(), &source, &ARGS].concat())?;
    scene.settle()?;
    ensure!(!scene.as_of()?.is_empty());
    Ok(())
}

#[test]
fn problems_of_a_service_are_published_as_events() -> Result<()> {
    let odd = web().client_ip().annotated("timer", "sometimes");
    let scene = Scene::new(&[&odd])?;
    let mut agent = scene.agent(&["--no-kubernetes-events"])?;
    agent.until_ready()?;
    eventually("the log names what is wrong", PATIENCE, || {
        Ok(agent.log().iter().any(|line| line.contains("affinity.dev/timer")))
    })?;
    // Another change goes all the way after it.
    scene.api.apply(&Service::new("other", 11).tcp("http", 80, 8080).client_ip().on([0]).to_yaml())?;
    scene.settle()?;
    ensure!(scene.api.event_requests() == 0, "{:?}", scene.api.events());
    agent.terminate()?;

    let mut agent = scene.agent(&[])?;
    agent.until_ready()?;
    eventually("an Event is posted", PATIENCE, || Ok(scene.api.event_requests() > 0))?;
    let events = scene.api.events();
    let [event] = events.as_slice() else { panic!("one Event, not {events:?}") };
    let note = event["note"].as_str().unwrap_or_default();
    ensure!(note.contains("affinity.dev/timer") && event["reason"] == "Misconfigured", "{event}");
    ensure!(event["regarding"]["name"] == "web" && event["reportingInstance"] == "node-a", "{event}");
    agent.terminate()
}
