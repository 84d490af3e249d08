//! The programs on a cgroup: each passes a process's socket call to the shared logic, and applies the answer.

use affinity_common::{
    abi::Config,
    socket::{self, Answer, Peer},
};
use affinity_ebpf::kernel::{self, CONFIG, ReleasedSocket, SocketCall};
use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};
use core::mem::offset_of;

use crate::tables::Maps;

/// Return values for the kernel: the call proceeds, or fails.
const PROCEED: i32 = 1;
const REJECT: i32 = 0;

/// An IPv4 socket connects, or an IPv6 socket to an IPv4 address in the cases that the kernel handles as IPv4.
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    let call = SocketCall::new(&ctx);
    let Some(caller) = call.caller() else { return PROCEED };
    let answer = socket::connect(&Maps, &caller, &call.peer_v4());
    apply(&answer, |peer| call.set_peer_v4(peer))
}

/// An IPv6 socket connects, perhaps to an IPv4-mapped address.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    let call = SocketCall::new(&ctx);
    let Some(caller) = call.caller() else { return PROCEED };
    let answer = socket::connect(&Maps, &caller, &call.peer_v6());
    apply(&answer, |peer| call.set_peer_v6(peer))
}

/// A datagram to a named IPv4 address.
#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    let call = SocketCall::new(&ctx);
    let Some(caller) = call.caller() else { return PROCEED };
    let answer = socket::send(&Maps, &caller, &call.peer_v4());
    apply(&answer, |peer| call.set_peer_v4(peer))
}

/// A datagram to a named IPv6 address. IPv4-mapped ones come as IPv4.
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    let call = SocketCall::new(&ctx);
    let Some(caller) = call.caller() else { return PROCEED };
    let answer = socket::send(&Maps, &caller, &call.peer_v6());
    apply(&answer, |peer| call.set_peer_v6(peer))
}

/// The kernel reports the sender of a datagram to an IPv4 socket.
#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    let call = SocketCall::new(&ctx);
    if let Some(caller) = call.caller()
        && let Some(frontend) = socket::received(&Maps, &caller, &call.peer_v4())
    {
        call.set_peer_v4(&frontend);
    }
    PROCEED
}

/// The kernel reports the sender of a datagram to an IPv6 socket.
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    let call = SocketCall::new(&ctx);
    if let Some(caller) = call.caller()
        && let Some(frontend) = socket::received(&Maps, &caller, &call.peer_v6())
    {
        call.set_peer_v6(&frontend);
    }
    PROCEED
}

/// `getpeername()` on an IPv4 socket.
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    let call = SocketCall::new(&ctx);
    if let Some(caller) = call.caller()
        && let Some(frontend) = socket::connected_to(&Maps, &caller, &call.peer_v4())
    {
        call.set_peer_v4(&frontend);
    }
    PROCEED
}

/// `getpeername()` on an IPv6 socket.
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    let call = SocketCall::new(&ctx);
    if let Some(caller) = call.caller()
        && let Some(frontend) = socket::connected_to(&Maps, &caller, &call.peer_v6())
    {
        call.set_peer_v6(&frontend);
    }
    PROCEED
}

/// A socket is closed.
#[cgroup_sock(sock_release)]
pub fn sock_release(ctx: SockContext) -> i32 {
    if let Some(caller) = ReleasedSocket::new(&ctx).caller() {
        socket::release(&Maps, &caller);
    }
    PROCEED
}

/// Applies the answer, and returns the program's result.
#[inline(always)]
fn apply(answer: &Answer, redirect: impl FnOnce(&Peer)) -> i32 {
    match answer {
        Answer::Leave => PROCEED,
        Answer::Redirect(peer) => {
            redirect(peer);
            PROCEED
        }
        Answer::Reject => {
            let errno = CONFIG.word(offset_of!(Config, reject_errno));
            if errno != 0 {
                kernel::set_errno(errno as i32);
            }
            REJECT
        }
    }
}
