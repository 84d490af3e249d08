//! `cargo xtask check`: errors that can be found without running tests.

mod files;
mod named;
mod rules;

use std::process::Command;

use anyhow::Result;

use crate::{
    run::{cargo, run as run_command, target_dir},
    setup,
    steps::Steps,
};

/// The flags that affinity-user/build.rs sets for the kernel programs, as far as lints see them.
const EBPF_RUSTFLAGS: &str = "-Ctarget-cpu=v3\x1f--cfg=bpf_target_arch=\"x86_64\"";

/// The documentation is for developers of this code: it includes private items, and may link to them.
const RUSTDOCFLAGS: &str = "-Dwarnings -Arustdoc::private-intra-doc-links";

/// Checks formatting, the rules of the source tree, lints and documentation, cheapest first.
pub(crate) fn run(steps: &mut Steps) -> Result<()> {
    steps.step("format", || run_command(&mut cargo(["fmt", "--all", "--check"])))?;
    let files = files::read()?;
    steps.step("source rules", || rules::check(&files))?;
    steps.step("tests that are named", || named::check(&files))?;
    steps.step("dependencies", || {
        setup::install_cargo_deny()?;
        let deny =
            ["deny", "--workspace", "--locked", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"];
        run_command(&mut cargo(deny))
    })?;
    steps.step("lints", || {
        run_command(
            cargo(["clippy", "--workspace", "--exclude", "affinity-ebpf", "--all-targets"])
                .args(["--", "--deny", "warnings"]),
        )
    })?;
    steps.step("lints of the kernel programs", || {
        run_command(on_ebpf(&mut cargo(["clippy", "--bins"]))?.args(["--", "--deny", "warnings"]))
    })?;
    steps.step("documentation", || {
        let mut doc = cargo(["doc", "--no-deps", "--document-private-items"]);
        doc.env("RUSTDOCFLAGS", RUSTDOCFLAGS).args(["--workspace", "--exclude", "affinity-ebpf"]);
        run_command(&mut doc)?;

        let mut doc = cargo(["doc", "--no-deps", "--document-private-items"]);
        let flags = format!("{RUSTDOCFLAGS} --cfg=bpf_target_arch=\"x86_64\"");
        run_command(on_ebpf(&mut doc)?.env("RUSTDOCFLAGS", flags))
    })
}

/// Sets a cargo command up for the kernel programs: their target has no prebuilt `core`.
fn on_ebpf(cargo: &mut Command) -> Result<&mut Command> {
    Ok(cargo
        .args(["--package", "affinity-ebpf", "--release"])
        .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core"])
        .arg("--target-dir")
        .arg(target_dir()?.join("ebpf-checks"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", EBPF_RUSTFLAGS))
}
