//! The rules of the source tree that no lint checks.

use anyhow::{Result, bail};

use super::files::File;

/// Only files whose paths begin so may opt out of the lint against `unsafe`. ARCHITECTURE.md gives the purpose of each.
const UNSAFE_PATHS: [&str; 3] = ["affinity-common/src/abi/pod.rs", "affinity-ebpf/src/kernel", "affinity-user/src/sys"];

/// The lint. Split, as the next ones, so that this file does not break the rules itself.
const UNSAFE_LINT: &str = concat!("unsafe", "_code");

/// Remaining work is an issue, not a comment.
const POSTPONED: [&str; 2] = [concat!("TO", "DO"), concat!("FIX", "ME")];

/// The first bytes of object files, archives, LLVM bitcode and WebAssembly.
const OBJECT_MAGIC: [&[u8]; 4] = [b"\x7fELF", b"!<arch>\n", b"BC\xc0\xde", b"\0asm"];

/// Applies every rule to every file; lists all violations.
pub(super) fn check(files: &[File]) -> Result<()> {
    let breaches: Vec<_> = files.iter().flat_map(|file| breaches_in(&file.path, &file.content)).collect();
    if breaches.is_empty() {
        println!("{} files follow the rules", files.len());
        return Ok(());
    }
    bail!("{} violations of the rules:\n{}", breaches.len(), breaches.join("\n"));
}

/// The violations in one file, as `path:line: what is wrong`.
fn breaches_in(path: &str, content: &[u8]) -> Vec<String> {
    if OBJECT_MAGIC.iter().any(|magic| content.starts_with(magic)) {
        return vec![format!("{path}: a compiled object: build it instead")];
    }
    let lines = str::from_utf8(content).unwrap_or_default().lines().zip(1..);
    lines.filter_map(|(line, number)| Some(format!("{path}:{number}: {}", breach(path, line)?))).collect()
}

fn breach(path: &str, line: &str) -> Option<String> {
    if let Some(word) = POSTPONED.iter().find(|word| line.contains(**word)) {
        return Some(format!("{word}: open an issue"));
    }
    let may_opt_out = !path.ends_with(".rs") || UNSAFE_PATHS.iter().any(|start| path.starts_with(start));
    (!may_opt_out && line.contains(UNSAFE_LINT)).then(|| format!("`unsafe` outside {UNSAFE_PATHS:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_finds_its_violation() {
        let opts_out = format!("//! A module.\n#![expect({UNSAFE_LINT}, reason = \"speed\")]\n");
        let later = format!("a\nb {}: c\n", POSTPONED[0]);
        for (path, content, breach) in [
            ("x.rs", opts_out.as_str(), "x.rs:2: `unsafe` outside"),
            ("x.md", &later, "x.md:2: "),
            ("x", "\x7fELF\x02", "x: a compiled object"),
        ] {
            let found = breaches_in(path, content.as_bytes());
            assert!(matches!(&found[..], [one] if one.starts_with(breach)), "{path}: {found:?}");
        }
    }

    #[test]
    fn code_that_keeps_the_rules_passes() {
        let opts_out = format!("#![expect({UNSAFE_LINT}, reason = \"system calls\")]");
        let denies = format!("{UNSAFE_LINT} = \"deny\"");
        for (path, content) in [
            ("affinity-user/src/sys.rs", opts_out.as_str()),
            ("affinity-user/src/sys/bpf.rs", &opts_out),
            ("Cargo.toml", &denies),
            ("x.rs", "// unsafe: only a word"),
            ("x.bin", "\0\u{1}"),
        ] {
            assert_eq!(breaches_in(path, content.as_bytes()), [""; 0], "{path}");
        }
    }
}
