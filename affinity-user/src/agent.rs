//! The agent: keeps the dataplane in step with the source and the devices, and removes what is no longer used.
//!
//! The dataplane works without the agent, so the agent may be stopped, killed and started again at any time. It holds a lock on
//! its pin directory. It publishes before it attaches, unless the source does not answer in time. On SIGTERM it leaves
//! everything in place.

mod attacher;
mod health;
pub mod http;
mod lock;
mod node_health;
mod notices;
mod problems;
mod publish;
mod server;
mod sockets;
mod sweeping;
mod upkeep;

use std::{
    io::{self, Write},
    mem,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use aya_log::EbpfLogger;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tracing::{error, info, warn};

pub(crate) use self::notices::CLIENTS_ARE_NODES;
pub use self::{
    attacher::PatternError,
    lock::{Lock, LockError},
    node_health::NodeHealth,
    sockets::SocketOptions,
};
use self::{
    attacher::{Attacher, Attaching, DeviceSnapshot, Summary},
    health::HealthChecks,
    notices::{EventRecorder, LOOK_EVERY},
    problems::PortGuard,
    publish::{Publisher, STATUS_EVERY, StatusWriter, count},
    sockets::Sockets,
    sweeping::{Findings, Sweeping},
    upkeep::{Upkeep, all_or_nothing},
};
use crate::{
    attach::{self, AttachError, Attachment, Devices, cgroup::CgroupAttachment},
    desired::{self, NodeFacts},
    events::Consumer,
    linger::Limits,
    load::{self, LoadError, Loaded, Memory, mib},
    metrics::Vitals,
    pins::{PinDir, PinError},
    sockets::SocketDestroyer,
    source::{Feed, ObjectName, Snapshot, Source, SourceError, View},
    store::{
        StoreError,
        kernel::{KernelStore, OpenError},
    },
    sweep::{self, FilterPlans, Sweeper},
    sys::{SysError, monotonic_ns},
};

/// The agent cannot start or continue, or `attach` or `detach` failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Another agent uses the pin directory.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A device pattern is invalid.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// The dataplane cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The dataplane cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The maps cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A device cannot be attached or detached.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// A pin cannot be removed.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The source cannot be used.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Nothing in the source can be read. What is attached stays as it is.
    #[error("--source: {why}: {outcome}")]
    Unreadable {
        /// What is wrong with it.
        why: String,
        /// What is attached as a result.
        outcome: &'static str,
    },
    /// `--socket on`, and the kernel rejected the programs.
    #[error("--socket on: {0}")]
    NoSocketPrograms(String),
    /// A resource of the process cannot be used: a thread, a socket, a signal.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
    /// Metrics cannot be served at this address.
    #[error("--metrics {0}: {1}")]
    Http(SocketAddr, io::Error),
    /// `attach` without device names found no device.
    #[error("no device found that receives clients' packets: name one with --device; `ip link` lists all devices")]
    NothingFound,
    /// `attach` was given a device that does not exist.
    #[error("--device {0}: no such device: `ip link` lists all devices")]
    NoDevice(String),
    /// `detach` was given a device that nothing is attached to.
    #[error("{0}: nothing is attached to it")]
    NotAttached(String),
}

/// The options of `affinity run` and `affinity attach`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where services come from.
    pub source: Source,
    /// Names and glob patterns of devices; if empty, devices are discovered.
    pub devices: Vec<String>,
    /// Names and glob patterns of the devices that get XDP; if empty, a device's kind decides.
    pub xdp_devices: Vec<String>,
    /// How to attach them.
    pub attach: attach::Options,
    /// Whether and where sockets are translated.
    pub sockets: SocketOptions,
    /// How to load.
    pub load: load::Options,
    /// Where to pin.
    pub pin_dir: PathBuf,
    /// Configured facts about the node. Its addresses are read from the system.
    pub node: NodeFacts,
    /// Which services affinity handles.
    pub services: desired::Services,
    /// Our name in the label that assigns a service to a proxy.
    pub proxy_name: String,
    /// Decide and count, but let every packet pass.
    pub shadow: bool,
    /// How long backends, ids and pins are kept after their objects have gone.
    pub limits: Limits,
    /// Keep Linux from giving ports that affinity uses to the node's own connections.
    pub reserve_ports: bool,
    /// `run`: remove the dataplane on exit.
    pub detach_on_exit: bool,
    /// `run`: serve metrics and probes.
    pub http: Option<http::Options>,
    /// `run`: where to answer whether the node should get traffic.
    pub node_health: NodeHealth,
    /// Whether lines on standard output are JSON objects, like those of the log.
    pub json: bool,
}

impl Options {
    fn desired(&self) -> desired::Options {
        let Self { node, services, proxy_name, shadow, .. } = self.clone();
        desired::Options { node, services, proxy_name, shadow }
    }
}

/// Runs until SIGTERM or SIGINT. Prints one line on standard output once the dataplane is in step: `ready: ...`.
///
/// # Errors
/// [`AgentError`] if the dataplane cannot be brought up. Later failures are logged and retried.
pub fn run(options: &Options) -> Result<(), AgentError> {
    runtime()?.block_on(async {
        // From here on a signal does not end the process, but waits until the dataplane is up.
        let signals = Signals::new().map_err(|error| AgentError::System("signals", error))?;
        let mut agent = Agent::start(options).await?;
        let outcome = agent.run(signals).await;
        if options.detach_on_exit {
            take_away(&agent.pins)?;
        }
        outcome
    })
}

/// Brings the dataplane up once, in step with the current source, and returns.
///
/// # Errors
/// [`AgentError`], also if a pattern matches no device.
pub fn attach(options: &Options) -> Result<(), AgentError> {
    runtime()?.block_on(async {
        let _lock = Lock::take(&options.pin_dir)?;
        let pins = PinDir::new(&options.pin_dir);
        let mut attacher = Attacher::new(pins.clone(), options)?;
        let mut devices = Devices::new().map_err(no_netlink)?;
        let device_snapshot = DeviceSnapshot::at(&mut devices, attacher.needs_roles()).await.map_err(no_netlink)?;
        if let Some(missing) = attacher.without_device(&device_snapshot).pop() {
            return Err(AgentError::NoDevice(missing));
        }
        if attacher.finds_none(&device_snapshot) {
            return Err(AgentError::NothingFound);
        }
        let snapshot = options.source.read().await?;
        if let Some(why) = &snapshot.unreadable {
            let outcome = outcome_of_unreadable(attach::is_attached(&pins)?);
            return Err(AgentError::Unreadable { why: why.clone(), outcome });
        }
        let node = seen(&devices, &options.node).await?;
        warn_of_unserved(&mut devices).await?;
        all_or_nothing(&pins, async { attach_once(options, &pins, &mut attacher, &device_snapshot, node, &snapshot) })
            .await
    })
}

/// Loads, publishes and attaches, for [`attach()`].
fn attach_once(
    options: &Options,
    pins: &PinDir,
    attacher: &mut Attacher,
    device_snapshot: &DeviceSnapshot,
    node: NodeFacts,
    snapshot: &Snapshot,
) -> Result<(), AgentError> {
    let loaded = load::load(pins, &options.load)?;
    log_loaded(&loaded, options);
    let store = KernelStore::open(&options.pin_dir)?;
    let mut publisher = Publisher::new(store, options.desired(), options.limits, Arc::default(), Arc::default());
    publisher.learn(node);
    let view = View::default();
    view.is_current_at(monotonic_ns());
    publisher.take(snapshot);
    publisher.publish()?;
    PortGuard::new(options.reserve_ports).look(publisher.desired());
    replace_other_layouts(pins)?;
    StatusWriter::new(pins, &options.source, view)?.write()?;
    let failure = attacher.reconcile_all(device_snapshot)?;
    attacher.tell_of_others(options.services);
    sockets::reconcile(pins, &options.sockets, &loaded, &KernelStore::open(&options.pin_dir)?)?;
    if let Some(failure) = failure {
        return Err(failure.into());
    }
    say("attached", options.json, &publisher, &attacher.summary(), pins)
}

/// Another version of affinity may be attached: its programs would run next to these.
fn replace_other_layouts(pins: &PinDir) -> Result<(), AgentError> {
    for attach::Replaced { layout, adopted, detached, keeps_maps } in attach::replace_other_layouts(pins)? {
        warn!(
            "replaced a dataplane of another version (map layout {layout}): {} updated to the programs of this version, \
             {} detached; its pins and connections are {}",
            count(adopted, "attachment"),
            count(detached, "attachment"),
            if keeps_maps { "kept" } else { "lost" },
        );
    }
    Ok(())
}

const fn outcome_of_unreadable(is_attached: bool) -> &'static str {
    if is_attached { "the dataplane does not change" } else { "nothing is attached" }
}

/// What [`detach`] has detached.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Detached {
    /// From devices.
    pub devices: Vec<Attachment>,
    /// From cgroups.
    pub cgroups: Vec<CgroupAttachment>,
    /// What dataplanes of other layouts had attached.
    pub others: Vec<attach::Replaced>,
}

/// Detaches the programs from one device. Without a device, detaches them from everything and removes all pins. Returns what
/// was attached.
///
/// # Errors
/// [`AgentError`], also if an agent is running: it would attach again.
pub fn detach(pin_dir: &Path, device: Option<&str>) -> Result<Detached, AgentError> {
    let _lock = Lock::take(pin_dir)?;
    let pins = PinDir::new(pin_dir);
    let Some(device) = device else { return take_away(&pins) };
    let mut attachments = attach::attachments(&pins)?;
    attachments.retain(|attachment| attachment.device().as_deref() == Some(device));
    let Some(first) = attachments.first() else { return Err(AgentError::NotAttached(device.to_owned())) };
    Ok(Detached { devices: attach::detach(&pins, Some(first.ifindex))?, ..Detached::default() })
}

fn take_away(pins: &PinDir) -> Result<Detached, AgentError> {
    let detached = Detached {
        others: attach::detach_other_layouts(pins)?,
        cgroups: attach::cgroup::detach(pins)?,
        devices: attach::detach(pins, None)?,
    };
    pins.remove()?;
    Ok(detached)
}

fn runtime() -> Result<tokio::runtime::Runtime, AgentError> {
    // One thread: devices belong to its network namespace, and its tasks do not run in parallel.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| AgentError::System("runtime", error))
}

fn no_netlink(error: io::Error) -> AgentError {
    AgentError::System("network devices cannot be listed", error)
}

fn log_loaded(loaded: &Loaded, options: &Options) {
    let Loaded { pins, resized, dropped, upgraded, ticks, .. } = loaded;
    let (sizes, memory) = (&options.load.sizes, Memory::of_this_process());
    info!("tables take {} MiB of {memory} (set by --max-sessions and --max-flows): {sizes}", mib(loaded.cost()));
    info!(tick_ns = ticks.tick_ns, "programs loaded and pinned at {}", pins.root().display());
    if !resized.is_empty() {
        info!("copied to tables of another size: {}", resized.join(", "));
    }
    for (name, dropped) in dropped {
        warn!("{name}: {dropped} entries did not fit into the new size and were dropped");
    }
    if *upgraded > 0 {
        info!("{} updated to the new programs", count(*upgraded, "attachment"));
    }
}

/// Prints the line on standard output that reports success. With `json`, it is an object like those of the log, with `word` as
/// its `state`.
fn say(word: &str, json: bool, publisher: &Publisher, devices: &Summary, pins: &PinDir) -> Result<(), AgentError> {
    let Summary { number, names, .. } = devices;
    let names = if names.is_empty() { String::new() } else { format!(" ({names})") };
    let line = format!(
        "{word}: {}, {}{names}, pins at {}",
        publisher.summary(),
        count(*number, "device"),
        pins.root().display()
    );
    let line = if json {
        let timestamp = jiff::Timestamp::now().to_string();
        serde_json::json!({"timestamp": timestamp, "level": "INFO", "message": line, "state": word}).to_string()
    } else {
        line
    };
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|error| AgentError::System("standard output", error))
}

/// The agent after its start.
struct Agent {
    pins: PinDir,
    devices: Devices,
    attaching: Attaching,
    upkeep: Upkeep,
    sockets: Sockets,
    publisher: Publisher,
    ports: PortGuard,
    health: HealthChecks,
    feed: Feed,
    /// Whether the dataplane was ever in step with the source.
    is_ready: bool,
    /// Whether a dataplane of another version keeps the devices, because nothing is published yet.
    is_held_back: bool,
    sweeping: Sweeping,
    socket_destroyer: SocketDestroyer,
    consumer: Consumer,
    status_writer: StatusWriter,
    /// None if the source takes no notices.
    event_recorder: Option<EventRecorder>,
    node: NodeFacts,
    vitals: Arc<Vitals>,
    /// Copies the programs' log records to this process's log; none if they log nothing.
    flush_log: Option<Box<dyn FnMut()>>,
    /// Whether lines on standard output are JSON objects.
    json: bool,
    /// Held until the end.
    #[expect(dead_code, reason = "it works by being there")]
    lock: Option<Lock>,
}

/// How often the event ring and the log are drained: they have room for many times the records of one interval.
const CONSUME_EVERY: Duration = Duration::from_millis(50);
/// How long to wait for a source before the devices are attached without it.
const FIRST_SNAPSHOT: Duration = Duration::from_secs(1);
/// How often devices are checked without a notification.
const DEVICES_EVERY: Duration = Duration::from_secs(30);
/// How often the agent checks its pins and attachments.
const UPKEEP_EVERY: Duration = Duration::from_secs(3);
/// How long to wait after a failed step: at first, and at most.
const RETRY_AFTER: Duration = Duration::from_millis(100);
const RETRY_AT_MOST: Duration = Duration::from_secs(5);

impl Agent {
    /// Loads, publishes and attaches. If that fails, it is undone.
    async fn start(options: &Options) -> Result<Self, AgentError> {
        let lock = Lock::take(&options.pin_dir)?;
        let pins = PinDir::new(&options.pin_dir);
        let attacher = Attacher::new(pins.clone(), options)?;
        let vitals = Arc::new(Vitals::default());
        if let Some(http) = &options.http {
            http::serve(http, &options.pin_dir, Arc::clone(&vitals))
                .map_err(|error| AgentError::Http(http.address, error))?;
        }
        let health = HealthChecks::start(options.node_health, Arc::clone(&vitals))
            .map_err(|error| AgentError::System("thread", error))?;
        let mut feed = options.source.watch().await?;
        let first = first_snapshot(&mut feed, options, &pins).await?;
        let started =
            all_or_nothing(&pins.clone(), Self::bring_up(options, pins, attacher, vitals, health, feed, first)).await;
        started.map(|agent| Self { lock: Some(lock), ..agent })
    }

    async fn bring_up(
        options: &Options,
        pins: PinDir,
        mut attacher: Attacher,
        vitals: Arc<Vitals>,
        health: HealthChecks,
        feed: Feed,
        first: Option<Snapshot>,
    ) -> Result<Self, AgentError> {
        let mut loaded = load::load(&pins, &options.load)?;
        log_loaded(&loaded, options);
        let store = KernelStore::open(&options.pin_dir)?;
        let consumer = Consumer::new(&store.events)?;
        let filter = Arc::<FilterPlans>::default();
        let (filter_plans, publisher_vitals) = (Arc::clone(&filter), Arc::clone(&vitals));
        let mut publisher = Publisher::new(store, options.desired(), options.limits, filter_plans, publisher_vitals);
        let mut devices = Devices::new().map_err(no_netlink)?;
        publisher.learn(seen(&devices, &options.node).await?);
        let mut ports = PortGuard::new(options.reserve_ports);
        if let Some(snapshot) = &first {
            publisher.take(snapshot);
            publisher.publish()?;
            ports.look(publisher.desired());
        }
        // Until the source answers, a dataplane of another version may know more services than this one.
        let is_held_back = first.is_none() && !pins.other_layouts()?.is_empty();
        if !is_held_back {
            replace_other_layouts(&pins)?;
            attach_first(&mut attacher, &mut devices).await?;
            attacher.tell_of_others(options.services);
        }
        warn_of_unserved(&mut devices).await?;
        let cgroup = sockets::reconcile(&pins, &options.sockets, &loaded, &KernelStore::open(&options.pin_dir)?)?;
        let mut agent = Self {
            status_writer: StatusWriter::new(&pins, &options.source, feed.view.clone())?,
            event_recorder: feed.notices.clone().map(EventRecorder::new),
            node: options.node.clone(),
            consumer,
            flush_log: log_reader(&mut loaded),
            upkeep: Upkeep::new(&pins)?,
            sockets: Sockets::new(pins.clone(), cgroup),
            socket_destroyer: SocketDestroyer::start(&options.pin_dir)
                .map_err(|error| AgentError::System("thread", error))?,
            sweeping: Sweeping::start(
                Sweeper::new(KernelStore::open(&options.pin_dir)?, filter, feed.nodes.clone())?
                    .with_gap(options.limits.gap),
                Arc::clone(&vitals),
            )
            .map_err(|error| AgentError::System("thread", error))?,
            publisher,
            ports,
            health,
            feed,
            is_ready: false,
            is_held_back,
            attaching: Attaching::start(attacher).map_err(|error| AgentError::System("thread", error))?,
            vitals,
            pins,
            devices,
            json: options.json,
            lock: None,
        };
        agent.vitals.attached(agent.attaching.summary().number);
        agent.health.follow(agent.publisher.desired());
        if first.is_some() {
            agent.say_ready()?;
        }
        Ok(agent)
    }

    fn say_ready(&mut self) -> Result<(), AgentError> {
        self.is_ready = true;
        say("ready", self.json, &self.publisher, &self.attaching.summary(), &self.pins)
    }

    /// Runs until a signal arrives.
    async fn run(&mut self, mut signals: Signals) -> Result<(), AgentError> {
        let mut consume = every(CONSUME_EVERY);
        let mut look = every(DEVICES_EVERY);
        let mut publish_status = every(STATUS_EVERY);
        let mut upkeep = every(UPKEEP_EVERY);
        let mut notice = every(LOOK_EVERY);
        let mut linger = every(sweep::LOOK_EVERY);
        let mut retry = Retry::default();
        loop {
            let was_held_back = self.is_held_back;
            tokio::select! {
                () = signals.any() => break,
                snapshot = self.feed.snapshots.recv() => {
                    let snapshot = snapshot.ok_or_else(source_ended)?;
                    match &snapshot.unreadable {
                        Some(why) => warn!("{why}: until the source can be read, the dataplane does not change"),
                        None => {
                            self.publisher.take(&snapshot);
                            self.publish(&mut retry)?;
                        }
                    }
                }
                () = sleep_until(retry.at()), if retry.is_due() => self.publish(&mut retry)?,
                changed = self.devices.changed() => {
                    if let Err(error) = changed {
                        warn!("{error}; subscribing to device changes again");
                        self.devices = Devices::new().map_err(no_netlink)?;
                    }
                    self.reconcile(&mut retry).await?;
                }
                _ = look.tick() => self.reconcile(&mut retry).await?,
                _ = publish_status.tick() => self.publish_status()?,
                _ = upkeep.tick() => self.keep_whole(),
                _ = notice.tick(), if self.is_ready => self.notice(),
                _ = linger.tick(), if self.is_ready => self.end_lingering(&mut retry)?,
                _ = consume.tick() => {
                    self.vitals.tick();
                    self.consumer.keep_up();
                    if let Some(flush_log) = &mut self.flush_log {
                        flush_log();
                    }
                }
            }
            if was_held_back && !self.is_held_back {
                look.reset_immediately();
            }
        }
        self.attaching.stop();
        info!("stopping; the dataplane stays attached, unless --detach-on-exit is set");
        Ok(())
    }

    fn publish(&mut self, retry: &mut Retry) -> Result<(), AgentError> {
        match self.publisher.publish() {
            Ok(published) => {
                retry.succeeded();
                self.health.follow(self.publisher.desired());
                self.ports.look(self.publisher.desired());
                if published.left {
                    self.socket_destroyer.backends_left();
                }
                if !self.is_ready {
                    self.take_over()?;
                    self.say_ready()?;
                }
            }
            Err(error) => {
                let after = retry.failed();
                error!("publishing failed: {error}; trying again in {after:?}");
                // Backends may have gone before the step that failed.
                self.socket_destroyer.backends_left();
            }
        }
        Ok(())
    }

    /// Retires backends that no longer need to linger, and publishes what had no room until then.
    fn end_lingering(&mut self, retry: &mut Retry) -> Result<(), AgentError> {
        match self.publisher.end_lingering(&self.sweeping.traffic()) {
            Ok(false) => return Ok(()),
            Ok(true) => {}
            Err(error) => error!("{error}"),
        }
        self.socket_destroyer.backends_left();
        if self.publisher.is_due() { self.publish(retry) } else { Ok(()) }
    }

    /// Takes the devices over from a dataplane of another version.
    fn take_over(&mut self) -> Result<(), AgentError> {
        if mem::take(&mut self.is_held_back) {
            replace_other_layouts(&self.pins)?;
        }
        Ok(())
    }

    /// Processes the findings of the sweep, and sends notices to the owners of services.
    fn notice(&mut self) {
        let Findings { evicted, met, clients_are_nodes } = self.sweeping.take_findings();
        if let Some(Err(error)) = met.map(|met| self.publisher.forget_names(&met)) {
            error!("{error}");
        }
        let Some(event_recorder) = &mut self.event_recorder else { return };
        let now = std::time::Instant::now();
        if let Some(services) = clients_are_nodes {
            event_recorder.clients_are_nodes = services.iter().filter_map(|service| named(service)).collect();
        }
        event_recorder.look(self.publisher.problems(), self.publisher.desired(), now);
        for service in evicted {
            if let Some(service) = named(&service) {
                event_recorder.evicted(&service, self.node.name.as_deref().unwrap_or_default(), now);
            }
        }
    }

    /// Publishes the status: in the maps, and over HTTP.
    fn publish_status(&mut self) -> Result<(), AgentError> {
        if self.sweeping.has_ended() {
            return Err(AgentError::System("sweep", io::Error::other("its thread has ended unexpectedly")));
        }
        self.vitals.attached(self.attaching.summary().number);
        if self.is_ready
            && let Err(error) = self.status_writer.write()
        {
            error!("{error}");
        }
        Ok(())
    }

    /// Restores removed pins and attachments, and reports what cannot be restored to the probes.
    fn keep_whole(&mut self) {
        if self.is_ready {
            self.ports.look(self.publisher.desired());
        }
        let repaired = self.upkeep.repair();
        match &repaired {
            Ok(names) if names.is_empty() => {}
            Ok(names) => warn!("pins had been removed; restored them: {}", names.join(", ")),
            Err(_) => {}
        }
        let sockets = self.sockets.repair();
        let damage = repaired.err().or(sockets.err()).or_else(|| self.attaching.summary().lost);
        if self.vitals.damaged(damage.clone())
            && let Some(damage) = damage
        {
            error!("{damage}");
        }
        if let Err(error) = self.attaching.repair() {
            error!("{error}");
        }
    }

    /// Follows changes of the devices and their addresses.
    async fn reconcile(&mut self, retry: &mut Retry) -> Result<(), AgentError> {
        if !self.is_held_back
            && let Err(error) = self.attaching.keep_up(&mut self.devices).await
        {
            error!("network devices cannot be listed: {error}");
        }
        if self.look_at_node().await { self.publish(retry) } else { Ok(()) }
    }

    /// Reads the node's addresses. Returns whether a change of them has to be published.
    async fn look_at_node(&mut self) -> bool {
        match seen(&self.devices, &self.node).await {
            Ok(node) => self.publisher.learn(node) && self.is_ready,
            Err(error) => {
                error!("{error}");
                false
            }
        }
    }
}

/// The first snapshot. None if the source does not answer: then the dataplane continues as before, on new devices too. Also
/// none if nothing in the source can be read while a dataplane is attached.
async fn first_snapshot(feed: &mut Feed, options: &Options, pins: &PinDir) -> Result<Option<Snapshot>, AgentError> {
    let Ok(first) = timeout(FIRST_SNAPSHOT, feed.snapshots.recv()).await else {
        warn!("waiting for {}; until it answers, the dataplane does not change", options.source);
        return Ok(None);
    };
    let first = first.ok_or_else(source_ended)?;
    let Some(why) = &first.unreadable else { return Ok(Some(first)) };
    if !attach::is_attached(pins)? {
        return Err(AgentError::Unreadable { why: why.clone(), outcome: outcome_of_unreadable(false) });
    }
    warn!("{why}: until the source can be read, the dataplane does not change");
    Ok(None)
}

/// The node with its current addresses.
async fn seen(devices: &Devices, node: &NodeFacts) -> Result<NodeFacts, AgentError> {
    let network = devices.network().await.map_err(no_netlink)?;
    Ok(NodeFacts { addresses: network.own_addresses(), ..node.clone() })
}

/// Attaches the existing devices, and warns about missing ones.
async fn attach_first(attacher: &mut Attacher, devices: &mut Devices) -> Result<(), AgentError> {
    let device_snapshot = DeviceSnapshot::at(devices, attacher.needs_roles()).await.map_err(no_netlink)?;
    for pattern in attacher.without_device(&device_snapshot) {
        warn!("--device {pattern}: no such device yet; it will be attached when it appears");
    }
    if attacher.finds_none(&device_snapshot) {
        warn!("no device found yet that receives clients' packets; it will be attached when it appears");
    }
    attacher.reconcile_all(&device_snapshot)?.map_or(Ok(()), |failure| Err(failure.into()))
}

/// Warns about devices that lead out of the node but cannot be attached.
async fn warn_of_unserved(devices: &mut Devices) -> Result<(), AgentError> {
    let (list, network) = (devices.list().await.map_err(no_netlink)?, devices.network().await.map_err(no_netlink)?);
    for device in attach::unserved(&list, &network) {
        warn!("{}", attach::unserved_text(&device.name));
    }
    Ok(())
}

/// Parses `namespace/name`.
fn named(service: &str) -> Option<ObjectName> {
    service.split_once('/').map(|(namespace, name)| ObjectName::new(namespace, name))
}

fn source_ended() -> AgentError {
    AgentError::System("source", io::Error::other("its thread has ended unexpectedly"))
}

fn every(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// When to retry: the delay grows with each failure.
#[derive(Debug, Default)]
struct Retry {
    due: Option<(Instant, Duration)>,
}

impl Retry {
    const fn is_due(&self) -> bool {
        self.due.is_some()
    }

    fn at(&self) -> Instant {
        self.due.map_or_else(Instant::now, |(at, _)| at)
    }

    const fn succeeded(&mut self) {
        self.due = None;
    }

    fn failed(&mut self) -> Duration {
        let after = self.due.map_or(RETRY_AFTER, |(_, after)| (after * 2).min(RETRY_AT_MOST));
        self.due = Some((Instant::now() + after, after));
        after
    }
}

/// A function that copies the programs' log records to this process's log; none if they write none.
fn log_reader(loaded: &mut Loaded) -> Option<Box<dyn FnMut()>> {
    let mut logger = EbpfLogger::init(&mut loaded.ebpf).ok()?;
    Some(Box::new(move || logger.flush()))
}
