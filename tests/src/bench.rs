//! Benchmarks: what a packet costs, as ratios measured side by side; and what a large cluster does.

pub mod packet;
pub mod sync;
