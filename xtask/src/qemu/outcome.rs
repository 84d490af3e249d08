//! The output of programs in guests, and the table for the README that is made from it.

use std::fmt::Write as _;

use super::guest::{Ended, Report};

/// The hooks where packets and connections are translated: the name in `tests/tests/hooks.rs`, and the table's heading.
pub(crate) const HOOKS: [(&str, &str); 5] = [
    ("xdp-native", "XDP in the driver (veth)"),
    ("tcx", "tcx"),
    ("clsact", "clsact"),
    ("sockets", "sockets"),
    ("redirect", "redirect"),
];

/// The prefix of a line with which a test reports that a hook works, or its replacement.
const HOOK: &str = "hook: ";

/// The entry of a hook that no test has reported.
const FAILED: &str = "**failed**";

/// The prefix of the last line of a test program.
const CLOSING: &str = "test result: ";

/// The results of one guest: a row of the table.
pub(crate) struct Row {
    /// The kernel or the network card.
    pub(crate) title: String,
    /// The reports about the hooks, in the order of [`HOOKS`].
    pub(crate) hooks: Vec<String>,
    /// The results of the tests.
    pub(crate) tests: String,
}

impl Row {
    /// Whether a test of hooks was among those that ran.
    pub(crate) fn has_hooks(&self) -> bool {
        self.hooks.iter().any(|hook| hook != FAILED)
    }

    /// The row of a guest.
    pub(crate) fn new(title: String, report: &Report) -> Self {
        let ended = &report.ended;
        let lines = || ended.iter().flat_map(|ended| ended.output.lines());
        let hooks = HOOKS.iter().map(|(hook, _)| {
            // After the name of the test that reported it, or on a line of its own.
            let said = lines().find_map(|line| line.split_once(HOOK)?.1.strip_prefix(hook)?.strip_prefix(": "));
            said.unwrap_or(FAILED).to_owned()
        });
        let unfinished = if report.failure.is_some() { "; **the guest failed**" } else { "" };
        Self { title, hooks: hooks.collect(), tests: format!("{}{unfinished}", Counts::of(ended)) }
    }
}

/// How many tests passed and failed, according to the last lines.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Counts {
    passed: u64,
    failed: u64,
    /// Programs that failed without a failed test: they ended early, or are no tests.
    broken: u64,
}

impl Counts {
    fn of(ended: &[Ended]) -> Self {
        let mut counts = Self::default();
        for program in ended {
            let closing = program.output.lines().filter_map(|line| line.strip_prefix(CLOSING));
            let before = counts.failed;
            let mut is_closed = false;
            for line in closing {
                counts.passed += number_before(line, " passed").unwrap_or(0);
                counts.failed += number_before(line, " failed").unwrap_or(0);
                is_closed = true;
            }
            if !is_closed {
                let results = |end: &str| program.output.lines().filter(|line| line.ends_with(end)).count() as u64;
                counts.passed += results(" ... ok");
                counts.failed += results(" ... FAILED");
            }
            counts.broken += u64::from(program.status.is_some_and(|status| status != 0) && counts.failed == before);
        }
        counts
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed", self.passed)?;
        if self.failed > 0 {
            write!(f, ", {} failed", self.failed)?;
        }
        if self.broken > 0 {
            write!(f, ", {} programs ended early", self.broken)?;
        }
        Ok(())
    }
}

/// How long each program took, and how it ended.
pub(crate) fn durations(ended: &[Ended]) -> String {
    let width = ended.iter().map(|program| program.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for program in ended {
        let result = match program.status {
            Some(0) => "ok",
            Some(_) => "FAILED",
            None => "did not end",
        };
        let tests = Counts::of(std::slice::from_ref(program));
        let took = program.took.as_secs_f64();
        let _ = writeln!(text, "{:width$}  {took:>7.1} s  {result}: {tests}", program.name);
    }
    text
}

/// The number before these words.
fn number_before(line: &str, words: &str) -> Option<u64> {
    line.split_once(words)?.0.rsplit(' ').next()?.parse().ok()
}

/// The table, in Markdown.
pub(crate) fn table(rows: &[Row], date: &str, commit: &str) -> String {
    let mut text = "| kernel |".to_owned();
    for (_, title) in HOOKS {
        let _ = write!(text, " {title} |");
    }
    text += " tests |\n|";
    text += &"---|".repeat(HOOKS.len() + 2);
    for row in rows {
        let _ = write!(text, "\n| {} | {} | {} |", row.title, row.hooks.join(" | "), row.tests);
    }
    let _ = write!(text, "\n\nRun on {date} at commit {commit}.");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: i32, output: &str) -> Ended {
        let took = std::time::Duration::from_secs(61);
        Ended { name: "hooks".to_owned(), status: Some(status), output: output.to_owned(), took }
    }

    #[test]
    fn a_row_is_read_from_the_output_of_tests() {
        let output = "\nrunning 2 tests\ntest xdp_native ... hook: xdp-native: works\nok\n\
                      hook: tcx: none in this kernel: clsact is used\ntest tcx ... ok\n\
                      test result: FAILED. 2 passed; 1 failed; 0 ignored\n";
        let ended = vec![ended(101, output), ended(0, "test result: ok. 3 passed; 0 failed")];
        let row = Row::new("6.1".to_owned(), &Report { ended, failure: None });
        assert_eq!(row.hooks[0], "works");
        assert_eq!(row.hooks[1], "none in this kernel: clsact is used");
        assert_eq!(row.hooks[2], "**failed**");
        assert_eq!(row.tests, "5 passed, 1 failed");
    }

    #[test]
    fn programs_that_end_early_are_counted() {
        let counts = Counts::of(&[ended(134, "running 3 tests\n"), ended(0, "the demo")]);
        assert_eq!(counts.to_string(), "0 passed, 1 programs ended early");
    }

    #[test]
    fn each_program_has_its_time_and_result() {
        let stopped = Ended { name: "lab".to_owned(), status: None, ..ended(0, "test a ... ok\n") };
        let text = durations(&[ended(0, "test result: ok. 3 passed; 0 failed\n"), stopped]);
        assert_eq!(text, "hooks     61.0 s  ok: 3 passed\nlab       61.0 s  did not end: 1 passed\n");
    }

    #[test]
    fn the_table_is_markdown() {
        let row = Row { title: "6.1".to_owned(), hooks: vec!["works".to_owned(); 5], tests: "5 passed".to_owned() };
        let stopped = Ended { status: None, ..ended(0, "test sockets ... ok\ntest clsact ... FAILED\ntest tcx ... ") };
        let report = Report { ended: vec![stopped], failure: Some(anyhow::anyhow!("it was stopped")) };
        let text = table(&[row, Row::new("sid".to_owned(), &report)], "2026-11-30", "abc1234");
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            [
                "| kernel | XDP in the driver (veth) | tcx | clsact | sockets | redirect | tests |",
                "|---|---|---|---|---|---|---|",
                "| 6.1 | works | works | works | works | works | 5 passed |",
                "| sid | **failed** | **failed** | **failed** | **failed** | **failed** | 1 passed, 1 failed; \
                 **the guest failed** |",
                "",
                "Run on 2026-11-30 at commit abc1234."
            ]
        );
    }
}
