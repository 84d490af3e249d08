//! Operations on connections as global functions: the verifier checks each once, not at every call.

use affinity_common::{
    abi::{FlowKey, Reason, V4, V6},
    flow, foreign,
    parse::Headers,
    pipeline::{self, Opened},
    snat,
};
use affinity_ebpf::global_func;

use crate::tables::Maps;

global_func! {
    /// [`pipeline::open`] for IPv4: the bits of an [`Opened`].
    fn open_v4(headers: Headers<V4>) -> u64 { open(headers, |headers| pipeline::open(&Maps, headers)) }
}

global_func! {
    /// [`pipeline::open`] for IPv6: the bits of an [`Opened`].
    fn open_v6(headers: Headers<V6>) -> u64 { open(headers, |headers| pipeline::open(&Maps, headers)) }
}

global_func! {
    /// [`flow::note_change`] for IPv4.
    fn note_change_v4(headers: Headers<V4>) -> u64 { note(headers, |headers| flow::note_change(&Maps, headers)) }
}

global_func! {
    /// [`flow::note_change`] for IPv6.
    fn note_change_v6(headers: Headers<V6>) -> u64 { note(headers, |headers| flow::note_change(&Maps, headers)) }
}

global_func! {
    /// [`foreign::note_leaving`] for IPv4.
    fn note_leaving_v4(headers: Headers<V4>) -> u64 { note(headers, |headers| foreign::note_leaving(&Maps, headers)) }
}

global_func! {
    /// [`foreign::note_leaving`] for IPv6.
    fn note_leaving_v6(headers: Headers<V6>) -> u64 { note(headers, |headers| foreign::note_leaving(&Maps, headers)) }
}

global_func! {
    /// [`snat::is_free`] for IPv4: one or zero.
    fn is_free_v4(replies: FlowKey<V4>) -> u64 { replies.is_some_and(|replies| snat::is_free(&Maps, replies)).into() }
}

global_func! {
    /// [`snat::is_free`] for IPv6: one or zero.
    fn is_free_v6(replies: FlowKey<V6>) -> u64 { replies.is_some_and(|replies| snat::is_free(&Maps, replies)).into() }
}

#[inline(always)]
fn note<H>(headers: Option<&H>, note: impl FnOnce(&H)) -> u64 {
    headers.map_or(0, |headers| {
        note(headers);
        0
    })
}

#[inline(always)]
fn open<H>(headers: Option<&H>, open: impl FnOnce(&H) -> Opened) -> u64 {
    headers.map_or(Opened::Failed(Reason::Inconsistent), open).to_bits()
}
