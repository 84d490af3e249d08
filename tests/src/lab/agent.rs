//! The `affinity` command on a lab's node: once, or as an agent in the background.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::param::clock_ticks_per_second;
use rustix::process::{Pid, Signal, kill_process};

use super::netns::output;
use super::{Lab, MemoryLimit, NODE_NAME, eventually};

/// How long the agent may take from its start to its readiness, by default, and from SIGTERM to its end.
const AGENT_PATIENCE: Duration = Duration::from_secs(60);

/// The capabilities that the agent needs, as a container's `securityContext` names them.
pub const CAPABILITIES: [&str; 3] = ["BPF", "NET_ADMIN", "PERFMON"];

/// Confines it as a container runtime would: it can write only to the directory of locks and to the BPF filesystem.
const CONFINE: &str = "mkdir -p /run/affinity && mount --bind /run/affinity /run/affinity && \
                       mount -o remount,bind,ro / && exec \"$@\"";

impl Lab {
    /// Runs `affinity ARGS` on the node and returns what it wrote to standard output.
    ///
    /// # Errors
    /// When it fails: its standard error.
    pub fn affinity(&self, args: &[&str]) -> Result<String> {
        output(self.affinity_command()?.args(args))
    }

    /// The same, if standard output is JSON.
    ///
    /// # Errors
    /// When it fails, or does not write JSON.
    pub fn affinity_json(&self, args: &[&str]) -> Result<serde_json::Value> {
        let text = self.affinity(&[args, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("affinity {args:?} wrote {text}"))
    }

    /// `affinity` on the node, with the global options of this lab.
    pub fn affinity_command(&self) -> Result<Command> {
        let mut command = self.node().command(binary()?);
        command.args(self.global_args());
        Ok(command)
    }

    /// Starts `affinity run` over [`Lab::source`] with these further arguments, and waits until it is ready.
    ///
    /// # Errors
    /// When it ends, or is not ready in time: its output.
    pub fn agent(&self, args: &[&str]) -> Result<Agent> {
        let mut command = self.affinity_command()?;
        command.arg("run").arg("--source").arg(self.source()).args(args);
        if !args.contains(&"--socket") {
            // Independent of what `auto` finds here: the machine's own processes are not part of a lab.
            command.args(["--socket", "off"]);
        }
        Agent::start(command, AGENT_PATIENCE)
    }

    /// Starts `affinity run` with these arguments, `--source` among them, and does not wait for it: see
    /// [`Agent::until_ready`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn agent_unready(&self, args: &[&str]) -> Result<Agent> {
        let mut command = self.affinity_command()?;
        command.arg("run").args(args);
        Agent::spawn(command, AGENT_PATIENCE)
    }

    /// As [`Lab::agent`], in a cgroup with a limit of memory.
    ///
    /// # Errors
    /// As [`Lab::agent`].
    pub fn limited_agent(&self, limit: &MemoryLimit, args: &[&str]) -> Result<Agent> {
        let mut command = limit.command(self.node(), binary()?);
        command.args(self.global_args()).arg("run").arg("--source").arg(self.source());
        command.args(args).args(["--socket", "off"]);
        Agent::start(command, AGENT_PATIENCE)
    }

    /// As [`Lab::agent`], confined as in a container: root with only these capabilities, on a read-only root filesystem.
    ///
    /// # Errors
    /// As [`Lab::agent`].
    pub fn confined_agent(&self, capabilities: &[&str], args: &[&str]) -> Result<Agent> {
        let bounds = capabilities.iter().map(|name| format!(",+{}", name.to_lowercase())).collect::<String>();
        let mut command = self.node().command("unshare");
        command.args(["--mount", "--", "sh", "-c", CONFINE, "sh", "setpriv", "--no-new-privs", "--inh-caps=-all"]);
        command.arg(format!("--bounding-set=-all{bounds}")).arg("--").arg(binary()?).args(self.global_args());
        command.arg("run").arg("--source").arg(self.source()).args(args);
        Agent::start(command, AGENT_PATIENCE)
    }

    /// The global options of this lab.
    fn global_args(&self) -> [OsString; 4] {
        ["--pin-dir".into(), self.pin_dir().into(), "--node-name".into(), NODE_NAME.into()]
    }
}

/// The command to test: `$AFFINITY_BIN`, or the one built next to the running program.
fn binary() -> Result<PathBuf> {
    let path = match std::env::var_os("AFFINITY_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            let mut directory = std::env::current_exe()?;
            directory.pop();
            if directory.file_name() == Some(OsStr::new("deps")) {
                directory.pop();
            }
            directory.join("affinity")
        }
    };
    ensure!(path.exists(), "{}: build it with `cargo build -p affinity-user`", path.display());
    Ok(path)
}

/// A running agent. Dropping it kills it (the dataplane stays), and shows its output if a test fails.
#[derive(Debug)]
pub struct Agent {
    command: Command,
    child: Child,
    /// How long it may take to be ready.
    patience: Duration,
    log: Arc<Mutex<Vec<String>>>,
}

impl Agent {
    /// Starts it, and waits until it is ready, at most this long.
    ///
    /// # Errors
    /// When it ends, or is not ready in time: its output.
    pub fn start(command: Command, patience: Duration) -> Result<Self> {
        let mut agent = Self::spawn(command, patience)?;
        agent.until_ready()?;
        Ok(agent)
    }

    fn spawn(mut command: Command, patience: Duration) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let log = Arc::default();
        let child = spawn(&mut command, &log)?;
        Ok(Self { command, child, patience, log })
    }

    /// Waits until it has been ready for the first time.
    ///
    /// # Errors
    /// As [`Lab::agent`].
    pub fn until_ready(&mut self) -> Result<()> {
        self.wait_until_ready(0)
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it with SIGKILL: it cannot clean up anything.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to stop, with SIGTERM, and waits until it has.
    ///
    /// # Errors
    /// When it does not stop in time, or its exit status is not success.
    pub fn terminate(mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let mut status: Option<ExitStatus> = None;
        eventually("the agent stops on SIGTERM", AGENT_PATIENCE, || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        })?;
        ensure!(status.is_some_and(|status| status.success()), "the agent ended with {status:?}");
        Ok(())
    }

    /// Starts it again after [`Agent::kill`], as it was started first, and waits until it is ready.
    ///
    /// # Errors
    /// As [`Lab::agent`].
    pub fn restart(&mut self) -> Result<()> {
        let written = self.log().len();
        self.restart_unready()?;
        self.wait_until_ready(written)
    }

    /// The same, without waiting.
    ///
    /// # Errors
    /// When it still runs, or cannot be started.
    pub fn restart_unready(&mut self) -> Result<()> {
        ensure!(self.child.try_wait()?.is_some(), "the agent still runs");
        self.child = spawn(&mut self.command, &self.log)?;
        Ok(())
    }

    /// The time that processors have spent on it, in user space and in the kernel.
    ///
    /// # Errors
    /// When it has ended.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The command's name, in parentheses, may have spaces.
        let fields = stat.rsplit(')').next().context("a stat line")?.split_whitespace();
        let ticks: Vec<u64> = fields.skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
        Ok(Duration::from_secs_f64(ticks.iter().sum::<u64>() as f64 / clock_ticks_per_second() as f64))
    }

    /// Bytes of memory that it has now, and at most since it was started or since [`Agent::forget_peak`].
    ///
    /// # Errors
    /// When it has ended.
    pub fn memory(&self) -> Result<Memory> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let bytes = |field: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
            let kib: u64 = line.trim_matches(|c: char| !c.is_ascii_digit()).parse()?;
            Ok(kib * 1024)
        };
        Ok(Memory { now: bytes("VmRSS:")?, peak: bytes("VmHWM:")? })
    }

    /// Resets the peak of its memory to the current value: <https://docs.kernel.org/filesystems/proc.html> (`clear_refs`).
    ///
    /// # Errors
    /// When it has ended.
    pub fn forget_peak(&self) -> Result<()> {
        Ok(std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5")?)
    }

    /// Its output so far, standard output and standard error in order.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Waits for the readiness line, after the first `written` lines of its log.
    fn wait_until_ready(&mut self, written: usize) -> Result<()> {
        let ready = eventually("the agent says that it is ready", self.patience, || {
            if self.log()[written..].iter().any(|line| is_ready(line)) {
                return Ok(true);
            }
            match self.child.try_wait()? {
                Some(status) => bail!("the agent ended with {status}"),
                None => Ok(false),
            }
        });
        ready.with_context(|| format!("{:?}\n{}", self.command, self.log().join("\n")))
    }
}

/// The memory of a process, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Now.
    pub now: u64,
    /// At most.
    pub peak: u64,
}

/// Whether a line says that the agent is ready, in either form of the log.
fn is_ready(line: &str) -> bool {
    line.starts_with("ready") || line.starts_with('{') && line.contains(r#""state":"ready""#)
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the agent's log:\n{}", self.log().join("\n"));
        }
    }
}

/// Starts the command; threads of their own gather what it writes.
fn spawn(command: &mut Command, log: &Arc<Mutex<Vec<String>>>) -> Result<Child> {
    let mut child = command.spawn().with_context(|| format!("start {command:?}"))?;
    gather(child.stdout.take().context("no standard output")?, Arc::clone(log));
    gather(child.stderr.take().context("no standard error")?, Arc::clone(log));
    Ok(child)
}

fn gather(stream: impl Read + Send + 'static, log: Arc<Mutex<Vec<String>>>) {
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            log.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(line);
        }
    });
}
