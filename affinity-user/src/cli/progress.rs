//! Progress of work that takes more than a second: on standard error, and only if that is a terminal.

use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};

/// Nothing is shown before this much time has passed.
const PATIENCE: Duration = Duration::from_secs(1);

/// The number of entries between two checks of the clock.
const STRIDE: u64 = 4096;

/// Counts entries. indicatif itself shows nothing without a terminal.
pub(crate) struct Progress {
    what: &'static str,
    started: Instant,
    done: u64,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// `what` is the activity, such as "reading sessions".
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, started: Instant::now(), done: 0, bar: None }
    }

    /// Counts one more entry.
    pub(crate) fn step(&mut self) {
        self.done += 1;
        if self.done.is_multiple_of(STRIDE) && self.started.elapsed() > PATIENCE {
            let what = self.what;
            let bar =
                self.bar.get_or_insert_with(|| ProgressBar::new_spinner().with_style(ProgressStyle::default_spinner()));
            bar.set_message(format!("{what}: {} in {:.0?}", HumanCount(self.done), self.started.elapsed()));
            bar.tick();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
