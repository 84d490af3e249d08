//! Hashes that are part of the contract: every node and every later version must compute the same numbers.

/// 64 bits that depend on all of `bytes` and on `seed` (FNV-1a, then the finaliser of SplitMix64).
pub(crate) fn hash64(bytes: &[u8], seed: u64) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325 ^ seed;
    let mut hash = bytes.iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// 32 bits that depend on all of `text`.
pub(crate) fn hash32(text: &str) -> u32 {
    (hash64(text.as_bytes(), 0) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_never_change() {
        assert_eq!(hash32(""), 0xf52a_15e9);
        assert_eq!(hash32("default/web"), 0x2096_4ea8);
        assert_eq!(hash64(&[10, 0, 0, 1], 1), 0x5e13_80bb_295c_a13e);
    }
}
