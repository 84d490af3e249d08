//! ICMP errors that the kernels of clients, nodes and pods send by themselves: they are translated on their way, so that the
//! receiver understands them.

use std::io::ErrorKind;
use std::net::IpAddr;

use affinity_tests::lab::{Capture, Direction, Family, Lab, PATIENCE, Protocol, Service};
use affinity_tests::story::{Hook, tell, web};
use anyhow::{Context, Result, ensure};

/// A service with a port that its pods do not listen on.
fn closed() -> Service {
    Service::new("closed", 12).udp("dns", 53, 5999).client_ip().on(0..3)
}

#[test]
fn a_client_learns_at_once_that_a_pod_does_not_listen() -> Result<()> {
    let closed = closed();
    for hook in Hook::ALL {
        tell(hook, &[&closed], |lab, _| {
            for family in Family::BOTH {
                let to = closed.frontend(family, "dns");
                let refused = lab.client().udp_ask(family.client(1), to, "/").expect_err("nobody listens");
                ensure!(refused.kind() == ErrorKind::ConnectionRefused, "{hook:?} {family}: {refused}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_pod_learns_that_a_client_has_gone() -> Result<()> {
    let web = web().client_ip();
    for hook in Hook::ALL {
        tell(hook, &[&web], |lab, _| {
            for family in Family::BOTH {
                let mut socket = lab.client().connect(Protocol::Udp, family.client(1), web.frontend(family, "dns"))?;
                let name = socket.ask("/")?;
                let pod = lab.pods().iter().find(|pod| pod.name() == name).context("one of the pods")?;
                let namespace = pod.namespace().context("it lives")?;
                let capture = Capture::start(namespace, "eth0", Direction::In, &lab.scratch().join("errors.pcap"))?;
                // The answer arrives late, when the socket is closed, and the client's kernel sends an error.
                socket.ask_and_leave("/late")?;
                capture.until("an error reaches the pod", PATIENCE, |frame| quoted_source(frame).is_some())?;
                let frames = capture.stop()?;
                let address = pod_address(lab, &name, family)?;
                let quoted = frames.iter().find_map(|frame| quoted_source(frame));
                ensure!(quoted == Some(address), "{hook:?} {family}: {quoted:?}, not {address}, among {frames:02x?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// The source of the packet that an ICMP error "destination unreachable" quotes.
fn quoted_source(frame: &[u8]) -> Option<IpAddr> {
    match (frame.get(12..14)?, frame.get(14..)?) {
        ([0x08, 0x00], packet) if packet.get(9) == Some(&1) && packet.get(20) == Some(&3) => {
            Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(40..44)?).ok()?))
        }
        ([0x86, 0xdd], packet) if packet.get(6) == Some(&58) && packet.get(40) == Some(&1) => {
            Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(56..72)?).ok()?))
        }
        _ => None,
    }
}

/// A pod's address in a family.
fn pod_address(lab: &Lab, name: &str, family: Family) -> Result<IpAddr> {
    let backends = lab.affinity_json(&["get", "backends"])?;
    let rows = backends.as_array().context("an array")?.iter().filter(|row| row["name"] == name);
    let mut addresses = rows.filter_map(|row| row["address"].as_str()?.parse().ok());
    addresses.find(|ip: &IpAddr| ip.is_ipv4() == (family == Family::V4)).with_context(|| format!("{name}: {backends}"))
}

#[test]
fn a_path_with_a_smaller_mtu_is_found_out() -> Result<()> {
    let web = web().client_ip();
    // A number with many leading zeros: a request of several segments.
    let long = format!("/bytes/{}7", "0".repeat(4000));
    for hook in Hook::ALL {
        tell(hook, &[&web], |lab, _| {
            // Only on the node's ends: the pods announce segments that do not fit.
            for pod in lab.pods() {
                lab.node().command("ip").args(["link", "set", &pod.device(), "mtu", "1280"]).status()?;
            }
            for family in Family::BOTH {
                let answer = lab.client().http_get(family.client(1), web.frontend(family, "http"), &long);
                ensure!(answer.with_context(|| format!("{hook:?} {family}"))? == "xxxxxxx");
            }
            let errors = lab.count("related-error")?;
            ensure!(errors >= 2, "{hook:?}: {errors}");
            Ok(())
        })?;
    }
    Ok(())
}
