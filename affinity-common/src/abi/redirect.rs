//! Redirecting: which devices take redirected frames, the indices of the tail-called programs, and the MAC addresses that XDP
//! needs.

use bytemuck::{Pod, Zeroable};

/// `devices`: XDP may redirect frames to the device. It runs native XDP, and its driver accepts redirected frames.
pub const DEVICE_REDIRECT_XDP: u32 = 1;
/// `devices`: TC may redirect frames between the device and others with this flag. Both directions of a connection pass TC, so
/// that both are redirected, or none.
pub const DEVICE_REDIRECT_TC: u32 = 2;
/// `devices`: the device is one end of a veth pair, with a pod at the other end.
pub const DEVICE_POD: u32 = 4;
/// `devices`: the device is an upper device: a bridge or bond with an attached port, or a VLAN of an attached device. The
/// programs on the lower device have seen its frames before.
pub const DEVICE_UPPER: u32 = 8;

/// `devices`: the bits from here on hold a note for users: why the device has no XDP. No program reads them.
pub const DEVICE_NOTE_SHIFT: u32 = 8;

/// Value of `device_macs`: the destination addresses that a device with XDP accepts. XDP sees all frames, including those to
/// other hosts that a device in promiscuous mode or a port of a bridge receives.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct DeviceMac {
    /// The device's own address.
    pub own: [u8; 6],
    /// The address of the bridge or bond that it is a port of; otherwise the device's own.
    pub controller: [u8; 6],
    /// The device's index; zero: nothing is known here. Last, because the kernel copies the value from its start.
    pub ifindex: u32,
}

/// Entries of `device_macs`.
pub const MAC_SLOTS: u32 = 1024;

impl DeviceMac {
    /// The index of a device's entry. Only devices with XDP have one, so two devices rarely share an index.
    #[inline(always)]
    #[must_use]
    pub const fn slot(ifindex: u32) -> u32 {
        ifindex % MAC_SLOTS
    }

    /// Whether a frame that arrived on the device `ifindex` may be for this node; true if nothing is known.
    #[inline(always)]
    #[must_use]
    pub fn may_take(&self, ifindex: u32, destination: [u8; 6]) -> bool {
        self.ifindex != ifindex || destination == self.own || destination == self.controller
    }
}

/// XDP metadata, read by TC on the same device: XDP passed the frame unchanged.
pub const XDP_META_PASSED: u32 = 0x6166_6670;
/// XDP metadata: XDP translated the packet.
pub const XDP_META_TRANSLATED: u32 = 0x6166_6674;

/// Index in `xdp_tail_calls` of the program that redirects packets to pods on other nodes.
pub const TAIL_XDP_REDIRECT: u32 = 0;
/// Index in `tc_tail_calls` of the program that redirects translated packets.
pub const TAIL_TC_REDIRECT: u32 = 0;
/// Index in `tc_tail_calls` of the program that redirects replies.
pub const TAIL_TC_REPLY: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_takes_frames_to_itself_and_its_bridge() {
        let mac = DeviceMac { own: [2, 0, 0, 0, 0, 1], controller: [2, 0, 0, 0, 0, 2], ifindex: 7 };
        assert!(mac.may_take(7, mac.own) && mac.may_take(7, mac.controller));
        assert!(!mac.may_take(7, [2, 0, 0, 0, 0, 3]) && !mac.may_take(7, [0xff; 6]));
        assert!(mac.may_take(7 + MAC_SLOTS, [2, 0, 0, 0, 0, 3]), "nothing is known of another device");
    }
}
