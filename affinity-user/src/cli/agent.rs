//! `affinity run`, `attach` and `detach`: the lifecycle of the dataplane.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use aya_log::Level;
use clap::{
    Args, ValueEnum,
    builder::{PossibleValuesParser, TypedValueParser},
};
use jiff::SignedDuration;

use super::{
    Global,
    error::Error,
    logging::LogFormat,
    node::{NodeArgs, SizeArgs},
    source::{ClusterArgs, SourceName},
};
use crate::{
    agent::{self, NodeHealth},
    attach::{self, XdpPolicy, cgroup::SocketPolicy},
    desired::{DEFAULT_PROXY_NAME, Services},
    linger::Limits,
    load::{self, Unused},
    pins::PinDir,
    source::Source,
};

/// What `affinity run` and `affinity attach` have in common.
#[derive(Args, Clone, Debug)]
pub(crate) struct AttachArgs {
    /// Where Services, EndpointSlices and Nodes come from: `kubernetes`, a cluster's API; or a file of Kubernetes YAML; or
    /// a directory of such files
    #[arg(long, value_name = "kubernetes|PATH")]
    source: SourceName,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Which services are handled: those with ClientIP affinity, those labelled
    /// service.kubernetes.io/service-proxy-name for this proxy, or all. Those labelled for this proxy always are, those
    /// labelled for another proxy never [default: affinity with --source kubernetes, all with files]
    #[arg(long, value_name = "WHICH", value_parser = services())]
    services: Option<Services>,
    /// This proxy's name in that label
    #[arg(long, value_name = "NAME", default_value = DEFAULT_PROXY_NAME)]
    service_proxy_name: String,
    /// Decide, pin and count, but change no packet
    #[arg(long)]
    shadow: bool,
    /// Network devices that clients' packets enter by: names, or patterns such as 'eth*'. Without it they are found: those
    /// with a default route or an address of the node, and those that lead to pods
    #[arg(long = "device", value_name = "NAME|GLOB", num_args = 1..)]
    devices: Vec<String>,
    /// Use of XDP: auto tries native, then TC, and uses TC for devices that lead to pods; native insists; off uses TC, and so
    /// does generic
    #[arg(long, value_name = "MODE", default_value_t = XdpPolicy::Auto, value_parser = xdp_policy())]
    xdp: XdpPolicy,
    /// Use XDP on these devices, whatever their kind, and TC on the others. Without it, the kind of a device decides
    #[arg(long = "xdp-device", value_name = "NAME|GLOB", num_args = 1..)]
    xdp_devices: Vec<String>,
    /// Where translated packets and their replies go: through the node's stack, with its packet filter and connection
    /// tracking; or redirected by TC between attached devices, without the stack, which is faster
    #[arg(long, value_name = "WAY", value_enum, default_value_t = Forwarding::Stack)]
    forwarding: Forwarding,
    /// How many packets each processor may reject with an RST or an ICMP error: so many a second, after ten times as many
    /// at once. More are dropped. 0: no limit
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    rejections_per_second: u32,
    /// Translate at connect() for the node's own processes and pods: auto does if this is the node's own network namespace
    #[arg(long, value_name = "MODE", default_value_t = SocketPolicy::Auto, value_parser = socket_policy())]
    socket: SocketPolicy,
    /// The cgroup (version 2): sockets of the processes below it are translated. Without it, the root: all processes
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Use clsact filters even if the kernel has tcx links
    #[arg(long)]
    no_tcx: bool,
    /// Log messages of the kernel programs, for debugging. Without it, they log nothing
    #[arg(long, value_name = "LEVEL", value_enum)]
    programs_log: Option<ProgramsLog>,
    /// Keep Linux from giving node ports and masquerade ports to the node's own connections: add those that it could give to
    /// net.ipv4.ip_local_reserved_ports. They stay there
    #[arg(long)]
    reserve_ports: bool,
    /// How long an endpoint, a slice or a whole Service may be away, and find its pins when it comes back
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    gap: Duration,
    /// How long connections to a pod that has left its service are kept although it sends nothing; while it sends, they go on
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration)]
    linger: Duration,
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    sizes: SizeArgs,
}

/// Parses a duration of at most a day.
fn duration(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<SignedDuration>().ok().and_then(|duration| Duration::try_from(duration).ok());
    let is_short = |duration: &Duration| *duration <= Duration::from_hours(24);
    parsed.filter(is_short).ok_or_else(|| "expected a duration from 0s to 24h, such as 10s".to_owned())
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
    /// In a cluster another proxy is active, so only services with affinity are ours. Users who write files mean all services
    /// in them.
    fn services(&self) -> Services {
        self.services.unwrap_or(match self.source {
            SourceName::Kubernetes => Services::Affinity,
            SourceName::Path(_) => Services::All,
        })
    }

    fn options(&self, global: &Global, detach_on_exit: bool) -> Result<agent::Options, Error> {
        let redirect = self.forwarding == Forwarding::Redirect;
        let sockets = agent::SocketOptions { policy: self.socket, cgroup: self.cgroup.clone() };
        let unused = Unused { xdp: self.xdp == XdpPolicy::Off, sockets: !sockets.may_attach() };
        Ok(agent::Options {
            source: self.cluster.source(&self.source, global)?,
            devices: self.devices.clone(),
            xdp_devices: self.xdp_devices.clone(),
            attach: attach::Options { xdp: self.xdp, tcx: !self.no_tcx, any_kind: false, redirect },
            sockets,
            load: load::Options {
                sizes: self.sizes.sizes(),
                log_level: self.programs_log.map(Level::from),
                redirect,
                unused,
                rejections_per_second: self.rejections_per_second,
                fixed: None,
                object: None,
            },
            pin_dir: global.pin_dir.clone(),
            node: self.node.facts(global)?,
            services: self.services(),
            proxy_name: self.service_proxy_name.clone(),
            shadow: self.shadow,
            limits: Limits { gap: self.gap, linger: self.linger },
            reserve_ports: self.reserve_ports,
            detach_on_exit,
            http: None,
            node_health: NodeHealth::Off,
            json: global.log_format == LogFormat::Json,
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
    /// At the end remove the dataplane, with all pins and connections
    #[arg(long)]
    detach_on_exit: bool,
    /// With --source kubernetes: post no Kubernetes Events about Services
    #[arg(long)]
    no_kubernetes_events: bool,
    /// Serve /metrics, /healthz and /readyz over HTTP here
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<SocketAddr>,
    /// How many services, and how many backends, have series of their own; the others are summed up as `other`
    #[arg(long, value_name = "N", default_value_t = 1000, requires = "metrics")]
    metrics_max_series: usize,
    /// Answer as kube-proxy does at /healthz whether this node should have traffic, for load balancers: not while it is
    /// about to be taken away, or is out of step with the source [default: off; with --services all: port 10256 at all
    /// addresses]
    #[arg(long, value_name = "ADDR:PORT|off", value_parser = node_health)]
    node_health: Option<NodeHealthArg>,
    #[command(flatten)]
    attach: AttachArgs,
}

/// The value of `--node-health`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct NodeHealthArg(NodeHealth);

fn node_health(text: &str) -> Result<NodeHealthArg, String> {
    if text == "off" {
        return Ok(NodeHealthArg(NodeHealth::Off));
    }
    let address = text.parse().map_err(|_| "expected ADDR:PORT, such as 0.0.0.0:10256, or off".to_owned())?;
    Ok(NodeHealthArg(NodeHealth::At(address)))
}

impl RunArgs {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Error> {
        let mut options = self.attach.options(global, self.detach_on_exit)?;
        if let Source::Kubernetes(cluster) = &mut options.source {
            cluster.events = !self.no_kubernetes_events;
        }
        let max_series = self.metrics_max_series;
        options.http = self.metrics.map(|address| agent::http::Options { address, max_series });
        options.node_health = match self.node_health {
            Some(NodeHealthArg(given)) => given,
            None if self.attach.services == Some(Services::All) => NodeHealth::Everywhere,
            None => NodeHealth::Off,
        };
        Ok(agent::run(&options)?)
    }
}

/// Options of `affinity detach`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct DetachArgs {
    /// Only from this device; everything else stays in place
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
}

impl DetachArgs {
    pub(crate) fn run(&self, pin_dir: &Path) -> Result<(), Error> {
        let pins = PinDir::new(pin_dir);
        let is_there =
            !matches!(pins.exists(), Ok(false)) || pins.other_layouts().is_ok_and(|others| !others.is_empty());
        if !is_there {
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
        for attach::Replaced { layout, detached, .. } in &detached.others {
            writeln!(out, "detached {detached} attachments of another version (map layout {layout})")?;
        }
        if self.device.is_none() {
            writeln!(out, "removed {}", pin_dir.display())?;
        }
        Ok(())
    }
}
