//! The figures as a table or as JSON.

use std::collections::BTreeMap;

use anyhow::Result;
use rustix::system::uname;
use serde::Serialize;

use super::{
    course::{CASES, Case},
    rig::{Family, Hook, Measured},
};
use crate::bench::spread::Spread;

/// The measurements of every round, by hook, family and case.
pub(super) struct Report {
    rounds: u32,
    packets: u32,
    measured: BTreeMap<(Hook, Family, &'static str), Vec<Measured>>,
}

/// All of the output.
#[derive(Serialize)]
struct Document {
    /// Release of the kernel.
    kernel: String,
    rounds: u32,
    /// Packets of a measurement.
    packets: u32,
    cases: Vec<Row>,
}

/// A row of the output.
#[derive(Serialize)]
struct Row {
    hook: &'static str,
    family: &'static str,
    case: &'static str,
    /// The reason that affinity counts for each packet; none: a limit.
    reason: Option<&'static str>,
    /// Nanoseconds per packet, net of the wrapper.
    ns: Spread,
    /// Nanoseconds of the wrapper.
    wrapper_ns: Spread,
    /// The case that `ratio` compares with.
    limit: &'static str,
    /// Multiple of the limit, round by round.
    ratio: Spread,
}

impl Report {
    /// Of so many rounds of so many packets each.
    pub(super) fn new(rounds: u32, packets: u32) -> Self {
        Self { rounds, packets, measured: BTreeMap::new() }
    }

    /// Notes a measurement of one round.
    pub(super) fn add(&mut self, hook: Hook, family: Family, case: &Case, measured: Measured) {
        self.measured.entry((hook, family, case.name)).or_default().push(measured);
    }

    /// Prints every case.
    pub(super) fn print(&self, json: bool) -> Result<()> {
        let kernel = uname().release().to_string_lossy().into_owned();
        if json {
            let document = Document { kernel, rounds: self.rounds, packets: self.packets, cases: self.rows() };
            println!("{}", serde_json::to_string_pretty(&document)?);
            return Ok(());
        }
        println!("Linux {kernel}, {} rounds, {} packets each", self.rounds, self.packets);
        println!(
            "{:<4} {:<4} {:<43} {:>22}   {:>20}",
            "hook", "", "case", "ns/packet (min..max)", "x limit (min..max)"
        );
        for Row { hook, family, case, reason, ns, limit, ratio, .. } in self.rows() {
            let case = if reason.is_some() { format!("affinity: {case}") } else { format!("limit: {case}") };
            println!(
                "{hook:<4} {family:<4} {case:<43} {:>7.1} ({:>5.1}..{:>5.1})   {:>5.2} ({:>5.2}..{:>5.2})  {limit}",
                ns.median, ns.min, ns.max, ratio.median, ratio.min, ratio.max,
            );
        }
        Ok(())
    }

    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for hook in [Hook::Xdp, Hook::Tc] {
            for family in [Family::V4, Family::V6] {
                for case in CASES {
                    let rounds = |name| self.measured.get(&(hook, family, name));
                    let (Some(of_case), Some(limit)) = (rounds(case.name), rounds(case.limit)) else { continue };
                    let ratios = of_case.iter().zip(limit).map(|(case, limit)| case.net_ns / limit.net_ns);
                    rows.push(Row {
                        hook: hook.name(),
                        family: family.name(),
                        case: case.name,
                        reason: case.reason.map(affinity_common::abi::Reason::name),
                        ns: Spread::of(of_case.iter().map(|of_case| of_case.net_ns).collect()),
                        wrapper_ns: Spread::of(of_case.iter().map(|of_case| of_case.wrapper_ns).collect()),
                        limit: case.limit,
                        ratio: Spread::of(ratios.collect()),
                    });
                }
            }
        }
        rows
    }
}
