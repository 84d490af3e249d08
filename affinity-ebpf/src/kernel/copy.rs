//! Copies of values in maps that other processors change meanwhile, word by word. In a result of [`read_copy`], each word is
//! the old or the new one. A result of [`stable_copy`] is one whole record of its key.

use core::{mem::MaybeUninit, ptr};

use affinity_common::tables::Unstable;

/// A copy of an array's value. An array element never gets another key. If it changes during the copy, each word is either the
/// old one or the new one.
#[inline(always)]
pub fn read_copy<V: Copy>(pointer: Option<*const V>) -> Option<V> {
    pointer.map(|pointer| copy_words(pointer, 0))
}

/// Attempts to read a record, if it is replaced during each of them.
const MAX_READS: u32 = 4;

/// A copy of a record of a hash map in which other processors replace, remove and add elements. The copy is whole, and belongs
/// to the key that `lookup` looks up. `Err` if the record was replaced during each of [`MAX_READS`].
///
/// RCU does not guarantee that. The kernel frees an element without preallocation to a list of the processor. The next
/// insertion there takes it at once, with another key and value, while a program that has found it may still read it:
/// <https://elixir.bootlin.com/linux/v6.1/source/kernel/bpf/memalloc.c> (`unit_free`, `unit_alloc`), since Linux 6.1. RCU only
/// guarantees that the memory is not used for anything else. Elements of an LRU hash are reused in the same way, on all
/// kernels: <https://elixir.bootlin.com/linux/v6.1/source/kernel/bpf/bpf_lru_list.c>.
///
/// So the record is read twice, with another lookup in between that must find the same element:
///
/// * That lookup begins at the head of the bucket, so it finds the element in place (or just being removed). An element is put
///   in place only after it was written completely, with its key. So the element held a whole record of this key at some time
///   between the two readings.
/// * If the first reading is older than that, from another key or from a record that was just being written, its words differ
///   from those of the second one, unless the record in place has the same words. For a torn reading to be equal twice, the
///   element would have to be taken and freed several times in the nanoseconds between, each time with matching words at the
///   same cut.
/// * x86-64 does not reorder loads with each other. Neither do the compiler (the loads are volatile) and the call of the
///   helper.
///
/// If there is no record, the key is looked up again, because a lookup can miss a record that is being replaced: the kernel
/// puts the new element at the head of the bucket before it removes the old one. A search that has passed the head by then,
/// and has not reached the old element yet, finds neither
/// (<https://elixir.bootlin.com/linux/v6.1/source/kernel/bpf/hashtab.c>, `lookup_nulls_elem_raw`, `htab_map_update_elem`).
#[inline(always)]
pub fn stable_copy<V: Copy>(lookup: impl Fn() -> Option<*const V>) -> Result<Option<V>, Unstable> {
    for _ in 0..MAX_READS {
        let Some(first) = lookup().or_else(&lookup) else { return Ok(None) };
        let copy = copy_aligned(first, 0);
        if lookup() == Some(first) && has_words(first, &copy) {
            return Ok(Some(copy.value()));
        }
    }
    Err(Unstable)
}

/// Size in bytes of the longest words into which `len` bytes at `offset` of a map's value divide. The kernel aligns values to
/// eight bytes: <https://elixir.bootlin.com/linux/v6.1/source/include/linux/bpf.h> (`struct bpf_array`),
/// <https://elixir.bootlin.com/linux/v6.1/source/kernel/bpf/hashtab.c> (`htab_map_lookup_elem`).
#[inline(always)]
const fn word_len(offset: usize, len: usize) -> usize {
    match (offset | len) & 7 {
        0 => 8,
        4 => 4,
        2 | 6 => 2,
        _ => 1,
    }
}

/// Runs code for each word of a value at an offset in a map's value, with the word's number. The offset is known at compile
/// time.
macro_rules! for_each_word {
    ($value:ty, $offset:expr, |$at:ident, $word:ident| $work:expr) => {
        match word_len($offset, size_of::<$value>()) {
            8 => for_each_word!(u64, $value, |$at, $word| $work),
            4 => for_each_word!(u32, $value, |$at, $word| $work),
            2 => for_each_word!(u16, $value, |$at, $word| $work),
            _ => for_each_word!(u8, $value, |$at, $word| $work),
        }
    };
    ($unit:ty, $value:ty, |$at:ident, $word:ident| $work:expr) => {{
        type $word = $unit;
        let mut $at = 0;
        while $at < size_of::<$value>() / size_of::<$word>() {
            $work;
            $at += 1;
        }
    }};
}

/// A copy of a value, with the alignment of values in maps.
#[repr(C, align(8))]
struct Aligned<V>(MaybeUninit<V>);

impl<V: Copy> Aligned<V> {
    #[inline(always)]
    fn value(&self) -> V {
        // SAFETY: all words are written when the copy is made, and every bit pattern is a valid value.
        unsafe { self.0.assume_init() }
    }
}

/// A copy of a value in a map, word by word.
#[inline(always)]
pub(super) fn copy_words<V: Copy>(place: *const V, offset: usize) -> V {
    copy_aligned(place, offset).value()
}

#[inline(always)]
fn copy_aligned<V: Copy>(place: *const V, offset: usize) -> Aligned<V> {
    let mut copy = Aligned(MaybeUninit::<V>::uninit());
    // SAFETY: a lookup gave the pointer and the program has not ended since, so the memory is the map's and is not freed
    // (RCU), and it is aligned, see `word_len`. The words are all of the value. Volatile, because other CPUs write it.
    unsafe {
        for_each_word!(V, offset, |at, Word| {
            let word = ptr::read_volatile(place.cast::<Word>().add(at));
            copy.0.as_mut_ptr().cast::<Word>().add(at).write(word);
        });
    }
    copy
}

/// Writes a value into a map, word by word.
#[inline(always)]
pub(super) fn store_words<V: Copy>(place: *mut V, offset: usize, value: V) {
    let value = Aligned(MaybeUninit::new(value));
    // SAFETY: as for `copy_aligned`.
    unsafe {
        for_each_word!(V, offset, |at, Word| {
            ptr::write_volatile(place.cast::<Word>().add(at), value.0.as_ptr().cast::<Word>().add(at).read());
        });
    }
}

/// Whether a value in a map is now equal to a copy, word by word.
#[inline(always)]
#[expect(clippy::useless_conversion, reason = "the longest words have the length of the sum already")]
fn has_words<V: Copy>(place: *const V, copy: &Aligned<V>) -> bool {
    let mut differing = 0;
    // SAFETY: as for `copy_aligned`; values have no padding.
    unsafe {
        for_each_word!(V, 0, |at, Word| {
            let now = ptr::read_volatile(place.cast::<Word>().add(at));
            differing |= u64::from(now ^ copy.0.as_ptr().cast::<Word>().add(at).read());
        });
    }
    differing == 0
}
