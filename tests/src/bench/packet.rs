//! `bench packet`: nanoseconds per packet by BPF_PROG_TEST_RUN, against the limit programs of `affinity-ebpf`.
//!
//! A `drive` program writes each packet anew and goes on with the program under test; the time of `drive` alone is
//! subtracted. Every round measures every case once, so drift of the machine meets all of them alike.

mod course;
mod report;
mod rig;

use anyhow::Result;

use self::{
    course::{CASES, Case},
    report::Report,
    rig::{Family, Hook, Rig},
};

/// What to measure, and how to say it.
#[derive(clap::Args)]
pub struct Options {
    /// Rounds; each measures every case once.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Packets of a measurement.
    #[arg(long, default_value_t = 300_000)]
    packets: u32,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Measures, and prints.
///
/// # Errors
/// Where the programs cannot be loaded or run (not root, an old kernel).
pub fn run(options: &Options) -> Result<()> {
    let mut report = Report::default();
    for hook in [Hook::Xdp, Hook::Tc] {
        for family in [Family::V4, Family::V6] {
            let mut rig = Rig::new(hook, family)?;
            for case in CASES {
                rig.prepare(case)?;
            }
            for round in 0..options.rounds {
                eprintln!("{} {}: round {} of {}", hook.name(), family.name(), round + 1, options.rounds);
                measure_round(&mut rig, options.packets, &mut report)?;
            }
        }
    }
    report.print(options.json)
}

fn measure_round(rig: &mut Rig, packets: u32, report: &mut Report) -> Result<()> {
    let wrapper_ns = rig.measure(&Case::WRAPPER, packets)?;
    for case in CASES {
        let gross_ns = rig.measure(case, packets)?;
        report.add(rig.hook, rig.family, case, gross_ns - wrapper_ns);
    }
    report.add(rig.hook, rig.family, &Case::WRAPPER, wrapper_ns);
    Ok(())
}
