//! A tarball that depends only on its contents.

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
            // Without the name and the time of the compressed file.
            .args(["--use-compress-program", "gzip --no-name --best", name]),
    )?;
    let digest = output(command("sha256sum").current_dir(directory).arg(&file))?;
    let size = directory.join(&file).metadata().with_context(|| file.clone())?.len();
    println!("{}: {:.1} MB", directory.join(&file).display(), size as f64 / 1e6);
    print!("{digest}");
    Ok(())
}

/// The modification time of every file in it, in seconds: `SOURCE_DATE_EPOCH`, or that of the last commit.
fn epoch() -> Result<String> {
    if let Ok(epoch) = env::var("SOURCE_DATE_EPOCH") {
        return Ok(epoch);
    }
    let epoch = output(command("git").args(["-c", "safe.directory=*", "log", "-1", "--format=%ct"]));
    Ok(epoch.context("not in a git repository: set SOURCE_DATE_EPOCH")?.trim_end().to_owned())
}
