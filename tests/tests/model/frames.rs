//! Random frames: of known connections, of new ones, of unrelated hosts; of every shape; then damaged or cut short.

use std::net::SocketAddr;

use affinity_common::headers::TCP;
use affinity_tests::{
    kernel::Hook,
    lab::Family,
    packet::{
        Extension, Frame,
        tcp_flags::{ACK, FIN, PSH, RST, SYN},
    },
};

use crate::world::World;
use affinity_tests::dice::Dice;

/// A frame, and its hook.
pub(crate) fn random(dice: &mut Dice, world: &World) -> (Hook, Vec<u8>) {
    let hook = dice.pick(&Hook::ALL);
    let (from, to, protocol) = if hook == Hook::TcReverse { reply(dice, world) } else { request(dice, world) };
    let mut bytes = shape(dice, from, to, protocol).build();
    if dice.percent(10) {
        let count = dice.below(20);
        bytes.extend(dice.bytes(count));
    }
    if dice.percent(20) {
        for _ in 0..=dice.below(3) {
            let at = dice.below(bytes.len().min(110));
            bytes[at] = if dice.percent(50) { bytes[at] ^ 1 << dice.below(8) } else { dice.byte() };
        }
    }
    if dice.percent(12) {
        bytes.truncate(dice.below(bytes.len() + 1));
    }
    (hook, bytes)
}

fn request(dice: &mut Dice, world: &World) -> (SocketAddr, SocketAddr, u8) {
    if dice.percent(12) {
        let pod = dice.pick(&world.pods);
        return (pod, World::node(family(pod), dice.below(6)), dice.pick(&[6, 17]));
    }
    if dice.percent(50) {
        let known = dice.pick(&world.connections);
        // Directly to the pod, from a port that a connection to the service may have.
        let to = if dice.percent(20) { known.pod } else { known.service };
        return (known.client, to, known.protocol);
    }
    let (service, protocol) = dice.pick(&world.frontends);
    let client = World::client(dice, family(service));
    let from = SocketAddr::new(client, 40_000 + dice.below(8) as u16);
    if dice.percent(94) { (from, service, protocol) } else { (from, stranger(dice, service), protocol) }
}

fn reply(dice: &mut Dice, world: &World) -> (SocketAddr, SocketAddr, u8) {
    if dice.percent(60) {
        let known = dice.pick(&world.connections);
        return (known.pod, known.client, known.protocol);
    }
    if dice.percent(20) {
        // Foreign connections: from a frontend's address and port, or from the node's.
        let known = dice.pick(&world.connections);
        let node = World::node(family(known.pod), dice.below(6));
        return dice.pick(&[(known.service, known.client, known.protocol), (node, known.pod, known.protocol)]);
    }
    if dice.percent(50) {
        let known = dice.pick(&world.connections);
        let pod = dice.pick(&world.pods);
        return if pod.is_ipv4() == known.client.is_ipv4() {
            (known.client, pod, known.protocol)
        } else {
            (known.client, known.pod, known.protocol)
        };
    }
    let pod = dice.pick(&world.pods);
    let to = SocketAddr::new(World::client(dice, family(pod)), 40_000 + dice.below(8) as u16);
    let from = if dice.percent(80) { pod } else { stranger(dice, pod) };
    (from, to, dice.pick(&[6, 17]))
}

/// Another port or another address.
fn stranger(dice: &mut Dice, mut of: SocketAddr) -> SocketAddr {
    if dice.percent(50) {
        of.set_port(dice.number() as u16);
    } else {
        of.set_ip(family(of).cluster_ip(dice.number() as u16));
    }
    of
}

fn shape(dice: &mut Dice, from: SocketAddr, to: SocketAddr, protocol: u8) -> Frame {
    let mut frame = match dice.below(100) {
        0..3 => Frame::icmp(from.ip(), to.ip(), dice.byte(), dice.byte(), [0; 4]),
        3..5 => Frame::other(from.ip(), to.ip(), dice.byte()),
        5..10 => return error(dice, from, to, protocol),
        _ if protocol == TCP => {
            let any = dice.byte();
            let flags = dice.pick(&[SYN, SYN, ACK, ACK | PSH, FIN | ACK, FIN | ACK, RST, RST | ACK, SYN | ACK, any]);
            Frame::tcp(from, to, flags).numbers(dice.number() as u32, dice.number() as u32)
        }
        _ => Frame::udp(from, to),
    };
    if dice.percent(10) {
        frame = frame.without_udp_checksum();
    }
    if dice.percent(20) {
        let count = dice.below(41);
        frame = frame.tcp_options(&dice.bytes(count));
    }
    if dice.percent(15) {
        let count = dice.below(41);
        frame = frame.ipv4_options(&dice.bytes(count));
    }
    if dice.percent(10) {
        frame = frame.ipv4_fragment(dice.pick(&[0, 0, 1, 185]), dice.percent(50));
    }
    if dice.percent(25) {
        for _ in 0..dice.below(8) {
            frame = frame.extension(extension(dice));
        }
    }
    for _ in 0..dice.pick(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3]) {
        frame = frame.vlan(dice.number() as u16);
    }
    let length = if dice.percent(5) { 1000 + dice.below(400) } else { dice.below(40) };
    frame.payload(&dice.bytes(length)).hop_limit(dice.byte())
}

/// An ICMP error about a packet in the opposite direction.
fn error(dice: &mut Dice, from: SocketAddr, to: SocketAddr, protocol: u8) -> Frame {
    let mut quote = shape(dice, to, from, protocol).packet();
    if dice.percent(50) {
        quote.truncate(dice.pick(&[20, 27, 28, 40, 47, 48, 60, 68]));
    }
    let any = dice.byte();
    let kind = if from.is_ipv4() { dice.pick(&[3, 3, 11, 12, any]) } else { dice.pick(&[1, 2, 3, 4, any]) };
    Frame::icmp(from.ip(), to.ip(), kind, dice.byte(), [0, 0, 5, 0]).payload(&quote)
}

fn extension(dice: &mut Dice) -> Extension {
    let mut body = dice.pick(&[4, 6, 6, 14, 60]);
    body = dice.below(body + 1);
    match dice.below(10) {
        0..4 => Extension::HopByHop(dice.bytes(body)),
        4..8 => Extension::DestinationOptions(dice.bytes(body)),
        8 => Extension::Routing(vec![4, dice.pick(&[0, 0, 1])]),
        _ => Extension::Fragment { offset_units: dice.pick(&[0, 0, 0, 9]), more: dice.percent(15), id: 5 },
    }
}

fn family(of: SocketAddr) -> Family {
    if of.is_ipv4() { Family::V4 } else { Family::V6 }
}
