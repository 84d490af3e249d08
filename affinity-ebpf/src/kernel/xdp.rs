//! A frame before a socket buffer exists. Resizing invalidates [`Bytes`] that were taken before.

use affinity_common::{abi::Address, redirect::FibKey};
use aya_ebpf::{bindings::xdp_md, helpers};

use super::{bytes::Bytes, fib::FibResult};

/// The context of an XDP program.
#[derive(Clone, Copy)]
pub struct Xdp(*mut xdp_md);

impl Xdp {
    /// `ctx` is the program's own context.
    #[inline(always)]
    pub fn new(ctx: *mut xdp_md) -> Self {
        Self(ctx)
    }

    /// The linear part of the frame, valid until it is resized.
    #[inline(always)]
    pub fn bytes(self) -> Bytes {
        // SAFETY: the kernel gave the context; it lives as long as the program runs.
        unsafe { Bytes { start: (*self.0).data as usize, end: (*self.0).data_end as usize } }
    }

    /// Cuts the frame at its end, or grows it at its start: every driver leaves room there, not all do at the end.
    #[inline(always)]
    pub fn resize(self, len: usize) -> bool {
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
    pub fn reserve_xdp_metadata(self) -> bool {
        // SAFETY: as above.
        unsafe { helpers::bpf_xdp_adjust_meta(self.0, -(size_of::<u32>() as i32)) == 0 }
    }

    /// Stores a word of metadata for TC.
    #[inline(always)]
    pub fn set_xdp_metadata(self, word: u32) {
        // SAFETY: as above.
        let room = unsafe { Bytes { start: (*self.0).data_meta as usize, end: (*self.0).data as usize } };
        room.write(0, word.to_ne_bytes());
    }

    /// Whether the whole frame is linear.
    #[inline(always)]
    pub fn is_linear(self) -> bool {
        // SAFETY: as above.
        unsafe { helpers::bpf_xdp_get_buff_len(self.0) as usize == self.bytes().size() }
    }

    /// The device that the frame arrived on.
    #[inline(always)]
    pub fn ifindex(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).ingress_ifindex }
    }

    /// Looks up the next hop of the packet.
    #[inline(always)]
    pub fn fib_lookup<A: Address>(self, key: &FibKey<A>, hop: &mut FibResult) {
        hop.look_up(self.0.cast(), self.ifindex(), key);
    }
}

/// Redirects the frame of an XDP program to another device. Returns the action.
#[inline(always)]
pub fn redirect(ifindex: u32) -> u32 {
    // SAFETY: the kernel checks the device.
    unsafe { helpers::bpf_redirect(ifindex, 0) as u32 }
}
