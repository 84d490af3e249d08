//! Documents say what the binary does: commands, options, exit codes, maps and reasons are compared both ways. (Metrics
//! are compared beside their code, in `metrics/tests.rs`.)
//!
//! A failure names the document, the word, and the line to write or to remove.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::{Command as Process, Stdio},
};

use affinity_common::{abi::REASONS, names::MAPS};
use affinity_user::cli;
use clap::{Arg, Command};

const COMMAND_LINE: &str = "docs/cli.md";
const REASON_LIST: &str = "docs/reasons.md";
const README: &str = "README.md";

/// Documents whose commands and options are looked at.
const DOCUMENTS: [&str; 9] = [
    COMMAND_LINE,
    REASON_LIST,
    README,
    "docs/install.md",
    "docs/metrics.md",
    "docs/operations.md",
    "docs/performance.md",
    "docs/usage.md",
    "deploy/chart/affinity/README.md",
];

/// Options of other programs that a document names without their program.
const OF_OTHER_PROGRAMS: [&str; 1] = ["keep"];

/// A command that ends with each exit code, without root and without a dataplane.
const ENDINGS: [(i32, &[&str]); 4] = [
    (0, &["--help"]),
    (1, &["get", "services"]),
    (2, &["get", "nothing"]),
    (3, &["explain", "--source", "tests/services", "--from", "no-such-pod", "--to", "10.96.0.10:80"]),
];

fn read(document: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(document);
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{document}: {error}"))
}

/// The text below a heading, up to the next one of the same level.
fn section(document: &str, heading: &str) -> String {
    let text = read(document);
    let (_, below) = text.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| {
        panic!("{document}: the heading {heading:?} is missing: this test reads the tables below it")
    });
    let level = heading.split(' ').next().unwrap_or_default();
    below.split(&format!("\n{level} ")).next().unwrap_or_default().to_owned()
}

/// The rows of all tables of a text whose first cell begins with code, as cells.
fn rows(text: &str) -> Vec<Vec<String>> {
    const ESCAPED: &str = "\u{1}";
    let cells = |line: &str| {
        let line = line.replace("\\|", ESCAPED);
        let inner = line.trim().trim_matches('|');
        inner.split('|').map(|cell| cell.trim().replace(ESCAPED, "|")).collect()
    };
    text.lines().filter(|line| line.starts_with("| `")).map(cells).collect()
}

/// What is in backticks.
fn code(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The name of an option in a word such as `--output`; none where it is none.
fn option_name(word: &str) -> Option<&str> {
    let name = word.trim_matches(['\'', '"', '(', ')', '[', ']']).strip_prefix("--")?;
    let name = name.split(['=', ',', ';', '.', ':']).next()?;
    name.starts_with(|c: char| c.is_ascii_lowercase()).then_some(name)
}

fn assert_none(faults: &[String]) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

/// The options of every command by name, and the commands that have them. Those of every command are of `all`.
fn options(root: &Command) -> BTreeMap<String, (BTreeSet<String>, Vec<Arg>)> {
    let mut options: BTreeMap<String, (BTreeSet<String>, Vec<Arg>)> = BTreeMap::new();
    let global = root.get_arguments().map(|arg| ("all", arg));
    let own = root.get_subcommands().flat_map(|sub| sub.get_arguments().map(|arg| (sub.get_name(), arg)));
    for (command, arg) in global.chain(own) {
        let Some(long) = arg.get_long() else { continue };
        let (commands, args) = options.entry(long.to_owned()).or_default();
        commands.insert(command.to_owned());
        args.push(arg.clone());
    }
    options
}

/// The row of each option in the tables of `docs/cli.md`.
fn documented_options(faults: &mut Vec<String>) -> BTreeMap<String, Vec<String>> {
    let mut documented = BTreeMap::new();
    for row in rows(&section(COMMAND_LINE, "## Options")) {
        let name = code(&row[0]).into_iter().flat_map(str::split_whitespace).find_map(option_name);
        let Some(name) = name.map(str::to_owned) else {
            faults.push(format!("{COMMAND_LINE}: under \"## Options\", {:?} names no option such as `--name`", row[0]));
            continue;
        };
        if documented.insert(name.clone(), row).is_some() {
            faults.push(format!("{COMMAND_LINE}: `--{name}` has two rows under \"## Options\": make them one"));
        }
    }
    documented
}

fn quoted_list<'w>(words: impl IntoIterator<Item = &'w String>) -> String {
    let list = words.into_iter().map(|word| if word == "all" { "all".to_owned() } else { format!("`{word}`") });
    list.collect::<Vec<_>>().join(" ")
}

#[test]
fn documented_options_are_those_of_the_binary() {
    let options = options(&cli::command());
    let mut faults = Vec::new();
    let mut documented = documented_options(&mut faults);
    for (name, (commands, args)) in &options {
        let wanted = quoted_list(commands);
        let value = if args.iter().any(|arg| arg.get_action().takes_values()) { " VALUE" } else { "" };
        let Some(row) = documented.remove(name) else {
            faults.push(format!(
                "{COMMAND_LINE}: `--{name}` is not documented: add a row to a table under \"## Options\": \
                 | `--{name}{value}` | {wanted} | what it does |"
            ));
            continue;
        };
        let cell = row.get(1).map_or("", String::as_str);
        let of_all = (cell == "all").then(|| "all".to_owned());
        let said: BTreeSet<String> = code(cell).into_iter().map(str::to_owned).chain(of_all).collect();
        if said != *commands {
            faults.push(format!(
                "{COMMAND_LINE}: `--{name}`: the second column says {}; the binary has it in {wanted}: write that",
                quoted_list(&said)
            ));
        }
    }
    faults.extend(documented.keys().map(|name| {
        format!("{COMMAND_LINE}: `--{name}` has a row under \"## Options\", but no command has it: remove the row")
    }));
    assert_none(&faults);
}

#[test]
fn documented_values_and_defaults_are_those_of_the_binary() {
    let mut faults = Vec::new();
    let documented = documented_options(&mut faults);
    for (name, (_, args)) in &options(&cli::command()) {
        let Some(row) = documented.get(name).map(|row| row.join(" | ")) else { continue };
        let words: BTreeSet<&str> = code(&row).into_iter().collect();
        let mut wanted = BTreeSet::new();
        for arg in args {
            wanted.extend(arg.get_short().map(|short| format!("`-{short}`")));
            wanted.extend(arg.get_env().map(|name| format!("`{}`", name.to_string_lossy())));
            if arg.get_action().takes_values() {
                wanted.extend(arg.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())));
                let defaults = arg.get_default_values().iter();
                wanted.extend(defaults.map(|value| format!("Default: `{}`", value.to_string_lossy())));
            }
        }
        let is_said = |wanted: &String| row.contains(wanted.as_str()) || words.contains(wanted.trim_matches('`'));
        let missing: Vec<_> = wanted.iter().filter(|wanted| !is_said(wanted)).map(String::as_str).collect();
        if !missing.is_empty() {
            faults.push(format!("{COMMAND_LINE}: the row of `--{name}` has to say {}", missing.join(" and ")));
        }
        let default = row.split("Default: `").nth(1).and_then(|rest| rest.split('`').next());
        if let Some(default) = default.filter(|default| !wanted.contains(&format!("Default: `{default}`"))) {
            faults.push(format!(
                "{COMMAND_LINE}: the row of `--{name}` says \"Default: `{default}`\", which is not its default"
            ));
        }
    }
    assert_none(&faults);
}

#[test]
fn documented_commands_are_those_of_the_binary() {
    let root = cli::command();
    let table = section(COMMAND_LINE, "## Commands");
    let mut documented: BTreeMap<_, _> =
        rows(&table).into_iter().map(|row| (row[0].trim_matches('`').to_owned(), row.join(" "))).collect();
    let mut faults = Vec::new();
    for sub in root.get_subcommands() {
        let name = sub.get_name();
        let Some(row) = documented.remove(name) else {
            faults.push(format!(
                "{COMMAND_LINE}: `{name}` is not documented: add a row to the table under \"## Commands\": \
                 | `{name}` | what it does |"
            ));
            continue;
        };
        // The maps of `dump` have a table of their own.
        let values = sub.get_positionals().filter(|_| name != "dump").flat_map(Arg::get_possible_values);
        let values: Vec<_> = values.map(|value| value.get_name().to_owned()).collect();
        let missing = values.into_iter().filter(|value| !code(&row).contains(&value.as_str()));
        faults.extend(missing.map(|value| format!("{COMMAND_LINE}: the row of `{name}` has to say `{value}`")));
    }
    let unknown = documented.keys().map(|name| {
        format!("{COMMAND_LINE}: `{name}` has a row under \"## Commands\", but is no command: remove the row")
    });
    faults.extend(unknown);
    assert_none(&faults);
}

#[test]
fn documented_maps_are_those_that_dump_writes() {
    let rows = rows(&section(COMMAND_LINE, "## Dump"));
    let said: BTreeSet<&str> = rows.iter().flat_map(|row| code(&row[0])).collect();
    let maps = BTreeSet::from(MAPS);
    let missing = maps
        .difference(&said)
        .map(|map| format!("{COMMAND_LINE}: the map `{map}` is not documented: add it to the table under \"## Dump\""));
    let unknown = said
        .difference(&maps)
        .map(|map| format!("{COMMAND_LINE}: `{map}` is in the table under \"## Dump\", but is no map: remove it"));
    assert_none(&missing.chain(unknown).collect::<Vec<_>>());
}

/// The pieces of a document that are code: each line of a block, and what is in backticks.
fn pieces(document: &str, faults: &mut Vec<String>) -> Vec<String> {
    let (mut pieces, mut prose, mut is_fenced) = (Vec::new(), String::new(), false);
    // A command goes on after a line that ends with a backslash.
    for line in read(document).replace("\\\n", " ").lines() {
        if line.trim_start().starts_with("```") {
            is_fenced = !is_fenced;
        } else if is_fenced || line.starts_with("    ") {
            pieces.push(line.to_owned());
        } else {
            prose.push_str(line);
            prose.push(' ');
        }
    }
    if prose.matches('`').count() % 2 == 1 {
        faults.push(format!("{document}: a backtick is missing"));
    }
    pieces.extend(code(&prose).into_iter().map(|piece| piece.replace("\\|", "|")));
    pieces
}

/// Whether a word of an example runs the binary.
fn is_binary(word: &str) -> bool {
    word == "affinity" || word.ends_with("/affinity")
}

/// What is wrong with an example: `words` begin with a command, or are options alone.
fn fault_of_example(root: &Command, words: &[&str]) -> Option<String> {
    let options = options(root);
    let command = words.first().copied().filter(|word| root.find_subcommand(word).is_some());
    let until = |word: &&&str| !["|", ">", ";", "&&"].contains(*word);
    for name in words.iter().take_while(until).filter_map(|word| option_name(word)) {
        let commands = options.get(name).map(|(commands, _)| commands);
        let is_known = match (commands, command) {
            (Some(commands), Some(command)) => commands.contains(command) || commands.contains("all"),
            (Some(_), None) => true,
            (None, _) => matches!(name, "help" | "version") || OF_OTHER_PROGRAMS.contains(&name),
        };
        if !is_known {
            return Some(match command {
                Some(command) => format!("`affinity {command}` has no option `--{name}`"),
                None => format!("no command of affinity has the option `--{name}`"),
            });
        }
    }
    None
}

#[test]
fn examples_in_documents_use_commands_and_options_that_exist() {
    let root = cli::command();
    let mut faults = Vec::new();
    for document in DOCUMENTS {
        for piece in pieces(document, &mut faults) {
            let words: Vec<&str> = piece.split_whitespace().filter(|word| !["#", "$"].contains(word)).collect();
            let is_command = |word: &&str| root.find_subcommand(word).is_some();
            let called = words.windows(2).position(|pair| is_binary(pair[0]) && is_command(&pair[1]));
            let is_word = |word: &&str| word.bytes().all(|byte| byte.is_ascii_lowercase());
            let example = match (called, words.as_slice()) {
                (Some(at), words) => &words[at + 1..],
                (None, words @ [first, ..]) if first.starts_with("--") || is_command(first) => words,
                (None, [first, second, ..]) if is_binary(first) && is_word(second) => {
                    faults.push(format!(
                        "{document}: {piece:?}: affinity has no command `{second}`: correct the example"
                    ));
                    continue;
                }
                (None, _) => continue,
            };
            let fault = fault_of_example(&root, example);
            faults.extend(fault.map(|fault| format!("{document}: {piece:?}: {fault}: correct the example")));
        }
    }
    assert_none(&faults);
}

/// The binary, without the environment's say and without a dataplane.
fn affinity(args: &[&str]) -> Process {
    let mut affinity = Process::new(env!("CARGO_BIN_EXE_affinity"));
    affinity.args(args).args(["--pin-dir", "/sys/fs/bpf/affinity-none"]).env_remove("NODE_NAME");
    affinity.current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null());
    affinity
}

#[test]
fn documented_fields_are_those_of_json() {
    let explain =
        ["explain", "--source", "tests/services", "--from", "192.0.2.1", "--to", "10.96.0.10:80", "-o", "json"];
    let mut faults = Vec::new();
    // The other listings need a dataplane: they are compared in `cli/rows.rs`.
    for (title, args) in [("Explain", explain.as_slice()), ("Check", &["check", "-o", "json"])] {
        let text = affinity(args).output().expect("the binary runs").stdout;
        let printed: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        let object = printed.get(0).unwrap_or(&printed).as_object().expect("an object");
        let fields: BTreeSet<&str> = object.keys().map(String::as_str).collect();
        let text = read(COMMAND_LINE);
        let (_, below) = text.split_once(&format!("\n**{title}**")).expect("a table of fields");
        let table = below.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
        let rows = rows(&table.collect::<Vec<_>>().join("\n"));
        let said: BTreeSet<&str> = rows.iter().flat_map(|row| code(&row[0])).collect();
        let missing = fields.difference(&said);
        faults.extend(
            missing.map(|field| format!("{COMMAND_LINE}: add a row for `{field}` to the table below **{title}**")),
        );
        let unknown = said.difference(&fields);
        faults
            .extend(unknown.map(|field| format!("{COMMAND_LINE}: `{field}` is no field: remove it below **{title}**")));
    }
    assert_none(&faults);
}

/// The first cells of the table after a line of a text, as numbers.
fn codes_of_table(document: &str, header: &str) -> BTreeSet<i32> {
    let text = read(document);
    let (_, table) = text
        .split_once(header)
        .unwrap_or_else(|| panic!("{document}: the table that begins with {header:?} is missing"));
    let rows = table.lines().skip(1).take_while(|line| line.starts_with('|'));
    rows.filter_map(|row| row.trim_matches('|').split('|').next()?.trim().parse().ok()).collect()
}

#[test]
fn documented_exit_codes_are_those_of_the_binary() {
    let help = cli::command().get_after_help().map(ToString::to_string).unwrap_or_default();
    let (_, list) = help.split_once("Exit codes:\n").expect("`affinity --help` lists exit codes");
    let lines = list.lines().take_while(|line| !line.is_empty());
    let in_help: BTreeSet<i32> = lines.filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
    let endings: BTreeSet<i32> = ENDINGS.iter().map(|(code, _)| *code).collect();
    assert_eq!(in_help, endings, "`affinity --help` lists these exit codes: ENDINGS in {} has to try each", file!());
    let header = "| code | meaning |";
    let said = codes_of_table(COMMAND_LINE, header);
    assert_eq!(said, in_help, "{COMMAND_LINE}: the table {header:?} has to list the exit codes of `affinity --help`");
    for (code, args) in ENDINGS {
        let status = affinity(args).output().expect("the binary runs").status;
        assert_eq!(status.code(), Some(code), "affinity {}", args.join(" "));
    }
}

#[test]
fn documented_reasons_are_those_of_the_binary() {
    let mut documented = BTreeMap::new();
    let mut faults = Vec::new();
    for row in rows(&read(REASON_LIST)) {
        let name = row[0].trim_matches('`').to_owned();
        if documented.insert(name.clone(), row).is_some() {
            faults.push(format!("{REASON_LIST}: `{name}` has two rows: make them one"));
        }
    }
    for reason in REASONS {
        let (name, outcome) = (reason.name(), reason.text().split(':').next().unwrap_or_default());
        match documented.remove(name) {
            None => faults.push(format!(
                "{REASON_LIST}: `{name}` is not documented: add a row: | `{name}` | {outcome} | what happened | what to \
                 do, or nothing |"
            )),
            Some(row) if row.get(1).map(String::as_str) != Some(outcome) => faults.push(format!(
                "{REASON_LIST}: `{name}`: the second column has to say {outcome}, as `affinity get counters` does"
            )),
            Some(row) if row.len() != 4 => {
                faults.push(format!("{REASON_LIST}: `{name}`: a row has four columns, this one {}", row.len()));
            }
            Some(_) => {}
        }
    }
    let unknown = documented.keys().map(|name| format!("{REASON_LIST}: `{name}` is no reason: remove the row"));
    faults.extend(unknown);
    assert_none(&faults);
}

#[test]
fn queries_in_documents_ask_for_reasons_that_exist() {
    let known: BTreeSet<&str> = REASONS.iter().map(|reason| reason.name()).collect();
    let mut faults = Vec::new();
    let mut asked = 0;
    for document in DOCUMENTS {
        let text = read(document).replace("\\|", "|");
        let queries = ["reason=\"", "reason=~\""].into_iter().flat_map(|begin| text.split(begin).skip(1));
        for name in queries.filter_map(|rest| rest.split('"').next()).flat_map(|names| names.split('|')) {
            asked += 1;
            if !known.contains(name) {
                faults.push(format!("{document}: a query asks for the reason `{name}`, which does not exist"));
            }
        }
    }
    assert!(asked > 0, "no document has a query for a reason: this test looks at the wrong files");
    assert_none(&faults);
}
