//! The kernel's memory and helpers, behind safe functions: the only module of this crate with `unsafe` code. Each file below
//! has one kind of access. Here are the configuration, the clock, and what concerns a program as a whole.
//!
//! Pointers that a caller passes come from the program's own context or from a lookup in a map. What is made of them may be
//! used until the program ends.
#![expect(unsafe_code, reason = "packets, map values and helpers are pointers; each block says why its use holds")]

mod bytes;
mod copy;
mod fib;
mod map;
mod skb;
mod socket;
mod xdp;

use core::{
    mem::{MaybeUninit, offset_of},
    ptr,
};

use affinity_common::abi::{CONFIG_MAGIC, Config};
use aya_ebpf::{EbpfContext, helpers, maps::ProgramArray};

pub use self::{
    copy::{read_copy, stable_copy},
    fib::{FibResult, redirect},
    map::{MapValue, with_percpu},
    skb::{BPF_F_IPV6, Skb},
    socket::{ReleasedSocket, SocketCall, set_errno},
    xdp::XdpFrame,
};

/// "Dual MIT/GPL" lets the programs use the kernel's GPL-only helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Never called: the verifier rejects a program that could reach this loop.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Read-only data that the loader sets.
#[repr(transparent)]
pub struct Rodata<T>(MaybeUninit<T>);

impl<T: Copy> Rodata<T> {
    /// The default value, which the loader reads.
    pub const fn new(value: T) -> Self {
        Self(MaybeUninit::new(value))
    }

    /// The `u64` at `offset`, as the loader set it.
    #[inline(always)]
    pub fn word(&self, offset: usize) -> u64 {
        const { assert!(align_of::<T>() == align_of::<u64>()) };
        // SAFETY: the value is initialised, and callers name a field by `offset_of!`. Volatile, because the loader changes a
        // value that the compiler treats as constant.
        unsafe { ptr::read_volatile(self.0.as_ptr().byte_add(offset).cast()) }
    }
}

/// Set by the loader before the programs are verified.
#[unsafe(no_mangle)]
pub static CONFIG: Rodata<Config> = Rodata::new(Config {
    magic: CONFIG_MAGIC,
    tick_ns: 0,
    tick_base: 0,
    reject_errno: 0,
    node_netns: 0,
    redirect: 0,
    takes_ipv6_flag: 0,
    rejection_interval_ns: 0,
    fixed_now_ns: 0,
    fixed_random: 0,
});

/// Whether TC redirects past the stack. The verifier knows the value, and removes the code that cannot run.
#[inline(always)]
pub fn redirects() -> bool {
    CONFIG.word(offset_of!(Config, redirect)) != 0
}

/// Whether `bpf_l4_csum_replace` takes [`BPF_F_IPV6`]. The verifier knows the value.
#[inline(always)]
pub fn takes_ipv6_flag() -> bool {
    CONFIG.word(offset_of!(Config, takes_ipv6_flag)) != 0
}

/// Calls a block as a global function, with the caller's variable that is named: the verifier checks the function once, apart
/// from its callers, because it is exported by its name (<https://docs.kernel.org/bpf/verifier.html>). The result is the
/// block's, or `u64::MAX` for a null pointer: no caller passes one, but the verifier requires the check.
#[macro_export]
macro_rules! global_func {
    ($name:ident($argument:ident: &$of:ty) $body:block) => {{
        #[expect(unsafe_code, reason = "the name is unique, and the argument a reference")]
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(pointer: *const $of) -> u64 {
            // SAFETY: the verifier makes callers pass memory of this size. It is not changed or freed meanwhile.
            match unsafe { pointer.as_ref() } {
                Some($argument) => $body,
                None => u64::MAX,
            }
        }
        $name($argument)
    }};
}

/// Jiffies: the verifier inlines the call to a load (kernel 5.6).
#[inline(always)]
pub fn jiffies() -> u64 {
    // SAFETY: no arguments.
    unsafe { helpers::bpf_jiffies64() }
}

/// CLOCK_MONOTONIC in nanoseconds.
#[inline(always)]
pub fn monotonic_ns() -> u64 {
    // SAFETY: no arguments.
    unsafe { helpers::bpf_ktime_get_ns() }
}

/// A random number.
#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: no arguments.
    unsafe { helpers::bpf_get_prandom_u32() }
}

/// Tail-calls another program; returns only if there is none at `index`.
#[inline(always)]
pub fn tail_call<C: EbpfContext>(programs: &ProgramArray, ctx: &C, index: u32) {
    // SAFETY: the loader puts only programs of the caller's type into the array; the kernel checks it too.
    unsafe { programs.tail_call(ctx, index) };
}
