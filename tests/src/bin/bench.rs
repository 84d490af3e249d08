//! `cargo xtask bench`: measurements on this machine.

use affinity_tests::bench::{packet, sync};
use clap::{Parser, Subcommand};

/// Measures the dataplane on this machine.
#[derive(Parser)]
#[command(name = "bench")]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Nanoseconds per packet by BPF_PROG_TEST_RUN, net of the wrapper.
    Packet(packet::Options),
    /// Start, memory, and the time from an event to the kernel, for a cluster of many services.
    Sync(sync::Options),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().bench {
        Bench::Packet(options) => packet::run(&options),
        Bench::Sync(options) => sync::run(&options),
    }
}
