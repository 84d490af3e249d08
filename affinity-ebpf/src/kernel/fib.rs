//! The kernel's lookup of a route and neighbour. A result without a successful lookup has no device and no link addresses.

use core::{mem::MaybeUninit, ptr};

use affinity_common::{
    abi::{Address, V4},
    redirect::{FibKey, Link, NextHop},
};
use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup,
        bpf_redir_neigh,
    },
    helpers,
};

/// The result of `bpf_fib_lookup`.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct FibResult {
    lookup: bpf_fib_lookup,
    status: u32,
}

impl FibResult {
    /// The state before a lookup: no route.
    #[inline(always)]
    pub fn no_route() -> Self {
        // SAFETY: all zeroes are a valid lookup.
        Self { lookup: unsafe { MaybeUninit::zeroed().assume_init() }, status: BPF_FIB_LKUP_RET_NOT_FWDED }
    }

    /// Resets the result to no route.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.status = BPF_FIB_LKUP_RET_NOT_FWDED;
    }

    /// Looks up the next hop of a packet that arrived on the device `ifindex`. In place, because a copy of the lookup would
    /// take 64 bytes of stack.
    #[inline(always)]
    pub(super) fn look_up<A: Address>(&mut self, ctx: *mut core::ffi::c_void, ifindex: u32, key: &FibKey<A>) {
        const LOOKUP: i32 = size_of::<bpf_fib_lookup>() as i32;
        const AF_INET: u8 = 2;
        const AF_INET6: u8 = 10;

        let lookup = &mut self.lookup;
        let is_v4 = A::BITS == V4::BITS;
        lookup.family = if is_v4 { AF_INET } else { AF_INET6 };
        lookup.l4_protocol = key.protocol;
        lookup.__bindgen_anon_1.tot_len = key.len;
        lookup.ifindex = ifindex;
        (lookup.sport, lookup.dport) = (u16::from_ne_bytes(key.sport.0), u16::from_ne_bytes(key.dport.0));
        if is_v4 {
            lookup.__bindgen_anon_2.tos = key.class;
        } else {
            lookup.__bindgen_anon_2.flowinfo = (u32::from(key.class) << 20).to_be();
        }
        // SAFETY: all fields of these unions are words.
        let (source, destination) =
            unsafe { (&mut lookup.__bindgen_anon_3.ipv6_src, &mut lookup.__bindgen_anon_4.ipv6_dst) };
        write_address(source, key.saddr);
        write_address(destination, key.daddr);
        // SAFETY: the context is the program's own, and the helper reads and writes as many bytes as its argument says; the
        // lookup has no padding.
        self.status = unsafe { helpers::bpf_fib_lookup(ctx, &raw mut *lookup, LOOKUP, 0) as u32 };
    }

    /// The device of the route, if the stack would forward the packet.
    #[inline(always)]
    pub fn device(&self) -> Option<u32> {
        matches!(self.status, BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH).then_some(self.lookup.ifindex)
    }

    /// Redirects the frame of a TC program with `bpf_redirect_neigh`, which resolves the link address. Returns the action.
    #[inline(always)]
    pub fn redirect_neigh(&self) -> i32 {
        const NEIGHBOUR: i32 = size_of::<bpf_redir_neigh>() as i32;
        // SAFETY: the helper reads as many bytes as its argument says, and the kernel checks the device. A packet of one
        // family may have a neighbour of the other (RFC 5549).
        unsafe {
            let mut neighbour: bpf_redir_neigh = MaybeUninit::zeroed().assume_init();
            neighbour.nh_family = u32::from(self.lookup.family);
            neighbour.__bindgen_anon_1.ipv6_nh = self.lookup.__bindgen_anon_4.ipv6_dst;
            helpers::bpf_redirect_neigh(self.lookup.ifindex, &raw mut neighbour, NEIGHBOUR, 0) as i32
        }
    }

    /// Redirects the frame of a TC program with `bpf_redirect_peer`, into the pod's namespace. Returns the action.
    #[inline(always)]
    pub fn redirect_peer(&self) -> i32 {
        // SAFETY: the kernel checks the device.
        unsafe { helpers::bpf_redirect_peer(self.lookup.ifindex, 0) as i32 }
    }
}

impl NextHop for FibResult {
    /// Known only if the neighbour entry is known.
    #[inline(always)]
    fn link(&self) -> Option<Link> {
        let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (self.lookup.dmac, self.lookup.smac);
        (self.status == BPF_FIB_LKUP_RET_SUCCESS).then_some([a, b, c, d, e, f, g, h, i, j, k, l])
    }
}

/// Redirects the frame out of a device, with the link addresses that it has. Returns the action of the program's hook.
#[inline(always)]
pub fn redirect(ifindex: u32) -> u32 {
    // SAFETY: the kernel checks the device.
    unsafe { helpers::bpf_redirect(ifindex, 0) as u32 }
}

/// Writes an address into the lookup, IPv4 into the first word. IPv6 as bytes: the compiler would assemble words byte by byte,
/// on the stack.
#[inline(always)]
fn write_address<A: Address>(place: &mut [u32; 4], address: A) {
    let mapped = address.to_mapped();
    if A::BITS == V4::BITS {
        let V4(address) = V4::from_mapped(mapped);
        place[0] = u32::from_ne_bytes(address);
    } else {
        // SAFETY: four words are sixteen bytes, and every bit pattern is valid.
        unsafe { ptr::from_mut(place).cast::<[u8; 16]>().write(mapped) };
    }
}
