//! Benchmarks: the cost of a packet, as ratios measured side by side; the cost of connections, compared with other ways; and
//! the behaviour with a large cluster.

pub mod connect;
pub mod packet;
mod spread;
pub mod sync;
