//! Determines which bits of the filter are not needed any more.
//!
//! Plans only set bits, in the parts for frontends and members. (The programs' own parts are bounded by the number of ports of
//! the node and its pods, and stay.) A frontend or a member of a pool needs its bit, and so does a flow that began while one of
//! these existed. A bit is cleared when two consecutive passes found no need and no plan has set bits since the first: then
//! every flow that could need it has been met. Plans run on another thread; [`FilterPlans`] informs the sweep of them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use affinity_common::abi::{Address, Direction, FILTER_BITS, FrontendKey, Port, V4, V6, filter_bit};

use crate::{store::kernel::filter_word, sys::Words};

/// The size of the parts that plans write.
const WORDS: usize = 2 * FILTER_BITS as usize / 64;

/// A copy of the filter's bits.
type Bits = Vec<u64>;

/// The plans that set bits of the filter: while one is running, no bit is cleared.
#[derive(Debug, Default)]
pub struct FilterPlans(Mutex<Plans>);

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Plans {
    /// How many have begun.
    begun: u64,
    /// How many of these have not ended.
    underway: u64,
}

/// A plan that sets bits; it ends when this is dropped.
#[derive(Debug)]
pub struct FilterPlan(Arc<FilterPlans>);

impl FilterPlans {
    /// Call this before the first bit is set. The plan ends when the records that need the bits are published.
    #[must_use]
    pub fn begin(self: &Arc<Self>) -> FilterPlan {
        let mut plans = self.lock();
        plans.begun += 1;
        plans.underway += 1;
        FilterPlan(Arc::clone(self))
    }

    fn lock(&self) -> MutexGuard<'_, Plans> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for FilterPlan {
    fn drop(&mut self) {
        self.0.lock().underway -= 1;
    }
}

/// The bits that are needed, as far as a pass has seen.
#[derive(Debug)]
pub(super) struct FilterUse {
    needed: Bits,
    /// Bits for which the last complete pass found no need; `None` if there was no pass, or if a plan came in between.
    idle: Option<Bits>,
    plans: Arc<FilterPlans>,
    /// The plans known when the last pass began.
    known: Plans,
}

impl FilterUse {
    pub(super) fn new(plans: Arc<FilterPlans>) -> Self {
        Self { needed: vec![0; WORDS], idle: None, plans, known: Plans::default() }
    }

    pub(super) fn begin(&mut self) {
        self.needed.fill(0);
        let known = *self.plans.lock();
        if known.begun != self.known.begun {
            self.idle = None;
        }
        self.known = known;
    }

    fn need(&mut self, direction: Direction, bit: u32) {
        let (word, mask) = filter_word(direction, bit);
        self.needed[word as usize] |= mask;
    }

    /// Marks a frontend, or the destination of a client's packets.
    pub(super) fn need_frontend<A: Address>(&mut self, key: &FrontendKey<A>) {
        self.need(Direction::Dnat, filter_bit(key.address, key.port, key.protocol));
    }

    /// Marks the source of replies.
    pub(super) fn need_source<A: Address>(&mut self, address: A, port: Port, protocol: u8) {
        self.need(Direction::RevDnat, filter_bit(address, port, protocol));
    }

    /// Marks a member. Its address is hashed in its own family.
    pub(super) fn need_member(&mut self, mapped: [u8; 16], port: Port, protocol: u8) {
        let v4 = V4::from_mapped(mapped);
        if v4.to_mapped() == mapped {
            self.need_source(v4, port, protocol);
        } else {
            self.need_source(V6::from_mapped(mapped), port, protocol);
        }
    }

    /// Clears unneeded bits at the end of a pass, and returns their number.
    pub(super) fn finish(&mut self, filter: &Words) -> u32 {
        // No plan begins while this lock is held.
        let plans = self.plans.lock();
        if self.known.underway > 0 || *plans != self.known {
            self.idle = None;
            return 0;
        }
        let mut cleared = 0;
        let mut idle = vec![0; WORDS];
        for (word, idle) in (0..).zip(&mut idle) {
            let at = word as usize;
            *idle = filter.load_u64(word) & !self.needed[at];
            let clear = self.idle.as_ref().map_or(0, |before| *idle & before[at]);
            if clear != 0 {
                filter.clear_bits(word, clear);
                cleared += clear.count_ones();
            }
        }
        drop(plans);
        self.idle = Some(idle);
        cleared
    }
}
