//! The log: on standard error, of the agent above all.

use std::{
    env,
    io::{self, IsTerminal},
};

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// The form of the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub(crate) enum LogFormat {
    /// One line of text an entry.
    #[default]
    Text,
    /// One JSON object an entry.
    Json,
}

/// What is logged: `RUST_LOG` if it is set, else by how often `-v` was given and whether an agent runs.
///
/// Where a kernel rejects the type information of the programs, which only debuggers need, aya goes on without and
/// warns with some hundred lines of the verifier's. The client of a cluster's API logs each failure that it returns.
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

/// To be called once.
pub(crate) fn start(format: LogFormat, verbose: u8, is_agent: bool) {
    let colour = io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter(verbose, is_agent))
        .with_writer(io::stderr)
        .with_target(verbose > 1);
    match format {
        LogFormat::Text => log.with_ansi(colour).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}
