//! The state after frames have run, in one form for the kernel and the model.

use std::{collections::BTreeMap, fmt::Debug};

use affinity_common::{
    abi::{
        Event, Flow, FlowKey, Foreign, FragmentKey, REASONS, Reason, Session, SessionKey, USAGES, Usage, UsageKey, V4,
        V6, usage_index,
    },
    model::Model,
};
use anyhow::Result;

use super::Kernel;

/// Everything that programs change.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Sessions, IPv4.
    pub sessions_v4: BTreeMap<SessionKey<V4>, Session>,
    /// Sessions, IPv6.
    pub sessions_v6: BTreeMap<SessionKey<V6>, Session>,
    /// Flows, IPv4.
    pub flows_v4: BTreeMap<FlowKey<V4>, Flow<V4>>,
    /// Flows, IPv6.
    pub flows_v6: BTreeMap<FlowKey<V6>, Flow<V6>>,
    /// Foreign connections, IPv4.
    pub foreign_v4: BTreeMap<FlowKey<V4>, Foreign>,
    /// Foreign connections, IPv6.
    pub foreign_v6: BTreeMap<FlowKey<V6>, Foreign>,
    /// Fragmented packets, IPv4.
    pub fragments_v4: BTreeMap<FragmentKey<V4>, FlowKey<V4>>,
    /// Fragmented packets, IPv6.
    pub fragments_v6: BTreeMap<FragmentKey<V6>, FlowKey<V6>>,
    /// Live sessions by backend; without zeros.
    pub loads: BTreeMap<u32, u64>,
    /// Packets by reason; without zeros.
    pub counters: BTreeMap<Reason, u64>,
    /// Counts by service and backend.
    pub usage: BTreeMap<UsageKey, Usage>,
    /// Events, oldest first.
    pub events: Vec<Event>,
}

impl State {
    /// Of the model.
    pub fn of_model(model: &Model) -> Self {
        let usage = model.usage.borrow();
        let usage = usage.iter().map(|(key, counts)| {
            let mut usage = Usage::default();
            for (reason, count) in counts {
                let index = usage_index(*reason).unwrap_or_else(|| panic!("{} is not among {USAGES:?}", reason.name()));
                usage.counts[index] = *count;
            }
            (*key, usage)
        });
        Self {
            sessions_v4: model.sessions_v4.borrow().iter().collect(),
            sessions_v6: model.sessions_v6.borrow().iter().collect(),
            flows_v4: model.flows_v4.borrow().iter().collect(),
            flows_v6: model.flows_v6.borrow().iter().collect(),
            foreign_v4: model.foreign_v4.borrow().iter().collect(),
            foreign_v6: model.foreign_v6.borrow().iter().collect(),
            fragments_v4: model.fragments_v4.borrow().iter().collect(),
            fragments_v6: model.fragments_v6.borrow().iter().collect(),
            loads: without_zeros(model.loads.borrow().iter().map(|(index, load)| (*index, *load))),
            counters: without_zeros(model.counters.borrow().iter().map(|(reason, count)| (*reason, *count))),
            usage: usage.collect(),
            events: model.events.borrow().clone(),
        }
    }

    pub(super) fn of_kernel(kernel: &Kernel) -> Result<Self> {
        let store = &kernel.store;
        let counts = kernel.counts()?;
        Ok(Self {
            sessions_v4: store.v4.sessions.iter().collect::<Result<_, _>>()?,
            sessions_v6: store.v6.sessions.iter().collect::<Result<_, _>>()?,
            flows_v4: store.v4.flows.iter().collect::<Result<_, _>>()?,
            flows_v6: store.v6.flows.iter().collect::<Result<_, _>>()?,
            foreign_v4: store.v4.foreign.iter().collect::<Result<_, _>>()?,
            foreign_v6: store.v6.foreign.iter().collect::<Result<_, _>>()?,
            fragments_v4: store.v4.fragments.iter().collect::<Result<_, _>>()?,
            fragments_v6: store.v6.fragments.iter().collect::<Result<_, _>>()?,
            loads: without_zeros((0..store.loads.len()).map(|index| (index, store.loads.load_u64(index)))),
            counters: without_zeros(REASONS.iter().map(|&reason| (reason, counts[reason as usize]))),
            usage: store.usage_sums()?,
            events: kernel.events(),
        })
    }

    /// The count of a reason.
    pub fn count(&self, reason: Reason) -> u64 {
        self.counters.get(&reason).copied().unwrap_or(0)
    }

    /// The differences between the kernel's state and the model's, one line each; none if they are equal.
    pub fn differences(kernel: &Self, model: &Self) -> Vec<String> {
        let Self { sessions_v4, sessions_v6, flows_v4, flows_v6, loads, counters, usage, events, .. } = kernel;
        let mut lines = Vec::new();
        compare(&mut lines, "session", sessions_v4, &model.sessions_v4);
        compare(&mut lines, "session", sessions_v6, &model.sessions_v6);
        compare(&mut lines, "flow", flows_v4, &model.flows_v4);
        compare(&mut lines, "flow", flows_v6, &model.flows_v6);
        compare(&mut lines, "foreign", &kernel.foreign_v4, &model.foreign_v4);
        compare(&mut lines, "foreign", &kernel.foreign_v6, &model.foreign_v6);
        compare(&mut lines, "fragment", &kernel.fragments_v4, &model.fragments_v4);
        compare(&mut lines, "fragment", &kernel.fragments_v6, &model.fragments_v6);
        compare(&mut lines, "load", loads, &model.loads);
        compare(&mut lines, "counter", counters, &model.counters);
        compare(&mut lines, "usage", usage, &model.usage);
        let numbered = |events: &[Event]| events.iter().copied().enumerate().collect();
        compare(&mut lines, "event", &numbered(events), &numbered(&model.events));
        lines
    }
}

fn without_zeros<K: Ord>(entries: impl Iterator<Item = (K, u64)>) -> BTreeMap<K, u64> {
    entries.filter(|(_, number)| *number != 0).collect()
}

fn compare<K: Ord + Debug, V: PartialEq + Debug>(
    lines: &mut Vec<String>,
    what: &str,
    kernel: &BTreeMap<K, V>,
    model: &BTreeMap<K, V>,
) {
    for (key, value) in kernel {
        match model.get(key) {
            Some(other) if value == other => {}
            other => lines.push(format!("{what} {key:?}: {value:?} in the kernel, {other:?} in the model")),
        }
    }
    for (key, value) in model.iter().filter(|(key, _)| !kernel.contains_key(key)) {
        lines.push(format!("{what} {key:?}: none in the kernel, {value:?} in the model"));
    }
}
