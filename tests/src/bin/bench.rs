//! `cargo xtask bench`: measurements on this machine.

use affinity_tests::bench::{connect, packet, sync};
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
    /// Connections, requests, a stream and datagrams through a node, beside kube-proxy's rules and plain routing.
    Connect(connect::Options),
    /// Both ends of `connect`: it starts this by itself.
    #[command(hide = true)]
    Ends,
    /// Start, memory, and the time from an event to the kernel, for a cluster of many services.
    Sync(sync::Options),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().bench {
        Bench::Packet(options) => packet::run(&options),
        Bench::Connect(options) => connect::run(&options),
        Bench::Ends => connect::both_ends(),
        Bench::Sync(options) => sync::run(&options),
    }
}
