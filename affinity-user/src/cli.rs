//! The `affinity` command line.
//!
//! Output is designed and stable: tables for users, JSON and YAML for programs (`-o`), one clear line on standard error if
//! something fails, and the exit codes that `affinity --help` lists. Every command except `run` and `attach` works on what a
//! running dataplane has pinned; no agent needs to run.

mod agent;
mod check;
mod client;
mod dump;
mod error;
mod events;
mod explain;
mod get;
mod logging;
mod node;
mod output;
mod pin;
mod reading;
mod rows;
mod source;
mod top;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use error::{Error, Exit};
use logging::LogFormat;

const AFTER_HELP: &str = "\
Exit codes:
  0  success, also if the reader closes the output early
  1  failure: one line on standard error says what failed and what to do
  2  usage error
  3  not found: a service, pod, client or device on the command line does not exist

Examples:
  affinity run --source ./services --device eth0
  affinity get sessions --service default/web
  affinity explain --from 192.0.2.1 --to 10.96.0.10:80";

/// Client-IP session affinity for Kubernetes Services, in eBPF
#[derive(Parser, Debug)]
#[command(name = "affinity", version, after_help = AFTER_HELP, max_term_width = 120, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Directory on a BPF filesystem where programs and maps are pinned
    #[arg(long, global = true, value_name = "DIR", env = "AFFINITY_PIN_DIR", default_value = "/sys/fs/bpf/affinity")]
    pub(crate) pin_dir: PathBuf,
    /// Name of this node in Kubernetes [default: the host name]
    #[arg(long, global = true, value_name = "NAME", env = "NODE_NAME")]
    node_name: Option<String>,
    /// Log format on standard error
    #[arg(long, global = true, value_name = "FORMAT", value_enum, default_value_t)]
    pub(crate) log_format: LogFormat,
    /// Log more: -v debug messages of affinity, -vv of all libraries, -vvv trace messages. RUST_LOG overrides it
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

impl Global {
    /// The name from the command line, or the host's.
    pub(crate) fn node_name(&self) -> String {
        let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        self.node_name.clone().unwrap_or_else(host)
    }
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the agent: attach to devices and follow a source until SIGTERM or SIGINT; the dataplane stays attached
    #[command(after_help = "\
Examples:
  affinity run --source ./services --device eth0
  affinity run --source ./services --device 'eth*' cni0 --xdp native
  affinity run --source kubernetes --device eth0
  affinity run --source web.yaml --device eth0 --max-sessions 1000000 --log-format json

Prints a line that begins with `ready` once the services of the source are published. Until the source answers, the
dataplane does not change. Matching devices that appear later are attached as well.
Errors in YAML are logged, and the last valid contents stay in use.")]
    Run(agent::RunArgs),
    /// Attach to devices, publish a source once, and exit; the dataplane stays attached
    #[command(after_help = "\
Examples:
  affinity attach --source ./services --device eth0
  affinity attach --source web.yaml --device eth0 eth1 --xdp off")]
    Attach(agent::AttachArgs),
    /// Detach one device, or remove the whole dataplane with all pins and connections
    #[command(after_help = "\
Examples:
  affinity detach --device eth0
  affinity detach")]
    Detach(agent::DetachArgs),
    /// List services, pods, pins, connections, devices or counters
    #[command(after_help = "\
Examples:
  affinity get services
  affinity get sessions --service default/web -o wide
  affinity get sessions --client 192.0.2.1 -o json
  affinity get backends --service default/web --watch
  affinity get sessions -o json | jq -r '.[] | select(.expiresInSeconds == null) | .client'

JSON output is an array with one object per line. Sessions and flows are not sorted.")]
    Get(get::GetArgs),
    /// Show step by step how the next packet of a client would be handled; changes nothing
    #[command(after_help = "\
Examples:
  affinity explain --from 192.0.2.1 --to 10.96.0.10:80
  affinity explain --from 192.0.2.1:40000 --to 10.96.0.10:53/udp
  affinity explain --from 2001:db8::1 --to '[2001:db8:1::10]:80' --source ./services -o json

JSON output has `frontend`, `verdict` (forward, reject, drop, pass), `reason`, `pinned` (the pin that is used, or null),
`candidates` (address, port, name, namespace, probability, masquerade), `masquerade`, `flow` and `steps`. With several
`--to` it is an array.")]
    Explain(explain::ExplainArgs),
    /// Pin a client to a pod
    #[command(after_help = "\
Examples:
  affinity pin --service default/web --client 192.0.2.1 --backend web-0
  affinity pin --service default/web --client 2001:db8::1 --backend fd00:10:244::5

The client's next connection goes to this pod. Its open connections keep their pods.")]
    Pin(pin::PinArgs),
    /// Remove pins: the clients' next connections select a pod again
    #[command(after_help = "\
Examples:
  affinity unpin --service default/web --client 192.0.2.1
  affinity unpin --service default/web --backend web-0
  affinity unpin --service default/web --all

Open connections of the clients keep their pods.")]
    Unpin(pin::UnpinArgs),
    /// List the history of pins: created, moved, expired, evicted, and pinned or unpinned by operators
    #[command(after_help = "\
Examples:
  affinity events
  affinity events --follow --service default/web
  affinity events --follow -o json | jq -r 'select(.kind == \"moved\") | .client'

The kernel keeps the last 16,384 events. JSON output is one object per line.")]
    Events(events::EventsArgs),
    /// Show services, pods and clients live in the terminal: rates, pins, hot spots and events
    #[command(after_help = "\
Examples:
  affinity top
  affinity top --service default/web --interval 500ms
  affinity top --once

Keys: arrows move, Enter opens, Esc goes back, / filters, s sorts, u unpins, ? lists all keys, q quits.")]
    Top(top::TopArgs),
    /// Print all maps, or one, as sorted text with names instead of ids
    #[command(after_help = "\
Examples:
  affinity dump
  affinity dump sessions_v4 --times
  affinity dump slots --slots
  affinity dump --source ./services

Each entry is one line: `map key -> value`. Without --times, two dumps of the same state are equal.")]
    Dump(dump::DumpArgs),
    /// Check whether affinity can run on this machine, what it would use, and what is missing
    #[command(after_help = "\
Examples:
  affinity check
  affinity check --device eth0 --max-sessions 1000000

Exits with code 1 if affinity cannot run on this machine.")]
    Check(check::CheckArgs),
    /// Print a completion script for a shell
    #[command(after_help = "\
Examples:
  affinity completions bash > /etc/bash_completion.d/affinity
  affinity completions zsh > \"${fpath[1]}/_affinity\"
  affinity completions fish > ~/.config/fish/completions/affinity.fish")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages, one for each command
    #[command(after_help = "\
Example:
  affinity man /usr/local/share/man/man1")]
    Man {
        /// A directory that exists
        directory: PathBuf,
    },
}

/// The command line's definition, with its help.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command line of this process.
pub fn main() -> impl std::process::Termination + use<> {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return logging::usage_error(&error),
    };
    match run(&cli) {
        Ok(()) => Exit::Done,
        Err(error) => {
            error.print(cli.global.log_format);
            error.exit()
        }
    }
}

fn run(cli: &Cli) -> Result<(), Error> {
    let global = &cli.global;
    let pin_dir = &global.pin_dir;
    let is_agent = matches!(cli.command, Command::Run(_) | Command::Attach(_));
    logging::start(global.log_format, global.verbose, is_agent);
    match &cli.command {
        Command::Run(args) => args.run(global),
        Command::Attach(args) => args.attach(global),
        Command::Detach(args) => args.run(pin_dir),
        Command::Events(args) => args.run(pin_dir),
        Command::Get(args) => args.run(pin_dir),
        Command::Explain(args) => args.run(global),
        Command::Pin(args) => args.run(pin_dir),
        Command::Unpin(args) => args.run(pin_dir),
        Command::Top(args) => args.run(pin_dir),
        Command::Dump(args) => args.run(global),
        Command::Check(args) => args.run(pin_dir),
        Command::Completions { shell } => completions(*shell),
        Command::Man { directory } => manual(directory),
    }
}

fn completions(shell: Shell) -> Result<(), Error> {
    // Generated in memory first, because the generator panics if it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "affinity", &mut script);
    Ok(io::stdout().write_all(&script)?)
}

fn manual(directory: &Path) -> Result<(), Error> {
    clap_mangen::generate_to(Cli::command(), directory).map_err(|error| {
        Error::Failed(format!("{}: {error}: name a directory for the manual pages", directory.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_lists_every_exit_code() {
        // A new exit code does not compile until it has a place here, and then it needs a line in the help.
        let next = |exit: &Exit| match exit {
            Exit::Done => Some(Exit::Failed),
            Exit::Failed => Some(Exit::Usage),
            Exit::Usage => Some(Exit::NotFound),
            Exit::NotFound => None,
        };
        let codes: Vec<_> =
            std::iter::successors(Some(Exit::Done), next).map(|exit| (exit as u8).to_string()).collect();
        let (_, list) = AFTER_HELP.split_once("Exit codes:\n").unwrap();
        let lines = list.lines().take_while(|line| !line.is_empty());
        let said: Vec<_> = lines.filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(said, codes);
    }

    #[test]
    fn every_command_shows_examples() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains(&format!("affinity {}", command.get_name())), "{}", command.get_name());
        }
    }

    #[test]
    fn examples_parse() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for line in help.lines().filter_map(|line| line.strip_prefix("  affinity ")) {
                let words = line.split(['|', '>']).next().unwrap_or_default().split_whitespace();
                let words = words.map(|word| word.trim_matches(['\'', '"']));
                let parsed = Cli::try_parse_from(std::iter::once("affinity").chain(words));
                assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
            }
        }
    }

    #[test]
    fn unpin_wants_to_know_which() {
        let parse = |args: &[&str]| Cli::try_parse_from([&["affinity", "unpin", "--service", "a/b"], args].concat());
        assert!(parse(&[]).is_err());
        assert!(parse(&["--all", "--client", "192.0.2.1"]).is_err());
        assert!(parse(&["--all"]).is_ok());
    }
}
