//! `cargo xtask fuzz`: libFuzzer over the parser and the pipeline, with the pinned stable compiler.
//!
//! Coverage comes from LLVM's sanitizer passes, switched on by stable code generation flags; the
//! address sanitizer would need nightly, and there is no `unsafe` in what is fuzzed. What is learnt
//! is kept in the target directory from run to run. `tests/fuzz/cases` holds the inputs that once
//! crashed: they seed every run, and the tests of `affinity-fuzz` replay them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, command, output, root, run as run_command, target_dir};

/// What cargo-fuzz passes too, apart from the address sanitizer.
const RUSTFLAGS: [&str; 8] = [
    "--cfg=fuzzing",
    "-Ccodegen-units=1",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    // Keeps comparisons in branches of their own, where coverage can tell them apart.
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
];

/// Longer inputs teach nothing more: a state, and a frame with all the headers that are parsed.
const MAX_INPUT_BYTES: u32 = 512;

/// Builds the fuzz target and runs it for that long.
pub(crate) fn run(duration: Duration) -> Result<()> {
    let dir = target_dir()?.join("fuzz");
    let program = build(&dir)?;
    let (corpus, crashes) = (dir.join("corpus"), dir.join("crashes"));
    for dir in [&corpus, &crashes] {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }

    let mut fuzz = command(program);
    fuzz.arg(format!("-max_total_time={}", duration.as_secs()))
        .arg(format!("-max_len={MAX_INPUT_BYTES}"))
        .arg(format!("-artifact_prefix={}/", crashes.display()))
        .args(["-verbosity=0", "-print_final_stats=1", "-timeout=5"])
        .arg(corpus)
        .arg(root().join("tests/fuzz/cases"));
    println!("fuzzing for {} s", duration.as_secs());
    explain(&mut fuzz, &crashes)
}

/// Builds in a target directory of its own: the flags would otherwise rebuild everything else.
fn build(dir: &Path) -> Result<PathBuf> {
    // Naming the target, though it is the host, keeps the flags away from build scripts.
    let host = output(command("rustc").args(["--print", "host-tuple"]))?;
    let host = host.trim_end();
    run_command(
        cargo(["build", "--quiet", "--release", "--package", "affinity-fuzz"])
            .args(["--target", host, "--target-dir"])
            .arg(dir)
            .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"))
            .env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true")
            .env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "true"),
    )?;
    Ok(dir.join(host).join("release/affinity-fuzz"))
}

/// Runs the fuzzer; says where its finding is and what to do with it.
fn explain(fuzz: &mut Command, crashes: &Path) -> Result<()> {
    let status = fuzz.status().context("the fuzz target does not start")?;
    if status.success() {
        return Ok(());
    }
    bail!(
        "the fuzz target failed ({status}). Its input is in {}: copy it to tests/fuzz/cases under a name that \
         says what it shows, and `cargo test --package affinity-fuzz` replays it",
        crashes.display()
    )
}
