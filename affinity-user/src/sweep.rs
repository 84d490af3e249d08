//! Removes stale entries from the kernel's tables, in bounded slices.
//!
//! The programs never expire entries or report evictions: they check a pin's age when its client comes back, and an LRU map
//! drops the oldest entries silently. So the agent walks the flows and then the sessions repeatedly, one batch at a time:
//!
//! * Expired sessions are removed and reported. Sessions of a backend that has gone stay: their client's next connection moves
//!   them and reports it.
//! * Flows that are over are removed, both directions at once, and so are the entries of sockets for datagrams.
//! * At the end of a pass the live sessions of each backend are written to `loads`, evictions are counted and reported, and
//!   unused bits of the filter are cleared.
//!
//! The sweep makes no decisions about packets. Each entry is looked up again right before its removal, so that a pin or flow
//! that a packet has just used stays.

mod clients;
mod evictions;
mod expiry;
mod filter;
mod lingering;
mod scopes;
mod sockets;

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use affinity_common::{
    abi::{
        Address, BackendRef, CLIENTS_ARE_NODES, Correction, Direction, Event, EventKind, FLOW_FOREIGN, Flow, FlowKey,
        FrontendKey, NameKey, NameKind, Reason, Session, SessionKey, Timer, USAGES, UsageKey, UsageOf, V4, V6,
    },
    headers::TCP,
    state,
};
use bytemuck::Zeroable;
use tracing::{debug, error, warn};

pub use self::expiry::{
    CLOSED_FLOW, CLOSING_FLOW, DEAD_FLOW, HALF_OPEN_FLOW, IDLE_TCP_FLOW, IDLE_UDP_FLOW, Keeping, ORPHANED_SESSION,
    Policy, UNANSWERED_UDP_FLOW, flow_is_over, is_expired,
};
pub use self::filter::{FilterPlan, FilterPlans};
pub use self::lingering::LOOK_EVERY;
use self::{
    clients::Clients,
    evictions::{Counts, Evictions, Found},
    filter::FilterUse,
    lingering::Watch,
    scopes::Scopes,
};
use crate::{
    events::EventReader,
    linger::Traffic,
    source::NodeAddresses,
    store::{
        StoreError,
        kernel::{Family, KernelStore, Walk},
    },
    sys::{SysError, monotonic_ns},
};

/// The pause between two slices; a slice is one batch of entries.
pub const PAUSE: Duration = Duration::from_millis(5);
/// The pause between two passes, minimum and maximum. In between, it is a multiple of the time that the pass took.
pub const REST: Duration = Duration::from_secs(2);
/// See [`REST`].
pub const REST_AT_MOST: Duration = Duration::from_secs(60);
const REST_FACTOR: u32 = 4;
/// The pause after a failed slice.
const AFTER_FAILURE: Duration = Duration::from_secs(5);

/// What the sweep has done since it began.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Complete passes.
    pub passes: u64,
    /// Sessions removed because they had expired, or because no frontend led to them any more.
    pub expired: u64,
    /// Flow records removed, and entries of sockets that had sent datagrams.
    pub flows: u64,
    /// Sessions that the kernel evicted.
    pub evicted: u64,
    /// Bits of the filter cleared.
    pub filter_bits: u64,
}

/// What the last complete pass found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Census {
    /// Service -> live sessions that its connections made.
    pub by_service: BTreeMap<u32, u64>,
    /// Backend -> live sessions.
    pub by_backend: BTreeMap<u32, u64>,
    /// Map -> entries that stayed.
    pub entries: BTreeMap<&'static str, u64>,
    /// Service -> sessions that the kernel evicted since the sweep began. Those of a group count for its first service.
    pub evicted: BTreeMap<u32, u64>,
}

/// The services, pools and groups that a complete pass met in sessions, flows and sockets.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Met {
    /// When the pass began, `CLOCK_MONOTONIC` in nanoseconds.
    pub began_ns: u64,
    /// Their ids.
    pub ids: BTreeSet<u32>,
}

/// Walks the tables of one dataplane.
#[derive(Debug)]
pub struct Sweeper {
    store: KernelStore,
    operators: EventReader,
    stage: Stage,
    pass: Pass,
    filter: FilterUse,
    evictions: Evictions,
    /// Group -> what the agent and operators did to its pins since the sweep began.
    counts: BTreeMap<u32, Counts>,
    /// Services that lost pins by eviction since the last call.
    evicted: BTreeSet<u32>,
    totals: Totals,
    census: Census,
    met: Met,
    watch: Watch,
    /// How long pins stay after no frontend leads to them.
    orphaned: Duration,
    /// Scope -> when a pass first found that no frontend leads to it, monotonic nanoseconds.
    orphans: BTreeMap<u32, u64>,
    nodes: NodeAddresses,
    /// Services that currently have a condition.
    clients_are_nodes: BTreeSet<u32>,
}

/// The stage of a pass. Flows come first because sessions need their connection counts.
#[derive(Debug)]
enum Stage {
    Begin,
    FlowsV4(Walk),
    FlowsV6(Walk),
    Sockets(Walk),
    SessionsV4(Walk),
    SessionsV6(Walk),
    End,
}

/// The data that one pass has gathered.
#[derive(Debug)]
struct Pass {
    began: Instant,
    began_ns: u64,
    scopes: Scopes,
    /// Backend -> its generation.
    generations: Vec<u32>,
    connections: Connections,
    /// Backend -> live sessions.
    loads: BTreeMap<u32, u64>,
    /// Backend -> the value of `loads` when the pass began.
    loads_before: Vec<u64>,
    /// Group -> its counts when the pass began.
    before: BTreeMap<u32, Counts>,
    /// Group -> live sessions.
    live: BTreeMap<u32, u64>,
    /// Service -> live sessions.
    by_service: BTreeMap<u32, u64>,
    /// Map -> entries that stayed.
    entries: BTreeMap<&'static str, u64>,
    /// Services, pools and scopes of all entries that stayed.
    met: BTreeSet<u32>,
    clients: Clients,
}

impl Pass {
    fn lives(&self, BackendRef { index, generation }: BackendRef) -> bool {
        self.generations.get(index as usize) == Some(&generation)
    }
}

/// Open connections of sessions under the timer `alive`: client, scope, and backend.
type Connections = BTreeMap<([u8; 16], u32, BackendRef), u32>;

impl Sweeper {
    /// The sweeper of a dataplane. The publisher uses `plans` to announce when it sets bits of the filter.
    ///
    /// # Errors
    /// [`SysError`] if the event ring cannot be read.
    pub fn new(store: KernelStore, plans: Arc<FilterPlans>, nodes: NodeAddresses) -> Result<Self, SysError> {
        Ok(Self {
            operators: EventReader::from_now(&store.events)?,
            stage: Stage::Begin,
            pass: Pass::begin(),
            filter: FilterUse::new(plans),
            evictions: Evictions::default(),
            counts: BTreeMap::new(),
            evicted: BTreeSet::new(),
            totals: Totals::default(),
            census: Census::default(),
            met: Met::default(),
            watch: Watch::new(),
            orphaned: ORPHANED_SESSION,
            orphans: BTreeMap::new(),
            nodes,
            clients_are_nodes: BTreeSet::new(),
            store,
        })
    }

    /// Keeps pins that no frontend leads to for at least this long.
    #[must_use]
    pub fn with_gap(mut self, gap: Duration) -> Self {
        self.orphaned = gap.max(ORPHANED_SESSION);
        self
    }

    /// Checks the connections of lingering backends if that is due; see [`LOOK_EVERY`]. A failure is logged.
    pub fn look(&mut self) {
        if let Err(error) = self.watch.look(&self.store) {
            error!("sweep: {error}");
        }
    }

    /// Their traffic at the last check, by backend.
    #[must_use]
    pub const fn traffic(&self) -> &BTreeMap<u32, Traffic> {
        self.watch.traffic()
    }

    /// Whether another pass is wanted soon, because there are lingering backends with unknown connections.
    #[must_use]
    pub const fn is_behind(&self) -> bool {
        self.watch.is_behind()
    }

    /// What was done so far.
    #[must_use]
    pub const fn totals(&self) -> Totals {
        self.totals
    }

    /// What the last complete pass found.
    #[must_use]
    pub const fn census(&self) -> &Census {
        &self.census
    }

    /// The services, pools and groups that the last complete pass met.
    #[must_use]
    pub const fn met(&self) -> &Met {
        &self.met
    }

    /// Processes one slice, and returns how long to wait before the next. A failure is logged, and the pass restarts.
    pub fn step(&mut self) -> Duration {
        self.slice(monotonic_ns()).unwrap_or_else(|error| {
            error!("sweep: {error}");
            self.stage = Stage::Begin;
            AFTER_FAILURE
        })
    }

    fn slice(&mut self, now_ns: u64) -> Result<Duration, StoreError> {
        self.follow_operators();
        self.stage = match mem::replace(&mut self.stage, Stage::Begin) {
            Stage::Begin => {
                self.begin(now_ns)?;
                Stage::FlowsV4(self.store.v4.flows.walk())
            }
            Stage::FlowsV4(mut walk) => match self.flows::<V4>(&mut walk, now_ns)? {
                true => Stage::FlowsV4(walk),
                false => Stage::FlowsV6(self.store.v6.flows.walk()),
            },
            Stage::FlowsV6(mut walk) => match self.flows::<V6>(&mut walk, now_ns)? {
                true => Stage::FlowsV6(walk),
                false => Stage::Sockets(self.store.sockets.walk()),
            },
            Stage::Sockets(mut walk) => match self.sockets(&mut walk, now_ns)? {
                true => Stage::Sockets(walk),
                false => {
                    self.watch.finish();
                    Stage::SessionsV4(self.store.v4.sessions.walk())
                }
            },
            Stage::SessionsV4(mut walk) => match self.sessions::<V4>(&mut walk, now_ns)? {
                true => Stage::SessionsV4(walk),
                false => Stage::SessionsV6(self.store.v6.sessions.walk()),
            },
            Stage::SessionsV6(mut walk) => match self.sessions::<V6>(&mut walk, now_ns)? {
                true => Stage::SessionsV6(walk),
                false => Stage::End,
            },
            Stage::End => {
                self.end(now_ns)?;
                return Ok((self.pass.began.elapsed() * REST_FACTOR).clamp(REST, REST_AT_MOST));
            }
        };
        Ok(PAUSE)
    }
}

impl Pass {
    fn begin() -> Self {
        Self {
            began: Instant::now(),
            began_ns: 0,
            scopes: Scopes::default(),
            generations: Vec::new(),
            connections: Connections::new(),
            loads: BTreeMap::new(),
            loads_before: Vec::new(),
            before: BTreeMap::new(),
            live: BTreeMap::new(),
            by_service: BTreeMap::new(),
            met: BTreeSet::new(),
            clients: Clients::default(),
            entries: [V4::SESSIONS, V6::SESSIONS, V4::FLOWS, V6::FLOWS].map(|map| (map, 0)).into(),
        }
    }
}

/// The difference to add to the programs' count of a backend's live sessions, if a pass met `live` of them. The pass may or may
/// not have met sessions that came or went while it walked, so any number between the counts before and after the pass is
/// correct.
fn correction([before, after]: [u64; 2], live: u64) -> i64 {
    // Signed: the programs' count is negative if they counted more ends of sessions than beginnings.
    let [before, after, live] = [before, after, live].map(u64::cast_signed);
    live - live.clamp(before.min(after), before.max(after))
}

// ---- the beginning and the end of a pass ----

impl Sweeper {
    fn begin(&mut self, now_ns: u64) -> Result<(), StoreError> {
        self.pass = Pass { began_ns: now_ns, clients: Clients::begin(&self.nodes), ..Pass::begin() };
        let generations = &self.store.generations;
        self.pass.generations.extend((0..generations.len()).map(|backend| generations.load_u32(backend)));
        let loads = &self.store.loads;
        self.pass.loads_before.extend((0..loads.len()).map(|backend| loads.load_u64(backend)));
        for entry in &self.store.v4.frontends {
            self.pass.scopes.add(&entry?.1);
        }
        for entry in &self.store.v6.frontends {
            self.pass.scopes.add(&entry?.1);
        }
        let scopes = &self.pass.scopes;
        self.orphans.retain(|scope, _| !scopes.leads_to(*scope));
        self.pass.before = self.count()?;
        self.watch.begin(&self.store);
        self.filter.begin();
        Ok(())
    }

    fn end(&mut self, now_ns: u64) -> Result<(), StoreError> {
        for (backend, before) in (0..).zip(mem::take(&mut self.pass.loads_before)) {
            let live = self.pass.loads.get(&backend).copied().unwrap_or(0);
            // Adds a difference, so that concurrent counts of the programs are not lost.
            match correction([before, self.store.loads.load_u64(backend)], live) {
                0 => {}
                missing => self.store.loads.add_u64(backend, missing),
            }
        }
        self.report_evictions(now_ns)?;
        self.census.by_service = mem::take(&mut self.pass.by_service);
        self.census.by_backend = mem::take(&mut self.pass.loads);
        self.census.entries = mem::take(&mut self.pass.entries);
        self.met = Met { began_ns: self.pass.began_ns, ids: mem::take(&mut self.pass.met) };
        self.store_conditions()?;
        self.need_published()?;
        self.totals.filter_bits += u64::from(self.filter.finish(&self.store.filter));
        self.totals.passes += 1;
        debug!(totals = ?self.totals, took = ?self.pass.began.elapsed(), "sweep: end of a pass");
        Ok(())
    }

    /// Stores the condition that all clients look like nodes, for as many services as fit.
    fn store_conditions(&mut self) -> Result<(), StoreError> {
        let room = self.store.service_conditions.info().max_entries as usize;
        self.clients_are_nodes = self.pass.clients.look_like_nodes(&self.nodes).into_iter().take(room).collect();
        let written = self.store.service_conditions.iter().collect::<Result<BTreeMap<u32, u32>, _>>()?;
        for service in written.keys().filter(|service| !self.clients_are_nodes.contains(service)) {
            self.store.service_conditions.remove(service)?;
        }
        for service in self.clients_are_nodes.iter().filter(|service| !written.contains_key(service)) {
            self.store.service_conditions.put(service, &CLIENTS_ARE_NODES)?;
        }
        Ok(())
    }

    /// Notes the bits of all frontends and members that are published now.
    fn need_published(&mut self) -> Result<(), StoreError> {
        let mut protocols: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
        let mut note = |pool, protocol| protocols.entry(pool).or_default().push(protocol);
        for entry in &self.store.v4.frontends {
            let (key, frontend) = entry?;
            self.filter.need_frontend(&key);
            note(frontend.pool, key.protocol);
        }
        for entry in &self.store.v6.frontends {
            let (key, frontend) = entry?;
            self.filter.need_frontend(&key);
            note(frontend.pool, key.protocol);
        }
        for entry in &self.store.members {
            let (key, member) = entry?;
            let Some(backend) = self.store.backends.get(&key.backend)? else { continue };
            for &protocol in protocols.get(&key.pool).into_iter().flatten() {
                self.filter.need_member(backend.address, member.port, protocol);
            }
        }
        Ok(())
    }

    /// The counts of each group up to now.
    fn count(&self) -> Result<BTreeMap<u32, Counts>, StoreError> {
        let created_at = USAGES.iter().position(|&reason| reason == Reason::Created);
        let usage = self.store.usage_sums()?;
        let created = |service: &u32| {
            let usage = usage.get(&UsageKey { of: UsageOf::Service as u32, id: *service });
            created_at.and_then(|at| usage.map(|usage| usage.counts[at])).unwrap_or(0)
        };
        let groups = self.pass.scopes.groups().map(|(group, services)| {
            let ours = self.counts.get(&group).copied().unwrap_or_default();
            let by_packets: u64 = services.iter().map(created).sum();
            (group, Counts { created: ours.created + by_packets, ..ours })
        });
        Ok(groups.collect())
    }

    fn report_evictions(&mut self, now_ns: u64) -> Result<(), StoreError> {
        let after = self.count()?;
        self.evictions.retain(|group| after.contains_key(&group));
        for (&group, &after) in &after {
            let Some(&before) = self.pass.before.get(&group) else { continue };
            let live = self.pass.live.get(&group).copied().unwrap_or(0);
            let evicted = self.evictions.update(group, &Found { before, after, live });
            if evicted == 0 {
                continue;
            }
            self.totals.evicted += evicted;
            let services = self.pass.scopes.groups().find(|(of, _)| *of == group).map(|(_, services)| services);
            let service = services.and_then(|services| services.first().copied()).unwrap_or(0);
            self.evicted.insert(service);
            *self.census.evicted.entry(service).or_default() += evicted;
            warn!(service, evicted, "the session table is full: pins were evicted");
            self.store.report(&Event {
                time_ns: now_ns,
                service,
                scope: group,
                from: BackendRef { index: u32::try_from(evicted).unwrap_or(u32::MAX), generation: 0 },
                kind: EventKind::Evicted as u8,
                reason: Reason::TableFull as u8,
                ..Event::zeroed()
            })?;
        }
        Ok(())
    }

    /// The names, `namespace/name`, of services that lost pins by eviction since the last call.
    pub fn take_evicted(&mut self) -> Vec<String> {
        let evicted = mem::take(&mut self.evicted);
        self.names(&evicted)
    }

    /// The names of services for which all clients looked like nodes in the last complete pass.
    #[must_use]
    pub fn clients_are_nodes(&self) -> Vec<String> {
        self.names(&self.clients_are_nodes)
    }

    fn names(&self, services: &BTreeSet<u32>) -> Vec<String> {
        let key = |id| NameKey { kind: NameKind::Service as u32, id };
        // A service without a name was removed in the meantime.
        let name = |id| self.store.names.get(&key(id)).ok().flatten().map(|name| name.as_str().to_owned());
        services.iter().filter_map(|id| name(*id)).collect()
    }

    /// Counts the pins that operators set and removed: the programs do not count them.
    fn follow_operators(&mut self) {
        let missed = self.operators.missed();
        for event in self.operators.by_ref() {
            let counts = self.counts.entry(self.pass.scopes.group(event.scope)).or_default();
            match EventKind::from_byte(event.kind) {
                Some(EventKind::Pinned) if event.from.generation == 0 => counts.created += 1,
                Some(EventKind::Unpinned) => counts.removed += 1,
                Some(
                    EventKind::Pinned | EventKind::Created | EventKind::Moved | EventKind::Expired | EventKind::Evicted,
                )
                | None => {}
            }
        }
        if self.operators.missed() != missed {
            self.evictions.restart();
        }
    }
}

// ---- flows ----

impl Sweeper {
    /// Processes one batch of a family's flows; false at their end.
    fn flows<A: Family>(&mut self, walk: &mut Walk, now_ns: u64) -> Result<bool, StoreError> {
        let Some(batch) = self.store.family::<A>().flows.next_batch(walk)? else { return Ok(false) };
        for (key, flow) in batch {
            if self.is_over(&key, &flow, now_ns)? {
                self.remove_flow(&key, &flow, now_ns)?;
            } else {
                *self.pass.entries.entry(A::FLOWS).or_default() += 1;
                self.pass.met.extend([flow.pool, flow.scope]);
                self.watch.note_flow(&self.store, &key, &flow)?;
                self.note_flow(&key, &flow);
            }
        }
        Ok(true)
    }

    /// Whether both directions of a flow are over. The packets of each direction renew only their own record.
    fn is_over<A: Family>(&self, key: &FlowKey<A>, flow: &Flow<A>, now_ns: u64) -> Result<bool, StoreError> {
        let lives = flow.flags & FLOW_FOREIGN != 0 || self.pass.lives(flow.backend);
        let over =
            |flow: &Flow<A>| flow_is_over(key.protocol, flow.state, now_ns.saturating_sub(flow.last_used_ns), lives);
        if !over(flow) {
            return Ok(false);
        }
        let other = self.store.family::<A>().flows.get(&key.opposite(&flow.edit))?;
        // The same key may belong to another flow by now, with another backend.
        let other =
            other.filter(|other| (other.backend, other.backend.generation) == (flow.backend, flow.backend.generation));
        Ok(other.is_none_or(|other| over(&other)))
    }

    fn remove_flow<A: Family>(&mut self, key: &FlowKey<A>, flow: &Flow<A>, now_ns: u64) -> Result<(), StoreError> {
        let flows = &self.store.family::<A>().flows;
        let opposite = key.opposite(&flow.edit);
        for key in [*key, opposite] {
            let Some(again) = flows.get(&key)? else { continue };
            if self.is_over(&key, &again, now_ns)? && flows.remove(&key)? {
                self.totals.flows += 1;
            }
        }
        Ok(())
    }

    fn note_flow<A: Family>(&mut self, key: &FlowKey<A>, flow: &Flow<A>) {
        if key.direction == Direction::RevDnat as u8 {
            self.filter.need_source(key.saddr, key.sport, key.protocol);
            return;
        }
        if key.direction != Direction::Dnat as u8 {
            return;
        }
        self.filter.need_frontend(&FrontendKey::new(key.daddr, key.dport, key.protocol));
        let is_live = key.protocol == TCP && state::is_live(flow.state);
        if is_live && flow.scope != 0 && flow.timer == Timer::Alive as u8 {
            let client = key.saddr.masked(flow.prefix).to_mapped();
            let session = (client, flow.scope, flow.backend);
            *self.pass.connections.entry(session).or_default() += 1;
        }
    }
}

// ---- sessions ----

impl Sweeper {
    /// Processes one batch of a family's sessions; false at their end.
    fn sessions<A: Family>(&mut self, walk: &mut Walk, now_ns: u64) -> Result<bool, StoreError> {
        let Some(batch) = self.store.family::<A>().sessions.next_batch(walk)? else { return Ok(false) };
        for (key, session) in batch {
            let group = self.pass.scopes.group(key.scope);
            let policy = self.pass.scopes.policy(key.scope, session.service);
            let session = self.correct_connections(&key, session, policy)?;
            let keeping = policy.map_or_else(|| self.keep_orphan(key.scope), Keeping::By);
            if is_expired(&session, keeping, now_ns) && self.expire(&key, keeping, now_ns)? {
                self.counts.entry(group).or_default().removed += 1;
                self.totals.expired += 1;
                continue;
            }
            *self.pass.live.entry(group).or_default() += 1;
            *self.pass.entries.entry(A::SESSIONS).or_default() += 1;
            self.pass.met.extend([session.service, key.scope]);
            if self.pass.lives(session.backend) {
                *self.pass.by_service.entry(session.service).or_default() += 1;
                *self.pass.loads.entry(session.backend.index).or_default() += 1;
                self.pass.clients.note(session.service, key.client);
            }
        }
        Ok(true)
    }

    /// Keeps a pin of a scope that no frontend leads to, since this pass or an earlier one.
    fn keep_orphan(&mut self, scope: u32) -> Keeping {
        let since_ns = *self.orphans.entry(scope).or_insert(self.pass.began_ns);
        let orphaned_ns = u64::try_from(self.orphaned.as_nanos()).unwrap_or(u64::MAX);
        Keeping::OrphanedUntil(since_ns.saturating_add(orphaned_ns))
    }

    fn expire<A: Family>(&self, key: &SessionKey<A>, keeping: Keeping, now_ns: u64) -> Result<bool, StoreError> {
        let still = |session: &Session| is_expired(session, keeping, now_ns);
        let removed = self.store.remove_session_if(key, EventKind::Expired, Reason::Expired, now_ns, still)?;
        Ok(removed.is_some())
    }

    /// Corrects the number of connections of a pin under `alive`: a connection that ended without a packet (its flow was
    /// removed or evicted) would keep the pin forever. Corrects only pins that their connections have not touched since the
    /// pass began: for others, the flows were read at a different moment.
    fn correct_connections<A: Family>(
        &self,
        key: &SessionKey<A>,
        session: Session,
        policy: Option<Policy>,
    ) -> Result<Session, StoreError> {
        if policy.is_none_or(|policy| policy.timer != Timer::Alive) || session.last_used_ns >= self.settled_ns() {
            return Ok(session);
        }
        let client = key.client.to_mapped();
        let of_session = (client, key.scope, session.backend);
        let connections = self.pass.connections.get(&of_session).copied().unwrap_or(0);
        if connections == session.live_connections() {
            return Ok(session);
        }
        self.store.correct::<A>(&Correction {
            client,
            scope: key.scope,
            is_v6: u32::from(A::BITS == V6::BITS),
            backend: session.backend,
            connections: session.connections,
            live: connections,
        })?;
        Ok(self.store.family::<A>().sessions.get(key)?.unwrap_or(session))
    }

    /// Pins that were last used before this time were not touched since the pass began. The margin is for the programs' clock,
    /// which lags.
    const fn settled_ns(&self) -> u64 {
        const CLOCK_LATE_NS: u64 = 100_000_000;
        self.pass.began_ns.saturating_sub(CLOCK_LATE_NS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_during_a_pass_are_not_corrected() {
        assert_eq!(correction([5, 5], 5), 0);
        // Five pins were created behind the walk, or three removed.
        assert_eq!(correction([0, 5], 0), 0);
        assert_eq!(correction([0, 5], 5), 0);
        assert_eq!(correction([5, 2], 4), 0);
        // Two were evicted, or were never counted.
        assert_eq!(correction([5, 5], 3), -2);
        assert_eq!(correction([5, 6], 3), -2);
        assert_eq!(correction([5, 6], 8), 2);
        // The programs counted more ends than beginnings.
        assert_eq!(correction([(-1i64).cast_unsigned(), 0], 1), 1);
        assert_eq!(correction([(-1i64).cast_unsigned(), (-1i64).cast_unsigned()], 0), 1);
    }
}
