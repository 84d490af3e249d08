//! The memory of a frame, at any alignment. Each access is checked against the end of the frame, in a form that the verifier
//! can follow: beyond it, a read returns nothing and a write changes nothing.

use core::arch::asm;

/// The verifier follows offsets into a frame up to this bound.
const MAX_OFFSET: usize = 0x3fff;

/// Loads from a frame. In assembler, because headers are not aligned: the compiler would load byte by byte. If it were allowed
/// to use unaligned access, it would use it on the stack too, where the verifier rejects it.
macro_rules! load {
    ($width:literal, $address:expr) => {{
        let value: u64;
        // SAFETY: the caller has checked that the bytes are in the frame, and the verifier checks it too.
        unsafe {
            asm!(concat!("{value} = *(", $width, " *)({address} + 0)"), address = in(reg) $address, value = lateout(reg) value,
                options(pure, readonly, nostack, preserves_flags));
        }
        value
    }};
}

/// Stores to a frame; see [`load`].
macro_rules! store {
    ($width:literal, $address:expr, $value:expr) => {{
        let (address, value): (usize, u64) = ($address, $value);
        // SAFETY: as for `load`; only this program uses the frame.
        unsafe {
            asm!(concat!("*(", $width, " *)({address} + 0) = {value}"), address = in(reg) address, value = in(reg) value,
                options(nostack, preserves_flags));
        }
    }};
}

/// `N` bytes of an array.
#[inline(always)]
pub(super) fn chunk<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut chunk = [0; N];
    chunk.copy_from_slice(&bytes[at..at + N]);
    chunk
}

/// The memory of a frame between two pointers that the kernel gave.
#[derive(Clone, Copy)]
pub(super) struct Bytes {
    pub(super) start: usize,
    pub(super) end: usize,
}

impl Bytes {
    /// Copies `N` bytes at `offset`.
    #[inline(always)]
    pub(super) fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let address = self.address::<N>(offset)?;
        let mut bytes = [0; N];
        let mut at = 0;
        while at + 8 <= N {
            bytes[at..at + 8].copy_from_slice(&load!("u64", address + at).to_ne_bytes());
            at += 8;
        }
        if at + 4 <= N {
            bytes[at..at + 4].copy_from_slice(&(load!("u32", address + at) as u32).to_ne_bytes());
            at += 4;
        }
        if at + 2 <= N {
            bytes[at..at + 2].copy_from_slice(&(load!("u16", address + at) as u16).to_ne_bytes());
            at += 2;
        }
        if at < N {
            bytes[at] = load!("u8", address + at) as u8;
        }
        Some(bytes)
    }

    /// Overwrites `N` bytes at `offset`.
    #[inline(always)]
    pub(super) fn write<const N: usize>(&self, offset: usize, bytes: [u8; N]) -> bool {
        let Some(address) = self.address::<N>(offset) else { return false };
        let mut at = 0;
        while at + 8 <= N {
            store!("u64", address + at, u64::from_ne_bytes(chunk(&bytes, at)));
            at += 8;
        }
        if at + 4 <= N {
            store!("u32", address + at, u64::from(u32::from_ne_bytes(chunk(&bytes, at))));
            at += 4;
        }
        if at + 2 <= N {
            store!("u16", address + at, u64::from(u16::from_ne_bytes(chunk(&bytes, at))));
            at += 2;
        }
        if at < N {
            store!("u8", address + at, u64::from(bytes[at]));
        }
        true
    }

    /// Bytes between the two pointers.
    #[inline(always)]
    pub(super) fn size(&self) -> usize {
        self.end - self.start
    }

    #[inline(always)]
    fn address<const N: usize>(&self, offset: usize) -> Option<usize> {
        if offset > MAX_OFFSET {
            return None;
        }
        let mut bounded = offset;
        // SAFETY: no memory is touched. The compiler knows that this changes nothing and would omit it. The verifier needs it,
        // because it forgets that the register compared above and the one added below are equal.
        unsafe {
            asm!("{offset} &= {mask}", offset = inout(reg) bounded, mask = const MAX_OFFSET, options(pure, nomem, nostack))
        };
        let address = self.start + bounded;
        (address + N <= self.end).then_some(address)
    }
}
