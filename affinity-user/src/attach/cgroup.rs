//! Attaches the socket programs to a cgroup, and detaches them.
//!
//! Each program has one link, pinned as `links/cgroup-PROGRAM`. A cgroup's programs handle the sockets of all processes below
//! it; on the root of version 2 those are the node's own and every pod's. Other software may have links on the same cgroup.

use std::{
    fmt, fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    str::FromStr,
};

use affinity_common::names::SOCKET_PROGRAMS;
use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET_SOCK_RELEASE, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME,
    BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_UDP4_RECVMSG, BPF_CGROUP_UDP4_SENDMSG,
    BPF_CGROUP_UDP6_RECVMSG, BPF_CGROUP_UDP6_SENDMSG,
};

use super::AttachError;
use crate::{
    pins::{PinDir, Pinned},
    sys::{self, SysError},
};

/// The attach type of each of [`SOCKET_PROGRAMS`].
const ATTACH_TYPES: [bpf_attach_type; SOCKET_PROGRAMS.len()] = [
    BPF_CGROUP_INET4_CONNECT,
    BPF_CGROUP_INET6_CONNECT,
    BPF_CGROUP_UDP4_SENDMSG,
    BPF_CGROUP_UDP6_SENDMSG,
    BPF_CGROUP_UDP4_RECVMSG,
    BPF_CGROUP_UDP6_RECVMSG,
    BPF_CGROUP_INET4_GETPEERNAME,
    BPF_CGROUP_INET6_GETPEERNAME,
    BPF_CGROUP_INET_SOCK_RELEASE,
];

/// The prefix of these links' pins.
const PREFIX: &str = "cgroup-";

/// Whether connections are translated at the socket: `--socket`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SocketPolicy {
    /// If possible: by the node's own agent, not by one in another network namespace, and on a kernel that has the hooks.
    #[default]
    Auto,
    /// Always; it is an error if that is not possible.
    On,
    /// Never.
    Off,
}

impl SocketPolicy {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Auto, Self::On, Self::Off];

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        }
    }
}

impl fmt::Display for SocketPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Not the name of a policy.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not one of auto, on, off")]
pub struct UnknownSocketPolicy(String);

impl FromStr for SocketPolicy {
    type Err = UnknownSocketPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownSocketPolicy> {
        Self::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| UnknownSocketPolicy(name.to_owned()))
    }
}

/// A program on a cgroup.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct CgroupAttachment {
    /// The program: one of [`SOCKET_PROGRAMS`].
    pub program: &'static str,
    /// The cgroup's id, which is the inode of its directory; zero once it has gone.
    pub cgroup: u64,
    /// The program's id.
    pub prog_id: u32,
    /// The pin.
    pub path: PathBuf,
}

/// The id of the root, which is the inode of its directory: the kernel creates the root first.
pub const ROOT: u64 = 1;

/// The root of version 2, wherever it is mounted. A container with its own view of the cgroups sees another directory as its
/// root; that is not the root meant here.
#[must_use]
pub fn root() -> Option<PathBuf> {
    mounts().into_iter().find(|path| fs::metadata(path).is_ok_and(|directory| directory.ino() == ROOT))
}

/// Where version 2 is mounted.
fn mounts() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let paths = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    paths.collect()
}

/// The directory of a cgroup, under any mount of version 2 that this process sees. If the node is itself a container, none of
/// these is the machine's root.
#[must_use]
pub fn directory(cgroup: u64) -> Option<PathBuf> {
    mounts().into_iter().find_map(|mount| find(mount, cgroup))
}

/// Where the hierarchy of version 2 is, given a directory: there, or where systemd mounts it next to those of version 1
/// (<https://systemd.io/CGROUP_DELEGATION>, "hybrid").
///
/// # Errors
/// [`AttachError::NotVersion2`] if it is at neither place.
fn version_2(named: &Path) -> Result<PathBuf, AttachError> {
    let unified = named.join("unified");
    match is_version_2(named) {
        Ok(true) => Ok(named.to_owned()),
        Ok(false) if is_version_2(&unified).unwrap_or(false) => Ok(unified),
        Ok(false) => Err(AttachError::NotVersion2(named.to_owned())),
        Err(source) => Err(AttachError::Cgroup { cgroup: named.to_owned(), source }),
    }
}

fn is_version_2(path: &Path) -> io::Result<bool> {
    /// `CGROUP2_SUPER_MAGIC`: <https://elixir.bootlin.com/linux/v6.12/source/include/uapi/linux/magic.h>
    const CGROUP2: u64 = 0x6367_7270;
    Ok(rustix::fs::statfs(path)?.f_type as u64 == CGROUP2)
}

fn find(dir: PathBuf, cgroup: u64) -> Option<PathBuf> {
    if fs::metadata(&dir).is_ok_and(|metadata| metadata.ino() == cgroup) {
        return Some(dir);
    }
    let mut children: Vec<_> = fs::read_dir(&dir).ok()?.filter_map(Result::ok).collect();
    children.retain(|child| child.file_type().is_ok_and(|kind| kind.is_dir()));
    children.sort_by_key(fs::DirEntry::file_name);
    children.into_iter().find_map(|child| find(child.path(), cgroup))
}

/// Attaches the pinned programs to a cgroup, and to no other: links to another one are removed once their replacements are
/// attached. Returns the cgroup: that of version 2, if both versions are mounted below `named`.
///
/// # Errors
/// [`AttachError`]; what was attached before the failure stays.
pub fn attach(pins: &PinDir, named: &Path) -> Result<PathBuf, AttachError> {
    let cgroup = version_2(named)?;
    let failed = |source| AttachError::Cgroup { cgroup: cgroup.clone(), source };
    let directory = fs::File::open(&cgroup).map_err(failed)?;
    let id = directory.metadata().map_err(failed)?.ino();
    let before = attachments(pins)?;
    for (program, attach_type) in SOCKET_PROGRAMS.into_iter().zip(ATTACH_TYPES) {
        if before.iter().any(|attachment| attachment.program == program && attachment.cgroup == id) {
            continue;
        }
        let fd = sys::obj_get(&pins.prog(program))?;
        let link = sys::link_create_cgroup(fd.as_fd(), directory.as_fd(), attach_type as u32)
            .map_err(|error| failed(error.source))?;
        let next = pin(pins, &format!("{program}-next"));
        pins.unpin(&next)?;
        sys::obj_pin(link.as_fd(), &next)?;
        let old = before.iter().find(|attachment| attachment.program == program);
        let old = old.map(|old| sys::obj_get(&old.path)).transpose()?;
        pins.rename(&next, &pin(pins, program))?;
        if let Some(old) = old {
            sys::link_detach(old.as_fd())?;
        }
    }
    Ok(cgroup)
}

fn pin(pins: &PinDir, program: &str) -> PathBuf {
    pins.links().join(format!("{PREFIX}{program}"))
}

/// Whether a pin is a link of a program for sockets.
pub(super) fn is_pin(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(PREFIX))
}

/// The links that are pinned.
fn open_pins(pins: &PinDir) -> Result<Vec<(&'static str, PathBuf, OwnedFd)>, AttachError> {
    let mut open = Vec::new();
    for program in SOCKET_PROGRAMS {
        let path = pin(pins, program);
        match sys::obj_get(&path) {
            Err(error) if error.is_not_found() => {}
            fd => open.push((program, path, fd?)),
        }
    }
    Ok(open)
}

/// Everything that is attached to a cgroup.
///
/// # Errors
/// [`AttachError`] if a pin cannot be read.
pub fn attachments(pins: &PinDir) -> Result<Vec<CgroupAttachment>, AttachError> {
    let attachment = |(program, path, fd): (&'static str, PathBuf, OwnedFd)| {
        let info = sys::cgroup_link_info(fd.as_fd())?;
        Ok(CgroupAttachment { program, cgroup: info.cgroup, prog_id: info.prog_id, path })
    };
    open_pins(pins)?.into_iter().map(attachment).collect()
}

/// Replaces the program of every link by the pinned one; each call runs the old or the new program. Returns the number of
/// links.
///
/// # Errors
/// The first [`AttachError`]; all links but those that failed have the new program.
pub(super) fn upgrade(pins: &PinDir) -> Result<usize, AttachError> {
    let mut upgraded = Ok(0);
    for (program, path, link) in open_pins(pins)? {
        let outcome = match upgrade_one(pins, program, &link) {
            Ok(true) => Ok(1),
            Ok(false) => pins.unpin(&path).map(|()| 0).map_err(AttachError::from),
            Err(error) => Err(error.into()),
        };
        upgraded = upgraded.and_then(|before: usize| outcome.map(|one| before + one));
    }
    upgraded
}

/// False if the cgroup has gone.
fn upgrade_one(pins: &PinDir, program: &str, link: &OwnedFd) -> Result<bool, SysError> {
    let next = sys::obj_get(&pins.prog(program))?;
    match sys::link_update(link.as_fd(), next.as_fd()) {
        Err(_) if sys::cgroup_link_info(link.as_fd())?.cgroup == 0 => Ok(false),
        updated => updated.map(|()| true),
    }
}

/// Detaches the programs, and returns what was detached.
///
/// # Errors
/// [`AttachError`].
pub fn detach(pins: &PinDir) -> Result<Vec<CgroupAttachment>, AttachError> {
    let attachments = attachments(pins)?;
    for CgroupAttachment { path, .. } in &attachments {
        // The kernel would detach a link without references, but only some time after the pin has gone.
        sys::link_detach(sys::obj_get(path)?.as_fd())?;
        pins.unpin(path)?;
    }
    Ok(attachments)
}

/// As [`super::replace_other_layouts`], for one pin of another layout.
pub(super) fn adopt(pins: &PinDir, path: &Path, ours: &Path) -> Result<bool, AttachError> {
    let Some(program) = SOCKET_PROGRAMS.into_iter().find(|program| pin(pins, program) == ours) else {
        return Ok(false);
    };
    // If the socket programs are not loaded, there is nothing to attach.
    if !pins.prog(program).exists() {
        return Ok(false);
    }
    let link = sys::obj_get(path)?;
    if !matches!(upgrade_one(pins, program, &link), Ok(true)) {
        return Ok(false);
    }
    pins.rename(path, ours)?;
    Ok(true)
}

/// After a failed start, detaches what was not attached `before`.
///
/// # Errors
/// The first [`AttachError`]; everything else is detached nevertheless.
pub(super) fn detach_new(pins: &PinDir, before: &Pinned) -> Result<(), AttachError> {
    let mut outcome = Ok(());
    for (_, path, link) in open_pins(pins)?.into_iter().filter(|(_, path, _)| !before.contains(path)) {
        let detached = sys::link_detach(link.as_fd()).map_err(AttachError::from);
        outcome = outcome.and(detached).and(pins.unpin(&path).map_err(AttachError::from));
    }
    outcome
}

/// Whether this thread is in the network namespace of the node: that of its first process.
///
/// # Errors
/// The system's error if that cannot be determined.
pub fn in_node_namespace() -> io::Result<bool> {
    let of = |process: &str| fs::metadata(format!("/proc/{process}/ns/net")).map(|file| (file.dev(), file.ino()));
    Ok(of("thread-self")? == of("1")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for policy in SocketPolicy::ALL {
            assert_eq!(policy.name().parse::<SocketPolicy>().unwrap(), policy);
        }
        assert!("yes".parse::<SocketPolicy>().is_err());
    }

    #[test]
    fn a_cgroup_is_found_by_its_id() {
        let root = root().expect("a mount of version 2");
        let id = fs::metadata(&root).unwrap().ino();
        assert_eq!(directory(id), Some(root));
        assert_eq!(directory(u64::MAX), None);
    }

    #[test]
    fn version_2_is_found_beside_version_1_and_nothing_else_is_taken_for_it() {
        let root = root().expect("a mount of version 2");
        assert_eq!(version_2(&root).unwrap(), root);
        // As on a node with both: a directory that is no cgroup, and version 2 in `unified` below it.
        let hybrid = std::env::temp_dir().join(format!("affinity-cgroup-{}", std::process::id()));
        fs::create_dir(&hybrid).unwrap();
        let without = version_2(&hybrid).map_err(|error| error.to_string());
        std::os::unix::fs::symlink(&root, hybrid.join("unified")).unwrap();
        let with = version_2(&hybrid).map_err(|error| error.to_string());
        fs::remove_dir_all(&hybrid).unwrap();
        assert_eq!(with, Ok(hybrid.join("unified")));
        assert!(without.unwrap_err().contains("is a cgroup of version 2"));
        assert!(version_2(Path::new("/nowhere")).is_err());
    }
}
