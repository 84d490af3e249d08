//! A socket buffer. Reads and writes reach its linear part, also after a change that invalidates pointers into it: making more
//! of it linear, resizing it, adding a tag, or replacing a checksum.

use affinity_common::{
    abi::{Address, Edit, V6},
    headers::{Headers, SCTP, TCP, UDP},
    packet::Packet,
    redirect::{FibKey, FibLookup},
    rewrite::{self, ForPorts},
};
use aya_ebpf::{
    bindings::{__sk_buff, BPF_CSUM_LEVEL_QUERY, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, bpf_adj_room_mode},
    helpers,
    programs::TcContext,
};
use network_types::{eth::EthHdr, udp::UdpHdr};

use super::{bytes::Bytes, fib::FibResult, takes_ipv6_flag};

/// Flag of `bpf_l4_csum_replace`: the header has no checksum of its own that would balance a full packet sum (kernel 6.16;
/// older ones reject it).
pub const BPF_F_IPV6: u64 = 1 << 7;

/// Bytes of headers that are made linear in a socket buffer, at most: link and IPv6 headers, and room for extensions.
const LINEAR: usize = 192;

/// The mark of [`Skb::mark_final`]. A random number, so that other programs do not use it.
const FINAL: u32 = 0xa4f1;

/// A socket buffer: its checksum may be complete, partial, or verified by the device.
pub struct Skb {
    ctx: *mut __sk_buff,
    bytes: Bytes,
}

/// The linear part, valid until a helper changes the socket buffer.
#[inline(always)]
fn linear_part(ctx: *mut __sk_buff) -> Bytes {
    // SAFETY: the kernel gave the context; it lives as long as the program runs.
    unsafe { Bytes { start: (*ctx).data as usize, end: (*ctx).data_end as usize } }
}

/// Whether the linear part already contains all headers that are read: TCP or UDP directly behind an IP header without
/// options, which is nearly always so. Making more of the frame linear may copy the head.
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

impl Skb {
    /// The frame of a program's own context, with linear headers.
    #[inline(always)]
    #[must_use]
    pub fn new(ctx: &TcContext) -> Self {
        let ctx = ctx.skb.skb;
        let mut skb = Self { ctx, bytes: linear_part(ctx) };
        let (linear, len) = (skb.bytes.size(), skb.len());
        if linear < LINEAR && len > linear && !has_plain_headers(&skb.bytes) {
            skb.pull(len.min(LINEAR));
        }
        skb
    }

    /// The frame's length in bytes.
    #[inline(always)]
    fn len(&self) -> usize {
        // SAFETY: as for `linear_part`.
        unsafe { (*self.ctx).len as usize }
    }

    /// Makes the first `len` bytes linear. If it fails, the frame is unchanged, and reads beyond its linear part fail.
    #[inline(always)]
    fn pull(&mut self, len: usize) {
        // SAFETY: the context is the program's own.
        unsafe { helpers::bpf_skb_pull_data(self.ctx, len as u32) };
        self.bytes = linear_part(self.ctx);
    }

    /// Whether an earlier program has marked the frame as final.
    #[inline(always)]
    pub fn is_final(&self) -> bool {
        // SAFETY: as for `linear_part`.
        unsafe { (*self.ctx).tc_index == FINAL }
    }

    /// The metadata that XDP stored.
    #[inline(always)]
    pub fn xdp_metadata(&self) -> Option<u32> {
        // SAFETY: as for `linear_part`.
        let stored = unsafe { Bytes { start: (*self.ctx).data_meta as usize, end: (*self.ctx).data as usize } };
        stored.read(0).map(u32::from_ne_bytes)
    }

    /// Whether the kernel knows [`BPF_F_IPV6`]. To find out, it changes a checksum by zero.
    #[inline(always)]
    pub fn takes_ipv6_flag(&mut self) -> bool {
        const ANYWHERE: usize = 32;
        self.replace_l4_checksum(ANYWHERE, 0, u64::from(BPF_F_PSEUDO_HDR) | BPF_F_IPV6)
    }

    /// Adds an outer VLAN tag to the frame; false if there is no memory.
    #[inline(always)]
    pub fn push_vlan(&mut self, protocol: u16, id: u16) -> bool {
        // SAFETY: the context is the program's own.
        let is_done = unsafe { helpers::bpf_skb_vlan_push(self.ctx, protocol.to_be(), id) == 0 };
        self.bytes = linear_part(self.ctx);
        is_done
    }

    /// Whether the frame was sent to the device that it arrived on, and has no VLAN tag outside its data.
    #[inline(always)]
    fn is_for_this_device(&self) -> bool {
        const PACKET_HOST: u32 = 0;
        // SAFETY: as for `linear_part`.
        unsafe { (*self.ctx).pkt_type == PACKET_HOST && (*self.ctx).vlan_present == 0 }
    }

    /// Bytes of data in each packet that the frame will be cut into (GSO); `None` if it will not be cut.
    #[inline(always)]
    fn segment_size(&self) -> Option<u16> {
        // SAFETY: as for `linear_part`. The kernel's field has 16 bits.
        let size = unsafe { (*self.ctx).gso_size };
        if size == 0 { None } else { Some(size as u16) }
    }

    /// Whether a device has verified the transport checksum (`CHECKSUM_UNNECESSARY`).
    #[inline(always)]
    fn has_verified_checksum(&self) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { helpers::bpf_csum_level(self.ctx, u64::from(BPF_CSUM_LEVEL_QUERY)) >= 0 }
    }

    /// Updates the transport checksum at `offset`, however far it has been computed.
    #[inline(always)]
    fn replace_l4_checksum(&mut self, offset: usize, difference: u64, flags: u64) -> bool {
        // SAFETY: the context is the program's own; the helper checks the offset.
        let is_done = unsafe { helpers::bpf_l4_csum_replace(self.ctx, offset as u32, 0, difference, flags) == 0 };
        self.bytes = linear_part(self.ctx);
        is_done
    }

    /// Length of the longest packet that the frame will be sent as, from the IP header on; `None` if it is unknown.
    #[inline(always)]
    fn longest_packet<A: Address>(&self, key: &FibKey<A>) -> Option<u16> {
        const TCP_WORDS: usize = 12;

        let Some(segment) = self.segment_size() else { return Some(key.len) };
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

    /// Updates the transport checksum. Each call of the helper costs as much as a lookup of a flow, so it is called at most
    /// once, except for deltas of zero:
    ///
    /// * A sum that the device has verified is complete, and nothing else in the socket buffer depends on it: no call.
    /// * The helper updates the sum for the addresses: it knows how far the sum has been computed, and keeps the sum of the
    ///   whole packet consistent (`CHECKSUM_COMPLETE`).
    /// * The sum for the ports is written here. A partial sum does not cover the ports. A complete one does, and so does the
    ///   sum of the whole packet, which the ports and the field change by opposite amounts.
    #[inline(always)]
    fn replace_checksum<A: Address>(&mut self, headers: &Headers<A>, edit: &Edit<A>) -> bool {
        let offset = rewrite::l4_checksum_offset(headers);
        if self.has_verified_checksum() {
            return self.bytes.write(offset, rewrite::l4_checksum(headers, edit));
        }
        let zero_is_none = if headers.key.protocol == UDP { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        let of_ipv6 = if A::BITS == V6::BITS && takes_ipv6_flag() { BPF_F_IPV6 } else { 0 };
        let pseudo = zero_is_none | u64::from(BPF_F_PSEUDO_HDR) | of_ipv6;
        if !self.replace_l4_checksum(offset, u64::from(edit.addr_delta), pseudo) {
            return false;
        }
        let Some(field) = self.bytes.read(offset) else { return false };
        match rewrite::for_ports(headers, edit, field) {
            ForPorts::Field(complete) => self.bytes.write(offset, complete),
            ForPorts::Nothing => true,
            ForPorts::Unknown => self.replace_l4_checksum(offset, u64::from(edit.port_delta), zero_is_none),
        }
    }

    /// Cuts or grows the frame at its end. The caller then calls [`Skb::pull`].
    #[inline(always)]
    fn change_tail(&self, len: usize) -> bool {
        // SAFETY: the context is the program's own; the helper checks the length.
        unsafe { helpers::bpf_skb_change_tail(self.ctx, len as u32, 0) == 0 }
    }

    /// Removes `len` bytes behind the link header. False, and no change, if the frame is not IP or is too short. The caller
    /// then calls [`Skb::pull`].
    #[inline(always)]
    fn cut_behind_link_header(&self, len: usize) -> bool {
        // SAFETY: the context is the program's own; the helper checks the length.
        unsafe { helpers::bpf_skb_adjust_room(self.ctx, -(len as i32), bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, 0) == 0 }
    }
}

impl Packet for Skb {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: as for `linear_part`.
        unsafe { (*self.ctx).ifindex }
    }

    /// In its traffic control index. Nothing else uses that field except `tcindex` classifiers and the `dsmark` qdisc, both
    /// removed in Linux 6.3 (<https://elixir.bootlin.com/linux/v6.3/A/ident/tc_index>).
    #[inline(always)]
    fn mark_final(&mut self) {
        // SAFETY: as for `linear_part`; TC programs may write this field.
        unsafe { (*self.ctx).tc_index = FINAL };
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.read(offset)
    }

    #[inline(always)]
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool {
        self.bytes.write(offset, bytes)
    }

    /// Writes addresses and ports directly. The transport checksum may need a helper.
    #[inline(always)]
    fn rewrite<A: Address>(&mut self, headers: &Headers<A>, edit: &Edit<A>) -> bool {
        let Edit { saddr, daddr, addr_delta, .. } = *edit;
        rewrite::write_addresses(self, headers.l3(), headers.l3_checksum.to_ne_bytes(), addr_delta, saddr, daddr)
            && (headers.key.protocol == SCTP
                || rewrite::write_ports(self, headers, edit) && self.replace_checksum(headers, edit))
    }

    /// If the sender left the checksum to a device (`CHECKSUM_PARTIAL`), the socket buffer says where to start summing, and a
    /// new length does not change that: a device would sum a complete checksum again. The kernel drops the request once that
    /// place is before the start of the frame. So the frame is first resized to `len` and that many bytes more, and then loses
    /// its first bytes, up to behind that place.
    ///
    /// The kernel does not cut a frame with a VLAN tag in its data (the inner one of two tags, because the first one is
    /// removed before TC). Such a frame is first shortened so that it ends before its transport checksum, and then gets its
    /// length. The kernel does not shorten a frame with a partial checksum that far, so such a frame is not answered.
    ///
    /// <https://elixir.bootlin.com/linux/v6.18/source/include/linux/skbuff.h> (`__skb_postpull_rcsum`),
    /// <https://elixir.bootlin.com/linux/v6.18/source/net/core/filter.c> (`bpf_skb_adjust_room`, `__bpf_skb_min_len`)
    #[inline(always)]
    fn resize(&mut self, len: usize, l4: usize) -> bool {
        let behind = l4 + 2;
        let is_done = if self.has_verified_checksum() {
            self.change_tail(len)
        } else {
            self.change_tail(len + behind) && self.cut_behind_link_header(behind)
                || self.change_tail(behind) && self.change_tail(len)
        };
        self.pull(len);
        is_done
    }
}

impl FibLookup for Skb {
    type Hop = FibResult;

    /// A frame that is sent to another host or has a VLAN tag in the socket buffer belongs to another device. It is not
    /// redirected.
    #[inline(always)]
    fn fib_lookup<A: Address>(&self, key: &FibKey<A>) -> FibResult {
        let mut hop = FibResult::no_route();
        if let Some(len) = self.longest_packet(key)
            && self.is_for_this_device()
        {
            hop.look_up(self.ctx.cast(), self.ifindex(), &FibKey { len, ..*key });
        }
        hop
    }
}
