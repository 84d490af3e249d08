//! `affinity check`: what this kernel supports, what would be used, what is missing and how to get it.

mod probes;

use std::{
    io::{self, BufWriter},
    path::Path,
};

use clap::Args;
use serde::Serialize;

use super::{
    error::Error,
    node::SizeArgs,
    output::{Cell, Column, Format, Row, Tone, list, wants_colour},
};

/// Options of `affinity check`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct CheckArgs {
    /// Also check XDP on this device; may be repeated
    #[arg(long = "device", value_name = "NAME")]
    devices: Vec<String>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    sizes: SizeArgs,
}

impl CheckArgs {
    pub(crate) fn run(&self, pin_dir: &Path) -> Result<(), Error> {
        let permissions = probes::permissions();
        let mut findings = probes::programs(&permissions);
        findings.extend([
            probes::kernel(),
            permissions,
            probes::pin_directory(pin_dir),
            probes::jit(),
            probes::btf(),
            probes::tc(),
        ]);
        findings.extend(probes::devices(pin_dir));
        findings.extend(self.devices.iter().map(|device| probes::xdp(device)));
        findings.extend([
            probes::memory(&self.sizes.sizes()),
            probes::cgroup(),
            probes::sockets(),
            probes::local_ports(pin_dir),
            probes::clock(),
            probes::dataplane(pin_dir),
        ]);
        list(BufWriter::new(io::stdout().lock()), self.output, wants_colour(), &findings)?;
        let mut missing: Vec<_> =
            findings.iter().filter(|finding| finding.state == State::Missing).map(|finding| finding.check).collect();
        missing.dedup();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::Failed(format!("affinity cannot run on this machine: see {}", missing.join(", "))))
    }
}

/// The assessment of a finding.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// Good.
    Ok,
    /// It works, but not as well as it could.
    Limited,
    /// It does not work without it.
    Missing,
}

/// The result of one check.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Finding {
    /// The name of the check.
    check: &'static str,
    /// The assessment.
    state: State,
    /// What was found, and which part of it is used.
    found: String,
    /// What to do; null: nothing.
    advice: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, state: State::Ok, found: found.into(), advice: None }
    }

    fn limited(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, state: State::Limited, found: found.into(), advice: Some(advice.into()) }
    }

    fn missing(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, state: State::Missing, found: found.into(), advice: Some(advice.into()) }
    }
}

impl Row for Finding {
    const COLUMNS: &'static [Column] =
        &[Column::text("CHECK"), Column::text("STATE"), Column::text("FOUND"), Column::text("ADVICE")];

    fn cells(&self) -> Vec<Cell> {
        let (state, tone) = match self.state {
            State::Ok => ("ok", Tone::Good),
            State::Limited => ("limited", Tone::Attention),
            State::Missing => ("missing", Tone::Bad),
        };
        vec![
            Cell::new(self.check),
            Cell::toned(state, tone),
            Cell::new(&*self.found),
            self.advice.as_deref().map_or_else(|| Cell::toned("-", Tone::Faint), |advice| Cell::toned(advice, tone)),
        ]
    }
}
