//! What one scrape reads from the maps, added entry by entry.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use affinity_common::abi::{
    AFFINITY, BACKEND_LINGERING, Backend, Frontend, Member, MemberKey, NameKey, NameKind, Reason, USAGES, Usage,
    UsageKey, UsageOf,
};

use crate::view::{PodRef, from_mapped};

/// A backend with more services than this does not name them in its series, which says [`SEVERAL`] instead.
const SERVICES_NAMED: usize = 4;
/// See [`SERVICES_NAMED`].
pub const SEVERAL: &str = "several";

/// Counts in the order of [`USAGES`].
pub(super) type Counts = [u64; USAGES.len()];

/// The contents of the maps and the pins at one moment, as far as metrics need them.
#[derive(Debug, Default)]
pub struct Tables {
    pub(super) packets: Vec<u64>,
    pub(super) capacities: Vec<(&'static str, u64)>,
    pub(super) attachments: BTreeMap<&'static str, u64>,
    pub(super) view_age: Option<Duration>,
    /// Maps, and how many entries each has, as far as that is known.
    pub entries: BTreeMap<&'static str, u64>,
    names: BTreeMap<NameKey, String>,
    services: BTreeMap<u32, Affinity>,
    /// Pool -> service.
    pools: BTreeMap<u32, u32>,
    backends: BTreeMap<u32, Backend>,
    /// Backend, and a service that it serves.
    serves: BTreeSet<(u32, u32)>,
    usage: BTreeMap<UsageKey, Counts>,
}

/// Whether frontends pin their clients. A service may have both kinds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Affinity {
    with: bool,
    without: bool,
}

impl Affinity {
    fn add(&mut self, other: Self) {
        self.with |= other.with;
        self.without |= other.without;
    }

    /// Whether a connection can be opened for that reason.
    fn can(self, reason: Reason) -> bool {
        if reason == Reason::Selected { self.without } else { self.with && reason != Reason::NoEndpoints }
    }
}

/// The counts of a service or a backend, and which of [`USAGES`] can be counted at all.
pub(super) type Counted = (Counts, [bool; USAGES.len()]);

impl Tables {
    /// From the map `counters`, summed over processors; how many entries each map can have; attachments by hook; and the age of
    /// the view of the source, none until there is one.
    #[must_use]
    pub fn new(
        packets: Vec<u64>,
        capacities: Vec<(&'static str, u64)>,
        attachments: BTreeMap<&'static str, u64>,
        view_age: Option<Duration>,
    ) -> Self {
        Self { packets, capacities, attachments, view_age, ..Self::default() }
    }

    /// Stores a name, and replaces an earlier one.
    pub fn add_name(&mut self, key: NameKey, name: &str) {
        if [NameKind::Service as u32, NameKind::Backend as u32].contains(&key.kind) && !name.is_empty() {
            self.names.insert(key, name.to_owned());
        }
    }

    /// Stores a frontend of either family.
    pub fn add_frontend(&mut self, frontend: &Frontend) {
        let with = frontend.flags & AFFINITY != 0;
        self.services.entry(frontend.service).or_default().add(Affinity { with, without: !with });
        self.pools.insert(frontend.pool, frontend.service);
    }

    /// Stores a backend that is in use.
    pub fn add_backend(&mut self, index: u32, backend: &Backend) {
        if backend.generation % 2 == 1 {
            self.backends.insert(index, *backend);
        }
    }

    /// Stores a member of a pool, after all frontends and backends. Members of an earlier generation no longer count.
    pub fn add_member(&mut self, key: &MemberKey, member: &Member) {
        let backend = self.backends.get(&key.backend).filter(|backend| backend.generation == member.generation);
        if let (Some(_), Some(&service)) = (backend, self.pools.get(&key.pool)) {
            self.serves.insert((key.backend, service));
        }
    }

    /// Stores the counts of a service or backend, by processor.
    pub fn add_usage(&mut self, key: UsageKey, of_processors: &[Usage]) {
        let counts = self.usage.entry(key).or_default();
        for usage in of_processors {
            counts.iter_mut().zip(usage.counts).for_each(|(sum, count)| *sum += count);
        }
    }

    /// Every service that has a frontend, with its name.
    pub(super) fn services(&self) -> impl Iterator<Item = (u32, String)> {
        self.services.keys().map(|&id| (id, self.service_name(id)))
    }

    /// The counts of a service.
    pub(super) fn service(&self, id: u32) -> Counted {
        let affinity = self.services.get(&id).copied().unwrap_or_default();
        let possible = USAGES.map(|reason| reason == Reason::NoEndpoints || affinity.can(reason));
        (self.counts(UsageOf::Service, id), possible)
    }

    /// Every backend in use, with its name.
    pub(super) fn backends(&self) -> impl Iterator<Item = (u32, String)> {
        self.backends.iter().map(|(&index, backend)| (index, self.backend_name(index, backend)))
    }

    /// How many backends have left every service.
    pub(super) fn lingering(&self) -> u64 {
        self.backends.values().filter(|backend| backend.flags & BACKEND_LINGERING != 0).count() as u64
    }

    /// The counts of a backend.
    pub(super) fn backend(&self, index: u32) -> Counted {
        let mut affinity = Affinity::default();
        self.services_of(index).filter_map(|id| self.services.get(&id)).for_each(|of| affinity.add(*of));
        (self.counts(UsageOf::Backend, index), USAGES.map(|reason| affinity.can(reason)))
    }

    /// The services that a backend serves: their names with commas, or [`SEVERAL`].
    pub(super) fn services_label(&self, backend: u32) -> String {
        if self.services_of(backend).count() > SERVICES_NAMED {
            return SEVERAL.to_owned();
        }
        let names: BTreeSet<_> = self.services_of(backend).map(|id| self.service_name(id)).collect();
        names.into_iter().collect::<Vec<_>>().join(",")
    }

    /// Entries of the maps, if they are known without walking the large ones.
    pub(super) fn fill(&self) -> BTreeMap<&'static str, u64> {
        let mut fill = self.entries.clone();
        fill.insert(affinity_common::names::BACKENDS, self.backends.len() as u64);
        fill.insert(affinity_common::names::USAGE, self.usage.len() as u64);
        fill
    }

    fn services_of(&self, backend: u32) -> impl Iterator<Item = u32> {
        self.serves.range((backend, 0)..=(backend, u32::MAX)).map(|&(_, service)| service)
    }

    fn service_name(&self, id: u32) -> String {
        self.known(NameKind::Service, id).map_or_else(|| format!("#{id}"), str::to_owned)
    }

    /// `namespace/pod`, otherwise its address.
    fn backend_name(&self, index: u32, backend: &Backend) -> String {
        let name = self.known(NameKind::Backend, index).unwrap_or_default();
        PodRef::new(Some(from_mapped(backend.address)), name).full_name()
    }

    fn counts(&self, of: UsageOf, id: u32) -> Counts {
        self.usage.get(&UsageKey { of: of as u32, id }).copied().unwrap_or_default()
    }

    fn known(&self, kind: NameKind, id: u32) -> Option<&str> {
        self.names.get(&NameKey { kind: kind as u32, id }).map(String::as_str)
    }
}
