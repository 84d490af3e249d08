//! One agent for each pin directory, whatever the spelling of its path.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{self, Component, Path, PathBuf},
    process,
};

/// The directory of the locks. A reboot empties it, like the pins.
const DIRECTORY: &str = "/run/affinity";

/// The lock cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("{pins}: an affinity agent already runs here (process {pid}): stop it first, or use another --pin-dir")]
    Taken {
        /// The pin directory.
        pins: String,
        /// Its process id, as it wrote it.
        pid: String,
    },
    /// The lock file cannot be used.
    #[error("{path}: {source}")]
    File {
        /// The lock file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// Held until this is dropped. The kernel releases it when the process ends, even if it is killed.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes the lock of a pin directory.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn take(pins: &Path) -> Result<Self, LockError> {
        let path = Path::new(DIRECTORY).join(format!("{}.lock", file_name(&canonical(pins))));
        let failed = |source| LockError::File { path: path.clone(), source };
        fs::create_dir_all(DIRECTORY).map_err(failed)?;
        loop {
            let mut options = File::options();
            let mut file = options.read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut pid = String::new();
                    file.read_to_string(&mut pid).map_err(failed)?;
                    return Err(LockError::Taken { pins: pins.display().to_string(), pid: pid.trim().to_owned() });
                }
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
            // The former holder may have removed the file between opening and locking.
            if is_still_at(&file, &path).map_err(failed)? {
                file.set_len(0).and_then(|()| writeln!(file, "{}", process::id())).map_err(failed)?;
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed while the lock is held, so it cannot be another process's file. A leftover file does no harm.
        let _ = fs::remove_file(&self.path);
    }
}

fn is_still_at(file: &File, path: &Path) -> io::Result<bool> {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        there => Ok(identity(there?) == identity(file.metadata()?)),
    }
}

/// The path without links, `.` and `..`. If the directory does not exist yet, links are resolved in the part that exists.
fn canonical(pins: &Path) -> PathBuf {
    let absolute = path::absolute(pins).unwrap_or_else(|_| pins.to_owned());
    let exists = absolute.ancestors().find_map(|dir| Some((dir, fs::canonicalize(dir).ok()?)));
    let Some((existing, mut canonical)) = exists else { return absolute };
    for component in absolute.strip_prefix(existing).into_iter().flat_map(Path::components) {
        match component {
            Component::ParentDir => _ = canonical.pop(),
            Component::Normal(name) => canonical.push(name),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    canonical
}

/// A pin directory as one file name: a slash becomes a dash, other characters than letters and digits become their codes.
fn file_name(pins: &Path) -> String {
    let mut name = String::new();
    for byte in pins.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' if name.is_empty() => {}
            b'/' => name.push('-'),
            byte if byte.is_ascii_alphanumeric() => name.push(char::from(*byte)),
            byte => name.push_str(&format!("%{byte:02x}")),
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_directory_has_the_same_lock() {
        let dir = std::env::temp_dir().join(format!("affinity-lock-{}", process::id()));
        fs::create_dir_all(dir.join("pins")).unwrap();
        let link = dir.join("link");
        std::os::unix::fs::symlink(&dir, &link).unwrap();
        let expected = fs::canonicalize(&dir).unwrap().join("pins");
        let shown = dir.display();
        for spelling in ["pins", "pins/", "/pins", "./pins", "pins/.", "pins/../pins", "no/../pins"] {
            assert_eq!(canonical(Path::new(&format!("{shown}/{spelling}"))), expected, "{spelling}");
            assert_eq!(canonical(&link.join(spelling.trim_start_matches('/'))), expected, "link/{spelling}");
        }
        // The directory need not exist.
        fs::remove_dir(dir.join("pins")).unwrap();
        assert_eq!(canonical(&link.join("pins/")), expected);
        fs::remove_dir_all(&dir).unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(canonical(Path::new("no-such-directory")), here.join("no-such-directory"));
    }

    #[test]
    fn different_directories_have_different_locks() {
        assert_eq!(file_name(Path::new("/sys/fs/bpf/affinity")), "sys-fs-bpf-affinity");
        assert_ne!(file_name(Path::new("/a/b-c")), file_name(Path::new("/a/b/c")));
        assert_eq!(file_name(Path::new("/a/b-c")), "a-b%2dc");
    }
}
