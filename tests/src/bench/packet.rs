//! `bench packet`: nanoseconds per packet by BPF_PROG_TEST_RUN, against the limit programs of `affinity-ebpf`.
//!
//! A `drive` program writes each packet and tail-calls the program under test. The time of the same packets with a program that
//! does nothing is subtracted. The time is the kernel's own, the programs are as the agent loads them, and counters must show
//! that the packets were those of the case. Every round measures every case once, so drift of the machine affects all of them
//! equally.

mod course;
mod report;
mod rig;

use anyhow::Result;
use clap::ValueEnum;

use self::{
    course::CASES,
    report::Report,
    rig::{Family, Hook, Rig},
};

/// What to measure, and how to say it.
#[derive(clap::Args)]
pub struct Options {
    /// Rounds; each measures every case once.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
    /// Packets of a measurement.
    #[arg(long, default_value_t = 300_000, value_parser = clap::value_parser!(u32).range(1..=5_000_000))]
    packets: u32,
    /// Hooks [default: all].
    #[arg(long, value_delimiter = ',', value_enum)]
    hooks: Vec<Hook>,
    /// Families of addresses [default: all].
    #[arg(long, value_delimiter = ',', value_enum)]
    families: Vec<Family>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Measures, and prints.
///
/// # Errors
/// If the programs cannot be loaded or run (not root, an old kernel), or do something other than the case expects.
pub fn run(options: &Options) -> Result<()> {
    let (hooks, families) = (all_unless(&options.hooks), all_unless(&options.families));
    let mut report = Report::new(options.rounds, options.packets);
    for hook in hooks {
        for family in families {
            measure(*hook, *family, options, &mut report)?;
        }
    }
    report.print(options.json)
}

/// The chosen values, or all if none was chosen.
fn all_unless<T: ValueEnum>(chosen: &[T]) -> &[T] {
    if chosen.is_empty() { T::value_variants() } else { chosen }
}

fn measure(hook: Hook, family: Family, options: &Options, report: &mut Report) -> Result<()> {
    let mut rig = Rig::new(hook, family)?;
    let cases = || CASES.iter().filter(|case| case.hooks.contains(&hook));
    for case in cases() {
        rig.prepare(case)?;
    }
    for round in 1..=options.rounds {
        eprintln!("{} {}: round {round} of {}", hook.name(), family.name(), options.rounds);
        for case in cases() {
            let measured = rig.measure(case, options.packets)?;
            report.add(hook, family, case, measured);
        }
    }
    Ok(())
}
