//! The programs on a cgroup: each gives a process's call on its socket to the shared logic, and the answer back.

use affinity_common::{
    abi::Config,
    socket::{self, Answer, Peer},
};
use affinity_ebpf::kernel::{self, CONFIG, Release, SockAddr};
use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};
use core::mem::offset_of;

use crate::tables::Maps;

/// What the kernel takes from a program: the call goes on, or fails.
const GO_ON: i32 = 1;
const FAIL: i32 = 0;

/// An IPv4 socket, or an IPv6 socket that names an IPv4 address where the kernel sees it so, connects.
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(&ctx);
    let Some(caller) = call.caller() else { return GO_ON };
    let answer = socket::connect(&Maps, &caller, &call.peer_v4());
    answered(&answer, |peer| call.set_peer_v4(peer))
}

/// An IPv6 socket connects, perhaps to an IPv4-mapped address.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(&ctx);
    let Some(caller) = call.caller() else { return GO_ON };
    let answer = socket::connect(&Maps, &caller, &call.peer_v6());
    answered(&answer, |peer| call.set_peer_v6(peer))
}

/// A datagram to a named IPv4 address.
#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(&ctx);
    let Some(caller) = call.caller() else { return GO_ON };
    let answer = socket::send(&Maps, &caller, &call.peer_v4());
    answered(&answer, |peer| call.set_peer_v4(peer))
}

/// A datagram to a named IPv6 address. IPv4-mapped ones come as IPv4.
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(&ctx);
    let Some(caller) = call.caller() else { return GO_ON };
    let answer = socket::send(&Maps, &caller, &call.peer_v6());
    answered(&answer, |peer| call.set_peer_v6(peer))
}

/// An IPv4 socket asks whom a datagram is from.
#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(&ctx);
    if let Some(caller) = call.caller()
        && let Some(frontend) = socket::received(&Maps, &caller, &call.peer_v4())
    {
        call.set_peer_v4(&frontend);
    }
    GO_ON
}

/// An IPv6 socket asks whom a datagram is from.
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(&ctx);
    if let Some(caller) = call.caller()
        && let Some(frontend) = socket::received(&Maps, &caller, &call.peer_v6())
    {
        call.set_peer_v6(&frontend);
    }
    GO_ON
}

/// An IPv4 socket asks whom it is connected to.
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(&ctx);
    if let Some(caller) = call.caller()
        && let Some(frontend) = socket::connected_to(&Maps, &caller, &call.peer_v4())
    {
        call.set_peer_v4(&frontend);
    }
    GO_ON
}

/// An IPv6 socket asks whom it is connected to.
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    let call = SockAddr::new(&ctx);
    if let Some(caller) = call.caller()
        && let Some(frontend) = socket::connected_to(&Maps, &caller, &call.peer_v6())
    {
        call.set_peer_v6(&frontend);
    }
    GO_ON
}

/// A socket is closed.
#[cgroup_sock(sock_release)]
pub fn sock_release(ctx: SockContext) -> i32 {
    if let Some(caller) = Release::new(&ctx).caller() {
        socket::release(&Maps, &caller);
    }
    GO_ON
}

/// Does what was answered, and says what the program returns.
#[inline(always)]
fn answered(answer: &Answer, redirect: impl FnOnce(&Peer)) -> i32 {
    match answer {
        Answer::Leave => GO_ON,
        Answer::Redirect(peer) => {
            redirect(peer);
            GO_ON
        }
        Answer::Reject => {
            let errno = CONFIG.word(offset_of!(Config, reject_errno));
            if errno != 0 {
                kernel::fail_with(errno as i32);
            }
            FAIL
        }
    }
}
