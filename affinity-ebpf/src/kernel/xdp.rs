//! A frame before a socket buffer exists. Reads and writes reach its first buffer, also after it was resized.

use affinity_common::{
    abi::{Address, Edit},
    headers::{ACK, Headers, SYN, TCP},
    packet::Packet,
    redirect::{FibKey, FibLookup, NextHop},
    rewrite,
};
use aya_ebpf::{bindings::xdp_md, helpers, programs::XdpContext};

use super::{bytes::Bytes, fib::FibResult};

/// A frame with its headers in its first buffer, even if it has several.
pub struct XdpFrame {
    ctx: *mut xdp_md,
    bytes: Bytes,
}

/// The first buffer, valid until the frame is resized.
#[inline(always)]
fn first_buffer(ctx: *mut xdp_md) -> Bytes {
    // SAFETY: the kernel gave the context; it lives as long as the program runs.
    unsafe { Bytes { start: (*ctx).data as usize, end: (*ctx).data_end as usize } }
}

impl XdpFrame {
    /// The frame of a program's own context.
    #[inline(always)]
    #[must_use]
    pub fn new(ctx: &XdpContext) -> Self {
        Self { ctx: ctx.ctx, bytes: first_buffer(ctx.ctx) }
    }

    /// Reserves room for metadata; false if the driver has none. Call it before [`XdpFrame::new`].
    #[inline(always)]
    #[must_use]
    pub fn reserve_xdp_metadata(ctx: &XdpContext) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { helpers::bpf_xdp_adjust_meta(ctx.ctx, -(size_of::<u32>() as i32)) == 0 }
    }

    /// Stores a word of metadata for TC, if room was reserved.
    #[inline(always)]
    pub fn set_xdp_metadata(&self, word: u32) {
        // SAFETY: as for `first_buffer`.
        let room = unsafe { Bytes { start: (*self.ctx).data_meta as usize, end: (*self.ctx).data as usize } };
        room.write(0, word.to_ne_bytes());
    }

    /// Whether the first buffer holds the whole frame.
    #[inline(always)]
    fn is_linear(&self) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { helpers::bpf_xdp_get_buff_len(self.ctx) as usize == first_buffer(self.ctx).size() }
    }

    /// Whether the frame opens a TCP connection.
    #[inline(always)]
    fn is_opening<A: Address>(&self, key: &FibKey<A>) -> bool {
        const FLAGS: usize = 13;

        let flags = self.read(key.transport() + FLAGS).map_or(0, |[flags]| flags);
        key.protocol == TCP && flags & (SYN | ACK) == SYN
    }

    /// Looks up the next hop of a packet.
    #[inline(always)]
    fn look_up<A: Address>(&self, key: &FibKey<A>, hop: &mut FibResult) {
        hop.look_up(self.ctx.cast(), self.ifindex(), key);
    }

    /// Whether XDP could redirect a reply. Leaves the result of that lookup in `hop`.
    #[inline(never)]
    fn can_redirect_reply<A: Address>(&self, key: &FibKey<A>, hop: &mut FibResult) -> bool {
        self.look_up(&key.back(), hop);
        hop.link().is_some()
    }
}

impl Packet for XdpFrame {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: as for `first_buffer`.
        unsafe { (*self.ctx).ingress_ifindex }
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
    fn rewrite<A: Address>(&mut self, headers: &Headers<A>, edit: &Edit<A>) -> bool {
        rewrite::in_place(self, headers, edit)
    }

    /// Cuts the frame at its end, or grows it at its start: every driver leaves room there, not all do at the end.
    #[inline(always)]
    fn resize(&mut self, len: usize, _l4: usize) -> bool {
        // SAFETY: the context is the program's own; the helpers check the length.
        let is_done = unsafe {
            let delta = len as i32 - helpers::bpf_xdp_get_buff_len(self.ctx) as i32;
            if delta > 0 {
                helpers::bpf_xdp_adjust_head(self.ctx, -delta) == 0
            } else {
                helpers::bpf_xdp_adjust_tail(self.ctx, delta) == 0
            }
        };
        self.bytes = first_buffer(self.ctx);
        is_done
    }
}

impl FibLookup for XdpFrame {
    type Hop = FibResult;

    /// Frames of several buffers go to the stack, because not every device can send them. So does the first packet of a
    /// connection if its reply could not be redirected (no neighbour entry): conntrack marks a reply without its SYN as
    /// INVALID.
    #[inline(always)]
    fn fib_lookup<A: Address>(&self, key: &FibKey<A>) -> FibResult {
        let mut hop = FibResult::no_route();
        if self.is_linear() {
            if !self.is_opening(key) || self.can_redirect_reply(key, &mut hop) {
                self.look_up(key, &mut hop);
            } else {
                hop.clear();
            }
        }
        hop
    }
}
