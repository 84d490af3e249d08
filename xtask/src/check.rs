//! `cargo xtask check`: what needs no test to be seen to be wrong.

mod code;
mod rules;

use anyhow::Result;

use crate::{
    run::{cargo, run as run_command, target_dir},
    steps::Steps,
};

/// The flags that affinity-user/build.rs gives the kernel programs, as far as lints see them.
const EBPF_RUSTFLAGS: &str = "-Ctarget-cpu=v3\x1f--cfg=bpf_target_arch=\"x86_64\"";

/// Checks format, lints, documentation and the rules of the source tree, cheapest first.
pub(crate) fn run(steps: &mut Steps) -> Result<()> {
    steps.step("format", || run_command(&mut cargo(["fmt", "--all", "--check"])))?;
    steps.step("source rules", rules::check)?;
    steps.step("lints", || {
        run_command(cargo(["clippy", "--workspace", "--exclude", "affinity-ebpf"]).args([
            "--all-targets",
            "--",
            "--deny",
            "warnings",
        ]))
    })?;
    steps.step("lints of the kernel programs", || {
        run_command(
            cargo(["clippy", "--package", "affinity-ebpf", "--bins", "--release"])
                .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core"])
                .arg("--target-dir")
                .arg(target_dir()?.join("clippy-ebpf"))
                .args(["--", "--deny", "warnings"])
                .env("RUSTC_BOOTSTRAP", "1")
                .env("CARGO_ENCODED_RUSTFLAGS", EBPF_RUSTFLAGS),
        )
    })?;
    steps.step("documentation", || {
        run_command(
            cargo(["doc", "--no-deps", "--document-private-items", "--workspace"])
                .args(["--exclude", "affinity-ebpf"])
                .env("RUSTDOCFLAGS", "-Dwarnings"),
        )
    })
}
