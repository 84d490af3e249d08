//! The kernel programs of affinity: each gives the shared pipeline its frame and the maps, and turns the verdict into
//! its hook's return code.
#![no_std]
#![expect(missing_docs, unreachable_pub, reason = "the program macros export without documentation")]
#![no_main]

mod maps;
mod sock;
mod tables;

use affinity_common::{
    abi::{
        Correction, DEVICE_POD, DEVICE_REDIRECT_TC, DEVICE_REDIRECT_XDP, DeviceMac, Event, Reason, TAIL_TC_REDIRECT,
        TAIL_TC_REPLY, TAIL_XDP_REDIRECT, V4, V6, XDP_META_PASSED, XDP_META_TRANSLATED,
    },
    packet::Packet,
    pipeline::{self, Verdict},
    redirect::{self, NextHop},
    session,
    tables::Tables,
};
use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use bytemuck::must_cast;
use network_types::eth::EthHdr;

use crate::{
    maps::{DEVICE_MACS, DEVICES, TC_TAIL_CALLS, XDP_TAIL_CALLS},
    tables::Maps,
};
use affinity_ebpf::kernel::{self, FibResult, Skb, XdpFrame};

/// Forward translation for frames of clients that arrive at the node, before a socket buffer exists.
#[xdp(frags)]
pub fn xdp_forward(ctx: XdpContext) -> u32 {
    // If TC redirects, it must know the verdict of XDP. Without room for metadata, TC handles the frame.
    if kernel::redirects() && !XdpFrame::reserve_xdp_metadata(&ctx) {
        return xdp_action::XDP_PASS;
    }
    let mut frame = XdpFrame::new(&ctx);
    if !may_be_ours(&frame) {
        Maps.conclude(Reason::OtherHost);
        return pass(&frame, XDP_META_PASSED);
    }
    match pipeline::forward(&mut frame, &Maps) {
        Verdict::Pass => pass(&frame, XDP_META_PASSED),
        Verdict::Forward => pass(&frame, XDP_META_TRANSLATED),
        Verdict::Redirect => {
            kernel::tail_call(&XDP_TAIL_CALLS, &ctx, TAIL_XDP_REDIRECT);
            xdp_action::XDP_PASS
        }
        Verdict::Answer => xdp_action::XDP_TX,
        Verdict::Drop => xdp_action::XDP_DROP,
    }
}

/// Redirects a packet to a pod on another node. [`xdp_forward`] tail-calls it, so it has a stack of its own.
#[xdp(frags)]
pub fn xdp_redirect(ctx: XdpContext) -> u32 {
    let mut frame = XdpFrame::new(&ctx);
    let ingress = frame.ifindex();
    let take = |hop: &FibResult| {
        let ifindex =
            hop.device().filter(|ifindex| hop.link().is_some() && device_flags(*ifindex) & DEVICE_REDIRECT_XDP != 0)?;
        Some(if ifindex == ingress { xdp_action::XDP_TX } else { kernel::redirect(ifindex) })
    };
    match redirect::redirect(&mut frame, &Maps, take) {
        Ok(action) => action,
        Err(Verdict::Forward) => pass(&frame, XDP_META_TRANSLATED),
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

/// Passes the frame to TC and the stack. If TC redirects, it finds the verdict in the metadata.
#[inline(always)]
fn pass(frame: &XdpFrame, metadata: u32) -> u32 {
    if kernel::redirects() {
        frame.set_xdp_metadata(metadata);
    }
    xdp_action::XDP_PASS
}

/// Forward translation on devices of pods, where frames may carry partial checksums, and on devices without XDP.
#[classifier]
pub fn tc_forward(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let metadata = if kernel::redirects() { skb.xdp_metadata() } else { None };
    let verdict = match metadata {
        Some(XDP_META_PASSED) => Verdict::Pass,
        Some(XDP_META_TRANSLATED) => Verdict::Forward,
        _ => pipeline::forward(&mut skb, &Maps),
    };
    if kernel::redirects() {
        match verdict {
            Verdict::Pass => kernel::tail_call(&TC_TAIL_CALLS, &ctx, TAIL_TC_REPLY),
            Verdict::Forward | Verdict::Redirect if may_redirect(&skb) => {
                kernel::tail_call(&TC_TAIL_CALLS, &ctx, TAIL_TC_REDIRECT)
            }
            Verdict::Forward | Verdict::Redirect | Verdict::Answer | Verdict::Drop => {}
        }
    }
    tc_action(&skb, verdict)
}

/// Redirects a packet with `--forwarding redirect`. [`tc_forward`] tail-calls it for packets that it has translated, and
/// [`tc_reply`] for replies.
#[classifier]
pub fn tc_redirect(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let take = |hop: &FibResult| match hop.device().map(device_flags)? {
        flags if flags & DEVICE_REDIRECT_TC == 0 => None,
        flags if flags & DEVICE_POD != 0 => Some(hop.redirect_peer() as u32),
        _ => Some(hop.redirect_neigh() as u32),
    };
    match redirect::redirect(&mut skb, &Maps, take) {
        Ok(action) => action as i32,
        Err(verdict) => tc_action(&skb, verdict),
    }
}

/// Finds the replies among packets that [`tc_forward`] passed, with `--forwarding redirect`. [`tc_forward`] tail-calls it.
#[classifier]
pub fn tc_reply(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    if redirect::is_reply(&skb, &Maps) && may_redirect(&skb) {
        kernel::tail_call(&TC_TAIL_CALLS, &ctx, TAIL_TC_REDIRECT);
    }
    TC_ACT_UNSPEC
}

/// Whether TC redirects frames that arrive on this device.
#[inline(always)]
fn may_redirect(skb: &Skb) -> bool {
    device_flags(skb.ifindex()) & DEVICE_REDIRECT_TC != 0
}

/// The flags of a device.
#[inline(always)]
fn device_flags(ifindex: u32) -> u32 {
    kernel::stable_copy(|| DEVICES.get_ptr(ifindex)).ok().flatten().unwrap_or(0)
}

/// Reverse translation for replies that leave the node or go to a pod.
#[classifier]
pub fn tc_reverse(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    if skb.is_final() {
        return TC_ACT_UNSPEC;
    }
    let verdict = pipeline::reverse(&mut skb, &Maps);
    tc_action(&skb, verdict)
}

/// Never `TC_ACT_OK` for a frame that continues: other programs on the device must run too.
#[inline(always)]
fn tc_action(skb: &Skb, verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Pass | Verdict::Forward | Verdict::Redirect => TC_ACT_UNSPEC,
        Verdict::Answer => kernel::redirect(skb.ifindex()) as i32,
        Verdict::Drop => TC_ACT_SHOT,
    }
}

/// Offset at which the agent writes into its packets: behind the room for a link header.
const BEHIND_LINK_HEADER: usize = EthHdr::LEN;

/// Run only by the agent: puts the event in its packet into the ring, so that all readers see one sequence of events.
#[classifier]
pub fn report(ctx: TcContext) -> i32 {
    let event: Option<Event> = Skb::new(&ctx).read::<{ size_of::<Event>() }>(BEHIND_LINK_HEADER).map(must_cast);
    match event {
        Some(event) => {
            Maps.report(|| event);
            0
        }
        None => TC_ACT_SHOT,
    }
}

/// Run only by the agent: corrects a pin's number of connections atomically, which user space itself cannot do.
#[classifier]
pub fn correct(ctx: TcContext) -> i32 {
    let correction: Option<Correction> =
        Skb::new(&ctx).read::<{ size_of::<Correction>() }>(BEHIND_LINK_HEADER).map(must_cast);
    match correction {
        Some(correction) if correction.is_v6 == 0 => session::correct_connections::<V4, Maps>(&Maps, &correction),
        Some(correction) => session::correct_connections::<V6, Maps>(&Maps, &correction),
        None => {}
    }
    0
}

/// Run only by the loader: writes into its packet jiffies, the monotonic clock, and whether the kernel knows
/// [`kernel::BPF_F_IPV6`].
#[classifier]
pub fn clock(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    let takes_ipv6_flag = u64::from(skb.takes_ipv6_flag());
    let written = skb.write(0, kernel::jiffies().to_ne_bytes())
        && skb.write(8, kernel::monotonic_ns().to_ne_bytes())
        && skb.write(16, takes_ipv6_flag.to_ne_bytes());
    if written { 0 } else { TC_ACT_SHOT }
}
