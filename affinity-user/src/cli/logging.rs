//! The log on standard error, mainly of the agent.

use std::{
    env,
    io::{self, IsTerminal},
};

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

use super::error::Exit;

/// The form of the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub(crate) enum LogFormat {
    /// One line of text per entry.
    #[default]
    Text,
    /// One JSON object per entry.
    Json,
}

/// The log filter: `RUST_LOG` if it is set, otherwise according to the number of `-v` and whether this is an agent.
///
/// If a kernel rejects the programs' type information (BTF), which only debuggers need, aya continues without it and warns with
/// some hundred lines of the verifier's log. The client of a cluster's API logs each failure that it returns.
fn filter(verbose: u8, is_agent: bool) -> EnvFilter {
    let default = match (verbose, is_agent) {
        (0, false) => "warn,aya=error,kube_client=off",
        (0, true) => "info,aya=error,kube_client=off",
        (1, _) => "info,aya=error,kube_client=off,affinity_user=debug",
        (2, _) => "debug",
        _ => "trace",
    };
    EnvFilter::builder().with_default_directive(tracing::Level::WARN.into()).parse_lossy(
        env::var(EnvFilter::DEFAULT_ENV).ok().filter(|directives| !directives.is_empty()).as_deref().unwrap_or(default),
    )
}

/// Prints a usage error in the log format that the command line asks for, as far as that can be determined, or the requested
/// help.
pub(crate) fn usage_error(error: &clap::Error) -> Exit {
    if !error.use_stderr() {
        error.exit();
    }
    let words: Vec<String> = env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    if is_json(&words) {
        start(LogFormat::Json, 0, true);
        let text = error.to_string();
        let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        tracing::error!("{}", lines.join(" "));
        return Exit::Usage;
    }
    error.exit()
}

/// Whether the words of a command line request a log in JSON.
fn is_json(words: &[String]) -> bool {
    let separate = words.windows(2).any(|pair| pair[0] == "--log-format" && pair[1] == "json");
    separate || words.iter().any(|word| word == "--log-format=json")
}

/// Starts the log. Call this once.
pub(crate) fn start(format: LogFormat, verbose: u8, is_agent: bool) {
    let colour = io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter(verbose, is_agent))
        .with_writer(io::stderr)
        .with_target(verbose > 1);
    match format {
        LogFormat::Text => log.with_ansi(colour).init(),
        LogFormat::Json => {
            log.json().flatten_event(true).init();
            std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
        }
    }
}
