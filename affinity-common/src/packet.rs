//! What the pipeline needs of a frame. Three real implementations: an XDP frame, a socket buffer, and a byte vector.

use crate::{
    abi::{Address, Edit},
    parse::Headers,
    rewrite,
};

/// A frame, from its Ethernet header on. Offsets are in bytes.
pub trait Packet {
    /// Copies `N` bytes at `offset`; `None` where the frame ends before.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;

    /// Overwrites `N` bytes at `offset`; false, and no change, where the frame ends before.
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool;

    /// Index of the device that the frame came in by.
    fn ifindex(&self) -> u32;

    /// Gives the frame the addresses and ports of `edit`, and checksums to match; false where it could not.
    ///
    /// A frame whose checksum the device completes later needs its own implementation.
    #[inline(always)]
    fn rewrite<A: Address>(&mut self, headers: &Headers<A>, edit: &Edit<A>) -> bool {
        rewrite::in_place(self, headers, edit)
    }

    /// Tells programs that the frame meets later on this node that it is as it is to leave. Only where it meets some.
    #[inline(always)]
    fn mark_final(&mut self) {}

    /// Gives the frame `len` bytes, all of them to be written, with complete checksums; false where that cannot be. `l4` is the
    /// offset of the transport header that it had: nothing may later sum from there.
    fn resize(&mut self, len: usize, l4: usize) -> bool;
}
