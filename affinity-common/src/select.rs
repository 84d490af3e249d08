//! Choosing a member for a connection without a usable pin.

use crate::{
    abi::{Address, BackendRef, Frontend, MEMBER_READY, Member, MemberKey, Port, Selection},
    tables::Tables,
};

/// A member chosen for a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chosen {
    /// The backend.
    pub backend: BackendRef,
    /// The port that it serves in the frontend's pool.
    pub port: Port,
}

impl Chosen {
    /// The backend with an index, by its record in the pool.
    #[inline(always)]
    pub(crate) const fn new(index: u32, member: &Member) -> Self {
        Self { backend: BackendRef { index, generation: member.generation }, port: member.port }
    }
}

/// Chooses a ready member of the frontend's pool; `None` if a slot has none, which the agent's order of publishing prevents.
///
/// `draw` is random; `client` is the client's address masked by the service's prefix.
#[inline(always)]
pub fn select<A: Address, T: Tables>(tables: &T, frontend: &Frontend, client: A, draw: u32) -> Option<Chosen> {
    let count = frontend.slot_count;
    let backend = match Selection::from_byte(frontend.select) {
        Selection::Random => slot(tables, frontend, scale(draw, count))?,
        Selection::Consistent => slot(tables, frontend, scale(client_hash(client, frontend.seed), count))?,
        Selection::Least => {
            let one = scale(draw, count);
            let other = other_than(one, scale(next_draw(draw), count.saturating_sub(1)), count);
            let (one, other) = (slot(tables, frontend, one)?, slot(tables, frontend, other)?);
            if tables.load(other) < tables.load(one) { other } else { one }
        }
    };
    let member = tables.member(&MemberKey { pool: frontend.pool, backend })?;
    (member.state == MEMBER_READY).then(|| Chosen::new(backend, &member))
}

/// The random number after `draw`: a permutation of 32 bits (Marsaglia's xorshift behind a Weyl step).
#[inline(always)]
#[must_use]
pub const fn next_draw(draw: u32) -> u32 {
    mix(draw.wrapping_add(0x9e37_79b9))
}

/// The client's position in a Maglev table: the same on every node.
#[inline(always)]
pub fn client_hash<A: Address>(client: A, seed: u32) -> u32 {
    mix(client.fold() ^ mix(seed))
}

/// A hash for a connection without affinity, the same for each of its packets: if its flow is evicted, the next packet finds the
/// same pod.
#[inline(always)]
pub fn connection_hash<A: Address>(client: A, sport: Port, seed: u32) -> u32 {
    mix(client.fold() ^ mix(seed ^ u32::from(sport.get()) << 8))
}

/// Spreads 32 bits evenly (the finaliser of MurmurHash3).
#[inline(always)]
const fn mix(mut bits: u32) -> u32 {
    bits ^= bits >> 16;
    bits = bits.wrapping_mul(0x85eb_ca6b);
    bits ^= bits >> 13;
    bits = bits.wrapping_mul(0xc2b2_ae35);
    bits ^ (bits >> 16)
}

/// Scales 32 random bits to 0..count by a product and a shift, because the verifier cannot follow a remainder.
#[inline(always)]
const fn scale(random: u32, count: u32) -> u32 {
    ((random as u64 * count as u64) >> 32) as u32
}

/// Maps `pick` of 0..count-1 to an index of 0..count other than `one`, if there is another.
#[inline(always)]
const fn other_than(one: u32, pick: u32, count: u32) -> u32 {
    if count < 2 {
        one
    } else if pick >= one {
        pick + 1
    } else {
        pick
    }
}

#[inline(always)]
fn slot<T: Tables>(tables: &T, frontend: &Frontend, index: u32) -> Option<u32> {
    tables.slot(frontend.slot_first.wrapping_add(index))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{V4, V6};

    #[test]
    fn the_second_choice_differs_from_the_first() {
        for count in 2..9 {
            for one in 0..count {
                let mut seen: Vec<u32> = (0..count - 1).map(|pick| other_than(one, pick, count)).collect();
                seen.push(one);
                seen.sort_unstable();
                assert_eq!(seen, (0..count).collect::<Vec<_>>());
            }
        }
        assert_eq!(other_than(0, 0, 1), 0);
    }

    #[test]
    fn neighbours_spread_evenly() {
        let mut hits = [0u32; 16];
        for client in 0..16_000u32 {
            hits[scale(client_hash(V4((0x0a00_0000 + client).to_be_bytes()), 7), 16) as usize] += 1;
        }
        assert!(hits.iter().all(|&n| (850..1150).contains(&n)), "{hits:?}");
        let mut hits = [0u32; 16];
        for client in 0..16_000u64 {
            let mut bytes = [0; 16];
            bytes[0] = 0xfd;
            bytes[8..].copy_from_slice(&client.to_be_bytes());
            hits[scale(client_hash(V6(bytes), 7), 16) as usize] += 1;
        }
        assert!(hits.iter().all(|&n| (850..1150).contains(&n)), "{hits:?}");
    }
}
