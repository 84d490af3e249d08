//! The kernel programs of affinity: each gives the shared pipeline its frame and the maps, and turns the verdict into
//! its hook's return code.
#![no_std]
#![expect(missing_docs, unreachable_pub, reason = "the program macros export without documentation")]
#![no_main]

mod maps;
mod open;
mod sock;
mod tables;

use affinity_common::{
    onward,
    pipeline::{self, Verdict},
};
use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};

use crate::{
    maps::{STAGES, WIRES},
    tables::Maps,
};
use affinity_ebpf::{
    frame::{Skb, XdpFrame},
    kernel,
};

/// Forward translation where a client's frame enters the node, before a socket buffer exists.
#[xdp(frags)]
pub fn xdp_forward(ctx: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(&ctx);
    match pipeline::forward(&mut frame, &Maps) {
        Verdict::Pass | Verdict::Forward => xdp_action::XDP_PASS,
        Verdict::Onward => {
            kernel::tail_call(&STAGES, &ctx, 0);
            xdp_action::XDP_PASS
        }
        Verdict::Answer => xdp_action::XDP_TX,
        Verdict::Drop => xdp_action::XDP_DROP,
    }
}

/// What [`xdp_forward`] goes on with where a pod is on another node: a program of its own, with a stack of its own.
#[xdp(frags)]
pub fn xdp_onward(ctx: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(&ctx);
    match onward::send_on(&mut frame, &Maps, |ifindex| WIRES.get_ptr(ifindex).is_some()) {
        Ok(ifindex) if ifindex == frame.ifindex() => xdp_action::XDP_TX,
        Ok(ifindex) => kernel::redirect(ifindex),
        Err(Verdict::Forward) => xdp_action::XDP_PASS,
        Err(_) => xdp_action::XDP_DROP,
    }
}

/// Forward translation on devices of pods, where frames may carry partial checksums, and where XDP is not to be had.
#[classifier]
pub fn tc_forward(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let verdict = pipeline::forward(&mut skb, &Maps);
    tc_action(&skb, verdict)
}

/// Reverse translation where a reply leaves the node, or goes to a pod.
#[classifier]
pub fn tc_reverse(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let verdict = pipeline::reverse(&mut skb, &Maps);
    tc_action(&skb, verdict)
}

/// Never `TC_ACT_OK` for what goes on: other programs of the device have their say.
#[inline(always)]
fn tc_action(skb: &Skb<'_>, verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Pass | Verdict::Forward | Verdict::Onward => TC_ACT_UNSPEC,
        Verdict::Answer => skb.send_back(),
        Verdict::Drop => TC_ACT_SHOT,
    }
}

/// Run by the agent alone: puts the event that is its packet into the ring, so that all readers see one story.
#[classifier]
pub fn report(ctx: TcContext) -> i32 {
    match kernel::event_of(&Skb::new(&ctx)) {
        Some(event) => {
            affinity_common::tables::Tables::report(&Maps, &event);
            0
        }
        None => TC_ACT_SHOT,
    }
}

/// Run by the loader alone: writes jiffies and the monotonic clock into its packet.
#[classifier]
pub fn clock(ctx: TcContext) -> i32 {
    use affinity_common::packet::Packet;

    let mut skb = Skb::new(&ctx);
    let written = skb.write(0, kernel::jiffies().to_ne_bytes()) && skb.write(8, kernel::monotonic_ns().to_ne_bytes());
    if written { 0 } else { TC_ACT_SHOT }
}
