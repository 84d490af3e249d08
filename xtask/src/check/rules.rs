//! The rules of the source tree that no lint checks.

use std::{fs, io, path::Path};

use anyhow::{Context as _, Result, bail};

use super::code::{code_only, functions, line_at, words};
use crate::run::{command, output, root};

/// Only files whose paths begin so may have `unsafe` code. ARCHITECTURE.md gives the purpose of each.
const UNSAFE_PATHS: [&str; 3] = ["affinity-common/src/abi.rs", "affinity-ebpf/src/kernel", "affinity-user/src/sys"];

/// The longest function that a reader can still keep in mind.
const FUNCTION_LINES: usize = 70;

/// Open work is an issue, not a comment. Split, so that this file does not break the rule itself.
const POSTPONED: [&str; 2] = [concat!("TO", "DO"), concat!("FIX", "ME")];

/// The first bytes of object files, archives, LLVM bitcode and WebAssembly.
const OBJECT_MAGIC: [&[u8]; 4] = [b"\x7fELF", b"!<arch>\n", b"BC\xc0\xde", b"\0asm"];

/// Applies every rule to every file that git tracks or would add; lists all violations.
pub(super) fn check() -> Result<()> {
    let files = output(
        command("git")
            // A checkout in a container may belong to another user.
            .args(["-c", "safe.directory=*", "ls-files", "-z"])
            .args(["--cached", "--others", "--exclude-standard"]),
    )?;
    let mut breaches = Vec::new();
    let mut count = 0;
    for name in files.split_terminator('\0') {
        let content = match fs::read(root().join(name)) {
            Ok(content) => content,
            // Removed without a commit yet; or a link to a directory.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::IsADirectory) => continue,
            Err(error) => return Err(error).context(name.to_owned()),
        };
        count += 1;
        breaches.extend(breaches_in(name, &content));
    }
    if breaches.is_empty() {
        println!("{count} files keep the rules");
        return Ok(());
    }
    bail!("{} breaches of the rules:\n{}", breaches.len(), breaches.join("\n"));
}

/// The violations in one file, as `path:line: what is wrong`.
fn breaches_in(name: &str, content: &[u8]) -> Vec<String> {
    if OBJECT_MAGIC.iter().any(|magic| content.starts_with(magic)) {
        return vec![format!("{name}: a compiled object: build it instead")];
    }
    let Ok(text) = str::from_utf8(content) else { return Vec::new() };
    let mut breaches = postponed(name, text);
    if Path::new(name).extension().is_some_and(|extension| extension == "rs") {
        let code = code_only(text);
        breaches.extend(unsafe_code(name, &code));
        breaches.extend(long_functions(name, &code));
    }
    breaches
}

fn postponed(name: &str, text: &str) -> Vec<String> {
    let found = words(text).filter(|(_, word)| POSTPONED.contains(word));
    found.map(|(at, word)| format!("{name}:{}: {word}: open an issue", line_at(text, at))).collect()
}

fn unsafe_code(name: &str, code: &str) -> Vec<String> {
    if UNSAFE_PATHS.iter().any(|path| name.starts_with(path)) {
        return Vec::new();
    }
    let found = words(code).filter(|(_, word)| *word == "unsafe");
    found.map(|(at, _)| format!("{name}:{}: `unsafe` outside {UNSAFE_PATHS:?}", line_at(code, at))).collect()
}

fn long_functions(name: &str, code: &str) -> Vec<String> {
    let long = functions(code).into_iter().filter(|function| function.lines > FUNCTION_LINES);
    long.map(|f| format!("{name}:{}: `{}` has {} lines, over {FUNCTION_LINES}", f.line, f.name, f.lines)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_finds_its_breach() {
        let long = format!("fn long() {{\n{}}}\n", "    step();\n".repeat(69));
        let later = format!("a\nb {}: c\n", POSTPONED[0]);
        for (name, content, breach) in [
            ("x.rs", "fn f() {\n    unsafe { g() }\n}\n", "x.rs:2: `unsafe` outside"),
            ("x.rs", &long, "x.rs:1: `long` has 71 lines, over 70"),
            ("x.md", &later, "x.md:2: "),
            ("x", "\x7fELF\x02", "x: a compiled object"),
        ] {
            let found = breaches_in(name, content.as_bytes());
            assert!(matches!(&found[..], [one] if one.starts_with(breach)), "{name}: {found:?}");
        }
    }

    #[test]
    fn what_keeps_the_rules_is_left_alone() {
        let just_long_enough = format!("fn long() {{\n{}}}\n", "    step();\n".repeat(68));
        for (name, content) in [
            ("affinity-user/src/sys/bpf.rs", "unsafe { f() }"),
            ("affinity-ebpf/src/kernel/bytes.rs", "unsafe { f() }"),
            ("x.rs", "// unsafe\n#![deny(unsafe_code)]\nconst S: &str = \"unsafe\";"),
            ("x.rs", just_long_enough.as_str()),
            ("x.bin", "\0\u{1}"),
        ] {
            assert_eq!(breaches_in(name, content.as_bytes()), [""; 0], "{name}");
        }
    }
}
