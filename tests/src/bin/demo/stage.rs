//! What the audience sees: numbered acts, commands and their output, verdicts. Colour on terminals alone.

use std::{
    cell::Cell,
    collections::BTreeMap,
    env,
    io::{IsTerminal, stdout},
    time::Instant,
};

/// Width of the longest bar of a chart, in characters.
const BAR_WIDTH: usize = 40;

const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "31";
const GREEN: &str = "32";
const CYAN: &str = "36";
/// Pods are told apart by colour too: blue, yellow, magenta.
const PODS: [&str; 3] = ["34", "33", "35"];

/// The output, and what held so far.
pub(crate) struct Stage {
    colour: bool,
    started: Instant,
    acts: Cell<u32>,
    held: BTreeMap<&'static str, bool>,
}

impl Stage {
    pub(crate) fn new() -> Self {
        let plain = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let colour = stdout().is_terminal() && !plain;
        Self { colour, started: Instant::now(), acts: Cell::new(0), held: BTreeMap::new() }
    }

    /// Begins an act.
    pub(crate) fn open(&self, title: &str) {
        let number = self.acts.get() + 1;
        self.acts.set(number);
        println!("\n{}", self.paint(&format!("{number}. {title}"), BOLD));
    }

    /// A sentence.
    pub(crate) fn say(&self, sentence: &str) {
        println!("   {sentence}");
    }

    /// A command, as one would type it.
    pub(crate) fn command(&self, line: &str) {
        println!("\n   {}", self.paint(&format!("$ {line}"), CYAN));
    }

    /// What a command wrote.
    pub(crate) fn output(&self, text: &str) {
        for line in text.trim_end().lines() {
            println!("   {line}");
        }
        println!();
    }

    /// A change of a file.
    pub(crate) fn edit(&self, file: &str, old: &str, new: &str) {
        println!("\n   {}", self.paint(file, CYAN));
        for line in old.lines().filter(|line| !new.lines().any(|other| other == *line)) {
            println!("   {}", self.paint(&format!("-{line}"), RED));
        }
        for line in new.lines() {
            if old.lines().any(|other| other == line) {
                println!("    {line}");
            } else {
                println!("   {}", self.paint(&format!("+{line}"), GREEN));
            }
        }
        println!();
    }

    /// Who asked whom, and who answered.
    pub(crate) fn answers(&self, from: &str, to: &str, pods: &[String]) {
        let pods: Vec<String> = pods.iter().map(|pod| self.pod(pod)).collect();
        println!("   {from} -> {to}   {}", pods.join(" "));
    }

    /// A bar for each name, as long as its share of the largest.
    pub(crate) fn chart(&self, shares: &BTreeMap<String, usize>) {
        let largest = shares.values().copied().max().unwrap_or(0).max(1);
        println!();
        for (pod, &count) in shares {
            let bar = "█".repeat((count * BAR_WIDTH).div_ceil(largest));
            println!("   {pod:6} {} {count}", self.paint(&bar, pod_colour(pod)));
        }
        println!();
    }

    /// Ends an act with what it found.
    pub(crate) fn judge(&mut self, name: &'static str, holds: bool, evidence: &str) {
        let (mark, colour) = if holds { ("✓", GREEN) } else { ("✗", RED) };
        println!("   {} {evidence}", self.paint(mark, colour));
        self.held.insert(name, holds);
    }

    /// Ends an act that could not be told to its end.
    pub(crate) fn trouble(&self, error: &anyhow::Error) {
        println!("   {} {error:#}", self.paint("✗", RED));
    }

    /// The last lines; whether every act held.
    pub(crate) fn close(&self, acts: impl Iterator<Item = &'static str>) -> bool {
        let (held, not_held): (Vec<_>, Vec<_>) = acts.partition(|name| self.held.get(name) == Some(&true));
        let seconds = self.started.elapsed().as_secs();
        println!("\n{}", self.paint(&format!("The lab is gone. {seconds} seconds."), DIM));
        if !not_held.is_empty() {
            println!("{}", self.paint(&format!("did not hold: {}", not_held.join(" ")), RED));
        }
        println!("{}", self.paint(&format!("held: {}", held.join(" ")), if not_held.is_empty() { GREEN } else { DIM }));
        not_held.is_empty()
    }

    fn pod(&self, name: &str) -> String {
        self.paint(name, pod_colour(name))
    }

    fn paint(&self, text: &str, colour: &str) -> String {
        if self.colour { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// The colour of `pod-N`.
fn pod_colour(name: &str) -> &'static str {
    let number = name.rsplit('-').next().and_then(|number| number.parse::<usize>().ok());
    PODS[number.unwrap_or(0) % PODS.len()]
}
