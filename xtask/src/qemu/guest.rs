//! A guest: QEMU with a Debian kernel, this machine's files, and a list of programs to run.
//!
//! Root, the repository and the target directory are shared by 9p at their paths, so that test binaries run as they are. The
//! standard output of the programs is shown as it comes. The guest succeeds if each program has ended and its status is known.
//! It fails if it panics, hangs or runs out of memory.

use std::{
    env,
    fmt::Write as _,
    fs,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::image::Kernel;
use crate::run::{command, root, target_dir};

const MEMORY_MIB: u32 = 3072;

/// How long a guest may take from its start to its first program.
const BOOT: Duration = Duration::from_secs(180);

/// How long its programs may be silent. Tests print something when they end, and some take many minutes under emulation on a
/// busy machine.
const SILENCE: Duration = Duration::from_secs(1800);

/// How long a guest may take to boot, do nothing and end, with hardware virtualisation.
const PROBE: Duration = Duration::from_secs(20);

/// How many lines of a guest's console are shown after a failure.
const CONSOLE_LINES: usize = 40;

/// The file that a guest creates before its first program.
const BOOTED: &str = "booted";

/// The emulated processor. An emulated string instruction (`rep movsb`) takes one step for each byte, so the kernel must not
/// consider it fast: it would copy and clear memory with it, mainly when it verifies programs.
const EMULATED: &str = "max,la57=off,erms=off,fsrm=off";

/// For the same reason: no `rep_good` (the feature with this number), and memory is cleared only on request.
const NO_STRING_INSTRUCTIONS: &str = " init_on_alloc=0 clearcpuid=112";

/// The prefix of directories with results; the id of the process that made one follows.
const RESULTS: &str = "run-";

/// Words on the console if the kernel has a fault.
const FAULTS: [&str; 6] =
    ["Kernel panic", "kernel BUG at", "BUG: ", "Oops: ", "general protection fault", "Out of memory"];

/// How the guest's processors are run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Accelerator {
    /// By hardware virtualisation.
    Kvm,
    /// Emulated, several times slower.
    Tcg,
}

impl Accelerator {
    /// The accelerator that works here: a guest is started with KVM, and if it has not ended in time, KVM does not work. The
    /// answer is kept until the next reboot of the machine.
    ///
    /// # Errors
    /// If QEMU cannot be started.
    pub(crate) fn probe(qemu: &Qemu, kernel: &Kernel) -> Result<Self> {
        if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Self::Tcg);
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let answer = qemu.dir.join("kvm");
        let known = fs::read_to_string(&answer).unwrap_or_default();
        if let Some(works) = known.strip_prefix(&boot) {
            return Ok(if works == "works" { Self::Kvm } else { Self::Tcg });
        }
        println!("qemu: trying KVM, for at most {} s", PROBE.as_secs());
        let guest = Guest { accelerator: Self::Kvm, limit: PROBE, ..Guest::new(qemu, kernel) };
        let works = guest.run(&[])?.is_success();
        fs::write(&answer, format!("{boot}{}", if works { "works" } else { "hangs" }))?;
        Ok(if works { Self::Kvm } else { Self::Tcg })
    }

    /// The factor for the timeouts of tests.
    pub(crate) fn patience(self) -> u32 {
        match self {
            Self::Kvm => 1,
            Self::Tcg => 6,
        }
    }

    /// The name for a line of output.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Kvm => "KVM",
            Self::Tcg => "emulation",
        }
    }
}

/// The emulator.
pub(crate) struct Qemu {
    /// The program.
    pub(crate) program: PathBuf,
    /// The directory of its own files, if it is not installed.
    pub(crate) prefix: Option<PathBuf>,
    /// The directory for kernels and results.
    pub(crate) dir: PathBuf,
    /// The static busybox.
    pub(crate) busybox: PathBuf,
}

impl Qemu {
    /// A command that runs it, with the arguments and the environment that it always needs.
    pub(crate) fn command(&self) -> Command {
        let mut qemu = command(&self.program);
        if let Some(prefix) = &self.prefix {
            let libraries = prefix.join("usr/lib/x86_64-linux-gnu");
            qemu.env("LD_LIBRARY_PATH", &libraries).env("QEMU_MODULE_DIR", libraries.join("qemu"));
            for name in ["qemu", "seabios", "ipxe/qemu"] {
                let dir = prefix.join("usr/share").join(name);
                let dir = if dir.exists() { dir } else { prefix.join("usr/lib").join(name) };
                qemu.arg("-L").arg(dir);
            }
        }
        qemu
    }
}

/// A program to run in a guest.
pub(crate) struct Job {
    /// The name to show.
    pub(crate) name: String,
    /// The working directory.
    pub(crate) directory: PathBuf,
    /// The program and its arguments.
    pub(crate) words: Vec<String>,
}

/// How a program ended, and its output.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Ended {
    pub(crate) name: String,
    /// None: it was still running when the guest ended.
    pub(crate) status: Option<i32>,
    pub(crate) output: String,
    /// Time since the previous program ended.
    pub(crate) took: Duration,
}

/// The result of a guest.
pub(crate) struct Report {
    /// The programs that had started, in order.
    pub(crate) ended: Vec<Ended>,
    /// Why it did not finish, with the last lines of its console.
    pub(crate) failure: Option<anyhow::Error>,
}

impl Report {
    /// Whether every program has succeeded.
    pub(crate) fn is_success(&self) -> bool {
        self.failure.is_none() && self.ended.iter().all(|job| job.status == Some(0))
    }
}

/// A guest to run.
pub(crate) struct Guest<'a> {
    pub(crate) qemu: &'a Qemu,
    pub(crate) kernel: &'a Kernel,
    pub(crate) accelerator: Accelerator,
    /// Environment variables of its programs.
    pub(crate) environment: Vec<(String, String)>,
    /// QEMU arguments for additional devices.
    pub(crate) devices: Vec<String>,
    /// The network namespace that QEMU runs in; none: the host's own.
    pub(crate) namespace: Option<String>,
    /// The time limit for the whole guest.
    pub(crate) limit: Duration,
}

impl<'a> Guest<'a> {
    /// An emulated guest without network.
    pub(crate) fn new(qemu: &'a Qemu, kernel: &'a Kernel) -> Self {
        Self {
            qemu,
            kernel,
            accelerator: Accelerator::Tcg,
            environment: Vec::new(),
            devices: Vec::new(),
            namespace: None,
            limit: Duration::from_secs(4 * 3600),
        }
    }

    /// Boots it, and runs the programs one after another.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(crate) fn run(&self, jobs: &[Job]) -> Result<Report> {
        let results = self.qemu.dir.join(format!("{RESULTS}{}", std::process::id()));
        let _ = fs::remove_dir_all(&results);
        fs::create_dir_all(&results)?;
        fs::copy(&self.qemu.busybox, results.join("busybox"))?;
        fs::write(results.join("guest.sh"), self.script(&results, jobs)?)?;
        let watched = self.watch(&results, jobs);
        let console = fs::read(results.join("console")).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        // If the kernel has reported a fault, that is why the guest has ended.
        let failure = match (fault_on(&console), watched) {
            (Some(line), _) => Some(anyhow!("the guest's kernel says: {line}")),
            (None, watched) => watched.err(),
        };
        let mut since = modified(&results.join(BOOTED));
        let ended = jobs.iter().enumerate().map_while(|(number, job)| read_end(&results, number, job, &mut since));
        let ended = ended.collect();
        let failure = failure.map(|error| {
            anyhow!("Linux {}: {error:#}. The end of its console:\n{}", self.kernel.version, last_lines(&console))
        });
        if failure.is_none() {
            fs::remove_dir_all(&results)?;
        }
        Ok(Report { ended, failure })
    }

    /// Starts QEMU, and watches it until it ends.
    fn watch(&self, results: &Path, jobs: &[Job]) -> Result<()> {
        let mut qemu = self.command(results)?;
        let log = fs::File::create(results.join("qemu.log"))?;
        qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut qemu = Running(qemu.spawn().with_context(|| format!("start {}", self.qemu.program.display()))?);
        let started = Instant::now();
        let mut heard = started;
        let mut shown = vec![0; jobs.len()];
        let mut current = 0;
        loop {
            let ended = qemu.0.try_wait()?;
            while let (Some(job), Some(shown)) = (jobs.get(current), shown.get_mut(current)) {
                // Read first: the program wrote all its output before its status.
                let status = fs::read_to_string(results.join(format!("status.{current}"))).unwrap_or_default();
                if show(&output_file(results, current), shown)? {
                    heard = Instant::now();
                }
                if !status.ends_with('\n') {
                    break;
                }
                println!(
                    "qemu: {} ended with status {}, {} s after the start",
                    job.name,
                    status.trim_end(),
                    started.elapsed().as_secs()
                );
                current += 1;
            }
            if let Some(status) = ended {
                let said = fs::read_to_string(results.join("qemu.log")).unwrap_or_default();
                ensure!(status.success(), "QEMU ended with {status}: {}", said.trim_end());
                ensure!(results.join("finished").exists(), "the guest ended before its programs");
                return Ok(());
            }
            ensure!(started.elapsed() < self.limit, "the guest did not finish within {} s", self.limit.as_secs());
            let booted = results.join(BOOTED).exists();
            ensure!(booted || started.elapsed() < BOOT, "the guest did not boot within {} s", BOOT.as_secs());
            ensure!(!booted || heard.elapsed() < SILENCE, "no output from the guest for {} s", SILENCE.as_secs());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// QEMU with all its arguments.
    fn command(&self, results: &Path) -> Result<Command> {
        let mut qemu = self.qemu.command();
        match self.accelerator {
            Accelerator::Kvm => qemu.args(["-accel", "kvm", "-cpu", "host"]),
            Accelerator::Tcg => qemu.args(["-accel", "tcg,thread=multi", "-cpu", EMULATED]),
        };
        qemu.args(["-machine", "q35", "-smp", "2", "-m"]).arg(MEMORY_MIB.to_string());
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.arg("-serial").arg(format!("file:{}", results.join("console").display()));
        qemu.args(["-device", "virtio-rng-pci"]);
        qemu.arg("-kernel").arg(self.kernel.image()).arg("-initrd").arg(self.kernel.initramfs());
        let (repository, target) = (root(), target_dir()?);
        // Emulated processors and timers may be late on a busy machine. The kernel would consider them broken.
        let mut line = "console=ttyS0 quiet panic=-1 oops=panic no_timer_check nowatchdog mitigations=off".to_owned();
        if self.accelerator == Accelerator::Tcg {
            line += NO_STRING_INSTRUCTIONS;
        }
        let shares = [("repository", repository.as_path()), ("target", &target), ("results", results)];
        for (name, path) in shares {
            write!(line, " affinity.{name}={}", path.display())?;
        }
        qemu.arg("-append").arg(line);
        for (name, path) in [("root", Path::new("/"))].into_iter().chain(shares) {
            let readonly = if name == "results" { "off" } else { "on" };
            let path = path.display();
            qemu.arg("-fsdev")
                .arg(format!("local,id={name},path={path},security_model=none,readonly={readonly},multidevs=remap"));
            qemu.arg("-device").arg(format!("virtio-9p-pci,fsdev={name},mount_tag={name}"));
        }
        qemu.args(&self.devices);
        Ok(match &self.namespace {
            None => qemu,
            Some(namespace) => enter(namespace, &qemu),
        })
    }

    /// The script that the guest's first process runs once the files are mounted.
    fn script(&self, results: &Path, jobs: &[Job]) -> Result<String> {
        let quoted_path = quote(&env::var("PATH").unwrap_or_default());
        let mut script = format!(
            "results={}\nmodules={}\nexport PATH={quoted_path}:/usr/sbin:/sbin:/usr/bin:/bin\n",
            quote(&results.display().to_string()),
            quote(&self.kernel.modules().display().to_string()),
        );
        let home = env::var("HOME").unwrap_or_else(|_| "/root".to_owned());
        // Otherwise insta would run cargo for it, in every test.
        let snapshots = ("INSTA_WORKSPACE_ROOT".to_owned(), root().display().to_string());
        let variables = [("HOME".to_owned(), home), snapshots, ("AFFINITY_TEST_GUEST".to_owned(), "1".to_owned())];
        for (name, value) in variables.iter().chain(&self.environment) {
            writeln!(script, "export {name}={}", quote(value))?;
        }
        script += include_str!("guest.sh");
        for (number, job) in jobs.iter().enumerate() {
            let words: Vec<_> = job.words.iter().map(|word| quote(word)).collect();
            writeln!(script, "job {number} {} {}", quote(&job.directory.display().to_string()), words.join(" "))?;
        }
        script += "finish\n";
        Ok(script)
    }
}

/// The same command, inside a network namespace.
fn enter(namespace: &str, inner: &Command) -> Command {
    let mut outer = command("nsenter");
    outer.arg(format!("--net=/run/netns/{namespace}")).arg("--").arg(inner.get_program()).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        if let Some(value) = value {
            outer.env(name, value);
        }
    }
    outer
}

/// Removes results of failed guests, if the process that started them has ended.
pub(crate) fn remove_stale_results(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(RESULTS));
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// QEMU, killed when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The first line of a console with which the kernel reports a fault.
fn fault_on(console: &str) -> Option<&str> {
    console.lines().find(|line| FAULTS.iter().any(|words| line.contains(words)))
}

fn output_file(results: &Path, number: usize) -> PathBuf {
    results.join(format!("output.{number}"))
}

/// Shows the part of a file beyond `shown`; returns whether there was any.
fn show(path: &Path, shown: &mut u64) -> Result<bool> {
    let Ok(mut file) = fs::File::open(path) else { return Ok(false) };
    file.seek(SeekFrom::Start(*shown))?;
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    *shown += text.len() as u64;
    let mut out = std::io::stdout().lock();
    out.write_all(&text)?;
    out.flush()?;
    Ok(!text.is_empty())
}

/// None: the program was not started. `since` is the end of the previous program, and is set to the end of this one.
fn read_end(results: &Path, number: usize, job: &Job, since: &mut SystemTime) -> Option<Ended> {
    let output = fs::read(output_file(results, number)).ok()?;
    let status_file = results.join(format!("status.{number}"));
    let status = fs::read_to_string(&status_file).ok();
    let until = if status.is_some() { modified(&status_file) } else { SystemTime::now() };
    let took = until.duration_since(*since).unwrap_or_default();
    *since = until;
    Some(Ended {
        name: job.name.clone(),
        status: status.and_then(|status| status.trim().parse().ok()),
        output: String::from_utf8_lossy(&output).into_owned(),
        took,
    })
}

/// When a file was last written; now, if it does not exist.
fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).and_then(|file| file.modified()).unwrap_or_else(|_| SystemTime::now())
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
}

/// A word of a shell's command line.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_the_shell() {
        assert_eq!(quote("plain"), "'plain'");
        assert_eq!(quote("it's $x"), "'it'\\''s $x'");
    }

    #[test]
    fn faults_on_a_console_are_found() {
        let console = "[ 0.1] ..MP-BIOS bug: 8254 timer\n[ 3.0] Out of memory: Killed process 7 (lab)\n[ 3.1] more\n";
        assert_eq!(fault_on(console), Some("[ 3.0] Out of memory: Killed process 7 (lab)"));
        assert_eq!(fault_on("[ 0.1] ..MP-BIOS bug: 8254 timer\n"), None);
    }

    #[test]
    fn only_the_end_of_a_console_is_shown() {
        let text: String = (0..100).map(|number| format!("{number}\n")).collect();
        let last = last_lines(&text);
        assert!(last.starts_with("60\n") && last.ends_with("\n99"), "{last}");
        assert_eq!(last_lines("one\ntwo"), "one\ntwo");
    }
}
