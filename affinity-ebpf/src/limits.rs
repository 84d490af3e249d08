//! The programs that `cargo xtask bench packet` compares with: the minimum work of any program, and the wrapper that feeds
//! both.
//!
//! BPF_PROG_TEST_RUN gives a program its own output as the next input. So a `drive` program overwrites the addresses and ports
//! with the next packet's and tail-calls the program under test. The time of `drive` with `pass` is subtracted.
#![no_std]
#![no_main]
#![expect(missing_docs, unreachable_pub, reason = "the program macros export without documentation")]

use affinity_common::{
    abi::{Address, Direction, FlowKey, Port, V4, V6},
    checksum, fields,
    headers::Headers,
    packet::Packet,
    parse::{self, Network},
    rewrite,
    tables::Entry,
};
use affinity_ebpf::kernel::{self, MapValue, Skb, XdpFrame};
use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    macros::{classifier, map, xdp},
    maps::{Array, LruHashMap, ProgramArray},
    programs::{TcContext, XdpContext},
};
use bytemuck::{Pod, Zeroable};

/// What `drive` writes: words of the one entry of `course`, set by the benchmark.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Course {
    /// Packets so far.
    packets: u64,
    /// Number of different flows.
    flows: u64,
    /// 0: one flow after another; 1: at random.
    random: u64,
    /// Bits of the flow's number that choose the client; the others choose its port.
    client_bits: u64,
    /// The port that is not the client's: the frontend's or the pod's.
    port: u64,
    /// TCP flags.
    tcp_flags: u64,
    /// Sender and receiver of the packets: one of the constants below.
    way: u64,
    /// The node's port of the first flow, for packets to the node.
    node_port: u64,
}

fields!(Course {
    PACKETS = packets: u64,
});

/// From a client to the frontend.
const TO_FRONTEND: u64 = 0;
/// From the pod to a client.
const FROM_POD: u64 = 1;
/// From a client to the pod: the destination is translated already.
const TO_POD: u64 = 2;
/// From the pod to the node; the client's connection has the node's address.
const TO_NODE: u64 = 3;

/// The target of a flow in the minimal program.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct Target<A> {
    address: A,
    port: Port,
}

#[map(name = "course")]
static COURSE: Array<Course> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map(name = "under_test")]
static UNDER_TEST: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map(name = "least_v4")]
static LEAST_V4: LruHashMap<FlowKey<V4>, Target<V4>> = LruHashMap::with_max_entries(1 << 18, 0);
#[map(name = "least_v6")]
static LEAST_V6: LruHashMap<FlowKey<V6>, Target<V6>> = LruHashMap::with_max_entries(1 << 18, 0);

/// The first client, the frontend that all clients connect to, the pod behind it, and the node.
const CLIENT_V4: u32 = 0x0a40_0000;
const FRONTEND_V4: [u8; 4] = [10, 96, 0, 10];
const POD_V4: [u8; 4] = [10, 244, 0, 1];
const NODE_V4: [u8; 4] = [192, 0, 2, 1];
const CLIENT_V6: [u8; 8] = [0xfd, 0, 0, 0x64, 0, 0, 0, 0];
const FRONTEND_V6: [u8; 16] = [0xfd, 0, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10];
const POD_V6: [u8; 16] = [0xfd, 0, 0, 0xf4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const NODE_V6: [u8; 16] = [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// Offsets in frames without options or tags.
const L3: usize = 14;
const L4_V4: usize = L3 + 20;
const L4_V6: usize = L3 + 40;

/// The client's number and port in the next packet, and the number of the flow.
#[inline(always)]
fn next(course: &MapValue<Course>) -> (u32, u16, u16) {
    let Course { packets, flows, random, client_bits: bits, .. } = course.get();
    let count = packets + 1;
    course.write(Course::PACKETS, count);
    let number = if random == 0 {
        if count >= flows {
            course.write(Course::PACKETS, 0);
        }
        count
    } else {
        let mixed = (count as u32).wrapping_mul(0x9e37_79b9);
        let mixed = (mixed ^ mixed >> 15).wrapping_mul(0x85eb_ca6b);
        u64::from(mixed ^ mixed >> 13).wrapping_mul(flows) >> 32
    };
    let bits = bits & 31;
    ((number & ((1 << bits) - 1)) as u32, 1024 + (number >> bits) as u16 % 60_000, number as u16)
}

/// Contents of the next packet.
#[derive(Clone, Copy)]
struct Next {
    client: u32,
    way: u64,
    /// Source port, then destination port.
    ports: [u8; 4],
    flags: u8,
}

impl Next {
    #[inline(always)]
    fn of(course: &MapValue<Course>) -> Self {
        let (client, client_port, number) = next(course);
        let Course { port, node_port, way, tcp_flags, .. } = course.get();
        let (port, node_port, flags) = (port as u16, node_port as u16, tcp_flags as u8);
        let (source, destination) = match way {
            TO_FRONTEND | TO_POD => (client_port, port),
            FROM_POD => (port, client_port),
            _ => (port, node_port.wrapping_add(number)),
        };
        let ([a, b], [c, d]) = (source.to_be_bytes(), destination.to_be_bytes());
        Self { client, way, ports: [a, b, c, d], flags }
    }

    /// The packet's source and destination, given the client's address and those of the others.
    #[inline(always)]
    fn addresses<A: Copy>(self, client: A, frontend: A, pod: A, node: A) -> (A, A) {
        match self.way {
            TO_FRONTEND => (client, frontend),
            FROM_POD => (pod, client),
            TO_POD => (client, pod),
            TO_NODE => (pod, node),
            _ => (client, client),
        }
    }
}

#[inline(always)]
fn drive<P: Packet>(packet: &mut P) {
    let Some(course) = COURSE.get_ptr_mut(0).map(MapValue::new) else { return };
    let next = Next::of(&course);
    let l4 = if packet.read(L3) == Some([0x45]) {
        let client = (CLIENT_V4 + next.client).to_be_bytes();
        let ([a, b, c, d], [e, f, g, h]) = next.addresses(client, FRONTEND_V4, POD_V4, NODE_V4);
        packet.write(L3 + rewrite::IPV4_CHECKSUM, [0x12, 0x34, a, b, c, d, e, f, g, h]);
        L4_V4
    } else {
        let ([a, b, c, d, e, f, g, h], [i, j, k, l]) = (CLIENT_V6, next.client.to_be_bytes());
        let client = [a, b, c, d, e, f, g, h, 0, 0, 0, 0, i, j, k, l];
        let (source, destination) = next.addresses(client, FRONTEND_V6, POD_V6, NODE_V6);
        packet.write(L3 + rewrite::IPV6_ADDRESSES, source);
        packet.write(L3 + rewrite::IPV6_ADDRESSES + 16, destination);
        L4_V6
    };
    packet.write(l4, next.ports);
    packet.write(l4 + 13, [next.flags]);
    packet.write(l4 + rewrite::TCP_CHECKSUM, [0x56, 0x78]);
}

/// Parses and swaps the link addresses: the cost of any answer.
#[inline(always)]
fn swap<P: Packet>(packet: &mut P) {
    let parsed = match parse::network(packet) {
        Ok(Network::V4(l3)) => parse::ipv4(packet, l3, Direction::Dnat).is_ok(),
        Ok(Network::V6(l3)) => parse::ipv6(packet, l3, Direction::Dnat).is_ok(),
        Err(_) => false,
    };
    if parsed && let Some([a, b, c, d, e, f, g, h, i, j, k, l]) = packet.read(0) {
        packet.write(0, [g, h, i, j, k, l, a, b, c, d, e, f]);
    }
}

/// A table of flows for one family.
trait Least: Address {
    const BACKEND: Self;
    fn table() -> &'static LruHashMap<FlowKey<Self>, Target<Self>>;
    /// Writes the destination address and, for IPv4, the header checksum.
    fn write<P: Packet>(packet: &mut P, headers: &Headers<Self>, address: Self, delta: u16);
}

impl Least for V4 {
    const BACKEND: Self = V4(POD_V4);

    #[inline(always)]
    fn table() -> &'static LruHashMap<FlowKey<V4>, Target<V4>> {
        &LEAST_V4
    }

    #[inline(always)]
    fn write<P: Packet>(packet: &mut P, headers: &Headers<V4>, address: V4, delta: u16) {
        packet.write(headers.l3() + rewrite::IPV4_CHECKSUM, checksum::update(headers.l3_checksum.to_ne_bytes(), delta));
        packet.write(headers.l3() + 16, address.0);
    }
}

impl Least for V6 {
    const BACKEND: Self = V6(POD_V6);

    #[inline(always)]
    fn table() -> &'static LruHashMap<FlowKey<V6>, Target<V6>> {
        &LEAST_V6
    }

    #[inline(always)]
    fn write<P: Packet>(packet: &mut P, headers: &Headers<V6>, address: V6, _delta: u16) {
        packet.write(headers.l3() + rewrite::IPV6_ADDRESSES + 16, address.0);
    }
}

/// Parses, looks the flow up, and writes destination and checksums: the minimum work of a load balancer that remembers flows.
/// If `remember` is set, it stores unknown flows.
#[inline(always)]
fn least<P: Packet>(packet: &mut P, remember: bool) {
    match parse::network(packet) {
        Ok(Network::V4(l3)) => {
            if let Ok(headers) = parse::ipv4(packet, l3, Direction::Dnat) {
                least_of(packet, &headers, remember);
            }
        }
        Ok(Network::V6(l3)) => {
            if let Ok(headers) = parse::ipv6(packet, l3, Direction::Dnat) {
                least_of(packet, &headers, remember);
            }
        }
        Err(_) => {}
    }
}

#[inline(always)]
fn least_of<A: Least, P: Packet>(packet: &mut P, headers: &Headers<A>, remember: bool) {
    let target = match kernel::read_copy(A::table().get_ptr(headers.key)) {
        Some(target) => target,
        None if remember => {
            let target = Target { address: A::BACKEND, port: Port::new(8080) };
            let _ = A::table().insert(headers.key, target, 0);
            target
        }
        None => return,
    };
    let addresses = checksum::delta(checksum::fold(headers.key.daddr.sum()), checksum::fold(target.address.sum()));
    let port = checksum::delta(u16::from_ne_bytes(headers.key.dport.0), u16::from_ne_bytes(target.port.0));
    A::write(packet, headers, target.address, addresses);
    packet.write(headers.l4() + 2, target.port.0);
    let sum = checksum::update(headers.l4_checksum, checksum::join(addresses, port));
    packet.write(rewrite::l4_checksum_offset(headers), sum);
}

macro_rules! both_hooks {
    ($($xdp:ident, $tc:ident: $work:ident($($argument:expr)?);)+) => {
        $(
            #[xdp(frags)]
            pub fn $xdp(ctx: XdpContext) -> u32 {
                $work(&mut XdpFrame::new(&ctx) $(, $argument)?);
                xdp_action::XDP_PASS
            }

            #[classifier]
            pub fn $tc(ctx: TcContext) -> i32 {
                $work(&mut Skb::new(&ctx) $(, $argument)?);
                TC_ACT_UNSPEC
            }
        )+
    };
}

both_hooks! {
    xdp_swap, tc_swap: swap();
    xdp_least, tc_least: least(false);
    xdp_remember, tc_remember: least(true);
}

#[xdp(frags)]
pub fn xdp_pass(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

#[classifier]
pub fn tc_pass(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// Adds two VLAN tags to each frame, for tests of tagged frames.
#[classifier]
pub fn tc_tag_twice(ctx: TcContext) -> i32 {
    const VLAN: u16 = 0x8100;
    const VLAN_OUTER: u16 = 0x88a8;

    let mut skb = Skb::new(&ctx);
    if skb.push_vlan(VLAN, 7) && skb.push_vlan(VLAN_OUTER, 8) { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}

#[xdp(frags)]
pub fn xdp_drive(ctx: XdpContext) -> u32 {
    drive(&mut XdpFrame::new(&ctx));
    kernel::tail_call(&UNDER_TEST, &ctx, 0);
    xdp_action::XDP_ABORTED
}

#[classifier]
pub fn tc_drive(ctx: TcContext) -> i32 {
    drive(&mut Skb::new(&ctx));
    kernel::tail_call(&UNDER_TEST, &ctx, 0);
    TC_ACT_UNSPEC
}
