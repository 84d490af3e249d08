//! One reading of the small tables, and the names in them.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::OnceLock,
};

use affinity_common::abi::{
    AFFINITY, Address, BackendRef, CLIENTS_ARE_NODES, Frontend, FrontendKey, MEMBER_READY, MemberKey, NameKey,
    NameKind, SCOPE_EXTERNAL, SHADOW, Selection, Status, Timer, Usage, UsageKey,
};

use super::{Client, ClientRef, Clock, Endpoint, NODE, PodRef, StatusView, address::from_mapped, protocol_name};
use crate::{
    desired::{PoolName, is_global},
    netns,
    store::{
        Observed, Store, StoreError,
        kernel::{Family, KernelStore},
    },
};

/// If the agent never stops publishing, a possibly inconsistent reading is accepted after this many attempts.
const MAX_READINGS: u32 = 10;

/// A frontend's record, of either family.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CatalogFrontend {
    pub(crate) endpoint: Endpoint,
    pub(crate) protocol: u8,
    /// Whether it is the record for external clients, in addition to the record for all clients.
    pub(crate) external: bool,
    pub(crate) record: Frontend,
}

impl CatalogFrontend {
    fn new<A: Address>(key: &FrontendKey<A>, record: &Frontend) -> Self {
        let endpoint = Endpoint::new(key.address, key.port);
        Self { endpoint, protocol: key.protocol, external: key.scope == SCOPE_EXTERNAL, record: *record }
    }

    /// `10.96.0.10:80/TCP`.
    pub(crate) fn text(&self) -> String {
        format!("{}/{}", self.endpoint, protocol_name(self.protocol))
    }
}

/// What is known about a network namespace of this machine.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct KnownNamespace {
    /// [`NODE`], or the name of the pod if one of its addresses is a backend's.
    pub(crate) name: Option<String>,
    /// Its addresses, IPv4 first, without those that only it can use itself (loopback, link-local).
    pub(crate) addresses: Vec<IpAddr>,
}

/// The pin settings of a service. They are the same in all its frontends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Whether connections are pinned at all.
    pub affinity: bool,
    /// Shadow mode: decide and count, but let every packet pass.
    pub shadow: bool,
    /// What restarts the timeout.
    pub timer: Timer,
    /// Nanoseconds, or [`affinity_common::abi::TIMEOUT_UNLIMITED`].
    pub timeout_ns: u64,
    /// How members are chosen.
    pub select: Selection,
    /// Prefix length of IPv4 client keys; `None`: the service has no IPv4 frontend.
    pub prefix_v4: Option<u8>,
    /// Prefix length of IPv6 client keys; `None`: the service has no IPv6 frontend.
    pub prefix_v6: Option<u8>,
    /// Scope of the shared pin.
    pub group: u32,
}

/// The service in the name of one of its pools.
fn service_of(pool: &str) -> &str {
    PoolName::split(pool).map_or(pool, |(service, _)| service)
}

/// The small tables, and what listings need for each service.
#[derive(Clone, Debug)]
pub struct Catalog {
    pub(crate) observed: Observed,
    /// Counts of services and backends, summed over CPUs.
    pub(crate) usage: BTreeMap<UsageKey, Usage>,
    pub(crate) clock: Clock,
    /// In the order of family and address.
    pub(crate) frontends: Vec<CatalogFrontend>,
    policies: BTreeMap<u32, Policy>,
    status: Option<StatusView>,
    /// Service -> conditions that the agent has found.
    service_conditions: BTreeMap<u32, u32>,
    namespaces: OnceLock<BTreeMap<u64, KnownNamespace>>,
}

impl Catalog {
    /// A consistent reading of the small tables, as far as packets can tell. A concurrent plan switches frontends after it has
    /// written the records that they refer to, and before it removes such records. So if the frontends are the same at the end
    /// of the reading, these records existed the whole time.
    ///
    /// # Errors
    /// [`StoreError`] if a map could not be read.
    pub fn read(store: &KernelStore) -> Result<Self, StoreError> {
        let mut observed = store.observe()?;
        for _ in 0..MAX_READINGS {
            if observed.frontends_v4 == frontends(store)? && observed.frontends_v6 == frontends(store)? {
                break;
            }
            observed = store.observe()?;
        }
        let status = store.status.get(&0)?.unwrap_or_default();
        let service_conditions = store.service_conditions.iter().collect::<Result<_, _>>()?;
        Ok(Self::new(observed, store.usage_sums()?, Clock::now())
            .with_status(&status)
            .with_service_conditions(service_conditions))
    }

    /// From one reading of the maps; `usage` is summed over CPUs.
    #[must_use]
    pub fn new(observed: Observed, usage: BTreeMap<UsageKey, Usage>, clock: Clock) -> Self {
        let v4 = observed.frontends_v4.iter().map(|(key, record)| CatalogFrontend::new(key, record));
        let v6 = observed.frontends_v6.iter().map(|(key, record)| CatalogFrontend::new(key, record));
        let frontends: Vec<_> = v4.chain(v6).collect();
        let mut policies = BTreeMap::new();
        for frontend in &frontends {
            let record = &frontend.record;
            let policy = policies.entry(record.service).or_insert_with(|| Policy {
                affinity: record.flags & AFFINITY != 0,
                shadow: record.flags & SHADOW != 0,
                timer: Timer::from_byte(record.timer),
                timeout_ns: record.timeout_ns,
                select: Selection::from_byte(record.select),
                prefix_v4: None,
                prefix_v6: None,
                group: record.group,
            });
            if frontend.endpoint.address.is_ipv4() {
                policy.prefix_v4 = Some(record.prefix);
            } else {
                policy.prefix_v6 = Some(record.prefix);
            }
        }
        Self {
            observed,
            usage,
            clock,
            frontends,
            policies,
            status: None,
            service_conditions: BTreeMap::new(),
            namespaces: OnceLock::new(),
        }
    }

    /// Adds the agent's status.
    #[must_use]
    pub fn with_status(self, status: &Status) -> Self {
        Self { status: StatusView::new(status, &self.clock), ..self }
    }

    /// Adds the conditions of services that the agent has found.
    #[must_use]
    pub fn with_service_conditions(self, service_conditions: BTreeMap<u32, u32>) -> Self {
        Self { service_conditions, ..self }
    }

    /// Whether all clients that are pinned to a service look like nodes of the cluster.
    #[must_use]
    pub fn clients_are_nodes(&self, service: u32) -> bool {
        self.service_conditions
            .get(&service)
            .is_some_and(|service_conditions| service_conditions & CLIENTS_ARE_NODES != 0)
    }

    /// Uses these network namespaces, by their cookies, instead of the machine's.
    #[must_use]
    pub(crate) fn with_namespaces(self, namespaces: BTreeMap<u64, KnownNamespace>) -> Self {
        Self { namespaces: namespaces.into(), ..self }
    }

    /// The agent's status; `None` if no agent has written it.
    #[must_use]
    pub fn status(&self) -> Option<&StatusView> {
        self.status.as_ref()
    }

    /// The tables that were read.
    #[must_use]
    pub fn observed(&self) -> &Observed {
        &self.observed
    }

    /// The time of the reading.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The pin settings of a service; `None` if it has no frontend any more.
    #[must_use]
    pub fn policy(&self, service: u32) -> Option<&Policy> {
        self.policies.get(&service)
    }

    /// Every service with a frontend, by name.
    #[must_use]
    pub fn services(&self) -> BTreeMap<Cow<'_, str>, u32> {
        self.policies.keys().map(|&id| (self.service_name(id), id)).collect()
    }

    /// The length of the longest service name in characters, for the width of a column.
    #[must_use]
    pub fn longest_service_name(&self) -> usize {
        self.services().keys().map(|name| name.chars().count()).max().unwrap_or(0)
    }

    /// The id of the service `namespace/name`, also if it has gone but still has pins.
    #[must_use]
    pub fn service_id(&self, name: &str) -> Option<u32> {
        let mut names = self.observed.names.iter();
        let known = names.find(|(key, known)| key.kind == NameKind::Service as u32 && *known == name);
        known.map(|(key, _)| key.id).or_else(|| self.policies.keys().copied().find(|&id| self.service_name(id) == name))
    }

    /// `namespace/name`, or `#id` for a service that the `names` map does not know.
    #[must_use]
    pub fn service_name(&self, id: u32) -> Cow<'_, str> {
        self.name(NameKind::Service, id)
    }

    /// `namespace/name:port/PROTOCOL` and family, or `#id`.
    #[must_use]
    pub fn pool_name(&self, id: u32) -> Cow<'_, str> {
        self.name(NameKind::Pool, id)
    }

    /// The service of a pool: `namespace/name`, or `#id` for a pool that the `names` map does not know.
    #[must_use]
    pub fn service_of_pool(&self, pool: u32) -> Cow<'_, str> {
        self.known(NameKind::Pool, pool).map_or_else(|| format!("#{pool}").into(), |name| service_of(name).into())
    }

    /// The pools of the service `namespace/name`, also if it has gone but still has connections.
    #[must_use]
    pub fn pools_of(&self, service: &str) -> BTreeSet<u32> {
        let pools = self.observed.names.iter().filter(|(key, _)| key.kind == NameKind::Pool as u32);
        pools.filter(|(_, name)| service_of(name) == service).map(|(key, _)| key.id).collect()
    }

    /// The scopes that may hold pins of a service.
    #[must_use]
    pub fn scopes(&self, service: u32) -> BTreeSet<u32> {
        let ours = self.frontends.iter().filter(|frontend| frontend.record.service == service);
        ours.flat_map(|frontend| [frontend.record.group, frontend.record.own]).collect()
    }

    /// The named group that shares pins with a service; `None` if its pins are its own.
    #[must_use]
    pub fn group_name(&self, service: u32) -> Option<&str> {
        let policy = self.policies.get(&service)?;
        self.known(NameKind::Group, policy.group)
    }

    /// The name of a scope: a group, a service, or the pins that a service keeps in addition to its group's.
    #[must_use]
    pub fn scope_name(&self, scope: u32) -> Cow<'_, str> {
        if let Some(group) = self.known(NameKind::Group, scope) {
            return format!("{group}(group)").into();
        }
        let of = |pick: fn(&Frontend) -> u32| {
            self.frontends.iter().find(|frontend| pick(&frontend.record) == scope).map(|found| found.record.service)
        };
        if let Some(service) = of(|record| record.group) {
            return self.service_name(service);
        }
        match of(|record| record.own) {
            Some(service) => format!("{}(own)", self.service_name(service)).into(),
            None => self.service_name(scope),
        }
    }

    /// The backend with a generation. A pod that has gone keeps its address and name until its index is used again.
    #[must_use]
    pub fn backend(&self, BackendRef { index, generation }: BackendRef) -> PodRef<'_> {
        let record = self.observed.backends.get(&index).filter(|record| {
            let retired = generation.wrapping_add(1);
            record.generation == generation || record.generation == retired && retired.is_multiple_of(2)
        });
        let Some(record) = record else { return PodRef::default() };
        let address = Some(from_mapped(record.address)).filter(|address| !address.is_unspecified());
        PodRef::new(address, self.known(NameKind::Backend, index).unwrap_or(""))
    }

    /// The backend in the current record.
    #[must_use]
    pub fn backend_now(&self, index: u32) -> PodRef<'_> {
        self.observed
            .backends
            .get(&index)
            .map_or_else(PodRef::default, |record| self.backend(BackendRef { index, generation: record.generation }))
    }

    /// The generation of a backend's index, if it is in use.
    #[must_use]
    pub fn generation(&self, index: u32) -> Option<u32> {
        self.observed.backends.get(&index).map(|record| record.generation).filter(|generation| generation % 2 == 1)
    }

    /// Indices of backends by address, name, or `namespace/name`, including those of pods that were just removed.
    #[must_use]
    pub fn backends_called(&self, wanted: &str) -> BTreeSet<u32> {
        let indices = self.observed.backends.keys().copied();
        indices.filter(|&index| self.backend_now(index).is_called(wanted)).collect()
    }

    /// The frontends of one family.
    pub(crate) fn frontend_records(&self, ipv4: bool) -> impl Iterator<Item = &Frontend> {
        let frontends = self.frontends.iter().filter(move |frontend| frontend.endpoint.address.is_ipv4() == ipv4);
        frontends.map(|frontend| &frontend.record)
    }

    /// The pools of all frontends, with their services. Groups' unions are not included.
    pub(crate) fn pools(&self) -> BTreeMap<u32, u32> {
        self.frontends.iter().map(|frontend| (frontend.record.pool, frontend.record.service)).collect()
    }

    /// Backend indices in a pool, and whether each is ready. Members with an earlier generation are not in the pool any more.
    pub(crate) fn members(&self, pool: u32) -> impl Iterator<Item = (u32, bool)> + '_ {
        let range = MemberKey { pool, backend: 0 }..=MemberKey { pool, backend: u32::MAX };
        self.observed.members.range(range).filter_map(|(key, member)| {
            let backend = self.observed.backends.get(&key.backend)?;
            (backend.generation == member.generation).then_some((key.backend, member.state == MEMBER_READY))
        })
    }

    /// The client that an address in the key of a service's session means.
    pub(crate) fn client(&self, address: IpAddr, service: u32) -> ClientRef<'_> {
        let key = Client::new(address, u8::MAX);
        if let Some(cookie) = key.netns() {
            return self.namespace_ref(key, cookie);
        }
        let policy = self.policies.get(&service);
        let prefix = policy.and_then(|policy| if address.is_ipv4() { policy.prefix_v4 } else { policy.prefix_v6 });
        ClientRef { key: Client::new(address, prefix.unwrap_or(u8::MAX)), name: None, addresses: &[] }
    }

    /// A client key that is a network namespace, with what is known about it.
    pub(crate) fn namespace_ref(&self, key: Client, cookie: u64) -> ClientRef<'_> {
        match self.namespaces().get(&cookie) {
            Some(known) => ClientRef { key, name: known.name.as_deref(), addresses: &known.addresses },
            None => ClientRef { key, name: None, addresses: &[] },
        }
    }

    /// The network namespaces of this machine that are visible to this process, by their cookies. They are read once, when they
    /// are first needed.
    pub(crate) fn namespaces(&self) -> &BTreeMap<u64, KnownNamespace> {
        self.namespaces.get_or_init(|| {
            let mut known = BTreeMap::new();
            for namespace in netns::all() {
                if let (Ok(cookie), Ok(addresses)) = (namespace.cookie(), namespace.addresses()) {
                    let name = self.pod_at(&addresses);
                    let addresses = addresses.into_iter().filter(|address| is_global(*address)).collect();
                    known.insert(cookie, KnownNamespace { name, addresses });
                }
            }
            if let Ok(cookie) = netns::Namespace::own().and_then(|own| own.cookie()) {
                known.entry(cookie).or_default().name = Some(NODE.to_owned());
            }
            known
        })
    }

    /// The name of the pod that has one of these addresses.
    fn pod_at(&self, addresses: &BTreeSet<IpAddr>) -> Option<String> {
        let indices = self.observed.backends.iter().filter(|(_, record)| record.generation % 2 == 1);
        let mut pods =
            indices.map(|(&index, record)| self.backend(BackendRef { index, generation: record.generation }));
        let pod = pods.find(|pod| pod.name.is_some() && pod.address.is_some_and(|at| addresses.contains(&at)))?;
        Some(pod.full_name())
    }

    fn name(&self, kind: NameKind, id: u32) -> Cow<'_, str> {
        self.known(kind, id).map_or_else(|| format!("#{id}").into(), Cow::from)
    }

    fn known(&self, kind: NameKind, id: u32) -> Option<&str> {
        self.observed.names.get(&NameKey { kind: kind as u32, id }).map(String::as_str).filter(|name| !name.is_empty())
    }
}

fn frontends<A: Family>(store: &KernelStore) -> Result<BTreeMap<FrontendKey<A>, Frontend>, StoreError> {
    store.family::<A>().frontends.iter().collect()
}
