//! A task as a sequence of named steps, with a table of their durations at the end.

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

/// The steps done so far, in order.
#[derive(Default)]
pub(crate) struct Steps {
    done: Vec<Step>,
}

struct Step {
    name: String,
    took: Duration,
    result: &'static str,
}

/// The result of a step that did not fail.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// It ran.
    Done,
    /// It could not run here, and why: this is no success, and shown as such.
    NotRun(String),
}

impl Steps {
    /// Runs a task and prints its table, even if it fails.
    pub(crate) fn report(task: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let mut steps = Self::default();
        let result = task(&mut steps);
        print!("\n{steps}");
        result
    }

    /// Runs one step under a heading.
    pub(crate) fn step(&mut self, name: impl Into<String>, action: impl FnOnce() -> Result<()>) -> Result<()> {
        self.optional_step(name, || action().map(|()| Outcome::Done))
    }

    /// The same for a step that may need something that this machine cannot get.
    pub(crate) fn optional_step(
        &mut self,
        name: impl Into<String>,
        action: impl FnOnce() -> Result<Outcome>,
    ) -> Result<()> {
        let name = name.into();
        println!("\n== {name}");
        let start = Instant::now();
        let outcome = action();
        let result = match &outcome {
            Ok(Outcome::Done) => "ok",
            Ok(Outcome::NotRun(why)) => {
                println!("NOT RUN: {name}: {why}");
                "NOT RUN"
            }
            Err(_) => "FAILED",
        };
        self.done.push(Step { name: name.clone(), took: start.elapsed(), result });
        outcome.map(drop).with_context(|| format!("step \"{name}\""))
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.done.iter().map(|step| step.name.len()).max().unwrap_or(0);
        writeln!(f, "{:width$}  {:>9}  result", "step", "time")?;
        for Step { name, took, result } in &self.done {
            writeln!(f, "{name:width$}  {:>7.1} s  {result}", took.as_secs_f64())?;
        }
        let total: Duration = self.done.iter().map(|step| step.took).sum();
        writeln!(f, "{:width$}  {:>7.1} s", "total", total.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_step_that_was_not_run_is_in_the_table() {
        let mut steps = Steps::default();
        steps.optional_step("guest", || Ok(Outcome::NotRun("no QEMU".to_owned()))).expect("it is no failure");
        let table = steps.to_string();
        assert_eq!(table.lines().nth(1), Some("guest      0.0 s  NOT RUN"));
    }

    #[test]
    fn a_failed_step_is_in_the_table_and_in_the_error() {
        let mut steps = Steps::default();
        steps.step("first", || Ok(())).expect("it succeeds");
        let error = steps.step("second one", || bail!("no luck")).expect_err("it fails");

        assert_eq!(format!("{error:#}"), "step \"second one\": no luck");
        let table = steps.to_string();
        let lines: Vec<_> = table.lines().map(str::trim_end).collect();
        assert_eq!(lines[0], "step             time  result");
        assert_eq!(lines[1], "first           0.0 s  ok");
        assert_eq!(lines[2], "second one      0.0 s  FAILED");
        assert_eq!(lines.len(), 4);
    }
}
