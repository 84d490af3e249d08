//! Frames as devices deliver them: checksums that the sender left to a device, VLAN tags that a card removed, frames to other
//! hosts; and the messages if XDP cannot be attached.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use affinity_tests::lab::{
    Capture, Direction, Family, Lab, Options, Protocol, Service, WIRE, ethtool, eventually, pass_by_xdp, tag_twice,
    tc_hooks,
};
use affinity_tests::packet::{Verified, verify_checksums};
use affinity_tests::patience::patience;
use affinity_tests::story::{Hook, Route, tell, tell_in, web};
use affinity_user::attach::xdp_features;
use anyhow::{Context, Result, ensure};

/// "At once", for what must not wait for a time-out.
const AT_ONCE: Duration = Duration::from_millis(900);
const PATIENCE: Duration = Duration::from_secs(10);
/// A pod that is no endpoint.
const BYSTANDER: usize = 3;

/// A service that rejects.
fn empty() -> Service {
    web().on([])
}

/// A field of an attached device, by `get devices`.
fn field(lab: &Lab, device: &str, field: &str) -> Result<String> {
    let devices = lab.affinity_json(&["get", "devices"])?;
    let found = devices.as_array().context("an array")?.iter().find(|found| found["device"] == device);
    let value = &found.with_context(|| format!("{device} is not attached"))?[field];
    Ok(value.as_str().or_else(|| value[0].as_str()).unwrap_or("-").to_owned())
}

/// Whether one line of a log has all of these parts.
fn said(log: &[String], parts: &[&str]) -> bool {
    log.iter().any(|line| parts.iter().all(|part| line.contains(part)))
}

/// Checks that all frames have valid checksums; returns how many have one of a transport.
fn right_sums(frames: &[Vec<u8>], what: &str) -> Result<usize> {
    let mut verified = 0;
    for frame in frames {
        let outcome = verify_checksums(frame).with_context(|| format!("{what}: {frame:02x?}"))?;
        verified += usize::from(outcome == Verified::Transport);
    }
    Ok(verified)
}

#[test]
fn generic_xdp_on_request_passes_partial_checksums() -> Result<()> {
    let web = web().client_ip();
    for more in [[].as_slice(), &["--forwarding", "redirect"]] {
        let args = [["--device", WIRE, "pod0", "pod1", "pod2", "--xdp", "generic"].as_slice(), more].concat();
        tell_in(&Options::default(), &args, &[&web], |lab, agent| {
            // Frames cross the wire with partial checksums, and the node's devices to the pods complete them.
            ethtool(lab.client_namespace(), "eth0", &["tx", "on"])?;
            for pod in 0..3 {
                ethtool(lab.node(), &format!("pod{pod}"), &["tx", "off"])?;
            }
            let arrivals = lab.scratch().join("arrivals.pcap");
            let pod = lab.pod(0).namespace().context("the pod lives")?;
            let arrivals = Capture::start(pod, "eth0", Direction::In, &arrivals)?;
            for route in Route::all_to(&web) {
                for client in 0..20 {
                    route.dial(lab, client, 2)?;
                }
            }
            let frames = arrivals.stop()?;
            if more.is_empty() {
                ensure!(right_sums(&frames, "to a pod")? > 0, "nothing arrived");
            }
            ensure!(field(lab, WIRE, "ingress")? == tc_hooks()?[0]);
            ensure!(field(lab, WIRE, "note")?.contains("generic XDP"), "{}", field(lab, WIRE, "note")?);
            ensure!(said(&agent.log(), &[WIRE, "attached: tc", "generic XDP cannot detect partial checksums"]));
            let redirected = lab.count("redirected")?;
            ensure!((redirected > 0) != more.is_empty(), "{redirected} packets were redirected");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn refusals_have_right_checksums_whatever_devices_compute() -> Result<()> {
    let (options, device) = (Options { pods: BYSTANDER + 1, ..Options::default() }, format!("pod{BYSTANDER}"));
    tell_in(&options, &["--device", &device, "--xdp", "off"], &[&empty()], |lab, _| {
        for (of_pod, of_node) in [("on", "off"), ("off", "on"), ("on", "on"), ("off", "off")] {
            let pod = lab.pod(BYSTANDER).namespace().context("the pod lives")?;
            ethtool(pod, "eth0", &["tx", of_pod])?;
            ethtool(lab.node(), &device, &["tx", of_node])?;
            let what = format!("pod tx {of_pod}, device tx {of_node}");
            let refusals = lab.scratch().join("refusals.pcap");
            let refusals = Capture::start(pod, "eth0", Direction::In, &refusals)?;
            for route in Route::all_to(&empty()) {
                let started = Instant::now();
                let ask = || lab.pod_client(BYSTANDER).ask(route.protocol, route.family.pod(BYSTANDER), route.to);
                let error = ask().expect_err("nobody serves");
                ensure!(error.kind() == ErrorKind::ConnectionRefused, "{what}: {error} by {route:?}");
                ensure!(started.elapsed() < patience(AT_ONCE), "{what}: after {:?} by {route:?}", started.elapsed());
            }
            let verified = right_sums(&refusals.stop()?, &what)?;
            ensure!(verified >= 4, "{what}: {verified} refusals");
        }
        Ok(())
    })
}

/// The kernel removes the outer tag before TC; the inner one remains in the data. If the sender left the checksum to a device,
/// an answer could not have a valid one.
#[test]
fn refusals_of_frames_with_two_tags_have_right_checksums_or_are_not_sent() -> Result<()> {
    let empty = empty();
    tell(Hook::Tc, &[&empty], |lab, _| {
        // There are no answers once there are tags, so the node's link address has to stay known.
        let stay_known = ["ipv4", "ipv6"].map(|family| format!("{family}/neigh/eth0/base_reachable_time_ms"));
        lab.client_namespace().sysctl(&stay_known.each_ref().map(|name| (name.as_str(), "3600000")))?;
        let ask = |route: Route, client, usual| {
            lab.client()
                .with_patience(usual)
                .ask(route.protocol, route.client(client), route.to)
                .expect_err("nobody serves")
        };
        for route in Route::all_to(&empty) {
            // Without tags, so that neighbours are known.
            let error = ask(route, 1, PATIENCE);
            ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error} by {route:?}");
        }
        let _tags = tag_twice(lab.client_namespace(), "eth0")?;
        for (tx, is_answered) in [("off", true), ("on", false)] {
            ethtool(lab.client_namespace(), "eth0", &["tx", tx])?;
            for route in Route::all_to(&empty) {
                let what = format!("tx {tx}, {route:?}");
                let unanswered = lab.count("no-reply-built")?;
                let answers = lab.scratch().join("answers.pcap");
                let answers = Capture::start(lab.client_namespace(), "eth0", Direction::In, &answers)?;
                // The client has no device for these tags, so it never receives an answer.
                ask(route, 2, AT_ONCE);
                let is_tagged = |frame: &[u8]| frame.get(12..14) == Some(&[0x88, 0xa8]);
                if is_answered {
                    answers.until("an answer with tags", PATIENCE, is_tagged)?;
                }
                let mut frames = answers.stop()?;
                frames.retain(|frame| is_tagged(frame));
                let verified = right_sums(&frames, &what)?;
                ensure!((verified > 0) == is_answered, "{what}: {frames:02x?}");
                ensure!((lab.count("no-reply-built")? > unanswered) != is_answered, "{what}");
            }
        }
        Ok(())
    })
}

#[test]
#[ignore = "needs a kernel with VLAN devices (8021q): `cargo xtask test` runs it in a guest"]
fn answers_stay_in_their_vlan() -> Result<()> {
    let empty = empty();
    tell(Hook::XdpNative, &[&empty], |lab, agent| {
        ensure!(field(lab, WIRE, "ingress")? == "xdp-native");
        lab.node().ip(&format!(
            "link add link {WIRE} name tagged type vlan id 100\naddr add 192.0.3.1/24 dev tagged\nlink set tagged up\n"
        ))?;
        eventually("TC takes over", PATIENCE, || Ok(field(lab, WIRE, "ingress")? == tc_hooks()?[0]))?;
        let note = field(lab, WIRE, "note")?;
        ensure!(note.contains("strips VLAN tags"), "{note}");
        ensure!(said(&agent.log(), &[WIRE, "attached: tc", "strips VLAN tags"]), "{:?}", agent.log());

        let to = empty.frontend(Family::V4, "http");
        lab.client_namespace().ip(&format!(
            "link add link eth0 name tagged type vlan id 100\naddr add 192.0.3.2/24 dev tagged\nlink set tagged up\n\
             route replace {}/32 via 192.0.3.1\n",
            to.ip()
        ))?;
        let answers = lab.scratch().join("answers.pcap");
        let answers = Capture::start(lab.client_namespace(), "tagged", Direction::In, &answers)?;
        for client in 1..6 {
            let error = lab.client().ask(Protocol::Tcp, Family::V4.client(client), to).expect_err("nobody serves");
            ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
        }
        let frames = answers.stop()?;
        let resets = frames.iter().filter(|frame| frame.len() >= 54 && frame[23] == 6).count();
        ensure!(resets >= 5, "{resets} resets came back in the VLAN: {frames:02x?}");

        lab.node().ip("link del tagged\n")?;
        eventually("XDP is back", PATIENCE, || Ok(field(lab, WIRE, "ingress")? == "xdp-native"))?;
        ensure!(field(lab, WIRE, "note")? == "-");
        Ok(())
    })
}

#[test]
fn frames_to_another_host_pass_xdp_untouched() -> Result<()> {
    let empty = empty();
    tell(Hook::XdpNative, &[&empty], |lab, _| {
        let (from, to) = (Family::V4.client(1), empty.frontend(Family::V4, "http"));
        let ask =
            |usual| lab.client().with_patience(usual).ask(Protocol::Tcp, from, to).expect_err("nobody serves").kind();
        ensure!(ask(PATIENCE) == ErrorKind::ConnectionRefused);
        let refused = lab.count("no-endpoints")?;
        lab.client_namespace().ip("neigh replace 192.0.2.1 lladdr 02:00:00:00:00:99 dev eth0 nud permanent\n")?;
        ensure!(ask(AT_ONCE) != ErrorKind::ConnectionRefused, "a frame to another host was answered");
        ensure!(lab.count("no-endpoints")? == refused && lab.count("other-host")? > 0);
        // A device may get another address while it is attached.
        lab.node().ip(&format!("link set {WIRE} address 02:00:00:00:00:99\n"))?;
        eventually("the new address is known", PATIENCE, || Ok(ask(AT_ONCE) == ErrorKind::ConnectionRefused))
    })
}

#[test]
fn the_reason_for_tc_is_logged_and_kept() -> Result<()> {
    let web = web();
    let args = ["--device", WIRE, "plain", "taken", "lone", "--xdp-device", "plain", "taken"];
    let lab = Lab::with_pods(3)?;
    lab.publish(&web)?;
    let elsewhere = lab.client_namespace().name();
    lab.node().ip(&format!(
        "link add plain type ifb\nlink set plain up\n\
         link add taken type veth peer name other netns {elsewhere}\nlink set taken up\n\
         link add lone type veth peer name far netns {elsewhere}\nlink set lone up\n"
    ))?;
    let _other_program = pass_by_xdp(lab.node(), "taken")?;
    let agent = lab.agent(&args)?;
    for (device, cause) in [("plain", "the driver has no XDP"), ("taken", "another XDP program is attached")] {
        let (ingress, note) = (field(&lab, device, "ingress")?, field(&lab, device, "note")?);
        ensure!(ingress == tc_hooks()?[0] && note.contains(cause), "{device}: {ingress}, {note}");
        ensure!(said(&agent.log(), &[device, "attached: tc", cause]), "{:?}", agent.log());
    }
    ensure!(field(&lab, WIRE, "note")? == "-");
    agent.terminate()?;
    // It outlives the agent, and a user who insists on XDP gets one line.
    ensure!(field(&lab, "plain", "note")?.contains("the driver has no XDP"));
    let source = lab.source().display().to_string();
    let insist = |device| lab.affinity(&["attach", "--source", &source, "--device", device, "--xdp", "native"]);
    let error = insist("plain").expect_err("it has no XDP").to_string();
    ensure!(error.contains("the driver has no XDP") && error.contains("--xdp auto"), "{error}");
    // The other end of this pair does not poll, so frames that XDP sends back are lost.
    insist("lone")?;
    let note = field(&lab, "lone", "note")?;
    // Before Linux 6.3 the kernel does not report which devices can send frames.
    ensure!(note.contains("packets that XDP sends are lost") == xdp_features().is_ok(), "{note}");
    Ok(())
}
