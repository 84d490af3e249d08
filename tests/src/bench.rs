//! Benchmarks: what a packet costs, as ratios measured side by side; what connections cost through it, beside other ways;
//! and what a large cluster does.

pub mod connect;
pub mod packet;
mod spread;
pub mod sync;
