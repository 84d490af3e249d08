//! The figures as a table or as JSON.

use std::collections::BTreeMap;

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;

use super::{Measure, Way, size::Size};
use crate::bench::spread::Spread;

/// How it was measured.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Scope {
    pub(super) rounds: usize,
    pub(super) seconds: f64,
    pub(super) clients: u16,
}

/// Every figure of every round, by size, measure and way.
pub(super) struct Report {
    scope: Scope,
    rounds: BTreeMap<(Size, Measure, Way), Vec<f64>>,
    sites: Vec<Place>,
}

/// More about a way at a size, in addition to its figures.
#[derive(Serialize)]
struct Place {
    #[serde(flatten)]
    size: Size,
    way: Way,
    /// Time until rules, or the agent, were in place.
    loading_s: f64,
    /// Clients that had another endpoint at the end than at first.
    moved: usize,
}

/// A row of the JSON.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    size: Size,
    measure: Measure,
    way: Way,
    /// Connections, requests, bytes or round trips.
    per_second: Spread,
    /// Multiple of plain routing, round by round.
    ratio: Spread,
}

impl Report {
    pub(super) fn new(scope: Scope) -> Self {
        Self { scope, rounds: BTreeMap::new(), sites: Vec::new() }
    }

    /// Stores a figure of one round.
    pub(super) fn add(&mut self, size: Size, measure: Measure, way: Way, per_second: f64) {
        self.rounds.entry((size, measure, way)).or_default().push(per_second);
    }

    /// Stores the other results of a way, once for each size.
    pub(super) fn place(&mut self, size: Size, way: Way, loading_s: f64, moved: usize) {
        self.sites.push(Place { size, way, loading_s, moved });
    }

    /// Prints everything.
    pub(super) fn print(&self, json: bool) -> Result<()> {
        if json {
            let whole = serde_json::json!({"scope": self.scope, "ways": self.sites, "figures": self.rows()});
            println!("{}", serde_json::to_string_pretty(&whole)?);
        } else {
            print!("{}", self.table());
        }
        Ok(())
    }

    fn rows(&self) -> Vec<Row> {
        let row = |(key, values): (&(Size, Measure, Way), &Vec<f64>)| {
            let (size, measure, way) = *key;
            let direct = &self.rounds[&(size, measure, Way::Direct)];
            let ratio = values.iter().zip(direct).map(|(value, direct)| value / direct);
            Row { size, measure, way, per_second: Spread::of(values.clone()), ratio: Spread::of(ratio.collect()) }
        };
        self.rounds.iter().map(row).collect()
    }

    /// A block for each size, a line for each way, a column for each measure.
    fn table(&self) -> String {
        let Scope { rounds, seconds, clients } = self.scope;
        let mut table = format!(
            "{clients} clients with ClientIP affinity; medians of {rounds} rounds of {seconds} s, and ratios to direct \
             (min..max)\n"
        );
        let rows = self.rows();
        let mut last = None;
        for place in &self.sites {
            let of_size = || rows.iter().filter(|row| row.size == place.size);
            if last.replace(place.size) != Some(place.size) {
                table += &format!("\n{}\n{:<12}", place.size, "");
                for row in of_size().filter(|row| row.way == Way::Direct) {
                    table += &format!(" {:>28}", heading(row.measure));
                }
                table += "  loading  moved\n";
            }
            table += &format!("{:<12}", name(place.way));
            for row in of_size().filter(|row| row.way == place.way) {
                table += &format!(" {:>28}", cell(row));
            }
            table += &format!(" {:>6.1} s {:>6}\n", place.loading_s, place.moved);
        }
        table
    }
}

/// As in `--ways`.
fn name(way: Way) -> String {
    way.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn heading(measure: Measure) -> &'static str {
    match measure {
        Measure::Connections => "new connections/s",
        Measure::Requests => "kept connections: requests/s",
        Measure::Stream => "one stream: MB/s",
        Measure::Datagrams => "UDP round trips/s",
    }
}

fn cell(Row { measure, way, per_second, ratio, .. }: &Row) -> String {
    let unit = if *measure == Measure::Stream { 1e6 } else { 1.0 };
    let rate = per_second.median / unit;
    // A rate below ten needs a decimal place.
    let rate = if rate < 10.0 { format!("{rate:.1}") } else { format!("{rate:.0}") };
    let compared = format!("{:.2} ({:.2}..{:.2})", ratio.median, ratio.min, ratio.max);
    format!("{rate:>8} {:>19}", if *way == Way::Direct { "" } else { &compared })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_one_of_figures_of_the_same_round() {
        let mut report = Report::new(Scope { rounds: 3, seconds: 0.5, clients: 2 });
        let size = Size { services: 1, endpoints: 3 };
        for (direct, xdp) in [(100.0, 99.0), (50.0, 40.0), (10.0, 9.0)] {
            report.add(size, Measure::Connections, Way::Direct, direct);
            report.add(size, Measure::Connections, Way::Xdp, xdp);
        }
        report.place(size, Way::Direct, 0.0, 0);
        report.place(size, Way::Xdp, 1.5, 1);
        let expected = "\
2 clients with ClientIP affinity; medians of 3 rounds of 0.5 s, and ratios to direct (min..max)

1 service, 3 endpoints each
                        new connections/s  loading  moved
direct             50                        0.0 s      0
xdp                40   0.90 (0.80..0.99)    1.5 s      1
";
        assert_eq!(report.table(), expected);
    }
}
