//! `cargo xtask`: all tasks of this repository, on a plain Debian with rustup.
//!
//! Each task first runs `setup`, which is quick if nothing is missing. A task stops at the first step that fails, and returns a
//! failure exit code.

mod check;
mod fuzz;
mod package;
mod qemu;
mod run;
mod setup;
mod steps;
mod test;

use std::{
    ffi::OsString,
    process::{Command, ExitCode},
    time::Duration,
};

use clap::{ArgGroup, Args, Parser, Subcommand};

use crate::{
    qemu::{Model, Release, Selection},
    run::cargo,
    setup::Purpose,
    steps::Steps,
};

/// Sets up, builds, checks, tests and shows affinity.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    disable_help_subcommand = true,
    after_help = "Start with `cargo xtask demo`. Before a commit: `cargo xtask test`."
)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing to build and test, or print how to
    Setup,
    /// Build the agent, with its kernel programs, and the lab
    Build {
        /// Optimised, as for `demo` and `bench`
        #[arg(long)]
        release: bool,
    },
    /// Check formatting, lints, documentation and the rules of the source tree
    Check,
    /// Run all that must pass: check, unit and property tests, kernel tests (root; also on Debian 12's kernel), fuzzing
    Test(TestArgs),
    /// Run the demo in a lab of network namespaces (root, under a minute)
    Demo {
        /// Arguments of the demo: `--keep` leaves the lab up, `--help` lists all
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Measure on this machine (root): `packet`, nanoseconds per packet; `connect`, clients compared with kube-proxy's
    /// rules; `sync`, a cluster of 10,000 services
    Bench {
        /// Benchmark to run
        name: String,
        /// Arguments of the benchmark: `--json` writes JSON, `--help` lists all
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Build the release: a static binary, a tarball of it, and the image if a container engine runs
    Package,
    /// Fuzz the parser and the pipeline with mutated frames and states
    Fuzz {
        /// Duration in seconds
        #[arg(long, default_value_t = 60, value_name = "SECONDS")]
        seconds: u64,
    },
}

/// Without options: all that must hold on this machine.
#[derive(Args)]
#[command(group(ArgGroup::new("chosen").args(["suite", "nic"])))]
struct TestArgs {
    /// Run only the kernel tests and the demo, in a guest with this Debian kernel
    #[arg(long, value_enum, value_name = "KERNEL")]
    kernel: Option<Release>,
    /// As --kernel, for each of these kernels
    #[arg(long, conflicts_with = "kernel")]
    kernels: bool,
    /// Test network cards of this model in a guest, with native XDP if their driver has it [default kernel: 6.12]
    #[arg(long, value_enum, value_name = "MODEL", conflicts_with_all = ["kernels", "brief", "suite"])]
    nic: Option<Model>,
    /// Run only the few tests that `cargo xtask test` runs in a guest
    #[arg(long)]
    brief: bool,
    /// Run only these suites of kernel tests: files and directories in tests/tests, and `lib`; in guests
    /// also `demo`
    #[arg(long, value_name = "NAME", value_delimiter = ',', conflicts_with = "brief")]
    suite: Vec<String>,
    /// Repeat these suites for this many minutes, to find rare failures
    #[arg(long, value_name = "MINUTES", requires = "suite", conflicts_with_all = ["kernel", "kernels"])]
    minutes: Option<u64>,
    /// Arguments of the test programs, for example a part of the tests' names
    #[arg(last = true, requires = "chosen")]
    arguments: Vec<String>,
}

impl TestArgs {
    fn run(&self) -> anyhow::Result<()> {
        if let Some(model) = self.nic {
            return qemu::test_cards(model, self.kernel.unwrap_or(Release::Trixie), &self.arguments);
        }
        let releases: &[Release] = match &self.kernel {
            Some(release) => std::slice::from_ref(release),
            None if self.kernels => &Release::ALL,
            None if self.suite.is_empty() => return Steps::report(test::run),
            None => {
                let time = Duration::from_secs(60 * self.minutes.unwrap_or(0));
                return Steps::report(|steps| test::kernel_tests_for(time, steps, &self.suite, &self.arguments));
            }
        };
        let selection = if self.brief {
            Selection::Brief
        } else if self.suite.is_empty() {
            Selection::Whole
        } else {
            Selection::Suites(self.suite.clone(), self.arguments.clone())
        };
        qemu::test_kernels(releases, &selection)
    }
}

fn main() -> ExitCode {
    match perform(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> anyhow::Result<()> {
    setup::run(if matches!(task, Task::Package) { Purpose::Package } else { Purpose::Develop })?;
    match task {
        Task::Setup => {
            println!("setup: nothing is missing");
            Ok(())
        }
        Task::Build { release } => {
            let profile = release.then_some("--release");
            run::run(cargo(["build"]).args(profile))
        }
        Task::Check => Steps::report(check::run),
        Task::Test(arguments) => arguments.run(),
        Task::Demo { arguments } => in_the_lab("demo", arguments),
        Task::Bench { name, arguments } => in_the_lab("bench", [name.into()].into_iter().chain(arguments)),
        Task::Package => Steps::report(package::run),
        Task::Fuzz { seconds } => fuzz::run(Duration::from_secs(seconds)),
    }
}

/// Builds a program of the lab and the agent that it starts, and replaces this process with the program.
fn in_the_lab(program: &str, arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<()> {
    let mut build = cargo(["build", "--release"]);
    build.args(["--package", "affinity-user", "--bin", "affinity"]);
    build.args(["--package", "affinity-tests", "--bin", program]);
    run::run(&mut build)?;
    // Not in the repository's root: paths in the arguments are relative to the user's directory.
    let program = run::target_dir()?.join("release").join(program);
    run::replace_with(Command::new(program).args(arguments))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
