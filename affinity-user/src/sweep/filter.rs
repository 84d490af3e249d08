//! Which bits of the filter nobody needs any more.
//!
//! Plans only set bits, in the parts for frontends and members. (The programs' own parts are bounded by the node's ports
//! and its pods', and stay.) A bit is needed by a frontend, by a member of a pool, or by a flow that began when one of these
//! was there. It is cleared when two passes in a row found no need and no plan has set bits since the first: then
//! every flow that could need it has been met.

use affinity_common::abi::{Address, Direction, FILTER_BITS, FrontendKey, Port, V4, V6, filter_bit};

use crate::{store::kernel::filter_word, sys::Words};

/// Of the parts that plans write.
const WORDS: usize = 2 * FILTER_BITS as usize / 64;

/// A copy of the filter's bits.
type Bits = Vec<u64>;

/// What a pass has seen of the need for bits.
#[derive(Debug)]
pub(super) struct FilterUse {
    needed: Bits,
    /// Bits that the last whole pass found no need for; none where there was none, or where a plan came in between.
    idle: Option<Bits>,
    disturbed: bool,
}

impl FilterUse {
    pub(super) fn new() -> Self {
        Self { needed: vec![0; WORDS], idle: None, disturbed: false }
    }

    pub(super) fn begin(&mut self) {
        self.needed.fill(0);
        self.disturbed = false;
    }

    /// A plan has set bits.
    pub(super) fn disturb(&mut self) {
        self.disturbed = true;
        self.idle = None;
    }

    fn need(&mut self, direction: Direction, bit: u32) {
        let (word, mask) = filter_word(direction, bit);
        self.needed[word as usize] |= mask;
    }

    /// A frontend, or the destination of a client's packets.
    pub(super) fn need_frontend<A: Address>(&mut self, key: &FrontendKey<A>) {
        self.need(Direction::Forward, filter_bit(key.address, key.port, key.protocol));
    }

    /// The source of replies.
    pub(super) fn need_source<A: Address>(&mut self, address: A, port: Port, protocol: u8) {
        self.need(Direction::Reverse, filter_bit(address, port, protocol));
    }

    /// A member, whose address is hashed in its own family.
    pub(super) fn need_member(&mut self, mapped: [u8; 16], port: Port, protocol: u8) {
        let v4 = V4::from_mapped(mapped);
        if v4.to_mapped() == mapped {
            self.need_source(v4, port, protocol);
        } else {
            self.need_source(V6::from_mapped(mapped), port, protocol);
        }
    }

    /// Clears what may be cleared at the end of a pass, and returns the number of bits.
    pub(super) fn finish(&mut self, filter: &Words) -> u32 {
        if self.disturbed {
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
        self.idle = Some(idle);
        cleared
    }
}
