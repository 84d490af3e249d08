//! Builds the kernel programs of `affinity-ebpf` and leaves each object at `OUT_DIR/<program>`,
//! where `aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/affinity"))` finds it.
//!
//! The same toolchain that builds this crate builds them. The BPF target has no prebuilt `core`, so
//! the child alone may use unstable cargo (`RUSTC_BOOTSTRAP=1`, `-Z build-std=core`).
//!
//! `AFFINITY_SKIP_EBPF=1` writes empty objects instead: enough for documentation and lints on a
//! machine without bpf-linker, not for a binary that loads anything.

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const SKIP: &str = "AFFINITY_SKIP_EBPF";

/// What the objects are made of, beside the toolchain: relative to the repository's root.
const INPUTS: [&str; 7] = [
    "affinity-common/Cargo.toml",
    "affinity-common/src",
    "affinity-ebpf/Cargo.toml",
    "affinity-ebpf/src",
    "Cargo.lock",
    "Cargo.toml",
    "rust-toolchain.toml",
];

fn main() {
    if let Err(error) = run() {
        // One line for the reader instead of the whole output of a failed build script.
        println!("cargo::error={error}");
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let root = variable("CARGO_MANIFEST_DIR").map(PathBuf::from)?.join("..");
    let out_dir = variable("OUT_DIR").map(PathBuf::from)?;
    for input in INPUTS {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    println!("cargo::rerun-if-env-changed={SKIP}");

    let programs = programs(&root.join("affinity-ebpf/Cargo.toml"))?;
    if env::var_os(SKIP).is_some_and(|value| value == "1") {
        println!("cargo::warning={SKIP}=1: this build has no kernel programs");
        for program in programs {
            fs::write(out_dir.join(program), [])?;
        }
        return Ok(());
    }

    require_tools()?;
    let built = build(&root, &out_dir.join("ebpf"))?;
    for program in programs {
        fs::copy(built.join(&program), out_dir.join(&program))?;
    }
    Ok(())
}

/// Builds every program into `target_dir` and returns the directory that holds the objects.
fn build(root: &Path, target_dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let target = match variable("CARGO_CFG_TARGET_ENDIAN")?.as_str() {
        "big" => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let mut command = Command::new(variable("CARGO")?);
    command
        .current_dir(root)
        .args(["build", "--quiet", "--package", "affinity-ebpf", "--bins"])
        .args(["--release", "--target", target, "-Z", "build-std=core"])
        .arg("--target-dir")
        .arg(target_dir)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags()?.join("\x1f"))
        // Clippy's driver, when it is the one that runs this script, must not build the objects.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .stdin(Stdio::null());

    let output = command.output()?;
    if output.status.success() {
        return Ok(target_dir.join(target).join("release"));
    }
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        println!("cargo::warning={line}");
    }
    Err(format!("the kernel programs do not compile (set {SKIP}=1 to build without them)").into())
}

/// The flags that shape the objects.
///
/// `v3` brings 32-bit registers and atomics that return the old value. BTF, which is made of debugging information, tells
/// the verifier which functions it may take by themselves; without it the programs are several times as much work for it.
/// What a release calls its paths, these are called too.
fn rustflags() -> Result<Vec<String>, Box<dyn Error>> {
    let arch = match variable("CARGO_CFG_TARGET_ARCH")? {
        riscv if riscv.starts_with("riscv64") => "riscv64".to_owned(),
        arch => arch,
    };
    let outer = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    let remapped = outer.split('\x1f').filter(|flag| flag.starts_with("--remap-path-prefix")).map(str::to_owned);
    // Stores in place of calls of `memset`: a call is a loop, and 32 more bytes at the deepest place of the stack.
    let stores = "-Clink-arg=--disable-expand-memcpy-in-order";
    let flags = ["-Cdebuginfo=2", "-Clink-arg=--btf", stores, "-Ctarget-cpu=v3"].map(str::to_owned);
    let arch = format!("--cfg=bpf_target_arch=\"{arch}\"");
    Ok(flags.into_iter().chain([arch]).chain(remapped).collect())
}

/// The names of the package's binaries, from the `[[bin]]` tables of its manifest.
fn programs(manifest: &Path) -> Result<Vec<String>, Box<dyn Error>> {
    let manifest = fs::read_to_string(manifest)?;
    let names = manifest.split("[[bin]]").skip(1).filter_map(|table| {
        let line = table.lines().find(|line| line.starts_with("name = "))?;
        line.split('"').nth(1).map(str::to_owned)
    });
    Ok(names.collect())
}

/// Fails with one line that says what to do where a tool is missing.
fn require_tools() -> Result<(), Box<dyn Error>> {
    let linker = Command::new("bpf-linker").arg("--version").output();
    if !linker.is_ok_and(|output| output.status.success()) {
        return Err("bpf-linker is missing: run `cargo xtask setup`".into());
    }
    let sysroot = Command::new(variable("RUSTC")?).args(["--print", "sysroot"]).output()?;
    let sysroot = String::from_utf8(sysroot.stdout)?;
    let core = Path::new(sysroot.trim_end()).join("lib/rustlib/src/rust/library/core");
    if !core.is_dir() {
        return Err("rust-src is missing: run `cargo xtask setup`".into());
    }
    Ok(())
}

/// A variable that cargo sets for every build script.
fn variable(name: &str) -> Result<String, Box<dyn Error>> {
    env::var(name).map_err(|error| format!("{name}: {error}").into())
}
