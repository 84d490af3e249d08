//! Connections that leave with the node's address: as many to one port of a pod as the node has ports, and one more.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use affinity_common::{
    abi::{Frontend, MASQUERADE, Node, Port, Reason, V4, V6},
    pipeline::Verdict,
};
use affinity_tests::{
    kernel::{Hook, Kernel},
    lab::Family,
    packet::{
        Frame,
        tcp_flags::{ACK, RST, SYN},
    },
};
use affinity_user::load::Sizes;
use anyhow::{Context, Result, ensure};

use crate::site::{SIZES, destination, service, site};

/// How many ports the node has for masquerading.
const PORTS: u16 = 65_000;
const FIRST_PORT: u16 = 512;
const NODE_V4: V4 = V4([192, 0, 2, 1]);
const NODE_V6: V6 = V6([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
/// The pod's port.
const TARGET: u16 = 8080;

#[test]
fn sixty_five_thousand_connections_get_the_nodes_address_and_one_more_is_refused() -> Result<()> {
    let mut kernel = site(Sizes { flows: 1 << 19, ..SIZES }, masqueraded_to_one_pod)?;
    let node = Node { address_v4: NODE_V4, address_v6: NODE_V6, port_first: Port::new(FIRST_PORT), port_count: PORTS };
    kernel.store.node.put(&0, &node)?;
    for (family, hook) in [(Family::V4, Hook::XdpForward), (Family::V6, Hook::TcForward)] {
        kernel.put_counters_aside()?;
        let first = open_all(&kernel, hook, family, 1)?;
        ensure!(first.len() == usize::from(PORTS), "{} sources", first.len());
        ensure!(kernel.state()?.count(Reason::PortsExhausted) == 0);

        // One more: rejected at once and counted, and the existing ones continue.
        let surplus = Frame::tcp(client(family, 2, 1), service(family), SYN).build();
        let refused = kernel.run(hook, &surplus)?;
        ensure!(refused.verdict == Verdict::Answer, "{:?}", refused.verdict);
        ensure!(destination(&refused.frame)? == family.client(2), "the client is told");
        ensure!(kernel.state()?.count(Reason::PortsExhausted) == 1, "{:?}", kernel.state()?.counters);
        for number in (1..=PORTS).step_by(1_000) {
            let from = client(family, 1, number);
            let (pod, source) = send(&kernel, hook, from, family, ACK)?;
            ensure!(first.contains(&source));
            let back = Frame::tcp(pod, source, ACK).build();
            let returned = kernel.run(hook, &back)?;
            ensure!(returned.verdict == Verdict::Forward, "{back:?}: {:?}", returned.verdict);
            ensure!(ends(&returned.frame)?.1 == from, "the reply is not {from}'s");
        }

        // Closed: each port can be used again.
        for number in 1..=PORTS {
            send(&kernel, hook, client(family, 1, number), family, RST)?;
        }
        let again = open_all(&kernel, hook, family, 3)?;
        ensure!(again == first, "{} sources", again.len());
        let count = kernel.state()?.count(Reason::PortsExhausted);
        println!("{family}: {} connections, then {count} refused, then {} again", first.len(), again.len());
        ensure!(count == 1, "{count} refused");
    }
    Ok(())
}

/// One pod, and the node's address for all clients.
fn masqueraded_to_one_pod(frontend: &mut Frontend) {
    frontend.slot_count = 1;
    frontend.flags |= MASQUERADE;
}

fn client(family: Family, number: u32, port: u16) -> SocketAddr {
    SocketAddr::new(family.client(number), port)
}

/// Opens a connection from each port of a client: returns the sources that the pod sees.
fn open_all(kernel: &Kernel, hook: Hook, family: Family, number: u32) -> Result<BTreeSet<SocketAddr>> {
    (1..=PORTS)
        .map(|port| {
            let from = client(family, number, port);
            let (_, source) = send(kernel, hook, from, family, SYN).with_context(|| from.to_string())?;
            ensure!(
                [IpAddr::from(NODE_V4.0), IpAddr::from(NODE_V6.0)].contains(&source.ip()),
                "{from} comes as {source}"
            );
            Ok(source)
        })
        .collect()
}

/// Sends a segment to the service, until it leaves towards the pod: returns the pod, and the source that it sees.
fn send(kernel: &Kernel, hook: Hook, from: SocketAddr, family: Family, flags: u8) -> Result<(SocketAddr, SocketAddr)> {
    let entered = kernel.run(hook, &Frame::tcp(from, service(family), flags).build())?;
    ensure!(entered.verdict == Verdict::Forward, "it enters: {:?}", entered.verdict);
    let (source, pod) = ends(&entered.frame)?;
    ensure!(source == from && pod.port() == TARGET, "the node's stack sees {source} to {pod}");
    let left = kernel.run(Hook::TcReverse, &entered.frame)?;
    ensure!(left.verdict == Verdict::Forward, "it leaves: {:?}", left.verdict);
    let (source, to) = ends(&left.frame)?;
    ensure!(to == pod, "{to} is not {pod}");
    Ok((pod, source))
}

/// Source and destination of a TCP frame without IP options.
fn ends(frame: &[u8]) -> Result<(SocketAddr, SocketAddr)> {
    let is_v4 = frame.get(12..14) == Some(&[0x08, 0x00]);
    let (source, to, ports) = if is_v4 { (26..30, 30..34, 34) } else { (22..38, 38..54, 54) };
    let address = |range| -> Result<IpAddr> {
        let bytes: &[u8] = frame.get(range).context("a frame that ends early")?;
        Ok(match <[u8; 4]>::try_from(bytes) {
            Ok(v4) => IpAddr::from(v4),
            Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes)?),
        })
    };
    let port = |at: usize| -> Result<u16> {
        Ok(u16::from_be_bytes(frame.get(at..at + 2).context("a frame that ends early")?.try_into()?))
    };
    Ok((SocketAddr::new(address(source)?, port(ports)?), SocketAddr::new(address(to)?, port(ports + 2)?)))
}
