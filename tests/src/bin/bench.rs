//! `cargo xtask bench`: measurements on this machine, as ratios to what could not be done with less.

use affinity_tests::bench::packet;
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
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().bench {
        Bench::Packet(options) => packet::run(&options),
    }
}
