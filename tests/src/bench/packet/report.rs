//! The figures as a table or as JSON.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;

use super::{
    course::{CASES, Case},
    rig::{Family, Hook},
};
use crate::bench::spread::Spread;

/// Nanoseconds per packet of every round, by hook, family and case.
#[derive(Default)]
pub(super) struct Report {
    rounds: BTreeMap<(Hook, Family, &'static str), Vec<f64>>,
}

/// A row of the output.
#[derive(Serialize)]
struct Row {
    hook: &'static str,
    family: &'static str,
    case: &'static str,
    /// Nanoseconds per packet, net of the wrapper.
    ns: Spread,
    /// The case that `ratio` compares with.
    limit: &'static str,
    /// Multiple of the limit, round by round.
    ratio: Spread,
}

impl Report {
    /// Notes a measurement of one round.
    pub(super) fn add(&mut self, hook: Hook, family: Family, case: &Case, ns: f64) {
        self.rounds.entry((hook, family, case.name)).or_default().push(ns);
    }

    /// Prints every case.
    pub(super) fn print(&self, json: bool) -> Result<()> {
        let rows = self.rows();
        if json {
            println!("{}", serde_json::to_string_pretty(&rows)?);
            return Ok(());
        }
        println!(
            "{:<4} {:<4} {:<37} {:>22}   {:>20}",
            "hook", "", "case", "ns/packet (min..max)", "x limit (min..max)"
        );
        for Row { hook, family, case, ns, limit, ratio } in rows {
            println!(
                "{hook:<4} {family:<4} {case:<37} {:>7.1} ({:>5.1}..{:>5.1})   {:>5.2} ({:>5.2}..{:>5.2})  {limit}",
                ns.median, ns.min, ns.max, ratio.median, ratio.min, ratio.max,
            );
        }
        Ok(())
    }

    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for hook in [Hook::Xdp, Hook::Tc] {
            for family in [Family::V4, Family::V6] {
                for case in std::iter::once(&Case::WRAPPER).chain(CASES) {
                    let rounds = |name| self.rounds.get(&(hook, family, name));
                    let (Some(ns), Some(limit)) = (rounds(case.name), rounds(case.limit)) else { continue };
                    rows.push(Row {
                        hook: hook.name(),
                        family: family.name(),
                        case: case.name,
                        ns: Spread::of(ns.clone()),
                        limit: case.limit,
                        ratio: Spread::of(ns.iter().zip(limit).map(|(ns, limit)| ns / limit).collect()),
                    });
                }
            }
        }
        rows
    }
}
