//! Derives a clock from this kernel's jiffies.
//!
//! Reading jiffies is several times cheaper for a program than reading the monotonic clock, and a jiffy is precise enough for
//! all that affinity decides. The kernel advances jiffies by whole ticks of the monotonic clock, so one measurement at load
//! stays valid: `(jiffies - tick_base) * tick_ns` is the monotonic time, at most two ticks late and never early. The length of
//! a tick is the resolution of the coarse clocks (`posix_get_coarse_res`).

use std::{os::fd::BorrowedFd, time::Duration};

use rustix::time::{ClockId, clock_getres};

use crate::sys::{self, SysError};

/// How many changes of jiffies are measured: some are seen late if a hypervisor takes the processor away.
const EDGES: usize = 5;

/// The clock could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// The program could not be run.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The program failed.
    #[error("the clock program returned {0}")]
    Program(u32),
    /// Jiffies do not change.
    #[error("jiffies did not change within {0:?}")]
    Still(Duration),
}

/// The kernel's jiffies as a clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticks {
    /// Nanoseconds per jiffy.
    pub tick_ns: u64,
    /// Jiffies when the monotonic clock was zero; wrapping.
    pub tick_base: u64,
    /// Whether `bpf_l4_csum_replace` accepts `BPF_F_IPV6`: the clock program tests that too.
    pub takes_ipv6_flag: bool,
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

/// Reads both clocks with the program [`affinity_common::names::CLOCK`].
///
/// # Errors
/// [`ClockError`].
pub(super) fn measure(clock: BorrowedFd<'_>) -> Result<Ticks, ClockError> {
    let tick_ns = clock_getres(ClockId::MonotonicCoarse).tv_nsec as u64;
    Ok(Ticks { takes_ipv6_flag: takes_ipv6_flag(clock)?, ..align(&edges(|| read(clock))?, tick_ns) })
}

/// Whether the kernel's `bpf_l4_csum_replace` accepts `BPF_F_IPV6`: the clock program returns that too.
///
/// # Errors
/// [`ClockError`].
fn takes_ipv6_flag(clock: BorrowedFd<'_>) -> Result<bool, ClockError> {
    run(clock).map(|[_, _, takes]| takes != 0)
}

fn read(clock: BorrowedFd<'_>) -> Result<Reading, ClockError> {
    run(clock).map(|[jiffies, now_ns, _]| (jiffies, now_ns))
}

fn run(clock: BorrowedFd<'_>) -> Result<[u64; 3], ClockError> {
    let run = sys::test_run(clock, &[0; 64], 1)?;
    if run.retval != 0 {
        return Err(ClockError::Program(run.retval));
    }
    let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| run.data_out[at + byte]));
    Ok([word(0), word(8), word(16)])
}

/// The readings right after a change of jiffies. On a busy machine they are far apart, so the time limit is for each of them.
fn edges(mut read: impl FnMut() -> Result<Reading, ClockError>) -> Result<Vec<Reading>, ClockError> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let mut last = read()?;
    let mut edges = Vec::new();
    while edges.len() < EDGES {
        let now = read()?;
        if now.0 != last.0 {
            edges.push(now);
            last = now;
        } else if now.1 - last.1 > PATIENCE.as_nanos() as u64 {
            return Err(ClockError::Still(PATIENCE));
        }
    }
    Ok(edges)
}

/// Aligns the base with the earliest edge: the others were seen late.
fn align(edges: &[Reading], tick_ns: u64) -> Ticks {
    let (first, _) = edges[0];
    let at_first = |&(jiffies, now_ns): &Reading| now_ns - (jiffies - first) * tick_ns;
    let earliest_ns = edges.iter().map(at_first).min().unwrap_or(0);
    Ticks { tick_ns, tick_base: first.wrapping_sub(earliest_ns / tick_ns), takes_ipv6_flag: false }
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
    fn at_every_frequency_the_clock_is_never_early() {
        for hz in [100, 128, 250, 256, 300, 512, 1000, 1024, 1200] {
            let mut read = kernel(hz, 2_700);
            let tick_ns = (1_000_000_000 + hz / 2) / hz;
            let ticks = align(&edges(&mut read).unwrap(), tick_ns);
            for _ in 0..100_000 {
                let (jiffies, now_ns) = read().unwrap();
                let late_ns = now_ns - ticks.now_ns(jiffies);
                assert!(late_ns < 2 * tick_ns, "{hz} Hz: {late_ns} ns late");
            }
        }
    }

    #[test]
    fn this_kernel_has_a_tick() {
        let tick_ns = clock_getres(ClockId::MonotonicCoarse).tv_nsec;
        assert!((800_000..=10_000_000).contains(&tick_ns), "{tick_ns} ns");
    }

    #[test]
    fn the_clock_is_measured_on_a_busy_machine() {
        // Another program runs before every third reading.
        let mut read = kernel(250, 100_000);
        let mut readings = 0;
        let busy = || {
            readings += 1;
            (1..if readings % 3 == 0 { 5_000 } else { 1 }).try_for_each(|_| read().map(drop))?;
            read()
        };
        assert_eq!(edges(busy).unwrap().len(), EDGES);
    }

    #[test]
    fn a_clock_that_stands_still_is_an_error() {
        let mut now_ns = 0;
        let read = || {
            now_ns += 1_000_000;
            Ok((7, now_ns))
        };
        assert!(matches!(edges(read), Err(ClockError::Still(_))));
    }
}
