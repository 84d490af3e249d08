//! Failed starts: one line says why, and nothing new is attached or pinned.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use affinity_common::names;
use affinity_tests::lab::{Family, Lab, WIRE, eventually};
use affinity_tests::story::{Hook, Route, web};
use affinity_user::{
    load::{self, LoadError, Options},
    objects::PROGRAMS,
    pins::PinDir,
};
use anyhow::{Context, Result, ensure};
use aya_obj::Object;

/// People do not read longer lines.
const LINE_MOST: usize = 600;

/// A device with frames without an Ethernet header: it cannot be attached.
const RAW: &str = "raw0";

fn lab() -> Result<Lab> {
    let lab = Lab::with_pods(2)?;
    lab.publish(&web().client_ip().on(0..2))?;
    lab.node().ip(&format!("tuntap add dev {RAW} mode tun\n"))?;
    Ok(lab)
}

/// The last line that a start wrote; it must have failed with exit code 1.
fn failed_start(mut command: Command) -> Result<String> {
    let output = command.output()?;
    let written = String::from_utf8(output.stderr)?;
    let line = written.lines().last().unwrap_or_default().to_owned();
    ensure!(output.status.code() == Some(1), "{command:?}: {}: {written}", output.status);
    ensure!(line.starts_with("error: ") && line.len() < LINE_MOST, "not one clear line: {written}");
    Ok(line)
}

fn start(lab: &Lab, word: &str, source: &Path, args: &[&str]) -> Result<Command> {
    let mut command = lab.affinity_command()?;
    command.arg(word).arg("--source").arg(source).args(["--socket", "off"]).args(args);
    Ok(command)
}

fn is_served(lab: &Lab) -> bool {
    let web = web();
    Route::all_to(&web).iter().all(|route| route.dial(lab, 1, 1).is_ok())
}

#[test]
fn a_start_that_fails_on_the_second_device_leaves_nothing() -> Result<()> {
    let lab = lab()?;
    for word in ["run", "attach"] {
        let line = failed_start(start(&lab, word, lab.source(), &["--device", WIRE, RAW])?)?;
        ensure!(line.contains(RAW) && line.contains("Ethernet"), "{word}: {line}");
        ensure!(!lab.pin_dir().exists(), "{word}: {} is still there", lab.pin_dir().display());
        ensure!(!is_served(&lab), "{word}: something is attached");
    }
    Ok(())
}

#[test]
fn a_failed_start_over_a_running_dataplane_leaves_it_attached() -> Result<()> {
    let lab = lab()?;
    for hook in Hook::ALL {
        lab.agent(&hook.args())?.terminate()?;
        let links = links(&lab)?;
        let args = ["--device", WIRE, "pod0", RAW, "--xdp", "off"];
        failed_start(start(&lab, "attach", lab.source(), &args)?)?;
        ensure!(is_served(&lab), "{hook:?}: no longer served");
        let left: Vec<_> = self::links(&lab)?;
        let devices = |links: &[String]| -> std::collections::BTreeSet<String> {
            links.iter().filter_map(|link| Some(link.split_once('-')?.0.to_owned())).collect()
        };
        assert_eq!(devices(&left), devices(&links), "{hook:?}: {left:?}");
        lab.affinity(&["detach"])?;
    }
    Ok(())
}

/// The pins of links.
fn links(lab: &Lab) -> Result<Vec<String>> {
    let name = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    fs::read_dir(PinDir::new(lab.pin_dir()).links())?.map(name).collect()
}

#[test]
fn a_pin_directory_that_holds_something_else_stays_as_it_was() -> Result<()> {
    let lab = lab()?;
    fs::create_dir(lab.pin_dir())?;
    let theirs = lab.pin_dir().join("theirs");
    fs::create_dir(&theirs)?;
    failed_start(start(&lab, "attach", lab.source(), &["--device", WIRE, RAW])?)?;
    let left: Vec<_> = fs::read_dir(lab.pin_dir())?.collect::<Result<_, _>>()?;
    ensure!(left.len() == 1 && theirs.is_dir(), "{left:?}");
    fs::remove_dir(&theirs)?;
    fs::remove_dir(lab.pin_dir())?;
    Ok(())
}

/// Sources that cannot be read.
fn unreadable(lab: &Lab) -> Result<Vec<std::path::PathBuf>> {
    let bad = lab.scratch().join("bad");
    fs::create_dir_all(&bad)?;
    fs::write(bad.join("a.yaml"), "kind: [\n")?;
    fs::write(bad.join("b.yaml"), "}\n")?;
    Ok(vec![lab.scratch().join("nowhere"), bad.clone(), bad.join("a.yaml")])
}

#[test]
fn a_source_that_cannot_be_read_attaches_nothing() -> Result<()> {
    let lab = lab()?;
    for source in unreadable(&lab)? {
        for word in ["run", "attach"] {
            let line = failed_start(start(&lab, word, &source, &["--device", WIRE])?)?;
            ensure!(
                line.contains(&*source.to_string_lossy()) && line.ends_with("nothing is attached"),
                "{word}: {line}"
            );
            ensure!(!lab.pin_dir().exists(), "{word}: something is pinned");
        }
    }
    Ok(())
}

#[test]
fn a_source_that_cannot_be_read_leaves_a_running_dataplane_as_it_is() -> Result<()> {
    let lab = lab()?;
    lab.agent(&Hook::Tc.args())?.terminate()?;
    let published = lab.affinity(&["dump", "frontends_v4"])?;
    for source in unreadable(&lab)? {
        let line = failed_start(start(&lab, "attach", &source, &["--device", WIRE])?)?;
        ensure!(line.ends_with("the dataplane does not change"), "{line}");
        ensure!(is_served(&lab), "no longer served");
        assert_eq!(lab.affinity(&["dump", "frontends_v4"])?, published);
    }
    // An agent waits, as it does for a cluster's API.
    let source = lab.scratch().join("later");
    let later = source.display().to_string();
    let mut agent = lab.agent_unready(&["--source", &later, "--device", WIRE, "--xdp", "off", "--socket", "off"])?;
    let patience = Duration::from_secs(30);
    eventually("the agent says that it waits", patience, || {
        Ok(agent.log().iter().any(|line| line.contains("the dataplane does not change")))
    })?;
    ensure!(is_served(&lab), "no longer served");
    fs::create_dir(&source)?;
    fs::copy(lab.source().join("web.yaml"), source.join("web.yaml"))?;
    agent.until_ready()?;
    ensure!(is_served(&lab), "no longer served");
    agent.terminate()
}

/// The verifier accepts less from a process without this capability: programs that it rejects on this kernel.
#[test]
fn a_program_that_the_kernel_refuses_is_named_in_one_line() -> Result<()> {
    let lab = lab()?;
    let error = lab.confined_agent(&["BPF", "NET_ADMIN"], &Hook::Tc.args()).unwrap_err().to_string();
    let line = error.lines().rfind(|line| line.starts_with("error: ")).with_context(|| error.clone())?;
    ensure!(line.contains("this kernel rejects the program") && line.len() < LINE_MOST, "{line}");
    ensure!(line.contains(".verifier.log"), "no file is named: {line}");
    ensure!(!lab.pin_dir().exists(), "something is pinned");
    Ok(())
}

/// The programs, with the first instruction of one replaced by `exit`, which leaves the result undefined.
fn damaged(program: &str) -> Result<&'static [u8]> {
    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
    let object = Object::parse(PROGRAMS)?;
    let key = object.programs.get(program).context("the program")?.function_key();
    let instructions = &object.functions.get(&key).context("its function")?.instructions;
    let bytes: Vec<u8> = instructions
        .iter()
        .take(64)
        .flat_map(|insn| {
            let registers = insn.dst_reg() | insn.src_reg() << 4;
            [&[insn.code, registers][..], &insn.off.to_ne_bytes(), &insn.imm.to_ne_bytes()].concat()
        })
        .collect();
    let at = PROGRAMS.windows(bytes.len()).position(|window| window == bytes).context("its bytes")?;
    let mut copy = PROGRAMS.to_vec();
    copy[at..at + EXIT.len()].copy_from_slice(&EXIT);
    Ok(copy.leak())
}

#[test]
fn a_load_with_a_refused_program_pins_nothing_and_keeps_the_verifiers_log() -> Result<()> {
    let pins = PinDir::new(&Path::new("/sys/fs/bpf").join(format!("affinity-start-{}", std::process::id())));
    let options = Options { object: Some(damaged(names::TC_REVERSE)?), ..Options::default() };
    let Err(LoadError::Refused(refusal)) = load::load(&pins, &options) else {
        pins.remove()?;
        anyhow::bail!("a damaged program was loaded");
    };
    ensure!(!pins.root().exists(), "something is pinned");
    assert_eq!(refusal.program, names::TC_REVERSE);
    ensure!(refusal.to_string().lines().count() == 1, "{refusal}");
    let log = fs::read_to_string(refusal.log.as_ref().context("a log")?)?;
    ensure!(log.contains(&refusal.reason), "{refusal}, not in {log}");
    // The same is detected beforehand, with nothing pinned.
    let refused = load::trial(&options)?;
    assert_eq!(refused.iter().map(|refusal| refusal.program).collect::<Vec<_>>(), [names::TC_REVERSE]);
    assert_eq!(load::trial(&Options::default())?, []);
    Ok(())
}

/// In a separate mount namespace, where the kernel's setting reads as if the JIT were off. The setting exists only in the
/// machine's own network namespace, so the agent gets a device name that does not exist.
#[test]
fn without_the_jit_nothing_starts_and_the_remedy_is_said() -> Result<()> {
    let lab = lab()?;
    let off = lab.scratch().join("off");
    fs::write(&off, "0\n")?;
    let hide = |inner: &Command| {
        let script = format!("mount --bind {} /proc/sys/net/core/bpf_jit_enable && exec \"$@\"", off.display());
        let mut command = Command::new("unshare");
        command.args(["--mount", "--", "sh", "-c", &script, "sh", "timeout", "60"]);
        // After `nsenter --net=PATH --`.
        command.args(inner.get_args().skip(2));
        command
    };
    let line = failed_start(hide(&start(&lab, "run", lab.source(), &["--device", "no-such-device"])?))?;
    ensure!(line.contains("JIT is off") && line.contains("sysctl -w net.core.bpf_jit_enable=1"), "{line}");
    ensure!(!lab.pin_dir().exists(), "something is pinned");
    let mut check = lab.affinity_command()?;
    check.arg("check");
    let line = failed_start(hide(&check))?;
    ensure!(line.contains("jit"), "{line}");
    Ok(())
}

#[test]
fn check_loads_the_programs_and_leaves_nothing_behind() -> Result<()> {
    let lab = lab()?;
    let programs = |findings: &serde_json::Value| -> Result<String> {
        let findings = findings.as_array().context("an array")?;
        let of_programs = findings.iter().filter(|finding| finding["check"] == "programs");
        Ok(of_programs.map(|finding| format!("{} {}", finding["state"], finding["found"])).collect())
    };
    let said = programs(&lab.affinity_json(&["check"])?)?;
    ensure!(said.contains("this kernel accepts all of them"), "{said}");
    ensure!(!lab.pin_dir().exists(), "something is pinned");
    let reachable = lab.client().http_get(Family::V4.client(1), web().frontend(Family::V4, "http"), "/").is_ok();
    ensure!(!reachable, "something is attached");
    Ok(())
}
