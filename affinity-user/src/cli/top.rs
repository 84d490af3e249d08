//! `affinity top`: services, pods and clients, live.

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
    time::Duration,
};

use clap::Args;
use jiff::SignedDuration;

use super::error::Error;
use crate::top;

/// Options of `affinity top`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct TopArgs {
    /// Refresh interval, from 100ms to 1h
    #[arg(short, long, value_name = "DURATION", default_value = "1s", value_parser = interval)]
    interval: Duration,
    /// Open this service at the start
    #[arg(long, value_name = "NAMESPACE/NAME")]
    service: Option<String>,
    /// Wait for one interval, print the screen as text, and exit
    #[arg(long)]
    once: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    const BOUNDS: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3600);
    let parsed = text.parse::<SignedDuration>().ok().and_then(|duration| Duration::try_from(duration).ok());
    parsed
        .filter(|duration| BOUNDS.contains(duration))
        .ok_or_else(|| "expected a duration from 100ms to 1h, such as 500ms".to_owned())
}

impl TopArgs {
    pub(crate) fn run(&self, pin_dir: &Path) -> Result<(), Error> {
        let (pin_dir, interval, service) = (pin_dir.to_owned(), self.interval, self.service.clone());
        let options = top::Options { pin_dir, interval, service };
        if self.once {
            io::stdout().write_all(top::once(&options)?.as_bytes())?;
            return Ok(());
        }
        if !io::stdout().is_terminal() {
            return Err(Error::Usage(
                "standard output is not a terminal: use `affinity top --once`, which prints text".to_owned(),
            ));
        }
        Ok(top::run(&options)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_have_units_and_bounds() {
        assert_eq!(interval("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(interval("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(interval("1h"), Ok(Duration::from_secs(3600)));
        for text in ["", "1", "99ms", "61m", "-1s", "soon"] {
            assert!(interval(text).is_err(), "{text}");
        }
    }
}
