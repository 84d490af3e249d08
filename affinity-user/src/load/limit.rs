//! How much memory this process may use: the machine's, or less if its cgroups limit it.
//!
//! The kernel charges maps to the cgroup of the process that creates them, in both versions of cgroups:
//! <https://docs.kernel.org/admin-guide/cgroup-v2.html#memory> and
//! <https://docs.kernel.org/admin-guide/cgroup-v1/memory.html>. The limit of a pod or a slice above counts as well.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use super::mib;

/// Available memory, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Memory {
    /// Of the machine.
    pub total: u64,
    /// The tightest limit of this process's cgroups; none if they have none.
    pub limit: Option<u64>,
}

impl Memory {
    /// The memory of this machine and this process.
    #[must_use]
    pub fn of_this_process() -> Self {
        let info = rustix::system::sysinfo();
        let read = |path: &Path| fs::read_to_string(path).ok();
        let own = |file: &str| read(&Path::new("/proc/self").join(file)).unwrap_or_default();
        let total = info.totalram as u64 * u64::from(info.mem_unit);
        Self { total, limit: limit(&own("cgroup"), &own("mountinfo"), read).filter(|limit| *limit < total) }
    }
}

/// Names what bounds the tables.
impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.limit {
            Some(limit) => write!(f, "the cgroup's memory limit of {} MiB", mib(limit)),
            None => write!(f, "{} MiB of memory", mib(self.total)),
        }
    }
}

/// A hierarchy that may limit memory.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Hierarchy {
    /// The type of its filesystem, and an option that the mount must have.
    mounted_as: (&'static str, Option<&'static str>),
    /// The file with the limit. Without a limit it has "max", or a number beyond every machine's memory.
    file: &'static str,
}

const V1: Hierarchy = Hierarchy { mounted_as: ("cgroup", Some("memory")), file: "memory.limit_in_bytes" };
const V2: Hierarchy = Hierarchy { mounted_as: ("cgroup2", None), file: "memory.max" };

/// The tightest limit of a process, by its `cgroup` and `mountinfo` of `/proc`.
fn limit(cgroup: &str, mountinfo: &str, read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let groups = cgroup.lines().filter_map(|line| {
        let (_, line) = line.split_once(':')?;
        let (controllers, group) = line.split_once(':')?;
        let is_memory = controllers.split(',').any(|controller| controller == "memory");
        let hierarchy = if is_memory { V1 } else { V2 };
        (is_memory || controllers.is_empty()).then_some((hierarchy, group))
    });
    let directories = groups
        .flat_map(|(hierarchy, group)| mountinfo.lines().filter_map(move |line| directory(line, hierarchy, group)));
    directories
        .flat_map(|(file, directories)| directories.into_iter().map(move |at| at.join(file)))
        .filter_map(|file| read(&file)?.trim().parse().ok())
        .min()
}

/// The directories of a group and of all groups above it, if this line of `mountinfo` mounts their hierarchy.
fn directory(line: &str, hierarchy: Hierarchy, group: &str) -> Option<(&'static str, Vec<PathBuf>)> {
    // 36 35 98:0 ROOT MOUNTPOINT rw,noatime master:1 - TYPE SOURCE rw,OPTIONS
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (root, point) = (Path::new(mount.next()?), Path::new(mount.next()?));
    let mut filesystem = filesystem.split(' ');
    let (kind, option) = hierarchy.mounted_as;
    let is_it = filesystem.next()? == kind
        && option
            .is_none_or(|option| filesystem.nth(1).is_some_and(|options| options.split(',').any(|it| it == option)));
    if !is_it {
        return None;
    }
    // A group outside of the mount is not visible here: a container sees the mount's own root instead.
    let below = Path::new(group).strip_prefix(root).unwrap_or(Path::new(""));
    let below = if below.components().any(|part| part.as_os_str() == "..") { Path::new("") } else { below };
    Some((hierarchy.file, below.ancestors().map(|below| point.join(below)).collect()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MIB: u64 = 1 << 20;
    const UNIFIED: &str = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    const LEGACY: &str = "31 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                          32 24 0:28 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory\n";
    const HYBRID: &str = "30 24 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                          32 24 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
    /// The content of the version 1 file without a limit.
    const NONE_V1: &str = "9223372036854771712";

    fn of(cgroup: &str, mountinfo: &str, files: &[(&str, &str)]) -> Option<u64> {
        let files: BTreeMap<_, _> = files.iter().map(|(path, text)| (Path::new(path).to_owned(), *text)).collect();
        limit(cgroup, mountinfo, |path| files.get(path).map(|text| format!("{text}\n")))
    }

    #[test]
    fn the_tightest_limit_of_all_groups_above_counts() {
        let files = [
            ("/sys/fs/cgroup/kubepods/pod1/memory.max", "209715200"),
            ("/sys/fs/cgroup/kubepods/pod1/container/memory.max", "max"),
            ("/sys/fs/cgroup/kubepods/memory.max", "8589934592"),
        ];
        assert_eq!(of("0::/kubepods/pod1/container\n", UNIFIED, &files), Some(200 * MIB));
        assert_eq!(of("0::/elsewhere\n", UNIFIED, &files), None);
    }

    #[test]
    fn version_one_and_both_together_are_read() {
        let files = [
            ("/sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes", "104857600"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", NONE_V1),
        ];
        assert_eq!(of("5:cpu:/\n4:memory:/docker/x\n", LEGACY, &files), Some(100 * MIB));
        assert_eq!(of("4:cpu,memory:/docker/x\n0::/\n", HYBRID, &files), Some(100 * MIB));
        let none = of("4:memory:/\n", LEGACY, &files);
        assert!(none.is_some_and(|none| none > 1 << 60), "no limit, which is more than any machine has");
    }

    #[test]
    fn in_a_container_the_group_is_what_is_mounted() {
        let files =
            [("/sys/fs/cgroup/memory.max", "209715200"), ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "104857600")];
        // A cgroup namespace of its own.
        assert_eq!(of("0::/\n", UNIFIED, &files), Some(200 * MIB));
        // The host's names, and a mount that begins at the container's group.
        let part = "30 24 0:26 /kubepods/pod1 /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert_eq!(of("0::/kubepods/pod1\n", part, &files), Some(200 * MIB));
        let part = "32 24 0:28 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        assert_eq!(of("4:memory:/docker/x\n", part, &files), Some(100 * MIB));
        // A group outside of the namespace.
        assert_eq!(of("0::/../other\n", UNIFIED, &files), Some(200 * MIB));
    }

    #[test]
    fn what_bounds_the_tables_is_named() {
        let memory = Memory { total: 8192 * MIB, limit: None };
        assert_eq!(memory.to_string(), "8192 MiB of memory");
        let limited = Memory { limit: Some(200 * MIB), ..memory };
        assert_eq!(limited.to_string(), "the cgroup's memory limit of 200 MiB");
    }
}
