//! The one global that the loader sets.

use bytemuck::{Pod, Zeroable};

/// Read-only data of the programs, set at load; the verifier folds it.
///
/// It starts with a magic number because LLVM may merge an all-zero global with a literal zero used as a map key, which
/// the loader would then change too.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Config {
    /// [`CONFIG_MAGIC`].
    pub magic: u64,
    /// Nanoseconds per jiffy of this kernel.
    pub tick_ns: u64,
    /// The value of jiffies when the monotonic clock was zero (may lie before it, so: wrapping).
    pub tick_base: u64,
    /// The error number that a socket is refused with where nobody is there; zero: the kernel's own, `EPERM`.
    pub reject_errno: u64,
    /// The cookie of the node's network namespace, whose loopback has node ports. Zero: none has.
    pub node_netns: u64,
    /// One: TC redirects what was translated past the stack. Zero: it goes through.
    pub redirect: u64,
    /// One: the kernel's `bpf_l4_csum_replace` takes `BPF_F_IPV6`. Zero: it refuses it.
    pub takes_ipv6_flag: u64,
    /// How often a processor may reject a packet in the long run: once in so many nanoseconds, see
    /// [`crate::reject::Bucket`]. Zero: there is no limit.
    pub rejection_interval_ns: u64,
    /// For tests: the time that the programs see, in nanoseconds. Zero: the kernel's clock.
    pub fixed_now_ns: u64,
    /// For tests: the random number that the programs draw, where `fixed_now_ns` is not zero.
    pub fixed_random: u64,
}

/// First word of [`Config`].
pub const CONFIG_MAGIC: u64 = 0x6166_6669_6e69_7479;
