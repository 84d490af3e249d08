//! What there is to measure, in the text format of OpenMetrics. docs/metrics.md lists all of it.
//!
//! Most of it is read from the maps when it is asked for. Sessions and flows are not walked for that: the sweep has
//! counted them.

mod series;
mod vitals;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
    time::UNIX_EPOCH,
};

use affinity_common::{
    abi::{REASONS, USAGES, UsageKey, UsageOf},
    names,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge, info::Info},
    registry::Registry,
};

pub use self::{
    series::{Admitted, OTHER},
    vitals::{STUCK_AFTER, Vitals},
};
use crate::{
    sweep::{Census, Totals},
    view::Catalog,
};

/// The media type of what [`exposition`] gives.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the maps and the pins tell at one moment.
#[derive(Debug)]
pub struct Tables {
    /// The small tables.
    pub catalog: Catalog,
    /// The map `counters`, summed over processors.
    pub packets: Vec<u64>,
    /// Maps, and how many entries each can have.
    pub capacities: Vec<(&'static str, u64)>,
    /// Attachments by hook.
    pub attachments: BTreeMap<&'static str, u64>,
}

/// Which services and backends have series of their own.
#[derive(Debug)]
pub struct Bounds {
    services: Admitted,
    backends: Admitted,
}

impl Bounds {
    /// At most so many services, and as many backends.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { services: Admitted::new(limit), backends: Admitted::new(limit) }
    }
}

/// Everything as text; `tables` is none where no dataplane is there yet.
///
/// # Errors
/// Never, as far as is known: text is written to memory.
pub fn exposition(vitals: Arc<Vitals>, tables: Option<Tables>, bounds: &Mutex<Bounds>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("affinity");
    registry.register("build", "What this is a build of", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
    registry.register("sync_duration_seconds", "From a snapshot's arrival until it is published", vitals.sync.clone());
    let (totals, census) = vitals.sweep();
    if let Some(tables) = tables {
        let named = Named::new(tables, census, bounds);
        registry.register_collector(Box::new(named));
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
            "When the agent was started, since the epoch",
            started.as_secs_f64(),
        )?;
        writer.counter("sync_steps", "Steps taken to publish", self.vitals.steps())?;
        writer.counter("sync_failures", "Attempts to publish that failed", self.vitals.failures())?;
        let Totals { passes, expired, flows, evicted: _, filter_bits: _ } = self.totals;
        writer.counter("sweep_passes", "Whole passes over sessions and flows", passes)?;
        writer.counter("sweep_expired_sessions", "Sessions removed because they had expired", expired)?;
        writer.counter("sweep_removed_flows", "Flow records removed because they were over", flows)
    }
}

/// What the maps tell, by name; with names beyond the bound summed up.
#[derive(Debug)]
struct Named {
    tables: Tables,
    census: Census,
    services: Vec<(String, Of)>,
    backends: Vec<(String, Of)>,
    own_services: Admitted,
    own_backends: Admitted,
}

/// What is counted of a service or a backend.
#[derive(Clone, Copy, Debug)]
struct Of {
    /// In the order of [`USAGES`].
    connections: [u64; 8],
    sessions: u64,
    evicted: u64,
}

impl Named {
    fn new(tables: Tables, census: Census, bounds: &Mutex<Bounds>) -> Self {
        let catalog = &tables.catalog;
        let counted = |of: UsageOf, id| {
            let usage = catalog.usage.get(&UsageKey { of: of as u32, id });
            usage.map_or([0; 8], |usage| usage.counts)
        };
        let count = |counts: &BTreeMap<u32, u64>, id| counts.get(&id).copied().unwrap_or(0);
        let services = catalog.services().into_iter().map(|(name, id)| {
            let connections = counted(UsageOf::Service, id);
            let sessions = count(&census.by_service, id);
            (name.into_owned(), Of { connections, sessions, evicted: count(&census.evicted, id) })
        });
        let services: Vec<_> = services.collect();
        let in_use = catalog.observed().backends.iter().filter(|(_, record)| record.generation % 2 == 1);
        let backends = in_use.map(|(&index, record)| {
            let connections = counted(UsageOf::Backend, index);
            let sessions = count(&census.by_backend, index);
            (catalog.backend(index, record.generation).full_name(), Of { connections, sessions, evicted: 0 })
        });
        let backends: Vec<_> = backends.collect();
        let mut bounds = bounds.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        bounds.services.update(services.iter().map(|(name, _)| name.as_str()));
        bounds.backends.update(backends.iter().map(|(name, _)| name.as_str()));
        let (own_services, own_backends) = (bounds.services.clone(), bounds.backends.clone());
        Self { tables, census, services, backends, own_services, own_backends }
    }

    /// Entries of the maps, as far as they are known without walking.
    fn fill(&self) -> BTreeMap<&'static str, u64> {
        let observed = self.tables.catalog.observed();
        let mut fill = BTreeMap::from([
            (names::FRONTENDS_V4, observed.frontends_v4.len() as u64),
            (names::FRONTENDS_V6, observed.frontends_v6.len() as u64),
            (names::RANGES_V4, observed.ranges_v4.len() as u64),
            (names::RANGES_V6, observed.ranges_v6.len() as u64),
            (names::MEMBERS, observed.members.len() as u64),
            (names::BACKENDS, self.backends.len() as u64),
            (names::NAMES, observed.names.len() as u64),
            (names::USAGE, self.tables.catalog.usage.len() as u64),
        ]);
        fill.extend(self.census.entries.iter().map(|(&map, &entries)| (map, entries)));
        fill
    }
}

/// Connections of some names by name and reason.
fn by_reason<'n>(
    label: &'static str,
    own: &Admitted,
    all: &'n [(String, Of)],
) -> impl Iterator<Item = ([(&'static str, &'n str); 2], u64)> {
    let sums = own.sum(all.iter().map(|(name, of)| (name.as_str(), of.connections)));
    sums.into_iter().flat_map(move |(name, counts)| {
        USAGES.iter().zip(counts).map(move |(reason, count)| ([(label, name), ("reason", reason.name())], count))
    })
}

/// Another count of some names.
fn by_name<'n>(
    label: &'static str,
    own: &Admitted,
    all: &'n [(String, Of)],
    count: impl Fn(&Of) -> u64,
) -> impl Iterator<Item = ([(&'static str, &'n str); 1], u64)> {
    let sums = own.sum(all.iter().map(|(name, of)| (name.as_str(), [count(of)])));
    sums.into_iter().map(move |(name, [count])| ([(label, name)], count))
}

impl Collector for Named {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut writer = Writer(encoder);
        let packets = REASONS.iter().zip(&self.tables.packets);
        writer.counters(
            "packets",
            "Packets by what became of them and why",
            packets.map(|(reason, &count)| ([("reason", reason.name())], count)),
        )?;
        let (services, backends) = (&self.services, &self.backends);
        writer.counters(
            "service_connections",
            "New connections to a service, by what decided them",
            by_reason("service", &self.own_services, services),
        )?;
        writer.counters(
            "backend_connections",
            "New connections given to a backend, by what decided them",
            by_reason("backend", &self.own_backends, backends),
        )?;
        writer.gauges(
            "service_sessions",
            "Live pins that connections to a service made, as of the last sweep",
            by_name("service", &self.own_services, services, |of| of.sessions),
        )?;
        writer.gauges(
            "backend_sessions",
            "Live pins to a backend, as of the last sweep",
            by_name("backend", &self.own_backends, backends, |of| of.sessions),
        )?;
        writer.counters(
            "service_evicted_sessions",
            "Pins that the kernel dropped from a full table; of a group, under its first service",
            by_name("service", &self.own_services, services, |of| of.evicted),
        )?;
        writer.gauges(
            "map_entries",
            "Entries of a map",
            self.fill().into_iter().map(|(map, n)| ([("map", map)], n)),
        )?;
        let capacities = self.tables.capacities.iter().map(|&(map, entries)| ([("map", map)], entries));
        writer.gauges("map_capacity", "Entries that a map has room for", capacities)?;
        let attachments = self.tables.attachments.iter().map(|(&hook, &number)| ([("hook", hook)], number));
        writer.gauges("attachments", "Devices with a program at a hook", attachments)?;
        let as_of = self.tables.catalog.status().and_then(|status| status.as_of);
        as_of.map_or(Ok(()), |as_of| {
            writer.gauge("view_age_seconds", "How old the view of the source is", as_of.age.as_secs_f64())
        })
    }
}

#[cfg(test)]
mod tests;
