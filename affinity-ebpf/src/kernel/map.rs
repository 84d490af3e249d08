//! Values that stay in their map, found by a lookup. Other processors use them at the same time, so each access to a field is
//! one load, one store or one atomic operation. Only values of per-CPU maps may be borrowed: see [`with_percpu`].

use core::{
    arch::asm,
    intrinsics::{AtomicOrdering, atomic_cxchg, atomic_or, atomic_xadd},
    mem::offset_of,
};

use affinity_common::{
    abi::{Address, BackendRef, Field, Flow, FlowScratch, Session, Usage},
    tables::{Entry, Pin},
};
use bytemuck::Pod;

use super::copy::{copy_words, store_words};

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
        copy_words(self.field_ptr(field), field.offset())
    }

    #[inline(always)]
    fn write<F: Pod>(&self, field: Field<V, F>, value: F) {
        store_words(self.field_ptr(field), field.offset(), value);
    }

    #[inline(always)]
    fn add_bits(&self, field: Field<V, u32>, bits: u32) -> u32 {
        // SAFETY: see `copy::copy_aligned`.
        unsafe { atomic_or::<u32, u32, { AtomicOrdering::SeqCst }>(self.field_ptr(field), bits) }
    }
}

impl<V: Pod> MapValue<V> {
    /// A pointer to a field.
    #[inline(always)]
    fn field_ptr<F: Pod>(self, field: Field<V, F>) -> *mut F {
        // SAFETY: a field lies within its record.
        unsafe { self.0.byte_add(field.offset()).cast() }
    }
}

impl MapValue<Session> {
    /// The backend as one word: other processors change its index and generation at once.
    const BACKEND: Field<Session, u64> = Field::new(offset_of!(Session, backend));
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

impl Pin for MapValue<Session> {
    /// The backend is read first and last. The times of another backend are written while the pin is marked as moving, so if
    /// both readings are equal, the times belong to that backend. If they differ, the times are read again.
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
        let (first, mut rest, pinned) = (self.read(Self::BACKEND), read(), self.read(Self::BACKEND));
        if first != pinned {
            rest = read();
        }
        let (draw, created_ns, last_used_ns, connections) = rest;
        Session {
            created_ns,
            last_used_ns,
            backend: bytemuck::must_cast(pinned),
            draw,
            connections,
            service: 0,
            uses: 0,
            reason: 0,
            pad: [0; 7],
        }
    }

    #[inline(always)]
    fn cas_backend(&self, from: BackendRef, to: BackendRef) -> bool {
        let (from, to) = (bytemuck::must_cast(from), bytemuck::must_cast(to));
        // SAFETY: see `copy::copy_aligned`; every change of this word is such an exchange.
        let (_, is_done) = unsafe {
            let word = self.field_ptr(Self::BACKEND);
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, from, to)
        };
        is_done
    }

    #[inline(always)]
    fn backend(&self) -> BackendRef {
        bytemuck::must_cast(self.read(Self::BACKEND))
    }

    #[inline(always)]
    fn connections(&self) -> u32 {
        self.read(Session::CONNECTIONS)
    }

    #[inline(always)]
    fn swap_connections(&self, from: u32, to: u32) -> bool {
        // SAFETY: see `copy::copy_aligned`; every change of this word is such an exchange.
        let (_, is_done) = unsafe {
            let word = self.field_ptr(Session::CONNECTIONS);
            atomic_cxchg::<u32, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, from, to)
        };
        is_done
    }
}

impl MapValue<u64> {
    /// Adds one to a word that belongs to this processor. A program on a cgroup may lose counts, because a packet can
    /// interrupt it between the load and the store.
    #[inline(always)]
    pub fn increment_own(self) {
        let count: u64 = copy_words(self.0, 0);
        store_words(self.0, 0, count.wrapping_add(1));
    }

    /// Adds to a word that other processors add to.
    #[inline(always)]
    pub fn add(self, amount: i64) {
        // SAFETY: see `copy::copy_aligned`; a map's value is aligned to eight bytes.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(self.0, amount as u64) };
    }

    /// Adds one, and returns the previous value.
    #[inline(always)]
    pub fn fetch_increment(self) -> u64 {
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
    pub fn counter(self, index: usize) -> Option<MapValue<u64>> {
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
fn barrier_var(number: usize) -> usize {
    let mut same = number;
    // SAFETY: no memory is touched, and the number stays as it is.
    unsafe { asm!("{same} += 0", same = inout(reg) same, options(pure, nomem, nostack)) };
    same
}

/// Calls `work` with this processor's value of a per-CPU map. No other program uses the value meanwhile: the packet programs
/// run with bottom halves off, so they do not interrupt each other. That does not hold on kernels with PREEMPT_RT, which the
/// loader refuses (docs/adr/0008), nor for programs on cgroups: a packet may interrupt them, so they must not call this.
#[inline(always)]
pub fn with_percpu<V, R>(pointer: Option<*mut V>, work: impl FnOnce(&mut V) -> R) -> Option<R> {
    // SAFETY: a lookup gave this pointer, see `copy::copy_aligned`; nothing else uses it, see above.
    pointer.map(|pointer| work(unsafe { &mut *pointer }))
}
