//! The sweep, on a thread of its own: to read the tables of a large cluster takes longer than a change may wait.

use std::{
    collections::{BTreeMap, BTreeSet},
    io, mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tracing::error;

use crate::{
    linger::Traffic,
    metrics::Vitals,
    sweep::{LOOK_EVERY, Met, Sweeper},
};

/// A sweeper at work. It ends when this is dropped.
pub(super) struct Sweeping {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    findings: Arc<Shared>,
}

/// The findings of the sweep since the last call.
#[derive(Default)]
pub(super) struct Findings {
    /// The names, `namespace/name`, of services whose pins were evicted.
    pub(super) evicted: BTreeSet<String>,
    /// Which services, pools and groups the last pass has met; none where no pass has ended.
    pub(super) met: Option<Met>,
    /// The names of services whose clients all looked like nodes in the last pass; none where no pass has ended.
    pub(super) clients_are_nodes: Option<BTreeSet<String>>,
}

#[derive(Default)]
struct Shared {
    findings: Mutex<Findings>,
    /// What was last seen of the connections of backends that linger.
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
    /// Lets `sweeper` begin; `vitals` has what each pass found.
    ///
    /// # Errors
    /// The system's answer where there is no thread to be had.
    pub(super) fn start(sweeper: Sweeper, vitals: Arc<Vitals>) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let findings = Arc::new(Shared::default());
        let shared = Arc::clone(&findings);
        let thread = thread::Builder::new()
            .name("sweep".to_owned())
            .spawn(move || follow(sweeper, &stopped, &vitals, &shared))?;
        Ok(Self { stop: Some(stop), thread: Some(thread), findings })
    }

    /// What was found since the last call.
    pub(super) fn take_findings(&self) -> Findings {
        mem::take(&mut self.findings.lock())
    }

    /// What was last seen of the connections of backends that linger.
    pub(super) fn traffic(&self) -> BTreeMap<u32, Traffic> {
        self.findings.traffic().clone()
    }

    /// Whether the thread is gone, which only a bug does.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Sweeping {
    /// Ends it, after the slice that it is at.
    fn drop(&mut self) {
        self.stop = None;
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            error!("the sweep has panicked");
        }
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

/// Waits before the next slice, and meanwhile looks after backends that linger. False where the sweep is to end.
fn rest(sweeper: &mut Sweeper, stopped: &Receiver<()>, pause: Duration, findings: &Shared) -> bool {
    let until = Instant::now() + pause;
    // Where a pass is wanted, the rest is as long as the last one took: see `REST_FACTOR`.
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
