//! What kernel and user space share: the layout of every map ([`abi`]) and every decision about a packet.
//!
//! The crate is `no_std`. The kernel programs implement `Packet` and [`tables::Tables`] on packet pointers
//! and BPF maps; the `model` feature implements them on byte vectors and BTreeMaps. So the same pipeline runs in
//! the kernel, in unit tests, in `affinity explain`, and as the reference of the differential tests.
#![cfg_attr(not(any(test, feature = "model")), no_std)]

pub mod abi;
pub mod checksum;
pub mod names;
pub mod tables;
