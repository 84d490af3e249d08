//! The files of the repository.

use std::{fs, io};

use anyhow::{Context as _, Result};

use crate::run::{command, output, root};

/// A file that git tracks or would add.
pub(super) struct File {
    /// Its path in the repository.
    pub(super) path: String,
    pub(super) content: Vec<u8>,
}

/// Reads all of them.
pub(super) fn read() -> Result<Vec<File>> {
    let paths = output(
        command("git")
            // A checkout in a container may belong to another user.
            .args(["-c", "safe.directory=*", "ls-files", "-z"])
            .args(["--cached", "--others", "--exclude-standard"]),
    )?;
    let mut files = Vec::new();
    for path in paths.split_terminator('\0') {
        match fs::read(root().join(path)) {
            Ok(content) => files.push(File { path: path.to_owned(), content }),
            // Removed without a commit yet; or a link to a directory.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::IsADirectory) => {}
            Err(error) => return Err(error).context(path.to_owned()),
        }
    }
    Ok(files)
}
