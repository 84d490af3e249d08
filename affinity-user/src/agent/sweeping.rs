//! The sweep, on its own thread: reading the tables of a large cluster takes longer than a change may wait.

use std::{
    collections::{BTreeMap, BTreeSet},
    io, mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use crate::{
    linger::Traffic,
    metrics::Vitals,
    sweep::{LOOK_EVERY, Met, Sweeper},
    threads::Worker,
};

/// A running sweeper. Its thread ends when this is dropped, after its current slice.
pub(super) struct Sweeping {
    worker: Worker<()>,
    findings: Arc<Shared>,
}

/// The findings of the sweep since the last call.
#[derive(Default)]
pub(super) struct Findings {
    /// Services with evicted pins, as `namespace/name`.
    pub(super) evicted: BTreeSet<String>,
    /// Which services, pools and groups the last pass met; none if no pass has ended.
    pub(super) met: Option<Met>,
    /// The names of services with clients that all looked like nodes in the last pass; none if no pass has ended.
    pub(super) clients_are_nodes: Option<BTreeSet<String>>,
}

#[derive(Default)]
struct Shared {
    findings: Mutex<Findings>,
    /// The last observed traffic of lingering backends.
    traffic: Mutex<BTreeMap<u32, Traffic>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Findings> {
        self.findings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn traffic(&self) -> MutexGuard<'_, BTreeMap<u32, Traffic>> {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sweeping {
    /// Starts `sweeper` on its own thread. `vitals` gets the results of each pass.
    ///
    /// # Errors
    /// The system's error if no thread can be started.
    pub(super) fn start(sweeper: Sweeper, vitals: Arc<Vitals>) -> io::Result<Self> {
        let findings = Arc::new(Shared::default());
        let shared = Arc::clone(&findings);
        let worker = Worker::start("sweep", move |stopped| follow(sweeper, stopped, &vitals, &shared))?;
        Ok(Self { worker, findings })
    }

    /// What was found since the last call.
    pub(super) fn take_findings(&self) -> Findings {
        mem::take(&mut self.findings.lock())
    }

    /// The last observed traffic of lingering backends.
    pub(super) fn traffic(&self) -> BTreeMap<u32, Traffic> {
        self.findings.traffic().clone()
    }

    /// Whether the thread has ended: only a bug causes that.
    pub(super) fn has_ended(&self) -> bool {
        self.worker.has_ended()
    }
}

fn follow(mut sweeper: Sweeper, stopped: &Receiver<()>, vitals: &Vitals, findings: &Shared) {
    loop {
        let passes = sweeper.totals().passes;
        let pause = sweeper.step();
        if sweeper.totals().passes != passes {
            vitals.swept(sweeper.totals(), sweeper.census().clone());
            let mut findings = findings.lock();
            findings.evicted.extend(sweeper.take_evicted());
            findings.met = Some(sweeper.met().clone());
            findings.clients_are_nodes = Some(sweeper.clients_are_nodes().into_iter().collect());
        }
        if !rest(&mut sweeper, stopped, pause, findings) {
            return;
        }
    }
}

/// Waits before the next slice, and checks lingering backends meanwhile. False if the sweep should end.
fn rest(sweeper: &mut Sweeper, stopped: &Receiver<()>, pause: Duration, findings: &Shared) -> bool {
    let until = Instant::now() + pause;
    // If a pass is wanted, a quarter of the rest: about as long as the last pass took, see `REST_FACTOR`.
    let soon = Instant::now() + pause / 4;
    loop {
        sweeper.look();
        findings.traffic().clone_from(sweeper.traffic());
        let end = if sweeper.is_behind() { soon } else { until };
        let left = end.saturating_duration_since(Instant::now());
        if stopped.recv_timeout(left.min(LOOK_EVERY)) != Err(RecvTimeoutError::Timeout) {
            return false;
        }
        if left <= LOOK_EVERY {
            return true;
        }
    }
}
