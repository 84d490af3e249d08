//! `bench sync`: a cluster of many services, from its API to the kernel's maps.
//!
//! The agent runs as in production, with the default sizes, against a double of the API over real HTTP. The benchmark measures
//! its start, a restart with the maps that it left, its memory, and the time from an event to its effect: an endpoint is
//! replaced, and the clock runs from before the API double gets the change until the service's frontend has the new endpoint.

mod cluster;
mod report;

use std::{
    thread,
    time::{Duration, Instant},
};

use affinity_common::abi::{Frontend, FrontendKey, Port, V4};
use affinity_user::{load::mib, store::kernel::KernelStore};
use anyhow::{Context, Result, bail, ensure};

pub use self::cluster::Cluster;
use self::report::{Latency, Report};
use crate::{
    apiserver::ApiServer,
    lab::{Agent, Lab, WIRE},
};

/// How long the agent may take to be ready.
const START_PATIENCE: Duration = Duration::from_mins(5);
/// How long a change may take to be seen.
const CHANGE_PATIENCE: Duration = Duration::from_secs(10);
/// How often the map is read: the resolution of the figures.
const LOOK_EVERY: Duration = Duration::from_micros(100);
/// The pause between two changes: long enough for the agent to finish the last one.
const PAUSE: Duration = Duration::from_millis(60);

/// What to measure, and how to say it.
#[derive(clap::Args)]
pub struct Options {
    /// Services.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=500_000))]
    services: u32,
    /// Endpoints of each service, in one slice.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    endpoints: u32,
    /// Changes of one endpoint.
    #[arg(long, default_value_t = 500)]
    changes: u32,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Measures, and prints.
///
/// # Errors
/// If the lab cannot be brought up (not root), or the agent does not work.
pub fn run(options: &Options) -> Result<()> {
    let lab = Lab::with_pods(0)?;
    let api = ApiServer::start_in(lab.node())?;
    let mut cluster = Cluster::new(options.services, options.endpoints);
    cluster.fill(&api)?;
    eprintln!("{} services with {} endpoints each", options.services, options.endpoints);

    let (mut agent, start) = started(&lab, &api)?;
    let store = KernelStore::open(lab.pin_dir())?;
    check(&store, &cluster)?;
    let memory_at_start = agent.memory()?;
    let mut latencies = Vec::new();
    for number in 0..options.changes {
        latencies.push(change(&mut cluster, &api, &store, number)?);
        thread::sleep(PAUSE);
    }
    check(&store, &cluster)?;
    let memory = agent.memory()?;

    agent.kill()?;
    let begun = Instant::now();
    agent.restart()?;
    let restart = begun.elapsed();
    check(&store, &cluster)?;
    agent.terminate()?;
    Report {
        services: options.services,
        endpoints: options.endpoints,
        start_s: start.as_secs_f64(),
        restart_s: restart.as_secs_f64(),
        memory_mib: mib(memory_at_start.now.max(memory.now)),
        memory_peak_mib: mib(memory.peak),
        changes: options.changes,
        latency: Latency::of(latencies),
    }
    .print(options.json)
}

/// Starts the agent, and returns how long it took to be ready.
fn started(lab: &Lab, api: &ApiServer) -> Result<(Agent, Duration)> {
    let mut command = lab.affinity_command()?;
    command.args(["run", "--source", "kubernetes", "--device", WIRE, "--socket", "off"]);
    command.arg("--kubeconfig").arg(api.kubeconfig(lab.scratch())?);
    let begun = Instant::now();
    let agent = Agent::start(command, START_PATIENCE)?;
    Ok((agent, begun.elapsed()))
}

/// Checks that the kernel has the whole cluster.
fn check(store: &KernelStore, cluster: &Cluster) -> Result<()> {
    let frontends = store.v4.frontends.iter().count();
    let members = store.members.iter().count();
    let expected = (cluster.services() as usize, cluster.services() as usize * cluster.endpoints() as usize);
    ensure!((frontends, members) == expected, "{frontends} frontends and {members} members, not {expected:?}");
    Ok(())
}

/// Replaces an endpoint, and returns how long it took until clients of its service can get the new one.
fn change(cluster: &mut Cluster, api: &ApiServer, store: &KernelStore, number: u32) -> Result<Duration> {
    let service = cluster.pick(number);
    let key = FrontendKey::new(V4(cluster.address(service).octets()), Port::new(cluster::PORT), cluster::TCP);
    let former = store.v4.frontends.get(&key)?.context("the service has no frontend")?;
    let (slice, pod) = cluster.replace(service, number);
    let begun = Instant::now();
    api.put(slice)?;
    loop {
        let now = store.v4.frontends.get(&key)?.context("the service has lost its frontend")?;
        let elapsed = begun.elapsed();
        if now != former {
            ensure!(addresses(store, &now)?.contains(&pod.to_ipv6_mapped().octets()), "{pod} is not among the slots");
            return Ok(elapsed);
        }
        if elapsed > CHANGE_PATIENCE {
            bail!("change {number} is not seen");
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// The addresses of the backends that a frontend's slots name.
fn addresses(store: &KernelStore, frontend: &Frontend) -> Result<Vec<[u8; 16]>> {
    let slots = frontend.slot_first..frontend.slot_first + frontend.slot_count;
    let backend =
        |slot| Ok(store.backends.get(&store.slots.load_u32(slot))?.context("a slot names a backend")?.address);
    slots.map(backend).collect()
}
