//! The metrics, in the text formats that Prometheus reads. docs/metrics.md lists all of them.
//!
//! Most are read from the maps at each scrape. Sessions and flows are not walked for that: the sweep has counted them.

mod format;
mod tables;
mod vitals;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex},
    time::UNIX_EPOCH,
};

use affinity_common::abi::{REASONS, Reason, USAGES};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge, info::Info},
    registry::Registry,
};

use self::tables::{Counted, Counts};
pub use self::{
    format::{Format, classic},
    tables::{SEVERAL, Tables},
    vitals::{STUCK_AFTER, Vitals},
};
use crate::sweep::{Census, Totals};

/// The label value of all that have no series of their own.
pub const OTHER: &str = "other";

/// The names that have their own series. A name keeps its series while it exists, so that a series does not change its meaning
/// from one scrape to the next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Admitted {
    limit: usize,
    names: BTreeSet<String>,
}

impl Admitted {
    /// No names yet, and at most `limit`.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { limit, names: BTreeSet::new() }
    }

    /// Removes names that no longer exist, and admits others in their order, as far as there is room.
    pub fn update<'n>(&mut self, present: impl IntoIterator<Item = &'n str>) {
        let present: BTreeSet<&str> = present.into_iter().collect();
        self.names.retain(|name| present.contains(name.as_str()));
        for name in present {
            if self.names.len() >= self.limit {
                break;
            }
            self.names.insert(name.to_owned());
        }
    }

    /// The label value of a name.
    #[must_use]
    pub fn label<'n>(&self, name: &'n str) -> &'n str {
        if self.names.contains(name) { name } else { OTHER }
    }

    /// Values by label: those without their own series are summed.
    #[must_use]
    pub fn sum<'n, const N: usize>(
        &self,
        values: impl IntoIterator<Item = (&'n str, [u64; N])>,
    ) -> BTreeMap<&'n str, [u64; N]> {
        let mut sums = BTreeMap::new();
        for (name, values) in values {
            let sum = sums.entry(self.label(name)).or_insert([0; N]);
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
        sums
    }
}

/// Which services and backends have their own series.
#[derive(Debug)]
pub struct Bounds {
    services: Admitted,
    backends: Admitted,
}

impl Bounds {
    /// At most this many services, and as many backends.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { services: Admitted::new(limit), backends: Admitted::new(limit) }
    }
}

/// Everything as OpenMetrics; `tables` is none if there is no dataplane yet.
///
/// # Errors
/// None are known: the text is written to memory.
pub fn exposition(vitals: Arc<Vitals>, tables: Option<Tables>, bounds: &Mutex<Bounds>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("affinity");
    registry.register("build", "Version of the agent, as a label", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
    registry.register(
        "sync_duration_seconds",
        "Time from the arrival of a snapshot of the source until it is published in the maps",
        vitals.sync.clone(),
    );
    let (totals, census) = vitals.sweep();
    if let Some(tables) = tables {
        registry.register_collector(Box::new(Named::new(tables, census, bounds)));
    }
    registry.register_collector(Box::new(Agent { vitals, totals }));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// Writes families one after the other.
struct Writer<'a>(DescriptorEncoder<'a>);

impl Writer<'_> {
    fn counters<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        values
            .into_iter()
            .try_for_each(|(labels, value)| ConstCounter::new(value).encode(family.encode_family(&labels)?))
    }

    fn gauges<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        values.into_iter().try_for_each(|(labels, value)| ConstGauge::new(value).encode(family.encode_family(&labels)?))
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        ConstCounter::new(value).encode(self.0.encode_descriptor(name, help, None, MetricType::Counter)?)
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        ConstGauge::new(value).encode(self.0.encode_descriptor(name, help, None, MetricType::Gauge)?)
    }
}

/// The agent's own counts.
#[derive(Debug)]
struct Agent {
    vitals: Arc<Vitals>,
    totals: Totals,
}

impl Collector for Agent {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut writer = Writer(encoder);
        let started = self.vitals.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        writer.gauge(
            "agent_start_time_seconds",
            "Start time of the agent since the Unix epoch in seconds",
            started.as_secs_f64(),
        )?;
        writer.counter("sync_steps", "Changes of maps that were applied to publish snapshots", self.vitals.steps())?;
        writer.counter(
            "sync_failures",
            "Failed attempts to publish a snapshot; they are repeated",
            self.vitals.failures(),
        )?;
        let Totals { passes, expired, flows, evicted: _, filter_bits: _ } = self.totals;
        writer.counter("sweep_passes", "Complete passes of the sweep over sessions and flows", passes)?;
        writer.counter("sweep_expired_sessions", "Expired sessions that the sweep removed", expired)?;
        writer.counter("sweep_removed_flows", "Flow records of ended connections that the sweep removed", flows)
    }
}

/// The labels of a service's or a backend's series.
type Labels = Vec<(&'static str, String)>;

/// The contents of the maps, by name. Names beyond the bound are summed up.
#[derive(Debug)]
struct Named {
    tables: Tables,
    /// None until the first whole pass of the sweep.
    census: Option<Census>,
    services: BTreeMap<Labels, Of>,
    backends: BTreeMap<Labels, Of>,
}

/// The counts of a service or a backend.
#[derive(Clone, Copy, Debug, Default)]
struct Of {
    connections: Counts,
    /// Which of [`USAGES`] can be counted.
    possible: [bool; USAGES.len()],
    sessions: u64,
    evicted: u64,
}

impl Of {
    fn new((connections, possible): Counted, sessions: u64, evicted: u64) -> Self {
        Self { connections, possible, sessions, evicted }
    }

    fn add(&mut self, other: &Self) {
        self.connections.iter_mut().zip(other.connections).for_each(|(sum, count)| *sum += count);
        self.possible.iter_mut().zip(other.possible).for_each(|(possible, other)| *possible |= other);
        self.sessions += other.sessions;
        self.evicted += other.evicted;
    }

    /// Counts by reason: those that have occurred, for example before the service was changed, and those that can occur.
    fn by_reason(&self) -> impl Iterator<Item = (Reason, u64)> {
        let counts = USAGES.into_iter().zip(self.connections).zip(self.possible);
        counts.filter(|&((_, count), possible)| possible || count > 0).map(|(count, _)| count)
    }
}

impl Named {
    fn new(tables: Tables, census: Option<Census>, bounds: &Mutex<Bounds>) -> Self {
        let none = Census::default();
        let Census { by_service, by_backend, evicted, entries: _ } = census.as_ref().unwrap_or(&none);
        let count = |counts: &BTreeMap<u32, u64>, id| counts.get(&id).copied().unwrap_or(0);
        let (services, backends): (Vec<_>, Vec<_>) = (tables.services().collect(), tables.backends().collect());
        let mut bounds = bounds.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        bounds.services.update(services.iter().map(|(_, name)| name.as_str()));
        bounds.backends.update(backends.iter().map(|(_, name)| name.as_str()));
        let services = services.into_iter().map(|(id, name)| {
            let labels = vec![("service", bounds.services.label(&name).to_owned())];
            (labels, Of::new(tables.service(id), count(by_service, id), count(evicted, id)))
        });
        let services = sum(services);
        let backends = backends.into_iter().map(|(index, name)| {
            let backend = bounds.backends.label(&name);
            let service = if backend == OTHER { OTHER.to_owned() } else { tables.services_label(index) };
            let labels = vec![("service", service), ("backend", backend.to_owned())];
            (labels, Of::new(tables.backend(index), count(by_backend, index), 0))
        });
        let backends = sum(backends);
        Self { services, backends, tables, census }
    }
}

/// Sums the values with the same labels.
fn sum(all: impl Iterator<Item = (Labels, Of)>) -> BTreeMap<Labels, Of> {
    let mut sums = BTreeMap::<Labels, Of>::new();
    for (labels, of) in all {
        sums.entry(labels).or_default().add(&of);
    }
    sums
}

/// Connections by labels and reason.
fn by_reason(all: &BTreeMap<Labels, Of>) -> impl Iterator<Item = (Vec<(&str, &str)>, u64)> {
    all.iter().flat_map(|(labels, of)| {
        of.by_reason().map(move |(reason, count)| {
            let labels = labels.iter().map(|(label, value)| (*label, value.as_str()));
            (labels.chain([("reason", reason.name())]).collect(), count)
        })
    })
}

/// Reasons of events. No packet is counted under them.
const NEVER_COUNTED: [Reason; 2] = [Reason::OperatorPinned, Reason::TableFull];

impl Collector for Named {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut writer = Writer(encoder);
        let Self { tables, census, services, backends } = self;
        let packets = REASONS.iter().zip(&tables.packets).filter(|(reason, _)| !NEVER_COUNTED.contains(reason));
        writer.counters(
            "packets",
            "Packets by reason of their verdict",
            packets.map(|(reason, &count)| ([("reason", reason.name())], count)),
        )?;
        writer.counters("service_connections", "New connections to a service, by reason", by_reason(services))?;
        writer.counters("backend_connections", "New connections to a backend, by reason", by_reason(backends))?;
        if census.is_some() {
            writer.gauges(
                "service_sessions",
                "Unexpired pins that connections to the service created, as of the last sweep",
                services.iter().map(|(labels, of)| (labels.as_slice(), of.sessions)),
            )?;
            writer.gauges(
                "backend_sessions",
                "Unexpired pins to the backend, as of the last sweep",
                backends.iter().map(|(labels, of)| (labels.as_slice(), of.sessions)),
            )?;
        }
        writer.counters(
            "service_evicted_sessions",
            "Pins that the kernel evicted from a full table; pins of a group count for its first service",
            services.iter().map(|(labels, of)| (labels.as_slice(), of.evicted)),
        )?;
        let mut entries = tables.fill();
        entries.extend(census.iter().flat_map(|census| &census.entries));
        writer.gauges(
            "map_entries",
            "Number of entries in a map",
            entries.into_iter().map(|(map, n)| ([("map", map)], n)),
        )?;
        let capacities = tables.capacities.iter().map(|&(map, entries)| ([("map", map)], entries));
        writer.gauges("map_capacity", "Maximum number of entries in a map", capacities)?;
        writer.gauge(
            "lingering_backends",
            "Backends that have left all services and keep their open connections",
            tables.lingering() as f64,
        )?;
        let attachments = tables.attachments.iter().map(|(&hook, &number)| ([("hook", hook)], number));
        writer.gauges("attachments", "Devices with a program attached to the hook", attachments)?;
        tables.view_age.map_or(Ok(()), |age| {
            writer.gauge("view_age_seconds", "Age of the agent's view of the source", age.as_secs_f64())
        })
    }
}

#[cfg(test)]
mod tests;
