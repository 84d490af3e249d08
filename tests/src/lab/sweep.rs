//! Removes what a killed process leaves of its labs: everything of a lab has its creator's process id in its name, and is
//! removed if no process with this id lives.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::statfs;
use rustix::mount::{MountFlags, mount};

use super::cgroup;
use super::netns::{NETNS_DIR, delete, machine_lock};

/// The prefix of the names of all namespaces, pins and directories of labs; the process id follows.
pub(super) const PREFIX: &str = "affinity-lab-";
/// The mount point of the BPF file system.
pub(super) const BPFFS: &str = "/sys/fs/bpf";
/// Its `statfs` type: `BPF_FS_MAGIC` of the kernel's magic.h.
const BPFFS_MAGIC: i64 = 0xcafe_4a11;

/// Removes namespaces, cgroups, pins and files of labs that belong to dead processes.
///
/// # Errors
/// When a directory that contains them cannot be read.
pub fn sweep_stale() -> Result<()> {
    for name in orphans(Path::new(NETNS_DIR))? {
        delete(&name);
    }
    for root in affinity_user::attach::cgroup::root().into_iter().chain([cgroup::MEMORY_V1.into()]) {
        for name in orphans(&root)? {
            cgroup::remove(&root.join(name));
        }
    }
    for directory in [Path::new(BPFFS), &std::env::temp_dir()] {
        for name in orphans(directory)? {
            // Another process may do the same at the same time.
            let _ = fs::remove_dir_all(directory.join(name));
        }
    }
    Ok(())
}

/// Mounts the BPF file system at the usual place, if it is not there.
pub(super) fn mount_bpffs() -> Result<()> {
    let _one_at_a_time = machine_lock()?;
    if statfs(BPFFS).context(BPFFS)?.f_type != BPFFS_MAGIC {
        mount("bpf", BPFFS, "bpf", MountFlags::empty(), None).context(BPFFS)?;
    }
    Ok(())
}

/// Names in the directory that belong to labs of dead processes.
fn orphans(directory: &Path) -> Result<Vec<String>> {
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let names = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter(|name| is_orphan(name)).collect())
}

fn is_orphan(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(PREFIX) else { return false };
    let process_id = rest.split('-').next().unwrap_or_default();
    process_id.parse::<u32>().is_ok() && !Path::new("/proc").join(process_id).exists()
}
