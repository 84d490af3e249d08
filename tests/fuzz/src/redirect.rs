//! The same packets, redirected by the hook that they arrived at, without the node's network stack.

use affinity_common::{
    abi::{Address, Edit},
    headers::Headers,
    model::Model,
    packet::Packet,
    pipeline::{self, Verdict},
    redirect::{self, FibKey, FibLookup, Link, NextHop},
};

use crate::frame::{ICMPV6, Reading, TCP, UDP, read};

/// The link addresses for the next hop.
const LINK: Link = [2, 0, 0, 0, 0, 3, 2, 0, 0, 0, 0, 4];
/// The hook's action for it.
const ACTION: u32 = 7;
/// IANA number of SCTP.
const SCTP: u8 = 132;

/// A next hop that is always known.
struct Hop;

impl NextHop for Hop {
    fn link(&self) -> Option<Link> {
        Some(LINK)
    }
}

/// A frame of a hook with one next hop for all packets.
struct Routed(Vec<u8>);

impl Packet for Routed {
    fn ifindex(&self) -> u32 {
        0
    }

    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.read(offset)
    }

    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool {
        self.0.write(offset, bytes)
    }

    fn rewrite<A: Address>(&mut self, headers: &Headers<A>, edit: &Edit<A>) -> bool {
        self.0.rewrite(headers, edit)
    }

    fn resize(&mut self, len: usize, l4: usize) -> bool {
        Packet::resize(&mut self.0, len, l4)
    }
}

impl FibLookup for Routed {
    type Hop = Hop;

    fn fib_lookup<A: Address>(&self, _key: &FibKey<A>) -> Hop {
        Hop
    }
}

/// Redirects a packet that was translated at ingress, or a reply. The result must be what the stack would forward, after egress
/// processing. Packets that are not plain go to the stack unchanged.
pub(crate) fn redirect(model: &Model, frame: &[u8]) {
    let mut wanted = frame.to_vec();
    pipeline::reverse(&mut wanted, &model.clone());
    let mut routed = Routed(frame.to_vec());
    let sent = redirect::redirect(&mut routed, model, |_| Some(ACTION));
    let reading = read(frame).expect("only whole packets are translated");
    if !is_plain(frame, &reading) {
        assert_eq!((sent, routed.0.as_slice()), (Err(Verdict::Forward), frame));
        return;
    }
    assert_eq!(sent, Ok(ACTION));
    let hops_left = reading.l3 + if reading.is_v6 { 7 } else { 8 };
    wanted[..12].copy_from_slice(&LINK);
    wanted[hops_left] -= 1;
    if !reading.is_v6 {
        let checksum = reading.l3 + 10..reading.l3 + 12;
        wanted[checksum.clone()].copy_from_slice(&routed.0[checksum]);
    }
    assert_eq!(routed.0, wanted);
    let after = read(&routed.0).expect("it is as whole as before");
    assert_eq!(after.network_error(&routed.0), reading.network_error(frame), "network checksum");
}

/// Without tags, options, extension headers or fragments, and with a TTL above one.
fn is_plain(frame: &[u8], reading: &Reading) -> bool {
    let Reading { is_v6, l3, .. } = *reading;
    let header = &frame[l3..];
    let is_plain = if is_v6 {
        matches!(header[6], TCP | UDP | SCTP | ICMPV6) && header[7] > 1
    } else {
        header[0] == 0x45 && header[6] & 0x3f == 0 && header[7] == 0 && header[8] > 1
    };
    l3 == 14 && is_plain
}
