//! `cargo xtask package`: the release artifacts, in `package/` of the target directory.
//!
//! A binary that needs no library of the machine it runs on; a tarball with it, its licences, its documents and the manifests
//! for a cluster; and an image with only the binary, if a container engine runs. The same commit produces the same tarball,
//! byte for byte: it contains no time, user or directory of the machine that built it.

mod binary;
mod image;
mod tarball;
mod third_party;

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

/// Contents of the tarball in addition to the binary and the generated files, by path in the repository.
const DOCUMENTS: [&str; 6] = ["CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT", "README.md", "deploy", "docs"];

/// Shells, and the file names that they use for completions.
const COMPLETIONS: [(&str, &str); 3] = [("bash", "affinity.bash"), ("fish", "affinity.fish"), ("zsh", "_affinity")];

/// Builds, checks the result, and packs it.
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
    let (completions, manual) = (stage.join("completions"), stage.join("man"));
    for directory in [&completions, &manual] {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    }
    fs::copy(binary, stage.join("affinity")).context("the binary")?;
    run_command(command("cp").arg("--recursive").args(DOCUMENTS).arg(stage))?;
    for (shell, file) in COMPLETIONS {
        let script = output(command(binary).args(["completions", shell]))?;
        fs::write(completions.join(file), script).with_context(|| file.to_owned())?;
    }
    run_command(command(binary).arg("man").arg(manual))?;
    fs::write(stage.join("THIRD-PARTY"), third_party::render()?).context("THIRD-PARTY")
}
