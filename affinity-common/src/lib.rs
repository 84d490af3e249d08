//! The code that kernel and user space share: the layout of every map ([`abi`]) and every decision about a packet.
//!
//! The crate is `no_std`. The kernel programs implement [`packet::Packet`] and [`tables::Tables`] on packet pointers
//! and BPF maps; the `model` feature implements them on byte vectors and BTreeMaps. So the same [`pipeline`] runs in
//! the kernel, in unit tests, in `affinity explain`, and as the reference of the differential tests.
#![cfg_attr(not(any(test, feature = "model")), no_std)]

pub mod abi;
pub mod checksum;
pub mod flow;
pub mod foreign;
pub mod fragment;
pub mod frontend;
pub mod global;
pub mod headers;
pub mod icmp;
#[cfg(any(test, feature = "model"))]
pub mod model;
pub mod names;
pub mod packet;
pub mod parse;
pub mod pipeline;
#[cfg(test)]
mod properties;
pub mod redirect;
pub mod reject;
pub mod rewrite;
pub mod select;
pub mod session;
pub mod snat;
pub mod socket;
pub mod state;
pub mod tables;
#[cfg(test)]
mod testing;
