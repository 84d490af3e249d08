//! The namespaces of the nodes and of the clients, and the wires between them.

use std::process::Command;
use std::thread::available_parallelism;

use affinity_user::objects::LIMITS;
use anyhow::{Context, Result};
use aya::Ebpf;
use aya::programs::{SchedClassifier, TcAttachType, Xdp, XdpMode, tc};

use super::netns::{self, Namespace};
use super::{UNDERLAY_WIRE, WIRE, address};

/// A namespace that forwards.
pub(super) fn node_namespace(name: String) -> Result<Namespace> {
    let node = Namespace::create(name)?;
    node.sysctl(&[
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/default/forwarding", "1"),
        ("ipv6/conf/default/accept_dad", "0"),
    ])?;
    node.ip("link set lo up")?;
    Ok(node)
}

/// Two network cards, each by its name in the namespace of this process.
type Cards<'a> = [&'a String; 2];

/// Connects two namespaces: with a pair of veth devices, or with cards that are connected outside.
fn lay_wire(ends: [(&Namespace, &str); 2], cards: Option<Cards<'_>>) -> Result<()> {
    let Some(cards) = cards else {
        let [(here, name), (there, peer)] = ends;
        here.ip(&format!("link add {name} type veth peer name {peer} netns {}\n", there.name()))?;
        // So that packets are as on a real wire.
        return ethtool(there, peer, &["tx", "off", "gro", "on"]);
    };
    for ((namespace, name), card) in ends.into_iter().zip(cards) {
        let mut ip = Command::new("ip");
        // Its state before another lab used it.
        ip.args(["link", "set", card, "down", "mtu", "1500", "netns", namespace.name(), "name", name]);
        netns::run(&mut ip)?;
    }
    Ok(())
}

/// The clients' namespace, and the wire between it and the node.
pub(super) fn client_namespace(name: String, node: &Namespace, cards: Option<Cards<'_>>) -> Result<Namespace> {
    let client = Namespace::create(name)?;
    client.sysctl(&[("ipv6/conf/default/accept_dad", "0")])?;
    lay_wire([(node, WIRE), (&client, "eth0")], cards)?;
    let mut on_node = String::new();
    let mut on_client = "link set lo up\n".to_owned();
    for (index, length) in [24, 64].into_iter().enumerate() {
        let (router, next_hop) = (address::NODE[index], address::WIRE_CLIENT[index]);
        on_node += &format!("addr add {router}/{length} dev {WIRE}\n");
        on_client += &format!("addr add {next_hop}/{length} dev eth0\n");
    }
    on_node += &format!("link set {WIRE} up\n");
    on_client += "link set eth0 up\n";
    for (index, clients) in address::CLIENTS.into_iter().enumerate() {
        let (router, next_hop) = (address::NODE[index], address::WIRE_CLIENT[index]);
        on_node += &format!("route add {clients} via {next_hop}\n");
        // Every address of the prefix is local, without being configured.
        on_client += &format!("route add local {clients} dev lo\n");
        let services = address::SERVICES.map(|prefixes| prefixes[index]);
        for behind in [address::PODS[index]].into_iter().chain(services) {
            on_client += &format!("route add {behind} via {router}\n");
        }
    }
    node.ip(&on_node)?;
    client.ip(&on_client)?;
    Ok(client)
}

/// Attaches an XDP program that passes everything to a device, until the result is dropped.
///
/// # Errors
/// When the kernel refuses.
pub fn pass_by_xdp(namespace: &Namespace, device: &str) -> Result<Ebpf> {
    namespace.run(|| {
        let mut limits = Ebpf::load(LIMITS)?;
        let pass: &mut Xdp = limits.program_mut("xdp_pass").context("program xdp_pass")?.try_into()?;
        pass.load()?;
        pass.attach(device, XdpMode::Driver)?;
        Ok(limits)
    })?
}

/// Makes a device send each frame with two VLAN tags, until the result is dropped.
///
/// # Errors
/// When the kernel refuses.
pub fn tag_twice(namespace: &Namespace, device: &str) -> Result<Ebpf> {
    namespace.run(|| {
        let mut limits = Ebpf::load(LIMITS)?;
        let tag: &mut SchedClassifier =
            limits.program_mut("tc_tag_twice").context("program tc_tag_twice")?.try_into()?;
        tag.load()?;
        // Without tcx (before Linux 6.6) the program needs this queueing discipline.
        tc::qdisc_add_clsact(device)?;
        tag.attach(device, TcAttachType::Egress)?;
        Ok(limits)
    })?
}

/// Distributes received packets of a device over the processors by flow (`Documentation/networking/scaling.rst`, RPS).
pub(super) fn steer(namespace: &Namespace, device: &str) -> Result<()> {
    // One word of the mask has 32 processors, and that is enough.
    let processors = available_parallelism()?.get().min(32);
    let mask = u32::MAX >> (32 - processors);
    // `ip` mounts the namespace's own /sys.
    let write = format!("echo {mask:x} > /sys/class/net/{device}/queues/rx-0/rps_cpus");
    netns::run(Command::new("ip").args(["netns", "exec", namespace.name(), "sh", "-c", &write]))
}

/// Whether this kernel attaches TC programs by tcx links (Linux 6.6). The agent detects it in another way:
/// <https://elixir.bootlin.com/linux/v6.6/source/kernel/bpf/tcx.c>
///
/// # Errors
/// When the kernel's symbols cannot be read.
pub fn has_tcx() -> Result<bool> {
    let symbols = std::fs::read_to_string("/proc/kallsyms").context("/proc/kallsyms")?;
    Ok(symbols.lines().any(|line| line.split(' ').nth(2) == Some("tcx_link_attach")))
}

/// The names of the TC hooks that this kernel has: ingress, then egress.
///
/// # Errors
/// As [`has_tcx`].
pub fn tc_hooks() -> Result<[&'static str; 2]> {
    Ok(if has_tcx()? { ["tcx-ingress", "tcx-egress"] } else { ["clsact-ingress", "clsact-egress"] })
}

/// Switches offloads of a device.
///
/// # Errors
/// The error of `ethtool`.
pub fn ethtool(namespace: &Namespace, device: &str, switches: &[&str]) -> Result<()> {
    netns::run(namespace.command("ethtool").args(["-K", device]).args(switches))
}

/// The wire between the nodes, and the routes over it. Node A's default route leads to the clients, so that the rules of a
/// packet filter see packets for addresses that no host has.
pub(super) fn join(node_a: &Namespace, node_b: &Namespace, client: &Namespace, cards: Option<Cards<'_>>) -> Result<()> {
    lay_wire([(node_a, UNDERLAY_WIRE), (node_b, UNDERLAY_WIRE)], cards)?;
    let [mut on_a, mut on_b, mut on_client] = [const { String::new() }; 3];
    for (index, length) in [24, 64].into_iter().enumerate() {
        on_a += &format!("addr add {}/{length} dev {UNDERLAY_WIRE}\n", address::UNDERLAY_A[index]);
        on_b += &format!("addr add {}/{length} dev {UNDERLAY_WIRE}\n", address::UNDERLAY_B[index]);
    }
    on_a += &format!("link set {UNDERLAY_WIRE} up\n");
    on_b += &format!("link set {UNDERLAY_WIRE} up\n");
    for index in 0..2 {
        on_a += &format!("route add {} via {}\n", address::PODS_B[index], address::UNDERLAY_B[index]);
        on_a += &format!("route add default via {}\n", address::WIRE_CLIENT[index]);
        on_b += &format!("route add default via {}\n", address::UNDERLAY_A[index]);
        on_client += &format!("route add {} via {}\n", address::UNDERLAY[index], address::NODE[index]);
    }
    node_a.ip(&on_a)?;
    node_b.ip(&on_b)?;
    client.ip(&on_client)?;
    // One client may be rejected more often than the kernel would send errors, and so may all clients together. On old kernels
    // that is a setting of the machine, which is not changed.
    let _ = node_a.sysctl(&[("ipv4/icmp_msgs_per_sec", "1000000"), ("ipv4/icmp_msgs_burst", "1000000")]);
    node_a.sysctl(&[("ipv4/icmp_ratelimit", "0"), ("ipv6/icmp/ratelimit", "0")])
}
