//! Finds the length of this kernel's jiffy.
//!
//! Reading jiffies is several times cheaper for a program than reading the monotonic clock, and a jiffy is precise
//! enough for all that affinity decides. The kernel moves jiffies on by whole ticks of the monotonic clock, so one
//! measurement at load holds for ever: `(jiffies - tick_base) * tick_ns` is the monotonic time, late by two ticks at
//! most and never early.

use std::{os::fd::BorrowedFd, time::Duration};

use crate::sys::{self, SysError};

/// Every frequency that a kernel's configuration offers, on any architecture.
const FREQUENCIES_HZ: [u64; 9] = [100, 128, 250, 256, 300, 512, 1000, 1024, 1200];
/// A measurement this close to a frequency means it: a third of the distance between the closest two (2.4 %).
const TOLERANCE: f64 = 0.008;
const SPAN: Duration = Duration::from_millis(40);
const MIN_TICKS: u64 = 8;
/// A tick may come late where a hypervisor takes the processor away.
const ATTEMPTS: usize = 8;

/// The clock could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// The program could not be run.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The program failed.
    #[error("the clock program returned {0}")]
    Program(u32),
    /// Jiffies stand still.
    #[error("jiffies did not change within {0:?}")]
    Still(Duration),
    /// No frequency fits.
    #[error("a jiffy of {0:.0} ns is none that a kernel can be configured for")]
    Unknown(f64),
}

/// The kernel's jiffies as a clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticks {
    /// Nanoseconds per jiffy.
    pub tick_ns: u64,
    /// Jiffies when the monotonic clock was zero; wrapping.
    pub tick_base: u64,
}

impl Ticks {
    /// The monotonic time that the programs see at `jiffies`.
    #[must_use]
    pub const fn now_ns(&self, jiffies: u64) -> u64 {
        jiffies.wrapping_sub(self.tick_base).wrapping_mul(self.tick_ns)
    }
}

/// A reading: jiffies, and monotonic nanoseconds.
type Reading = (u64, u64);

/// Measures with the program [`affinity_common::names::CLOCK`].
///
/// # Errors
/// [`ClockError`].
pub(super) fn measure(clock: BorrowedFd<'_>) -> Result<Ticks, ClockError> {
    let mut read = || read(clock);
    let mut last = 0.0;
    for _ in 0..ATTEMPTS {
        let edges = edges(&mut read)?;
        let (first, end) = (edges[0], edges[edges.len() - 1]);
        last = (end.1 - first.1) as f64 / (end.0 - first.0) as f64;
        if let Some(tick_ns) = nearest_tick(last) {
            return Ok(align(&edges, tick_ns));
        }
    }
    Err(ClockError::Unknown(last))
}

fn read(clock: BorrowedFd<'_>) -> Result<Reading, ClockError> {
    let run = sys::test_run(clock, &[0; 64], 1)?;
    if run.retval != 0 {
        return Err(ClockError::Program(run.retval));
    }
    let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| run.data_out[at + byte]));
    Ok((word(0), word(8)))
}

/// The readings right after a change of jiffies, over [`SPAN`] and [`MIN_TICKS`].
fn edges(read: &mut impl FnMut() -> Result<Reading, ClockError>) -> Result<Vec<Reading>, ClockError> {
    const DEADLINE: Duration = Duration::from_millis(500);
    let start = read()?;
    let mut before = start;
    let mut edges = Vec::new();
    loop {
        let now = read()?;
        if now.0 != before.0 {
            edges.push(now);
            let (first, end) = (edges[0], now);
            if end.0 - first.0 >= MIN_TICKS && end.1 - first.1 >= SPAN.as_nanos() as u64 {
                return Ok(edges);
            }
        } else if now.1 - start.1 > DEADLINE.as_nanos() as u64 {
            return Err(ClockError::Still(DEADLINE));
        }
        before = now;
    }
}

/// The jiffy of the frequency that a measured one means: rounded as the kernel's `TICK_NSEC`.
fn nearest_tick(measured_ns: f64) -> Option<u64> {
    let ticks = FREQUENCIES_HZ.iter().map(|hz| (1_000_000_000 + hz / 2) / hz);
    ticks.into_iter().find(|&tick| (measured_ns / tick as f64 - 1.0).abs() < TOLERANCE)
}

/// The base that makes the earliest edge true: the others were seen late.
fn align(edges: &[Reading], tick_ns: u64) -> Ticks {
    let (first, _) = edges[0];
    let at_first = |&(jiffies, now_ns): &Reading| now_ns - (jiffies - first) * tick_ns;
    let earliest_ns = edges.iter().map(at_first).min().unwrap_or(0);
    Ticks { tick_ns, tick_base: first.wrapping_sub(earliest_ns / tick_ns) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel of `hz` that booted with jiffies five minutes before they wrap in 32 bits, as Linux does.
    fn kernel(hz: u64, step_ns: u64) -> impl FnMut() -> Result<Reading, ClockError> {
        let tick_ns = (1_000_000_000 + hz / 2) / hz;
        let mut now_ns = 12_345_678_901;
        move || {
            now_ns += step_ns;
            Ok((u64::from((300 * hz as u32).wrapping_neg()) + now_ns / tick_ns, now_ns))
        }
    }

    #[test]
    fn every_frequency_is_recognised_and_never_early() {
        for hz in FREQUENCIES_HZ {
            let mut read = kernel(hz, 2_700);
            let edges = edges(&mut read).unwrap();
            let (first, end) = (edges[0], edges[edges.len() - 1]);
            let tick_ns = nearest_tick((end.1 - first.1) as f64 / (end.0 - first.0) as f64).unwrap();
            assert_eq!(tick_ns, (1_000_000_000 + hz / 2) / hz);
            let ticks = align(&edges, tick_ns);
            for _ in 0..100_000 {
                let (jiffies, now_ns) = read().unwrap();
                let late_ns = now_ns - ticks.now_ns(jiffies);
                assert!(late_ns < 2 * tick_ns, "{hz} Hz: {late_ns} ns late");
            }
        }
    }

    #[test]
    fn a_clock_that_stands_still_is_an_error() {
        let mut now_ns = 0;
        let mut read = || {
            now_ns += 1_000_000;
            Ok((7, now_ns))
        };
        assert!(matches!(edges(&mut read), Err(ClockError::Still(_))));
        assert_eq!(nearest_tick(5_000_000.0), None);
    }
}
