//! Opening a connection, as functions that the verifier takes by themselves: once, and not for every way that leads to
//! them. What they are given is checked for them.
#![expect(unsafe_code, reason = "such functions are known by their names")]

use affinity_common::{
    abi::{Reason, V4, V6},
    parse::Headers,
    pipeline::{self, Opened},
};
use affinity_ebpf::kernel;

use crate::tables::Maps;

macro_rules! open {
    ($name:ident, $address:ty) => {
        /// [`pipeline::open`] for one family: the bits of an [`Opened`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(headers: *const Headers<$address>) -> u64 {
            match kernel::argument(Some(headers)) {
                Some(headers) => pipeline::open(&Maps, headers),
                None => Opened::Failed(Reason::Inconsistent),
            }
            .to_bits()
        }
    };
}

open!(open_v4, V4);
open!(open_v6, V6);
