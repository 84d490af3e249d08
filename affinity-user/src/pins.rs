//! The pin directory: it keeps the dataplane alive while no agent runs.
//!
//! `DIR/vN/maps/NAME`, `DIR/vN/progs/NAME`, `DIR/vN/links/IFINDEX-HOOK`. N is the version of the map layout ([`abi::VERSION`]):
//! programs see only maps with a layout that they know.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{self, Path, PathBuf},
};

use affinity_common::abi;
use rustix::{
    fs::statfs,
    mount::{MountFlags, mount},
};
use tracing::warn;

/// `f_type` of a BPF filesystem: `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS: u32 = 0xcafe_4a11;
/// Where distributions mount it.
const BPF_MOUNT: &str = "/sys/fs/bpf";

/// The pin directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The default filesystem could not be mounted.
    #[error("no BPF filesystem at {BPF_MOUNT}, and it cannot be mounted: {0}")]
    Mount(io::Error),
    /// A directory on another filesystem.
    #[error(
        "{0} is not on a BPF filesystem: choose a directory under {BPF_MOUNT}, or mount a BPF filesystem: mount -t bpf bpf DIR"
    )]
    NotBpf(PathBuf),
    /// A file operation failed.
    #[error("{path}: {source}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl PinError {
    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { path: path.to_owned(), source }
    }
}

/// The paths of all that is pinned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PinDir {
    root: PathBuf,
    version: PathBuf,
}

impl PinDir {
    /// The default pin directory.
    pub const DEFAULT: &str = "/sys/fs/bpf/affinity";

    /// The paths under `root`. Nothing is created.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        let root = path::absolute(root).unwrap_or_else(|_| root.to_owned());
        Self { version: root.join(format!("v{}", abi::VERSION)), root }
    }

    /// The dataplanes of other layouts under the same root: they are of another version of affinity, and may still be attached.
    ///
    /// # Errors
    /// [`PinError`] if the root cannot be read.
    pub fn other_layouts(&self) -> Result<Vec<Self>, PinError> {
        let is_layout = |path: &PathBuf| layout_number(path).is_some() && *path != self.version;
        let layouts = list(&self.root)?.into_iter().filter(is_layout);
        Ok(layouts.map(|version| Self { root: self.root.clone(), version }).collect())
    }

    /// The name of the layout: `v1`.
    #[must_use]
    pub fn layout(&self) -> String {
        self.version.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The newest of [`PinDir::other_layouts`] with records that this version can use.
    ///
    /// # Errors
    /// As [`PinDir::other_layouts`].
    pub fn readable_layout(&self) -> Result<Option<Self>, PinError> {
        Ok(self.other_layouts()?.into_iter().rfind(Self::is_readable))
    }

    /// Whether this version can use the records of the layout, or convert them.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        let number = layout_number(&self.version);
        number.is_some_and(|number| (abi::OLDEST_READABLE..=abi::VERSION).contains(&number))
    }

    /// The directory that the user named.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of the maps.
    #[must_use]
    pub fn maps(&self) -> PathBuf {
        self.version.join("maps")
    }

    /// The path of a map.
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// The path of a map that is about to replace [`PinDir::map`].
    pub(crate) fn next_map(&self, name: &str) -> PathBuf {
        self.maps().join(format!("{name}{NEXT}"))
    }

    /// The path of a program.
    #[must_use]
    pub fn prog(&self, name: &str) -> PathBuf {
        self.version.join("progs").join(name)
    }

    /// The directory of the links.
    #[must_use]
    pub fn links(&self) -> PathBuf {
        self.version.join("links")
    }

    /// Whether a dataplane of this layout exists.
    ///
    /// # Errors
    /// The system's error if that cannot be determined, usually for lack of permission.
    pub fn exists(&self) -> io::Result<bool> {
        self.maps().try_exists()
    }

    /// Creates the directories. Mounts the BPF filesystem at its usual place if it is missing, as in a container or right after
    /// boot.
    ///
    /// # Errors
    /// [`PinError`].
    pub fn create(&self) -> Result<(), PinError> {
        if !on_bpf_filesystem(&self.root)? {
            if !self.root.starts_with(BPF_MOUNT) {
                return Err(PinError::NotBpf(self.root.clone()));
            }
            if let Some(netns) = sys_of_netns() {
                warn!("{}; pins that are created here are removed when this process exits", hidden_by(&netns));
            }
            mount("bpf", BPF_MOUNT, "bpf", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None)
                .map_err(|error| PinError::Mount(error.into()))?;
        }
        for dir in self.directories() {
            fs::create_dir_all(&dir).map_err(PinError::at(&dir))?;
        }
        self.remove_leftovers()
    }

    /// Removes what an interrupted load left behind: no program uses it.
    fn remove_leftovers(&self) -> Result<(), PinError> {
        for path in list(&self.maps())? {
            if path.to_string_lossy().ends_with(NEXT) {
                fs::remove_file(&path).map_err(PinError::at(&path))?;
            }
        }
        Ok(())
    }

    /// Everything pinned under `links/`.
    ///
    /// # Errors
    /// [`PinError`] if the directory cannot be read. A missing directory is no error.
    pub fn list_links(&self) -> Result<Vec<PathBuf>, PinError> {
        list(&self.links())
    }

    /// Everything pinned under `progs/`.
    ///
    /// # Errors
    /// [`PinError`] if the directory cannot be read. A missing directory is no error.
    pub fn list_programs(&self) -> Result<Vec<PathBuf>, PinError> {
        list(&self.version.join("progs"))
    }

    /// Removes everything of a layout, which may be another version's and have unknown pins.
    ///
    /// # Errors
    /// [`PinError`].
    pub fn remove_layout(&self) -> Result<(), PinError> {
        match fs::remove_dir_all(&self.version) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(PinError::at(&self.version)(error)),
            _ => Ok(()),
        }
    }

    /// Removes a pin.
    ///
    /// # Errors
    /// [`PinError`]. A missing pin is no error.
    pub fn unpin(&self, path: &Path) -> Result<(), PinError> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(PinError::at(path)(error)),
            _ => Ok(()),
        }
    }

    /// Moves the pin at `from` to `to` atomically, and replaces what was there.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> Result<(), PinError> {
        fs::rename(from, to).map_err(PinError::at(to))
    }

    /// What is pinned now, without what an interrupted load left behind.
    ///
    /// # Errors
    /// [`PinError`] if a directory cannot be read.
    pub fn pinned(&self) -> Result<Pinned, PinError> {
        let mut pinned = Pinned { has_maps: !list(&self.maps())?.is_empty(), ..Pinned::default() };
        for dir in self.directories() {
            pinned.pins.extend(list(&dir)?.into_iter().filter(|path| !path.to_string_lossy().ends_with(NEXT)));
        }
        let above = self.version.ancestors().map(Path::to_owned);
        for other in self.other_layouts()? {
            pinned.pins.extend(other.list_links()?);
        }
        pinned.directories = self.directories().into_iter().chain(above).filter(|dir| dir.is_dir()).collect();
        Ok(pinned)
    }

    /// Removes the pins and directories that did not exist `before`. The kernel then detaches the links.
    ///
    /// # Errors
    /// The first [`PinError`]; everything else is removed nevertheless.
    pub fn roll_back(&self, before: &Pinned) -> Result<(), PinError> {
        let mut outcome = Ok(());
        for dir in self.directories() {
            for path in list(&dir)?.iter().filter(|path| !before.contains(path)) {
                outcome = outcome.and(self.unpin(path));
            }
        }
        let new = |dir: &PathBuf| !before.directories.contains(dir);
        for dir in self.directories().into_iter().chain(self.version.ancestors().map(Path::to_owned)).filter(new) {
            match fs::remove_dir(&dir) {
                // Others may have put something there meanwhile.
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    outcome = outcome.and(Err(PinError::at(&dir)(error)))
                }
                _ => {}
            }
        }
        outcome
    }

    /// The directories of pins: links first, because they hold the rest.
    fn directories(&self) -> [PathBuf; 3] {
        [self.links(), self.version.join("progs"), self.maps()]
    }

    /// Removes every pin of this layout, links first, and the directories.
    ///
    /// # Errors
    /// [`PinError`]. It is no error if nothing is there.
    pub fn remove(&self) -> Result<(), PinError> {
        for dir in self.directories() {
            for path in list(&dir)? {
                self.unpin(&path)?;
            }
        }
        for dir in self.directories().into_iter().chain([self.version.clone(), self.root.clone()]) {
            match fs::remove_dir(&dir) {
                // The user's directory may have other content, or be where the filesystem is mounted.
                Err(_) if dir == self.root => {}
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(PinError::at(&dir)(error)),
                _ => {}
            }
        }
        Ok(())
    }
}

/// What was pinned at one moment, and which directories existed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Pinned {
    pins: BTreeSet<PathBuf>,
    directories: BTreeSet<PathBuf>,
    has_maps: bool,
}

impl Pinned {
    /// All pins.
    pub fn pins(&self) -> impl Iterator<Item = &Path> {
        self.pins.iter().map(PathBuf::as_path)
    }

    /// Whether a pin existed.
    #[must_use]
    pub fn contains(&self, pin: &Path) -> bool {
        self.pins.contains(pin)
    }

    /// Whether a dataplane existed, attached or not.
    #[must_use]
    pub const fn has_maps(&self) -> bool {
        self.has_maps
    }
}

/// The layout's number in the name of its directory; none for other directories.
fn layout_number(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_prefix('v')?.parse().ok()
}

/// BPF filesystems allow no dot in a name, so this suffix has none.
const NEXT: &str = "-next";

/// Why the node's pins are not visible here; none if they are.
pub(crate) fn hidden() -> Option<String> {
    sys_of_netns().map(|netns| hidden_by(&netns))
}

fn hidden_by(netns: &str) -> String {
    format!(
        "`ip netns exec {netns}` has mounted its own /sys, which hides the node's BPF filesystem: use `nsenter \
         --net=/run/netns/{netns}` instead"
    )
}

/// The network namespace that `ip netns exec` has mounted this process's /sys for: the source of the mount is the namespace's
/// name. See <https://git.kernel.org/pub/scm/network/iproute2/iproute2.git/tree/lib/namespace.c>.
fn sys_of_netns() -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let sys = mounts.lines().rfind(|line| line.split(' ').nth(1) == Some("/sys"))?;
    let mut fields = sys.split(' ');
    let source = fields.next()?;
    (fields.nth(1)? == "sysfs" && Path::new("/run/netns").join(source).exists()).then(|| source.to_owned())
}

/// The entries of a directory, sorted; none if it does not exist.
fn list(dir: &Path) -> Result<Vec<PathBuf>, PinError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(PinError::at(dir))?,
    };
    let paths: io::Result<Vec<_>> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
    let mut paths = paths.map_err(PinError::at(dir))?;
    paths.sort();
    Ok(paths)
}

/// Whether a directory, or the nearest one above it that exists, is on a BPF filesystem.
fn on_bpf_filesystem(dir: &Path) -> Result<bool, PinError> {
    let existing = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let stat = statfs(existing).map_err(|error| PinError::at(existing)(error.into()))?;
    Ok(stat.f_type as u32 == BPF_FS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_elsewhere_is_refused() {
        let dir = PinDir::new(Path::new("/proc/affinity"));
        let error = dir.create().unwrap_err().to_string();
        assert!(error.starts_with("/proc/affinity is not on a BPF filesystem"), "{error}");
    }
}
