//! One way to the pod: a lab with its proxy, and a process that acts as both ends.
//!
//! One pod namespace has the addresses of all endpoints, and one client namespace those of all clients, which are pod addresses
//! too:
//!
//! | 10.244.0.0/17 | the pod |
//! |---|---|
//! | 10.244.128.0/17 | the clients |

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::{Child, ChildStdin, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use aya::Ebpf;

use super::{
    Measure, Way,
    ends::{Answer, Course, Rate, Request},
    size::{PORTS, Size},
};
use crate::{
    kubeproxy::Mode,
    lab::{Agent, Cgroup, Family, Interrupt, Lab, Options, WIRE, ethtool, pass_by_xdp},
};

const POD: &str = "10.244.0.0/17";
const CLIENTS: &str = "10.244.128.0/17";
const FIRST_CLIENT: Ipv4Addr = Ipv4Addr::new(10, 244, 128, 1);

/// How long the agent may take to be ready.
const AGENT_PATIENCE: Duration = Duration::from_mins(5);
/// How long a request to the ends may take: kube-proxy's rules for 5,000 endpoints take a third of a second for a new client.
const PATIENCE: Duration = Duration::from_mins(5);
/// How often signals are checked meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A way to the pod, ready to be measured. Fields are dropped in this order: the lab is last.
pub(super) struct Site {
    way: Way,
    loading: Duration,
    /// The endpoint of each client after all had connected once.
    places: Vec<IpAddr>,
    ends: Ends,
    _agent: Option<Agent>,
    _program: Option<Ebpf>,
    _cgroup: Cgroup,
    _lab: Lab,
}

impl Site {
    /// Brings up a lab, puts the proxy in place, and lets every client connect once.
    ///
    /// # Errors
    /// If a command fails, or a client gets no answer.
    pub(super) fn up(way: Way, size: Size, clients: u16, cpu: usize, interrupt: &Interrupt) -> Result<Self> {
        // Everything runs on one processor here.
        let lab = Lab::up(&Options { pods: 1, steering: false, ..Options::default() })?;
        let cgroup = Cgroup::create()?;
        lay_routes(&lab)?;
        let begun = Instant::now();
        let (agent, program) = translate(way, size, &lab, &cgroup).with_context(|| format!("{way:?}, {size}"))?;
        let loading = begun.elapsed();
        let mut ends = Ends::start(&lab, &cgroup, &course(way, size, clients, cpu, &lab)?)?;
        let places = ends.places(interrupt).with_context(|| format!("{way:?}, {size}"))?;
        Ok(Self { way, loading, places, ends, _agent: agent, _program: program, _cgroup: cgroup, _lab: lab })
    }

    pub(super) fn way(&self) -> Way {
        self.way
    }

    /// How long it took to put the proxy in place, in seconds.
    pub(super) fn loading_s(&self) -> f64 {
        self.loading.as_secs_f64()
    }

    /// Measures for about this many seconds.
    pub(super) fn measure(&mut self, measure: Measure, seconds: f64, interrupt: &Interrupt) -> Result<Rate> {
        match self.ends.ask(&Request::Measure { measure, seconds }, interrupt) {
            Ok(Answer::Measured(rate)) => Ok(rate),
            Ok(other) => bail!("{other:?}"),
            Err(error) => Err(error.context(format!("{:?} of {:?}", measure, self.way))),
        }
    }

    /// How many clients have another endpoint than at first.
    pub(super) fn moved(&mut self, interrupt: &Interrupt) -> Result<usize> {
        let now = self.ends.places(interrupt)?;
        Ok(now.iter().zip(&self.places).filter(|(now, then)| now != then).count())
    }
}

/// Sets up all addresses of the pod and the clients.
fn lay_routes(lab: &Lab) -> Result<()> {
    let pod = lab.pods()[0].namespace().context("the pod lives")?;
    let (device, address) = (lab.pods()[0].device(), Family::V4.pod(0));
    // Through one address, so that the node needs one neighbour instead of thousands.
    lab.node().ip(&format!("route add {POD} via {address} dev {device}\nroute add {CLIENTS} via 192.0.2.2"))?;
    pod.ip(&format!("route add local {POD} dev lo"))?;
    lab.client_namespace().ip(&format!("route add local {CLIENTS} dev lo\nroute add {POD} via 192.0.2.1"))?;
    // Closed connections are removed at once: no real machine has as many as the measurement.
    for namespace in [pod, lab.client_namespace()] {
        namespace.sysctl(&[("ipv4/tcp_max_tw_buckets", "0")])?;
    }
    ethtool(lab.node(), WIRE, &["gro", "on"])
}

/// Puts the proxy in place.
fn translate(way: Way, size: Size, lab: &Lab, cgroup: &Cgroup) -> Result<(Option<Agent>, Option<Ebpf>)> {
    match way {
        Way::Direct => Ok((None, None)),
        Way::XdpPass => Ok((None, Some(pass_by_xdp(lab.node(), WIRE)?))),
        Way::Iptables => install(Mode::Iptables, size, lab).map(|()| (None, None)),
        Way::Nftables => install(Mode::Nftables, size, lab).map(|()| (None, None)),
        Way::Tc => by_packets(size, lab, &["--device", WIRE, "--xdp", "off"]),
        Way::TcRedirect => {
            by_packets(size, lab, &["--device", WIRE, "pod*", "--xdp", "off", "--forwarding", "redirect"])
        }
        Way::Xdp => by_packets(size, lab, &["--device", WIRE, "--xdp", "native"]),
        Way::XdpRedirect => {
            let devices = ["--device", WIRE, "pod*", "--xdp-device", WIRE];
            by_packets(size, lab, &[devices.as_slice(), &["--forwarding", "redirect"]].concat())
        }
        Way::Socket => Ok((Some(agent(size, lab, &Lab::socket_args(cgroup, &["--device", "none*"])?)?), None)),
    }
}

/// The agent, with packet programs only.
fn by_packets(size: Size, lab: &Lab, args: &[&str]) -> Result<(Option<Agent>, Option<Ebpf>)> {
    Ok((Some(agent(size, lab, &[args, &["--socket", "off"]].concat())?), None))
}

/// kube-proxy's rules. Conntrack entries of closed connections expire soon, otherwise its table would be full after a few
/// rounds.
fn install(mode: Mode, size: Size, lab: &Lab) -> Result<()> {
    mode.install_one(Family::V4, lab, &size.cluster())?;
    lab.node().sysctl(&[("netfilter/nf_conntrack_tcp_timeout_time_wait", "1")])
}

/// The agent, with the same services as one file of YAML.
fn agent(size: Size, lab: &Lab, args: &[&str]) -> Result<Agent> {
    let yaml: Vec<String> = size.cluster().iter().map(crate::lab::Service::to_yaml).collect();
    let file = lab.source().join("cluster.yaml");
    fs::write(&file, yaml.join("---\n"))?;
    let mut command = lab.affinity_command()?;
    command.args(["run", "--source"]).arg(&file).args(args);
    Agent::start(command, AGENT_PATIENCE)
}

/// The configuration of the ends.
fn course(way: Way, size: Size, clients: u16, cpu: usize, lab: &Lab) -> Result<Course> {
    let pods: Vec<IpAddr> = size.measured().ready_pods().map(|pod| Family::V4.pod(pod)).collect();
    let [(_, http), (_, echo)] = PORTS;
    let service = size.measured();
    let targets = |name: &str, port: u16| match way {
        Way::Direct | Way::XdpPass => pods.iter().map(|pod| SocketAddr::new(*pod, port)).collect(),
        Way::Iptables | Way::Nftables | Way::Tc | Way::TcRedirect | Way::Xdp | Way::XdpRedirect | Way::Socket => {
            vec![service.frontend(Family::V4, name)]
        }
    };
    Ok(Course {
        pod: lab.pods()[0].namespace().context("the pod lives")?.path(),
        cpu,
        clients: (0..u32::from(clients)).map(|number| (FIRST_CLIENT.to_bits() + number).into()).collect(),
        stream_to: targets("http", http),
        datagrams_to: targets("echo", echo),
        stream_port: http,
        datagram_port: echo,
        endpoints: pods,
    })
}

/// The process that acts as both ends. Dropping it ends it.
struct Ends {
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
}

impl Ends {
    /// Starts it in the clients' namespace, where programs of that cgroup see its sockets.
    fn start(lab: &Lab, cgroup: &Cgroup, course: &Course) -> Result<Self> {
        let mut command = cgroup.command(lab.client_namespace(), std::env::current_exe()?);
        let mut child = command.arg("ends").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut input = child.stdin.take().context("no standard input")?;
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        let (sender, answers) = channel();
        thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        writeln!(input, "{}", serde_json::to_string(course)?)?;
        Ok(Self { child, input, answers })
    }

    fn places(&mut self, interrupt: &Interrupt) -> Result<Vec<IpAddr>> {
        match self.ask(&Request::Places, interrupt)? {
            Answer::Places(places) => Ok(places),
            other @ (Answer::Measured(_) | Answer::Failed(_)) => bail!("{other:?}"),
        }
    }

    fn ask(&mut self, request: &Request, interrupt: &Interrupt) -> Result<Answer> {
        interrupt.check()?;
        writeln!(self.input, "{}", serde_json::to_string(request)?)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.answers.recv_timeout(LOOK_EVERY) {
                Ok(line) => match serde_json::from_str(&line)? {
                    Answer::Failed(why) => bail!(why),
                    answer @ (Answer::Places(_) | Answer::Measured(_)) => return Ok(answer),
                },
                Err(RecvTimeoutError::Timeout) => {
                    interrupt.check()?;
                    ensure!(Instant::now() < deadline, "no answer in {PATIENCE:?}");
                }
                Err(RecvTimeoutError::Disconnected) => {
                    interrupt.check()?;
                    bail!("the process that plays both ends has ended with {:?}", self.child.wait());
                }
            }
        }
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
