//! How large the maps are, and how much memory they take.
//!
//! An LRU map is allocated in full when it is created, so the defaults depend on the machine: the four large tables together
//! take a small share of its memory ([`SHARE`]), and all tables no more than [`DEFAULT_AT_MOST`]. The other maps are bounded by
//! the configuration, and their sizes are limits that cost little: 10,000 services of both families with 10 endpoints each fit
//! on every machine. Room may be short only if many services select `consistent`, which takes a thousand slots or more for each
//! pool, so the slots depend on the machine as well.

use std::fmt;

use affinity_common::{abi::FILTER_WORDS, names};
use aya_obj::generated::{BPF_F_NO_PREALLOC, bpf_map_type};

use super::Memory;
use crate::sys::{self, MapInfo};

/// The large tables take one part in this many of the memory, ...
pub const SHARE: u64 = 64;
/// ... and at most one part in this many of a limit that the agent's cgroups have: the kernel charges maps to them, and the
/// agent and the other tables need the rest.
pub const SHARE_OF_LIMIT: u64 = 8;
/// All tables together take at most this many bytes, unless options ask for more.
pub const DEFAULT_AT_MOST: u64 = 256 << 20;
/// The smallest default for the sessions of a family.
pub const MIN_SESSIONS: u32 = 1 << 14;
/// The largest default for the sessions of a family, so that [`DEFAULT_AT_MOST`] holds. Options may ask for more.
pub const MAX_SESSIONS: u32 = 1 << 17;

/// Sessions for one entry of `sockets`: few of all pinned clients are sockets of this machine.
const SESSIONS_PER_SOCKET: u32 = 4;
/// Sessions for one entry of `foreign`: few connections to no frontend could be taken for one to a frontend.
const SESSIONS_PER_FOREIGN: u32 = 4;

/// Slots for each session, by default; a slot takes four bytes.
const SLOTS_PER_SESSION: u32 = 32;

/// Backends by default. A pod of both families has two.
const BACKENDS: u32 = 1 << 18;
/// Names, and usage counts, for each backend: its own, and as many for services and pools.
const NAMES_PER_BACKEND: u32 = 2;

/// Ranges of addresses of each family, in all services.
pub const MAX_RANGES: u32 = 1 << 16;

/// Bytes of one session of each family and of the two records of one flow of each.
const BYTES_PER_SESSION: u64 = 1024;

/// Entries of the maps; the default is [`Sizes::of_this_machine`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Sessions of each family.
    pub sessions: u32,
    /// Flow records of each family: two for each connection.
    pub flows: u32,
    /// Frontends of each family.
    pub frontends: u32,
    /// Members of all pools and groups.
    pub members: u32,
    /// Backends.
    pub backends: u32,
    /// Slots of all pools.
    pub slots: u32,
    /// Names of services, pools, groups and backends.
    pub names: u32,
    /// Services and backends that are counted.
    pub usage: u32,
    /// Bytes of the event ring: a power of two, and a multiple of the page size.
    pub events_bytes: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self::of_this_machine()
    }
}

impl Sizes {
    /// Enough to load programs, and for nothing else.
    pub(super) const SMALLEST: Self = Self {
        sessions: 1,
        flows: 1,
        frontends: 1,
        members: 1,
        backends: 1,
        slots: 1,
        names: 1,
        usage: 1,
        events_bytes: 1 << 16,
    };

    /// For the memory of this machine, or the limit of the process's cgroups if that is tighter.
    #[must_use]
    pub fn of_this_machine() -> Self {
        Self::of_memory(Memory::of_this_process())
    }

    /// For this much memory.
    #[must_use]
    pub fn of_memory(Memory { total, limit }: Memory) -> Self {
        let budget = limit.map_or(total / SHARE, |limit| (total / SHARE).min(limit / SHARE_OF_LIMIT));
        // A power of two, like the kernel's number of buckets, so that a little more memory changes nothing.
        let affordable = (budget / BYTES_PER_SESSION).max(1).ilog2().min(31);
        let sessions = (1u32 << affordable).clamp(MIN_SESSIONS, MAX_SESSIONS);
        Self {
            sessions,
            flows: 2 * sessions,
            frontends: 1 << 16,
            members: 1 << 19,
            backends: BACKENDS,
            slots: (SLOTS_PER_SESSION * sessions).max(1 << 20),
            names: NAMES_PER_BACKEND * BACKENDS,
            usage: NAMES_PER_BACKEND * BACKENDS,
            events_bytes: 1 << 20,
        }
    }

    /// With this many backends, and room for the names and counts that come with them.
    #[must_use]
    pub fn with_backends(self, backends: u32) -> Self {
        let named = backends.saturating_mul(NAMES_PER_BACKEND);
        Self { backends, names: self.names.max(named), usage: self.usage.max(named), ..self }
    }

    /// The entries of a map; none if its size is fixed.
    #[must_use]
    pub fn entries(&self, map: &str) -> Option<u32> {
        Some(match map {
            names::SESSIONS_V4 | names::SESSIONS_V6 => self.sessions,
            names::FLOWS_V4 | names::FLOWS_V6 => self.flows,
            names::FOREIGN_V4 | names::FOREIGN_V6 => self.sessions.div_ceil(SESSIONS_PER_FOREIGN),
            names::SOCKETS => self.sessions.div_ceil(SESSIONS_PER_SOCKET),
            names::FRONTENDS_V4 | names::FRONTENDS_V6 => self.frontends,
            names::MEMBERS => self.members,
            names::BACKENDS | names::LOADS | names::SNAT_PORT_CURSOR => self.backends,
            names::SLOTS => self.slots,
            names::NAMES => self.names,
            names::USAGE => self.usage,
            names::EVENTS => self.events_bytes,
            names::FILTER => FILTER_WORDS,
            names::RANGES_V4 | names::RANGES_V6 => MAX_RANGES,
            _ => return None,
        })
    }
}

/// What the kernel allocates for a map at its creation, in bytes: as in `kernel/bpf/hashtab.c` and `arraymap.c`.
#[must_use]
pub fn cost(map: &MapInfo) -> u64 {
    /// `struct bucket` and `struct htab_elem` without its key and value, on a 64-bit machine.
    const BUCKET: u64 = 16;
    const ELEMENT: u64 = 48;

    let entries = u64::from(map.max_entries);
    let key = u64::from(map.key_size).next_multiple_of(8);
    let value = u64::from(map.value_size).next_multiple_of(8);
    const ARRAY: u32 = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    const PERCPU_ARRAY: u32 = bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY as u32;
    const RINGBUF: u32 = bpf_map_type::BPF_MAP_TYPE_RINGBUF as u32;
    match map.kind {
        ARRAY => entries * value,
        PERCPU_ARRAY => entries * (value * sys::possible_cpus() as u64 + 8),
        RINGBUF => entries,
        _ if map.flags & BPF_F_NO_PREALLOC != 0 => entries.next_power_of_two() * BUCKET,
        _ => entries.next_power_of_two() * BUCKET + entries * (ELEMENT + key + value),
    }
}

/// Bytes as MiB, rounded up.
#[must_use]
pub const fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sessions, flows, frontends, members, backends, slots, names, usage, events_bytes } = self;
        write!(
            f,
            "per IP family {sessions} sessions, {flows} flow records and {frontends} frontends; in all {backends} \
             backends, {members} members, {slots} slots, {names} names, {usage} usage counts, {} KiB of events",
            events_bytes / 1024
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn of(total: u64, limit: Option<u64>) -> Sizes {
        Sizes::of_memory(Memory { total, limit })
    }

    #[test]
    fn the_default_is_a_small_share_between_bounds() {
        assert_eq!(of(GIB / 2, None).sessions, MIN_SESSIONS);
        assert_eq!(of(4 * GIB, None).sessions, 1 << 16);
        assert_eq!(of(24 * GIB, None).sessions, MAX_SESSIONS);
        assert_eq!(of(24 * GIB, None).slots, 1 << 22);
        assert_eq!(of(4096 * GIB, None), of(24 * GIB, None));
        assert_eq!(of(24 * GIB, Some(GIB / 4)).sessions, 1 << 15);
        assert_eq!(of(24 * GIB, Some(GIB)).sessions, 1 << 17);
    }

    #[test]
    fn by_default_all_tables_take_no_more_than_256_mib_and_leave_half_of_a_limit() {
        let cost_of = |sizes: Sizes| -> u64 {
            super::super::needed(&sizes).expect("an object").iter().map(|(_, map)| cost(map)).sum()
        };
        for gib in [1, 4, 16, 24, 64, 512, 4096] {
            let cost = cost_of(of(gib * GIB, None));
            assert!(cost <= DEFAULT_AT_MOST, "{gib} GiB: {} MiB", mib(cost));
        }
        for limit in [200 << 20, 256 << 20, 512 << 20, GIB, 8 * GIB] {
            let cost = cost_of(of(24 * GIB, Some(limit)));
            assert!(cost <= limit / 2, "of {} MiB: {} MiB", mib(limit), mib(cost));
        }
    }

    #[test]
    fn ten_thousand_services_of_both_families_fit_on_every_machine() {
        const SERVICES: u32 = 10_000;
        const ENDPOINTS: u32 = 10;
        // A machine with half a gigabyte; one port.
        let Sizes { frontends, members, backends, slots, names, usage, .. } = of(GIB / 2, None);
        let (pools, addresses) = (2 * SERVICES, 2 * SERVICES * ENDPOINTS);
        assert!(frontends >= SERVICES && backends >= addresses && members >= addresses);
        assert!(names >= SERVICES + pools + addresses && usage >= SERVICES + addresses);
        // New slots are written next to the old ones.
        assert!(slots >= 2 * addresses);
    }

    #[test]
    fn more_backends_bring_more_names_and_counts() {
        let default = of(GIB, None);
        let more = default.with_backends(1 << 20);
        assert_eq!((more.backends, more.names, more.usage), (1 << 20, 1 << 21, 1 << 21));
        let fewer = default.with_backends(1 << 10);
        assert_eq!((fewer.backends, fewer.names, fewer.usage), (1 << 10, default.names, default.usage));
    }

    #[test]
    fn a_session_costs_what_the_budget_takes_it_for() {
        use affinity_common::abi::{Flow, FlowKey, Session, SessionKey, V4, V6};
        let lru = |key_size: usize, value_size: usize, max_entries| MapInfo {
            kind: bpf_map_type::BPF_MAP_TYPE_LRU_HASH as u32,
            id: 0,
            key_size: key_size as u32,
            value_size: value_size as u32,
            max_entries,
            flags: 0,
        };
        let sessions = 1 << 16;
        let bytes = cost(&lru(size_of::<SessionKey<V4>>(), size_of::<Session>(), sessions))
            + cost(&lru(size_of::<SessionKey<V6>>(), size_of::<Session>(), sessions))
            + cost(&lru(size_of::<FlowKey<V4>>(), size_of::<Flow<V4>>(), 2 * sessions))
            + cost(&lru(size_of::<FlowKey<V6>>(), size_of::<Flow<V6>>(), 2 * sessions));
        let of_one = bytes / u64::from(sessions);
        assert!((BYTES_PER_SESSION * 3 / 4..=BYTES_PER_SESSION).contains(&of_one), "{of_one}");
    }
}
