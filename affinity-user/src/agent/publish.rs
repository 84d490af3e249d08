//! From a snapshot of the source to the kernel's maps, and the agent's status record, which outlives the agent.

use std::{
    collections::BTreeMap,
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use affinity_common::{
    abi::{MEMBER_READY, Member, NameKey, NameKind, SourceKind, Status, UsageKey, UsageOf},
    names,
};
use tracing::{debug, info};

use super::problems::{Given, Problems, compare_with_former};
use crate::{
    desired::{self, BackendName, Change, Desired, DesiredState, NodeFacts, Scope},
    linger::{Limits, Lingerer, Traffic},
    metrics::Vitals,
    pins::PinDir,
    plan::{StateIndex, retired},
    source::{Problem, Snapshot, Source, View, api::Node},
    store::{
        Observed, Op, Store, StoreError,
        kernel::{KernelStore, Table},
    },
    sweep::{FilterPlans, Met},
    sys::monotonic_ns,
};

/// Brings the maps in step with the last snapshot.
pub(super) struct Publisher {
    store: KernelStore,
    state: DesiredState,
    /// How many objects the source gave last.
    objects: Given,
    /// Problems of the source itself.
    given: Vec<Problem>,
    problems: Problems,
    /// The contents of the store; none if they are not known: at the start, and after a failed step.
    state_index: Option<StateIndex>,
    due: Due,
    /// Whether what a former agent left was compared with the desired state.
    has_compared: bool,
    /// When the oldest snapshot arrived that is not published yet.
    taken: Option<Instant>,
    /// Names that are kept though their objects have gone, and when that was first seen: `CLOCK_MONOTONIC` in nanoseconds.
    withdrawn: BTreeMap<NameKey, u64>,
    limits: Limits,
    /// Backends that linger, by index and generation.
    lingering: BTreeMap<(u32, u32), Lingerer>,
    filter: Arc<FilterPlans>,
    vitals: Arc<Vitals>,
}

/// What is not planned yet.
#[derive(Default)]
enum Due {
    Nothing,
    Change(Box<Change>),
    #[default]
    All,
}

/// The result of publishing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Published {
    /// Steps taken.
    pub(super) steps: usize,
    /// Whether backends have gone, or are no longer ready or have another port in some pool.
    pub(super) left: bool,
}

/// Whether this step takes the backend away from connections, given the state before it.
fn takes_away(step: &Op, observed: &Observed) -> bool {
    match step {
        Op::PutBackend(_, backend) => backend.generation.is_multiple_of(2),
        Op::PutMember(key, member) => {
            let moves = |before: &Member| before.port != member.port;
            member.state != MEMBER_READY || observed.members.get(key).is_some_and(moves)
        }
        Op::RemoveMember(_) => true,
        Op::PutName(..)
        | Op::RemoveName(_)
        | Op::WriteSlots { .. }
        | Op::SetFilter(..)
        | Op::PutUsage(_)
        | Op::RemoveUsage(_)
        | Op::PutNode(_)
        | Op::PutRangeV4(_)
        | Op::PutRangeV6(_)
        | Op::RemoveRangeV4(_)
        | Op::RemoveRangeV6(_)
        | Op::PutFrontendV4(..)
        | Op::PutFrontendV6(..)
        | Op::RemoveFrontendV4(_)
        | Op::RemoveFrontendV6(_)
        | Op::Grace => false,
    }
}

/// Whether a node is about to be removed, by kube-proxy's criteria: its object is being deleted, or the cluster autoscaler has
/// marked it for that.
fn is_leaving(node: &Node) -> bool {
    /// <https://github.com/kubernetes/autoscaler/blob/master/cluster-autoscaler/utils/taints/taints.go>
    const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    node.metadata.deletion_timestamp.is_some() || taints.into_iter().any(|taint| taint.key == TO_BE_DELETED)
}

impl Publisher {
    /// How many plans in a row at most: if room is short, each plan has the room that the previous one freed.
    const PLANS: usize = 16;

    pub(super) fn new(
        store: KernelStore,
        options: desired::Options,
        limits: Limits,
        filter: Arc<FilterPlans>,
        vitals: Arc<Vitals>,
    ) -> Self {
        Self {
            store,
            state: DesiredState::new(options),
            objects: Given::default(),
            given: Vec::new(),
            problems: Problems::default(),
            state_index: None,
            due: Due::All,
            has_compared: false,
            taken: None,
            withdrawn: BTreeMap::new(),
            limits,
            lingering: BTreeMap::new(),
            filter,
            vitals,
        }
    }

    /// Computes the desired state from the snapshot; [`Publisher::publish`] applies it.
    pub(super) fn take(&mut self, snapshot: &Snapshot) {
        self.taken.get_or_insert_with(Instant::now);
        self.vitals.pending(monotonic_ns());
        self.vitals.node_is_leaving(snapshot.node.as_ref().is_some_and(|node| is_leaving(&node.object)));
        self.objects.update(snapshot);
        let change = self.state.update(snapshot);
        self.given.clone_from(&snapshot.problems);
        self.due = match (mem::take(&mut self.due), change) {
            (Due::Nothing, Some(change)) => Due::Change(Box::new(change)),
            _ => Due::All,
        };
    }

    /// Updates the facts about the node. Returns whether that changes the desired state.
    pub(super) fn learn(&mut self, node: NodeFacts) -> bool {
        let is_news = self.state.learn(node);
        if is_news {
            self.due = Due::All;
        }
        is_news
    }

    /// Applies pending changes, and logs problems.
    ///
    /// # Errors
    /// The step that failed. Earlier steps stay applied. The next call reads the store again and continues from there.
    pub(super) fn publish(&mut self) -> Result<Published, StoreError> {
        let published = self.carry_out();
        match &published {
            Ok(published) => {
                self.vitals.published(published.steps);
                if let Some(taken) = self.taken.take() {
                    self.vitals.sync.observe(taken.elapsed().as_secs_f64());
                }
            }
            Err(_) => self.vitals.failed(),
        }
        published
    }

    fn carry_out(&mut self) -> Result<Published, StoreError> {
        let due = mem::take(&mut self.due);
        let (mut state_index, mut due) = match self.state_index.take() {
            Some(state_index) => (state_index, due),
            None => (self.read()?, Due::All),
        };
        if !mem::replace(&mut self.has_compared, true) {
            let desired = self.state.desired();
            compare_with_former(state_index.observed(), desired.frontends.len(), desired.known.is_some());
        }
        let mut published = Published::default();
        for round in 1..=Self::PLANS {
            let (steps, problems) = self.plan(&state_index, &due);
            let is_last = steps.is_empty() || problems.is_empty() || round == Self::PLANS;
            if is_last {
                self.problems.update(self.given.iter().chain(self.state.problems()).chain(&problems));
            }
            due = if problems.is_empty() { Due::Nothing } else { Due::All };
            let sets_bits = steps.iter().any(|step| matches!(step, Op::SetFilter(..)));
            let _plan = sets_bits.then(|| self.filter.begin());
            for step in &steps {
                debug!(?step, "apply");
                self.store.apply(step)?;
                published.left |= takes_away(step, state_index.observed());
                state_index.apply(step);
            }
            published.steps += steps.len();
            if is_last {
                break;
            }
        }
        (self.state_index, self.due) = (Some(state_index), due);
        if published.steps > 0 {
            info!(steps = published.steps, "published: {}", self.summary());
        }
        Ok(published)
    }

    /// Reads the store, after a grace period: a plan, of this agent or a former one, may have ended before its own grace
    /// period.
    fn read(&mut self) -> Result<StateIndex, StoreError> {
        self.store.apply(&Op::Grace)?;
        Ok(StateIndex::new(self.store.observe()?, self.store.capacity()))
    }

    fn plan(&self, state_index: &StateIndex, due: &Due) -> (Vec<Op>, Vec<Problem>) {
        if let Due::Change(change) = due {
            let (steps, problems) = state_index.plan_change(change);
            if problems.is_empty() {
                return (steps, problems);
            }
        }
        state_index.plan(self.state.desired())
    }

    /// Removes the names of services, pools and groups that have gone. Two conditions must hold: the gap in which they may come
    /// back is over, and a later pass of the sweep met none of their pins and flows.
    ///
    /// # Errors
    /// The step that failed; the next plan reads the store again.
    pub(super) fn forget_names(&mut self, met: &Met) -> Result<(), StoreError> {
        let Some(mut state_index) = self.state_index.take() else { return Ok(()) };
        let now_ns = monotonic_ns();
        let mut unused: BTreeMap<(u32, String), NameKey> =
            state_index.withdrawn().map(|(key, name)| ((key.kind, name.to_owned()), key)).collect();
        if !unused.is_empty() {
            // Desired names may look unused because their objects had no room.
            wanted_names(self.state.desired()).for_each(|name| _ = unused.remove(&name));
        }
        let since = |key| (key, self.withdrawn.get(&key).copied().unwrap_or(now_ns));
        self.withdrawn = unused.into_values().map(since).collect();
        let gap_ns = u64::try_from(self.limits.gap.as_nanos()).unwrap_or(u64::MAX);
        let is_over = |key: &NameKey, since_ns: &mut u64| {
            let is_unmet = *since_ns < met.began_ns && !met.ids.contains(&key.id);
            is_unmet && now_ns.saturating_sub(*since_ns) >= gap_ns
        };
        for (key, _) in self.withdrawn.extract_if(.., is_over) {
            let step = Op::RemoveName(key);
            self.store.apply(&step)?;
            state_index.apply(&step);
        }
        self.state_index = Some(state_index);
        Ok(())
    }

    /// Retires backends that no longer need to linger, judging by what the sweep has seen of their connections. Returns whether
    /// there were any.
    ///
    /// # Errors
    /// The step that failed; the next call reads the store again.
    pub(super) fn end_lingering(&mut self, traffic: &BTreeMap<u32, Traffic>) -> Result<bool, StoreError> {
        if !self.has_compared {
            // The desired state is not known yet.
            return Ok(false);
        }
        let mut state_index = match self.state_index.take() {
            Some(state_index) => state_index,
            None => {
                self.due = Due::All;
                self.read()?
            }
        };
        let now_ns = monotonic_ns();
        let former = mem::take(&mut self.lingering);
        let mut over = Vec::new();
        for (index, name, record) in state_index.lingering() {
            let key = (index, record.generation);
            let mut lingerer = former.get(&key).copied().unwrap_or_else(|| Lingerer::new(now_ns));
            let is_listed = self.state.desired().others.contains(&name);
            let seen = traffic.get(&index).filter(|seen| seen.generation == record.generation);
            match lingerer.look(seen, is_listed, self.limits, now_ns) {
                Some(end) => over.push((index, name, retired(record), end)),
                None => _ = self.lingering.insert(key, lingerer),
            }
        }
        for (index, name, record, end) in &over {
            let BackendName { address, pod } = name;
            info!("backend {address} {pod} has finished lingering: {}", end.text());
            let usage = UsageKey { of: UsageOf::Backend as u32, id: *index };
            for step in [Op::PutBackend(*index, *record), Op::RemoveUsage(usage)] {
                self.store.apply(&step)?;
                state_index.apply(&step);
            }
        }
        self.state_index = Some(state_index);
        Ok(!over.is_empty())
    }

    /// Whether the last plan left something undone, for lack of room.
    pub(super) const fn is_due(&self) -> bool {
        !matches!(self.due, Due::Nothing)
    }

    /// Problems of the source, and of the state computed from it.
    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.given.iter().chain(self.state.problems())
    }

    /// What the maps should hold.
    pub(super) fn desired(&self) -> &Desired {
        self.state.desired()
    }

    /// Numbers of services and backends, as text.
    pub(super) fn summary(&self) -> String {
        let desired = self.state.desired();
        // Pools are in the order of their services.
        let mut services: Vec<_> = desired.pools.keys().map(|pool| &pool.service).collect();
        services.dedup();
        format!("{}, {}", count(services.len(), "service"), count(desired.backends.len(), "backend"))
    }
}

/// The kinds and names of all services, pools and groups.
fn wanted_names(desired: &Desired) -> impl Iterator<Item = (u32, String)> {
    desired.pools.iter().flat_map(|(name, pool)| {
        let group = match &pool.scope {
            Scope::Group(group) => Some((NameKind::Group as u32, group.to_string())),
            Scope::Service(_) => None,
        };
        let service = (NameKind::Service as u32, name.service.to_string());
        [service, (NameKind::Pool as u32, name.to_string())].into_iter().chain(group)
    })
}

/// "1 service", "2 services".
pub(super) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// How often the status record is written, at most.
pub(super) const STATUS_EVERY: Duration = Duration::from_secs(1);

/// Writes the status record, in the `status` map.
pub(super) struct StatusWriter {
    table: Table<u32, Status>,
    view: View,
    written: Status,
}

impl StatusWriter {
    /// Takes over the record. What a former agent knew of the source stays until this one has newer data.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(super) fn new(pins: &PinDir, source: &Source, view: View) -> Result<Self, StoreError> {
        let table: Table<u32, Status> = Table::open(&pins.maps(), names::STATUS)?;
        let former = table.get(&0)?.unwrap_or_default();
        let kind = match source {
            Source::Directory { .. } => SourceKind::Directory,
            Source::Kubernetes(_) => SourceKind::Kubernetes,
        };
        let written = Status { started_ns: monotonic_ns(), source: kind as u32, ..former };
        table.put(&0, &written)?;
        Ok(Self { table, view, written })
    }

    /// Writes how current the view is. Call it only once a snapshot is published: before that, the tables do not have the view.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(super) fn write(&mut self) -> Result<(), StoreError> {
        let status = Status { current_ns: self.view.current_ns().unwrap_or(self.written.current_ns), ..self.written };
        if status != self.written {
            self.table.put(&0, &status)?;
            self.written = status;
        }
        Ok(())
    }
}
