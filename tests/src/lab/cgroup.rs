//! A lab's own cgroup, and a process in it that uses sockets on command.
//!
//! Programs for sockets see the processes of a cgroup. A socket belongs to the cgroup in which it was created. So a test's
//! clients are a separate process, [`SocketProcess`], which is moved there before it creates any.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use affinity_user::attach::cgroup::root;
use anyhow::{Context, Result, bail};

use super::address::Protocol;
use super::netns::Namespace;
use super::{Lab, eventually, unique_name};

/// A cgroup of version 2 without any limit. Dropping it kills what is in it.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// A new one, below the root.
    ///
    /// # Errors
    /// When there is no version 2, or the caller is not root.
    pub fn create() -> Result<Self> {
        let path = root().context("cgroup version 2 is mounted nowhere")?.join(unique_name());
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }

    /// Its directory, as `--cgroup` takes it.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Starts `program`, which is the binary `socket_process`, in this cgroup and that namespace.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(&self, program: &str, namespace: &Namespace) -> Result<SocketProcess> {
        let mut child = self.command(namespace, program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take().context("no standard input")?;
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(SocketProcess { child, input, output, sockets: 0 })
    }

    /// A command that will run in this cgroup and that namespace.
    pub fn command(&self, namespace: &Namespace, program: impl AsRef<OsStr>) -> Command {
        command_in(&self.0, namespace, program)
    }
}

fn command_in(cgroup: &Path, namespace: &Namespace, program: impl AsRef<OsStr>) -> Command {
    let mut command = namespace.command("sh");
    command.args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#]).arg(cgroup).arg(program);
    command
}

/// Where cgroup version 1 limits memory.
pub(super) const MEMORY_V1: &str = "/sys/fs/cgroup/memory";

/// A cgroup with a memory limit, as a container has one, of the version that limits memory on this machine.
#[derive(Debug)]
pub struct MemoryLimit(PathBuf);

impl MemoryLimit {
    /// A new one, with a limit in bytes.
    ///
    /// # Errors
    /// When no version limits memory here, or the caller is not root.
    pub fn create(bytes: u64) -> Result<Self> {
        let v1 = Path::new(MEMORY_V1);
        let (path, file) = if v1.join("memory.limit_in_bytes").exists() {
            (v1.join(unique_name()), "memory.limit_in_bytes")
        } else {
            let root = root().context("no cgroup limits memory here")?;
            fs::write(root.join("cgroup.subtree_control"), "+memory").context("the memory controller")?;
            (root.join(unique_name()), "memory.max")
        };
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        let made = Self(path);
        fs::write(made.0.join(file), bytes.to_string()).with_context(|| format!("{}: {file}", made.0.display()))?;
        Ok(made)
    }

    /// A command that will run in this cgroup and that namespace.
    pub fn command(&self, namespace: &Namespace, program: impl AsRef<OsStr>) -> Command {
        command_in(&self.0, namespace, program)
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// Kills the processes of a cgroup and removes it; best effort, because it is used to clean up.
pub(super) fn remove(path: &Path) {
    let _ = fs::write(path.join("cgroup.kill"), "1");
    let _ = eventually("its processes have ended", Duration::from_secs(1), || {
        Ok(fs::remove_dir(path).is_ok() || !path.exists())
    });
}

impl Lab {
    /// Arguments of `affinity run` for a lab that translates sockets in this cgroup, with devices or without.
    pub fn socket_args<'a>(cgroup: &'a Cgroup, devices: &[&'a str]) -> Result<Vec<&'a str>> {
        let path = cgroup.path().to_str().context("a path of UTF-8")?;
        Ok([devices, &["--socket", "on", "--cgroup", path]].concat())
    }
}

/// A process with sockets that a test controls. Dropping it ends it, and its sockets with it.
#[derive(Debug)]
pub struct SocketProcess {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    sockets: usize,
}

/// A socket of a [`SocketProcess`], by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketNumber(usize);

/// The kernel's answer: the text, or the name of the error.
pub type Answer = Result<String, String>;

impl SocketProcess {
    /// A connected socket, and its peer address according to `getpeername()`.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn connect(&mut self, protocol: Protocol, to: SocketAddr) -> Result<(SocketNumber, Answer)> {
        let answer = self.told(&format!("connect {protocol} {to}"))?;
        Ok((self.next(), answer))
    }

    /// A UDP socket that is not connected, for that address's family.
    ///
    /// # Errors
    /// When the process has ended, or gets no socket.
    pub fn bind(&mut self, like: SocketAddr) -> Result<SocketNumber> {
        match self.told(&format!("bind {like}"))? {
            Ok(_) => Ok(self.next()),
            Err(error) => bail!("bind: {error}"),
        }
    }

    fn next(&mut self) -> SocketNumber {
        self.sockets += 1;
        SocketNumber(self.sockets - 1)
    }

    /// Asks a pod over a connected socket.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn ask(&mut self, socket: SocketNumber, path: &str) -> Result<Answer> {
        self.told(&format!("ask {} {path}", socket.0))
    }

    /// Asks a pod by a datagram; answers `BODY from SENDER`.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn ask_to(&mut self, socket: SocketNumber, to: SocketAddr, path: &str) -> Result<Answer> {
        self.told(&format!("send {} {to} {path}", socket.0))
    }

    /// Waits, for a second at most, until the other side or the kernel has closed a connected socket: the name of the error.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn await_end(&mut self, socket: SocketNumber) -> Result<Answer> {
        self.told(&format!("wait {}", socket.0))
    }

    /// A socket's peer address according to `getpeername()`.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn peer(&mut self, socket: SocketNumber) -> Result<Answer> {
        self.told(&format!("peer {}", socket.0))
    }

    /// Closes a socket.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn close(&mut self, socket: SocketNumber) -> Result<()> {
        self.told(&format!("close {}", socket.0)).map(drop)
    }

    /// Connects, asks for the pod's name, and closes; checks that the peer address is the one that was asked for.
    ///
    /// # Errors
    /// When it gets no answer, or another peer address.
    pub fn dial(&mut self, protocol: Protocol, to: SocketAddr) -> Result<String> {
        let (socket, peer) = self.connect(protocol, to)?;
        let peer = peer.map_err(|error| anyhow::anyhow!("connect {protocol} {to}: {error}"))?;
        anyhow::ensure!(peer == to.to_string(), "connected to {peer} and not to {to}");
        let answer = self.ask(socket, "/")?;
        self.close(socket)?;
        answer.map_err(|error| anyhow::anyhow!("ask {protocol} {to}: {error}"))
    }

    fn told(&mut self, command: &str) -> Result<Answer> {
        writeln!(self.input, "{command}")?;
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("the process has ended with {:?} at: {command}", self.child.wait());
        }
        Ok(match line.trim_end_matches('\n').split_once(' ') {
            Some(("ok", text)) => Ok(text.to_owned()),
            Some(("error", text)) => Err(text.to_owned()),
            _ => bail!("{command}: {line}"),
        })
    }
}

impl Drop for SocketProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
