//! `cargo xtask test`: checks and tests, from the cheapest to the most powerful.

use std::{
    collections::BTreeSet,
    env, fs,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::{
    check, fuzz,
    qemu::{self, Release, Selection},
    run::{cargo, is_root, root, run as run_command},
    setup,
    steps::{Outcome, Steps},
};

/// How long the fuzz target runs.
const FUZZ: Duration = Duration::from_secs(60);

/// Runs every check and test in the order of their cost.
pub(crate) fn run(steps: &mut Steps) -> Result<()> {
    check::run(steps)?;
    steps.step("unit and property tests", || {
        run_command(
            cargo(["test", "--workspace"]).args(["--exclude", "affinity-ebpf"]).args(["--exclude", "affinity-tests"]),
        )
    })?;
    steps.step("deploy, rendered", rendered)?;
    kernel_tests(steps, &[], &[])?;
    steps.step("metrics, by promtool", promtool)?;
    steps.optional_step("kernel tests on Debian 12's kernel, in brief", || {
        // Something missing here is not the commit's fault; a failure in a guest is.
        match qemu::Laboratory::open().and_then(|laboratory| Ok((laboratory.kernel(Release::Bookworm)?, laboratory))) {
            Ok((kernel, laboratory)) => laboratory.test(&[kernel], &Selection::Brief).map(|()| Outcome::Done),
            Err(why) => Ok(Outcome::NotRun(format!("{why:#}"))),
        }
    })?;
    steps.step("fuzz", || fuzz::run(FUZZ))
}

/// Renders `deploy/` with kubectl and helm. Nothing else needs these tools, so a missing one is reported, but is no failure.
fn rendered() -> Result<()> {
    for tool in ["kubectl", "helm"] {
        if setup::find_command(tool) {
            let tests = ["test", "--package", "affinity-tests", "--test", "deploy", "--", "--ignored", tool];
            run_command(&mut cargo(tests))?;
        } else {
            println!("NOT RUN: the checks of deploy/ with {tool}, because it is not installed");
        }
    }
    Ok(())
}

/// Repeats [`kernel_tests`] until the time is over; runs them at least once.
pub(crate) fn kernel_tests_for(time: Duration, steps: &mut Steps, only: &[String], arguments: &[String]) -> Result<()> {
    let end = Instant::now() + time;
    loop {
        kernel_tests(steps, only, arguments)?;
        if Instant::now() >= end {
            return Ok(());
        }
    }
}

/// The tests that create namespaces, load programs and send packets. They share the machine's kernel, so only two run at a
/// time, of one binary. All of them run, so that one run shows all failures.
///
/// # Arguments
/// `only` names the suites to run; empty: all. Their programs get `arguments`.
pub(crate) fn kernel_tests(steps: &mut Steps, only: &[String], arguments: &[String]) -> Result<()> {
    ensure!(is_root()?, "the kernel tests create network namespaces and load programs: run as root");
    let all = suites()?;
    let unknown: Vec<_> = only.iter().filter(|name| !all.contains(*name)).map(String::as_str).collect();
    ensure!(unknown.is_empty(), "there is no suite {} in tests/tests", unknown.join(", "));
    steps.step("kernel tests, built", || {
        run_command(&mut cargo(["build", "--package", "affinity-user", "--bin", "affinity"]))?;
        run_command(&mut cargo(["test", "--package", "affinity-tests", "--no-run"]))
    })?;
    let mut failed = Vec::new();
    for suite in all.into_iter().filter(|suite| only.is_empty() || only.contains(suite)) {
        // A separate step for each: the table at the end shows its duration.
        let name = format!("kernel tests, {suite}");
        let mut command = cargo(["test", "--package", "affinity-tests"]);
        match suite.as_str() {
            LIBRARY => command.args(["--lib", "--bins"]),
            suite => command.args(["--test", suite]),
        };
        command.args(["--", "--test-threads=2"]).args(arguments);
        if let Err(error) = steps.step(name, || run_command(&mut command)) {
            eprintln!("{error:#}");
            failed.push(suite);
        }
    }
    ensure!(failed.is_empty(), "kernel tests failed: {}", failed.join(", "));
    Ok(())
}

/// The unit tests of the lab itself.
pub(crate) const LIBRARY: &str = "lib";

/// The names of all test binaries of the lab, as cargo finds them: files and directories in `tests`.
fn suites() -> Result<BTreeSet<String>> {
    let mut suites = BTreeSet::from([LIBRARY.to_owned()]);
    for entry in fs::read_dir(root().join("tests/tests"))? {
        let path = entry?.path();
        let is_suite = path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file();
        if let Some(name) = path.file_stem().filter(|_| is_suite) {
            suites.insert(name.to_string_lossy().into_owned());
        }
    }
    Ok(suites)
}

/// Whether Prometheus' own tool accepts the metrics of a real agent.
fn promtool() -> Result<()> {
    let Some(tools) = setup::promtool()? else {
        println!("NOT RUN: the check of metrics with promtool, because it is not installed");
        return Ok(());
    };
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([tools].into_iter().chain(env::split_paths(&path)))?;
    let tests = ["test", "--package", "affinity-tests", "--test", "metrics", "--", "--ignored", "promtool"];
    run_command(cargo(tests).env("PATH", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_are_files_and_directories() {
        let suites = suites().expect("the tests are in the repository");
        for suite in [LIBRARY, "lab", "fixtures", "differential", "bench"] {
            assert!(suites.contains(suite), "{suite} is not among {suites:?}");
        }
    }
}
