//! A store in which chosen steps fail: the state after a failure must be a valid start for the next plan.

use std::{collections::BTreeSet, io};

use super::{Capacity, Observed, Op, Store, StoreError};

/// Passes steps to another store, except the chosen ones, which fail.
#[derive(Debug, Clone)]
pub struct FaultyStore<S> {
    /// The store behind it.
    pub inner: S,
    failing: BTreeSet<usize>,
    applied: usize,
}

impl<S: Store> FaultyStore<S> {
    /// Fails the steps with these numbers, counted from 0 over the lifetime of the store.
    #[must_use]
    pub fn new(inner: S, failing: impl IntoIterator<Item = usize>) -> Self {
        Self { inner, failing: failing.into_iter().collect(), applied: 0 }
    }
}

impl<S: Store> Store for FaultyStore<S> {
    fn apply(&mut self, op: &Op) -> Result<(), StoreError> {
        let number = self.applied;
        self.applied += 1;
        if self.failing.contains(&number) {
            let source = io::Error::new(io::ErrorKind::StorageFull, "chosen to fail");
            return Err(StoreError { map: "faulty", action: format!("step {number}, {op:?}"), source });
        }
        self.inner.apply(op)
    }

    fn observe(&self) -> Result<Observed, StoreError> {
        self.inner.observe()
    }

    fn capacity(&self) -> Capacity {
        self.inner.capacity()
    }
}
