//! `cargo xtask setup`: everything that building and testing need in addition to cargo.
//!
//! Only the presence of a tool matters, not its origin: commands are looked up on PATH, and libraries by one of their files.
//! Only missing tools are installed: system packages by apt-get, as root; parts of the toolchain by rustup; bpf-linker and
//! cargo-deny by cargo. If packages may not be installed, nothing is installed: the commands to run are printed instead.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::run::{cargo, command, is_root, output, run as run_command, target_dir};

const BPF_LINKER_VERSION: &str = "0.13.0";

const CARGO_DENY_VERSION: &str = "0.20.2";

/// The LLVM of the pinned rustc. bpf-linker reads its bitcode.
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// Directories for commands in addition to PATH, which lacks these after a plain `su`.
const ADMIN_DIRS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Tools that the lab, the tests and the fuzz target run.
const TOOLS: [Need; 13] = [
    Need::command("c++", "g++"),
    Need::command("cc", "gcc"),
    Need::command("conntrack", "conntrack"),
    Need::command("ethtool", "ethtool"),
    Need::command("git", "git"),
    Need::command("ip", "iproute2"),
    Need::command("iptables", "iptables"),
    Need::command("nft", "nftables"),
    Need::command("ps", "procps"),
    Need::command("sysctl", "procps"),
    Need::command("tc", "iproute2"),
    Need::command("tcpdump", "tcpdump"),
    Need::command("unshare", "util-linux"),
];

/// Additional tools for `cargo xtask package`: a C compiler for the target (the TLS library has C code), and archives.
const PACKAGING_TOOLS: [Need; 3] =
    [Need::command("gzip", "gzip"), Need::command("musl-gcc", "musl-tools"), Need::command("tar", "tar")];

/// Additional tools for `cargo xtask test --kernel`.
const EMULATION_TOOLS: [Need; 1] = [Need::command("qemu-system-x86_64", "qemu-system-x86")];

/// The target of packages: the one architecture that the programs support, statically linked.
pub(crate) const PACKAGE_TARGET: &str = "x86_64-unknown-linux-musl";

/// Libraries for building bpf-linker.
const LINKER_LIBRARIES: [Need; 5] = [
    Need::file("/usr/include/llvm-c-22/llvm-c/Core.h", "llvm-22-dev"),
    Need::file("/usr/include/zlib.h", "zlib1g-dev"),
    Need::file("/usr/include/zstd.h", "libzstd-dev"),
    Need::file("/usr/lib/llvm-22/bin/llvm-config", "llvm-22-dev"),
    Need::file("/usr/lib/llvm-22/lib/libPolly.a", "libpolly-22-dev"),
];

/// The components of rust-toolchain.toml, each with one of its files in the sysroot.
const COMPONENTS: [(&str, &str); 3] = [
    ("clippy", "bin/cargo-clippy"),
    ("rust-src", "lib/rustlib/src/rust/library/core/Cargo.toml"),
    ("rustfmt", "bin/cargo-fmt"),
];

/// The purpose of a setup.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To build, check, test and run the demo.
    Develop,
    /// The same, and to package.
    Package,
    /// The same as to develop, and to run guests.
    Emulate,
}

/// Installs what is missing, with one line for each kind; silent if nothing is missing.
///
/// # Errors
/// If something may not be installed here, with the commands to run; or if an installation fails.
pub(crate) fn run(purpose: Purpose) -> Result<()> {
    let missing = find_missing(purpose)?;
    let may_install = is_root()? && find_command("apt-get");
    if missing.iter().any(|item| matches!(item, Item::Packages(_))) && !may_install {
        let commands: Vec<_> = missing.iter().map(|item| format!("    {item}")).collect();
        bail!("setup needs root and apt-get. Run these commands in this directory:\n{}", commands.join("\n"));
    }
    if missing.is_empty() {
        return Ok(());
    }
    for item in missing {
        // bpf-linker may have lacked only its libraries.
        if matches!(item, Item::Linker) && linker_version().as_deref() == Some(BPF_LINKER_VERSION) {
            continue;
        }
        item.install()?;
    }
    if let Some(item) = find_missing(purpose)?.first() {
        bail!("setup has finished, but this is still missing: {item}");
    }
    Ok(())
}

/// Something that this machine has, or the Debian package to install it from.
struct Need {
    probe: Probe,
    package: &'static str,
}

enum Probe {
    Command(&'static str),
    File(&'static str),
}

impl Need {
    const fn command(name: &'static str, package: &'static str) -> Self {
        Self { probe: Probe::Command(name), package }
    }

    const fn file(path: &'static str, package: &'static str) -> Self {
        Self { probe: Probe::File(path), package }
    }

    fn is_met(&self) -> bool {
        match self.probe {
            Probe::Command(name) => find_command(name),
            Probe::File(path) => Path::new(path).exists(),
        }
    }
}

/// One thing to install. Displayed as the shell command that installs it.
enum Item {
    Packages(Vec<&'static str>),
    Components(Vec<&'static str>),
    Target,
    Linker,
}

/// The missing items, in the order of installation.
fn find_missing(purpose: Purpose) -> Result<Vec<Item>> {
    let special: &[Need] = match purpose {
        Purpose::Develop => &[],
        Purpose::Package => &PACKAGING_TOOLS,
        Purpose::Emulate => &EMULATION_TOOLS,
    };
    let linker_is_missing = linker_version().as_deref() != Some(BPF_LINKER_VERSION);
    let libraries = LINKER_LIBRARIES.iter().filter(|_| linker_is_missing);
    let needs = TOOLS.iter().chain(libraries).chain(special).filter(|need| !need.is_met());
    let mut packages: Vec<_> = needs.map(|need| need.package).collect();
    packages.sort_unstable();
    packages.dedup();

    let sysroot = output(command("rustc").args(["--print", "sysroot"]))?;
    let sysroot = Path::new(sysroot.trim_end());
    let components = COMPONENTS.iter().filter(|(_, file)| !sysroot.join(file).exists());
    let components: Vec<_> = components.map(|(name, _)| *name).collect();

    let mut missing = Vec::new();
    if !packages.is_empty() {
        missing.push(Item::Packages(packages));
    }
    if !components.is_empty() {
        missing.push(Item::Components(components));
    }
    if purpose == Purpose::Package && !sysroot.join("lib/rustlib").join(PACKAGE_TARGET).join("lib").exists() {
        missing.push(Item::Target);
    }
    if linker_is_missing {
        missing.push(Item::Linker);
    }
    Ok(missing)
}

impl Item {
    fn install(&self) -> Result<()> {
        match self {
            Self::Packages(packages) => install_packages(packages),
            Self::Components(components) => {
                println!("setup: adding to the toolchain: {}", components.join(", "));
                run_command(command("rustup").args(["component", "add"]).args(components))
            }
            Self::Target => {
                println!("setup: adding to the toolchain: {PACKAGE_TARGET}");
                run_command(command("rustup").args(["target", "add", PACKAGE_TARGET]))
            }
            Self::Linker => install_linker(),
        }
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Packages(packages) => {
                write!(f, "apt-get install --no-install-recommends {}", packages.join(" "))?;
                if packages.iter().any(|package| package.contains("-22")) {
                    write!(f, "    # LLVM 22 is also at https://apt.llvm.org")?;
                }
                Ok(())
            }
            Self::Components(components) => write!(f, "rustup component add {}", components.join(" ")),
            Self::Target => write!(f, "rustup target add {PACKAGE_TARGET}"),
            Self::Linker => write!(
                f,
                "LLVM_PREFIX={LLVM_PREFIX} PATH={LLVM_PREFIX}/bin:$PATH cargo {}",
                linker_arguments().join(" ")
            ),
        }
    }
}

/// Installs packages; refreshes apt's lists only if they are too old.
fn install_packages(packages: &[&str]) -> Result<()> {
    println!("setup: installing packages: {}", packages.join(", "));
    let install =
        || run_command(apt_get().args(["install", "--yes", "--quiet", "--no-install-recommends"]).args(packages));
    if unknown_to_apt(packages).is_empty() && install().is_ok() {
        return Ok(());
    }
    println!("setup: refreshing apt's lists");
    run_command(apt_get().args(["update", "-qq"]))?;
    let unknown = unknown_to_apt(packages);
    ensure!(
        unknown.is_empty(),
        "apt knows no package {}; LLVM 22 for this release is at https://apt.llvm.org",
        unknown.join(", ")
    );
    install()
}

fn apt_get() -> Command {
    let mut apt_get = command("apt-get");
    apt_get.env("DEBIAN_FRONTEND", "noninteractive");
    apt_get
}

fn unknown_to_apt<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    let known = |package: &&str| output(command("apt-cache").args(["show", package])).is_ok();
    packages.iter().copied().filter(|package| !known(package)).collect()
}

/// Builds bpf-linker against the LLVM of the pinned rustc.
fn install_linker() -> Result<()> {
    match linker_version() {
        None => println!("setup: building bpf-linker {BPF_LINKER_VERSION} (about a minute)"),
        Some(found) => {
            println!("setup: building bpf-linker {BPF_LINKER_VERSION} in place of {found} (about a minute)");
        }
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = [Path::new(LLVM_PREFIX).join("bin")].into_iter().chain(env::split_paths(&path));
    let path = env::join_paths(dirs).context("PATH")?;
    run_command(command("cargo").args(linker_arguments()).env("LLVM_PREFIX", LLVM_PREFIX).env("PATH", path))?;
    let version = linker_version();
    ensure!(
        version.as_deref() == Some(BPF_LINKER_VERSION),
        "cargo has installed bpf-linker {BPF_LINKER_VERSION}, but on PATH there is {}: put cargo's bin directory first",
        version.as_deref().unwrap_or("none")
    );
    Ok(())
}

fn linker_arguments() -> [&'static str; 9] {
    [
        "install",
        "--locked",
        "--force",
        "bpf-linker",
        "--version",
        BPF_LINKER_VERSION,
        "--no-default-features",
        "--features",
        "llvm-22",
    ]
}

/// The version of the bpf-linker on PATH; `None` if there is none, or if its LLVM is missing.
fn linker_version() -> Option<String> {
    let version = output(command("bpf-linker").arg("--version")).ok()?;
    version.trim_end().strip_prefix("bpf-linker ").map(str::to_owned)
}

/// Installs cargo-deny, which only checks need.
pub(crate) fn install_cargo_deny() -> Result<()> {
    let version = output(&mut cargo(["deny", "--version"])).unwrap_or_default();
    if version.trim_end().strip_prefix("cargo-deny ") == Some(CARGO_DENY_VERSION) {
        return Ok(());
    }
    println!("setup: building cargo-deny {CARGO_DENY_VERSION} (about a minute)");
    // Not optimised: optimising its last crate alone takes as long as all the rest.
    let install = ["install", "--locked", "--force", "--debug", "--config", "profile.dev.debug=false"];
    run_command(cargo(install).args(["cargo-deny", "--version", CARGO_DENY_VERSION]))
}

/// The directory with `promtool`, which checks metrics; none if it is not there and cannot be downloaded. Debian's package is
/// unpacked instead of installed, because its installation would start a server.
pub(crate) fn promtool() -> Result<Option<PathBuf>> {
    const PACKAGE: &str = "prometheus";
    let path = env::var_os("PATH").unwrap_or_default();
    let unpacked = target_dir()?.join("tools").join(PACKAGE);
    let tools = unpacked.join("usr/bin");
    if let Some(there) = env::split_paths(&path).chain([tools.clone()]).find(|dir| dir.join("promtool").is_file()) {
        return Ok(Some(there));
    }
    if !find_command("apt-get") || !find_command("dpkg-deb") {
        return Ok(None);
    }
    println!("setup: unpacking promtool of Debian's package {PACKAGE}");
    fs::create_dir_all(&unpacked)?;
    let download = || run_command(apt_get().args(["download", "-qq", PACKAGE]).current_dir(&unpacked));
    if !unknown_to_apt(&[PACKAGE]).is_empty() || download().is_err() {
        if !is_root()? {
            return Ok(None);
        }
        run_command(apt_get().args(["update", "-qq"]))?;
        download()?;
    }
    let packages = fs::read_dir(&unpacked)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let package = packages.iter().find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    let package = package.with_context(|| format!("apt-get has downloaded no package into {}", unpacked.display()))?;
    run_command(command("dpkg-deb").arg("--extract").arg(package).arg(&unpacked))?;
    fs::remove_file(package)?;
    ensure!(tools.join("promtool").is_file(), "the package {PACKAGE} has no promtool");
    Ok(Some(tools))
}

/// Whether a command with this name exists.
pub(crate) fn find_command(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let admin_dirs = ADMIN_DIRS.iter().map(Into::into);
    env::split_paths(&path).chain(admin_dirs).any(|dir| dir.join(name).is_file())
}
