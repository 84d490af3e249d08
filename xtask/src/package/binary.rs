//! The static binary.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use super::VERSION;
use crate::{
    run::{cargo, command, output, root, run as run_command, target_dir},
    setup::PACKAGE_TARGET,
};

const PROFILE: &str = "dist";

/// Builds it, and returns its path.
pub(super) fn build() -> Result<PathBuf> {
    let target = target_dir()?;
    run_command(
        cargo(["build", "--package", "affinity-user", "--bin", "affinity", "--locked"])
            .args(["--profile", PROFILE, "--target", PACKAGE_TARGET, "--target-dir"])
            .arg(&target)
            .env("CARGO_ENCODED_RUSTFLAGS", rustflags()?.join("\x1f")),
    )?;
    Ok(target.join(PACKAGE_TARGET).join(PROFILE).join("affinity"))
}

/// Paths in panic messages look as if everything had been built in one place.
fn rustflags() -> Result<[String; 4]> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home =
        home.or_else(|| Some(env::home_dir()?.join(".cargo"))).context("no CARGO_HOME, and no home directory")?;
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let sysroot = output(command("rustc").args(["--print", "sysroot"]))?;
    Ok([
        "-Ctarget-feature=+crt-static".to_owned(),
        remap(&home, "/cargo"),
        remap(Path::new(sysroot.trim_end()), "/rust"),
        remap(&root(), "/affinity"),
    ])
}

/// Checks that it is static and has the right version, and prints its size.
pub(super) fn check(binary: &Path) -> Result<()> {
    let bytes = fs::read(binary).with_context(|| binary.display().to_string())?;
    ensure!(is_static(&bytes)?, "{}: not static, it needs a dynamic linker", binary.display());
    let version = output(command(binary).arg("--version"))?;
    ensure!(version.trim_end() == format!("affinity {VERSION}"), "--version: {version}");
    println!("{}: static, {:.1} MB, {}", binary.display(), bytes.len() as f64 / 1e6, version.trim_end());

    println!("affinity check, on this machine:");
    let status = command(binary).arg("check").status().context("affinity check")?;
    // The findings are about the machine; that it can report them is about the binary.
    ensure!(matches!(status.code(), Some(0 | 1)), "affinity check: {status}");
    Ok(())
}

/// Whether a 64-bit little-endian ELF file runs without an interpreter.
fn is_static(elf: &[u8]) -> Result<bool> {
    const INTERPRETER: u32 = 3;
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit ELF file");
    let number = |at: usize, length: usize| -> Result<usize> {
        let bytes = elf.get(at..at + length).context("the file is truncated")?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    };
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for header in 0..count {
        if number(table + header * size, 4)? == INTERPRETER as usize {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The beginning of an ELF file with headers of these types, one after the other.
    fn elf(types: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 64];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (file[32], file[54], file[56]) = (64, 56, types.len() as u8);
        for kind in types {
            file.push(*kind);
            file.extend([0; 55]);
        }
        file
    }

    #[test]
    fn an_interpreter_is_found() {
        assert!(is_static(&elf(&[6, 1, 2])).expect("an ELF file"));
        assert!(!is_static(&elf(&[6, 1, 3])).expect("an ELF file"));
        assert!(is_static(&elf(&[6, 1])[..100]).is_err());
        assert!(is_static(b"#!/bin/sh").is_err());
    }

    #[test]
    fn this_test_is_not_static() {
        let program = fs::read(env::current_exe().expect("a path")).expect("a file");
        assert_eq!(is_static(&program).expect("an ELF file"), cfg!(target_feature = "crt-static"));
    }
}
