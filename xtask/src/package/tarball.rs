//! A tarball that depends on nothing but what is in it.

use std::{env, path::Path};

use anyhow::{Context as _, Result};

use crate::run::{command, output, run as run_command};

/// Packs `directory/name` into `directory/name.tar.gz`, and prints its size and digest.
pub(super) fn make(directory: &Path, name: &str) -> Result<()> {
    let file = format!("{name}.tar.gz");
    run_command(
        command("tar")
            .arg("--create")
            .arg("--directory")
            .arg(directory)
            .arg("--file")
            .arg(directory.join(&file))
            .args(["--format=posix", "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"])
            .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mode=go-w"])
            .arg(format!("--mtime=@{}", epoch()?))
            // Without the name and the time of what was compressed.
            .args(["--use-compress-program", "gzip --no-name --best", name]),
    )?;
    let digest = output(command("sha256sum").current_dir(directory).arg(&file))?;
    let size = directory.join(&file).metadata().with_context(|| file.clone())?.len();
    println!("{}: {:.1} MB", directory.join(&file).display(), size as f64 / 1e6);
    print!("{digest}");
    Ok(())
}

/// The time that every file in it has, in seconds: `SOURCE_DATE_EPOCH`, or that of the last commit.
fn epoch() -> Result<String> {
    if let Ok(epoch) = env::var("SOURCE_DATE_EPOCH") {
        return Ok(epoch);
    }
    let epoch = output(command("git").args(["-c", "safe.directory=*", "log", "-1", "--format=%ct"]));
    Ok(epoch.context("outside of git, set SOURCE_DATE_EPOCH")?.trim_end().to_owned())
}
