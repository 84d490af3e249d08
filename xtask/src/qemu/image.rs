//! Debian's kernels for QEMU: the kernel, its modules, and an initramfs that mounts the host's files.
//!
//! Everything is made from packages and stored in the target directory. After a week with a kernel, a newer package is looked
//! for.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use super::packages::{Apt, Installed, Mirror};
use crate::run::{command, output, run as run_command};

/// How long a kernel is used before a newer package is looked for.
const FRESH: Duration = Duration::from_secs(7 * 24 * 3600);

/// The modules that the initramfs loads, in this order, each with its dependencies; some of them are built into some kernels.
const BOOT_MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

/// The parts of the module tree that guests may load from. The rest, mostly drivers and file systems, is removed.
const KEPT: [&str; 14] = [
    "arch",
    "crypto",
    "drivers/dca",
    "drivers/i2c",
    "drivers/net",
    "drivers/pps",
    "drivers/ptp",
    "drivers/virtio",
    "fs/9p",
    "fs/fscache",
    "fs/netfs",
    "fs/overlayfs",
    "lib",
    "net",
];

/// A kernel for guests, by its Debian release.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub(crate) enum Release {
    /// Debian 12
    #[value(name = "6.1")]
    Bookworm,
    /// Debian 13
    #[value(name = "6.12")]
    Trixie,
    /// Debian's unstable release, with the newest kernel
    #[value(name = "sid")]
    Sid,
}

impl Release {
    /// From the oldest to the newest.
    pub(crate) const ALL: [Self; 3] = [Self::Bookworm, Self::Trixie, Self::Sid];

    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "6.1",
            Self::Trixie => "6.12",
            Self::Sid => "sid",
        }
    }

    /// Debian's name for the release.
    pub(crate) fn suite(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }

    /// The name for people.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Bookworm => "Debian 12",
            Self::Trixie => "Debian 13",
            Self::Sid => "Debian sid",
        }
    }
}

/// A kernel that can be booted.
pub(crate) struct Kernel {
    /// Its release.
    pub(crate) release: Release,
    /// As `uname -r` prints it.
    pub(crate) version: String,
    /// The directory of the files below.
    dir: PathBuf,
}

impl Kernel {
    /// The kernel of a release, made from its package if necessary.
    ///
    /// # Errors
    /// If it is not here, and its package cannot be downloaded.
    pub(crate) fn prepare(release: Release, qemu_dir: &Path, mirror: &Mirror, busybox: &Path) -> Result<Self> {
        let dir = qemu_dir.join("kernels").join(release.name());
        let age = fs::metadata(dir.join("version")).and_then(|file| file.modified()).ok();
        let age = age.map(|made| SystemTime::now().duration_since(made).unwrap_or_default());
        if age.is_none_or(|age| age > FRESH) {
            match fetch(release, qemu_dir, mirror, busybox, &dir) {
                Err(error) if age.is_some() => println!("qemu: using an old {}: {error:#}", release.name()),
                fetched => fetched.with_context(|| format!("the kernel of Debian's {}", release.suite()))?,
            }
        }
        let version = fs::read_to_string(dir.join("version"))?;
        Ok(Self { release, version, dir })
    }

    /// The kernel itself.
    pub(crate) fn image(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The initramfs.
    pub(crate) fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs")
    }

    /// The directory to mount at /lib/modules.
    pub(crate) fn modules(&self) -> PathBuf {
        self.dir.join("lib/modules")
    }
}

/// The static busybox from Debian's package: the guest's first programs.
pub(crate) fn busybox(qemu_dir: &Path, mirror: &Mirror) -> Result<PathBuf> {
    let dir = qemu_dir.join("busybox");
    // Its path depends on the release.
    let find = || ["bin/busybox", "usr/bin/busybox"].map(|name| dir.join(name)).into_iter().find(|file| file.exists());
    if find().is_none() {
        let suites = [mirror.codename()];
        let apt = Apt::open(&qemu_dir.join("apt").join(mirror.codename()), mirror, &suites, Installed::Nothing)?;
        apt.unpack(&["busybox-static".to_owned()], &dir)?;
    }
    find().context("busybox-static has no busybox")
}

/// Makes all parts of a kernel in another directory, and moves that into place at the end.
fn fetch(release: Release, qemu_dir: &Path, mirror: &Mirror, busybox: &Path, dir: &Path) -> Result<()> {
    let suite = release.suite();
    println!("qemu: fetching the kernel of Debian's {suite}");
    let apt = Apt::open(&qemu_dir.join("apt").join(suite), mirror, &[suite], Installed::Nothing)?;
    let [unpacked, made] = ["unpacked", "made"].map(|name| dir.with_extension(name));
    for dir in [&unpacked, &made] {
        let _ = fs::remove_dir_all(dir);
    }
    apt.unpack(&kernel_packages(|package| apt.depends(package))?, &unpacked)?;

    let modules = ["lib/modules", "usr/lib/modules"].map(|name| unpacked.join(name));
    let modules = modules.iter().find(|dir| dir.exists()).context("the kernel's packages have no modules")?;
    let version = only_name(modules)?;
    let tree = made.join("lib/modules").join(&version);
    keep_modules(&modules.join(&version), &tree, busybox)?;
    run_command(command(busybox).arg("depmod").arg("-b").arg(&made).arg(&version))?;

    let images = [unpacked.join("boot").join(format!("vmlinuz-{version}")), modules.join(&version).join("vmlinuz")];
    let image = images.iter().find(|file| file.exists()).context("the kernel's packages have no vmlinuz")?;
    fs::copy(image, made.join("vmlinuz"))?;
    make_initramfs(&made, &tree, busybox)?;
    fs::write(made.join("version"), &version)?;
    let _ = fs::remove_dir_all(dir);
    fs::rename(&made, dir)?;
    fs::remove_dir_all(&unpacked)?;
    println!("qemu: {version} is ready");
    Ok(())
}

/// The packages of the newest kernel: one, or since 2026 one for each part.
fn kernel_packages(depends: impl Fn(&str) -> Result<Vec<String>>) -> Result<Vec<String>> {
    let is_part =
        |name: &String| ["linux-image-", "linux-binary-", "linux-modules-"].iter().any(|p| name.starts_with(p));
    let image = depends("linux-image-amd64")?.into_iter().find(|name| name.starts_with("linux-image-"));
    let image = image.context("linux-image-amd64 names no kernel")?;
    let parts = depends(&image)?.into_iter().filter(is_part);
    Ok([image.clone()].into_iter().chain(parts).collect())
}

/// The name of the only entry of a directory.
fn only_name(dir: &Path) -> Result<String> {
    let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
    ensure!(names.len() == 1, "{} has {} entries, and not one", dir.display(), names.len());
    names[0].to_str().map(str::to_owned).context("a name that is not UTF-8")
}

/// Moves the modules that are kept, and copies the lists of built-in modules. Decompresses them, which would be slow in the
/// guest.
fn keep_modules(from: &Path, to: &Path, busybox: &Path) -> Result<()> {
    for part in KEPT {
        let (from, to) = (from.join("kernel").join(part), to.join("kernel").join(part));
        if from.exists() {
            fs::create_dir_all(to.parent().context("it has a parent")?)?;
            fs::rename(&from, &to).with_context(|| from.display().to_string())?;
        }
    }
    for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        if from.join(name).exists() {
            fs::copy(from.join(name), to.join(name))?;
        }
    }
    let compressed = files_below(to)?.into_iter().filter(|file| file.extension() == Some(OsStr::new("xz")));
    let compressed: Vec<_> = compressed.collect();
    compressed.chunks(500).try_for_each(|files| run_command(command(busybox).arg("unxz").args(files)))
}

fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(files_below(&path)?);
        } else {
            files.push(path);
        }
    }
    Ok(files)
}

/// Packs busybox, the modules that the root file system needs, and the script that mounts it.
fn make_initramfs(made: &Path, tree: &Path, busybox: &Path) -> Result<()> {
    let contents = made.join("initramfs.contents");
    for name in ["bin", "modules", "proc", "dev", "sys", "lower", "upper", "new"] {
        fs::create_dir_all(contents.join(name))?;
    }
    fs::copy(busybox, contents.join("bin/busybox"))?;
    let dependencies = fs::read_to_string(tree.join("modules.dep")).context("modules.dep")?;
    let mut order = String::new();
    for module in load_order(&dependencies, &BOOT_MODULES) {
        let name = Path::new(&module).file_name().and_then(OsStr::to_str).context("a module's name")?;
        fs::copy(tree.join(&module), contents.join("modules").join(name)).with_context(|| module.clone())?;
        order += &format!("{name}\n");
    }
    fs::write(contents.join("modules/order"), order)?;
    fs::write(contents.join("init"), include_str!("init.sh"))?;
    run_command(command("chmod").arg("755").arg(contents.join("init")))?;
    let script = "cd \"$1\" && \"$2\" find . | \"$2\" cpio -o -H newc > \"$3\"";
    let mut pack = command(busybox);
    pack.args(["sh", "-c", script, "sh"]).arg(&contents).arg(busybox).arg(made.join("initramfs"));
    output(&mut pack)?;
    Ok(fs::remove_dir_all(&contents)?)
}

/// The files of these modules and of all their dependencies, dependencies first. `dependencies` is the text of modules.dep.
/// Modules that are not in it are part of the kernel.
fn load_order(dependencies: &str, wanted: &[&str]) -> Vec<String> {
    let lines = dependencies.lines().filter_map(|line| line.split_once(':'));
    let needs: BTreeMap<&str, Vec<&str>> =
        lines.map(|(file, needs)| (file, needs.split_whitespace().collect())).collect();
    let mut order = Vec::new();
    for name in wanted {
        let is_it = |file: &&str| Path::new(file).file_stem() == Some(OsStr::new(name));
        if let Some(file) = needs.keys().copied().find(is_it) {
            visit(file, &needs, &mut order);
        }
    }
    order
}

fn visit<'a>(file: &'a str, needs: &BTreeMap<&'a str, Vec<&'a str>>, order: &mut Vec<String>) {
    if order.iter().any(|done| done == file) {
        return;
    }
    for need in needs.get(file).into_iter().flatten() {
        visit(need, needs, order);
    }
    order.push(file.to_owned());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need() {
        let dependencies = "fs/9p/9p.ko: net/9p/9pnet.ko fs/netfs/netfs.ko\nnet/9p/9pnet.ko:\n\
                            net/9p/9pnet_virtio.ko: net/9p/9pnet.ko drivers/virtio/virtio.ko\n\
                            drivers/virtio/virtio.ko:\nfs/netfs/netfs.ko:\n";
        assert_eq!(
            load_order(dependencies, &["virtio_pci", "9pnet_virtio", "9p"]),
            [
                "net/9p/9pnet.ko",
                "drivers/virtio/virtio.ko",
                "net/9p/9pnet_virtio.ko",
                "fs/netfs/netfs.ko",
                "fs/9p/9p.ko"
            ]
        );
    }

    #[test]
    fn a_kernel_may_be_in_one_package_or_in_parts() {
        let whole = |name: &str| {
            Ok(match name {
                "linux-image-amd64" => vec!["linux-image-6.1.0-1-amd64".to_owned()],
                _ => vec!["kmod".to_owned(), "linux-base".to_owned()],
            })
        };
        assert_eq!(kernel_packages(whole).expect("it is there"), ["linux-image-6.1.0-1-amd64"]);
        let parts = |name: &str| {
            Ok(match name {
                "linux-image-amd64" => vec!["linux-base-amd64".to_owned(), "linux-image-7-amd64".to_owned()],
                _ => ["dracut", "linux-binary-7-amd64", "linux-modules-7-amd64"].map(str::to_owned).to_vec(),
            })
        };
        assert_eq!(
            kernel_packages(parts).expect("it is there"),
            ["linux-image-7-amd64", "linux-binary-7-amd64", "linux-modules-7-amd64"]
        );
    }
}
