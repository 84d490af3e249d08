//! The service proxy on node A of a lab of two nodes: the same scenario can run with each.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};

use crate::kubeproxy::Mode;
use crate::lab::{
    Agent, Cgroup, Client, Family, Lab, Options, PODS, Protocol, Service, SocketProcess, UNDERLAY_WIRE, WIRE, feed,
};

/// How many pods each node has.
pub const PODS_OF_EACH: usize = 3;

/// The source address of a socket that connects to a pod of its own node, if no route sets another one.
const POD_ROUTERS: [&str; 2] = ["169.254.1.1", "fe80::1"];

/// A service proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proxy {
    /// kube-proxy's rules in iptables mode.
    Iptables,
    /// kube-proxy's rules in nftables mode.
    Nftables,
    /// `affinity`, with TC on every device, and at the sockets of the node's own processes.
    Tc,
    /// The same, redirecting past the node's stack.
    TcRedirect,
    /// As with TC, with XDP on the wires, which itself sends to node B.
    Xdp,
    /// The same, and TC redirects past the stack what XDP leaves to the node.
    XdpRedirect,
}

/// Installs a packet filter on node A that drops packets that conntrack marks as INVALID, as the rules of kube-proxy and many
/// others do.
///
/// # Errors
/// The error of `nft` if it rejects it.
pub fn drop_invalid(lab: &Lab) -> Result<()> {
    const STRICT: &str = "table inet strict { chain forward { \
        type filter hook forward priority 0; ct state invalid counter drop; }; }";

    Mode::Nftables.ensure_available()?;
    feed(lab.node().command("nft").args(["-f", "-"]), STRICT)
}

/// Makes tests of scenarios: functions that take a [`Proxy`] and return a result. Each becomes a separate test for each of
/// [`Proxy::OURS`].
#[macro_export]
macro_rules! in_every_way {
    ($($story:ident),* $(,)?) => {
        mod tc { $(#[test] fn $story() -> anyhow::Result<()> { super::$story($crate::proxy::Proxy::Tc) })* }
        mod tc_redirect { $(#[test] fn $story() -> anyhow::Result<()> { super::$story($crate::proxy::Proxy::TcRedirect) })* }
        mod xdp { $(#[test] fn $story() -> anyhow::Result<()> { super::$story($crate::proxy::Proxy::Xdp) })* }
        mod xdp_redirect { $(#[test] fn $story() -> anyhow::Result<()> { super::$story($crate::proxy::Proxy::XdpRedirect) })* }
    };
}

impl Proxy {
    /// The mode of kube-proxy, if it is kube-proxy.
    fn mode(self) -> Option<Mode> {
        match self {
            Self::Iptables => Some(Mode::Iptables),
            Self::Nftables => Some(Mode::Nftables),
            Self::Tc | Self::TcRedirect | Self::Xdp | Self::XdpRedirect => None,
        }
    }

    /// `affinity`, in every way.
    pub const OURS: [Self; 4] = [Self::Tc, Self::TcRedirect, Self::Xdp, Self::XdpRedirect];

    /// Brings up a lab of two nodes, and puts these services into effect on node A.
    ///
    /// # Errors
    /// When the lab does not come up, or the services are rejected.
    pub fn start(self, services: &[Service]) -> Result<Scene> {
        let lab = Lab::up(&Options { pods: PODS_OF_EACH, pods_of_b: PODS_OF_EACH, ..Options::default() })?;
        let cgroup = Cgroup::create()?;
        let agent = match self.mode() {
            Some(mode) => mode.install(&lab, services).map(|()| None)?,
            None => {
                drop_invalid(&lab)?;
                lab.publish_zone()?;
                services.iter().try_for_each(|service| lab.publish(service))?;
                Some(self.agent(&lab, &cgroup)?)
            }
        };
        Ok(Scene { proxy: self, services: services.to_vec(), agent, cgroup, lab })
    }

    /// Starts `affinity` for all services on all devices, and for processes in this cgroup.
    fn agent(self, lab: &Lab, cgroup: &Cgroup) -> Result<Agent> {
        let [pods_v4, pods_v6] = PODS;
        let args = ["--services", "all", "--pod-cidr", pods_v4, "--pod-cidr", pods_v6];
        let devices = ["--device", WIRE, UNDERLAY_WIRE, "pod*"];
        lab.agent(&Lab::socket_args(cgroup, &[args.as_slice(), &devices, &self.hooks()].concat())?)
    }

    /// The agent's options for hooks, if it is an agent.
    pub fn hooks(self) -> Vec<&'static str> {
        const TC: [&str; 2] = ["--xdp", "off"];
        // The devices are like those of a real machine there.
        const XDP: [&str; 3] = ["--xdp-device", WIRE, UNDERLAY_WIRE];
        const REDIRECT: [&str; 2] = ["--forwarding", "redirect"];

        match self {
            Self::Iptables | Self::Nftables => Vec::new(),
            Self::Tc => TC.to_vec(),
            Self::TcRedirect => [TC.as_slice(), &REDIRECT].concat(),
            Self::Xdp => XDP.to_vec(),
            Self::XdpRedirect => [XDP.as_slice(), &REDIRECT].concat(),
        }
    }
}

/// A lab in which a [`Proxy`] works.
pub struct Scene {
    proxy: Proxy,
    /// The services in effect.
    services: Vec<Service>,
    agent: Option<Agent>,
    cgroup: Cgroup,
    lab: Lab,
}

/// The kind of source address that a pod saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Seen {
    /// The client's own.
    Client,
    /// One of node A's.
    Node,
    /// Another.
    Stranger,
}

/// The result of one client's attempt: the index of the pod that answered and the kind of address that it saw, or the failure.
pub type Met = Result<(usize, Seen), Failure>;

/// How a client failed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// It was rejected at once.
    Refused,
    /// There was no answer.
    Silence,
    /// The kernel reported to the sender that its packet was blocked.
    KeptBack,
    /// Something else: the name of the error or the message.
    Other(String),
}

/// The path of requests.
const PATH: &str = "/who";

impl Scene {
    /// The agent's output, if there is an agent.
    pub fn log(&self) -> String {
        self.agent.as_ref().map(|agent| agent.log().join("\n")).unwrap_or_default()
    }

    /// Starts another agent instead of this one.
    ///
    /// # Errors
    /// When this one does not end, or the other does not start.
    pub fn go_on_as(&mut self, proxy: Proxy) -> Result<()> {
        self.agent.take().map_or(Ok(()), Agent::terminate)?;
        self.agent = Some(proxy.agent(&self.lab, &self.cgroup)?);
        self.proxy = proxy;
        Ok(())
    }

    /// Puts these services into effect instead of the former ones, and waits until new connections meet them.
    ///
    /// # Errors
    /// When they are rejected, or do not come into effect.
    pub fn update(&mut self, services: &[Service]) -> Result<()> {
        let before = std::mem::replace(&mut self.services, services.to_vec());
        if let Some(mode) = self.proxy.mode() {
            return mode.update(&self.lab, services);
        }
        for service in before.iter().filter(|old| services.iter().all(|new| new.name() != old.name())) {
            self.lab.withdraw(service)?;
            self.lab.settle_deleted(service)?;
        }
        services.iter().try_for_each(|service| self.lab.publish_and_settle(service))
    }

    /// Whether the proxy is `affinity`, which can explain its decisions.
    pub fn has_agent(&self) -> bool {
        self.agent.is_some()
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The lab, to change its pods.
    pub fn lab_mut(&mut self) -> &mut Lab {
        &mut self.lab
    }

    /// Starts a process on node A, one of those that the proxy serves. `program` is the binary `socket_process`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn process_on_node(&self, program: &str) -> Result<SocketProcess> {
        self.cgroup.start(program, self.lab.node())
    }

    /// The same in a pod.
    ///
    /// # Errors
    /// When it does not start.
    pub fn process_in_pod(&self, pod: usize, program: &str) -> Result<SocketProcess> {
        self.cgroup.start(program, self.lab.pod(pod).namespace().context("it lives")?)
    }
}

/// The result of a client with that address, on a new connection from the namespace of the calling thread: inside
/// [`Client::in_parallel`] the client's.
pub fn meet(client: &Client, from: IpAddr, protocol: Protocol, to: SocketAddr) -> Met {
    let said = client.open(protocol, from, to).and_then(|mut open| open.ask_last(PATH));
    read(said.map_err(|error| format!("{:?}", error.kind())), Some(from))
}

/// The result of a process on the node, on a new connection. The pod sees one of the node's addresses in any case.
///
/// # Errors
/// When the process has ended.
pub fn meet_from_node(process: &mut SocketProcess, protocol: Protocol, to: SocketAddr) -> Result<Met> {
    let (socket, peer) = process.connect(protocol, to)?;
    if let Err(error) = peer {
        return Ok(read(Err(error), None));
    }
    let said = process.ask(socket, PATH)?;
    process.close(socket)?;
    Ok(read(said, None))
}

fn read(said: Result<String, String>, from: Option<IpAddr>) -> Met {
    let body = said.map_err(|error| match error.as_str() {
        "ConnectionRefused" => Failure::Refused,
        "TimedOut" | "WouldBlock" => Failure::Silence,
        "PermissionDenied" => Failure::KeptBack,
        _ => Failure::Other(error),
    })?;
    let parsed = body.strip_prefix("pod-").and_then(|rest| rest.split_once(' '));
    let parsed = parsed.and_then(|(pod, client)| Some((pod.parse().ok()?, client.parse().ok()?)));
    let (pod, client): (usize, IpAddr) = parsed.ok_or(Failure::Other(body))?;
    let is_router = POD_ROUTERS.iter().any(|router| router.parse() == Ok(client));
    let is_of_node = is_router || Family::BOTH.iter().any(|family| family.node_addresses().contains(&client));
    let seen = if Some(client) == from {
        Seen::Client
    } else if is_of_node {
        Seen::Node
    } else {
        Seen::Stranger
    };
    Ok((pod, seen))
}
