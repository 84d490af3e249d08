//! The memory of a frame, at any alignment. Each access is checked against the end of the frame, in a form that the verifier can
//! follow: beyond it, a read returns nothing and a write changes nothing.

use core::arch::asm;

/// The verifier follows offsets into a frame up to this bound.
const MAX_OFFSET: usize = 0x3fff;

/// Loads from a frame. In assembler, because headers are not aligned: the compiler would load byte by byte. If told not to, it
/// would also write to the stack unaligned, which the verifier rejects.
macro_rules! load {
    ($width:literal, $place:expr) => {{
        let value: u64;
        // SAFETY: the caller has checked that the bytes are in the frame, and the verifier checks it too.
        unsafe {
            asm!(concat!("{value} = *(", $width, " *)({place} + 0)"), place = in(reg) $place, value = lateout(reg) value,
                options(pure, readonly, nostack, preserves_flags));
        }
        value
    }};
}

/// Stores to a frame; see [`load`].
macro_rules! store {
    ($width:literal, $place:expr, $value:expr) => {{
        let (place, value): (usize, u64) = ($place, $value);
        // SAFETY: as for `load`; only this program uses the frame.
        unsafe {
            asm!(concat!("*(", $width, " *)({place} + 0) = {value}"), place = in(reg) place, value = in(reg) value,
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
        let place = self.place::<N>(offset)?;
        let mut bytes = [0; N];
        let mut at = 0;
        while at + 8 <= N {
            bytes[at..at + 8].copy_from_slice(&load!("u64", place + at).to_ne_bytes());
            at += 8;
        }
        if at + 4 <= N {
            bytes[at..at + 4].copy_from_slice(&(load!("u32", place + at) as u32).to_ne_bytes());
            at += 4;
        }
        if at + 2 <= N {
            bytes[at..at + 2].copy_from_slice(&(load!("u16", place + at) as u16).to_ne_bytes());
            at += 2;
        }
        if at < N {
            bytes[at] = load!("u8", place + at) as u8;
        }
        Some(bytes)
    }

    /// Overwrites `N` bytes at `offset`.
    #[inline(always)]
    pub(super) fn write<const N: usize>(&self, offset: usize, bytes: [u8; N]) -> bool {
        let Some(place) = self.place::<N>(offset) else { return false };
        let mut at = 0;
        while at + 8 <= N {
            store!("u64", place + at, u64::from_ne_bytes(chunk(&bytes, at)));
            at += 8;
        }
        if at + 4 <= N {
            store!("u32", place + at, u64::from(u32::from_ne_bytes(chunk(&bytes, at))));
            at += 4;
        }
        if at + 2 <= N {
            store!("u16", place + at, u64::from(u16::from_ne_bytes(chunk(&bytes, at))));
            at += 2;
        }
        if at < N {
            store!("u8", place + at, u64::from(bytes[at]));
        }
        true
    }

    /// Bytes between the two pointers.
    #[inline(always)]
    pub(super) fn size(&self) -> usize {
        self.end - self.start
    }

    #[inline(always)]
    fn place<const N: usize>(&self, offset: usize) -> Option<usize> {
        if offset > MAX_OFFSET {
            return None;
        }
        let mut bounded = offset;
        // SAFETY: no memory is touched. The compiler knows that this changes nothing and would omit it. The verifier needs it,
        // because it forgets that the register compared above and the one added below are equal.
        unsafe {
            asm!("{offset} &= {mask}", offset = inout(reg) bounded, mask = const MAX_OFFSET, options(pure, nomem, nostack))
        };
        let place = self.start + bounded;
        (place + N <= self.end).then_some(place)
    }
}
