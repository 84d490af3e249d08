//! The demo's output: numbered acts, commands and their output, verdicts. Colours only on terminals.

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
/// Pods have different colours: blue, yellow, magenta.
const PODS: [&str; 3] = ["34", "33", "35"];

/// The output, and the acts that held so far.
pub(crate) struct Stage {
    colour: bool,
    started: Instant,
    acts: Cell<u32>,
    /// Whether the last line was empty.
    gap: Cell<bool>,
    held: BTreeMap<&'static str, bool>,
}

impl Stage {
    pub(crate) fn new() -> Self {
        let plain = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let colour = stdout().is_terminal() && !plain;
        Self { colour, started: Instant::now(), acts: Cell::new(0), gap: Cell::new(false), held: BTreeMap::new() }
    }

    /// The first line.
    pub(crate) fn title(&self, title: &str) {
        self.line(&self.paint(title, BOLD));
    }

    /// Begins an act.
    pub(crate) fn open(&self, title: &str) {
        let number = self.acts.get() + 1;
        self.acts.set(number);
        self.gap();
        self.line(&self.paint(&format!("{number}. {title}"), BOLD));
    }

    /// A sentence.
    pub(crate) fn say(&self, sentence: &str) {
        self.line(&format!("   {sentence}"));
    }

    /// A command, as typed in a shell.
    pub(crate) fn command(&self, line: &str) {
        self.gap();
        self.say(&self.paint(&format!("$ {line}"), CYAN));
    }

    /// A command's output.
    pub(crate) fn output(&self, text: &str) {
        text.trim_end().lines().for_each(|line| self.say(line));
        self.gap();
    }

    /// A change of a file.
    pub(crate) fn edit(&self, file: &str, old: &str, new: &str) {
        self.gap();
        self.say(&self.paint(file, CYAN));
        for line in old.lines() {
            if new.lines().any(|other| other == line) {
                self.say(&format!(" {line}"));
            } else {
                self.say(&self.paint(&format!("-{line}"), RED));
            }
        }
        for line in new.lines().filter(|line| !old.lines().any(|other| other == *line)) {
            self.say(&self.paint(&format!("+{line}"), GREEN));
        }
        self.gap();
    }

    /// The client, the frontend, and the pods that answered.
    pub(crate) fn answers(&self, from: &str, to: &str, pods: &[String]) {
        let pods: Vec<String> = pods.iter().map(|pod| self.pod(pod)).collect();
        self.say(&format!("{from} -> {to}   {}", pods.join(" ")));
    }

    /// A bar for each name, as long as its share of the largest.
    pub(crate) fn chart(&self, shares: &BTreeMap<String, usize>) {
        let largest = shares.values().copied().max().unwrap_or(0).max(1);
        self.gap();
        for (pod, &count) in shares {
            let bar = "█".repeat((count * BAR_WIDTH).div_ceil(largest));
            self.say(&format!("{pod}  {} {count}", self.paint(&bar, pod_colour(pod))));
        }
        self.gap();
    }

    /// Ends an act with its result.
    pub(crate) fn judge(&mut self, name: &'static str, holds: bool, evidence: &str) {
        let (mark, colour) = if holds { ("✓", GREEN) } else { ("✗", RED) };
        self.say(&format!("{} {evidence}", self.paint(mark, colour)));
        self.held.insert(name, holds);
    }

    /// Ends an act that failed with an error.
    pub(crate) fn trouble(&self, error: &anyhow::Error) {
        self.say(&format!("{} {error:#}", self.paint("✗", RED)));
    }

    /// The last lines; returns whether every act held.
    pub(crate) fn close(&self, acts: impl Iterator<Item = &'static str>) -> bool {
        let (held, not_held): (Vec<_>, Vec<_>) = acts.partition(|name| self.held.get(name) == Some(&true));
        let seconds = self.started.elapsed().as_secs();
        self.gap();
        self.line(&self.paint(&format!("The lab is gone. It took {seconds} seconds."), DIM));
        if !not_held.is_empty() {
            self.line(&self.paint(&format!("did not hold: {}", not_held.join(" ")), RED));
        }
        self.line(&self.paint(&format!("held: {}", held.join(" ")), if not_held.is_empty() { GREEN } else { DIM }));
        not_held.is_empty()
    }

    fn line(&self, line: &str) {
        println!("{line}");
        self.gap.set(line.is_empty());
    }

    /// An empty line, unless the last one was empty.
    fn gap(&self) {
        if !self.gap.get() {
            self.line("");
        }
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
