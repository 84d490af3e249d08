//! A frame, as the pipeline needs it. There are three implementations: an XDP frame, a socket buffer, and a byte vector.

use crate::{
    abi::{Address, Edit},
    headers::Headers,
};

/// A frame, from its Ethernet header on. Offsets are in bytes.
pub trait Packet {
    /// Copies `N` bytes at `offset`; `None` if the frame is too short.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;

    /// Overwrites `N` bytes at `offset`; false, and no change, if the frame is too short.
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool;

    /// Index of the device that the frame arrived on.
    fn ifindex(&self) -> u32;

    /// Rewrites addresses, ports and checksums, as [`crate::rewrite::in_place`] does for a frame with complete checksums; false
    /// on failure.
    fn rewrite<A: Address>(&mut self, headers: &Headers<A>, edit: &Edit<A>) -> bool;

    /// Marks the frame for later programs on this node: they must not translate it. No effect if there are none.
    #[inline(always)]
    fn mark_final(&mut self) {}

    /// Resizes the frame to `len` bytes, which the caller then writes with complete checksums; false on failure. `l4` is the offset
    /// of its former transport header: the device must not compute a checksum from there.
    fn resize(&mut self, len: usize, l4: usize) -> bool;
}
