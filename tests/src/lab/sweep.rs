//! What a killed process leaves of its labs, and how it goes: everything of a lab has the maker's process id in
//! its name, and what belongs to no living process is removed.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::statfs;
use rustix::mount::{MountFlags, mount};

use super::cgroup;
use super::netns::{NETNS_DIR, delete, machine_lock};

/// How the names of all namespaces, pins and directories of labs begin; the process id follows.
pub(super) const PREFIX: &str = "affinity-lab-";
/// Where the BPF file system is.
pub(super) const BPFFS: &str = "/sys/fs/bpf";
/// What `statfs` calls it: `BPF_FS_MAGIC` of the kernel's magic.h.
const BPFFS_MAGIC: i64 = 0xcafe_4a11;

/// Removes namespaces, cgroups, pins and files of labs whose process no longer lives.
///
/// # Errors
/// When a directory that has them cannot be read.
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
            // Another process may sweep at the same time.
            let _ = fs::remove_dir_all(directory.join(name));
        }
    }
    Ok(())
}

/// Mounts the BPF file system where everybody expects it, if it is not there.
pub(super) fn mount_bpffs() -> Result<()> {
    let _one_at_a_time = machine_lock()?;
    if statfs(BPFFS).context(BPFFS)?.f_type != BPFFS_MAGIC {
        mount("bpf", BPFFS, "bpf", MountFlags::empty(), None).context(BPFFS)?;
    }
    Ok(())
}

/// Names in the directory that belong to labs of processes that are gone.
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
