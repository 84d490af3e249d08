//! `bench connect`: the throughput of clients through a node, with real sockets, compared with plain routing and kube-proxy's
//! rules, by the number of services and endpoints.
//!
//! Every way to reach the pod has a separate lab, and all labs of a comparison are up at once. Each round measures every way
//! once, in an order that changes from round to round, so drift of the machine affects all of them equally. A ratio compares a
//! figure with the same round's figure for plain routing.
//!
//! One thread on one processor is client and pod in turn, see [`mod@ends`]: the cost of a packet on its way is part of its
//! sender's system call, and no wake-up of another thread or processor hides it. The clients have addresses of pods elsewhere,
//! because kube-proxy masquerades others; the node's device receives as real ones do (GRO).
//!
//! The difference looks smaller than it is, because all figures contain the equal cost of both ends. XDP looks slower than it
//! is, because a veth device has to copy most packets for any XDP program; the way `xdp-pass` shows the cost of that alone.

mod ends;
mod report;
mod site;
mod size;

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub use self::ends::both_ends;
use self::{
    ends::Rate,
    report::{Report, Scope},
    site::Site,
    size::Size,
};
use crate::{
    kubeproxy::Mode,
    lab::{FIRST_OF_B, Interrupt},
};

/// What to measure, and how to say it.
#[derive(clap::Args)]
pub struct Options {
    /// All that there is to see, for half an hour: 10,000 services, 5,000 endpoints, more and longer rounds.
    #[arg(long)]
    full: bool,
    /// Numbers of services, each with the first number of endpoints [default: 1,1000; full: 1,1000,10000].
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=30_000))]
    services: Vec<u16>,
    /// Numbers of endpoints, each with the first number of services [default: 3,100,1000; full: 3,100,1000,5000].
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=FIRST_OF_B as i64))]
    endpoints: Vec<u16>,
    /// Rounds; each measures every way once [default: 15; full: 25].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Seconds of a measurement [default: 0.1; full: 0.2].
    #[arg(long, value_parser = positive)]
    seconds: Option<f64>,
    /// Clients, each with an address of its own; kube-proxy's iptables mode knows 100 for each endpoint.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1000))]
    clients: u16,
    /// Ways to the pod, beside plain routing [default: all].
    #[arg(long, value_delimiter = ',', value_enum)]
    ways: Vec<Way>,
    /// What is measured [default: all].
    #[arg(long, value_delimiter = ',', value_enum)]
    measures: Vec<Measure>,
    /// The processor that both ends and the node share [default: the last].
    #[arg(long)]
    cpu: Option<usize>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

fn positive(text: &str) -> Result<f64> {
    let seconds: f64 = text.parse()?;
    ensure!(seconds.is_finite() && seconds > 0.0, "more than 0");
    Ok(seconds)
}

/// How a client's packets get to the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// The pod's own address, by the node's routes: the limit of the others.
    Direct,
    /// The same, and an XDP program that passes everything: what a veth device takes for XDP at all.
    XdpPass,
    /// kube-proxy's rules in iptables.
    Iptables,
    /// kube-proxy's rules in nftables.
    Nftables,
    /// affinity on TC ingress.
    Tc,
    /// The same, on the pod's device too, and redirecting past the stack.
    TcRedirect,
    /// affinity on XDP, in the driver.
    Xdp,
    /// The same, and TC redirecting past the stack what XDP has translated.
    XdpRedirect,
    /// affinity at the client's `connect()`.
    Socket,
}

impl Way {
    /// Whether this machine supports it.
    fn is_available(self) -> bool {
        match self {
            Self::Iptables => Mode::Iptables.is_available(),
            Self::Nftables => Mode::Nftables.is_available(),
            Self::Direct
            | Self::XdpPass
            | Self::Tc
            | Self::TcRedirect
            | Self::Xdp
            | Self::XdpRedirect
            | Self::Socket => true,
        }
    }
}

/// What is counted. Clients stay clients: each comes back again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// New TCP connections: one byte there, one back, closed in order.
    Connections,
    /// HTTP-sized requests and answers on connections that are kept.
    Requests,
    /// Bytes of one TCP stream to the pod.
    Stream,
    /// Datagrams to the pod and back.
    Datagrams,
}

/// Measures, and prints.
///
/// # Errors
/// If a lab cannot be brought up (not root), a connection fails, or a signal arrives: the labs are removed first.
pub fn run(options: &Options) -> Result<()> {
    let interrupt = Interrupt::listen()?;
    let plan = Plan::of(options);
    let mut report = Report::new(plan.scope());
    for (number, size) in plan.sizes.iter().enumerate() {
        eprintln!("{size} ({} of {})", number + 1, plan.sizes.len());
        compare(&plan, *size, &interrupt, &mut report)?;
    }
    report.print(options.json)
}

/// Options with all defaults filled in.
struct Plan {
    sizes: Vec<Size>,
    ways: Vec<Way>,
    measures: Vec<Measure>,
    rounds: usize,
    seconds: f64,
    clients: u16,
    cpu: usize,
}

impl Plan {
    fn of(options: &Options) -> Self {
        let Options { full, services, endpoints, rounds, seconds, clients, ways, measures, cpu, json: _ } = options;
        let chosen = |given: &[u16], quick: &[u16], all: &[u16]| match given {
            [] if *full => all.to_vec(),
            [] => quick.to_vec(),
            given => given.to_vec(),
        };
        let services = chosen(services, &[1, 1_000], &[1, 1_000, 10_000]);
        let endpoints = chosen(endpoints, &[3, 100, 1_000], &[3, 100, 1_000, 5_000]);
        let last_cpu = std::thread::available_parallelism().map_or(0, |count| count.get() - 1);
        Self {
            sizes: Size::all_of(&services, &endpoints),
            ways: available(ways),
            measures: if measures.is_empty() { Measure::value_variants() } else { measures }.to_vec(),
            rounds: rounds.map_or(if *full { 25 } else { 15 }, usize::from),
            seconds: seconds.unwrap_or(if *full { 0.2 } else { 0.1 }),
            clients: *clients,
            cpu: cpu.unwrap_or(last_cpu),
        }
    }

    fn scope(&self) -> Scope {
        Scope { rounds: self.rounds, seconds: self.seconds, clients: self.clients }
    }
}

/// The chosen ways that this machine supports, including plain routing; reports the others.
fn available(chosen: &[Way]) -> Vec<Way> {
    let chosen = |way: &Way| *way == Way::Direct || chosen.is_empty() || chosen.contains(way);
    let (can, cannot): (Vec<Way>, Vec<Way>) =
        Way::value_variants().iter().filter(|way| chosen(way)).partition(|way| way.is_available());
    for way in cannot {
        eprintln!("NOT MEASURED: {way:?}, its command is missing; `cargo xtask setup` installs it");
    }
    can
}

/// Measures every way at one size, side by side.
fn compare(plan: &Plan, size: Size, interrupt: &Interrupt, report: &mut Report) -> Result<()> {
    let mut sites = Vec::new();
    for way in &plan.ways {
        interrupt.check()?;
        let site = Site::up(*way, size, plan.clients, plan.cpu, interrupt)?;
        eprintln!("  {way:?}: in place after {:.1} s", site.loading_s());
        sites.push(site);
    }
    for round in 0..plan.rounds {
        eprintln!("  round {} of {}", round + 1, plan.rounds);
        for measure in &plan.measures {
            for (way, rate) in measure_all(&mut sites, round, *measure, plan.seconds, interrupt)? {
                report.add(size, *measure, way, rate.per_second());
            }
        }
    }
    for site in &mut sites {
        let moved = site.moved(interrupt)?;
        report.place(size, site.way(), site.loading_s(), moved);
    }
    Ok(())
}

/// Measures every site once, starting with a different one in each round.
fn measure_all(
    sites: &mut [Site],
    round: usize,
    measure: Measure,
    seconds: f64,
    interrupt: &Interrupt,
) -> Result<BTreeMap<Way, Rate>> {
    let count = sites.len();
    let order = (0..count).map(|step| (step + round) % count);
    order.map(|index| Ok((sites[index].way(), sites[index].measure(measure, seconds, interrupt)?))).collect()
}
