//! Why a map could not be created, and what to do about it.

use std::{fmt, io};

use aya::{EbpfError, maps::MapError};

use super::{LoadError, Memory, Sizes, cost, mib, needed};

/// The kernel refused to create a map.
#[derive(Debug, thiserror::Error)]
#[error("map {name} ({} MiB) cannot be made: {source}: {advice}", mib(*bytes))]
pub struct CreationError {
    /// The map.
    name: String,
    /// The bytes that it would take.
    bytes: u64,
    /// The system's error.
    source: io::Error,
    advice: Advice,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Advice {
    /// All tables together take these bytes, and this memory is available.
    Smaller { bytes: u64, memory: Memory },
    /// The kernel has a limit of its own.
    Fewer,
    /// The process lacks rights.
    Rights,
    /// The kernel's log may say more.
    Report,
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Smaller { bytes, memory } => write!(
                f,
                "all tables together take {} MiB of {memory}: lower --max-sessions and --max-flows, or allow it more \
                 memory (`affinity check` says what sizes take)",
                mib(*bytes)
            ),
            Self::Fewer => f.write_str("this kernel makes no map of that size: lower the --max option for it"),
            Self::Rights => f.write_str(
                "run it as root or with CAP_BPF; before Linux 5.11 the limit of locked memory counts too (`ulimit -l \
                 unlimited`)",
            ),
            Self::Report => f.write_str("see the kernel's log, and report it with the output of `affinity check`"),
        }
    }
}

impl Advice {
    /// The advice for an error of bpf(2).
    fn of(source: &io::Error, bytes: u64) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOMEM) => Self::Smaller { bytes, memory: Memory::of_this_process() },
            Some(libc::E2BIG | libc::EINVAL) => Self::Fewer,
            Some(libc::EPERM) => Self::Rights,
            Some(_) | None => Self::Report,
        }
    }
}

/// The error of a load with tables of these sizes. If a map could not be created, its size and advice are added.
pub(super) fn failed(error: EbpfError, sizes: &Sizes) -> LoadError {
    let EbpfError::MapError(MapError::CreateError { name, io_error }) = error else { return error.into() };
    let costs = needed(sizes).unwrap_or_default();
    let of_map = |wanted: &str| costs.iter().find(|(found, _)| *found == wanted).map_or(0, |(_, map)| cost(map));
    let all = costs.iter().map(|(_, map)| cost(map)).sum();
    let advice = Advice::of(&io_error, all);
    CreationError { bytes: of_map(&name), name, source: io_error, advice }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(map: &str, errno: i32) -> String {
        let io_error = io::Error::from_raw_os_error(errno);
        let error = MapError::CreateError { name: map.to_owned(), io_error };
        failed(error.into(), &Sizes::of_memory(Memory { total: 8 << 30, limit: None })).to_string()
    }

    #[test]
    fn an_error_names_the_map_its_size_the_errno_and_what_to_do() {
        let text = refused("flows_v6", libc::ENOMEM);
        assert!(text.starts_with("map flows_v6 ("), "{text}");
        for part in
            ["MiB) cannot be made", "(os error 12)", "all tables together take", "--max-sessions and --max-flows"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("(0 MiB)"), "{text}");
        assert!(refused("slots", libc::E2BIG).contains("(os error 7): this kernel makes no map of that size"));
        assert!(refused("slots", libc::EPERM).contains("(os error 1): run it as root or with CAP_BPF"));
        assert!(refused("slots", libc::EIO).contains("(os error 5): see the kernel's log"));
    }
}
