//! What the kernel refused. A program: the reason in one line, and the verifier's log in a file. A map: why it could not be
//! created, and what to do about it.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    process,
};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

use super::{LoadError, Memory, Sizes, cost, mib, needed};

/// The directory of the agent's files. The verifier's logs go there if possible, otherwise to the temporary directory.
const DIRECTORY: &str = "/run/affinity";

/// What to do if the kernel does not compile programs.
pub(crate) const JIT_ADVICE: &str = "turn it on: `sysctl -w net.core.bpf_jit_enable=1`";

/// Lines that the verifier writes after its verdict, by their beginning: `print_verification_stats` in
/// <https://elixir.bootlin.com/linux/v6.12/source/kernel/bpf/verifier.c>.
const STATISTICS: [&str; 3] = ["processed ", "verification time ", "stack depth "];

/// A program that the kernel rejected, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The program.
    pub program: &'static str,
    /// The verifier's last meaningful line, or the system's error if the verifier wrote nothing.
    pub reason: String,
    /// The file with the whole log; none if there is no log, or if it could not be written.
    pub log: Option<PathBuf>,
}

impl Refusal {
    /// From the error of loading the program. Writes the verifier's log to a file.
    pub(super) fn new(program: &'static str, error: &ProgramError) -> Self {
        let ProgramError::LoadError { io_error, verifier_log } = error else {
            return Self { program, reason: error.to_string(), log: None };
        };
        let log = verifier_log.to_string();
        let reason = reason(&log, io_error);
        let file = if log.trim().is_empty() { None } else { write_log(program, &log).ok() };
        Self { program, reason, log: file }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "this kernel rejects the program {}: {}", self.program, self.reason)?;
        match &self.log {
            Some(log) => write!(f, " (the verifier's log: {})", log.display()),
            None => Ok(()),
        }
    }
}

/// The reason, in one line.
fn reason(log: &str, error: &io::Error) -> String {
    match last_line(log) {
        Some(line) if line.contains("non-JITed") => format!("the BPF JIT is off ({line}): {JIT_ADVICE}"),
        Some(line) => line.to_owned(),
        None => error.to_string(),
    }
}

fn last_line(log: &str) -> Option<&str> {
    let is_statistics = |line: &str| STATISTICS.iter().any(|start| line.starts_with(start));
    log.lines().map(str::trim).rfind(|line| !line.is_empty() && !is_statistics(line))
}

/// In the agent's directory, which belongs to root, a log replaces the former one. In the temporary directory, where
/// others may put links, the file must be new.
fn write_log(program: &str, log: &str) -> io::Result<PathBuf> {
    let of_agent = Path::new(DIRECTORY).join(format!("{program}.verifier.log"));
    let elsewhere = std::env::temp_dir().join(format!("affinity-{}-{program}.verifier.log", process::id()));
    let write = |path: &Path| File::create_new(path)?.write_all(log.as_bytes());
    let replace = |path: &Path| -> io::Result<()> {
        fs::create_dir_all(DIRECTORY)?;
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => write(path),
        }
    };
    if replace(&of_agent).is_ok() {
        return Ok(of_agent);
    }
    write(&elsewhere).map(|()| elsewhere)
}

/// The kernel refused to create a map.
#[derive(Debug, thiserror::Error)]
#[error("map {name} ({} MiB) cannot be created: {source}: {advice}", mib(*bytes))]
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
                "all tables together need {} MiB of {memory}: lower --max-sessions and --max-flows, or raise the memory \
                 limit (`affinity check` shows the memory that the tables need)",
                mib(*bytes)
            ),
            Self::Fewer => f.write_str("this kernel supports no map of that size: lower its --max-* option"),
            Self::Rights => f.write_str("run affinity as root or with CAP_BPF"),
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
pub(super) fn creation_failed(error: EbpfError, sizes: &Sizes) -> LoadError {
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

    fn why(log: &str) -> String {
        reason(log, &io::Error::from_raw_os_error(libc::EACCES))
    }

    #[test]
    fn the_reason_is_the_last_line_before_the_statistics() {
        let log = "5577: (bf) r2 = r6\n5578: (85) call bpf_map_update_elem#2\nR2 type=mem expected=fp, pkt\n\
                   processed 130076 insns (limit 1000000) max_states_per_insn 4 total_states 1 peak_states 1 mark_read 3\n";
        assert_eq!(why(log), "R2 type=mem expected=fp, pkt");
        let log = "combined stack size of 2 calls is 544. Too large\nverification time 120 usec\nstack depth 264+240\n\
                   processed 3 insns (limit 1000000) max_states_per_insn 0\n\n";
        assert_eq!(why(log), "combined stack size of 2 calls is 544. Too large");
    }

    #[test]
    fn without_a_log_the_reason_is_the_systems_answer() {
        assert_eq!(why(""), "Permission denied (os error 13)");
        assert_eq!(why("processed 0 insns (limit 1000000)\n"), "Permission denied (os error 13)");
    }

    #[test]
    fn a_refusal_without_the_jit_says_how_to_turn_it_on() {
        let why = why("tail_calls are not allowed in non-JITed programs with bpf-to-bpf calls\nprocessed 0 insns\n");
        assert!(why.starts_with("the BPF JIT is off") && why.ends_with(JIT_ADVICE), "{why}");
    }

    fn refused(map: &str, errno: i32) -> String {
        let io_error = io::Error::from_raw_os_error(errno);
        let error = MapError::CreateError { name: map.to_owned(), io_error };
        creation_failed(error.into(), &Sizes::of_memory(Memory { total: 8 << 30, limit: None })).to_string()
    }

    #[test]
    fn an_error_names_the_map_its_size_the_errno_and_what_to_do() {
        let text = refused("flows_v6", libc::ENOMEM);
        assert!(text.starts_with("map flows_v6 ("), "{text}");
        for part in
            ["MiB) cannot be created", "(os error 12)", "all tables together need", "--max-sessions and --max-flows"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("(0 MiB)"), "{text}");
        assert!(refused("slots", libc::E2BIG).contains("(os error 7): this kernel supports no map of that size"));
        assert!(refused("slots", libc::EPERM).contains("(os error 1): run affinity as root or with CAP_BPF"));
        assert!(refused("slots", libc::EIO).contains("(os error 5): see the kernel's log"));
    }
}
