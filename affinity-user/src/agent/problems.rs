//! Problems on the log: each once when it appears, and once when it has gone.

use std::collections::BTreeSet;

use tracing::{error, info, warn};

use crate::source::{Problem, Severity};

/// What is wrong at the moment.
#[derive(Debug, Default)]
pub(super) struct Problems {
    current: BTreeSet<Problem>,
}

impl Problems {
    /// Takes note of all that is wrong now, and logs what has changed.
    pub(super) fn update(&mut self, problems: impl IntoIterator<Item = Problem>) {
        let now: BTreeSet<_> = problems.into_iter().collect();
        for problem in now.difference(&self.current) {
            match problem.severity {
                Severity::Error => error!("{problem}"),
                Severity::Warning => warn!("{problem}"),
                Severity::Info => info!("{problem}"),
            }
        }
        for problem in self.current.difference(&now) {
            info!("no longer: {problem}");
        }
        self.current = now;
    }
}
