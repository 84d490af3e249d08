//! Logs each problem once when it appears, and once when it has gone.

use std::collections::BTreeSet;

use tracing::{error, info, warn};

use crate::source::{Problem, Severity};

/// The current problems.
#[derive(Debug, Default)]
pub(super) struct Problems {
    current: BTreeSet<Problem>,
}

impl Problems {
    /// Replaces the current problems, and logs what has changed.
    pub(super) fn update<'a>(&mut self, problems: impl IntoIterator<Item = &'a Problem>) {
        let now: BTreeSet<_> = problems.into_iter().collect();
        let new: Vec<Problem> =
            now.iter().filter(|problem| !self.current.contains(**problem)).map(|p| (*p).clone()).collect();
        for problem in &new {
            match problem.severity {
                Severity::Error => error!("{problem}"),
                Severity::Warning => warn!("{problem}"),
                Severity::Info => info!("{problem}"),
            }
        }
        self.current.retain(|problem| {
            let holds = now.contains(problem);
            if !holds {
                info!("no longer: {problem}");
            }
            holds
        });
        self.current.extend(new);
    }
}
