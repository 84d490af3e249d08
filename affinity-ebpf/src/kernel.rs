//! The one file that touches raw pointers and calls helpers; everything above it is safe.
#![expect(unsafe_code, reason = "packets, map values and helpers are pointers; each block says why its use holds")]

use core::{
    arch::asm,
    intrinsics::{AtomicOrdering, atomic_cxchg, atomic_or, atomic_xadd},
    mem::{MaybeUninit, offset_of},
    ptr,
};

use affinity_common::{
    abi::{Address, CONFIG_MAGIC, Config, Correction, Event, Field, Flow, FlowScratch, Port, Session, Usage, V4, V6},
    packet::Packet,
    parse::{TCP, UDP},
    redirect::{FibKey, Link, NextHop},
    socket::{Caller, Peer},
    tables::{Entry, Pin, Unstable},
};
use aya_ebpf::{
    EbpfContext,
    bindings::{
        __sk_buff, BPF_CSUM_LEVEL_QUERY, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED,
        BPF_FIB_LKUP_RET_SUCCESS, bpf_adj_room_mode, bpf_fib_lookup, bpf_redir_neigh, bpf_sock, bpf_sock_addr, xdp_md,
    },
    helpers,
    maps::ProgramArray,
    programs::{SockAddrContext, SockContext, TcContext},
};
use bytemuck::Pod;

/// "Dual MIT/GPL" lets the programs use the kernel's GPL-only helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// No code here can panic in the kernel: the verifier would have to accept this loop, and does not.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The verifier follows offsets into a frame up to this bound.
const MAX_OFFSET: usize = 0x3fff;

/// Read-only data that the loader sets.
#[repr(transparent)]
pub struct Rodata<T>(MaybeUninit<T>);

impl<T: Copy> Rodata<T> {
    /// The default value, which the loader reads.
    pub const fn new(value: T) -> Self {
        Self(MaybeUninit::new(value))
    }

    /// The `u64` at `offset`, as the loader set it.
    #[inline(always)]
    pub fn word(&self, offset: usize) -> u64 {
        const { assert!(align_of::<T>() == align_of::<u64>()) };
        // SAFETY: the value is initialised, and callers name a field by `offset_of!`. Volatile, because the loader changes a
        // value that the compiler treats as constant.
        unsafe { ptr::read_volatile(self.0.as_ptr().byte_add(offset).cast()) }
    }
}

/// Set by the loader before the programs are verified.
#[unsafe(no_mangle)]
pub static CONFIG: Rodata<Config> = Rodata::new(Config {
    magic: CONFIG_MAGIC,
    tick_ns: 0,
    tick_base: 0,
    reject_errno: 0,
    node_netns: 0,
    redirect: 0,
    takes_ipv6_flag: 0,
    rejection_interval_ns: 0,
    fixed_now_ns: 0,
    fixed_random: 0,
});

/// Whether TC redirects past the stack. The verifier knows the value, and removes the code that cannot run.
#[inline(always)]
pub fn redirects() -> bool {
    CONFIG.word(offset_of!(Config, redirect)) != 0
}

/// Whether `bpf_l4_csum_replace` takes [`BPF_F_IPV6`]. The verifier knows the value.
#[inline(always)]
pub fn takes_ipv6_flag() -> bool {
    CONFIG.word(offset_of!(Config, takes_ipv6_flag)) != 0
}

/// Flag of `bpf_l4_csum_replace`: the header has no checksum of its own that would balance a full packet sum (kernel 6.16;
/// older ones reject it).
pub const BPF_F_IPV6: u64 = 1 << 7;

/// A value inside a map.
#[derive(Clone, Copy)]
pub struct MapValue<V>(*mut V);

impl<V> MapValue<V> {
    /// `pointer` is the result of a lookup in a map of this value type.
    #[inline(always)]
    pub fn new(pointer: *mut V) -> Self {
        Self(pointer)
    }
}

impl<V: Pod> Entry<V> for MapValue<V> {
    #[inline(always)]
    fn get(&self) -> V {
        copy_words(self.0, 0)
    }

    #[inline(always)]
    fn read<F: Pod>(&self, field: Field<V, F>) -> F {
        copy_words(self.place(field), field.offset())
    }

    #[inline(always)]
    fn write<F: Pod>(&self, field: Field<V, F>, value: F) {
        store_words(self.place(field), field.offset(), value);
    }

    #[inline(always)]
    fn add_bits(&self, field: Field<V, u32>, bits: u32) -> u32 {
        // SAFETY: see `copy_aligned`.
        unsafe { atomic_or::<u32, u32, { AtomicOrdering::SeqCst }>(self.place(field), bits) }
    }
}

impl<V: Pod> MapValue<V> {
    /// The address of a field.
    #[inline(always)]
    fn place<F: Pod>(self, field: Field<V, F>) -> *mut F {
        // SAFETY: a field lies within its record.
        unsafe { self.0.byte_add(field.offset()).cast() }
    }
}

impl MapValue<Session> {
    /// The backend and its generation as one word. Other processors change both at once.
    const PINNED: Field<Session, u64> = {
        assert!(offset_of!(Session, generation) == offset_of!(Session, backend) + 4);
        Field::new(offset_of!(Session, backend))
    };
}

impl<A: Address> MapValue<FlowScratch<A>> {
    /// The flow in scratch memory.
    #[inline(always)]
    pub fn flow(self) -> MapValue<Flow<A>> {
        const { assert!(offset_of!(FlowScratch<A>, flow).is_multiple_of(8)) };
        // SAFETY: a field lies within its record.
        MapValue(unsafe { self.0.byte_add(offset_of!(FlowScratch<A>, flow)).cast() })
    }
}

/// Two adjacent fields as one word, as the machine loads them.
#[inline(always)]
fn pair((first, second): (u32, u32)) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// The inverse of [`pair`].
#[inline(always)]
fn unpaired(pair: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = pair.to_ne_bytes();
    (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]))
}

impl Pin for MapValue<Session> {
    /// The backend is read first and last. A mover writes the times while the pin is marked as moving, so if both readings are
    /// equal, the times belong to that backend. If they differ, the times are read again.
    #[inline(always)]
    fn snapshot(&self) -> Session {
        let read = || {
            (
                self.read(Session::DRAW),
                self.read(Session::CREATED_NS),
                self.read(Session::LAST_USED_NS),
                self.read(Session::CONNECTIONS),
            )
        };
        let (first, mut rest, pinned) = (self.read(Self::PINNED), read(), self.read(Self::PINNED));
        if first != pinned {
            rest = read();
        }
        let (draw, created_ns, last_used_ns, connections) = rest;
        let (backend, generation) = unpaired(pinned);
        Session {
            created_ns,
            last_used_ns,
            backend,
            generation,
            draw,
            connections,
            service: 0,
            uses: 0,
            reason: 0,
            pad: [0; 7],
        }
    }

    #[inline(always)]
    fn cas_backend(&self, from: (u32, u32), to: (u32, u32)) -> bool {
        // SAFETY: see `copy_aligned`; every change of this word is such an exchange.
        let (_, is_done) = unsafe {
            let word = self.place(Self::PINNED);
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, pair(from), pair(to))
        };
        is_done
    }

    #[inline(always)]
    fn backend(&self) -> (u32, u32) {
        unpaired(self.read(Self::PINNED))
    }

    #[inline(always)]
    fn connections(&self) -> u32 {
        self.read(Session::CONNECTIONS)
    }

    #[inline(always)]
    fn swap_connections(&self, from: u32, to: u32) -> bool {
        // SAFETY: see `copy_aligned`; every change of this word is such an exchange.
        let (_, is_done) = unsafe {
            let word = self.place(Session::CONNECTIONS);
            atomic_cxchg::<u32, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, from, to)
        };
        is_done
    }
}

/// A copy of an array's value. An array element never gets another key. If it changes during the copy, each word is either the
/// old one or the new one.
#[inline(always)]
pub fn read_copy<V: Copy>(pointer: Option<*const V>) -> Option<V> {
    pointer.map(|pointer| copy_words(pointer, 0))
}

/// A global function: the verifier checks it once, apart from its callers, because it is exported by name
/// (<https://docs.kernel.org/bpf/verifier.html>). The body gets the argument that the caller passed by reference.
#[macro_export]
macro_rules! global_func {
    ($(#[$about:meta])* fn $name:ident($argument:ident: $of:ty) -> u64 $body:block) => {
        $(#[$about])*
        #[expect(unsafe_code, reason = "the name is unique")]
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name($argument: *const $of) -> u64 {
            let $argument = $crate::kernel::argument(Some($argument));
            $body
        }
    };
}

/// The argument of a global function. It is a pointer, because the verifier derives the size of the memory from its type,
/// and it may be null as far as the verifier knows.
#[inline(always)]
pub fn argument<'a, V>(pointer: Option<*const V>) -> Option<&'a V> {
    // SAFETY: the verifier makes every caller pass memory of this size, which is not changed or freed meanwhile.
    pointer.and_then(|pointer| unsafe { pointer.as_ref() })
}

/// Calls `work` with this processor's value of a per-CPU map. No other program uses the value meanwhile: the packet programs
/// run with bottom halves off, so they do not interrupt each other. That does not hold on kernels with PREEMPT_RT, which the
/// loader refuses (docs/adr/0008), nor for programs on cgroups: a packet may interrupt them, so they must not call this.
#[inline(always)]
pub fn with_percpu<V, R>(pointer: Option<*mut V>, work: impl FnOnce(&mut V) -> R) -> Option<R> {
    // SAFETY: a lookup gave this pointer, see `copy_aligned`; nothing else uses it, see above.
    pointer.map(|pointer| work(unsafe { &mut *pointer }))
}

/// How often a record is read if it is replaced during each reading.
const READINGS: u32 = 4;

/// A copy of a record of a hash map in which other processors replace, remove and add elements. The copy is whole, and belongs
/// to the key that `lookup` looks up. `Err` if the record was replaced during each of [`READINGS`].
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
/// puts the new element at the head of the bucket before it removes the old one. A search that has passed the head by then, and
/// has not reached the old element yet, finds neither (<https://elixir.bootlin.com/linux/v6.1/source/kernel/bpf/hashtab.c>,
/// `lookup_nulls_elem_raw`, `htab_map_update_elem`).
#[inline(always)]
pub fn stable_copy<V: Copy>(lookup: impl Fn() -> Option<*const V>) -> Result<Option<V>, Unstable> {
    for _ in 0..READINGS {
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
fn copy_words<V: Copy>(place: *const V, offset: usize) -> V {
    copy_aligned(place, offset).value()
}

#[inline(always)]
fn copy_aligned<V: Copy>(place: *const V, offset: usize) -> Aligned<V> {
    let mut copy = Aligned(MaybeUninit::<V>::uninit());
    // SAFETY: a lookup gave the pointer and the program has not ended since, so the memory is the map's and is not freed (RCU),
    // and it is aligned, see `word_len`. The words are all of the value. Volatile, because other CPUs write it.
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
fn store_words<V: Copy>(place: *mut V, offset: usize, value: V) {
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

impl MapValue<u64> {
    /// Adds one to a word that belongs to this processor. A program on a cgroup may lose counts, because a packet can interrupt
    /// it between the load and the store.
    #[inline(always)]
    pub fn count_own(self) {
        let count: u64 = copy_words(self.0, 0);
        store_words(self.0, 0, count.wrapping_add(1));
    }

    /// Adds to a word that other processors add to.
    #[inline(always)]
    pub fn add(self, amount: i64) {
        // SAFETY: see `copy_aligned`; a map's value is aligned to eight bytes.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(self.0, amount as u64) };
    }

    /// Adds one, and returns the previous value.
    #[inline(always)]
    pub fn count_up(self) -> u64 {
        // SAFETY: as above. Not relaxed, because the compiler drops the result of a relaxed addition.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(self.0, 1) }
    }

    /// Sets a bit of a word. Other processors and the agent set bits of it too.
    #[inline(always)]
    pub fn set_bit(self, bit: u32) {
        // SAFETY: as above.
        unsafe { atomic_or::<u64, u64, { AtomicOrdering::Relaxed }>(self.0, 1 << (bit % 64)) };
    }
}

impl MapValue<Usage> {
    /// One of the counts; `None` for an index beyond them.
    #[inline(always)]
    pub fn count(self, index: usize) -> Option<MapValue<u64>> {
        const COUNTS: usize = size_of::<Usage>() / size_of::<u64>();
        const { assert!(offset_of!(Usage, counts) == 0) };
        let index = barrier_var(index);
        // SAFETY: the place is within the value.
        (index < COUNTS).then(|| MapValue(unsafe { self.0.cast::<u64>().add(index) }))
    }
}

/// Hides a number's value from the compiler, as the kernel's `barrier_var` does. The compiler then compares the same register
/// that it uses as the index, so that the verifier sees the bound.
#[inline(always)]
pub fn barrier_var(number: usize) -> usize {
    let mut same = number;
    // SAFETY: no memory is touched, and the number stays as it is.
    unsafe { asm!("{same} += 0", same = inout(reg) same, options(pure, nomem, nostack)) };
    same
}

/// Jiffies: the verifier inlines the call to a load (kernel 5.6).
#[inline(always)]
pub fn jiffies() -> u64 {
    // SAFETY: no arguments.
    unsafe { helpers::bpf_jiffies64() }
}

/// CLOCK_MONOTONIC in nanoseconds.
#[inline(always)]
pub fn monotonic_ns() -> u64 {
    // SAFETY: no arguments.
    unsafe { helpers::bpf_ktime_get_ns() }
}

/// A random number.
#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: no arguments.
    unsafe { helpers::bpf_get_prandom_u32() }
}

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
fn chunk<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut chunk = [0; N];
    chunk.copy_from_slice(&bytes[at..at + N]);
    chunk
}

/// The memory of a frame between two pointers that the kernel gave.
#[derive(Clone, Copy)]
pub struct Bytes {
    start: usize,
    end: usize,
}

impl Bytes {
    /// Copies `N` bytes at `offset`.
    #[inline(always)]
    pub fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
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
    pub fn write<const N: usize>(&self, offset: usize, bytes: [u8; N]) -> bool {
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
    pub fn size(&self) -> usize {
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

/// The context of an XDP program.
#[derive(Clone, Copy)]
pub struct Xdp(*mut xdp_md);

impl Xdp {
    /// `ctx` is the program's own context.
    #[inline(always)]
    pub fn new(ctx: *mut xdp_md) -> Self {
        Self(ctx)
    }

    /// The linear part of the frame, valid until it is resized.
    #[inline(always)]
    pub fn bytes(self) -> Bytes {
        // SAFETY: the kernel gave the context; it lives as long as the program runs.
        unsafe { Bytes { start: (*self.0).data as usize, end: (*self.0).data_end as usize } }
    }

    /// Cuts the frame at its end, or grows it at its start: every driver leaves room there, not all do at the end.
    #[inline(always)]
    pub fn resize(self, len: usize) -> bool {
        // SAFETY: as above; the helpers check the length.
        unsafe {
            let delta = len as i32 - helpers::bpf_xdp_get_buff_len(self.0) as i32;
            if delta > 0 {
                helpers::bpf_xdp_adjust_head(self.0, -delta) == 0
            } else {
                helpers::bpf_xdp_adjust_tail(self.0, delta) == 0
            }
        }
    }

    /// Reserves room for [`Xdp::set_xdp_metadata`]; false if the driver has none.
    #[inline(always)]
    pub fn reserve_xdp_metadata(self) -> bool {
        // SAFETY: as above.
        unsafe { helpers::bpf_xdp_adjust_meta(self.0, -(size_of::<u32>() as i32)) == 0 }
    }

    /// Stores a word of metadata for TC.
    #[inline(always)]
    pub fn set_xdp_metadata(self, word: u32) {
        // SAFETY: as above.
        let room = unsafe { Bytes { start: (*self.0).data_meta as usize, end: (*self.0).data as usize } };
        room.write(0, word.to_ne_bytes());
    }

    /// Whether the whole frame is linear.
    #[inline(always)]
    pub fn is_linear(self) -> bool {
        // SAFETY: as above.
        unsafe { helpers::bpf_xdp_get_buff_len(self.0) as usize == self.bytes().size() }
    }

    /// The device that the frame arrived on.
    #[inline(always)]
    pub fn ifindex(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).ingress_ifindex }
    }

    /// Looks up the next hop of the packet.
    #[inline(always)]
    pub fn fib_lookup<A: Address>(self, key: &FibKey<A>, hop: &mut FibResult) {
        hop.look_up(self.0.cast(), self.ifindex(), key);
    }
}

/// The result of `bpf_fib_lookup`.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct FibResult {
    lookup: bpf_fib_lookup,
    answer: u32,
}

impl FibResult {
    /// The state before a lookup: no route.
    #[inline(always)]
    pub fn unknown() -> Self {
        // SAFETY: all zeroes are a valid lookup.
        Self { lookup: unsafe { MaybeUninit::zeroed().assume_init() }, answer: BPF_FIB_LKUP_RET_NOT_FWDED }
    }

    /// Drops the result.
    #[inline(always)]
    pub fn forget(&mut self) {
        self.answer = BPF_FIB_LKUP_RET_NOT_FWDED;
    }

    /// Looks up the next hop of a packet that arrived on the device `ifindex`. In place, because a copy of the lookup would
    /// take 64 bytes of stack.
    #[inline(always)]
    fn look_up<A: Address>(&mut self, ctx: *mut core::ffi::c_void, ifindex: u32, key: &FibKey<A>) {
        const LOOKUP: i32 = size_of::<bpf_fib_lookup>() as i32;
        const AF_INET: u8 = 2;
        const AF_INET6: u8 = 10;

        let lookup = &mut self.lookup;
        let is_v4 = A::BITS == V4::BITS;
        lookup.family = if is_v4 { AF_INET } else { AF_INET6 };
        lookup.l4_protocol = key.protocol;
        lookup.__bindgen_anon_1.tot_len = key.len;
        lookup.ifindex = ifindex;
        (lookup.sport, lookup.dport) = (u16::from_ne_bytes(key.sport.0), u16::from_ne_bytes(key.dport.0));
        if is_v4 {
            lookup.__bindgen_anon_2.tos = key.class;
        } else {
            lookup.__bindgen_anon_2.flowinfo = (u32::from(key.class) << 20).to_be();
        }
        // SAFETY: all fields of these unions are words.
        let (source, destination) =
            unsafe { (&mut lookup.__bindgen_anon_3.ipv6_src, &mut lookup.__bindgen_anon_4.ipv6_dst) };
        put_address(source, key.saddr);
        put_address(destination, key.daddr);
        // SAFETY: the context is the program's own, and the helper reads and writes as many bytes as its argument says; the
        // lookup has no padding.
        self.answer = unsafe { helpers::bpf_fib_lookup(ctx, &raw mut *lookup, LOOKUP, 0) as u32 };
    }

    /// The device of the route, if the stack would forward the packet.
    #[inline(always)]
    pub fn device(&self) -> Option<u32> {
        matches!(self.answer, BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH).then_some(self.lookup.ifindex)
    }

    /// Redirects the frame of a TC program with `bpf_redirect_neigh`, which resolves the link address. Returns the action.
    #[inline(always)]
    pub fn redirect_neigh(&self) -> i32 {
        const NEIGHBOUR: i32 = size_of::<bpf_redir_neigh>() as i32;
        // SAFETY: the helper reads as many bytes as its argument says, and the kernel checks the device. A packet of one family
        // may have a neighbour of the other (RFC 5549).
        unsafe {
            let mut neighbour: bpf_redir_neigh = MaybeUninit::zeroed().assume_init();
            neighbour.nh_family = u32::from(self.lookup.family);
            neighbour.__bindgen_anon_1.ipv6_nh = self.lookup.__bindgen_anon_4.ipv6_dst;
            helpers::bpf_redirect_neigh(self.lookup.ifindex, &raw mut neighbour, NEIGHBOUR, 0) as i32
        }
    }

    /// Redirects the frame of a TC program with `bpf_redirect_peer`, into the pod's namespace. Returns the action.
    #[inline(always)]
    pub fn redirect_peer(&self) -> i32 {
        // SAFETY: the kernel checks the device.
        unsafe { helpers::bpf_redirect_peer(self.lookup.ifindex, 0) as i32 }
    }
}

impl NextHop for FibResult {
    /// Known only if the neighbour entry is known.
    #[inline(always)]
    fn link(&self) -> Option<Link> {
        let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (self.lookup.dmac, self.lookup.smac);
        (self.answer == BPF_FIB_LKUP_RET_SUCCESS).then_some([a, b, c, d, e, f, g, h, i, j, k, l])
    }
}

/// Writes an address into the lookup, IPv4 into the first word. IPv6 as bytes: the compiler would assemble words byte by byte,
/// on the stack.
#[inline(always)]
fn put_address<A: Address>(place: &mut [u32; 4], address: A) {
    let mapped = address.to_mapped();
    if A::BITS == V4::BITS {
        let V4(address) = V4::from_mapped(mapped);
        place[0] = u32::from_ne_bytes(address);
    } else {
        // SAFETY: four words are sixteen bytes, and every bit pattern is valid.
        unsafe { ptr::from_mut(place).cast::<[u8; 16]>().write(mapped) };
    }
}

/// The mark of [`SkBuff::mark_final`]. A random number, so that other programs do not use it.
const FINAL: u32 = 0xa4f1;

/// The context of a TC program.
#[derive(Clone, Copy)]
pub struct SkBuff(*mut __sk_buff);

impl SkBuff {
    /// `ctx` is the program's own context.
    #[inline(always)]
    pub fn new(ctx: *mut __sk_buff) -> Self {
        Self(ctx)
    }

    /// The linear part of the frame, valid until it is resized or a checksum is replaced.
    #[inline(always)]
    pub fn bytes(self) -> Bytes {
        // SAFETY: the kernel gave the context; it lives as long as the program runs.
        unsafe { Bytes { start: (*self.0).data as usize, end: (*self.0).data_end as usize } }
    }

    /// The frame's length in bytes.
    #[inline(always)]
    pub fn size(self) -> usize {
        // SAFETY: as above.
        unsafe { (*self.0).len as usize }
    }

    /// Makes the first `len` bytes linear.
    #[inline(always)]
    pub fn pull(self, len: usize) {
        // SAFETY: as above. If it fails, the frame is unchanged, and reads beyond its linear part fail.
        unsafe { helpers::bpf_skb_pull_data(self.0, len as u32) };
    }

    /// Cuts or grows the frame at its end.
    #[inline(always)]
    pub fn resize(self, len: usize) -> bool {
        // SAFETY: as above; the helper checks the length.
        unsafe { helpers::bpf_skb_change_tail(self.0, len as u32, 0) == 0 }
    }

    /// Removes `len` bytes behind the link header. False, and no change, if the frame is not IP or is too short.
    #[inline(always)]
    pub fn cut(self, len: usize) -> bool {
        // SAFETY: as above; the helper checks the length.
        unsafe { helpers::bpf_skb_adjust_room(self.0, -(len as i32), bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, 0) == 0 }
    }

    /// Adds an outer VLAN tag to the frame; false if there is no memory.
    #[inline(always)]
    pub fn tag(self, protocol: u16, id: u16) -> bool {
        // SAFETY: as above.
        unsafe { helpers::bpf_skb_vlan_push(self.0, protocol.to_be(), id) == 0 }
    }

    /// Whether a device has verified the transport checksum (`CHECKSUM_UNNECESSARY`).
    #[inline(always)]
    pub fn is_verified(self) -> bool {
        // SAFETY: as above.
        unsafe { helpers::bpf_csum_level(self.0, u64::from(BPF_CSUM_LEVEL_QUERY)) >= 0 }
    }

    /// Updates the transport checksum at `offset`, however far it has been computed.
    #[inline(always)]
    pub fn replace_l4_checksum(self, offset: usize, difference: u64, flags: u64) -> bool {
        // SAFETY: as above; the helper checks the offset.
        unsafe { helpers::bpf_l4_csum_replace(self.0, offset as u32, 0, difference, flags) == 0 }
    }

    /// The device that the frame arrived on.
    #[inline(always)]
    pub fn ifindex(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).ifindex }
    }

    /// Marks the frame for later programs of this node, in its traffic control index. Nothing else uses that field except
    /// `tcindex` classifiers and the `dsmark` qdisc, both removed in Linux 6.3
    /// (<https://elixir.bootlin.com/linux/v6.3/A/ident/tc_index>).
    #[inline(always)]
    pub fn mark_final(self) {
        // SAFETY: as above; TC programs may write this field.
        unsafe { (*self.0).tc_index = FINAL };
    }

    /// Whether the frame has the mark.
    #[inline(always)]
    pub fn is_final(self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0).tc_index == FINAL }
    }

    /// The metadata that XDP stored.
    #[inline(always)]
    pub fn xdp_metadata(self) -> Option<u32> {
        // SAFETY: as above.
        let left = unsafe { Bytes { start: (*self.0).data_meta as usize, end: (*self.0).data as usize } };
        left.read(0).map(u32::from_ne_bytes)
    }

    /// Whether the frame was sent to the device that it arrived on, and has no VLAN tag outside its data.
    #[inline(always)]
    pub fn is_for_this_device(self) -> bool {
        const PACKET_HOST: u32 = 0;
        // SAFETY: as above.
        unsafe { (*self.0).pkt_type == PACKET_HOST && (*self.0).vlan_present == 0 }
    }

    /// Bytes of data in each packet that the frame will be cut into (GSO); `None` if it will not be cut.
    #[inline(always)]
    pub fn segment_size(self) -> Option<u16> {
        // SAFETY: as above. The kernel's field has 16 bits.
        let size = unsafe { (*self.0).gso_size };
        if size == 0 { None } else { Some(size as u16) }
    }

    /// Looks up the next hop of the packet.
    #[inline(always)]
    pub fn fib_lookup<A: Address>(self, key: &FibKey<A>, hop: &mut FibResult) {
        hop.look_up(self.0.cast(), self.ifindex(), key);
    }

    /// Tail-calls another program; returns only if there is none at `index`.
    #[inline(always)]
    pub fn tail_call(self, programs: &ProgramArray, index: u32) {
        tail_call(programs, &TcContext::new(self.0), index);
    }

    /// Sends the frame out of the device that it arrived on. Returns the action.
    #[inline(always)]
    pub fn send_back(self) -> i32 {
        // SAFETY: as above.
        unsafe { helpers::bpf_redirect(self.ifindex(), 0) as i32 }
    }
}

/// Loads a word of a context: the verifier requires each load at an offset of the context itself.
macro_rules! context_word {
    ($ctx:expr, $offset:expr) => {{
        let word: u64;
        // SAFETY: the kernel gave the context, it lives as long as the program runs, and the field is a word in it.
        unsafe {
            asm!("{word} = *(u32 *)({ctx} + {offset})", word = out(reg) word, ctx = in(reg) $ctx,
                offset = const $offset, options(readonly, nostack))
        };
        word as u32
    }};
}

/// Stores a word of a context.
macro_rules! set_context_word {
    ($ctx:expr, $offset:expr, $word:expr) => {{
        // SAFETY: as for loads; the verifier knows which fields a program may change.
        unsafe {
            asm!("*(u32 *)({ctx} + {offset}) = {word}", ctx = in(reg) $ctx, word = in(reg) u64::from($word),
                offset = const $offset, options(nostack))
        }
    }};
}

/// The context of a program that runs for a call on a socket, with the peer address of the call.
#[derive(Clone, Copy)]
pub struct SockAddr(*mut bpf_sock_addr);

const USER_IP6: usize = offset_of!(bpf_sock_addr, user_ip6);

impl SockAddr {
    /// From the program's own context.
    #[inline(always)]
    pub fn new(ctx: &SockAddrContext) -> Self {
        Self(ctx.sock_addr)
    }

    /// The socket; `None` if its protocol is neither TCP nor UDP.
    #[inline(always)]
    pub fn caller(self) -> Option<Caller> {
        let protocol = spoken(context_word!(self.0, offset_of!(bpf_sock_addr, protocol)))?;
        // SAFETY: the helpers take the program's own context.
        let (cookie, netns) =
            unsafe { (helpers::bpf_get_socket_cookie(self.0.cast()), helpers::bpf_get_netns_cookie(self.0.cast())) };
        Some(Caller { cookie, netns, protocol })
    }

    /// The peer, if it is IPv4.
    #[inline(always)]
    pub fn peer_v4(self) -> Peer {
        let address = context_word!(self.0, offset_of!(bpf_sock_addr, user_ip4));
        Peer { address: V6(V4(address.to_ne_bytes()).to_mapped()), port: self.port() }
    }

    /// The peer, if it is IPv6.
    #[inline(always)]
    pub fn peer_v6(self) -> Peer {
        let words = [
            context_word!(self.0, USER_IP6),
            context_word!(self.0, USER_IP6 + 4),
            context_word!(self.0, USER_IP6 + 8),
            context_word!(self.0, USER_IP6 + 12),
        ];
        let mut address = [0; 16];
        for (place, word) in address.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        Peer { address: V6(address), port: self.port() }
    }

    /// Replaces the peer, IPv4.
    #[inline(always)]
    pub fn set_peer_v4(self, peer: &Peer) {
        let V4(address) = V4::from_mapped(peer.address.0);
        set_context_word!(self.0, offset_of!(bpf_sock_addr, user_ip4), u32::from_ne_bytes(address));
        self.set_port(peer.port);
    }

    /// Replaces the peer, IPv6.
    #[inline(always)]
    pub fn set_peer_v6(self, peer: &Peer) {
        let V6(address) = peer.address;
        set_context_word!(self.0, USER_IP6, u32::from_ne_bytes(chunk(&address, 0)));
        set_context_word!(self.0, USER_IP6 + 4, u32::from_ne_bytes(chunk(&address, 4)));
        set_context_word!(self.0, USER_IP6 + 8, u32::from_ne_bytes(chunk(&address, 8)));
        set_context_word!(self.0, USER_IP6 + 12, u32::from_ne_bytes(chunk(&address, 12)));
        self.set_port(peer.port);
    }

    /// The field is a word: the port in network byte order, widened.
    #[inline(always)]
    fn port(self) -> Port {
        let port = context_word!(self.0, offset_of!(bpf_sock_addr, user_port)) as u16;
        Port(port.to_ne_bytes())
    }

    #[inline(always)]
    fn set_port(self, Port(port): Port) {
        set_context_word!(self.0, offset_of!(bpf_sock_addr, user_port), u32::from(u16::from_ne_bytes(port)));
    }
}

/// The context of a program that runs when a socket is closed.
#[derive(Clone, Copy)]
pub struct Release(*mut bpf_sock);

impl Release {
    /// From the program's own context.
    #[inline(always)]
    pub fn new(ctx: &SockContext) -> Self {
        Self(ctx.sock)
    }

    /// The socket; `None` if its protocol was neither TCP nor UDP. Its namespace no longer matters.
    #[inline(always)]
    pub fn caller(self) -> Option<Caller> {
        let protocol = spoken(context_word!(self.0, offset_of!(bpf_sock, protocol)))?;
        // SAFETY: the helper takes the program's own context.
        let cookie = unsafe { helpers::bpf_get_socket_cookie(self.0.cast()) };
        Some(Caller { cookie, netns: 0, protocol })
    }
}

/// A protocol that is translated.
#[inline(always)]
fn spoken(protocol: u32) -> Option<u8> {
    if protocol == u32::from(TCP) {
        Some(TCP)
    } else if protocol == u32::from(UDP) {
        Some(UDP)
    } else {
        None
    }
}

/// The call that this program fails returns this error number instead of `EPERM`, if the kernel has the helper.
#[inline(always)]
pub fn fail_with(errno: i32) {
    // SAFETY: no pointers.
    unsafe { helpers::bpf_set_retval(-errno) };
}

/// Tail-calls another program; returns only if there is none at `index`.
#[inline(always)]
pub fn tail_call<C: EbpfContext>(programs: &ProgramArray, ctx: &C, index: u32) {
    // SAFETY: the loader puts only programs of the caller's type into the array; the kernel checks it too.
    unsafe { programs.tail_call(ctx, index) };
}

/// Redirects the frame of an XDP program to another device. Returns the action.
#[inline(always)]
pub fn redirect(ifindex: u32) -> u32 {
    // SAFETY: the kernel checks the device.
    unsafe { helpers::bpf_redirect(ifindex, 0) as u32 }
}

/// Offset at which the agent writes into its packets: behind the room for a link header.
const BEHIND_LINK_HEADER: usize = 14;

/// The event that the agent wrote into a packet.
#[inline(always)]
pub fn event_of(packet: &impl Packet) -> Option<Event> {
    let bytes: [u8; size_of::<Event>()] = packet.read(BEHIND_LINK_HEADER)?;
    // SAFETY: an event is plain data of this size, for which every bit pattern is valid.
    Some(unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) })
}

/// The correction that the agent wrote into a packet.
#[inline(always)]
pub fn correction_of(packet: &impl Packet) -> Option<Correction> {
    let bytes: [u8; size_of::<Correction>()] = packet.read(BEHIND_LINK_HEADER)?;
    // SAFETY: as for events.
    Some(unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) })
}
