//! What kernel programs are made of: frames, map values and helpers, behind safe functions.
#![no_std]
#![feature(asm_experimental_arch, core_intrinsics)]
#![expect(internal_features, reason = "the target has no atomic types with fetch_add, but the instruction")]

pub mod kernel;
