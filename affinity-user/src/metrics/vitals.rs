//! Facts that only the running agent knows: written by its loop, read by the HTTP server.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use prometheus_client::metrics::histogram::Histogram;

use crate::{
    sweep::{Census, Totals},
    sys::monotonic_ns,
};

/// A loop that has not run for this long is stuck.
pub const STUCK_AFTER: Duration = Duration::from_secs(10);

/// A snapshot that has waited this long to be published makes the node unfit for traffic: kube-proxy's bound, twice its default
/// sync period.
const LATE_AFTER: Duration = Duration::from_mins(1);

/// Upper bounds of the buckets of a sync's duration, seconds.
const SYNC_BUCKETS_S: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// What the sweep did, and what its last whole pass found; none before the first one.
type Swept = (Totals, Option<Census>);

/// The agent's health, and its counts.
#[derive(Debug)]
pub struct Vitals {
    /// When the agent was started.
    pub started: SystemTime,
    /// When the loop last ran, monotonic nanoseconds; 0: it has not begun.
    ticked_ns: AtomicU64,
    is_published: AtomicBool,
    /// When the oldest unpublished snapshot arrived, monotonic nanoseconds; 0: none waits.
    pending_ns: AtomicU64,
    /// Monotonic nanoseconds of the last publication; 0: none yet.
    published_ns: AtomicU64,
    is_node_leaving: AtomicBool,
    /// Devices that are attached.
    devices: AtomicU64,
    /// What part of the dataplane was removed or replaced and cannot be repaired, in one line.
    damage: Mutex<Option<String>>,
    /// Seconds from a snapshot's arrival until it is published.
    pub sync: Histogram,
    steps: AtomicU64,
    failures: AtomicU64,
    swept: Mutex<Swept>,
}

impl Default for Vitals {
    fn default() -> Self {
        Self {
            started: SystemTime::now(),
            ticked_ns: AtomicU64::new(0),
            is_published: AtomicBool::new(false),
            pending_ns: AtomicU64::new(0),
            published_ns: AtomicU64::new(0),
            is_node_leaving: AtomicBool::new(false),
            devices: AtomicU64::new(0),
            damage: Mutex::default(),
            sync: Histogram::new(SYNC_BUCKETS_S),
            steps: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            swept: Mutex::default(),
        }
    }
}

impl Vitals {
    /// Records that the loop runs.
    pub fn tick(&self) {
        self.ticked_ns.store(monotonic_ns(), Relaxed);
    }

    /// A snapshot was published, in this many steps.
    pub fn published(&self, steps: usize) {
        self.is_published.store(true, Relaxed);
        self.pending_ns.store(0, Relaxed);
        self.published_ns.store(monotonic_ns(), Relaxed);
        self.steps.fetch_add(steps as u64, Relaxed);
    }

    /// A snapshot has arrived that will be published.
    pub fn pending(&self, now_ns: u64) {
        // A snapshot that waits already counts from its own arrival.
        let _ = self.pending_ns.compare_exchange(0, now_ns.max(1), Relaxed, Relaxed);
    }

    /// Sets whether the node is about to be removed.
    pub fn node_is_leaving(&self, is_leaving: bool) {
        self.is_node_leaving.store(is_leaving, Relaxed);
    }

    /// Whether the node may get new traffic: false while it is about to be removed.
    pub fn is_node_eligible(&self) -> bool {
        !self.is_node_leaving.load(Relaxed)
    }

    /// When something was last published, monotonic nanoseconds; none if nothing was.
    pub fn published_ns(&self) -> Option<u64> {
        Some(self.published_ns.load(Relaxed)).filter(|published_ns| *published_ns != 0)
    }

    /// Whether the last snapshot of the source is in effect, or soon will be. True before the first one.
    ///
    /// # Errors
    /// What is wrong, in one line.
    pub fn is_in_step(&self, now_ns: u64) -> Result<(), String> {
        self.is_healthy(now_ns)?;
        let pending_ns = self.pending_ns.load(Relaxed);
        let since = Duration::from_nanos(now_ns.saturating_sub(pending_ns));
        if pending_ns == 0 || since < LATE_AFTER {
            return Ok(());
        }
        Err(format!("a change of the source is not published after {} s", since.as_secs()))
    }

    /// A step has failed.
    pub fn failed(&self) {
        self.failures.fetch_add(1, Relaxed);
    }

    /// This many devices are attached now.
    pub fn attached(&self, devices: usize) {
        self.devices.store(devices as u64, Relaxed);
    }

    /// Sets the current damage of the dataplane. Returns whether it has changed.
    pub fn damaged(&self, damage: Option<String>) -> bool {
        let mut known = self.damage.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = *known != damage;
        *known = damage;
        is_news
    }

    fn is_whole(&self) -> Result<(), String> {
        self.damage.lock().unwrap_or_else(PoisonError::into_inner).clone().map_or(Ok(()), Err)
    }

    /// The sweep has ended a pass.
    pub fn swept(&self, totals: Totals, census: Census) {
        *self.lock() = (totals, Some(census));
    }

    /// Steps taken to publish.
    pub fn steps(&self) -> u64 {
        self.steps.load(Relaxed)
    }

    /// Attempts to publish that failed.
    pub fn failures(&self) -> u64 {
        self.failures.load(Relaxed)
    }

    /// What the sweep did, and what its last whole pass found; none before the first one.
    pub fn sweep(&self) -> (Totals, Option<Census>) {
        self.lock().clone()
    }

    /// Whether the loop is alive at this time, and the dataplane whole. The loop counts as alive before it has begun.
    ///
    /// # Errors
    /// What is wrong, in one line.
    pub fn is_healthy(&self, now_ns: u64) -> Result<(), String> {
        let ticked_ns = self.ticked_ns.load(Relaxed);
        let since = Duration::from_nanos(now_ns.saturating_sub(ticked_ns));
        if ticked_ns == 0 || since < STUCK_AFTER {
            return self.is_whole();
        }
        Err(format!("the agent's main loop has not run for {} s", since.as_secs()))
    }

    /// Whether packets are handled as the source says.
    ///
    /// # Errors
    /// What is missing, in one line.
    pub fn is_ready(&self) -> Result<(), String> {
        if !self.is_published.load(Relaxed) {
            return Err("nothing is published yet: the source has not answered, or publishing fails".to_owned());
        }
        if self.devices.load(Relaxed) == 0 {
            return Err("no device is attached".to_owned());
        }
        self.is_whole()
    }

    fn lock(&self) -> MutexGuard<'_, Swept> {
        self.swept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stuck_loop_is_not_healthy() {
        let vitals = Vitals::default();
        let later = |seconds: u64| monotonic_ns() + seconds * 1_000_000_000;
        assert_eq!(vitals.is_healthy(later(100)), Ok(()), "it has not begun");
        vitals.tick();
        assert_eq!(vitals.is_healthy(later(1)), Ok(()));
        assert_eq!(vitals.is_healthy(later(20)), Err("the agent's main loop has not run for 20 s".to_owned()));
    }

    #[test]
    fn a_damaged_dataplane_is_neither_healthy_nor_ready() {
        let vitals = Vitals::default();
        vitals.attached(1);
        vitals.published(1);
        vitals.tick();
        assert!(vitals.damaged(Some("eth0: taken off".to_owned())), "news");
        assert!(!vitals.damaged(Some("eth0: taken off".to_owned())), "the same again");
        assert_eq!(vitals.is_healthy(monotonic_ns()), Err("eth0: taken off".to_owned()));
        assert_eq!(vitals.is_ready(), Err("eth0: taken off".to_owned()));
        assert!(vitals.damaged(None));
        assert_eq!((vitals.is_healthy(monotonic_ns()), vitals.is_ready()), (Ok(()), Ok(())));
    }

    #[test]
    fn a_snapshot_that_is_not_published_in_time_puts_the_node_out_of_step() {
        let vitals = Vitals::default();
        let (now_ns, second_ns) = (monotonic_ns(), 1_000_000_000);
        let at = |seconds: u64| now_ns + seconds * second_ns;
        assert_eq!(vitals.is_in_step(at(1_000)), Ok(()), "nothing has come");
        vitals.pending(at(0));
        vitals.pending(at(50));
        assert_eq!(vitals.is_in_step(at(59)), Ok(()));
        assert_eq!(vitals.is_in_step(at(61)), Err("a change of the source is not published after 61 s".to_owned()));
        vitals.published(1);
        assert_eq!(vitals.is_in_step(at(1_000)), Ok(()));
        vitals.tick();
        assert!(vitals.is_in_step(at(1_000)).unwrap_err().contains("loop"));
    }

    #[test]
    fn ready_is_published_and_attached() {
        let vitals = Vitals::default();
        vitals.attached(1);
        assert!(vitals.is_ready().unwrap_err().contains("published"));
        vitals.published(3);
        assert_eq!(vitals.is_ready(), Ok(()));
        vitals.attached(0);
        assert_eq!(vitals.is_ready(), Err("no device is attached".to_owned()));
    }
}
