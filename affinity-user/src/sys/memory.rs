//! Memory that maps share with the kernel: the values of arrays, and ring buffers. Every access is atomic.
#![expect(unsafe_code, reason = "maps are shared with the kernel by mmap")]

use std::{
    io,
    os::fd::AsFd,
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

use aya_obj::generated::bpf_map_type::{BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_RINGBUF};
use memmap2::{MmapOptions, MmapRaw};

use super::{Map, Result};

impl Map {
    /// Maps the values of an array created with `BPF_F_MMAPABLE` into memory, to read and write.
    ///
    /// # Errors
    /// [`SysError`](super::SysError) if the map is not of that kind.
    pub fn words(&self) -> Result<Words> {
        let stride = (self.info().value_size as usize).next_multiple_of(8);
        let len = stride * self.info().max_entries as usize;
        if self.info().kind != BPF_MAP_TYPE_ARRAY as u32 {
            return Err(self.error("mmap", io::Error::other("not an array")));
        }
        let map = MmapOptions::new().len(len).map_raw(&self.as_fd()).map_err(|error| self.error("mmap", error))?;
        Ok(Words { map, stride, entries: self.info().max_entries })
    }

    /// Maps a ring buffer into memory, to read it.
    ///
    /// # Errors
    /// [`SysError`](super::SysError) if the map is no ring buffer.
    pub fn ring(&self) -> Result<Ring> {
        if self.info().kind != BPF_MAP_TYPE_RINGBUF as u32 {
            return Err(self.error("mmap", io::Error::other("not a ring buffer")));
        }
        let page = rustix::param::page_size();
        let size = self.info().max_entries as usize;
        // The producer's page, and the data twice in a row, so that a record never ends at the buffer's end.
        let shared = MmapOptions::new().offset(page as u64).len(page + 2 * size).map_raw_read_only(&self.as_fd());
        let shared = shared.map_err(|error| self.error("mmap", error))?;
        Ok(Ring { shared, page, size })
    }

    /// Maps the page with the consumer's position of a ring buffer into memory.
    ///
    /// # Errors
    /// [`SysError`](super::SysError) if the map is no ring buffer.
    pub fn ring_consumer(&self) -> Result<RingConsumer> {
        if self.info().kind != BPF_MAP_TYPE_RINGBUF as u32 {
            return Err(self.error("mmap", io::Error::other("not a ring buffer")));
        }
        let page = MmapOptions::new().len(rustix::param::page_size()).map_raw(&self.as_fd());
        Ok(RingConsumer { page: page.map_err(|error| self.error("mmap", error))? })
    }
}

/// The values of an array, shared with the programs. Every access is one atomic load or store.
#[derive(Debug)]
pub struct Words {
    map: MmapRaw,
    stride: usize,
    entries: u32,
}

impl Words {
    /// Number of values.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.entries
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Panics if `index` is out of range.
    fn at(&self, index: u32) -> *mut u8 {
        assert!(index < self.entries, "index {index} of {} values", self.entries);
        self.map.as_mut_ptr().wrapping_add(index as usize * self.stride)
    }

    fn u32_at(&self, index: u32) -> &AtomicU32 {
        // SAFETY: within the mapping by the check in `at`; aligned, because the stride is a multiple of eight; and all accesses
        // of this process are atomic.
        unsafe { AtomicU32::from_ptr(self.at(index).cast()) }
    }

    fn u64_at(&self, index: u32) -> &AtomicU64 {
        // SAFETY: as in `u32_at`.
        unsafe { AtomicU64::from_ptr(self.at(index).cast()) }
    }

    /// A value of four bytes.
    #[must_use]
    pub fn load_u32(&self, index: u32) -> u32 {
        self.u32_at(index).load(Ordering::Acquire)
    }

    /// Writes a value of four bytes.
    pub fn store_u32(&self, index: u32, value: u32) {
        self.u32_at(index).store(value, Ordering::Release);
    }

    /// A value of eight bytes.
    #[must_use]
    pub fn load_u64(&self, index: u32) -> u64 {
        self.u64_at(index).load(Ordering::Acquire)
    }

    /// Writes a value of eight bytes.
    pub fn store_u64(&self, index: u32, value: u64) {
        self.u64_at(index).store(value, Ordering::Release);
    }

    /// Adds to a value of eight bytes; wraps.
    pub fn add_u64(&self, index: u32, difference: i64) {
        self.u64_at(index).fetch_add(difference as u64, Ordering::AcqRel);
    }

    /// Sets bits of a value of eight bytes.
    pub fn set_bits(&self, index: u32, bits: u64) {
        self.u64_at(index).fetch_or(bits, Ordering::AcqRel);
    }

    /// Clears bits of a value of eight bytes.
    pub fn clear_bits(&self, index: u32, bits: u64) {
        self.u64_at(index).fetch_and(!bits, Ordering::AcqRel);
    }
}

/// A ring buffer, read only: <https://docs.kernel.org/bpf/ringbuf.html>.
#[derive(Debug)]
pub struct Ring {
    shared: MmapRaw,
    page: usize,
    size: usize,
}

impl Ring {
    /// Bytes of the buffer.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// How many bytes were produced so far.
    #[must_use]
    pub fn produced(&self) -> u64 {
        // SAFETY: the producer's position is the first word of the first page of this mapping.
        unsafe { load_read_only(self.shared.as_mut_ptr().cast()) }
    }

    /// The eight bytes at a position, which must be a multiple of eight.
    ///
    /// The kernel may overwrite them meanwhile: compare [`Ring::produced`] after reading.
    #[must_use]
    pub fn word(&self, position: u64) -> u64 {
        assert_eq!(position % 8, 0, "a position in the ring is a multiple of eight");
        let offset = self.page + (position as usize & (self.size - 1));
        // SAFETY: the data follow the first page, `size` bytes (a power of two) twice; the mask keeps the offset within the
        // first copy, and it is aligned.
        unsafe { load_read_only(self.shared.as_mut_ptr().add(offset).cast()) }
    }
}

/// An acquiring load from memory that this process may not write. The only atomic access that is defined there is a relaxed
/// load of at most a machine word.
///
/// # Safety
/// `word` is aligned and valid to read, and all accesses of this process are atomic.
unsafe fn load_read_only(word: *mut u64) -> u64 {
    // SAFETY: the caller's promise.
    let value = unsafe { AtomicU64::from_ptr(word) }.load(Ordering::Relaxed);
    fence(Ordering::Acquire);
    value
}

/// How far a ring buffer was consumed: the kernel may overwrite everything before that.
#[derive(Debug)]
pub struct RingConsumer {
    page: MmapRaw,
}

impl RingConsumer {
    fn position(&self) -> &AtomicU64 {
        // SAFETY: the consumer's position is the first word of the buffer's first page; all access is atomic.
        unsafe { AtomicU64::from_ptr(self.page.as_mut_ptr().cast()) }
    }

    /// How many bytes were consumed.
    #[must_use]
    pub fn consumed(&self) -> u64 {
        self.position().load(Ordering::Acquire)
    }

    /// Gives everything before `position` back to the kernel.
    pub fn consume(&self, position: u64) {
        self.position().store(position, Ordering::Release);
    }
}
