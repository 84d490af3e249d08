//! One reading of a running dataplane: numbers and names, without rates.
//!
//! The cost of a [`Sample`] depends on the size of the small tables. The live pins of a pod come from `loads`, which the
//! programs and the agent maintain; sessions are not walked.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use affinity_common::abi::{AFFINITY, BackendRef, Event, SHADOW, UsageKey, UsageOf};

use crate::view::{Catalog, EventView, StatusView, policy_text, short_duration};

/// Counts in the order of [`affinity_common::abi::USAGES`].
pub type Counts = [u64; 8];

/// A reading of the small tables.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sample {
    /// The time: monotonic nanoseconds.
    pub at_ns: u64,
    /// Services by id.
    pub services: BTreeMap<u32, ServiceSample>,
    /// Backends in use, by index.
    pub backends: BTreeMap<u32, BackendSample>,
    /// The number of pods: a pod with addresses of both families has two backends.
    pub pods: u64,
    /// Events, newest first.
    pub events: Vec<EventSample>,
    /// A message about the source, if its data is old or was never read.
    pub source: Option<String>,
}

/// A service.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServiceSample {
    /// `namespace/name`.
    pub name: String,
    /// Its pin settings, as text.
    pub policy: String,
    /// Whether it keeps pins.
    pub affinity: bool,
    /// The named group that shares its pins.
    pub group: Option<String>,
    /// Its frontends: `10.96.0.10:80/TCP`.
    pub frontends: Vec<String>,
    /// Indices of its backends, and whether each takes new connections in one of its pools.
    pub backends: BTreeMap<u32, bool>,
    /// New connections by reason, since the service became known.
    pub counts: Counts,
}

/// A backend: a pod's address.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BackendSample {
    /// The pod's name, else its address.
    pub name: String,
    /// The same with its namespace; equal for all backends of one pod.
    pub pod: String,
    /// Its address.
    pub address: Option<IpAddr>,
    /// The generation of its index: another generation is another pod.
    pub generation: u32,
    /// Live pins to it, for all its services.
    pub pins: u64,
    /// New connections by reason, since it became known.
    pub counts: Counts,
}

/// An event of a pin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EventSample {
    /// Seconds before the sample.
    pub age_s: u64,
    /// The service; `None` if it concerns all.
    pub service: Option<u32>,
    /// The event as text.
    pub line: String,
}

impl Sample {
    /// A sample of one reading of the tables. `pins` returns the live pins of a backend by its index; `events` come oldest
    /// first.
    #[must_use]
    pub fn new<'e>(
        catalog: &Catalog,
        pins: impl Fn(u32) -> u64,
        events: impl DoubleEndedIterator<Item = &'e Event>,
    ) -> Self {
        let mut services = services(catalog);
        for (&pool, service) in &catalog.pools() {
            let Some(service) = services.get_mut(service) else { continue };
            for (backend, ready) in catalog.members(pool) {
                *service.backends.entry(backend).or_default() |= ready;
            }
        }
        let backends = backends(catalog, pins);
        Self {
            at_ns: catalog.clock.now_ns,
            pods: backends.values().map(|backend| &backend.pod).collect::<BTreeSet<_>>().len() as u64,
            backends,
            source: catalog.status().and_then(source),
            events: events.rev().filter_map(|event| event_sample(catalog, event)).collect(),
            services,
        }
    }
}

/// `None` if the data is recent enough.
fn source(status: &StatusView) -> Option<String> {
    match &status.as_of {
        None => Some(format!("{}: not read yet", status.source)),
        Some(moment) if moment.age < StatusView::STALE => None,
        Some(moment) => Some(format!("{}: {} old", status.source, short_duration(moment.age.as_secs()))),
    }
}

fn services(catalog: &Catalog) -> BTreeMap<u32, ServiceSample> {
    let mut services: BTreeMap<u32, ServiceSample> = BTreeMap::new();
    for frontend in catalog.frontends.iter().filter(|frontend| !frontend.external) {
        let id = frontend.record.service;
        let service = services.entry(id).or_insert_with(|| {
            let affinity = frontend.record.flags & AFFINITY != 0;
            let kind = if affinity { "ClientIP" } else { "no affinity" };
            let shadow = if frontend.record.flags & SHADOW != 0 { "shadow: " } else { "" };
            ServiceSample {
                name: catalog.service_name(id).into_owned(),
                policy: format!("{shadow}{kind} {}", policy_text(&frontend.record)),
                affinity,
                group: catalog.group_name(id).map(str::to_owned),
                counts: counts(catalog, UsageOf::Service, id),
                ..ServiceSample::default()
            }
        });
        service.frontends.push(frontend.text());
    }
    services
}

fn backends(catalog: &Catalog, pins: impl Fn(u32) -> u64) -> BTreeMap<u32, BackendSample> {
    let in_use = catalog.observed.backends.iter().filter(|(_, record)| record.generation % 2 == 1);
    in_use
        .map(|(&index, record)| {
            let backend = catalog.backend(BackendRef { index, generation: record.generation });
            let sample = BackendSample {
                name: backend.to_string(),
                pod: backend.full_name(),
                address: backend.address,
                generation: record.generation,
                pins: pins(index),
                counts: counts(catalog, UsageOf::Backend, index),
            };
            (index, sample)
        })
        .collect()
}

fn counts(catalog: &Catalog, of: UsageOf, id: u32) -> Counts {
    catalog.usage.get(&UsageKey { of: of as u32, id }).map_or([0; 8], |usage| usage.counts)
}

fn event_sample(catalog: &Catalog, event: &Event) -> Option<EventSample> {
    let view = EventView::new(catalog, event)?;
    let service = (event.service != 0).then_some(event.service);
    Some(EventSample { age_s: view.time.age.as_secs(), service, line: view.line() })
}
