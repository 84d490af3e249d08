//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Sums are over 16-bit words in memory order: RFC 1071 shows that the byte order does not matter. A *delta* is the one's
//! complement sum of the new words of a packet minus the old ones. It is the same for every packet of a flow.

/// Folds a sum of up to 2^16 words to 16 bits, with end-around carry.
#[inline(always)]
#[must_use]
pub const fn fold(sum: u32) -> u16 {
    let once = (sum >> 16) + (sum & 0xffff);
    ((once >> 16) + (once & 0xffff)) as u16
}

/// The delta that turns words summing to `old` into words summing to `new` (each folded).
#[inline(always)]
#[must_use]
pub const fn delta(old: u16, new: u16) -> u16 {
    fold(!old as u32 + new as u32)
}

/// The delta of two changes.
#[inline(always)]
#[must_use]
pub const fn join(one: u16, other: u16) -> u16 {
    fold(one as u32 + other as u32)
}

/// The checksum field of a packet whose words change by `delta`: RFC 1624, equation 3.
#[inline(always)]
#[must_use]
pub const fn update(field: [u8; 2], delta: u16) -> [u8; 2] {
    (!fold(!u16::from_ne_bytes(field) as u32 + delta as u32)).to_ne_bytes()
}

/// The checksum field for a packet that sums to `sum` while the field is zero.
#[inline(always)]
#[must_use]
pub const fn field(sum: u32) -> [u8; 2] {
    (!fold(sum)).to_ne_bytes()
}

/// A number of the pseudo-header, as a word.
#[inline(always)]
#[must_use]
pub const fn word(number: u16) -> u32 {
    number.to_be() as u32
}

/// The sum of `bytes`; an odd last byte is followed by a zero.
#[inline(always)]
#[must_use]
pub fn sum(bytes: &[u8]) -> u32 {
    let mut total = 0;
    let mut chunks = bytes.chunks_exact(2);
    for pair in &mut chunks {
        total += u32::from(u16::from_ne_bytes([pair[0], pair[1]]));
    }
    if let [last] = chunks.remainder() {
        total += u32::from(u16::from_ne_bytes([*last, 0]));
    }
    total
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rfc_1071_example() {
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])).to_ne_bytes(), [0xdd, 0xf2]);
    }

    #[test]
    fn rfc_1624_example() {
        // Section 4: m = 0x5555 becomes m' = 0x3285 under HC = 0xDD2F; the right answer is 0x0000.
        assert_eq!(update([0xdd, 0x2f], delta(0x5555, 0x3285u16.to_be())), [0, 0]);
    }

    proptest! {
        #[test]
        fn an_update_equals_a_recomputation(words in prop::collection::vec(any::<u16>(), 2..64), at: prop::sample::Index, new: u16) {
            let full = |words: &[u16]| !fold(words.iter().map(|&w| u32::from(w)).sum());
            let at = at.index(words.len());
            let mut changed = words.clone();
            changed[at] = new;
            let updated = u16::from_ne_bytes(update(full(&words).to_ne_bytes(), delta(words[at], new)));
            // Zero has two forms in one's complement; either is a right checksum.
            prop_assert!(updated == full(&changed) || (updated | full(&changed) == 0xffff && updated & full(&changed) == 0));
        }
    }
}
