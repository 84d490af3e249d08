//! A frame before a socket buffer exists. Resizing invalidates [`Bytes`] that were taken before.

use affinity_common::{
    abi::Address,
    packet::Packet,
    parse::{ACK, SYN, TCP},
    redirect::{FibKey, FibLookup, NextHop},
};
use aya_ebpf::{bindings::xdp_md, helpers, programs::XdpContext};

use super::{bytes::Bytes, fib::FibResult};

/// The context of an XDP program.
#[derive(Clone, Copy)]
struct Xdp(*mut xdp_md);

impl Xdp {
    /// `ctx` is the program's own context.
    #[inline(always)]
    fn new(ctx: *mut xdp_md) -> Self {
        Self(ctx)
    }

    /// The linear part of the frame, valid until it is resized.
    #[inline(always)]
    fn bytes(self) -> Bytes {
        // SAFETY: the kernel gave the context; it lives as long as the program runs.
        unsafe { Bytes { start: (*self.0).data as usize, end: (*self.0).data_end as usize } }
    }

    /// Cuts the frame at its end, or grows it at its start: every driver leaves room there, not all do at the end.
    #[inline(always)]
    fn resize(self, len: usize) -> bool {
        // SAFETY: as above; the helpers check the length.
        unsafe {
            let delta = len as i32 - helpers::bpf_xdp_get_buff_len(self.0) as i32;
            if delta > 0 {
                helpers::bpf_xdp_adjust_head(self.0, -delta) == 0
            } else {
                helpers::bpf_xdp_adjust_tail(self.0, delta) == 0
            }
        }
    }

    /// Reserves room for [`Xdp::set_xdp_metadata`]; false if the driver has none.
    #[inline(always)]
    fn reserve_xdp_metadata(self) -> bool {
        // SAFETY: as above.
        unsafe { helpers::bpf_xdp_adjust_meta(self.0, -(size_of::<u32>() as i32)) == 0 }
    }

    /// Stores a word of metadata for TC.
    #[inline(always)]
    fn set_xdp_metadata(self, word: u32) {
        // SAFETY: as above.
        let room = unsafe { Bytes { start: (*self.0).data_meta as usize, end: (*self.0).data as usize } };
        room.write(0, word.to_ne_bytes());
    }

    /// Whether the whole frame is linear.
    #[inline(always)]
    fn is_linear(self) -> bool {
        // SAFETY: as above.
        unsafe { helpers::bpf_xdp_get_buff_len(self.0) as usize == self.bytes().size() }
    }

    /// The device that the frame arrived on.
    #[inline(always)]
    fn ifindex(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).ingress_ifindex }
    }

    /// Looks up the next hop of the packet.
    #[inline(always)]
    fn fib_lookup<A: Address>(self, key: &FibKey<A>, hop: &mut FibResult) {
        hop.look_up(self.0.cast(), self.ifindex(), key);
    }
}

/// Redirects the frame of an XDP program to another device. Returns the action.
#[inline(always)]
pub fn redirect(ifindex: u32) -> u32 {
    // SAFETY: the kernel checks the device.
    unsafe { helpers::bpf_redirect(ifindex, 0) as u32 }
}

/// A frame before a socket buffer exists. Its headers are in its first buffer, even if it has several.
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

    /// Reserves room for metadata; false if the driver has none. Call it before [`XdpFrame::new`].
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

    /// Whether the frame opens a TCP connection.
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
