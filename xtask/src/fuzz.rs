//! `cargo xtask fuzz`: libFuzzer over the parser and the pipeline, with the pinned stable compiler.
//!
//! Coverage comes from LLVM's sanitizer passes, enabled by stable code generation flags. The address sanitizer would need
//! nightly, and the fuzzed code has no `unsafe`. The corpus is kept in the target directory between runs. A run starts from
//! seeds that reach every reason, and from `tests/fuzz/cases`: inputs that once crashed. The tests of `affinity-fuzz` replay
//! these.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, command, output, root, run as run_command, target_dir};

/// The flags that cargo-fuzz passes, without the address sanitizer.
const RUSTFLAGS: [&str; 8] = [
    "--cfg=fuzzing",
    "-Ccodegen-units=1",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    // Keeps comparisons in separate branches, so that coverage distinguishes them.
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
];

/// Longer inputs find nothing more: this fits a state, and a frame with all the headers that are parsed.
const MAX_INPUT_BYTES: u32 = 512;

/// Builds the fuzz target and runs it for this long.
pub(crate) fn run(duration: Duration) -> Result<()> {
    let dir = target_dir()?.join("fuzz");
    let program = build(&dir)?;
    let [corpus, crashes, seeds] = ["corpus", "crashes", "seeds"].map(|name| dir.join(name));
    run_command(cargo(["run", "--quiet", "--package", "affinity-fuzz", "--bin", "seeds", "--"]).arg(&seeds))?;
    for dir in [&corpus, &crashes] {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }

    let log = dir.join("log");
    println!("fuzzing for {} s", duration.as_secs());
    let status = command(program)
        .arg(format!("-max_total_time={}", duration.as_secs()))
        .arg(format!("-max_len={MAX_INPUT_BYTES}"))
        .arg(format!("-artifact_prefix={}/", crashes.display()))
        .args(["-verbosity=0", "-print_final_stats=1", "-timeout=5"])
        .args([&corpus, &seeds])
        .arg(root().join("tests/fuzz/cases"))
        .stderr(fs::File::create(&log)?)
        .status()
        .context("the fuzz target does not start")?;
    let log = fs::read(log)?;
    let log = String::from_utf8_lossy(&log);
    if !status.success() {
        bail!(
            "the fuzz target failed ({status}):\n{log}\nThe input is in {}. Copy it to tests/fuzz/cases under a name \
             that says what it shows: `cargo test --package affinity-fuzz` replays it",
            crashes.display()
        );
    }
    log.lines().filter_map(|line| line.strip_prefix("stat::")).for_each(|line| println!("{line}"));
    Ok(())
}

/// Builds in a separate target directory: otherwise the flags would cause everything else to be rebuilt.
fn build(dir: &Path) -> Result<PathBuf> {
    // The target is named, although it is the host, so that the flags do not apply to build scripts.
    let host = output(command("rustc").args(["--print", "host-tuple"]))?;
    let host = host.trim_end();
    run_command(
        cargo(["build", "--quiet", "--release", "--package", "affinity-fuzz", "--features", "libfuzzer"])
            .args(["--bin", "affinity-fuzz"])
            .args(["--target", host, "--target-dir"])
            .arg(dir)
            .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"))
            .env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true")
            .env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "true"),
    )?;
    Ok(dir.join(host).join("release/affinity-fuzz"))
}
