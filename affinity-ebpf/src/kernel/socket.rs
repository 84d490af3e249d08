//! The socket calls that programs on a cgroup run for. They read and replace the peer of the call; the kernel checks which
//! fields a program may change.

use core::{arch::asm, mem::offset_of};

use affinity_common::{
    abi::{Address, Port, V4, V6},
    headers::{TCP, UDP},
    socket::{Caller, Peer},
};
use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers,
    programs::{SockAddrContext, SockContext},
};

use super::bytes::chunk;

/// Loads a word of a context: the verifier requires each load at an offset of the context itself.
macro_rules! context_word {
    ($ctx:expr, $offset:expr) => {{
        let word: u64;
        // SAFETY: the kernel gave the context, it lives as long as the program runs, and the field is a word in it.
        unsafe {
            asm!("{word} = *(u32 *)({ctx} + {offset})", word = out(reg) word, ctx = in(reg) $ctx,
                offset = const $offset, options(readonly, nostack))
        };
        word as u32
    }};
}

/// Stores a word of a context.
macro_rules! set_context_word {
    ($ctx:expr, $offset:expr, $word:expr) => {{
        // SAFETY: as for loads; the verifier knows which fields a program may change.
        unsafe {
            asm!("*(u32 *)({ctx} + {offset}) = {word}", ctx = in(reg) $ctx, word = in(reg) u64::from($word),
                offset = const $offset, options(nostack))
        }
    }};
}

/// The context of a program that runs for a call on a socket, with the peer address of the call.
#[derive(Clone, Copy)]
pub struct SocketCall(*mut bpf_sock_addr);

const USER_IP6: usize = offset_of!(bpf_sock_addr, user_ip6);

impl SocketCall {
    /// From the program's own context.
    #[inline(always)]
    pub fn new(ctx: &SockAddrContext) -> Self {
        Self(ctx.sock_addr)
    }

    /// The socket; `None` if its protocol is neither TCP nor UDP.
    #[inline(always)]
    pub fn caller(self) -> Option<Caller> {
        let protocol = translated_protocol(context_word!(self.0, offset_of!(bpf_sock_addr, protocol)))?;
        // SAFETY: the helpers take the program's own context.
        let (cookie, netns) =
            unsafe { (helpers::bpf_get_socket_cookie(self.0.cast()), helpers::bpf_get_netns_cookie(self.0.cast())) };
        Some(Caller { cookie, netns, protocol })
    }

    /// The peer, if it is IPv4.
    #[inline(always)]
    pub fn peer_v4(self) -> Peer {
        let address = context_word!(self.0, offset_of!(bpf_sock_addr, user_ip4));
        Peer { address: V6(V4(address.to_ne_bytes()).to_mapped()), port: self.port() }
    }

    /// The peer, if it is IPv6.
    #[inline(always)]
    pub fn peer_v6(self) -> Peer {
        let words = [
            context_word!(self.0, USER_IP6),
            context_word!(self.0, USER_IP6 + 4),
            context_word!(self.0, USER_IP6 + 8),
            context_word!(self.0, USER_IP6 + 12),
        ];
        let mut address = [0; 16];
        for (place, word) in address.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        Peer { address: V6(address), port: self.port() }
    }

    /// Replaces the peer, IPv4.
    #[inline(always)]
    pub fn set_peer_v4(self, peer: &Peer) {
        let V4(address) = V4::from_mapped(peer.address.0);
        set_context_word!(self.0, offset_of!(bpf_sock_addr, user_ip4), u32::from_ne_bytes(address));
        self.set_port(peer.port);
    }

    /// Replaces the peer, IPv6.
    #[inline(always)]
    pub fn set_peer_v6(self, peer: &Peer) {
        let V6(address) = peer.address;
        set_context_word!(self.0, USER_IP6, u32::from_ne_bytes(chunk(&address, 0)));
        set_context_word!(self.0, USER_IP6 + 4, u32::from_ne_bytes(chunk(&address, 4)));
        set_context_word!(self.0, USER_IP6 + 8, u32::from_ne_bytes(chunk(&address, 8)));
        set_context_word!(self.0, USER_IP6 + 12, u32::from_ne_bytes(chunk(&address, 12)));
        self.set_port(peer.port);
    }

    /// The field is a word: the port in network byte order, widened.
    #[inline(always)]
    fn port(self) -> Port {
        let port = context_word!(self.0, offset_of!(bpf_sock_addr, user_port)) as u16;
        Port(port.to_ne_bytes())
    }

    #[inline(always)]
    fn set_port(self, Port(port): Port) {
        set_context_word!(self.0, offset_of!(bpf_sock_addr, user_port), u32::from(u16::from_ne_bytes(port)));
    }
}

/// The context of a program that runs when a socket is closed.
#[derive(Clone, Copy)]
pub struct ReleasedSocket(*mut bpf_sock);

impl ReleasedSocket {
    /// From the program's own context.
    #[inline(always)]
    pub fn new(ctx: &SockContext) -> Self {
        Self(ctx.sock)
    }

    /// The socket; `None` if its protocol was neither TCP nor UDP. Its namespace no longer matters.
    #[inline(always)]
    pub fn caller(self) -> Option<Caller> {
        let protocol = translated_protocol(context_word!(self.0, offset_of!(bpf_sock, protocol)))?;
        // SAFETY: the helper takes the program's own context.
        let cookie = unsafe { helpers::bpf_get_socket_cookie(self.0.cast()) };
        Some(Caller { cookie, netns: 0, protocol })
    }
}

/// The protocol, if sockets of it are translated.
#[inline(always)]
fn translated_protocol(protocol: u32) -> Option<u8> {
    if protocol == u32::from(TCP) {
        Some(TCP)
    } else if protocol == u32::from(UDP) {
        Some(UDP)
    } else {
        None
    }
}

/// Sets the error number that a rejected call returns instead of `EPERM`. Only for kernels with this helper.
#[inline(always)]
pub fn set_errno(errno: i32) {
    // SAFETY: no pointers.
    unsafe { helpers::bpf_set_retval(-errno) };
}
