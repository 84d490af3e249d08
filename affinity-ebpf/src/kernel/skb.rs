//! A socket buffer. Making it linear, resizing it, tagging it or replacing a checksum invalidates [`Bytes`] that were taken before;
//! the verifier rejects their use.

use affinity_common::{abi::Address, redirect::FibKey};
use aya_ebpf::{
    bindings::{__sk_buff, BPF_CSUM_LEVEL_QUERY, bpf_adj_room_mode},
    helpers,
    maps::ProgramArray,
    programs::TcContext,
};

use super::{bytes::Bytes, fib::FibResult, tail_call};

/// Flag of `bpf_l4_csum_replace`: the header has no checksum of its own that would balance a full packet sum (kernel 6.16;
/// older ones reject it).
pub const BPF_F_IPV6: u64 = 1 << 7;

/// The mark of [`SkBuff::mark_final`]. A random number, so that other programs do not use it.
const FINAL: u32 = 0xa4f1;

/// The context of a TC program.
#[derive(Clone, Copy)]
pub struct SkBuff(*mut __sk_buff);

impl SkBuff {
    /// `ctx` is the program's own context.
    #[inline(always)]
    pub fn new(ctx: *mut __sk_buff) -> Self {
        Self(ctx)
    }

    /// The linear part of the frame, valid until it is resized or a checksum is replaced.
    #[inline(always)]
    pub fn bytes(self) -> Bytes {
        // SAFETY: the kernel gave the context; it lives as long as the program runs.
        unsafe { Bytes { start: (*self.0).data as usize, end: (*self.0).data_end as usize } }
    }

    /// The frame's length in bytes.
    #[inline(always)]
    pub fn size(self) -> usize {
        // SAFETY: as above.
        unsafe { (*self.0).len as usize }
    }

    /// Makes the first `len` bytes linear.
    #[inline(always)]
    pub fn pull(self, len: usize) {
        // SAFETY: as above. If it fails, the frame is unchanged, and reads beyond its linear part fail.
        unsafe { helpers::bpf_skb_pull_data(self.0, len as u32) };
    }

    /// Cuts or grows the frame at its end.
    #[inline(always)]
    pub fn resize(self, len: usize) -> bool {
        // SAFETY: as above; the helper checks the length.
        unsafe { helpers::bpf_skb_change_tail(self.0, len as u32, 0) == 0 }
    }

    /// Removes `len` bytes behind the link header. False, and no change, if the frame is not IP or is too short.
    #[inline(always)]
    pub fn cut(self, len: usize) -> bool {
        // SAFETY: as above; the helper checks the length.
        unsafe { helpers::bpf_skb_adjust_room(self.0, -(len as i32), bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, 0) == 0 }
    }

    /// Adds an outer VLAN tag to the frame; false if there is no memory.
    #[inline(always)]
    pub fn tag(self, protocol: u16, id: u16) -> bool {
        // SAFETY: as above.
        unsafe { helpers::bpf_skb_vlan_push(self.0, protocol.to_be(), id) == 0 }
    }

    /// Whether a device has verified the transport checksum (`CHECKSUM_UNNECESSARY`).
    #[inline(always)]
    pub fn is_verified(self) -> bool {
        // SAFETY: as above.
        unsafe { helpers::bpf_csum_level(self.0, u64::from(BPF_CSUM_LEVEL_QUERY)) >= 0 }
    }

    /// Updates the transport checksum at `offset`, however far it has been computed.
    #[inline(always)]
    pub fn replace_l4_checksum(self, offset: usize, difference: u64, flags: u64) -> bool {
        // SAFETY: as above; the helper checks the offset.
        unsafe { helpers::bpf_l4_csum_replace(self.0, offset as u32, 0, difference, flags) == 0 }
    }

    /// The device that the frame arrived on.
    #[inline(always)]
    pub fn ifindex(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).ifindex }
    }

    /// Marks the frame for later programs of this node, in its traffic control index. Nothing else uses that field except
    /// `tcindex` classifiers and the `dsmark` qdisc, both removed in Linux 6.3
    /// (<https://elixir.bootlin.com/linux/v6.3/A/ident/tc_index>).
    #[inline(always)]
    pub fn mark_final(self) {
        // SAFETY: as above; TC programs may write this field.
        unsafe { (*self.0).tc_index = FINAL };
    }

    /// Whether the frame has the mark.
    #[inline(always)]
    pub fn is_final(self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0).tc_index == FINAL }
    }

    /// The metadata that XDP stored.
    #[inline(always)]
    pub fn xdp_metadata(self) -> Option<u32> {
        // SAFETY: as above.
        let left = unsafe { Bytes { start: (*self.0).data_meta as usize, end: (*self.0).data as usize } };
        left.read(0).map(u32::from_ne_bytes)
    }

    /// Whether the frame was sent to the device that it arrived on, and has no VLAN tag outside its data.
    #[inline(always)]
    pub fn is_for_this_device(self) -> bool {
        const PACKET_HOST: u32 = 0;
        // SAFETY: as above.
        unsafe { (*self.0).pkt_type == PACKET_HOST && (*self.0).vlan_present == 0 }
    }

    /// Bytes of data in each packet that the frame will be cut into (GSO); `None` if it will not be cut.
    #[inline(always)]
    pub fn segment_size(self) -> Option<u16> {
        // SAFETY: as above. The kernel's field has 16 bits.
        let size = unsafe { (*self.0).gso_size };
        if size == 0 { None } else { Some(size as u16) }
    }

    /// Looks up the next hop of the packet.
    #[inline(always)]
    pub fn fib_lookup<A: Address>(self, key: &FibKey<A>, hop: &mut FibResult) {
        hop.look_up(self.0.cast(), self.ifindex(), key);
    }

    /// Tail-calls another program; returns only if there is none at `index`.
    #[inline(always)]
    pub fn tail_call(self, programs: &ProgramArray, index: u32) {
        tail_call(programs, &TcContext::new(self.0), index);
    }

    /// Sends the frame out of the device that it arrived on. Returns the action.
    #[inline(always)]
    pub fn send_back(self) -> i32 {
        // SAFETY: as above.
        unsafe { helpers::bpf_redirect(self.ifindex(), 0) as i32 }
    }
}
