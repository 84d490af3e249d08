//! Benchmarks: ratios measured side by side in one run, rounds interleaved.

pub mod packet;
