//! Connections that leave with the node's address, with real sockets: the node has only a limited number of ports, and XDP, and
//! TC if it redirects, bypass its stack.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use affinity_tests::in_every_way;
use affinity_tests::lab::{
    Connection, FIRST_OF_B, Family, Frontend, Lab, Options, Policy, Protocol, Service, WIRE, eventually,
};
use affinity_tests::patience::patience;
use affinity_tests::proxy::{Proxy, drop_invalid};
use affinity_tests::story::tell_in;
use affinity_user::attach::xdp_features;
use anyhow::{Context, Result, ensure};

/// As many as `ARGS` grants.
const PORTS: u32 = 16;
const ARGS: [&str; 7] = ["--device", "wire0", "pod*", "--xdp", "off", "--masquerade-ports", "20000-20015"];
/// "At once", for what must not wait for a time-out.
const AT_ONCE: Duration = Duration::from_millis(900);
/// How long a port may take to be free again after its connection has been closed.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

#[test]
fn a_connection_beyond_the_nodes_ports_is_refused_and_a_closed_one_makes_room() -> Result<()> {
    let web = Service::new("web", 10).tcp("http", 80, 8080).node_ports(30_080).on([0]);
    tell_in(&Options { pods: 1, ..Options::default() }, &ARGS, &[&web], |lab, _| {
        for family in Family::BOTH {
            let to = web.address(Frontend::NodePort, family, Protocol::Tcp).context("a node port")?;
            let dial = |number: u32| lab.client().connect(Protocol::Tcp, family.client(number), to);
            let mut open: Vec<Connection> = (0..PORTS).map(dial).collect::<Result<_, _>>()?;
            for connection in &mut open {
                let seen: IpAddr = connection.ask("/client")?.parse()?;
                ensure!(family.node_addresses().contains(&seen), "the pod sees {seen}");
            }
            let (before, began) = (lab.count("ports-exhausted")?, Instant::now());
            let kind = dial(PORTS).map(drop).map_err(|error| error.kind());
            ensure!(kind == Err(ErrorKind::ConnectionRefused) && began.elapsed() < patience(AT_ONCE), "{kind:?}");
            ensure!(lab.count("ports-exhausted")? > before, "it is counted");
            for connection in &mut open {
                connection.ask("/").context("those that are there go on")?;
            }
            drop(open.pop());
            eventually("the closed connection's port serves another", CLOSE_PATIENCE, || Ok(dial(PORTS).is_ok()))?;
        }
        Ok(())
    })
}

/// Packets that node A's stack has forwarded, of each family.
fn forwarded(lab: &Lab) -> Result<[u64; 2]> {
    lab.node().run(|| {
        let snmp = fs::read_to_string("/proc/thread-self/net/snmp")?;
        let [names, numbers] = [0, 1].map(|line| snmp.lines().filter(|text| text.starts_with("Ip:")).nth(line));
        let (names, numbers) = (names.context("Ip")?.split(' '), numbers.context("Ip")?.split(' '));
        let v4 = names.zip(numbers).find(|(name, _)| *name == "ForwDatagrams").context("ForwDatagrams")?.1;
        let snmp6 = fs::read_to_string("/proc/thread-self/net/snmp6")?;
        let v6 = snmp6.lines().find_map(|line| line.strip_prefix("Ip6OutForwDatagrams")).context("snmp6")?;
        Ok([v4.parse()?, v6.trim().parse()?])
    })?
}

/// Runs requests over a frontend: returns how many packets were redirected, and how many the stack has forwarded.
fn redirected_and_forwarded(lab: &Lab, family: Family, requests: impl FnOnce() -> Result<()>) -> Result<(u64, u64)> {
    let (sent_before, stack_before) = (lab.count("redirected")?, forwarded(lab)?[family as usize]);
    requests()?;
    Ok((lab.count("redirected")? - sent_before, forwarded(lab)?[family as usize] - stack_before))
}

/// Whether XDP redirects at all: only if the kernel tells which devices can send frames that came in by others (Linux 6.3).
fn xdp_redirects() -> bool {
    xdp_features().is_ok()
}

/// Whether at least so many packets were redirected, and none went through the stack; if the programs do not redirect: the
/// opposite.
fn is_past_the_stack((sent, by_stack): (u64, u64), redirects: bool, least: u64) -> bool {
    if redirects { sent >= least && by_stack == 0 } else { sent == 0 && by_stack > 0 }
}

/// Connections of an external client to node ports of this pod. The pod sees the node under the policy Cluster, and the client
/// under Local.
fn go_past_the_stack(proxy: Proxy, pod: usize, policies: &[Policy]) -> Result<()> {
    const REQUESTS: u32 = 20;
    let service = |number, policy| {
        let web = Service::new(&format!("web-{number}"), number).tcp("http", 80, 8080).udp("dns", 53, 5353);
        web.node_ports(30_080 + 2 * number).external(policy).on([pod])
    };
    let services = [service(1, Policy::Cluster), service(2, Policy::Local)];
    let scene = proxy.start(&services)?;
    let lab = scene.lab();
    for (family, protocol) in Family::BOTH.into_iter().flat_map(|family| Protocol::BOTH.map(|of| (family, of))) {
        for policy in policies {
            let service = &services[usize::from(*policy == Policy::Local)];
            let to = service.address(Frontend::NodePort, family, protocol).context("a node port")?;
            let request = |number| -> Result<()> {
                let from = family.client(number);
                let seen: IpAddr = lab.client().connect(protocol, from, to)?.ask_last("/client")?.parse()?;
                let sees_node = *policy == Policy::Cluster;
                let is_right = if sees_node { family.node_addresses().contains(&seen) } else { seen == from };
                ensure!(is_right, "under {policy:?} the pod sees {seen}");
                Ok(())
            };
            // The stack resolves the neighbours' link addresses.
            request(0)?;
            let (sent, by_stack) = redirected_and_forwarded(lab, family, || (0..REQUESTS).try_for_each(request))?;
            let least = if protocol == Protocol::Tcp { 8 } else { 2 };
            let way = format!("{family:?} {protocol} under {policy:?}");
            let redirects = proxy != Proxy::Xdp || xdp_redirects();
            let is_as_expected = is_past_the_stack((sent, by_stack), redirects, u64::from(REQUESTS) * least);
            ensure!(is_as_expected, "{way}: {sent} were redirected, the stack has forwarded {by_stack}");
        }
    }
    Ok(())
}

#[test]
fn xdp_sends_to_another_node_and_back_past_the_stack() -> Result<()> {
    go_past_the_stack(Proxy::Xdp, FIRST_OF_B, &[Policy::Cluster])
}

#[test]
fn tc_redirects_to_another_node_and_back_past_the_stack() -> Result<()> {
    go_past_the_stack(Proxy::TcRedirect, FIRST_OF_B, &[Policy::Cluster])
}

#[test]
fn tc_redirects_to_a_pod_of_the_node_and_back_past_the_stack() -> Result<()> {
    go_past_the_stack(Proxy::TcRedirect, 0, &[Policy::Cluster, Policy::Local])
}

#[test]
fn tc_redirects_what_xdp_has_translated() -> Result<()> {
    go_past_the_stack(Proxy::XdpRedirect, 0, &[Policy::Cluster, Policy::Local])
}

/// A service with a pod of this node, and one with a pod of the other.
fn on_either_node() -> [Service; 2] {
    [(1, 0), (2, FIRST_OF_B)].map(|(number, pod)| {
        Service::new(&format!("web-{number}"), number).tcp("http", 80, 8080).node_ports(30_080 + number).on([pod])
    })
}

in_every_way!(no_neighbour_needs_to_be_known);

/// A packet filter that drops packets that conntrack marks as INVALID drops no reply to a client, even if the node knows the
/// pod's link address but not the client's.
fn no_neighbour_needs_to_be_known(proxy: Proxy) -> Result<()> {
    let services = on_either_node();
    let scene = proxy.start(&services)?;
    let lab = scene.lab();
    for family in Family::BOTH {
        for (service, frontend) in
            services.iter().flat_map(|of| [Frontend::ClusterIp, Frontend::NodePort].map(|frontend| (of, frontend)))
        {
            let to = service.address(frontend, family, Protocol::Tcp).context("it has every frontend")?;
            for number in 0..5 {
                let status = lab.node().command("ip").args(["neigh", "flush", "dev", WIRE]).status()?;
                ensure!(status.success(), "{status}");
                let began = Instant::now();
                lab.client().http_get(family.client(number), to, "/")?;
                ensure!(began.elapsed() < patience(AT_ONCE), "{to}: {:?} to find neighbours", began.elapsed());
            }
        }
    }
    Ok(())
}

/// Packets on a pod's port of the bridge are routed from the bridge: neither direction is redirected.
#[test]
fn pods_on_a_bridge_go_through_the_stack() -> Result<()> {
    let lab = Lab::with_pods(2)?;
    drop_invalid(&lab)?;
    let mut script = "link add br0 address 02:00:00:00:00:01 type bridge\nlink set br0 up\n\
                      addr add 169.254.1.1/32 dev br0 scope link\n"
        .to_owned();
    for pod in 0..2 {
        let (device, address) = (lab.pod(pod).device(), Family::V4.pod(pod));
        script += &format!("link set {device} master br0\naddr del 169.254.1.1/32 dev {device}\n");
        script += &format!("route replace {address} dev br0\n");
    }
    lab.node().ip(&script)?;
    let services =
        [0, 1].map(|pod| Service::new(&format!("web-{pod}"), pod + 1).tcp("http", 80, 8080).on([pod.into()]));
    services.iter().try_for_each(|service| lab.publish(service))?;
    let devices = ["--device", WIRE, "br0", "pod*"];
    let _agent = lab.agent(&[devices.as_slice(), &Proxy::TcRedirect.hooks()].concat())?;
    for (service, other) in services.iter().zip([1, 0]) {
        let to = service.frontend(Family::V4, "http");
        for _ in 0..3 {
            lab.pod_client(other).http_get(Family::V4.pod(other), to, "/")?;
            lab.client().http_get(Family::V4.client(1), to, "/")?;
        }
    }
    ensure!(lab.count("redirected")? == 0, "half of a connection would be seen by the stack");
    let devices = lab.affinity(&["dump", "devices"])?;
    ensure!(
        devices == "devices br0 -> upper\ndevices pod0 -> -\ndevices pod1 -> -\ndevices wire0 -> tc\n",
        "{devices}"
    );
    Ok(())
}

/// Connections that began in the stack continue past it, and vice versa. Those that have been in the stack and then past it do
/// not come back: conntrack has missed what was acknowledged meanwhile.
#[test]
fn connections_outlive_a_change_of_their_way() -> Result<()> {
    let services = on_either_node();
    let mut scene = Proxy::Tc.start(&services)?;
    for ways in [[Proxy::TcRedirect, Proxy::XdpRedirect].as_slice(), &[Proxy::Tc]] {
        let mut lines = Vec::new();
        for (family, service) in Family::BOTH.into_iter().flat_map(|family| services.iter().map(move |of| (family, of)))
        {
            let to = service.address(Frontend::NodePort, family, Protocol::Tcp).context("it has every frontend")?;
            let mut line = scene.lab().client().connect(Protocol::Tcp, family.client(1), to)?;
            line.ask("/")?;
            lines.push(line);
        }
        for way in ways {
            scene.go_on_as(*way)?;
            for line in &mut lines {
                line.ask("/").with_context(|| format!("{way:?}\n{}", scene.log()))?;
            }
        }
    }
    Ok(())
}

/// A server at an address of the clients' namespace, which sends each client its address.
fn echo_at(lab: &Lab, endpoint: &'static str) -> Result<()> {
    let listener = lab.client_namespace().run(|| TcpListener::bind((endpoint, 8080)))??;
    std::thread::spawn(move || {
        // It ends with the test's process.
        for mut stream in listener.incoming().flatten() {
            let Ok(peer) = stream.peer_addr() else { continue };
            let (body, mut request) = (peer.ip().to_string(), [0; 1024]);
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            // A client that has gone is not the server's concern.
            let _ = stream.read(&mut request).and_then(|_| stream.write_all(answer.as_bytes()));
        }
    });
    Ok(())
}

#[test]
fn xdp_sends_back_out_of_the_wire_that_a_frame_came_in_by() -> Result<()> {
    // An endpoint that is no pod: it is in the clients' namespace, and so are its replies.
    const ENDPOINT: &str = "198.18.9.9";
    let yaml = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: outside, namespace: default}}\n\
         spec: {{type: NodePort, clusterIP: 10.96.0.77, ports: [{{name: http, port: 80, nodePort: 30077}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: outside-1, namespace: default, \
         labels: {{kubernetes.io/service-name: outside}}}}\naddressType: IPv4\n\
         ports: [{{name: http, port: 8080}}]\nendpoints: [{{addresses: [{ENDPOINT}], conditions: {{ready: true}}}}]\n"
    );
    let lab = Lab::with_pods(0)?;
    lab.publish_text("outside.yaml", &yaml)?;
    echo_at(&lab, ENDPOINT)?;
    let _agent = lab.agent(&["--device", "wire0", "--xdp-device", "wire0"])?;
    let to = SocketAddr::new(Family::V4.node_addresses()[0], 30_077);
    let request = |number| -> Result<()> {
        let seen: IpAddr = lab.client().http_get(Family::V4.client(number), to, "/")?.parse()?;
        ensure!(Family::V4.node_addresses().contains(&seen), "the server sees {seen}");
        Ok(())
    };
    request(0)?;
    let (sent, by_stack) = redirected_and_forwarded(&lab, Family::V4, || (0..10).try_for_each(request))?;
    let is_as_expected = is_past_the_stack((sent, by_stack), xdp_redirects(), 80);
    ensure!(is_as_expected, "{sent} were redirected, the stack has forwarded {by_stack}");
    Ok(())
}
