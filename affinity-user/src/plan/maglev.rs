//! Maglev tables (Eisenbud et al., NSDI 2016, section 3.4): every member gets an almost equal share, and a change of the
//! members moves few other slots.
//!
//! A table depends only on the members' addresses, so every node and every later version must build the same one.

use std::net::IpAddr;

use crate::hash::hash64;

/// Sizes of tables: primes, far apart, because a change of size moves every client.
const SIZES: [usize; 3] = [1_021, 16_381, 65_537];
/// Slots per member, if there is a table that large: shares then differ by about a percent.
const SLOTS_PER_MEMBER: usize = 100;

/// For each slot, the position of its owner in `members`; empty if there are no members.
pub(super) fn table(members: &[IpAddr]) -> Vec<usize> {
    if members.is_empty() {
        return Vec::new();
    }
    let largest = SIZES[SIZES.len() - 1];
    let size = SIZES.into_iter().find(|size| *size >= members.len() * SLOTS_PER_MEMBER).unwrap_or(largest);
    let mut walks: Vec<Walk> = members.iter().map(|address| Walk::new(*address, size)).collect();
    let mut table = vec![None; size];
    let mut left = size;
    loop {
        for (member, walk) in walks.iter_mut().enumerate() {
            if left == 0 {
                return table.into_iter().flatten().collect();
            }
            // A walk visits every slot, and at least one is free.
            while table[walk.at].is_some() {
                walk.step(size);
            }
            table[walk.at] = Some(member);
            left -= 1;
        }
    }
}

/// The order in which a member prefers slots: a start and a fixed stride, which reaches all slots because the size is prime.
struct Walk {
    at: usize,
    stride: usize,
}

impl Walk {
    fn new(address: IpAddr, size: usize) -> Self {
        let bytes = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let below = |seed, limit: usize| (hash64(&bytes, seed) % limit as u64) as usize;
        Self { at: below(1, size), stride: 1 + below(2, size - 1) }
    }

    const fn step(&mut self, size: usize) {
        self.at = (self.at + self.stride) % size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(count: u8) -> Vec<IpAddr> {
        (0..count).map(|last| IpAddr::from([10, 244, last % 3, last])).collect()
    }

    fn owners(members: &[IpAddr]) -> Vec<IpAddr> {
        table(members).into_iter().map(|member| members[member]).collect()
    }

    #[test]
    fn shares_are_almost_equal() {
        for count in [1, 2, 3, 7, 10, 40, 100, 200] {
            let members = members(count);
            let table = table(&members);
            assert!(SIZES.contains(&table.len()) && table.len() >= 100 * members.len());
            let mut shares = vec![0usize; members.len()];
            table.iter().for_each(|member| shares[*member] += 1);
            let (least, most) = (shares.iter().min().copied(), shares.iter().max().copied());
            // Each round gives every member one slot, and only the last round may be incomplete.
            assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 1), "{count}: {shares:?}");
        }
    }

    #[test]
    fn a_lost_member_moves_few_others() {
        for count in [3, 10, 40, 150] {
            let all = members(count);
            for lost in [0, usize::from(count) / 2, usize::from(count) - 1] {
                let mut rest = all.clone();
                let gone = rest.remove(lost);
                let (before, after) = (owners(&all), owners(&rest));
                assert_eq!(before.len(), after.len(), "the same size");
                let moved = before.iter().zip(&after).filter(|(old, new)| **old != gone && old != new).count();
                assert!(moved * 100 <= before.len() * 6, "{count} members: {moved} of {} moved", before.len());
            }
        }
    }

    #[test]
    fn tables_never_change_between_versions() {
        assert_eq!(table(&[]), Vec::<usize>::new());
        let table = table(&members(3));
        assert_eq!(table.len(), 1_021);
        assert_eq!(table[..16], [2, 0, 2, 1, 1, 1, 1, 0, 1, 0, 2, 1, 0, 2, 0, 2]);
    }

    #[test]
    fn more_members_than_slots_still_end() {
        let members: Vec<IpAddr> = (0..70_000u32).map(|n| IpAddr::from((0x0a00_0000 + n).to_be_bytes())).collect();
        assert_eq!(table(&members).len(), 65_537);
    }
}
