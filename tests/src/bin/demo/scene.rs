//! The scene: a lab with three pods, the agent on its node, and the YAML that it reads.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use affinity_tests::lab::{Agent, Client, Explanation, Family, Interrupt, Lab, Protocol, Session, WIRE, eventually};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::stage::Stage;

/// The service of the demo, and its slice.
const WEB_YAML: &str = include_str!("../../../demo/web.yaml");
/// A service without endpoints.
const EMPTY_YAML: &str = include_str!("../../../demo/empty.yaml");

/// `metadata` of [`WEB_YAML`], as commands name it.
pub(crate) const WEB: &str = "default/web";
/// `spec.clusterIP` of [`WEB_YAML`] with its ports, and of [`EMPTY_YAML`].
pub(crate) const HTTP: ([u8; 4], u16) = ([10, 96, 0, 10], 80);
pub(crate) const HTTPS: ([u8; 4], u16) = ([10, 96, 0, 10], 443);
pub(crate) const EMPTY: ([u8; 4], u16) = ([10, 96, 0, 11], 80);

/// The pods in the YAML.
pub(crate) const POD_COUNT: usize = 3;

/// The agent's options in addition to its source.
const RUN: [&str; 4] = ["--device", WIRE, "--xdp", "native"];
/// How long a change of the YAML may take to be effective.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);

/// The agent ends before its lab does.
pub(crate) struct Scene {
    pub(crate) agent: Agent,
    pub(crate) lab: Lab,
    pub(crate) interrupt: Interrupt,
    web: String,
}

impl Scene {
    /// Brings everything up and introduces it.
    pub(crate) fn set(stage: &Stage, interrupt: Interrupt) -> Result<Self> {
        stage.title("affinity: client-IP session affinity for Kubernetes Services");
        stage.say("A lab of network namespaces: clients on a wire, a node, and three pods that answer their name.");
        stage.say("The service is plain Kubernetes YAML from tests/demo. Nothing here leaves this machine.");
        let lab = Lab::with_pods(POD_COUNT)?;
        lab.publish_text("web.yaml", WEB_YAML)?;
        lab.publish_text("empty.yaml", EMPTY_YAML)?;

        stage.command(&run_line(&lab));
        let agent = lab.agent(&RUN)?;
        let scene = Self { agent, lab, interrupt, web: WEB_YAML.to_owned() };
        scene.show_readiness(stage);
        scene.show(stage, &["get", "devices"])?;
        scene.show(stage, &["get", "services"])?;
        Ok(scene)
    }

    /// Starts the agent again, after it was killed.
    pub(crate) fn run_again(&mut self, stage: &Stage) -> Result<()> {
        stage.command(&run_line(&self.lab));
        self.agent.restart()?;
        self.show_readiness(stage);
        Ok(())
    }

    fn show_readiness(&self, stage: &Stage) {
        let log = self.agent.log();
        stage.output(log.iter().rfind(|line| line.starts_with("ready")).map_or("", String::as_str));
    }

    /// Runs a command and shows it with its output.
    pub(crate) fn show(&self, stage: &Stage, args: &[&str]) -> Result<()> {
        stage.command(&format!("affinity {}", args.join(" ")));
        stage.output(&self.lab.affinity(args)?);
        Ok(())
    }

    /// Which pod answers each of these requests, each on a new connection.
    pub(crate) fn ask(&self, from: IpAddr, to: ([u8; 4], u16), times: usize) -> Result<Vec<String>> {
        (0..times).map(|_| Ok(self.ask_once(from, to)?)).collect()
    }

    /// Which pod answers one request.
    pub(crate) fn ask_once(&self, from: IpAddr, to: ([u8; 4], u16)) -> io::Result<String> {
        self.clients().ask(Protocol::Tcp, from, SocketAddr::from(to))
    }

    /// The clients on the wire.
    pub(crate) fn clients(&self) -> Client {
        self.lab.client()
    }

    /// The pins of the service, of one client or of all.
    pub(crate) fn sessions(&self, client: Option<IpAddr>) -> Result<Vec<Session>> {
        let client = client.map(|client| client.to_string());
        let mut args = vec!["get", "sessions", "--service", WEB];
        args.extend(client.iter().flat_map(|client| ["--client", client]));
        let json = self.lab.affinity_json(&args)?;
        serde_json::from_value(json.clone()).with_context(|| format!("sessions, not {json}"))
    }

    /// The verdict for this client's next packet.
    pub(crate) fn explain(&self, from: IpAddr, to: ([u8; 4], u16)) -> Result<Explanation> {
        self.lab.explain(Protocol::Tcp, from, SocketAddr::from(to))
    }

    /// Changes the service's YAML as `kubectl edit` would, shows the change, and waits until it is effective.
    pub(crate) fn edit(
        &mut self,
        stage: &Stage,
        old: &str,
        new: &str,
        met: impl Fn(&Self) -> Result<bool>,
    ) -> Result<()> {
        ensure!(self.web.matches(old).count() == 1, "web.yaml has this once:\n{old}");
        stage.edit("web.yaml", old, new);
        self.publish(self.web.replace(old, new), met)
    }

    /// The current YAML of the service.
    pub(crate) fn web(&self) -> &str {
        &self.web
    }

    /// Replaces the service's YAML, and waits until that is effective.
    pub(crate) fn publish(&mut self, web: String, met: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        self.web = web;
        self.lab.publish_text("web.yaml", &self.web)?;
        eventually("packets meet the change", SYNC_PATIENCE, || {
            self.interrupt.check()?;
            met(self)
        })
    }

    /// The service as in `affinity get services`.
    pub(crate) fn service(&self) -> Result<Value> {
        let services = self.lab.affinity_json(&["get", "services", "--service", WEB])?;
        services.get(0).cloned().with_context(|| format!("{WEB} in {services}"))
    }

    /// The names of the pods that a new connection could reach.
    pub(crate) fn candidates(&self) -> Result<BTreeSet<String>> {
        let said = self.explain(Family::V4.client(0), HTTP)?;
        Ok(said.candidates.into_iter().map(|pod| pod.name).collect())
    }

    /// Shows how to continue by hand.
    pub(crate) fn invite(&self, stage: &Stage) {
        let node = self.lab.node().path();
        let client = self.lab.client_namespace().path();
        let affinity =
            self.lab.affinity_command().map_or_else(|error| error.to_string(), |command| shell_line(&command));
        stage.open("The lab stays up until Ctrl-C");
        stage.say("In another terminal, as root:");
        stage.output(&format!(
            "\n    alias affinity='{affinity}'\n    \
             affinity get sessions\n    \
             affinity events --follow\n    \
             nsenter --net={} curl --interface 198.18.0.1 http://10.96.0.10/\n    \
             nsenter --net={} tcpdump -ni {WIRE}\n    \
             $EDITOR {}/web.yaml",
            client.display(),
            node.display(),
            self.lab.source().display(),
        ));
    }
}

/// How the agent is started: its log goes elsewhere, its readiness message does not.
fn run_line(lab: &Lab) -> String {
    format!("affinity run --source {} {} 2>log &", lab.source().display(), RUN.join(" "))
}

/// A command as typed in a shell.
fn shell_line(command: &std::process::Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
