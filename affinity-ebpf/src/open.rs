//! Opening a connection, as functions that the verifier takes by themselves: once, and not for every way that leads to
//! them. What they are given is checked for them.

use affinity_common::{
    abi::{Reason, V4, V6},
    parse::Headers,
    pipeline::{self, Opened},
};
use affinity_ebpf::verified_alone;

use crate::tables::Maps;

verified_alone! {
    /// [`pipeline::open`] for IPv4: the bits of an [`Opened`].
    fn open_v4(headers: Headers<V4>) -> u64 { open(headers, |headers| pipeline::open(&Maps, headers)) }
}

verified_alone! {
    /// [`pipeline::open`] for IPv6: the bits of an [`Opened`].
    fn open_v6(headers: Headers<V6>) -> u64 { open(headers, |headers| pipeline::open(&Maps, headers)) }
}

#[inline(always)]
fn open<H>(headers: Option<&H>, open: impl FnOnce(&H) -> Opened) -> u64 {
    headers.map_or(Opened::Failed(Reason::Inconsistent), open).to_bits()
}
