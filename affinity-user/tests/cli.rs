//! The command as its users run it, as far as that needs neither root nor a kernel: output, errors and exit codes.

use std::{
    io::Read,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

const SERVICES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/services");

fn affinity(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_affinity"));
    command.args(args).env_remove("AFFINITY_PIN_DIR").env_remove("NODE_NAME").env_remove("RUST_LOG");
    command.args(["--pin-dir", "/sys/fs/bpf/affinity-none"]).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    affinity(args).output().unwrap()
}

/// Files that are gone at the end of a test.
struct Directory(PathBuf);

impl Directory {
    fn new(files: &[(&str, &str)]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("affinity-cli-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = Self(std::env::temp_dir().join(name));
        std::fs::create_dir(&directory.0).unwrap();
        for (name, text) in files {
            std::fs::write(directory.0.join(name), text).unwrap();
        }
        directory
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // A test that fails may not have come to make it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What a command that must succeed without a word on standard error writes.
fn out(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args:?}");
    assert!(output.status.success(), "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The exit code and the error of a command that must write nothing to standard output.
fn err(args: &[&str]) -> (i32, String) {
    let output = run(args);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{args:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn json(args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&out(&[args, &["-o", "json"]].concat())).unwrap()
}

#[test]
fn explain_from_yaml_in_words() {
    let explain = |to| out(&["explain", "--source", SERVICES, "--from", "192.0.2.1", "--to", to]);
    insta::assert_snapshot!(explain("10.96.0.10:80"), @r"
    packet      TCP SYN from 192.0.2.1, new source port, to 10.96.0.10:80
    filter      match: a frontend may have this address and port
    frontend    default/web: 2 of 3 pods ready, ClientIP affinity, timer=connection timeout=600s select=random
    session     192.0.2.1 has no pin: it will be pinned
    selection   random: web-0 (10.244.0.10:8080) 50.0 %, web-1 (10.244.0.11:8080) 50.0 %
    verdict     forward (created): a new client was pinned. The destination becomes the address and port of one candidate.
    ");
    insta::assert_snapshot!(explain("10.96.0.11:6379"), @r"
    packet      TCP SYN from 192.0.2.1, new source port, to 10.96.0.11:6379
    filter      match: a frontend may have this address and port
    frontend    default/cache: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=consistent
    session     192.0.2.1 has no pin: it will be pinned
    selection   consistent: every node selects cache-0 (10.244.0.20:6379)
    verdict     forward (created): a new client was pinned. The destination becomes 10.244.0.20:6379.
    ");
    insta::assert_snapshot!(explain("10.96.0.10:81"), @r"
    packet    TCP SYN from 192.0.2.1, new source port, to 10.96.0.10:81
    filter    no match: no frontend has this address and port
    verdict   pass (not-frontend): the destination is not a frontend.
    ");
}

#[test]
fn explain_from_yaml_as_json() {
    let said = json(&["explain", "--source", SERVICES, "--from", "192.0.2.1", "--to", "10.96.0.10:53/udp"]);
    assert_eq!((&said["verdict"], &said["reason"]), (&"forward".into(), &"created".into()));
    assert_eq!(said["frontend"]["service"], "default/web");
    assert_eq!((&said["pinned"], &said["masquerade"]), (&serde_json::Value::Null, &false.into()));
    let candidates: Vec<_> = said["candidates"].as_array().unwrap().iter().map(|c| (&c["name"], &c["port"])).collect();
    assert_eq!(candidates, [(&"web-0".into(), &5353.into()), (&"web-1".into(), &5353.into())]);
    let said = json(&["explain", "--source", SERVICES, "--from", "2001:db8::1", "--to", "[2001:db8:96::10]:80"]);
    assert_eq!((&said["verdict"], &said["reason"]), (&"reject".into(), &"no-endpoints".into()));
}

#[test]
fn one_client_is_explained_alike_every_time_where_selection_is_consistent() {
    let mut chosen = std::collections::BTreeSet::new();
    for client in 0..16 {
        let from = format!("192.0.2.{client}");
        let ask = || json(&["explain", "--source", SERVICES, "--from", &from, "--to", "10.96.0.11:6379"]);
        let first = ask();
        assert_eq!(first, ask());
        assert_eq!(first["candidates"].as_array().unwrap().len(), 1);
        chosen.insert(first["candidates"][0]["name"].to_string());
    }
    assert_eq!(chosen.len(), 2, "16 clients spread over both pods");
}

#[test]
fn yaml_becomes_maps() {
    let dump = |args: &[&str]| out(&[&["dump", "--source", SERVICES, "--node-name", "node-1"], args].concat());
    insta::assert_snapshot!(dump(&["frontends_v4"]), @r"
    frontends_v4 10.96.0.10:53/UDP -> service=default/web pool=default/web:dns/UDP/v4 slots=2 affinity=default/web timer=connection timeout=600s select=random prefix=32
    frontends_v4 10.96.0.10:80/TCP -> service=default/web pool=default/web:http/TCP/v4 slots=2 affinity=default/web timer=connection timeout=600s select=random prefix=32
    frontends_v4 10.96.0.11:6379/TCP -> service=default/cache pool=default/cache:redis/TCP/v4 slots=1021 affinity=default/cache timer=connection timeout=10800s select=consistent prefix=32
    ");
    insta::assert_snapshot!(dump(&["members"]), @r"
    members default/cache:redis/TCP/v4 default/cache-0 -> port=6379 state=ready
    members default/cache:redis/TCP/v4 default/cache-1 -> port=6379 state=ready
    members default/web:dns/UDP/v4 default/web-0 -> port=5353 state=ready
    members default/web:dns/UDP/v4 default/web-1 -> port=5353 state=ready
    members default/web:dns/UDP/v4 default/web-2 -> port=5353 state=draining
    members default/web:http/TCP/v4 default/web-0 -> port=8080 state=ready
    members default/web:http/TCP/v4 default/web-1 -> port=8080 state=ready
    members default/web:http/TCP/v4 default/web-2 -> port=8080 state=draining
    ");
    insta::assert_snapshot!(dump(&["backends"]), @r"
    backends 10.244.0.10 -> name=default/web-0 local
    backends 10.244.0.11 -> name=default/web-1
    backends 10.244.0.12 -> name=default/web-2 terminating
    backends 10.244.0.20 -> name=default/cache-0
    backends 10.244.0.21 -> name=default/cache-1
    ");
    assert_eq!(dump(&[]), dump(&[]));
}

#[test]
fn errors_are_one_line_with_an_exit_code() {
    let (code, error) = err(&["get", "sessions"]);
    assert_eq!(code, 1);
    assert!(error.starts_with("error: ") && error.contains("affinity run") && error.lines().count() == 1, "{error}");
    let (code, error) = err(&["explain", "--source", "/nowhere", "--from", "192.0.2.1", "--to", "10.96.0.10:80"]);
    assert_eq!((code, error.lines().count()), (1, 1), "{error}");
    assert!(error.starts_with("error: /nowhere: "), "{error}");
    let (code, error) = err(&["explain", "--source", SERVICES, "--from", "2001:db8::1", "--to", "10.96.0.10:80"]);
    assert_eq!((code, error.as_str()), (2, "error: --from and --to must both be IPv4, or both IPv6\n"));
    let (code, error) = err(&["get", "counters", "--client", "192.0.2.1"]);
    assert_eq!((code, error.as_str()), (2, "error: --client does not apply to `affinity get counters`\n"));
    assert_eq!(err(&["get", "nonsense"]).0, 2);
    assert_eq!(err(&["unpin", "--service", "default/web"]).0, 2);
    assert_eq!(err(&["run", "--device", "eth0"]).0, 2);
}

#[test]
fn errors_are_objects_where_the_log_is() {
    let (code, line) = err(&["get", "sessions", "--log-format", "json"]);
    let object: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((code, object["level"].as_str(), line.lines().count()), (1, Some("ERROR"), 1));
    assert!(object["message"].is_string() && object["timestamp"].is_string(), "{line}");
}

#[test]
fn what_is_wrong_in_yaml_is_a_warning_and_the_rest_counts() {
    let good = std::fs::read_to_string(format!("{SERVICES}/web.yaml")).unwrap();
    let directory = Directory::new(&[("web.yaml", &good), ("broken.yaml", "kind: [")]);
    let output = run(&["dump", "backends", "--source", directory.path()]);
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 5);
    assert!(String::from_utf8_lossy(&output.stderr).contains("broken.yaml"));
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    // Twenty pods under `consistent` have a table larger than a pipe holds.
    let slice = std::fs::read_to_string(format!("{SERVICES}/web.yaml")).unwrap();
    let pods =
        (0..20).map(|pod| format!("  - {{addresses: [10.244.1.{pod}], targetRef: {{kind: Pod, name: more-{pod}}}}}\n"));
    let directory = Directory::new(&[("web.yaml", &(slice + &pods.collect::<String>()))]);
    let mut child = affinity(&["dump", "slots", "--slots", "--source", directory.path()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 5];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"slots");
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), b"".as_slice()));
    assert!(run(&["dump", "slots", "--slots", "--source", directory.path()]).stdout.len() > 1 << 17);
}

#[test]
fn there_is_no_colour_in_a_file() {
    for args in [&["explain", "--source", SERVICES, "--from", "192.0.2.1", "--to", "10.96.0.10:80"][..], &["--help"]] {
        assert!(!out(args).contains('\u{1b}'));
    }
}

#[test]
fn completions_know_the_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(out(&["completions", shell]).contains("explain"), "{shell}");
    }
}

#[test]
fn each_command_has_a_manual_page() {
    let directory = Directory::new(&[]);
    out(&["man", directory.path()]);
    let page = |name| std::fs::read_to_string(directory.0.join(name)).unwrap();
    assert!(page("affinity.1").contains(r"affinity\-explain(1)"));
    assert!(page("affinity-explain.1").contains("10.96.0.10:80"), "the examples are there");
}

#[test]
fn check_tells_the_same_in_every_form() {
    // Whether affinity can run here is not this test's business: code 0 or 1.
    let output = run(&["check", "-o", "json"]);
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let missing = findings.iter().any(|finding| finding["state"] == "missing");
    assert_eq!(output.status.code(), Some(i32::from(missing)));
    assert!(findings.iter().any(|finding| finding["check"] == "kernel"));
    assert!(findings.iter().all(|finding| (finding["state"] == "ok") == finding["advice"].is_null()));
    let table = String::from_utf8(run(&["check"]).stdout).unwrap();
    assert_eq!(table.lines().count(), findings.len() + 1);
}
