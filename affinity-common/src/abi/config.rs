//! The one global that the loader sets.

use bytemuck::{Pod, Zeroable};

/// Read-only data of the programs, set at load; the verifier treats it as constants.
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
    /// The value that jiffies had when the monotonic clock was zero; wraps if that was before jiffies started.
    pub tick_base: u64,
    /// The error number of `connect()` to a frontend without endpoints; zero: `EPERM`, from the kernel.
    pub reject_errno: u64,
    /// The cookie of the node's network namespace, where loopback addresses have node ports. Zero: no namespace.
    pub node_netns: u64,
    /// One: TC redirects translated packets. Zero: they go through the network stack.
    pub redirect: u64,
    /// One: `bpf_l4_csum_replace` accepts `BPF_F_IPV6`. Zero: it does not.
    pub takes_ipv6_flag: u64,
    /// The interval between two rejections of a CPU in the long run, nanoseconds: see [`crate::reject::Bucket`]. Zero: no limit.
    pub rejection_interval_ns: u64,
    /// For tests: the time of the programs, nanoseconds. Zero: the kernel's clock.
    pub fixed_now_ns: u64,
    /// For tests: the random number of the programs, if `fixed_now_ns` is not zero.
    pub fixed_random: u64,
}

/// First word of [`Config`].
pub const CONFIG_MAGIC: u64 = 0x6166_6669_6e69_7479;
