//! The objects that `build.rs` has built; empty if it was told to skip them.

/// The programs and maps of the dataplane.
pub static PROGRAMS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/affinity"));

/// The limit programs that `cargo xtask bench packet` compares the dataplane with.
pub static LIMITS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/limits"));
