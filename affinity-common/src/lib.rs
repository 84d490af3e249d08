//! What kernel and user space share.
#![no_std]
