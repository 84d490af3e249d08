//! Whether a kernel can be used at all: every program loads, and each hook that translates packets or connections carries a
//! connection of each family and protocol. `cargo xtask test` also runs these in guests with other kernels, and makes a table
//! of the lines that they print.

use std::collections::BTreeSet;

use affinity_tests::lab::{Cgroup, Family, Lab, Options, PODS, Protocol, WIRE, has_tcx, tc_hooks};
use affinity_tests::story::{Hook, Route, report, tell_in, web};
use anyhow::{Context, Result, ensure};

const PROCESS: &str = env!("CARGO_BIN_EXE_socket_process");
/// How many equal answers in a row confirm that a client is pinned.
const CONFIRMATIONS: usize = 5;

/// Reports the result of a hook, for the table.
fn say(hook: &str, result: &str) {
    report(&format!("hook: {hook}: {result}"));
}

/// The hooks of a device of the lab's node, as `affinity get devices` names them.
fn hooks_of(lab: &Lab, name: &str) -> Result<BTreeSet<String>> {
    let devices = lab.affinity_json(&["get", "devices"])?;
    let mut devices = devices.as_array().context("an array")?.iter();
    let device = devices.find(|device| device["device"] == name).with_context(|| format!("{name} is not attached"))?;
    let ingress = device["ingress"].as_array().with_context(|| device.to_string())?;
    Ok(ingress.iter().chain([&device["egress"]]).filter_map(|hook| hook.as_str().map(str::to_owned)).collect())
}

/// Runs the agent with these arguments, checks that clients stay with their pods on every route, and returns the hooks of the
/// wire.
fn clients_stay(args: &[&str]) -> Result<BTreeSet<String>> {
    let web = web().client_ip();
    let mut hooks = BTreeSet::new();
    tell_in(&Options::default(), args, &[&web], |lab, _| {
        for route in Route::all_to(&web) {
            let pods: BTreeSet<_> = route.dial(lab, 1, CONFIRMATIONS)?.into_iter().collect();
            ensure!(pods.len() == 1, "by {route:?} one client reached {pods:?}");
        }
        hooks = hooks_of(lab, WIRE)?;
        Ok(())
    })?;
    Ok(hooks)
}

#[test]
fn xdp_in_the_driver_of_a_veth() -> Result<()> {
    let hooks = clients_stay(&Hook::XdpNative.args())?;
    ensure!(hooks.contains("xdp-native"), "{hooks:?}");
    say("xdp-native", "works");
    Ok(())
}

#[test]
fn tcx_where_the_kernel_has_it() -> Result<()> {
    let hooks = clients_stay(&Hook::Tc.args())?;
    let wanted = tc_hooks()?;
    ensure!(
        hooks == BTreeSet::from(wanted.map(str::to_owned)),
        "the kernel has {wanted:?}, and the hooks are {hooks:?}"
    );
    say("tcx", if has_tcx()? { "works" } else { "not in this kernel" });
    Ok(())
}

#[test]
fn clsact() -> Result<()> {
    let hooks = clients_stay(&[Hook::Tc.args().as_slice(), &["--no-tcx"]].concat())?;
    ensure!(hooks.iter().eq(["clsact-egress", "clsact-ingress"]), "{hooks:?}");
    say("clsact", "works");
    Ok(())
}

#[test]
fn sockets() -> Result<()> {
    let web = web().client_ip();
    let cgroup = Cgroup::create()?;
    let args = Lab::socket_args(&cgroup, &["--device", "none*"])?;
    tell_in(&Options::default(), &args, &[&web], |lab, _| {
        let mut process = cgroup.start(PROCESS, lab.node())?;
        for (family, (protocol, port)) in Family::BOTH
            .into_iter()
            .flat_map(|family| [(Protocol::Tcp, "http"), (Protocol::Udp, "dns")].map(|p| (family, p)))
        {
            let to = web.frontend(family, port);
            let pods = (0..CONFIRMATIONS).map(|_| process.dial(protocol, to)).collect::<Result<BTreeSet<_>>>()?;
            ensure!(pods.len() == 1, "the node reached {pods:?} by {to}");
        }
        Ok(())
    })?;
    say("sockets", "works");
    Ok(())
}

#[test]
fn redirect_past_the_stack() -> Result<()> {
    let web = web().client_ip();
    let [pods_v4, pods_v6] = PODS;
    let args = ["--device", WIRE, "pod*", "--xdp", "off", "--forwarding", "redirect"];
    let args = [args.as_slice(), &["--pod-cidr", pods_v4, "--pod-cidr", pods_v6]].concat();
    tell_in(&Options::default(), &args, &[&web], |lab, _| {
        for route in Route::all_to(&web) {
            // With the first packet, the stack finds the neighbour.
            route.dial(lab, 1, 1)?;
            let before = lab.count("redirected")?;
            route.dial(lab, 1, CONFIRMATIONS)?;
            let redirected = lab.count("redirected")? - before;
            ensure!(redirected > CONFIRMATIONS as u64, "{redirected} packets were redirected by {route:?}");
        }
        Ok(())
    })?;
    say("redirect", "works");
    Ok(())
}
