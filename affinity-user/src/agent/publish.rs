//! From a snapshot of the source to the kernel's maps.

use std::collections::BTreeSet;

use tracing::{debug, info};

use super::problems::Problems;
use crate::{
    desired::{self, Desired, desired},
    plan::plan,
    source::{ObjectName, Problem, Snapshot},
    store::{Observed, Op, Store, StoreError, kernel::KernelStore},
};

/// Brings the maps in step with the last snapshot.
pub(super) struct Publisher {
    store: KernelStore,
    options: desired::Options,
    desired: Desired,
    /// Of the source, and of what was decided from it.
    given: Vec<Problem>,
    problems: Problems,
    /// What the store holds; none where a step has failed, so that nobody knows.
    observed: Option<Observed>,
}

/// What was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Published {
    /// Steps taken.
    pub(super) steps: usize,
    /// Whether bits of the filter were set.
    pub(super) filter: bool,
}

impl Publisher {
    /// At most so many plans in a row: the second has the room that the first one freed.
    const PLANS: usize = 3;

    pub(super) fn new(store: KernelStore, options: desired::Options) -> Self {
        let desired = Desired::default();
        Self { store, options, desired, given: Vec::new(), problems: Problems::default(), observed: None }
    }

    /// Decides what the snapshot asks for; [`Publisher::publish`] carries it out.
    pub(super) fn take(&mut self, snapshot: &Snapshot) {
        let (desired, mut problems) = desired(snapshot, &self.options);
        problems.extend(snapshot.problems.iter().cloned());
        (self.desired, self.given) = (desired, problems);
    }

    /// Carries out what is to be done, and logs what is wrong.
    ///
    /// # Errors
    /// The step that failed; those before it hold. The next call reads the store anew and goes on from there.
    pub(super) fn publish(&mut self) -> Result<Published, StoreError> {
        let mut observed = match self.observed.take() {
            Some(observed) => observed,
            None => self.store.observe()?,
        };
        let mut published = Published::default();
        for round in 1..=Self::PLANS {
            let (steps, problems) = plan(&observed, &self.desired, self.store.capacity());
            let is_last = steps.is_empty() || problems.is_empty() || round == Self::PLANS;
            if is_last {
                self.problems.update(self.given.iter().cloned().chain(problems));
            }
            for step in &steps {
                debug!(?step, "apply");
                self.store.apply(step)?;
                observed.apply(step);
                published.filter |= matches!(step, Op::SetFilter(..));
            }
            published.steps += steps.len();
            if is_last {
                break;
            }
        }
        self.observed = Some(observed);
        if published.steps > 0 {
            info!(steps = published.steps, "published: {}", self.summary());
        }
        Ok(published)
    }

    /// Numbers of services and backends, for people.
    pub(super) fn summary(&self) -> String {
        let services: BTreeSet<&ObjectName> = self.desired.frontends.values().map(|pool| &pool.service).collect();
        format!("{}, {}", count(services.len(), "service"), count(self.desired.backends.len(), "backend"))
    }
}

/// "1 service", "2 services".
pub(super) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
