//! The sweep, on a thread of its own: to read the tables of a large cluster takes longer than a change may wait.

use std::{
    collections::BTreeSet,
    io, mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
};

use tracing::error;

use crate::{metrics::Vitals, sweep::Sweeper};

/// A sweeper at work. It ends when this is dropped.
pub(super) struct Sweeping {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    evicted: Arc<Evicted>,
}

/// The names of services whose pins were evicted since somebody asked.
#[derive(Default)]
struct Evicted(Mutex<BTreeSet<String>>);

impl Evicted {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sweeping {
    /// Lets `sweeper` begin; `vitals` has what each pass found.
    ///
    /// # Errors
    /// The system's answer where there is no thread to be had.
    pub(super) fn start(sweeper: Sweeper, vitals: Arc<Vitals>) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let evicted = Arc::new(Evicted::default());
        let shared = Arc::clone(&evicted);
        let thread = thread::Builder::new()
            .name("sweep".to_owned())
            .spawn(move || follow(sweeper, &stopped, &vitals, &shared))?;
        Ok(Self { stop: Some(stop), thread: Some(thread), evicted })
    }

    /// The names, `namespace/name`, of services whose pins were evicted since the last call.
    pub(super) fn take_evicted(&self) -> BTreeSet<String> {
        mem::take(&mut self.evicted.lock())
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

fn follow(mut sweeper: Sweeper, stopped: &Receiver<()>, vitals: &Vitals, evicted: &Evicted) {
    loop {
        let passes = sweeper.totals().passes;
        let pause = sweeper.step();
        if sweeper.totals().passes != passes {
            vitals.swept(sweeper.totals(), sweeper.census().clone());
            evicted.lock().extend(sweeper.take_evicted());
        }
        if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}
