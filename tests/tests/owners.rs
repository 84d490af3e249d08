//! Foreign connections are not changed, with real sockets: connections of the node from a port that is a node port, and direct
//! connections to a pod from a port that also has a connection to the service. Scenarios of held connections also run with
//! kube-proxy's rules.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use affinity_tests::in_every_way;
use affinity_tests::lab::{Client, Connection, Family, Frontend, Lab, Namespace, Protocol, Service, eventually};
use affinity_tests::proxy::Proxy;
use affinity_tests::story::Hook;
use anyhow::{Context, Result, ensure};

const NODE_PORT: u16 = 30_080;
/// The port of an external server.
const OUTSIDE: u16 = 8080;

fn web() -> Service {
    Service::new("web", 1).tcp("http", 80, 8080).udp("dns", 53, 5353).node_ports(NODE_PORT).on([0])
}

/// Every family and protocol.
fn routes() -> impl Iterator<Item = (Family, Protocol)> {
    Family::BOTH.into_iter().flat_map(|family| Protocol::BOTH.map(|protocol| (family, protocol)))
}

/// The address of the pod of [`web`].
fn pod(family: Family, protocol: Protocol) -> SocketAddr {
    SocketAddr::new(family.pod(0), if protocol == Protocol::Tcp { 8080 } else { 5353 })
}

in_every_way!(one_port_to_a_service_and_straight_to_its_pod, the_nodes_own_connections_from_a_node_port);

/// Whichever comes first, both continue.
fn one_port_to_a_service_and_straight_to_its_pod(proxy: Proxy) -> Result<()> {
    let web = web();
    let scene = proxy.start(std::slice::from_ref(&web))?;
    let client = scene.lab().client();
    let mut port = 41_000;
    for (family, protocol) in routes() {
        let service = web.address(Frontend::ClusterIp, family, protocol).context("a cluster IP")?;
        for order in [[service, pod(family, protocol)], [pod(family, protocol), service]] {
            port += 1;
            let from = SocketAddr::new(family.client(1), port);
            let way = |step| format!("{proxy:?} {family:?} {protocol}, {order:?} from port {port}: {step}");
            let mut first = client.connect_by(protocol, from, order[0]).with_context(|| way("the first"))?;
            first.ask("/").with_context(|| way("the first"))?;
            let mut second = client.connect_by(protocol, from, order[1]).with_context(|| way("the second"))?;
            for _ in 0..3 {
                for (connection, step) in [(&mut second, "the second goes on"), (&mut first, "the first goes on")] {
                    let name = connection.ask("/").with_context(|| way(step))?;
                    ensure!(name == scene.lab().pod(0).name(), "{}: {name}", way(step));
                }
            }
        }
    }
    Ok(())
}

/// The replies to them are not packets of a client.
fn the_nodes_own_connections_from_a_node_port(proxy: Proxy) -> Result<()> {
    let web = web();
    let scene = proxy.start(std::slice::from_ref(&web))?;
    let lab = scene.lab();
    for (family, protocol) in routes() {
        let outside = SocketAddr::new(family.client(77), OUTSIDE);
        serve_outside(scene.lab(), protocol, outside)?;
        let node_port = web.address(Frontend::NodePort, family, protocol).context("a node port")?;
        let [node, _] = family.node_addresses();
        let own = SocketAddr::new(node, node_port.port());
        let mut connection = lab.node_client().connect_by(protocol, own, outside)?;
        for round in 0..5 {
            let said =
                connection.ask("/").with_context(|| format!("{proxy:?} {family:?} {protocol}, round {round}"))?;
            ensure!(said == "outside", "{said}");
            let served = lab.client().ask(protocol, family.client(1), node_port)?;
            ensure!(served == lab.pod(0).name(), "the node port serves on: {served}");
        }
    }
    ensure!(lab.count("not-ours")? > 0, "they came to a node port");
    Ok(())
}

/// A server in the clients' namespace that answers each request with its name.
fn serve_outside(lab: &Lab, protocol: Protocol, at: SocketAddr) -> Result<()> {
    // Threads of the test's process: they end with it.
    let namespace = lab.client_namespace();
    match protocol {
        Protocol::Tcp => {
            let listener = namespace.run(|| listener(at))??;
            thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    thread::spawn(move || {
                        let mut request = [0; 1024];
                        while stream.read(&mut request).is_ok_and(|length| length > 0) {
                            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\noutside\n";
                            if stream.write_all(answer).is_err() {
                                break;
                            }
                        }
                    });
                }
            });
        }
        Protocol::Udp => {
            let socket = namespace.run(|| datagrams(at))??;
            thread::spawn(move || {
                let mut request = [0; 1024];
                while let Ok((_, from)) = socket.recv_from(&mut request) {
                    // The client may be gone.
                    let _ = socket.send_to(b"outside\n", from);
                }
            });
        }
    }
    Ok(())
}

const HELD: u32 = 200;
const REQUESTS: u32 = 3_000;

/// Direct connections to the pod are held while as many requests go through the service, from ports that the system assigns to
/// both: none is lost.
fn direct_connections_are_held(proxy: Proxy) -> Result<()> {
    let web = web();
    let scene = proxy.start(std::slice::from_ref(&web))?;
    let client = scene.lab().client();
    let (family, protocol) = (Family::V4, Protocol::Tcp);
    let to = web.address(Frontend::ClusterIp, family, protocol).context("a cluster IP")?;
    // Few ports, so that both use many of the same ones.
    scene
        .lab()
        .client_namespace()
        .command("sysctl")
        .args(["-qw", "net.ipv4.ip_local_port_range=40000 40999"])
        .status()?;
    let mut held = hold(&client, family.client(1), pod(family, protocol))?;
    for request in 0..REQUESTS {
        let name = client.ask(protocol, family.client(1), to);
        ensure!(name.is_ok(), "{proxy:?}: request {request} by the service: {name:?}");
    }
    go_on(&mut held).with_context(|| format!("{proxy:?}, straight to the pod"))
}

#[test]
fn direct_connections_are_held_beside_requests_by_tc() -> Result<()> {
    direct_connections_are_held(Proxy::Tc)
}

#[test]
fn direct_connections_are_held_beside_requests_by_xdp() -> Result<()> {
    direct_connections_are_held(Proxy::Xdp)
}

#[test]
fn direct_connections_are_held_beside_requests_by_kube_proxys_rules() -> Result<()> {
    direct_connections_are_held(Proxy::Iptables)
}

/// The node's own connections to the pod are held while node port requests are masqueraded to it.
fn connections_of_the_node_are_held(proxy: Proxy) -> Result<()> {
    let web = web();
    let scene = proxy.start(std::slice::from_ref(&web))?;
    let (client, node) = (scene.lab().client(), scene.lab().node_client());
    let (family, protocol) = (Family::V4, Protocol::Tcp);
    let to = web.address(Frontend::NodePort, family, protocol).context("a node port")?;
    let mut held = hold(&node, family.node_addresses()[0], pod(family, protocol))?;
    for request in 0..REQUESTS {
        let name = client.ask(protocol, family.client(request % 200), to);
        ensure!(name.is_ok(), "{proxy:?}: request {request} to the node port: {name:?}");
    }
    go_on(&mut held).with_context(|| format!("{proxy:?}, of the node"))
}

#[test]
fn connections_of_the_node_are_held_beside_masqueraded_ones_by_tc() -> Result<()> {
    connections_of_the_node_are_held(Proxy::Tc)
}

#[test]
fn connections_of_the_node_are_held_beside_masqueraded_ones_by_xdp() -> Result<()> {
    connections_of_the_node_are_held(Proxy::Xdp)
}

#[test]
fn connections_of_the_node_are_held_beside_masqueraded_ones_by_kube_proxys_rules() -> Result<()> {
    connections_of_the_node_are_held(Proxy::Iptables)
}

fn hold(client: &Client, from: std::net::IpAddr, to: SocketAddr) -> Result<Vec<Connection>> {
    let open = |_| {
        let mut connection = client.connect(Protocol::Tcp, from, to)?;
        connection.ask("/")?;
        Ok(connection)
    };
    (0..HELD).map(open).collect()
}

/// All of them still answer.
fn go_on(held: &mut [Connection]) -> Result<()> {
    let broken = held.iter_mut().filter_map(|connection| connection.ask("/").err()).count();
    ensure!(broken == 0, "{broken} of {} connections are broken", held.len());
    Ok(())
}

/// No device has client addresses.
fn listener(at: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = free_socket(at, rustix::net::SocketType::STREAM)?;
    rustix::net::listen(&socket, 16)?;
    Ok(socket.into())
}

fn datagrams(at: SocketAddr) -> std::io::Result<UdpSocket> {
    Ok(free_socket(at, rustix::net::SocketType::DGRAM)?.into())
}

fn free_socket(at: SocketAddr, kind: rustix::net::SocketType) -> std::io::Result<std::os::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, bind, socket_with, sockopt};
    let domain = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(domain, kind, SocketFlags::CLOEXEC, None)?;
    if at.is_ipv4() {
        sockopt::set_ip_freebind(&socket, true)?;
    } else {
        sockopt::set_ipv6_freebind(&socket, true)?;
    }
    bind(&socket, &at)?;
    Ok(socket)
}

const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED_PORTS: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// Ports that others have reserved: more text than a first, short read returns.
const RESERVED_BY_OTHERS: &str = "8080,9148,10000-10100,11000,12000,13000,14000,15000";

fn set(namespace: &Namespace, path: &str, value: &str) -> Result<()> {
    namespace.run(|| fs::write(path, value))?.with_context(|| path.to_owned())
}

/// In one read: the kernel returns the whole list only to the first one.
fn reserved(namespace: &Namespace) -> Result<String> {
    let mut text = vec![0; 1 << 16];
    let length = namespace.run(|| fs::File::open(RESERVED_PORTS)?.read(&mut text))??;
    Ok(String::from_utf8(text[..length].to_vec())?.trim().to_owned())
}

/// The source ports that Linux chooses for connections from here until it has no more.
fn chosen(namespace: &Namespace, to: SocketAddr) -> Result<Vec<u16>> {
    let connections = namespace.run(|| {
        let mut connections = Vec::new();
        loop {
            match TcpStream::connect(to) {
                Ok(connection) => connections.push(connection),
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => return Ok(connections),
                Err(error) => return Err(error),
            }
        }
    })??;
    let mut ports =
        connections.iter().map(|connection| Ok(connection.local_addr()?.port())).collect::<Result<Vec<_>>>()?;
    ports.sort_unstable();
    Ok(ports)
}

/// Linux assigns six ports to the node's own connections, and one of them is a node port.
#[test]
fn a_node_port_that_linux_gives_to_the_nodes_own_connections_is_said_and_reserved() -> Result<()> {
    let lab = Lab::with_pods(1)?;
    let with_node_port = |name, number, port| Service::new(name, number).tcp("http", 80, 8080).node_ports(port).on([0]);
    lab.publish(&with_node_port("web", 1, NODE_PORT))?;
    let node = lab.node();
    set(node, PORT_RANGE, "30080 30085")?;
    set(node, RESERVED_PORTS, RESERVED_BY_OTHERS)?;
    // A separate server for each time, so that no former connection interferes.
    let outside = |time| SocketAddr::new(Family::V4.client(77), OUTSIDE + time);
    for time in 0..2 {
        serve_outside(&lab, Protocol::Tcp, outside(time))?;
    }
    let agent = lab.agent(&Hook::Tc.args())?;
    let said = |line: &String| {
        ["node ports 30080 ", "30080-30085", "--reserve-ports", "ip_local_reserved_ports"]
            .iter()
            .all(|word| line.contains(word))
    };
    ensure!(agent.log().iter().filter(|line| said(line)).count() == 1, "{:?}", agent.log());
    ensure!(lab.affinity(&["check"])?.contains("node ports 30080"), "{}", lab.affinity(&["check"])?);
    assert_eq!(reserved(node)?, RESERVED_BY_OTHERS, "nobody has asked for that");
    assert_eq!(chosen(node, outside(0))?, [30_080, 30_081, 30_082, 30_083, 30_084, 30_085]);
    agent.terminate()?;

    let args = [Hook::Tc.args().as_slice(), &["--reserve-ports"]].concat();
    for reserves in [true, false] {
        let agent = lab.agent(&args)?;
        let has_reserved = agent.log().iter().any(|line| line.contains("reserved") && line.contains("30080"));
        assert_eq!(has_reserved, reserves, "{:?}", agent.log());
        ensure!(!agent.log().iter().any(said), "{:?}", agent.log());
        assert_eq!(reserved(node)?, format!("{RESERVED_BY_OTHERS},30080"));
        agent.terminate()?;
    }
    assert_eq!(chosen(node, outside(1))?, [30_081, 30_082, 30_083, 30_084, 30_085]);
    ensure!(!lab.affinity(&["check"])?.contains("node ports 30080"), "{}", lab.affinity(&["check"])?);

    let agent = lab.agent(&args)?;
    let patience = Duration::from_secs(20);
    lab.publish(&with_node_port("shop", 2, 30_082))?;
    eventually("a node port that is new is reserved", patience, || {
        Ok(reserved(node)? == format!("{RESERVED_BY_OTHERS},30080,30082"))
    })?;
    // As `sysctl --system` does, which knows only the settings in files.
    set(node, RESERVED_PORTS, "8080")?;
    eventually("what somebody took away is reserved again", patience, || Ok(reserved(node)? == "8080,30080,30082"))?;
    // Not one more: then the node would have less than half of its ports.
    lab.publish(&Service::new("more", 3).tcp("http", 80, 8080).udp("dns", 53, 5353).node_ports(30_083).on([0]))?;
    eventually("it is said why they are not reserved", patience, || {
        Ok(agent.log().iter().any(|line| line.contains("30083-30084") && line.contains("half")))
    })?;
    agent.terminate()?;
    lab.affinity(&["detach"])?;
    ensure!(reserved(node)?.contains("30080"), "they stay reserved");
    Ok(())
}

/// As in a container without privileges: `attach` does everything else, and prints what is left to do on the node.
#[test]
fn ports_that_cannot_be_reserved_are_said_with_the_command_that_does() -> Result<()> {
    const OPTIONS: [&str; 6] = ["attach", "--reserve-ports", "--masquerade-ports", "30085-30099", "--socket", "off"];
    const READ_ONLY: &str = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec \"$@\"";
    let lab = Lab::with_pods(1)?;
    lab.publish(&web())?;
    set(lab.node(), PORT_RANGE, "30080 30085")?;
    let mut attach = lab.affinity_command()?;
    attach.args(OPTIONS).arg("--source").arg(lab.source()).args(Hook::Tc.args());
    let mut confined = Command::new("unshare");
    confined.args(["--mount", "--", "sh", "-c", READ_ONLY, "sh"]).arg(attach.get_program()).args(attach.get_args());
    let output = confined.output()?;
    let said = String::from_utf8(output.stderr)?;
    let found = "node ports 30080-30081 and masquerade ports 30085 are in";
    let advice = "sysctl -w net.ipv4.ip_local_reserved_ports=30080-30081,30085";
    ensure!(output.status.success() && said.contains("the agent cannot reserve them"), "{said}");
    for said in [said, lab.affinity(&["check"])?] {
        ensure!(said.contains(found) && said.contains(advice), "{said}");
    }
    assert_eq!(reserved(lab.node())?, "");

    let output = attach.output()?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.success() && !said.contains("WARN"), "{said}");
    assert_eq!(reserved(lab.node())?, "30080-30081,30085");
    let said = lab.affinity(&["check"])?;
    ensure!(said.contains("affinity uses no port that Linux assigns"), "{said}");
    Ok(())
}
