//! Network cards as the wires of a lab: cards that QEMU emulates for a guest connect clients, node A and node B, and frames
//! arrive as the drivers deliver them. `cargo xtask test --nic MODEL` starts such a guest and runs these tests there.
//!
//! Each test fails if there are no such cards; ordinary runs do not include it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use affinity_tests::lab::{
    Agent, FIRST_OF_B, Family, Frontend, Lab, Options, PODS, Policy, Protocol, Service, UNDERLAY_WIRE, WIRE, eventually,
};
use affinity_tests::patience::patience;
use affinity_tests::story::{Route, report, tell_in, web};
use anyhow::{Context, Result, bail, ensure};
use rustix::net::sockopt;

/// The model of the cards: one of [`Cards::ALL`], by name.
const VARIABLE: &str = "AFFINITY_TEST_NIC";
/// The address of the first card; the last byte of the others' counts up.
const FIRST_ADDRESS: &str = "52:54:00:af:f1:00";
/// How long the kernel may take to return a card after a lab has gone.
const RETURN_PATIENCE: Duration = Duration::from_secs(10);
/// A rejection within this time is no time-out.
const AT_ONCE: Duration = Duration::from_millis(900);
/// How many bytes are sent in each direction of a connection.
const STREAM_BYTES: usize = 16 << 20;
const STREAM_PORT: u16 = 9000;

/// A model of card, and the features of its driver.
#[derive(Clone, Copy, Debug)]
struct Cards {
    name: &'static str,
    driver: &'static str,
    /// Whether XDP works in the driver.
    native: bool,
    /// The message if it does not.
    why_not: &'static str,
    /// An MTU above the usual one that the emulated card supports. QEMU's vmxnet3 loses frames of several buffers.
    large_mtu: u16,
}

impl Cards {
    const ALL: [Self; 5] = [
        Self { name: "virtio-net", driver: "virtio_net", native: true, why_not: "", large_mtu: 9000 },
        Self {
            name: "virtio-net-fixed-offloads",
            driver: "virtio_net",
            native: false,
            why_not: "the host merges frames",
            large_mtu: 9000,
        },
        Self { name: "igb", driver: "igb", native: true, why_not: "", large_mtu: 9000 },
        Self { name: "vmxnet3", driver: "vmxnet3", native: true, why_not: "", large_mtu: 3000 },
        Self { name: "e1000e", driver: "e1000e", native: false, why_not: "the driver has no XDP", large_mtu: 9000 },
    ];

    /// The cards of this guest, according to the variable.
    fn of_this_guest() -> Result<Self> {
        let name = std::env::var(VARIABLE)
            .with_context(|| format!("{VARIABLE} does not say which cards there are: run `cargo xtask test --nic`"))?;
        let cards = Self::ALL.into_iter().find(|cards| cards.name == name);
        cards.with_context(|| format!("{VARIABLE}={name}: no model that is known here"))
    }

    /// A lab with these cards as its wires.
    fn lab(self, pods_of_b: usize) -> Result<Options> {
        let mut names = Vec::new();
        for number in 0..4 {
            let address = format!("{}{number}", FIRST_ADDRESS.strip_suffix('0').context("a first number")?);
            let mut name = None;
            eventually(&format!("the card {address} is here"), RETURN_PATIENCE, || {
                name = device_with(&address)?;
                Ok(name.is_some())
            })?;
            let name = name.context("it is here")?;
            let driver = fs::read_link(Path::new("/sys/class/net").join(&name).join("device/driver"))?;
            ensure!(driver.ends_with(self.driver), "{name} has the driver {}", driver.display());
            names.push(name);
        }
        let Ok(cards) = names.try_into() else { bail!("four cards") };
        Ok(Options { pods_of_b, cards: Some(cards), ..Options::default() })
    }

    /// Fails unless a device has the best hook that its driver allows, and the agent gives the reason if that is not XDP.
    fn is_attached_right(self, lab: &Lab, agent: &Agent, device: &str) -> Result<()> {
        let hooks = ingress_hooks(lab, device)?;
        if self.native {
            ensure!(hooks == ["xdp-native"], "{device}: {hooks:?}\n{}", agent.log().join("\n"));
            return Ok(());
        }
        ensure!(hooks.iter().all(|hook| !hook.starts_with("xdp")), "{device}: {hooks:?}\n{}", agent.log().join("\n"));
        self.says_why(agent, device)
    }

    fn says_why(self, agent: &Agent, device: &str) -> Result<()> {
        let log = agent.log();
        let says = |line: &&String| [device, "xdp-native", self.why_not].iter().all(|part| line.contains(part));
        let line = log.iter().find(says);
        report(line.with_context(|| format!("nothing says why {device} has no XDP:\n{}", log.join("\n")))?);
        Ok(())
    }
}

/// The device with this link address, in the namespace of this process.
fn device_with(address: &str) -> Result<Option<String>> {
    for entry in fs::read_dir("/sys/class/net")? {
        let entry = entry?;
        let found = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if found.trim_end() == address {
            return Ok(entry.file_name().into_string().ok());
        }
    }
    Ok(None)
}

/// The ingress hooks of a device.
fn ingress_hooks(lab: &Lab, name: &str) -> Result<Vec<String>> {
    let devices = lab.affinity_json(&["get", "devices"])?;
    let mut devices = devices.as_array().context("an array")?.iter();
    let device = devices.find(|device| device["device"] == name).with_context(|| format!("{name} is not attached"))?;
    let hooks = device["ingress"].as_array().with_context(|| device.to_string())?;
    Ok(hooks.iter().filter_map(|hook| hook.as_str().map(str::to_owned)).collect())
}

/// Both wires and the pods' devices, with the best hooks that they have.
fn args() -> Vec<&'static str> {
    let [pods_v4, pods_v6] = PODS;
    vec!["--device", WIRE, UNDERLAY_WIRE, "pod*", "--services", "all", "--pod-cidr", pods_v4, "--pod-cidr", pods_v6]
}

#[test]
#[ignore = "needs cards that QEMU gives a guest: cargo xtask test --nic MODEL"]
fn the_best_hook_is_attached_and_clients_stay_on_their_pods() -> Result<()> {
    let cards = Cards::of_this_guest()?;
    let web = web().client_ip();
    tell_in(&cards.lab(0)?, &["--device", WIRE], &[&web], |lab, agent| {
        cards.is_attached_right(lab, agent, WIRE)?;
        for route in Route::all_to(&web) {
            let pods: BTreeSet<_> = route.dial(lab, 1, 10)?.into_iter().collect();
            ensure!(pods.len() == 1, "by {route:?} one client reached {pods:?}");
            let pods: BTreeSet<_> = route.dial_all(lab, 10..60)?.into_iter().collect();
            ensure!(pods.len() == 3, "by {route:?} fifty clients reached only {pods:?}");
        }
        Ok(())
    })
}

#[test]
#[ignore = "needs cards that QEMU gives a guest: cargo xtask test --nic MODEL"]
fn a_service_without_endpoints_refuses_at_once() -> Result<()> {
    let cards = Cards::of_this_guest()?;
    let empty = web().on([]);
    tell_in(&cards.lab(0)?, &["--device", WIRE], &[&empty], |lab, _| {
        for route in Route::all_to(&empty) {
            // The first packet may have to wait for neighbour resolution.
            lab.client().ask(route.protocol, route.client(1), route.to).expect_err("nobody serves");
            for number in 0..5 {
                let started = Instant::now();
                let error =
                    lab.client().ask(route.protocol, route.client(number), route.to).expect_err("nobody serves");
                ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error} by {route:?}");
                ensure!(started.elapsed() < patience(AT_ONCE), "after {:?} by {route:?}", started.elapsed());
            }
        }
        Ok(())
    })
}

/// A service on one pod, with a port for streams.
fn on_pod(number: u16, pod: usize) -> Service {
    let web = Service::new(&format!("web-{number}"), number).tcp("http", 80, 8080).udp("dns", 53, 5353);
    web.tcp("stream", STREAM_PORT, STREAM_PORT).node_ports(30_080 + 3 * number).external(Policy::Cluster).on([pod])
}

#[test]
#[ignore = "needs cards that QEMU gives a guest: cargo xtask test --nic MODEL"]
fn pods_of_another_node_are_reached_past_the_stack_where_xdp_is_native() -> Result<()> {
    let cards = Cards::of_this_guest()?;
    let service = on_pod(1, FIRST_OF_B);
    tell_in(&cards.lab(1)?, &args(), &[&service], |lab, agent| {
        [WIRE, UNDERLAY_WIRE].iter().try_for_each(|device| cards.is_attached_right(lab, agent, device))?;
        for (family, protocol) in Family::BOTH.into_iter().flat_map(|family| Protocol::BOTH.map(|of| (family, of))) {
            let to = service.address(Frontend::NodePort, family, protocol).context("a node port")?;
            let ask = |number| lab.client().ask(protocol, family.client(number), to);
            ask(0).with_context(|| format!("the first to {to}, {protocol}"))?;
            let before = lab.count("redirected")?;
            for number in 0..20 {
                ask(number).with_context(|| format!("client {number} to {to}, {protocol}"))?;
            }
            let redirected = lab.count("redirected")? - before;
            let expected = if cards.native { 20 * 2 } else { 0 };
            ensure!(redirected >= expected, "{to}, {protocol}: {redirected} packets were redirected");
        }
        Ok(())
    })
}

#[test]
#[ignore = "needs cards that QEMU gives a guest: cargo xtask test --nic MODEL"]
fn megabytes_arrive_as_they_were_sent_both_ways() -> Result<()> {
    let cards = Cards::of_this_guest()?;
    let services = [on_pod(1, 0), on_pod(2, FIRST_OF_B)];
    tell_in(&cards.lab(1)?, &args(), &services.each_ref(), |lab, agent| {
        cards.is_attached_right(lab, agent, WIRE)?;
        stream_to_each(lab, &frontends(&services))
    })
}

/// The destination of each service's streams, and its pod.
fn frontends(services: &[Service; 2]) -> Vec<(SocketAddr, usize)> {
    let of_family =
        |family| services.iter().map(move |service| service.frontend(family, "stream")).zip([0, FIRST_OF_B]);
    Family::BOTH.into_iter().flat_map(of_family).collect()
}

#[test]
#[ignore = "needs cards that QEMU gives a guest: cargo xtask test --nic MODEL"]
fn large_frames_pass_by_native_xdp_or_by_tc() -> Result<()> {
    let cards = Cards::of_this_guest()?;
    let services = [on_pod(1, 0), on_pod(2, FIRST_OF_B)];
    let lab = Lab::up(&cards.lab(1)?)?;
    let [pod_a, pod_b] = [0, FIRST_OF_B].map(|index| lab.pod(index).device());
    for (node, devices) in [
        (lab.node(), [WIRE, UNDERLAY_WIRE, pod_a.as_str()].as_slice()),
        (lab.node_b(), &[UNDERLAY_WIRE, pod_b.as_str()]),
        (lab.client_namespace(), &["eth0"]),
        (lab.pod(0).namespace().context("it lives")?, &["eth0"]),
        (lab.pod(FIRST_OF_B).namespace().context("it lives")?, &["eth0"]),
    ] {
        devices.iter().try_for_each(|device| node.ip(&format!("link set {device} mtu {}\n", cards.large_mtu)))?;
    }
    let pods = Family::BOTH.into_iter().flat_map(|family| [0, FIRST_OF_B].map(|pod| (family.pod(pod), pod)));
    let pods: Vec<_> = pods.map(|(address, pod)| (SocketAddr::new(address, STREAM_PORT), pod)).collect();
    stream_to_each(&lab, &pods).context("the cards do not carry such frames, without affinity")?;
    services.iter().try_for_each(|service| lab.publish(service))?;
    let agent = lab.agent(&args())?;
    services.iter().try_for_each(|service| lab.publish_and_settle(service))?;
    for device in [WIRE, UNDERLAY_WIRE] {
        let hooks = ingress_hooks(&lab, device)?;
        report(&format!("{device} with an MTU of {}: {}", cards.large_mtu, hooks.join(", ")));
        if hooks != ["xdp-native"] {
            cards.says_why(&agent, device)?;
        }
    }
    stream_to_each(&lab, &frontends(&services)).with_context(|| agent.log().join("\n"))
}

/// Sends a stream to each address, where this pod echoes it, and compares.
fn stream_to_each(lab: &Lab, ways: &[(SocketAddr, usize)]) -> Result<()> {
    for &(to, pod) in ways {
        let namespace = lab.pod(pod).namespace().context("it lives")?;
        let listener = namespace.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, STREAM_PORT)))??;
        // A thread that waits forever would keep the namespace, and with it the cards that the next test needs.
        sockopt::set_socket_timeout(&listener, sockopt::Timeout::Recv, Some(stall()))?;
        let echo = thread::spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(stall()))?;
            stream.set_write_timeout(Some(stall()))?;
            std::io::copy(&mut stream.try_clone()?, &mut stream)?;
            Ok(())
        });
        let started = Instant::now();
        let stream = lab.client_namespace().run(|| TcpStream::connect(to))?.with_context(|| to.to_string())?;
        stream_there_and_back(stream, to)?;
        report(&format!("{} MiB to {to} and back in {:?}", STREAM_BYTES >> 20, started.elapsed()));
        echo.join().map_err(|_| anyhow::anyhow!("the echo panicked"))??;
    }
    Ok(())
}

/// How long a stream may stall.
fn stall() -> Duration {
    patience(Duration::from_secs(10))
}

fn stream_there_and_back(stream: TcpStream, to: SocketAddr) -> Result<()> {
    stream.set_read_timeout(Some(stall()))?;
    stream.set_write_timeout(Some(stall()))?;
    let sent = &noise();
    let mut received = Vec::with_capacity(sent.len());
    thread::scope(|scope| -> Result<()> {
        let mut writing = stream.try_clone()?;
        let writer = scope.spawn(move || -> std::io::Result<()> {
            writing.write_all(sent)?;
            writing.shutdown(std::net::Shutdown::Write)
        });
        (&stream).read_to_end(&mut received).with_context(|| format!("{to}, from the pod"))?;
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?.with_context(|| format!("{to}, to the pod"))
    })?;
    ensure!(received.len() == sent.len(), "{to}: {} of {} bytes came back", received.len(), sent.len());
    ensure!(received == *sent, "{to}: other bytes came back");
    Ok(())
}

/// Bytes without a pattern that would hide a mix-up (xorshift, Marsaglia 2003).
fn noise() -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(STREAM_BYTES);
    while bytes.len() < STREAM_BYTES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}
