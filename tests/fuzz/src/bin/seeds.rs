//! Writes the seeds into the directory in its argument, one file each.

use std::{env, fs, io, path::PathBuf};

fn main() -> io::Result<()> {
    let dir = env::args_os().nth(1).map(PathBuf::from);
    let dir = dir.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "usage: seeds DIRECTORY"))?;
    fs::create_dir_all(&dir)?;
    affinity_fuzz::seeds::seeds().into_iter().try_for_each(|(name, input)| fs::write(dir.join(name), input))
}
