//! `cargo xtask test --kernel`: the kernel tests in guests that run Debian's kernels.
//!
//! A guest sees this machine's files and runs the test binaries of this target directory as they are. Only Debian packages are
//! downloaded, from this machine's mirror, and only QEMU is installed.

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
    setup, test,
};

/// Tests that show in a few minutes of emulation whether a kernel can be used: all programs load, each hook carries a
/// connection, and the lab's scenarios that most of the product relies on. In addition, the one that needs VLAN devices, which
/// Debian's kernels have and others may not.
const BRIEF: [(&str, &[&str]); 3] =
    [("hooks", &[]), ("lab", &BRIEF_STORIES), (VLAN_SUITE, &["answers_stay_in_their_vlan"])];

/// The suite with ignored tests that need VLAN devices, and that run in guests.
const VLAN_SUITE: &str = "frames";

const BRIEF_STORIES: [&str; 2] =
    ["a_service_without_endpoints_refuses_at_once", "connections_to_a_removed_backend_are_reset"];

/// The demonstration, as a suite.
const DEMO: &str = "demo";

/// The target that [`test::LIBRARY`] stands for.
const LIBRARY_TARGET: &str = "affinity_tests";

/// How long the brief tests may take.
const BRIEF_LIMIT: Duration = Duration::from_secs(30 * 60);

/// Which tests a guest is to run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Selection {
    /// Every kernel test, and the demonstration.
    Whole,
    /// [`BRIEF`].
    Brief,
    /// These suites. Their programs get these arguments.
    Suites(Vec<String>, Vec<String>),
}

/// Everything that guests need.
pub(crate) struct Laboratory {
    qemu: Qemu,
    mirror: Mirror,
}

impl Laboratory {
    /// Gets what guests need: QEMU, a mirror, and busybox.
    ///
    /// # Errors
    /// If something is missing and cannot be installed.
    pub(crate) fn open() -> Result<Self> {
        ensure!(cfg!(target_arch = "x86_64"), "guests need an x86-64 machine");
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
    /// If its package cannot be downloaded.
    pub(crate) fn kernel(&self, release: Release) -> Result<Kernel> {
        Kernel::prepare(release, &self.qemu.dir, &self.mirror, &self.qemu.busybox)
    }

    /// Runs the tests on each of these kernels, and prints the table of results.
    ///
    /// # Errors
    /// If a guest does not finish, or a test fails.
    pub(crate) fn test(&self, kernels: &[Kernel], selection: &Selection) -> Result<()> {
        // The commit that is built now: the tree may change meanwhile.
        let commit = commit()?;
        let jobs = jobs(selection)?;
        let mut rows = Vec::new();
        let mut failures = Vec::new();
        for kernel in kernels {
            let title = format!("{} ({})", kernel.version, kernel.release.title());
            let report = test_kernel(self, kernel, selection, &jobs)?;
            let failed = report.ended.iter().filter(|job| job.status != Some(0));
            failures.extend(failed.map(|job| format!("{title}: {}", job.name)));
            if report.failure.is_some() {
                failures.push(format!("{title}: the guest failed"));
            }
            println!("\n{}", outcome::durations(&report.ended));
            rows.push(Row::new(title, &report));
        }
        // The table would show tests that were left out as failed.
        let is_filtered = matches!(selection, Selection::Suites(_, arguments) if !arguments.is_empty());
        if !is_filtered && rows.iter().any(Row::has_hooks) {
            println!("\n{}", outcome::table(&rows, today()?.trim(), &commit));
        }
        ensure!(failures.is_empty(), "failed in guests:\n    {}", failures.join("\n    "));
        Ok(())
    }
}

/// Runs the tests on each of these kernels, and prints the table of results.
///
/// # Errors
/// If a kernel cannot be downloaded, a guest does not finish, or a test fails.
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
    run_all(jobs, |jobs| guest.run(jobs))
}

/// Runs programs in a guest. If the guest fails, the programs that had not started run in another guest, so that one run shows
/// all failures; but not if the guest did not start any program.
fn run_all(jobs: &[Job], mut run: impl FnMut(&[Job]) -> Result<Report>) -> Result<Report> {
    let mut whole = Report { ended: Vec::new(), failure: None };
    loop {
        let Report { ended, failure } = run(&jobs[whole.ended.len()..])?;
        let is_stuck = ended.is_empty();
        whole.ended.extend(ended);
        let Some(failure) = failure else { return Ok(whole) };
        println!("{failure:#}");
        whole.failure = Some(failure);
        if is_stuck || whole.ended.len() == jobs.len() {
            return Ok(whole);
        }
    }
}

/// Runs the tests of network cards on cards of this model.
///
/// # Errors
/// As [`test_kernels`].
pub(crate) fn test_cards(model: Model, release: Release, arguments: &[String]) -> Result<()> {
    let Laboratory { qemu, mirror } = Laboratory::open()?;
    let qemu = nic::qemu_with(qemu, model, &mirror)?;
    let kernel = Kernel::prepare(release, &qemu.dir, &mirror, &qemu.busybox)?;
    let accelerator = Accelerator::probe(&qemu, &kernel)?;
    let mut jobs = jobs(&Selection::Suites(vec!["nic".to_owned()], arguments.to_vec()))?;
    // They need the cards, so ordinary runs skip them. The cards exist only once, so the tests run one at a time.
    jobs.iter_mut()
        .for_each(|job| job.words.splice(1..2, ["--ignored", "--test-threads=1"].map(str::to_owned)).for_each(drop));
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

/// Builds the programs of a selection, and returns the jobs that run them.
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
            // The suite that shows fastest whether anything can work comes first.
            jobs.sort_by_key(|job| job.name != "hooks");
            jobs.push(demo()?);
            jobs
        }
        Selection::Brief => {
            BRIEF.iter().map(|(name, filter)| Ok(job(name, find(name)?, filter))).collect::<Result<_>>()?
        }
        Selection::Suites(names, arguments) => {
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            let suite = |name: &String| match name.as_str() {
                DEMO => demo(),
                name => Ok(job(name, find(if name == test::LIBRARY { LIBRARY_TARGET } else { name })?, &arguments)),
            };
            names.iter().map(suite).collect::<Result<_>>()?
        }
    })
}

/// Builds the demonstration.
fn demo() -> Result<Job> {
    crate::run::run(&mut cargo(["build", "--package", "affinity-tests", "--bin", DEMO]))?;
    let program = target_dir()?.join("debug").join(DEMO).display().to_string();
    Ok(Job { name: DEMO.to_owned(), directory: root(), words: vec![program] })
}

/// Two tests at a time, as on the host.
fn job(name: &str, path: &str, filter: &[&str]) -> Job {
    let ignored = (name == VLAN_SUITE).then_some("--include-ignored");
    let words = [path, "--test-threads=2"].into_iter().chain(ignored).chain(filter.iter().copied());
    Job { name: name.to_owned(), directory: root().join("tests"), words: words.map(str::to_owned).collect() }
}

/// Builds the tests of affinity-tests, and returns their names and paths, sorted by name.
fn test_binaries() -> Result<Vec<(String, String)>> {
    let mut build =
        cargo(["test", "--package", "affinity-tests", "--no-run", "--message-format=json-render-diagnostics"]);
    build.stderr(std::process::Stdio::inherit());
    let messages = output(&mut build)?;
    let mut binaries = parse_artifacts(&messages)?;
    binaries.sort();
    ensure!(!binaries.is_empty(), "affinity-tests has no test binaries");
    Ok(binaries)
}

/// The test programs in cargo's messages.
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

/// The commit that is tested, with a mark if the tree differs from it.
fn commit() -> Result<String> {
    let git = |arguments: &[&str]| output(command("git").args(["-c", "safe.directory=*"]).args(arguments));
    let id = git(&["rev-parse", "--short=8", "HEAD"])?;
    let changed = !git(&["status", "--porcelain"])?.is_empty();
    Ok(format!("{}{}", id.trim(), if changed { " with changes" } else { "" }))
}

#[cfg(test)]
mod tests {
    use super::{guest::Ended, *};

    fn ended(name: &str, status: Option<i32>) -> Ended {
        Ended { name: name.to_owned(), status, output: String::new(), took: Duration::ZERO }
    }

    #[test]
    fn programs_that_a_failed_guest_did_not_begin_run_in_another() {
        let jobs = ["a", "b", "c"].map(|name| Job { name: name.to_owned(), directory: root(), words: Vec::new() });
        let mut guests = vec![
            Report { ended: vec![ended("c", Some(0))], failure: None },
            Report { ended: vec![ended("a", Some(0)), ended("b", None)], failure: Some(anyhow::anyhow!("a panic")) },
        ];
        let mut begun = Vec::new();
        let report = run_all(&jobs, |jobs| {
            begun.push(jobs.len());
            Ok(guests.pop().expect("two guests are enough"))
        });
        let report = report.expect("guests were started");
        assert_eq!(begun, [3, 1]);
        assert_eq!(report.ended, [ended("a", Some(0)), ended("b", None), ended("c", Some(0))]);
        assert!(report.failure.is_some());
    }

    #[test]
    fn a_kernel_that_does_not_boot_is_not_tried_for_ever() {
        let jobs = [Job { name: "a".to_owned(), directory: root(), words: Vec::new() }];
        let mut count = 0;
        let report = run_all(&jobs, |_| {
            count += 1;
            Ok(Report { ended: Vec::new(), failure: Some(anyhow::anyhow!("no boot")) })
        });
        assert!(report.expect("guests were started").failure.is_some());
        assert_eq!(count, 1);
    }

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
