//! A named network namespace: created by `ip netns add`, removed when dropped.
//!
//! Sockets belong to the namespace in which they were created, not to the thread that uses them. So [`Namespace::run`] enters
//! on a separate thread, and the sockets that the closure creates there can be used anywhere. A [`Door`] does the same and may
//! outlive the name.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where `ip netns` keeps its names.
pub(super) const NETNS_DIR: &str = "/run/netns";

/// A way into a namespace. It stays valid when the name is gone.
#[derive(Clone, Debug)]
pub struct Door(Arc<File>);

impl Door {
    /// A handle for the namespace that a file refers to.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(Arc::new(File::open(path)?)))
    }

    /// Moves the calling thread inside, permanently.
    pub(super) fn enter(&self) -> io::Result<()> {
        Ok(move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// Runs `work` inside, on a separate thread, and waits for it.
    ///
    /// # Errors
    /// When the namespace cannot be entered. A panic of `work` continues in the caller.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| self.enter().map(|()| work()));
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// A network namespace that this process created. Dropping it kills its processes and removes it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    door: Door,
    keep: bool,
}

impl Namespace {
    /// Creates a namespace; fails when the name is taken or the caller lacks permission.
    pub(super) fn create(name: String) -> Result<Self> {
        // `ip netns add` races with itself over the first mount of its directory.
        let _one_at_a_time = machine_lock()?;
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let door = Door::open(&Path::new(NETNS_DIR).join(&name))?;
        Ok(Self { name, door, keep: false })
    }

    /// The name, as `ip -n` takes it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file to enter it with, as `nsenter --net=` takes it.
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.name)
    }

    /// Leaves the namespace in place when this value is dropped.
    pub(super) fn keep(&mut self) {
        self.keep = true;
    }

    /// A handle to enter it.
    pub fn door(&self) -> &Door {
        &self.door
    }

    /// Runs `work` inside, on a separate thread, and waits for it: see [`Door::run`].
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        self.door.run(work)
    }

    /// A command that will run inside. With `nsenter`, because `ip netns exec` mounts another /sys, which hides the pinned
    /// programs.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Runs a few `ip` commands inside, one a line.
    ///
    /// # Errors
    /// The error of `ip`.
    pub fn ip(&self, script: &str) -> Result<()> {
        let mut ip = Command::new("ip");
        ip.args(["-n", &self.name, "-batch", "-"]);
        feed(&mut ip, script).with_context(|| format!("in {}:\n{script}", self.name))
    }

    /// Sets kernel parameters under `/proc/sys/net` inside: (path below it, value).
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            settings.iter().try_for_each(|(name, value)| {
                std::fs::write(Path::new("/proc/sys/net").join(name), value).with_context(|| name.to_string())
            })
        })?
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if !self.keep {
            delete(&self.name);
        }
    }
}

/// Kills the processes of the namespace and removes its name; best effort, because it is used to clean up.
pub(super) fn delete(name: &str) {
    if let Ok(pids) = output(Command::new("ip").args(["netns", "pids", name])) {
        for pid in pids.lines().filter_map(|line| line.trim().parse().ok()).filter_map(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    let _ = run(Command::new("ip").args(["netns", "del", name]));
}

/// A lock for operations that would race, across all processes of the machine: released when the file is dropped.
pub(super) fn machine_lock() -> Result<File> {
    let path = "/run/affinity-lab.lock";
    let file = File::create(path).with_context(|| format!("{path}: the lab needs root"))?;
    file.lock()?;
    Ok(file)
}

/// Runs a command to its end; its standard error is the error.
pub(super) fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs a command to its end and returns what it wrote to standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let done = command.stdin(Stdio::null()).output().with_context(|| format!("start {command:?}"))?;
    if !done.status.success() {
        bail!("{command:?}: {}: {}", done.status, String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(String::from_utf8(done.stdout)?)
}

/// Runs a command to its end with `input` as its standard input; its standard error is the error.
pub(crate) fn feed(command: &mut Command, input: &str) -> Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let sent = child.stdin.take().context("no standard input")?.write_all(input.as_bytes());
    let done = child.wait_with_output()?;
    if !done.status.success() {
        bail!("{command:?}: {}: {}", done.status, String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(sent?)
}
