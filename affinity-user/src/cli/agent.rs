//! `affinity run`, `attach` and `detach`: the dataplane's life.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
};

use aya_log::Level;
use clap::{
    Args, ValueEnum,
    builder::{PossibleValuesParser, TypedValueParser},
};

use super::{
    Global,
    error::Error,
    node::NodeArgs,
    sizes::SizeArgs,
    source::{ClusterArgs, SourceName},
};
use crate::{
    agent,
    attach::{self, XdpPolicy, cgroup::SocketPolicy},
    desired::{DEFAULT_PROXY_NAME, Services},
    load::{self, PinDir},
    source::Source,
};

/// What `affinity run` and `affinity attach` have in common.
#[derive(Args, Clone, Debug)]
pub(crate) struct AttachArgs {
    /// Where Services and EndpointSlices come from: `kubernetes`, a cluster's API; or a file of Kubernetes YAML, or a
    /// directory of such files
    #[arg(long, value_name = "kubernetes|PATH")]
    source: SourceName,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Which services are handled: those with ClientIP affinity, those labelled
    /// service.kubernetes.io/service-proxy-name for this proxy, or all; another proxy does the rest. Those labelled for
    /// another proxy never are [default: affinity of a cluster, all of files]
    #[arg(long, value_name = "WHICH", value_parser = services())]
    services: Option<Services>,
    /// This proxy's name in that label
    #[arg(long, value_name = "NAME", default_value = DEFAULT_PROXY_NAME)]
    service_proxy_name: String,
    /// Decide, remember and count, but change no packet: to see what would be
    #[arg(long)]
    shadow: bool,
    /// Network devices that clients' packets enter by: names, or patterns such as 'eth*'; without it they are found:
    /// those with a default route or an address of the node, and those that lead to pods
    #[arg(long = "device", value_name = "NAME|GLOB", num_args = 1..)]
    devices: Vec<String>,
    /// Where XDP is used: auto tries native, then TC; native insists; off uses TC, and so does generic
    #[arg(long, value_name = "MODE", default_value_t = XdpPolicy::Auto, value_parser = xdp_policy())]
    xdp: XdpPolicy,
    /// Of the devices, those that XDP is used on, whatever their kind; the others have TC. Without it their kinds decide
    #[arg(long = "xdp-device", value_name = "NAME|GLOB", num_args = 1..)]
    xdp_devices: Vec<String>,
    /// How translated packets and replies to them go on: through the node's stack, with its packet filter and connection
    /// tracking; or past it, redirected by TC between attached devices, which is faster
    #[arg(long, value_name = "WAY", value_enum, default_value_t = Forwarding::Stack)]
    forwarding: Forwarding,
    /// Translate when processes of this machine connect, its own and pods': auto does in the node's own network namespace
    #[arg(long, value_name = "MODE", default_value_t = SocketPolicy::Auto, value_parser = socket_policy())]
    socket: SocketPolicy,
    /// The cgroup (version 2) whose processes that is done for; without it the root: all processes
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Use clsact filters even where the kernel has tcx links
    #[arg(long)]
    no_tcx: bool,
    /// What the kernel programs log, for debugging; without it they cannot log, which costs nothing
    #[arg(long, value_name = "LEVEL", value_enum)]
    programs_log: Option<ProgramsLog>,
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    sizes: SizeArgs,
}

fn xdp_policy() -> impl TypedValueParser<Value = XdpPolicy> {
    PossibleValuesParser::new(XdpPolicy::ALL.map(XdpPolicy::name)).try_map(|name| name.parse::<XdpPolicy>())
}

fn socket_policy() -> impl TypedValueParser<Value = SocketPolicy> {
    PossibleValuesParser::new(SocketPolicy::ALL.map(SocketPolicy::name)).try_map(|name| name.parse::<SocketPolicy>())
}

fn services() -> impl TypedValueParser<Value = Services> {
    PossibleValuesParser::new(Services::ALL.map(Services::name)).try_map(|name| name.parse::<Services>())
}

/// How translated packets go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Forwarding {
    Stack,
    Redirect,
}

/// Levels of the kernel programs' log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum ProgramsLog {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<ProgramsLog> for Level {
    fn from(level: ProgramsLog) -> Self {
        match level {
            ProgramsLog::Error => Self::Error,
            ProgramsLog::Warn => Self::Warn,
            ProgramsLog::Info => Self::Info,
            ProgramsLog::Debug => Self::Debug,
            ProgramsLog::Trace => Self::Trace,
        }
    }
}

impl AttachArgs {
    /// In a cluster another proxy is at work; who writes files means what they say.
    fn services(&self) -> Services {
        self.services.unwrap_or(match self.source {
            SourceName::Kubernetes => Services::Affinity,
            SourceName::Path(_) => Services::All,
        })
    }

    fn options(&self, global: &Global, detach_on_exit: bool) -> Result<agent::Options, Error> {
        let redirect = self.forwarding == Forwarding::Redirect;
        Ok(agent::Options {
            source: self.cluster.source(&self.source, global)?,
            devices: self.devices.clone(),
            xdp_devices: self.xdp_devices.clone(),
            attach: attach::Options { xdp: self.xdp, tcx: !self.no_tcx, any_kind: false, redirect },
            sockets: agent::SocketOptions { policy: self.socket, cgroup: self.cgroup.clone() },
            load: load::Options {
                sizes: self.sizes.sizes(),
                log_level: self.programs_log.map(Level::from),
                redirect,
                fixed: None,
            },
            pin_dir: global.pin_dir.clone(),
            node: self.node.facts(global)?,
            services: self.services(),
            proxy_name: self.service_proxy_name.clone(),
            shadow: self.shadow,
            detach_on_exit,
            http: None,
        })
    }

    /// `affinity attach`.
    pub(crate) fn attach(&self, global: &Global) -> Result<(), Error> {
        Ok(agent::attach(&self.options(global, false)?)?)
    }
}

/// Options of `affinity run`.
#[derive(Args, Clone, Debug)]
pub(crate) struct RunArgs {
    /// At the end take the dataplane away, with all pins and connections
    #[arg(long)]
    detach_on_exit: bool,
    /// With --source kubernetes: tell owners of Services nothing by Kubernetes Events
    #[arg(long)]
    no_kubernetes_events: bool,
    /// Serve /metrics, /healthz and /readyz over HTTP here
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<SocketAddr>,
    /// How many services, and how many backends, have metrics of their own; the rest are summed as `other`
    #[arg(long, value_name = "N", default_value_t = 1000, requires = "metrics")]
    metrics_max_series: usize,
    #[command(flatten)]
    attach: AttachArgs,
}

impl RunArgs {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Error> {
        let mut options = self.attach.options(global, self.detach_on_exit)?;
        if let Source::Kubernetes(cluster) = &mut options.source {
            cluster.events = !self.no_kubernetes_events;
        }
        let max_series = self.metrics_max_series;
        options.http = self.metrics.map(|address| agent::http::Options { address, max_series });
        Ok(agent::run(&options)?)
    }
}

/// Options of `affinity detach`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct DetachArgs {
    /// Only from this device, and leave everything else in place
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
}

impl DetachArgs {
    pub(crate) fn run(&self, pin_dir: &Path) -> Result<(), Error> {
        if matches!(PinDir::new(pin_dir).exists(), Ok(false)) {
            eprintln!("no dataplane at {}: nothing to take away", pin_dir.display());
            return Ok(());
        }
        let mut hooks: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        let detached = agent::detach(pin_dir, self.device.as_deref())?;
        for attachment in &detached.devices {
            let device = attachment.device().unwrap_or_else(|| format!("device {}", attachment.ifindex));
            hooks.entry(device).or_default().push(attachment.hook.name());
        }
        let mut out = io::stdout().lock();
        for (device, hooks) in hooks {
            writeln!(out, "detached {device}: {}", hooks.join(", "))?;
        }
        let programs: Vec<_> = detached.cgroups.iter().map(|attachment| attachment.program).collect();
        if !programs.is_empty() {
            writeln!(out, "detached sockets: {}", programs.join(", "))?;
        }
        if self.device.is_none() {
            writeln!(out, "removed {}", pin_dir.display())?;
        }
        Ok(())
    }
}
