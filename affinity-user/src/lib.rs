//! The agent and the CLI of affinity, as a library: the binary, the tests, the demo and the benchmarks use it.
//!
//! Data flows one way: source -> snapshot -> desired -> plan -> [`store`]. The CLI reads only what is in the store.

pub mod agent;
pub mod attach;
pub mod cli;
pub mod desired;
pub mod events;
mod hash;
pub mod linger;
pub mod load;
mod local_ports;
pub mod metrics;
pub mod netns;
pub mod pins;
pub mod plan;
pub mod sockets;
pub mod source;
pub mod store;
pub mod sweep;
pub mod sys;
mod threads;
pub mod top;
pub mod view;

/// The objects that `build.rs` has built; empty if it skipped them.
pub mod objects {
    /// The programs and maps of the dataplane.
    pub static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/affinity"));

    /// The limit programs that `cargo xtask bench packet` compares the dataplane with.
    pub static LIMITS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/limits"));
}
