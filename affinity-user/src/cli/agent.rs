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
    /// Source of Services, EndpointSlices and Nodes: `kubernetes` (a cluster's API), a file of Kubernetes YAML, or a
    /// directory of such files
    #[arg(long, value_name = "kubernetes|PATH")]
    source: SourceName,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Services to handle. affinity: those with sessionAffinity: ClientIP. labelled: those with this proxy's name in the
    /// label service.kubernetes.io/service-proxy-name. all: all but headless ones. Services labelled for this proxy are
    /// always handled, those labelled for another proxy never [default: affinity with --source kubernetes, all with files]
    #[arg(long, value_name = "WHICH", value_parser = services())]
    services: Option<Services>,
    /// Name of this proxy in the label service.kubernetes.io/service-proxy-name
    #[arg(long, value_name = "NAME", default_value = DEFAULT_PROXY_NAME)]
    service_proxy_name: String,
    /// Shadow mode: decide, pin and count, but change no packet
    #[arg(long)]
    shadow: bool,
    /// Network devices that receive clients' packets: names, or patterns such as 'eth*' [default: devices with a default
    /// route or an address of the node, and devices of pods]
    #[arg(long = "device", value_name = "NAME|GLOB", num_args = 1..)]
    devices: Vec<String>,
    /// XDP mode. auto: native XDP, or TC if the driver has none; always TC on devices of pods. native: native XDP, or an
    /// error. off, generic: TC
    #[arg(long, value_name = "MODE", default_value_t = XdpPolicy::Auto, value_parser = xdp_policy())]
    xdp: XdpPolicy,
    /// Use XDP on these devices and TC on all others [default: depends on the kind of the device]
    #[arg(long = "xdp-device", value_name = "NAME|GLOB", num_args = 1..)]
    xdp_devices: Vec<String>,
    /// Path of translated packets and their replies. stack: through the node's network stack, with its packet filter and
    /// connection tracking. redirect: TC redirects them between attached devices and bypasses the stack, which is faster
    #[arg(long, value_name = "WAY", value_enum, default_value_t = Forwarding::Stack)]
    forwarding: Forwarding,
    /// Maximum number of rejections (RST or ICMP error) per second on each CPU; a burst may be ten times as large. Packets
    /// above the limit are dropped. 0: no limit
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    rejections_per_second: u32,
    /// Translate connections of the node's own processes and pods at connect(). auto: if this is the node's own network
    /// namespace and cgroup version 2 is mounted. on: always, or an error. off: never
    #[arg(long, value_name = "MODE", default_value_t = SocketPolicy::Auto, value_parser = socket_policy())]
    socket: SocketPolicy,
    /// Cgroup (version 2): connections of the processes in it are translated [default: the root cgroup, all processes]
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Attach TC programs as clsact filters even if the kernel has tcx links
    #[arg(long)]
    no_tcx: bool,
    /// Log level of the kernel programs, for debugging [default: they log nothing]
    #[arg(long, value_name = "LEVEL", value_enum)]
    programs_log: Option<ProgramsLog>,
    /// Keep Linux from assigning node ports and masquerade ports to the node's own connections: add them to
    /// net.ipv4.ip_local_reserved_ports. They stay there after the agent exits
    #[arg(long)]
    reserve_ports: bool,
    /// An endpoint, a slice or a whole Service that is absent for less than this keeps its pins; at most 24h
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    gap: Duration,
    /// Open connections to a pod that has left all services end when the pod has sent nothing for this time; at most 24h
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
    /// On exit, remove the dataplane with all pins and connections
    #[arg(long)]
    detach_on_exit: bool,
    /// With --source kubernetes: do not post Kubernetes Events about Services
    #[arg(long)]
    no_kubernetes_events: bool,
    /// Serve /metrics, /healthz and /readyz over HTTP at this address
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<SocketAddr>,
    /// Maximum number of services, and of backends, with their own series; all others are summed up as `other`
    #[arg(long, value_name = "N", default_value_t = 1000, requires = "metrics")]
    metrics_max_series: usize,
    /// Serve the node's health for load balancers at this address, as kube-proxy does: /healthz returns 503 while the node
    /// is being removed or the agent cannot apply a change of its source [default: off; with --services all: port 10256 at
    /// all addresses]
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
    /// Detach only this device; everything else stays attached
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
}

impl DetachArgs {
    pub(crate) fn run(&self, pin_dir: &Path) -> Result<(), Error> {
        let pins = PinDir::new(pin_dir);
        let is_there =
            !matches!(pins.exists(), Ok(false)) || pins.other_layouts().is_ok_and(|others| !others.is_empty());
        if !is_there {
            eprintln!("no dataplane at {}: nothing to remove", pin_dir.display());
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
