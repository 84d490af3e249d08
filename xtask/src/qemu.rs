//! `cargo xtask test --kernel`: the kernel tests in guests that run Debian's kernels.
//!
//! A guest has this machine's files and runs the test binaries of this target directory as they are. Nothing is downloaded
//! but packages of Debian, by this machine's mirror, and nothing is installed but QEMU.

mod guest;
mod image;
mod nic;
mod outcome;
mod packages;

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use self::{
    guest::{Accelerator, Guest, Job, Qemu, Report},
    image::Kernel,
    nic::Cable,
    outcome::Row,
    packages::Mirror,
};
pub(crate) use self::{image::Release, nic::Model};
use crate::{
    run::{cargo, command, is_root, output, root, target_dir},
    setup,
};

/// Tests that show in a few minutes of emulation whether a kernel can be used: all programs load, each hook carries a
/// connection, and the stories of the lab that most of the product stands on.
const BRIEF: [(&str, &[&str]); 2] = [("hooks", &[]), ("lab", &BRIEF_STORIES)];

const BRIEF_STORIES: [&str; 2] =
    ["a_service_without_endpoints_refuses_at_once", "a_flow_whose_backend_has_gone_is_not_left_hanging"];

/// How long the brief tests may take.
const BRIEF_LIMIT: Duration = Duration::from_secs(30 * 60);

/// Which tests a guest is to run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Selection {
    /// Every kernel test, and the demonstration.
    Whole,
    /// [`BRIEF`].
    Brief,
    /// Those of one binary whose names have one of these.
    Some(String, Vec<String>),
}

/// What guests need, once it is here.
pub(crate) struct Laboratory {
    qemu: Qemu,
    mirror: Mirror,
}

impl Laboratory {
    /// Gets what guests need: QEMU, a mirror, and busybox.
    ///
    /// # Errors
    /// What is missing here, and why it cannot be had.
    pub(crate) fn open() -> Result<Self> {
        ensure!(cfg!(target_arch = "x86_64"), "guests are x86-64 machines, and this machine is another");
        ensure!(is_root()?, "guests share this machine's files: run as root");
        setup::run(setup::Purpose::Emulate)?;
        let mirror = Mirror::of_this_machine()?;
        let dir = target_dir()?.join("qemu");
        fs::create_dir_all(&dir)?;
        guest::remove_stale_results(&dir)?;
        let busybox = image::busybox(&dir, &mirror)?;
        let qemu = Qemu { program: "qemu-system-x86_64".into(), prefix: None, dir, busybox };
        Ok(Self { qemu, mirror })
    }

    /// The kernel of a release.
    ///
    /// # Errors
    /// When its package cannot be had.
    pub(crate) fn kernel(&self, release: Release) -> Result<Kernel> {
        Kernel::prepare(release, &self.qemu.dir, &self.mirror, &self.qemu.busybox)
    }

    /// Runs the tests on each of these kernels, and prints the table of what came of it.
    ///
    /// # Errors
    /// When a guest does not get to its end, or a test fails.
    pub(crate) fn test(&self, kernels: &[Kernel], selection: &Selection) -> Result<()> {
        // What is built now, whatever happens to the tree meanwhile.
        let commit = commit()?;
        let jobs = jobs(selection)?;
        let mut rows = Vec::new();
        let mut failures = Vec::new();
        for kernel in kernels {
            let title = format!("{} ({})", kernel.version, kernel.release.title());
            let report = test_kernel(self, kernel, selection, &jobs)?;
            let failed = report.ended.iter().filter(|job| job.status != Some(0));
            failures.extend(failed.map(|job| format!("{title}: {}", job.name)));
            if let Some(failure) = &report.failure {
                println!("{failure:#}");
                failures.push(format!("{title}: the guest failed"));
            }
            rows.push(Row::new(title, &report));
        }
        if rows.iter().any(Row::has_hooks) {
            println!("\n{}", outcome::table(&rows, today()?.trim(), &commit));
        }
        ensure!(failures.is_empty(), "failed in guests:\n    {}", failures.join("\n    "));
        Ok(())
    }
}

/// Runs the tests on each of these kernels, and prints the table of what came of it.
///
/// # Errors
/// When a kernel cannot be had, a guest does not get to its end, or a test fails.
pub(crate) fn test_kernels(releases: &[Release], selection: &Selection) -> Result<()> {
    let laboratory = Laboratory::open()?;
    let kernels = releases.iter().map(|release| laboratory.kernel(*release)).collect::<Result<Vec<_>>>()?;
    laboratory.test(&kernels, selection)
}

fn test_kernel(laboratory: &Laboratory, kernel: &Kernel, selection: &Selection, jobs: &[Job]) -> Result<Report> {
    let accelerator = Accelerator::probe(&laboratory.qemu, kernel)?;
    let names: Vec<_> = jobs.iter().map(|job| job.name.as_str()).collect();
    println!("\nqemu: Linux {} by {}: {}", kernel.version, accelerator.title(), names.join(", "));
    let mut guest = Guest::new(&laboratory.qemu, kernel);
    guest.accelerator = accelerator;
    guest.environment = vec![("AFFINITY_TEST_PATIENCE".to_owned(), accelerator.patience().to_string())];
    if *selection == Selection::Brief {
        guest.limit = BRIEF_LIMIT;
    }
    guest.run(jobs)
}

/// Runs the tests of network cards on cards of this model.
///
/// # Errors
/// As [`test_kernels`].
pub(crate) fn test_cards(model: Model, release: Release) -> Result<()> {
    let Laboratory { qemu, mirror } = Laboratory::open()?;
    let qemu = nic::qemu_with(qemu, model, &mirror)?;
    let kernel = Kernel::prepare(release, &qemu.dir, &mirror, &qemu.busybox)?;
    let accelerator = Accelerator::probe(&qemu, &kernel)?;
    let mut jobs = jobs(&Selection::Some("nic".to_owned(), Vec::new()))?;
    // They need the cards, so ordinary runs do not have them; and the cards are there once.
    jobs.iter_mut()
        .for_each(|job| job.words.splice(1.., ["--ignored", "--test-threads=1"].map(str::to_owned)).for_each(drop));
    let mut failed = Vec::new();
    for (variant, device) in model.variants() {
        println!("\nqemu: Linux {} by {} with cards: {variant}", kernel.version, accelerator.title());
        let cable = Cable::lay()?;
        let patience = accelerator.patience().to_string();
        let variables = [("AFFINITY_TEST_PATIENCE", patience.as_str()), ("AFFINITY_TEST_NIC", variant)];
        let guest = Guest {
            accelerator,
            environment: variables.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
            devices: Cable::arguments(device),
            namespace: Some(cable.namespace.clone()),
            ..Guest::new(&qemu, &kernel)
        };
        let report = guest.run(&jobs)?;
        if let Some(failure) = &report.failure {
            println!("{failure:#}");
        }
        if !report.is_success() {
            failed.push(*variant);
        }
    }
    ensure!(failed.is_empty(), "failed with cards: {}", failed.join(", "));
    Ok(())
}

/// Builds the programs of a selection, and says how to run them.
fn jobs(selection: &Selection) -> Result<Vec<Job>> {
    crate::run::run(&mut cargo(["build", "--package", "affinity-user", "--bin", "affinity"]))?;
    let binaries = test_binaries()?;
    let find = |name: &str| {
        let binary = binaries.iter().find(|(binary, _)| binary == name).map(|(_, path)| path);
        binary.with_context(|| format!("affinity-tests has no test binary `{name}`"))
    };
    Ok(match selection {
        Selection::Whole => {
            let tests = binaries.iter().filter(|(name, _)| name != "nic");
            let mut jobs: Vec<_> = tests.map(|(name, path)| job(name, path, &[])).collect();
            // What shows fastest whether anything can work comes first.
            jobs.sort_by_key(|job| job.name != "hooks");
            crate::run::run(&mut cargo(["build", "--package", "affinity-tests", "--bin", "demo"]))?;
            let demo = target_dir()?.join("debug/demo").display().to_string();
            jobs.push(Job { name: "demo".to_owned(), directory: root(), words: vec![demo] });
            jobs
        }
        Selection::Brief => {
            BRIEF.iter().map(|(name, filter)| Ok(job(name, find(name)?, filter))).collect::<Result<_>>()?
        }
        Selection::Some(name, filter) => {
            let filter: Vec<_> = filter.iter().map(String::as_str).collect();
            vec![job(name, find(name)?, &filter)]
        }
    })
}

/// Two tests at a time, as on this machine.
fn job(name: &str, path: &str, filter: &[&str]) -> Job {
    let words = [path, "--test-threads=2"].into_iter().chain(filter.iter().copied()).map(str::to_owned);
    Job { name: name.to_owned(), directory: root().join("tests"), words: words.collect() }
}

/// Builds the tests of affinity-tests, and returns their names and paths, in the order of the names.
fn test_binaries() -> Result<Vec<(String, String)>> {
    let mut build =
        cargo(["test", "--package", "affinity-tests", "--no-run", "--message-format=json-render-diagnostics"]);
    build.stderr(std::process::Stdio::inherit());
    let messages = output(&mut build)?;
    let mut binaries = parse_artifacts(&messages)?;
    binaries.sort();
    ensure!(!binaries.is_empty(), "affinity-tests has no tests");
    Ok(binaries)
}

/// The test programs among the messages of cargo.
fn parse_artifacts(messages: &str) -> Result<Vec<(String, String)>> {
    let mut binaries = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line).context("a message of cargo")?;
        let is_test = message["reason"] == "compiler-artifact" && message["profile"]["test"] == true;
        if let (true, Some(name), Some(path)) =
            (is_test, message["target"]["name"].as_str(), message["executable"].as_str())
        {
            binaries.push((name.to_owned(), path.to_owned()));
        }
    }
    Ok(binaries)
}

fn today() -> Result<String> {
    output(command("date").arg("+%F"))
}

/// The commit that is tested, with a mark where the tree differs from it.
fn commit() -> Result<String> {
    let git = |arguments: &[&str]| output(command("git").args(["-c", "safe.directory=*"]).args(arguments));
    let id = git(&["rev-parse", "--short=8", "HEAD"])?;
    let changed = !git(&["status", "--porcelain"])?.is_empty();
    Ok(format!("{}{}", id.trim(), if changed { " with changes" } else { "" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_found_among_the_messages_of_cargo() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"lab"},"profile":{"test":true},"executable":"/t/lab-1"}"#,
            "\nnot a message\n",
            r#"{"reason":"compiler-artifact","target":{"name":"affinity"},"profile":{"test":false},"executable":"/t/a"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"lib"},"profile":{"test":true},"executable":null}"#,
            "\n{\"reason\":\"build-finished\"}\n",
        );
        assert_eq!(parse_artifacts(messages).expect("they are messages"), [("lab".to_owned(), "/t/lab-1".to_owned())]);
    }
}
