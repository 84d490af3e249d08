//! Devices that are not named in the options: which are found and why.

use std::collections::BTreeMap;
use std::time::Duration;

use affinity_tests::lab::{Family, Lab, Options, WIRE, eventually};
use affinity_tests::story::{Route, tell_in, web};
use anyhow::{Context, Result, ensure};

const PATIENCE: Duration = Duration::from_secs(10);

/// The attached devices of the lab's node, and where each leads. The program for replies is attached first, so a device counts
/// once packets from clients are translated, too.
fn attached(lab: &Lab) -> Result<BTreeMap<String, String>> {
    let devices = lab.affinity_json(&["get", "devices"])?;
    let field = |device: &serde_json::Value, name: &str| device[name].as_str().unwrap_or("-").to_owned();
    let has_ingress = |device: &&serde_json::Value| device["ingress"].as_array().is_some_and(|hooks| !hooks.is_empty());
    let devices = devices.as_array().context("an array")?.iter().filter(has_ingress);
    Ok(devices.map(|device| (field(device, "device"), field(device, "role"))).collect())
}

fn eventually_attached(lab: &Lab, device: &str, role: &str) -> Result<()> {
    eventually(&format!("{device} is attached"), PATIENCE, || {
        Ok(attached(lab)?.get(device).is_some_and(|found| found == role))
    })
}

#[test]
fn the_wire_and_the_pods_devices_are_found() -> Result<()> {
    let web = web().client_ip();
    // The last pod is a client only.
    tell_in(&Options { pods: 4, ..Options::default() }, &[], &[&web], |lab, _| {
        let mut expected = BTreeMap::from([(WIRE.to_owned(), "external".to_owned())]);
        expected.extend((0..4).map(|pod| (format!("pod{pod}"), "internal".to_owned())));
        assert_eq!(attached(lab)?, expected);
        for route in Route::all_to(&web) {
            route.dial(lab, 1, 3)?;
        }
        let to = web.frontend(Family::V4, "http");
        lab.pod_client(3).http_get(Family::V4.pod(3), to, "/")?;

        lab.kill_pod(3)?;
        eventually("its device is gone from the list", PATIENCE, || Ok(attached(lab)?.len() == 4))?;
        lab.return_pod(3)?;
        eventually_attached(lab, "pod3", "internal")?;
        lab.pod_client(3).http_get(Family::V4.pod(3), to, "/")?;
        Ok(())
    })
}

#[test]
fn devices_of_every_kind_get_the_role_that_they_deserve() -> Result<()> {
    let web = web().client_ip();
    tell_in(&Options::default(), &[], &[&web], |lab, _| {
        let elsewhere = lab.client_namespace().name();
        lab.node().ip(&format!(
            "link add br-pods type bridge\n\
             addr add 10.245.0.1/24 dev br-pods\n\
             link add port type veth peer name far netns {elsewhere}\n\
             link set port master br-pods\n\
             link add near type veth peer name beside\n\
             link add overlay type vxlan id 7 local 192.0.2.1 dstport 4789\n\
             addr add 10.246.0.0/32 dev overlay\n\
             link add virtual type ifb\n\
             addr add 10.96.0.10/32 dev virtual\n\
             tuntap add dev guest mode tap\n\
             tuntap add dev raw mode tun\n\
             addr add 10.247.0.1/24 dev raw\n\
             link add link {WIRE} name out type macvlan\n"
        ))?;
        for device in ["br-pods", "port", "guest"] {
            eventually_attached(lab, device, "internal")?;
        }
        let others = ["near", "beside", "overlay", "virtual", "raw", "out", "lo"];
        let is_attached = |name: &str| Ok::<_, anyhow::Error>(attached(lab)?.contains_key(name));
        for name in others {
            ensure!(!is_attached(name)?, "{name} is attached");
        }
        // The reason to attach it may appear later, and counts as long as the device exists.
        lab.node().ip("addr add 192.0.2.77/24 dev out\n")?;
        eventually_attached(lab, "out", "external")?;
        lab.node().ip("link set near up\nlink set beside up\nroute add default dev near\n")?;
        eventually_attached(lab, "near", "external")?;
        ensure!(!is_attached("beside")?, "both ends of a pair are attached");
        lab.node().ip(&format!(
            "route del default dev near\n\
             link add link {WIRE} name last type macvlan\n\
             addr add 192.0.2.78/24 dev last\n"
        ))?;
        // Earlier changes have been handled, too.
        eventually_attached(lab, "last", "external")?;
        ensure!(is_attached("near")?, "a default route that has gone took its device along");

        let said = lab.affinity(&["check"])?;
        for line in ["br-pods: internal, bridge of pods or guests", "lo (loopback: its packets are already routed)"] {
            ensure!(said.contains(line), "{line:?} is not in\n{said}");
        }
        Ok(())
    })
}

#[test]
fn where_nothing_can_be_found_attach_says_so() -> Result<()> {
    let lab = Lab::with_pods(0)?;
    lab.publish(&web())?;
    lab.node().ip(&format!("link del {WIRE}\n"))?;
    let source = lab.source().display().to_string();
    let error = lab.affinity(&["attach", "--source", &source]).unwrap_err().to_string();
    ensure!(error.contains("no device found that receives clients' packets"), "{error}");
    Ok(())
}
