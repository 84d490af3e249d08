use std::{
    io::Write as _,
    os::unix::fs::symlink,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use super::*;
use crate::source::api::label;

/// A directory that is removed when the test ends, also if it fails.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("affinity-source-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("a new directory");
        Self(path)
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.0.join(file), text).expect("written");
    }

    /// Objects and problems as lines, with the directory's own name left out.
    fn show(&self, snapshot: &Snapshot) -> String {
        let services = snapshot.services.iter().map(|(name, service)| {
            let ip = service.object.spec.as_ref().and_then(|spec| spec.cluster_ip.clone()).unwrap_or_default();
            format!("service {name} {ip}").trim_end().to_owned()
        });
        let slices = snapshot.slices.keys().map(|name| format!("slice {name}"));
        let problems = snapshot.problems.iter().map(|problem| format!("{}: {problem}", problem.severity.name()));
        let partial = snapshot.partial.then(|| "partial".to_owned());
        let lines: Vec<String> = partial.into_iter().chain(services).chain(slices).chain(problems).collect();
        lines.join("\n").replace(&format!("{}/", self.0.display()), "")
    }

    fn read(&self) -> String {
        self.show(&read(&self.0, "a"))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn service(name: &str, ip: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}}}\n")
}

#[test]
fn the_node_is_the_one_of_its_name() {
    let scratch = Scratch::new();
    let node = |name: &str, zone: &str| {
        format!(
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}, labels: {{topology.kubernetes.io/zone: {zone}}}}}\n"
        )
    };
    scratch.write("nodes.yaml", &[node("b", "west"), node("a", "east")].concat());
    let mut reader = Reader::new(&scratch.0, "a");
    let mut zone = || {
        let labels = reader.read().node?.object.metadata.labels.clone()?;
        labels.get(label::ZONE).cloned()
    };
    assert_eq!(zone().as_deref(), Some("east"));
    scratch.write("nodes.yaml", &[&node("a", "south"), "---\nkind: ["].concat());
    assert_eq!(zone().as_deref(), Some("south"));
    scratch.write("nodes.yaml", &node("b", "west"));
    assert_eq!(zone(), None);
}

#[test]
fn nodes_are_known_by_their_addresses() {
    let scratch = Scratch::new();
    let node = |name: &str, address: &str| {
        format!(
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n\
             status: {{addresses: [{{type: InternalIP, address: '{address}'}}, {{type: Hostname, address: {name}}}]}}\n"
        )
    };
    scratch.write("web.yaml", &service("web", "10.96.0.1"));
    scratch.write("nodes.yaml", &[node("a", "192.0.2.1"), node("b", "2001:db8::1")].concat());
    let mut reader = Reader::new(&scratch.0, "a");
    assert_eq!(scratch.show(&reader.read()), "service default/web 10.96.0.1");
    assert_eq!(reader.node_addresses(), ["192.0.2.1", "2001:db8::1"].map(|address| address.parse().unwrap()).into());
    fs::remove_file(scratch.0.join("nodes.yaml")).expect("removed");
    reader.read();
    assert!(reader.node_addresses().is_empty());
}

#[test]
fn several_documents_lists_and_json() {
    let scratch = Scratch::new();
    scratch.write(
        "a.yaml",
        &format!(
            "# comment\n---\n{}---\n\n--- # none\n---\n{}...\n",
            service("a", "10.0.0.1"),
            service("b", "10.0.0.2")
        ),
    );
    scratch.write(
        "b.yml",
        "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Service, metadata: {name: c, namespace: shop}}\n\
         - {apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: c-1}, addressType: IPv4, endpoints: []}\n\
         - {apiVersion: v1, kind: Pod, metadata: {name: p}}\n- {apiVersion: v1, kind: Pod, metadata: {name: q}}\n",
    );
    scratch.write("c.json", r#"{"apiVersion": "v1", "kind": "ServiceList", "items": [{"metadata": {"name": "d"}}]}"#);
    scratch.write(".hidden.yaml", "}");
    scratch.write("README.md", "}");
    scratch.write("empty.yaml", "");
    fs::create_dir(scratch.0.join("sub.yaml")).expect("a directory");
    insta::assert_snapshot!(scratch.read(), @r"
    service default/a 10.0.0.1
    service default/b 10.0.0.2
    service default/d
    service shop/c
    slice default/c-1
    info: b.yml: 2 of kind Pod ignored: only Service, EndpointSlice and Node are used
    ");
}

#[test]
fn a_bad_document_spoils_no_other() {
    let scratch = Scratch::new();
    let bad = [
        "kind: Service\nmetadata: [",
        "kind: Service\nmetadata: {name: x}",
        "apiVersion: v1\nkind: Service\nmetadata: {namespace: shop}",
        "apiVersion: v2\nkind: Service\nmetadata: {name: x}",
        "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\nmetadata: {name: x}",
        "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {ports: [{port: 80}, {port: \"81\"}]}",
        "apiVersion: v1\nkind: Service\nmetadata: {name: y}\nspec: {sessionAfinity: ClientIP, ports: [{prot: 80}]}",
        "- 1",
        "apiVersion: v1\nkind: Service\nkind: Service\nmetadata: {name: x}",
    ];
    scratch.write(
        "a.yaml",
        &format!("{}---\n{}\n---\n{}", service("a", "10.0.0.1"), bad.join("\n---\n"), service("z", "10.0.0.9")),
    );
    scratch.write("b.json", "{\"apiVersion\":");
    scratch.write("c.yaml", &service("a", "10.0.0.3"));
    insta::assert_snapshot!(scratch.read(), @r#"
    partial
    service default/a 10.0.0.1
    service default/y
    service default/z 10.0.0.9
    error: a.yaml, document 2: not valid YAML: unclosed bracket '[' at line 7, column 11
    error: a.yaml, document 3: not a Kubernetes object: apiVersion or kind is missing
    error: a.yaml, document 4: Service: metadata.name: missing
    error: a.yaml, document 5: Service default/x: apiVersion: v2 is not supported; use v1
    error: a.yaml, document 6: EndpointSlice default/x: apiVersion: discovery.k8s.io/v1beta1 is not supported; use discovery.k8s.io/v1
    error: a.yaml, document 7: Service default/x: spec.ports[1].port: invalid type: string "81", expected i32
    warning: a.yaml, document 8: Service default/y: spec.ports[0].prot: unknown field; it is ignored
    warning: a.yaml, document 8: Service default/y: spec.sessionAfinity: unknown field; it is ignored
    error: a.yaml, document 9: not an object: expected a mapping with apiVersion, kind and metadata
    error: a.yaml, document 10: not valid YAML: duplicate mapping key `kind` is not allowed here at line 38, column 1
    warning: a.yaml: never read completely: until it is valid, services that are in no other file are not removed
    error: b.json: not valid JSON: EOF while parsing a value at line 1 column 14
    warning: b.json: never read completely: until it is valid, services that are in no other file are not removed
    error: c.yaml: Service default/a: defined twice; the one in a.yaml, document 1 is used, this one is ignored
    "#);
}

#[test]
fn a_damaged_file_keeps_what_it_gave() {
    let scratch = Scratch::new();
    let mut reader = Reader::new(&scratch.0, "a");
    scratch.write("a.yaml", &format!("{}---\n{}", service("a", "10.0.0.1"), service("b", "10.0.0.2")));
    scratch.write("b.yaml", &service("c", "10.0.0.3"));
    reader.read();

    scratch.write("a.yaml", &format!("{}---\n{}:", service("a", "10.0.0.11"), service("b", "10.0.0.12")));
    insta::assert_snapshot!(scratch.show(&reader.read()), @r"
    service default/a 10.0.0.11
    service default/b 10.0.0.2
    service default/c 10.0.0.3
    error: a.yaml, document 2: not valid YAML: null is not allowed here at line 10, column 1
    warning: a.yaml: stays in use as last read, until the file is valid or removed: Service default/b
    ");
    scratch.write("a.yaml", "{");
    insta::assert_snapshot!(scratch.show(&reader.read()), @r"
    service default/a 10.0.0.11
    service default/b 10.0.0.2
    service default/c 10.0.0.3
    error: a.yaml: not valid YAML: unclosed bracket '{' at line 1, column 1
    warning: a.yaml: stays in use as last read, until the file is valid or removed: Service default/a, Service default/b
    ");

    // An object that moved to another file is present, and is not a duplicate.
    scratch.write("b.yaml", &service("b", "10.0.0.22"));
    insta::assert_snapshot!(scratch.show(&reader.read()), @r"
    service default/a 10.0.0.11
    service default/b 10.0.0.22
    error: a.yaml: not valid YAML: unclosed bracket '{' at line 1, column 1
    warning: a.yaml: stays in use as last read, until the file is valid or removed: Service default/a, Service default/b
    ");

    scratch.write("a.yaml", &service("a", "10.0.0.31"));
    insta::assert_snapshot!(scratch.show(&reader.read()), @r"
    service default/a 10.0.0.31
    service default/b 10.0.0.22
    ");
    fs::remove_file(scratch.0.join("a.yaml")).expect("removed");
    insta::assert_snapshot!(scratch.show(&reader.read()), @"service default/b 10.0.0.22");
}

#[test]
fn a_path_that_cannot_be_read_changes_nothing() {
    let scratch = Scratch::new();
    let inner = scratch.0.join("inner");
    let mut reader = Reader::new(&inner, "a");
    insta::assert_snapshot!(scratch.show(&reader.read()), @r"
    partial
    error: inner: cannot be read (No such file or directory (os error 2))
    ");
    fs::create_dir(&inner).expect("a directory");
    insta::assert_snapshot!(scratch.show(&reader.read()), @"info: inner: no *.yaml, *.yml or *.json file in this directory");
    scratch.write("inner/a.yaml", &service("a", "10.0.0.1"));
    symlink("nowhere", inner.join("b.yaml")).expect("a link");
    insta::assert_snapshot!(scratch.show(&reader.read()), @r"
    partial
    service default/a 10.0.0.1
    error: inner/b.yaml: cannot be read: No such file or directory (os error 2)
    warning: inner/b.yaml: never read completely: until it is valid, services that are in no other file are not removed
    ");
    fs::remove_dir_all(&inner).expect("removed");
    insta::assert_snapshot!(scratch.show(&reader.read()), @r"
    partial
    service default/a 10.0.0.1
    error: inner: cannot be read (No such file or directory (os error 2)); the objects that were read before stay in use
    error: inner/b.yaml: cannot be read: No such file or directory (os error 2)
    warning: inner/b.yaml: never read completely: until it is valid, services that are in no other file are not removed
    ");
}

/// Receives until the services match; fails after a time that even a loaded machine should not need.
async fn until(receiver: &mut tokio::sync::mpsc::Receiver<Snapshot>, services: &[&str]) {
    let wait = async {
        loop {
            let snapshot = receiver.recv().await.expect("the thread lives");
            let names: Vec<String> = snapshot.services.keys().map(|name| name.name.to_string()).collect();
            if names == services {
                return;
            }
        }
    };
    // Shorter than the poll interval, because the test is about notifications.
    tokio::time::timeout(Duration::from_secs(4), wait).await.unwrap_or_else(|_| panic!("never saw {services:?}"));
}

#[tokio::test]
async fn changes_of_files_are_seen() {
    let scratch = Scratch::new();
    scratch.write("a.yaml", &service("a", "10.0.0.1"));
    let mut receiver = watch(&scratch.0, "a").expect("watching").snapshots;
    until(&mut receiver, &["a"]).await;
    scratch.write("a.yaml", &service("b", "10.0.0.1"));
    until(&mut receiver, &["b"]).await;
    scratch.write(".new", &service("c", "10.0.0.1"));
    fs::rename(scratch.0.join(".new"), scratch.0.join("a.yaml")).expect("renamed");
    until(&mut receiver, &["c"]).await;
    scratch.write("d.yaml", &service("d", "10.0.0.2"));
    until(&mut receiver, &["c", "d"]).await;
    fs::remove_file(scratch.0.join("a.yaml")).expect("removed");
    until(&mut receiver, &["d"]).await;
}

#[tokio::test]
async fn the_swap_of_a_mounted_config_map_is_seen() {
    let scratch = Scratch::new();
    let publish = |version: &str, name: &str| {
        fs::create_dir(scratch.0.join(version)).expect("a directory");
        scratch.write(&format!("{version}/a.yaml"), &service(name, "10.0.0.1"));
        symlink(version, scratch.0.join("..data_tmp")).expect("a link");
        fs::rename(scratch.0.join("..data_tmp"), scratch.0.join("..data")).expect("renamed");
    };
    publish("..1", "a");
    symlink("..data/a.yaml", scratch.0.join("a.yaml")).expect("a link");
    let mut directory = watch(&scratch.0, "a").expect("watching").snapshots;
    let mut file = watch(&scratch.0.join("a.yaml"), "a").expect("watching").snapshots;
    until(&mut directory, &["a"]).await;
    until(&mut file, &["a"]).await;
    publish("..2", "b");
    until(&mut directory, &["b"]).await;
    until(&mut file, &["b"]).await;
}

#[tokio::test]
async fn a_link_to_another_directory_is_followed() {
    let scratch = Scratch::new();
    for name in ["a", "b"] {
        fs::create_dir(scratch.0.join(name)).expect("a directory");
        scratch.write(&format!("{name}/x.yaml"), &service(name, "10.0.0.1"));
    }
    symlink("a", scratch.0.join("current")).expect("a link");
    let mut receiver = watch(&scratch.0.join("current"), "a").expect("watching").snapshots;
    until(&mut receiver, &["a"]).await;
    symlink("b", scratch.0.join("next")).expect("a link");
    fs::rename(scratch.0.join("next"), scratch.0.join("current")).expect("renamed");
    until(&mut receiver, &["b"]).await;
    scratch.write("b/x.yaml", &service("c", "10.0.0.1"));
    until(&mut receiver, &["c"]).await;
}

#[test]
fn a_source_is_unreadable_where_nothing_of_it_was_ever_read() {
    let scratch = Scratch::new();
    let mut reader = Reader::new(&scratch.0, "a");
    assert_eq!(reader.read().unreadable, None, "an empty directory holds nothing");
    let why = |path: &Path| read(path, "a").unreadable.unwrap_or_default();
    assert!(why(&scratch.0.join("nowhere")).contains("nowhere: cannot be read (No such file"));
    scratch.write("a.yaml", "kind: [\n");
    scratch.write("b.yaml", "}\n");
    assert!(why(&scratch.0).contains("a.yaml"), "the first file is named: {}", why(&scratch.0));
    assert!(why(&scratch.0.join("b.yaml")).contains("b.yaml"));
    // One object is enough, and so is a file that is good and empty.
    scratch.write("b.yaml", &service("web", "10.96.0.1"));
    assert_eq!(why(&scratch.0), "");
    scratch.write("b.yaml", "");
    assert_eq!(why(&scratch.0), "");
    // Content that was read once is known, whatever happens to the files.
    let _ = reader.read();
    scratch.write("b.yaml", "}\n");
    assert_eq!(reader.read().unreadable, None);
}

/// Fails if a snapshot with other services arrives within that time.
async fn stays(receiver: &mut tokio::sync::mpsc::Receiver<Snapshot>, services: &[&str], time: Duration) {
    let deadline = tokio::time::Instant::now() + time;
    while let Ok(snapshot) = tokio::time::timeout_at(deadline, receiver.recv()).await {
        let snapshot = snapshot.expect("the thread lives");
        assert!(!snapshot.partial, "{:?}", snapshot.problems);
        let names: Vec<String> = snapshot.services.keys().map(|name| name.name.to_string()).collect();
        assert_eq!(names, services, "read before it was closed");
    }
}

/// Longer than any settling time.
const WHILE: Duration = Duration::from_millis(900);

#[tokio::test]
async fn file_is_read_once_its_writer_has_closed_it() {
    let scratch = Scratch::new();
    scratch.write("a.yaml", &service("a", "10.0.0.1"));
    let mut receiver = watch(&scratch.0, "a").expect("watching").snapshots;
    until(&mut receiver, &["a"]).await;
    let mut file = fs::File::create(scratch.0.join("a.yaml")).expect("emptied");
    stays(&mut receiver, &["a"], WHILE).await;
    file.write_all(service("b", "10.0.0.2").as_bytes()).expect("written");
    stays(&mut receiver, &["a"], WHILE).await;
    file.write_all(format!("---\n{}", service("c", "10.0.0.3")).as_bytes()).expect("written");
    drop(file);
    until(&mut receiver, &["b", "c"]).await;
}

#[tokio::test]
async fn file_that_was_open_before_the_start_is_read_once_closed() {
    let scratch = Scratch::new();
    scratch.write("a.yaml", &service("a", "10.0.0.1"));
    let mut file = fs::File::create(scratch.0.join("b.yaml")).expect("made");
    let mut receiver = watch(&scratch.0, "a").expect("watching").snapshots;
    let first = receiver.recv().await.expect("the thread lives");
    insta::assert_snapshot!(scratch.show(&first), @r"
    partial
    service default/a 10.0.0.1
    warning: b.yaml: is being written, and was never read: until the file is closed, services that are in no other file are not removed
    ");
    file.write_all(service("b", "10.0.0.2").as_bytes()).expect("written");
    drop(file);
    until(&mut receiver, &["a", "b"]).await;
}

#[tokio::test]
async fn links_below_the_watched_path_are_followed_at_once() {
    let scratch = Scratch::new();
    for directory in ["watched", "1", "2"] {
        fs::create_dir(scratch.0.join(directory)).expect("a directory");
    }
    scratch.write("1/x.yaml", &service("a", "10.0.0.1"));
    scratch.write("2/x.yaml", &service("b", "10.0.0.1"));
    symlink("1", scratch.0.join("current")).expect("a link");
    symlink("../current/x.yaml", scratch.0.join("watched/x.yaml")).expect("a link");
    let mut receiver = watch(&scratch.0.join("watched"), "a").expect("watching").snapshots;
    until(&mut receiver, &["a"]).await;
    let soon = Duration::from_secs(2);
    scratch.write("1/x.yaml", &service("c", "10.0.0.1"));
    tokio::time::timeout(soon, until(&mut receiver, &["c"])).await.expect("soon after the file has changed");
    symlink("2", scratch.0.join("next")).expect("a link");
    fs::rename(scratch.0.join("next"), scratch.0.join("current")).expect("renamed");
    tokio::time::timeout(soon, until(&mut receiver, &["b"])).await.expect("soon after the link has changed");
    scratch.write("2/x.yaml", &service("d", "10.0.0.1"));
    tokio::time::timeout(soon, until(&mut receiver, &["d"])).await.expect("soon after the new file has changed");
}

#[test]
fn reading_once_takes_no_file_that_is_being_written() {
    let scratch = Scratch::new();
    scratch.write("a.yaml", &service("a", "10.0.0.1"));
    let file = fs::File::options().append(true).open(scratch.0.join("a.yaml")).expect("open");
    insta::assert_snapshot!(scratch.read(), @r"
    partial
    warning: a.yaml: is being written, and was never read: until the file is closed, services that are in no other file are not removed
    ");
    drop(file);
    insta::assert_snapshot!(scratch.read(), @"service default/a 10.0.0.1");
}
