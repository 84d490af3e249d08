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
    abi::{
        DeviceMac, Reason, SEEN_PASSED, SEEN_TRANSLATED, STAGE_TC_ONWARD, STAGE_TC_REPLY, STAGE_XDP_ONWARD, V4, V6,
        WIRE_POD, WIRE_TC, WIRE_XDP,
    },
    onward::{self, NextHop},
    packet::Packet,
    pipeline::{self, Verdict},
    session,
    tables::Tables,
};
use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};

use crate::{
    maps::{DEVICE_MACS, TC_STAGES, WIRES, XDP_STAGES},
    tables::Maps,
};
use affinity_ebpf::{
    frame::{Skb, XdpFrame},
    kernel::{self, Hop},
};

/// Forward translation where a client's frame enters the node, before a socket buffer exists.
#[xdp(frags)]
pub fn xdp_forward(ctx: XdpContext) -> u32 {
    // Of what XDP does TC has to know where it redirects; a frame that cannot be told of is TC's.
    if kernel::redirects() && !XdpFrame::make_room_for_word(&ctx) {
        return xdp_action::XDP_PASS;
    }
    let mut frame = XdpFrame::new(&ctx);
    if !may_be_ours(&frame) {
        Maps.conclude(Reason::OtherHost);
        return pass(&frame, SEEN_PASSED);
    }
    match pipeline::forward(&mut frame, &Maps) {
        Verdict::Pass => pass(&frame, SEEN_PASSED),
        Verdict::Forward => pass(&frame, SEEN_TRANSLATED),
        Verdict::Onward => {
            kernel::tail_call(&XDP_STAGES, &ctx, STAGE_XDP_ONWARD);
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
    let came_by = frame.ifindex();
    let take = |hop: &Hop| {
        let ifindex = hop.device().filter(|ifindex| hop.link().is_some() && wire(*ifindex) & WIRE_XDP != 0)?;
        Some(if ifindex == came_by { xdp_action::XDP_TX } else { kernel::redirect(ifindex) })
    };
    match onward::send_on(&mut frame, &Maps, take) {
        Ok(action) => action,
        Err(Verdict::Forward) => pass(&frame, SEEN_TRANSLATED),
        Err(_) => xdp_action::XDP_DROP,
    }
}

/// Whether a frame's destination is the device or its bridge. The stack drops other frames itself, and a bridge forwards them.
#[inline(always)]
fn may_be_ours(frame: &XdpFrame) -> bool {
    let ifindex = frame.ifindex();
    let Some(destination) = frame.read(0) else { return true };
    kernel::read_copy(DEVICE_MACS.get_ptr(DeviceMac::slot(ifindex)))
        .is_none_or(|mac| mac.may_take(ifindex, destination))
}

/// To the stack, or to TC before it: where that redirects, it is told what became of the frame.
#[inline(always)]
fn pass(frame: &XdpFrame, seen: u32) -> u32 {
    if kernel::redirects() {
        frame.leave_word(seen);
    }
    xdp_action::XDP_PASS
}

/// Forward translation on devices of pods, where frames may carry partial checksums, and where XDP is not to be had.
#[classifier]
pub fn tc_forward(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let seen = if kernel::redirects() { skb.word_of_xdp() } else { None };
    let verdict = match seen {
        Some(SEEN_PASSED) => Verdict::Pass,
        Some(SEEN_TRANSLATED) => Verdict::Forward,
        _ => pipeline::forward(&mut skb, &Maps),
    };
    if kernel::redirects() {
        match verdict {
            Verdict::Pass => skb.go_on_with(&TC_STAGES, STAGE_TC_REPLY),
            Verdict::Forward | Verdict::Onward if may_redirect(&skb) => skb.go_on_with(&TC_STAGES, STAGE_TC_ONWARD),
            Verdict::Forward | Verdict::Onward | Verdict::Answer | Verdict::Drop => {}
        }
    }
    tc_action(&skb, verdict)
}

/// What [`tc_forward`] goes on with, where TC is to redirect, for what it has translated; and [`tc_reply`] for replies.
#[classifier]
pub fn tc_onward(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let take = |hop: &Hop| match hop.device().map(wire)? {
        way if way & WIRE_TC == 0 => None,
        way if way & WIRE_POD != 0 => Some(hop.redirect_into() as u32),
        _ => Some(hop.redirect_by_neighbour() as u32),
    };
    match onward::send_on(&mut skb, &Maps, take) {
        Ok(action) => action as i32,
        Err(verdict) => tc_action(&skb, verdict),
    }
}

/// What [`tc_forward`] goes on with, where TC is to redirect, for what it has passed: there may be replies among it.
#[classifier]
pub fn tc_reply(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    if onward::is_reply(&skb, &Maps) && may_redirect(&skb) {
        skb.go_on_with(&TC_STAGES, STAGE_TC_ONWARD);
    }
    TC_ACT_UNSPEC
}

/// Whether what came in by this device may be redirected.
#[inline(always)]
fn may_redirect(skb: &Skb<'_>) -> bool {
    wire(skb.ifindex()) & WIRE_TC != 0
}

/// How a device takes frames that came in by others.
#[inline(always)]
fn wire(ifindex: u32) -> u32 {
    kernel::stable_copy(|| WIRES.get_ptr(ifindex)).ok().flatten().unwrap_or(0)
}

/// Reverse translation where a reply leaves the node, or goes to a pod.
#[classifier]
pub fn tc_reverse(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    if skb.is_final() {
        return TC_ACT_UNSPEC;
    }
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
            Maps.report(|| event);
            0
        }
        None => TC_ACT_SHOT,
    }
}

/// Run by the agent alone: sets a pin's number of connections right, in one step, which user space itself cannot.
#[classifier]
pub fn correct(ctx: TcContext) -> i32 {
    match kernel::correction_of(&Skb::new(&ctx)) {
        Some(correction) if correction.is_v6 == 0 => session::correct_connections::<V4, Maps>(&Maps, &correction),
        Some(correction) => session::correct_connections::<V6, Maps>(&Maps, &correction),
        None => {}
    }
    0
}

/// Run by the loader alone: writes into its packet jiffies, the monotonic clock, and whether the kernel knows
/// [`kernel::BPF_F_IPV6`].
#[classifier]
pub fn clock(ctx: TcContext) -> i32 {
    // First, because it invalidates the pointers.
    let takes_ipv6_flag = u64::from(Skb::new(&ctx).takes_ipv6_flag());
    let mut skb = Skb::new(&ctx);
    let written = skb.write(0, kernel::jiffies().to_ne_bytes())
        && skb.write(8, kernel::monotonic_ns().to_ne_bytes())
        && skb.write(16, takes_ipv6_flag.to_ne_bytes());
    if written { 0 } else { TC_ACT_SHOT }
}
