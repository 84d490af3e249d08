//! `cargo xtask package`: what is given out, in `package/` of the target directory.
//!
//! A binary that needs no library of the machine it runs on; a tarball of it with its licences, its documents and what a
//! cluster is given; and an image of the binary alone, where a container engine runs. The same commit gives the same
//! tarball, to the byte: no time, no user and no directory of the machine that made it is in it.

mod binary;
mod image;
mod tarball;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    run::{command, output, run as run_command, target_dir},
    setup::PACKAGE_TARGET,
    steps::Steps,
};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What is in the tarball beside the binary and what is generated, by its path in the repository.
const DOCUMENTS: [&str; 6] = ["CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT", "README.md", "deploy", "docs"];

/// Shells, and what they call a file of completions.
const COMPLETIONS: [(&str, &str); 3] = [("bash", "affinity.bash"), ("fish", "affinity.fish"), ("zsh", "_affinity")];

/// Builds, looks at what was built, and wraps it up.
pub(crate) fn run(steps: &mut Steps) -> Result<()> {
    let directory = target_dir()?.join("package");
    let name = format!("affinity-{VERSION}-{}", PACKAGE_TARGET.replace("-unknown-", "-"));
    let stage = directory.join(&name);
    let mut built = PathBuf::new();
    steps.step("binary", || {
        built = binary::build()?;
        binary::check(&built)
    })?;
    steps.step("tarball", || {
        fill(&stage, &built)?;
        tarball::make(&directory, &name)
    })?;
    steps.step("image", || image::build(&stage))
}

/// Puts everything into an empty directory.
fn fill(stage: &Path, binary: &Path) -> Result<()> {
    if stage.exists() {
        fs::remove_dir_all(stage).with_context(|| stage.display().to_string())?;
    }
    let completions = stage.join("completions");
    fs::create_dir_all(&completions).with_context(|| completions.display().to_string())?;
    fs::copy(binary, stage.join("affinity")).context("the binary")?;
    run_command(command("cp").arg("--recursive").args(DOCUMENTS).arg(stage))?;
    for (shell, file) in COMPLETIONS {
        let script = output(command(binary).args(["completions", shell]))?;
        fs::write(completions.join(file), script).with_context(|| file.to_owned())?;
    }
    fs::write(stage.join("THIRD-PARTY"), binary::crates()?).context("THIRD-PARTY")
}
