//! A frame as each hook has it.

use affinity_common::{
    abi::{Address, Edit, V6},
    packet::Packet,
    parse::{ACK, Headers, SCTP, SYN, TCP, UDP},
    redirect::{FibKey, FibLookup, NextHop},
    rewrite::{self, ForPorts},
};
use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    maps::ProgramArray,
    programs::{TcContext, XdpContext},
};
use network_types::{eth::EthHdr, udp::UdpHdr};

use crate::kernel::{self, BPF_F_IPV6, Bytes, FibResult, SkBuff, Xdp};

/// Headers that are made linear in a socket buffer, at most: link and IPv6 headers, and room for extensions.
const LINEAR: usize = 192;

/// A frame before a socket buffer exists. Its headers lie in its first buffer, also where there are several.
pub struct XdpFrame {
    xdp: Xdp,
    bytes: Bytes,
}

impl XdpFrame {
    /// The frame of a program's own context.
    #[inline(always)]
    #[must_use]
    pub fn new(ctx: &XdpContext) -> Self {
        let xdp = Xdp::new(ctx.ctx);
        Self { xdp, bytes: xdp.bytes() }
    }

    /// Reserves room for metadata; false if the driver has none. To be called before [`XdpFrame::new`].
    #[inline(always)]
    #[must_use]
    pub fn reserve_xdp_metadata(ctx: &XdpContext) -> bool {
        Xdp::new(ctx.ctx).reserve_xdp_metadata()
    }

    /// Stores a word of metadata for TC, if room was reserved.
    #[inline(always)]
    pub fn set_xdp_metadata(&self, word: u32) {
        self.xdp.set_xdp_metadata(word);
    }

    /// Whether it opens a TCP connection.
    #[inline(always)]
    fn opens<A: Address>(&self, key: &FibKey<A>) -> bool {
        const FLAGS: usize = 13;

        let flags = self.read(key.transport() + FLAGS).map_or(0, |[flags]| flags);
        key.protocol == TCP && flags & (SYN | ACK) == SYN
    }
}

/// Whether XDP could redirect a reply. Leaves the result of that lookup in `hop`.
#[inline(never)]
fn can_come_back<A: Address>(xdp: Xdp, key: &FibKey<A>, hop: &mut FibResult) -> bool {
    xdp.fib_lookup(&key.back(), hop);
    hop.link().is_some()
}

impl Packet for XdpFrame {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.xdp.ifindex()
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.read(offset)
    }

    #[inline(always)]
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool {
        self.bytes.write(offset, bytes)
    }

    #[inline(always)]
    fn resize(&mut self, len: usize, _l4: usize) -> bool {
        let done = self.xdp.resize(len);
        self.bytes = self.xdp.bytes();
        done
    }
}

impl FibLookup for XdpFrame {
    type Hop = FibResult;

    /// Frames of several buffers go to the stack, because not every device can send them. So does the first packet of a
    /// connection whose reply could not be redirected (no neighbour entry): conntrack marks a reply without its SYN as
    /// INVALID.
    #[inline(always)]
    fn fib_lookup<A: Address>(&self, key: &FibKey<A>) -> FibResult {
        let mut hop = FibResult::unknown();
        if self.xdp.is_linear() {
            if !self.opens(key) || can_come_back(self.xdp, key, &mut hop) {
                self.xdp.fib_lookup(key, &mut hop);
            } else {
                hop.forget();
            }
        }
        hop
    }
}

/// A socket buffer: its checksum may be complete, partial, or known by the device.
pub struct Skb<'a> {
    skb: SkBuff,
    bytes: Bytes,
    _ctx: core::marker::PhantomData<&'a TcContext>,
}

/// Whether what lies before the end is all that is looked at: TCP or UDP right behind an IP header without options, as
/// nearly always. To make more linear may mean to copy the head.
#[inline(always)]
fn has_plain_headers(bytes: &Bytes) -> bool {
    const IPV4: [u8; 3] = [0x08, 0x00, 0x45];
    const IPV6: [u8; 2] = [0x86, 0xdd];
    const ENDS: [usize; 2] = [14 + 20 + 20, 14 + 40 + 20];

    let Some([a, b, c, _, _, _, _, _, in_ipv6, _, _, in_ipv4]) = bytes.read(12) else { return false };
    let (end, protocol) = match [a, b, c] {
        IPV4 => (ENDS[0], in_ipv4),
        [a, b, _] if [a, b] == IPV6 => (ENDS[1], in_ipv6),
        _ => return false,
    };
    matches!(protocol, TCP | UDP) && bytes.size() >= end
}

impl<'a> Skb<'a> {
    /// The frame of a program's own context, its headers made linear.
    #[inline(always)]
    #[must_use]
    pub fn new(ctx: &'a TcContext) -> Self {
        let skb = SkBuff::new(ctx.skb.skb);
        let mut bytes = skb.bytes();
        if bytes.size() < LINEAR && skb.size() > bytes.size() && !has_plain_headers(&bytes) {
            skb.pull(skb.size().min(LINEAR));
            bytes = skb.bytes();
        }
        Self { skb, bytes, _ctx: core::marker::PhantomData }
    }

    /// Whether a program before this one has said that the frame is as it is to leave.
    #[inline(always)]
    pub fn is_final(&self) -> bool {
        self.skb.is_final()
    }

    /// The metadata that XDP stored.
    #[inline(always)]
    pub fn xdp_metadata(&self) -> Option<u32> {
        self.skb.xdp_metadata()
    }

    /// Tail-calls another program; returns only if there is none at `index`.
    #[inline(always)]
    pub fn tail_call(&self, programs: &ProgramArray, index: u32) {
        self.skb.tail_call(programs, index);
    }

    /// Sends the frame out of the device that it came in by: the action to return.
    #[inline(always)]
    pub fn send_back(&self) -> i32 {
        self.skb.send_back()
    }

    /// Whether the kernel knows [`BPF_F_IPV6`]: changes a checksum by nothing.
    #[inline(always)]
    pub fn takes_ipv6_flag(&self) -> bool {
        const ANYWHERE: usize = 32;
        self.skb.replace_l4_checksum(ANYWHERE, 0, u64::from(BPF_F_PSEUDO_HDR) | BPF_F_IPV6)
    }

    /// Length of the longest packet that the frame is to be sent as, from the IP header on; none where it cannot be told.
    #[inline(always)]
    fn longest<A: Address>(&self, key: &FibKey<A>) -> Option<u16> {
        const TCP_WORDS: usize = 12;

        let Some(segment) = self.skb.segment_size() else { return Some(key.len) };
        let transport = match key.protocol {
            TCP => {
                let [words]: [u8; 1] = self.read(key.transport() + TCP_WORDS)?;
                usize::from(words >> 4) * 4
            }
            UDP => UdpHdr::LEN,
            _ => return None,
        };
        segment.checked_add((key.transport() - EthHdr::LEN + transport) as u16)
    }

    /// Brings the transport checksum in step. Each call of the helper costs as much as a lookup of a flow, so there is one
    /// at most, but for deltas of zero:
    ///
    /// * A sum that the device has verified is complete, and nothing else in the socket buffer depends on it: no call.
    /// * The addresses are the helper's: it knows how far the sum has been computed, and keeps the sum of the whole packet
    ///   in step (`CHECKSUM_COMPLETE`).
    /// * The ports are written here. A partial sum does not cover them. A complete one does, and so does the sum of the
    ///   whole packet, which the ports and the field change by opposite amounts.
    #[inline(always)]
    fn replace_checksum<A: Address>(&mut self, headers: &Headers<A>, edit: &Edit<A>) -> bool {
        let offset = rewrite::l4_checksum_offset(headers);
        if self.skb.is_verified() {
            return self.bytes.write(offset, rewrite::l4_checksum(headers, edit));
        }
        let zero_is_none = if headers.key.protocol == UDP { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        let of_ipv6 = if A::BITS == V6::BITS && kernel::takes_ipv6_flag() { BPF_F_IPV6 } else { 0 };
        let pseudo = zero_is_none | u64::from(BPF_F_PSEUDO_HDR) | of_ipv6;
        if !self.skb.replace_l4_checksum(offset, u64::from(edit.addr_delta), pseudo) {
            return false;
        }
        self.bytes = self.skb.bytes();
        let Some(field) = self.bytes.read(offset) else { return false };
        match rewrite::for_ports(headers, edit, field) {
            ForPorts::Field(complete) => self.bytes.write(offset, complete),
            ForPorts::Nothing => true,
            ForPorts::Unknown => self.skb.replace_l4_checksum(offset, u64::from(edit.port_delta), zero_is_none),
        }
    }
}

impl Packet for Skb<'_> {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.skb.ifindex()
    }

    #[inline(always)]
    fn mark_final(&mut self) {
        self.skb.mark_final();
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.read(offset)
    }

    #[inline(always)]
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool {
        self.bytes.write(offset, bytes)
    }

    /// Addresses and ports directly, then the transport checksum: its helper invalidates the pointers.
    #[inline(always)]
    fn rewrite<A: Address>(&mut self, headers: &Headers<A>, edit: &Edit<A>) -> bool {
        let Edit { saddr, daddr, addr_delta, .. } = *edit;
        rewrite::write_addresses(self, headers.l3(), headers.l3_checksum.to_ne_bytes(), addr_delta, saddr, daddr)
            && (headers.key.protocol == SCTP
                || rewrite::write_ports(self, headers, edit) && self.replace_checksum(headers, edit))
    }

    /// Where the sender left the checksum to a device (`CHECKSUM_PARTIAL`), the socket buffer says where to sum from, and a
    /// new length does not change that: a device would sum a complete checksum again. The kernel drops the request once
    /// that place lies before the frame, so the frame loses its first bytes, up to behind that place, and has as many more
    /// at its end before.
    ///
    /// The kernel does not cut a frame with a VLAN tag among its data (the inner one of two tags, because the first one is
    /// taken out before TC). Such a frame is shortened until it ends before its transport checksum, and then gets its length.
    /// The kernel refuses to shorten a frame with a partial checksum like that, so such a frame is not answered.
    ///
    /// <https://elixir.bootlin.com/linux/v6.18/source/include/linux/skbuff.h> (`__skb_postpull_rcsum`),
    /// <https://elixir.bootlin.com/linux/v6.18/source/net/core/filter.c> (`bpf_skb_adjust_room`, `__bpf_skb_min_len`)
    #[inline(always)]
    fn resize(&mut self, len: usize, l4: usize) -> bool {
        let behind = l4 + 2;
        let done = if self.skb.is_verified() {
            self.skb.resize(len)
        } else {
            self.skb.resize(len + behind) && self.skb.cut(behind) || self.skb.resize(behind) && self.skb.resize(len)
        };
        self.skb.pull(len);
        self.bytes = self.skb.bytes();
        done
    }
}

impl FibLookup for Skb<'_> {
    type Hop = FibResult;

    /// A frame to another host, or with a VLAN tag in the socket buffer, belongs to another device: it is not redirected.
    #[inline(always)]
    fn fib_lookup<A: Address>(&self, key: &FibKey<A>) -> FibResult {
        let mut hop = FibResult::unknown();
        if let Some(len) = self.longest(key)
            && self.skb.is_for_this_device()
        {
            self.skb.fib_lookup(&FibKey { len, ..*key }, &mut hop);
        }
        hop
    }
}
