//! Packets that do not fit, with real sockets on a cluster of two nodes: datagrams in fragments, and paths with an MTU that is
//! smaller than both ends assume. A sender of too long packets gets an ICMP error from a node on the way. It quotes a packet as
//! that node sees it, so the sender understands it only after it has been translated back.

use std::fs;

use affinity_tests::in_every_way;
use affinity_tests::lab::{
    FIRST_OF_B, Family, Frontend, Lab, Namespace, Options, PODS, Policy, Protocol, Service, UNDERLAY_WIRE, WIRE,
};
use affinity_tests::proxy::Proxy;
use affinity_tests::story::tell_in;
use anyhow::{Context, Result, ensure};

/// An endpoint on node A.
const A: usize = 0;
/// An endpoint on node B.
const B: usize = FIRST_OF_B;
/// A pod of node A that is no endpoint.
const BYSTANDER: usize = 1;
/// The minimum of IPv6. A sender that does not know it sends 1500.
const SMALL_MTU: &str = "1280";
const USUAL_MTU: &str = "1500";
/// More than two packets.
const LONG: usize = 4000;

/// One route to a service.
#[derive(Clone, Copy, Debug)]
struct Call {
    /// None: an external client.
    pod: Option<usize>,
    family: Family,
    frontend: Frontend,
    /// The pod that serves.
    to: usize,
    policy: Policy,
}

impl Call {
    /// External clients are masqueraded, except under the policy Local; pods keep their address at the cluster IP.
    fn all() -> Vec<Self> {
        let mut calls = Vec::new();
        for family in Family::BOTH {
            let call = |pod, frontend, to, policy| Self { pod, family, frontend, to, policy };
            for (frontend, to) in
                [Frontend::ClusterIp, Frontend::NodePort].into_iter().flat_map(|of| [(of, A), (of, B)])
            {
                calls.push(call(None, frontend, to, Policy::Cluster));
                calls.push(call(Some(BYSTANDER), frontend, to, Policy::Cluster));
            }
            calls.push(call(None, Frontend::NodePort, A, Policy::Local));
        }
        calls
    }

    fn service(&self) -> Service {
        service(self.to, self.policy)
    }

    /// Asks for this many bytes with a request that is at least this long.
    fn ask(&self, lab: &Lab, protocol: Protocol, request: usize, answer: usize) -> Result<()> {
        let to = self.service().address(self.frontend, self.family, protocol).context("it has every frontend")?;
        let (client, from) = match self.pod {
            None => (lab.client(), self.family.client(1)),
            Some(pod) => (lab.pod_client(pod), self.family.pod(pod)),
        };
        // A number with many leading zeros.
        let path = format!("/bytes/{}{answer}", "0".repeat(request));
        let mut connection = client.connect(protocol, from, to)?;
        let said = connection.ask(&path).with_context(|| format!("{self:?} {protocol}"))?;
        ensure!(said.len() == answer, "{self:?} {protocol}: {} of {answer} bytes", said.len());
        Ok(())
    }
}

/// A service on one pod.
fn service(pod: usize, policy: Policy) -> Service {
    let number = 1 + u16::from(pod == B) + 2 * u16::from(policy == Policy::Local);
    Service::new(&format!("web-{number}"), number)
        .tcp("http", 80, 8080)
        .udp("dns", 53, 5353)
        .node_ports(30_000 + 2 * number)
        .external(policy)
        .on([pod])
}

in_every_way!(what_does_not_fit_arrives);

fn what_does_not_fit_arrives(proxy: Proxy) -> Result<()> {
    let options = Options { pods: 2, pods_of_b: 1, ..Options::default() };
    let services = [service(A, Policy::Cluster), service(B, Policy::Cluster), service(A, Policy::Local)];
    let [pods_v4, pods_v6] = PODS;
    let args = ["--services", "all", "--pod-cidr", pods_v4, "--pod-cidr", pods_v6];
    let devices = ["--device", WIRE, UNDERLAY_WIRE, "pod*"];
    let args = [args.as_slice(), &devices, &proxy.hooks()].concat();
    tell_in(&options, &args, &services.each_ref(), |lab, _| {
        let calls = Call::all();
        datagrams_in_fragments_arrive(lab, &calls).context("fragments")?;
        a_small_path_to_a_pod_is_found_out(lab, &calls).context("a small path to a pod")?;
        a_small_path_to_a_client_is_found_out(lab, &calls).context("a small path to a client")?;
        a_small_path_beyond_the_other_node_is_found_out(lab, &calls).context("a small path beyond the other node")
    })
}

fn set_mtu(node: &Namespace, devices: &[&str], mtu: &str) -> Result<()> {
    devices.iter().try_for_each(|device| {
        let status = node.command("ip").args(["link", "set", device, "mtu", mtu]).status()?;
        ensure!(status.success(), "{device}: {status}");
        Ok(())
    })
}

/// Makes this end forget learned path MTUs: those of its own packets, and those of packets that it forwards.
fn forget_paths(end: &Namespace, family: Family) -> Result<()> {
    match family {
        Family::V4 => Ok(end.run(|| fs::write("/proc/sys/net/ipv4/route/flush", "1"))??),
        // The corresponding IPv6 setting only removes expired entries.
        Family::V6 => {
            let status = end.command("ip").args(["-6", "route", "flush", "cache"]).status()?;
            ensure!(status.success(), "{status}");
            Ok(())
        }
    }
}

/// How many packets a node has reported as too big for their route.
fn told(node: &Namespace, family: Family) -> Result<u64> {
    let read = |name: &str| node.run(|| fs::read_to_string(format!("/proc/thread-self/net/{name}")));
    let count = match family {
        Family::V4 => {
            let snmp = read("snmp")??;
            let lines: Vec<Vec<&str>> = snmp.lines().map(|line| line.split(' ').collect()).collect();
            let [names, values] = [0, 1].map(|nth| lines.iter().filter(|words| words[0] == "Icmp:").nth(nth));
            let (names, values) = names.zip(values).context("names and values")?;
            names
                .iter()
                .zip(values)
                .find_map(|(name, value)| (*name == "OutDestUnreachs").then_some(*value))
                .map(str::to_owned)
        }
        Family::V6 => {
            let snmp = read("snmp6")??;
            let line = snmp.lines().find(|line| line.starts_with("Icmp6OutPktTooBigs"));
            line.and_then(|line| line.split_whitespace().nth(1)).map(str::to_owned)
        }
    };
    Ok(count.context("the kernel counts it")?.parse()?)
}

/// Every call gets its answer, and each time this node reports that a packet is too big.
fn is_found_out<'a>(
    lab: &Lab,
    node: &Namespace,
    mut calls: impl Iterator<Item = &'a Call>,
    (request, answer): (usize, usize),
) -> Result<()> {
    calls.try_for_each(|call| {
        let caller = call.pod.map_or(Some(lab.client_namespace()), |pod| lab.pod(pod).namespace());
        for end in [caller, lab.pod(call.to).namespace()] {
            forget_paths(end.context("it lives")?, call.family)?;
        }
        let before = told(node, call.family)?;
        call.ask(lab, Protocol::Tcp, request, answer)?;
        ensure!(told(node, call.family)? > before, "{call:?}: nobody was told of the small path");
        Ok(())
    })
}

fn datagrams_in_fragments_arrive(lab: &Lab, calls: &[Call]) -> Result<()> {
    let before = lab.count("later-fragment")?;
    let sizes = [(LONG, 1), (0, LONG), (LONG, LONG)];
    for (call, (request, answer)) in calls.iter().flat_map(|call| sizes.map(|sizes| (call, sizes))) {
        call.ask(lab, Protocol::Udp, request, answer)?;
    }
    // Four long datagrams each, of two later fragments.
    let (followed, sent) = (lab.count("later-fragment")? - before, 4 * 2 * calls.len() as u64);
    ensure!(followed >= sent, "{followed} of {sent} fragments were followed");
    for (map, shown) in [
        ("fragments_v4", " > 10.96.0.2 id="),
        ("fragments_v6", " > fd00:96::2 id="),
        ("snat_port_cursor", "pod-10000 ->"),
    ] {
        let dump = lab.affinity(&["dump", map])?;
        ensure!(dump.contains(shown), "no {shown:?} in the dump of {map}: {dump}");
    }
    Ok(())
}

fn a_small_path_to_a_pod_is_found_out(lab: &Lab, calls: &[Call]) -> Result<()> {
    let devices = ["pod0", UNDERLAY_WIRE];
    set_mtu(lab.node(), &devices, SMALL_MTU)?;
    is_found_out(lab, lab.node(), calls.iter(), (LONG, 1))?;
    set_mtu(lab.node(), &devices, USUAL_MTU)
}

fn a_small_path_to_a_client_is_found_out(lab: &Lab, calls: &[Call]) -> Result<()> {
    let devices = [WIRE, "pod1"];
    set_mtu(lab.node(), &devices, SMALL_MTU)?;
    is_found_out(lab, lab.node(), calls.iter(), (0, LONG))?;
    set_mtu(lab.node(), &devices, USUAL_MTU)
}

/// Node B sends the error to the apparent sender: to node A, if that masquerades.
fn a_small_path_beyond_the_other_node_is_found_out(lab: &Lab, calls: &[Call]) -> Result<()> {
    let device = lab.pod(B).device();
    set_mtu(lab.node_b(), &[&device], SMALL_MTU)?;
    is_found_out(lab, lab.node_b(), calls.iter().filter(|call| call.to == B), (LONG, 1))?;
    set_mtu(lab.node_b(), &[&device], USUAL_MTU)
}
