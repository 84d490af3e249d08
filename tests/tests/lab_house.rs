//! The agent's state on the node: one agent for each pin directory, no dataplane of another version at the same time, removed
//! pins, and other proxies.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use affinity_common::abi::{BackendRef, OLDEST_READABLE, Session, SessionKey, V4};
use affinity_common::names;
use affinity_tests::apiserver::ApiServer;
use affinity_tests::kubeproxy::Mode;
use affinity_tests::lab::{Family, Lab, NODE_NAME, Protocol, WIRE, eventually};
use affinity_tests::patience::patience;
use affinity_tests::story::{Hook, Route, tell, tell_in, web};
use affinity_user::{
    attach::attachments,
    load::{self, Memory, Sizes},
    pins::PinDir,
    store::kernel::{KernelStore, Walk},
    sys::{self, Map, MapInfo},
};
use anyhow::{Context, Result, ensure};
use bytemuck::Zeroable;
use serde_json::json;

/// A removed attachment is back within this time.
const REPAIR_PATIENCE: Duration = Duration::from_secs(10);

const ADDRESS: &str = "127.0.0.1:9464";

/// `affinity` on the node with another spelling of its pin directory.
fn spelled(lab: &Lab, pin_dir: &str, args: &[&str]) -> Result<Command> {
    let mut command = Command::new("nsenter");
    let given = lab.affinity_command()?;
    let at = given.get_args().position(|arg| arg == "--pin-dir").context("the option")?;
    for (number, arg) in given.get_args().enumerate() {
        if number == at + 1 {
            command.arg(pin_dir)
        } else {
            command.arg(arg)
        };
    }
    command.args(args).current_dir("/sys/fs/bpf");
    Ok(command)
}

/// Clients that are not pinned yet, from this number on, and the pods that answer them.
fn fresh_clients(lab: &Lab, first: u32) -> Result<Vec<String>> {
    Ok(Route::all_to(&web())
        .map(|route| route.dial_all(lab, first..first + 10))
        .into_iter()
        .collect::<Result<Vec<_>>>()?
        .concat())
}

fn is_served(lab: &Lab) -> bool {
    Route::all_to(&web()).iter().all(|route| route.dial(lab, 1, 1).is_ok())
}

#[test]
fn an_agent_keeps_others_away_whatever_the_spelling_of_the_pin_directory() -> Result<()> {
    tell(Hook::Tc, &[&web()], |lab, _| {
        let dir = lab.pin_dir().display().to_string();
        let name = lab.pin_dir().file_name().context("a name")?.to_string_lossy().into_owned();
        let spellings =
            [dir.clone(), format!("{dir}/"), dir.replace("/bpf/", "/bpf//./"), format!("{dir}/../{name}"), name];
        let source = lab.source().display().to_string();
        for spelling in &spellings {
            for args in [&["detach"][..], &["attach", "--source", &source, "--device", WIRE, "--socket", "off"]] {
                let output = spelled(lab, spelling, args)?.output()?;
                let error = String::from_utf8_lossy(&output.stderr).into_owned();
                ensure!(
                    output.status.code() == Some(1) && error.contains("an affinity agent already runs here"),
                    "{spelling}: {error}"
                );
            }
        }
        ensure!(is_served(lab), "no longer served");
        Ok(())
    })
}

/// Makes the dataplane look like another version, by its directory.
fn age(lab: &Lab) -> Result<std::path::PathBuf> {
    age_to(lab, 0)
}

fn age_to(lab: &Lab, version: u32) -> Result<std::path::PathBuf> {
    let pins = PinDir::new(lab.pin_dir());
    let (current, old) = (lab.pin_dir().join(pins.layout()), lab.pin_dir().join(format!("v{version}")));
    fs::rename(&current, &old)?;
    Ok(old)
}

#[test]
fn a_dataplane_of_another_version_is_named_replaced_and_gone() -> Result<()> {
    for hook in Hook::ALL {
        let lab = Lab::with_pods(3)?;
        lab.publish(&web().on([0]))?;
        lab.agent(&hook.args())?.terminate()?;
        let old = age(&lab)?;
        let error = lab.affinity(&["get", "services"]).unwrap_err().to_string();
        ensure!(error.contains("map layout v0"), "{hook:?}: {error}");
        let said = lab.affinity(&["check"])?;
        ensure!(said.contains("one of another version (map layout v0)"), "{hook:?}: {said}");

        lab.publish(&web().on([1, 2]))?;
        let agent = lab.agent(&hook.args())?;
        ensure!(agent.log().iter().any(|line| line.contains("map layout v0")), "{hook:?}: {:?}", agent.log());
        ensure!(!old.exists(), "{hook:?}: {} is still there", old.display());
        let pods = fresh_clients(&lab, 100)?;
        ensure!(pods.iter().all(|pod| pod != "pod-0"), "{hook:?}: the old programs answer: {pods:?}");
        agent.terminate()?;
        lab.affinity(&["detach"])?;
        ensure!(!is_served(&lab), "{hook:?}: something is still attached");
    }
    Ok(())
}

/// As in an upgrade from the layout before this one, with equal records.
#[test]
fn an_upgrade_keeps_pins_and_open_connections() -> Result<()> {
    for hook in Hook::ALL {
        let lab = Lab::with_pods(3)?;
        let web = web().client_ip();
        lab.publish(&web)?;
        lab.agent(&hook.args())?.terminate()?;
        let pods = || -> Result<Vec<Vec<String>>> {
            Route::all_to(&web).iter().map(|route| route.dial_all(&lab, 0..30)).collect()
        };
        let before = pods()?;
        let from = Family::V4.client(0);
        let mut open = lab.client().connect(Protocol::Tcp, from, web.frontend(Family::V4, "http"))?;
        let pod = open.ask("/")?;
        let old = age_to(&lab, OLDEST_READABLE)?;

        let agent = lab.agent(&hook.args())?;
        let is_said = agent.log().iter().any(|line| line.contains("pins and connections are kept"));
        ensure!(is_said && !old.exists(), "{hook:?}: {:?}", agent.log());
        ensure!(open.ask("/")? == pod, "{hook:?}: the open connection");
        ensure!(pods()? == before, "{hook:?}: clients have moved");
        agent.terminate()?;
    }
    Ok(())
}

/// The flows as in layouts 3 and 4, in a map like theirs: with the timeout in nanoseconds, and the service.
fn age_flows(old: &Path, name: &str) -> Result<()> {
    const TIMES: usize = 16;
    const FLAGS: usize = 4;

    let path = old.join("maps").join(name);
    let flows = Map::open(&path)?;
    let of_layout_4 = MapInfo { value_size: flows.info().value_size + 8, ..*flows.info() };
    let aged = Map::create(name, &of_layout_4)?;
    let mut walk = Walk::new(&flows);
    while let Some(entry) = walk.next(&flows) {
        let (key, flow) = entry?;
        let (times, rest) = flow.split_at(TIMES);
        let (rest, flags) = rest.split_at(rest.len() - FLAGS);
        let (rest, timeout_s) = rest.split_at(rest.len() - 4);
        let timeout_ns = u64::from(u32::from_ne_bytes(timeout_s.try_into()?)) * 1_000_000_000;
        let service = 1u32.to_ne_bytes();
        aged.update(key, &[times, &timeout_ns.to_ne_bytes(), rest, &service, flags].concat(), sys::Write::Any)?;
    }
    fs::remove_file(&path)?;
    Ok(sys::obj_pin(aged.as_fd(), &path)?)
}

/// The flows are listed before a packet could create them again.
#[test]
fn an_upgrade_converts_the_flows_of_layout_4() -> Result<()> {
    for hook in Hook::ALL {
        let lab = Lab::with_pods(3)?;
        lab.publish(&web())?;
        lab.agent(&hook.args())?.terminate()?;
        let connect = |number| {
            let from = Family::V4.client(number);
            let mut open = lab.client().connect(Protocol::Tcp, from, web().frontend(Family::V4, "http"))?;
            let pod = open.ask("/")?;
            Ok((open, pod))
        };
        let mut open = (0..10).map(connect).collect::<Result<Vec<_>>>()?;
        let listed = || -> Result<usize> { Ok(lab.affinity(&["get", "flows"])?.matches("default/web").count()) };
        let before = listed()?;
        let old = age_to(&lab, 4)?;
        age_flows(&old, names::FLOWS_V4)?;
        age_flows(&old, names::FLOWS_V6)?;

        let agent = lab.agent(&hook.args())?;
        ensure!(listed()? == before, "{hook:?}: {} of {before} are listed", listed()?);
        for (number, (open, pod)) in open.iter_mut().enumerate() {
            ensure!(open.ask("/")? == *pod, "{hook:?}: connection {number}");
        }
        agent.terminate()?;
    }
    Ok(())
}

/// Until the cluster answers, the old programs have more information than the new ones would.
#[test]
fn a_dataplane_of_another_version_serves_until_the_source_answers() -> Result<()> {
    let lab = Lab::with_pods(3)?;
    let mut api = ApiServer::start_in(lab.node())?;
    api.put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE_NAME}}))?;
    api.apply(&web().on([0]).to_yaml())?;
    let kubeconfig = api.kubeconfig(lab.scratch())?.display().to_string();
    let source = ["--source", "kubernetes", "--kubeconfig", &kubeconfig, "--services", "all", "--socket", "off"];
    let args = [source.as_slice(), &Hook::XdpNative.args()].concat();
    let mut first = lab.agent_unready(&args)?;
    first.until_ready()?;
    first.terminate()?;
    let old = age(&lab)?;
    ensure!(is_served(&lab), "it goes on");

    api.vanish();
    let mut second = lab.agent_unready(&args)?;
    eventually("the new agent waits", Duration::from_secs(30), || {
        Ok(second.log().iter().any(|line| line.contains("until it answers, the dataplane does not change")))
    })?;
    // Time in which nothing may happen.
    std::thread::sleep(Duration::from_secs(2));
    ensure!(is_served(&lab) && old.exists(), "the old dataplane is gone before there is another");

    api.appear()?;
    api.apply(&web().on([1, 2]).to_yaml())?;
    second.until_ready()?;
    eventually("the new programs answer", REPAIR_PATIENCE, || {
        Ok(!old.exists() && fresh_clients(&lab, 100).is_ok_and(|pods| pods.iter().all(|pod| pod != "pod-0")))
    })?;
    second.terminate()
}

#[test]
fn detach_removes_a_dataplane_of_another_version() -> Result<()> {
    for hook in Hook::ALL {
        let lab = Lab::with_pods(3)?;
        lab.publish(&web())?;
        lab.agent(&hook.args())?.terminate()?;
        age(&lab)?;
        ensure!(is_served(&lab), "{hook:?}: it goes on");
        let said = lab.affinity(&["detach"])?;
        ensure!(said.contains("map layout v0"), "{hook:?}: {said}");
        ensure!(!lab.pin_dir().exists() && !is_served(&lab), "{hook:?}: something is left");
    }
    Ok(())
}

/// The status and the body of an answer to GET, on the lab's node.
fn get(lab: &Lab, path: &str) -> Result<(u16, String)> {
    lab.node().run(|| {
        let mut stream = TcpStream::connect(ADDRESS)?;
        stream.set_read_timeout(Some(patience(Duration::from_secs(5))))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {ADDRESS}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("a header and a body")?;
        Ok((head.split(' ').nth(1).context("a status")?.parse()?, body.to_owned()))
    })?
}

#[test]
fn removed_pins_and_links_are_restored() -> Result<()> {
    for hook in [Hook::XdpNative, Hook::Tc] {
        tell_in(&Default::default(), &hook.args(), &[&web().client_ip()], |lab, agent| {
            let pins = PinDir::new(lab.pin_dir());
            let before = fresh_clients(lab, 0)?;
            let links = pins.list_links()?;
            let removed = [pins.map(names::SESSIONS_V4), pins.map(names::STATUS), pins.prog(names::TC_REVERSE)];
            removed.iter().chain(&links).try_for_each(fs::remove_file)?;
            eventually("everything is pinned again", REPAIR_PATIENCE, || {
                Ok(removed.iter().all(|pin| pin.exists()) && pins.list_links()?.len() == links.len())
            })?;
            assert_eq!(fresh_clients(lab, 0)?, before, "{hook:?}: the pins of clients");

            // A link may be taken off and stay pinned.
            let all = attachments(&pins)?;
            let (first, expected) = (all.first().context("an attachment")?, all.len());
            sys::link_detach(sys::obj_get(&first.path)?.as_fd())?;
            eventually("it is attached again", REPAIR_PATIENCE, || Ok(attachments(&pins)?.len() == expected))?;
            assert_eq!(fresh_clients(lab, 0)?, before, "{hook:?}: the pins of clients");
            for said in ["restored them", "attaching it again"] {
                ensure!(agent.log().iter().any(|line| line.contains(said)), "{said}: {:?}", agent.log());
            }

            fs::remove_dir_all(lab.pin_dir())?;
            eventually("the whole directory is there again", REPAIR_PATIENCE, || {
                Ok(removed.iter().all(|pin| pin.exists()) && attachments(&pins)?.len() == expected)
            })?;
            assert_eq!(fresh_clients(lab, 0)?, before, "{hook:?}: the pins of clients");
            Ok(())
        })?;
    }
    Ok(())
}

/// A filter has no link: removing the qdisc detaches it, and leaves the pin.
#[test]
fn a_removed_filter_is_restored() -> Result<()> {
    let args = [Hook::Tc.args().as_slice(), &["--no-tcx"]].concat();
    tell_in(&Default::default(), &args, &[&web()], |lab, agent| {
        let removed = lab.node().command("tc").args(["qdisc", "del", "dev", WIRE, "clsact"]).status()?;
        ensure!(removed.success(), "tc: {removed}");
        ensure!(!is_served(lab), "the filter is still there");
        eventually("it is there again", REPAIR_PATIENCE, || Ok(is_served(lab)))?;
        ensure!(agent.log().iter().any(|line| line.contains("clsact-ingress had been detached")), "{:?}", agent.log());
        Ok(())
    })
}

#[test]
fn probes_say_that_a_pin_leads_to_another_map() -> Result<()> {
    let args = [Hook::Tc.args().as_slice(), &["--metrics", ADDRESS]].concat();
    tell_in(&Default::default(), &args, &[&web()], |lab, _| {
        eventually("the agent is ready", REPAIR_PATIENCE, || Ok(get(lab, "/readyz")?.0 == 200))?;
        let path = PinDir::new(lab.pin_dir()).map(names::SESSIONS_V4);
        let ours = Map::open(&path)?;
        fs::remove_file(&path)?;
        let theirs = Map::create("theirs", ours.info())?;
        sys::obj_pin(theirs.as_fd(), &path)?;
        for probe in ["/healthz", "/readyz"] {
            eventually(&format!("{probe} says it"), REPAIR_PATIENCE, || {
                let (status, text) = get(lab, probe)?;
                Ok(status == 503 && text.contains(names::SESSIONS_V4) && text.contains("restart the agent"))
            })?;
        }
        fs::remove_file(&path)?;
        for probe in ["/healthz", "/readyz"] {
            eventually(&format!("{probe} is good again"), REPAIR_PATIENCE, || Ok(get(lab, probe)?.0 == 200))?;
        }
        Ok(())
    })
}

#[test]
fn a_smaller_table_says_how_many_entries_it_drops() -> Result<()> {
    const MANY: u32 = 3000;
    let pins = PinDir::new(&Path::new("/sys/fs/bpf").join(format!("affinity-house-{}", std::process::id())));
    let small = |sessions| {
        let sizes = Sizes { sessions, flows: 2 * sessions, ..Sizes::of_memory(Memory { total: 1 << 29, limit: None }) };
        load::load(&pins, &load::Options { sizes, ..Default::default() })
    };
    let told = (|| -> Result<_> {
        ensure!(small(4096)?.dropped.is_empty());
        let store = KernelStore::open(pins.root())?;
        let session = Session {
            created_ns: 1,
            last_used_ns: 1,
            backend: BackendRef { index: 0, generation: 1 },
            ..Zeroable::zeroed()
        };
        for client in 0..MANY {
            store.v4.sessions.put(&SessionKey::new(7, V4(client.to_be_bytes()), 32), &session)?;
        }
        let dropped = small(1024)?.dropped;
        let left = KernelStore::open(pins.root())?.v4.sessions.iter().count() as u64;
        Ok((dropped, left))
    })();
    pins.remove()?;
    let (dropped, left) = told?;
    assert_eq!(dropped, [(names::SESSIONS_V4, u64::from(MANY) - left)], "{left} are left");
    Ok(())
}

#[test]
fn a_separate_sys_mount_is_named_as_the_cause() -> Result<()> {
    tell(Hook::Tc, &[&web()], |lab, _| {
        let given = lab.affinity_command()?;
        let mut command = Command::new("ip");
        // After `nsenter --net=PATH --`.
        command.args(["netns", "exec", lab.node().name()]).args(given.get_args().skip(2)).args(["get", "services"]);
        let output = command.output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        let remedy = format!("nsenter --net=/run/netns/{}", lab.node().name());
        ensure!(output.status.code() == Some(1) && error.contains(&remedy), "{error}");
        Ok(())
    })
}

#[test]
fn programs_of_others_and_kube_proxys_rules_are_named() -> Result<()> {
    let lab = Lab::with_pods(1)?;
    lab.publish(&web().on([0]))?;
    ensure!(!lab.affinity(&["check"])?.contains("others"), "nobody else is there");
    // The client's end of the wire runs a program that passes everything.
    let mut check = Command::new("nsenter");
    check.arg(format!("--net={}", lab.client_namespace().path().display()));
    check.args(lab.affinity_command()?.get_args().skip(1)).arg("check");
    let said = String::from_utf8(check.output()?.stdout)?;
    ensure!(said.contains("eth0: another XDP program ("), "{said}");

    Mode::Nftables.install(&lab, &[web().on([0])])?;
    let said = lab.affinity(&["check"])?;
    ensure!(said.contains("kube-proxy's rules (nftables)"), "{said}");
    let agent = lab.agent(&[Hook::Tc.args().as_slice(), &["--services", "all"]].concat())?;
    ensure!(agent.log().iter().any(|line| line.contains("kube-proxy's rules (nftables)")), "{:?}", agent.log());
    agent.terminate()
}

#[test]
fn a_default_route_by_a_device_without_ethernet_frames_is_said() -> Result<()> {
    let lab = Lab::with_pods(1)?;
    lab.publish(&web().on([0]))?;
    lab.node().ip(
        "tuntap add dev raw0 mode tun\nlink set raw0 up\naddr add 172.31.0.1/24 dev raw0\nroute add default dev raw0\n",
    )?;
    let line = "raw0: has a default route, but its frames have no Ethernet header";
    ensure!(lab.affinity(&["check"])?.contains(line));
    let agent = lab.agent(&Hook::Tc.args())?;
    ensure!(agent.log().iter().any(|said| said.contains(line)), "{:?}", agent.log());
    let said = lab.affinity(&["explain", "--from", "198.18.0.1", "--to", "10.96.0.10:80"])?;
    ensure!(said.contains(line), "{said}");
    agent.terminate()
}
