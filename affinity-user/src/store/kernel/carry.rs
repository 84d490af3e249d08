//! Copies the entries of a map to one of another size, and the flows of an older map layout, so that an upgrade keeps open
//! connections.
//!
//! The programs write sessions and flows to the old map until they use the new one. So [`carry`] copies everything first, and
//! [`carry_late`] copies, after the switch, what changed meanwhile.

use affinity_common::{
    abi::{Flow, Session, Socket, V4, V6, timeout_s},
    names,
};
use aya_obj::generated::bpf_map_type;

use super::Walk;
use crate::{
    pins::PinDir,
    sys::{Map, SysError, Write},
};

/// Entries do not fit.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// A call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The configuration needs more than the new size.
    #[error("map {map}: its entries do not fit into the new size of {max_entries}: choose a larger size")]
    Full {
        /// The map.
        map: String,
        /// The new size.
        max_entries: u32,
    },
}

const ARRAYS: [u32; 2] = [bpf_map_type::BPF_MAP_TYPE_ARRAY as u32, bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY as u32];

/// Copies all entries. An LRU map that is too small keeps a part, as it does under load. Returns how many it has dropped.
///
/// A ring buffer starts empty: its records are history, which only programs can write.
///
/// # Errors
/// [`CarryError::Full`] if a hash or an array is too small for its entries.
pub(crate) fn carry(old: &Map, new: &Map) -> Result<u64, CarryError> {
    if old.info().kind == bpf_map_type::BPF_MAP_TYPE_RINGBUF as u32 {
        return Ok(0);
    }
    let mut carried = 0;
    let full = || CarryError::Full { map: old.name().to_owned(), max_entries: new.info().max_entries };
    let mut walk = Walk::new(old);
    while let Some((keys, values)) = walk.next_batch(old)? {
        let fitting =
            if ARRAYS.contains(&old.info().kind) { fitting(keys, new.info().max_entries) } else { keys.len() };
        let (keys, (values, beyond)) = (&keys[..fitting], values.split_at(fitting / new.key_len() * new.value_len()));
        if beyond.iter().any(|&byte| byte != 0) {
            return Err(full());
        }
        if keys.is_empty() {
            continue;
        }
        new.update_batch(keys, values).map_err(|error| match error.source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => full(),
            _ => error.into(),
        })?;
        carried += (keys.len() / new.key_len()) as u64;
    }
    if LRU != old.info().kind || carried <= u64::from(new.info().max_entries) / 2 {
        return Ok(0);
    }
    Ok(carried.saturating_sub(number_of_entries(new)?))
}

const LRU: u32 = bpf_map_type::BPF_MAP_TYPE_LRU_HASH as u32;

fn number_of_entries(map: &Map) -> Result<u64, SysError> {
    let (mut walk, mut number) = (Walk::new(map), 0);
    while let Some((keys, _)) = walk.next_batch(map)? {
        number += (keys.len() / map.key_len()) as u64;
    }
    Ok(number)
}

/// Bytes of those keys that are indices in an array of `max_entries`. Keys are native `u32` in rising order.
fn fitting(keys: &[u8], max_entries: u32) -> usize {
    let index = |key: &[u8; 4]| u32::from_ne_bytes(*key);
    let (indices, _) = keys.as_chunks::<4>();
    4 * indices.iter().take_while(|key| index(key) < max_entries).count()
}

/// Sessions, flows and sockets begin with the same fields: when created and when last used, `u64` nanoseconds each.
const _: () = assert!(
    std::mem::offset_of!(Session, created_ns) == 0
        && std::mem::offset_of!(Socket, created_ns) == 0
        && std::mem::offset_of!(Socket, last_used_ns) == 8
        && std::mem::offset_of!(Flow<V4>, created_ns) == 0
        && std::mem::offset_of!(Flow<V6>, created_ns) == 0
        && std::mem::offset_of!(Session, last_used_ns) == 8
        && std::mem::offset_of!(Flow<V4>, last_used_ns) == 8
        && std::mem::offset_of!(Flow<V6>, last_used_ns) == 8
);

/// Copies the sessions, flows or sockets that were used since `since_ns`, unless the new map has a better entry. Of two entries
/// under one key the older one wins, because its client went there first. Of two versions of one entry, the later one wins.
///
/// # Errors
/// [`SysError`].
pub(crate) fn carry_late(old: &Map, new: &Map, since_ns: u64) -> Result<(), SysError> {
    let mut current = vec![0; new.value_len()];
    let mut walk = Walk::new(old);
    while let Some(entry) = walk.next(old) {
        let (key, value) = entry?;
        let (created_ns, last_used_ns) = times(value);
        if last_used_ns < since_ns {
            continue;
        }
        let better = !new.lookup(key, &mut current)? || {
            let (its_created_ns, its_last_used_ns) = times(&current);
            created_ns < its_created_ns || created_ns == its_created_ns && last_used_ns > its_last_used_ns
        };
        if better {
            new.update(key, value, Write::Any)?;
        }
    }
    Ok(())
}

fn times(value: &[u8]) -> (u64, u64) {
    (bytemuck::pod_read_unaligned(&value[..8]), bytemuck::pod_read_unaligned(&value[8..16]))
}

/// Where the timeout is in a flow of layout 3 or 4: nanoseconds, eight bytes.
const TIMEOUT_NS: usize = 16;
/// Bytes of a flow after the service.
const END: usize = 4;
/// Bytes of the service.
const SERVICE: usize = 4;

/// Copies the flows of an older dataplane that this one does not have, if their layout differs. Call it after the load, and
/// again once no program uses the old maps.
///
/// # Errors
/// [`SysError`].
pub(crate) fn copy_older_flows(older: &PinDir, pins: &PinDir) -> Result<(), SysError> {
    for name in [names::FLOWS_V4, names::FLOWS_V6] {
        let old = match Map::open(&older.map(name)) {
            Err(error) if error.is_not_found() => continue,
            opened => opened?,
        };
        let new = Map::open(&pins.map(name))?;
        if old.value_len() == new.value_len() {
            continue;
        }
        let mut walk = Walk::new(&old);
        while let Some(entry) = walk.next(&old) {
            let (key, flow) = entry?;
            new.update(key, &converted(flow), Write::New)?;
        }
    }
    Ok(())
}

/// A flow of layout 3 or 4, which had the pin's timeout in nanoseconds and its service, in the layout of this version.
fn converted(flow: &[u8]) -> Vec<u8> {
    let (times, rest) = flow.split_at(TIMEOUT_NS);
    let (timeout_ns, rest) = rest.split_at(8);
    let (rest, end) = rest.split_at(rest.len() - END);
    let seconds = timeout_s(bytemuck::pod_read_unaligned(timeout_ns));
    [times, &rest[..rest.len() - SERVICE], &seconds.to_ne_bytes(), end].concat()
}
