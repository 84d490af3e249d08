//! The kernel as a store: the pinned maps of a running dataplane.
//!
//! The slots, the filter, the loads and the backends' generations are arrays that are shared by mmap; everything else goes
//! through bpf(2). The store has no state of its own, so any number of stores may be open at the same time: the agent's, and
//! one in each CLI command. Only the agent applies plans.

mod carry;
mod pin;
mod table;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use affinity_common::{
    abi::{
        Address, BACKEND_LINGERING, Backend, BackendRef, Correction, Direction, Event, EventKind, FILTER_BITS, Flow,
        FlowKey, Foreign, FragmentKey, Frontend, FrontendKey, Member, MemberKey, Name, NameKey, Node, Port, RangeKey,
        Reason, Session, SessionKey, Socket, SocketKey, Status, Usage, UsageKey, V4, V6,
    },
    headers::UDP,
    names,
};
use bytemuck::Pod;

pub use self::carry::CarryError;
pub(crate) use self::carry::{carry, carry_late, copy_older_flows};
pub use self::pin::PinKey;
pub use self::table::{BATCH, Bytes, Entries, PerCpu, Table, Walk};
use super::{Capacity, Observed, Op, Store, StoreError};
use crate::{
    pins::{self, PinDir},
    sys::{self, MapInfo, Words},
};

/// The dataplane cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing is pinned.
    #[error("no dataplane at {0}: run `affinity run` or `affinity attach`")]
    None(String),
    /// Nothing is pinned that is visible from here.
    #[error("no dataplane at {0}: {1}")]
    Hidden(String, String),
    /// The pinned maps have another version.
    #[error(
        "the dataplane at {0} is of another version (map layout {1}): `affinity run` or `affinity attach` replaces it, \
         `affinity detach` removes it"
    )]
    OtherLayout(String, String),
    /// The directory is not accessible.
    #[error(
        "{0}: permission denied: run affinity as root, or with CAP_BPF, CAP_NET_ADMIN and access to this directory"
    )]
    NotAllowed(String),
    /// A map or program is missing or has another layout.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl OpenError {
    /// The reason why there is no dataplane.
    fn none(pins: &PinDir) -> Self {
        let dir = pins.root().display().to_string();
        if let Some(why) = pins::hidden() {
            return Self::Hidden(dir, why);
        }
        match pins.other_layouts().unwrap_or_default().first() {
            Some(other) => Self::OtherLayout(dir, other.layout()),
            None => Self::None(dir),
        }
    }
}

/// The tables of one family.
#[derive(Debug)]
pub struct FamilyTables<A: Address> {
    /// Frontends.
    pub frontends: Table<FrontendKey<A>, Frontend>,
    /// Ranges of addresses; each value is one.
    pub ranges: Table<RangeKey<A>, u32>,
    /// Sessions.
    pub sessions: Table<SessionKey<A>, Session>,
    /// Flows, all directions.
    pub flows: Table<FlowKey<A>, Flow<A>>,
    /// Connections to no frontend, by the key of their replies.
    pub foreign: Table<FlowKey<A>, Foreign>,
    /// Fragmented packets.
    pub fragments: Table<FragmentKey<A>, FlowKey<A>>,
}

impl<A: Address> FamilyTables<A> {
    fn open(maps: &Path, names: [&'static str; 6]) -> Result<Self, StoreError> {
        let [frontends, ranges, sessions, flows, foreign, fragments] = names;
        Ok(Self {
            frontends: Table::open(maps, frontends)?,
            ranges: Table::open(maps, ranges)?,
            sessions: Table::open(maps, sessions)?,
            flows: Table::open(maps, flows)?,
            foreign: Table::open(maps, foreign)?,
            fragments: Table::open(maps, fragments)?,
        })
    }
}

/// An address family. Code that is the same for both families is generic over this.
pub trait Family: Address {
    /// The name of its map of sessions.
    const SESSIONS: &'static str;
    /// The name of its map of flows.
    const FLOWS: &'static str;

    /// The family's tables.
    fn tables(store: &KernelStore) -> &FamilyTables<Self>;
}

impl Family for V4 {
    const SESSIONS: &'static str = names::SESSIONS_V4;
    const FLOWS: &'static str = names::FLOWS_V4;

    fn tables(store: &KernelStore) -> &FamilyTables<Self> {
        &store.v4
    }
}

impl Family for V6 {
    const SESSIONS: &'static str = names::SESSIONS_V6;
    const FLOWS: &'static str = names::FLOWS_V6;

    fn tables(store: &KernelStore) -> &FamilyTables<Self> {
        &store.v6
    }
}

/// The pinned maps.
#[derive(Debug)]
pub struct KernelStore {
    /// IPv4.
    pub v4: FamilyTables<V4>,
    /// IPv6.
    pub v6: FamilyTables<V6>,
    /// What masquerading uses, under the key zero.
    pub node: Table<u32, Node>,
    /// Backend index -> position in the range of SNAT ports.
    pub snat_port_cursor: Table<u32, u64>,
    /// Ifindex -> what may be redirected to the device.
    pub devices: Table<u32, u32>,
    /// Members of pools.
    pub members: Table<MemberKey, Member>,
    /// Backends by index; an index that was never used has a zero record.
    pub backends: Table<u32, Backend>,
    /// Backend index -> generation: the beginning of its record, `u32`; the flags follow.
    pub generations: Words,
    /// Sockets that were translated to a backend.
    pub sockets: Table<SocketKey, Socket>,
    /// Names of ids and backends.
    pub names: Table<NameKey, Name>,
    /// Counts by reason.
    pub counters: PerCpu<u32, u64>,
    /// Counts by service and backend.
    pub usage: PerCpu<UsageKey, Usage>,
    /// Slot -> backend index, `u32`.
    pub slots: Words,
    /// The filter's words, `u64`: four parts, in the order of [`affinity_common::abi::Direction`].
    pub filter: Words,
    /// Backend index -> live sessions, `u64`.
    pub loads: Words,
    /// The agent's status, under the key zero.
    pub status: Table<u32, Status>,
    /// Service id -> conditions that the agent has found.
    pub service_conditions: Table<u32, u32>,
    /// The event ring.
    pub events: sys::Map,
    report: OwnedFd,
    correct: OwnedFd,
    maps: Vec<(&'static str, MapInfo)>,
}

impl KernelStore {
    /// Opens the dataplane that is pinned at a directory.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let pins = PinDir::new(dir);
        match pins.exists() {
            Ok(true) => {}
            Ok(false) => return Err(OpenError::none(&pins)),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(OpenError::NotAllowed(dir.display().to_string()));
            }
            Err(source) => {
                let action = format!("open {}", pins.maps().display());
                return Err(StoreError { map: "maps", action, source }.into());
            }
        }
        Ok(Self::open_pins(&pins)?)
    }

    fn open_pins(pins: &PinDir) -> Result<Self, StoreError> {
        let maps = &pins.maps();
        let words = |name| table::open(maps, name)?.words().map_err(|error| failed(name, "share", error));
        let infos = names::MAPS.iter().map(|&name| Ok((name, *table::open(maps, name)?.info())));
        Ok(Self {
            v4: FamilyTables::open(
                maps,
                [
                    names::FRONTENDS_V4,
                    names::RANGES_V4,
                    names::SESSIONS_V4,
                    names::FLOWS_V4,
                    names::FOREIGN_V4,
                    names::FRAGMENTS_V4,
                ],
            )?,
            v6: FamilyTables::open(
                maps,
                [
                    names::FRONTENDS_V6,
                    names::RANGES_V6,
                    names::SESSIONS_V6,
                    names::FLOWS_V6,
                    names::FOREIGN_V6,
                    names::FRAGMENTS_V6,
                ],
            )?,
            node: Table::open(maps, names::NODE)?,
            snat_port_cursor: Table::open(maps, names::SNAT_PORT_CURSOR)?,
            devices: Table::open(maps, names::DEVICES)?,
            members: Table::open(maps, names::MEMBERS)?,
            backends: Table::open(maps, names::BACKENDS)?,
            generations: words(names::BACKENDS)?,
            sockets: Table::open(maps, names::SOCKETS)?,
            names: Table::open(maps, names::NAMES)?,
            counters: PerCpu::open(maps, names::COUNTERS)?,
            usage: PerCpu::open(maps, names::USAGE)?,
            slots: words(names::SLOTS)?,
            filter: words(names::FILTER)?,
            loads: words(names::LOADS)?,
            status: Table::open(maps, names::STATUS)?,
            service_conditions: Table::open(maps, names::SERVICE_CONDITIONS)?,
            events: table::open(maps, names::EVENTS)?,
            report: sys::obj_get(&pins.prog(names::REPORT)).map_err(|error| failed(names::EVENTS, "report", error))?,
            correct: sys::obj_get(&pins.prog(names::CORRECT))
                .map_err(|error| failed(names::SESSIONS_V4, "correct", error))?,
            maps: infos.collect::<Result<_, StoreError>>()?,
        })
    }

    /// Every map with the kernel's information about it, in the order of [`names::MAPS`].
    #[must_use]
    pub fn maps(&self) -> &[(&'static str, MapInfo)] {
        &self.maps
    }

    /// The tables of one family.
    #[must_use]
    pub fn family<A: Family>(&self) -> &FamilyTables<A> {
        A::tables(self)
    }

    /// How often each reason occurred, by its number, summed over all CPUs.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn counter_sums(&self) -> Result<Vec<u64>, StoreError> {
        self.counters.iter().map(|entry| entry.map(|(_, counts)| counts.iter().sum())).collect()
    }

    /// The counts of each service and backend, summed over all CPUs.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn usage_sums(&self) -> Result<BTreeMap<UsageKey, Usage>, StoreError> {
        self.usage.iter().map(|entry| entry.map(|(key, counts)| (key, sum(&counts)))).collect()
    }

    /// Whether a backend's index still belongs to the pod that it belonged to with this generation.
    #[must_use]
    pub fn is_alive(&self, BackendRef { index, generation }: BackendRef) -> bool {
        index < self.generations.len() && self.generations.load_u32(index) == generation
    }

    /// Whether a connection to a frontend follows its pool: a connection of datagrams does while the frontend exists, because
    /// there is nothing to lose. All others go on while their backend lives. `address` is IPv6 or IPv4-mapped.
    ///
    /// # Errors
    /// [`StoreError`] if the map cannot be read.
    pub fn follows_pool(&self, protocol: u8, address: V6, port: Port) -> Result<bool, StoreError> {
        if protocol != UDP {
            return Ok(false);
        }
        let v4 = V4::from_mapped(address.0);
        Ok(if v4.to_mapped() == address.0 {
            self.v4.frontends.get(&FrontendKey::new(v4, port, UDP))?.is_some()
        } else {
            self.v6.frontends.get(&FrontendKey::new(address, port, UDP))?.is_some()
        })
    }

    /// The backends that have left every pool and still have their index.
    #[must_use]
    pub fn lingering(&self) -> BTreeSet<BackendRef> {
        let lingering = |index| {
            // The generation comes first, then the flags.
            let [generation, flags]: [u32; 2] = bytemuck::must_cast(self.generations.load_u64(index));
            let lingers = generation % 2 == 1 && flags & BACKEND_LINGERING != 0;
            lingers.then_some(BackendRef { index, generation })
        };
        (0..self.generations.len()).filter_map(lingering).collect()
    }

    /// Removes all socket entries.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn forget_sockets(&self) -> Result<(), StoreError> {
        for entry in &self.sockets {
            self.sockets.remove(&entry?.0)?;
        }
        Ok(())
    }

    /// Removes a pin, and reports the reason. Returns the removed pin.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn remove_session<A: Family>(
        &self,
        key: &SessionKey<A>,
        kind: EventKind,
        reason: Reason,
        now_ns: u64,
    ) -> Result<Option<Session>, StoreError> {
        self.remove_session_if(key, kind, reason, now_ns, |_| true)
    }

    /// Like [`KernelStore::remove_session`], but only if the pin, looked up again, still satisfies `condition`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn remove_session_if<A: Family>(
        &self,
        key: &SessionKey<A>,
        kind: EventKind,
        reason: Reason,
        now_ns: u64,
        condition: impl FnOnce(&Session) -> bool,
    ) -> Result<Option<Session>, StoreError> {
        let sessions = &self.family::<A>().sessions;
        let Some(session) = sessions.get(key)?.filter(condition) else { return Ok(None) };
        if !sessions.remove(key)? {
            return Ok(None);
        }
        self.add_load(&session, -1)?;
        self.report(&Event {
            time_ns: now_ns,
            client: key.client.to_mapped(),
            service: session.service,
            scope: key.scope,
            from: session.backend,
            to: BackendRef::default(),
            kind: kind as u8,
            reason: reason as u8,
            pad: [0; 6],
        })?;
        Ok(Some(session))
    }

    /// Sets a pin, replaces any pin with the same key, and reports that an operator did this.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn put_session<A: Family>(&self, key: &SessionKey<A>, session: &Session) -> Result<(), StoreError> {
        let sessions = &self.family::<A>().sessions;
        let old = sessions.get(key)?;
        sessions.put(key, session)?;
        if let Some(old) = &old {
            self.add_load(old, -1)?;
        }
        self.add_load(session, 1)?;
        self.report(&Event {
            time_ns: session.last_used_ns,
            client: key.client.to_mapped(),
            service: session.service,
            scope: key.scope,
            from: old.map_or(BackendRef::default(), |old| old.backend),
            to: session.backend,
            kind: EventKind::Pinned as u8,
            reason: session.reason,
            pad: [0; 6],
        })
    }

    /// Adds a number of sessions to the load of a session's backend, unless that backend has gone: the index may belong to
    /// another one.
    fn add_load(&self, session: &Session, sessions: i64) -> Result<(), StoreError> {
        if session.backend.index < self.loads.len() && self.is_alive(session.backend) {
            self.loads.add_u64(session.backend.index, sessions);
        }
        Ok(())
    }

    /// Writes an event to the ring. A BPF program does that, because user space may not write to the ring.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn report(&self, event: &Event) -> Result<(), StoreError> {
        send(&self.report, event).map_err(|error| failed(names::EVENTS, "report", error))
    }

    /// Corrects a pin's number of connections if it is still the one that was read. A BPF program does both in one step.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn correct<A: Family>(&self, correction: &Correction) -> Result<(), StoreError> {
        send(&self.correct, correction).map_err(|error| failed(A::SESSIONS, "correct", error))
    }

    fn write_slots(&self, first: u32, backends: &[u32]) -> Result<(), StoreError> {
        let end = u64::from(first) + backends.len() as u64;
        if end > u64::from(self.slots.len()) {
            let source = io::Error::from_raw_os_error(libc::E2BIG);
            return Err(StoreError { map: names::SLOTS, action: format!("write slots {first}..{end}"), source });
        }
        for (slot, &backend) in (first..).zip(backends) {
            self.slots.store_u32(slot, backend);
        }
        Ok(())
    }

    /// Sets bits in one part of the filter.
    fn set_filter(&self, direction: Direction, bits: &[u32]) {
        for &bit in bits {
            let (word, mask) = filter_word(direction, bit);
            self.filter.set_bits(word, mask);
        }
    }
}

/// Runs a program on a packet that contains this value.
fn send<V: Pod>(program: &OwnedFd, value: &V) -> Result<(), sys::SysError> {
    /// The kernel accepts no frame shorter than an Ethernet header.
    const HEADER: [u8; 14] = [0; 14];
    let frame = [&HEADER, bytemuck::bytes_of(value)].concat();
    sys::test_run(program.as_fd(), &frame, 1)?;
    Ok(())
}

/// The word of the filter that holds a bit of one part, and the bit's mask in it.
#[must_use]
pub fn filter_word(direction: Direction, bit: u32) -> (u32, u64) {
    let bit = direction as u32 * FILTER_BITS + bit % FILTER_BITS;
    (bit / 64, 1 << (bit % 64))
}

fn sum(counts: &[Usage]) -> Usage {
    let mut sum = Usage::default();
    for of_cpu in counts {
        for (total, count) in sum.counts.iter_mut().zip(of_cpu.counts) {
            *total += count;
        }
    }
    sum
}

fn failed(map: &'static str, action: &str, error: sys::SysError) -> StoreError {
    StoreError { map, action: format!("{action}: {} {}", error.call, error.object), source: error.source }
}

/// Reads a whole table into memory. Only for tables that plans write: the configuration limits their size.
fn collect<K: Pod + Debug + Ord, V: Pod>(table: &Table<K, V>) -> Result<BTreeMap<K, V>, StoreError> {
    table.iter().collect()
}

fn keys<K: Pod + Debug + Ord, V: Pod>(table: &Table<K, V>) -> Result<BTreeSet<K>, StoreError> {
    table.iter().map(|entry| entry.map(|(key, _)| key)).collect()
}

impl Store for KernelStore {
    fn apply(&mut self, op: &Op) -> Result<(), StoreError> {
        match op {
            Op::PutName(key, name) => self.names.put(key, &Name::new(name)),
            Op::RemoveName(key) => self.names.remove(key).map(drop),
            Op::PutBackend(index, backend) => self.backends.put(index, backend),
            Op::PutMember(key, member) => self.members.put(key, member),
            Op::RemoveMember(key) => self.members.remove(key).map(drop),
            Op::WriteSlots { first, backends } => self.write_slots(*first, backends),
            Op::SetFilter(direction, bits) => {
                self.set_filter(*direction, bits);
                Ok(())
            }
            Op::PutUsage(key) => self.usage.make(key),
            Op::RemoveUsage(key) => self.usage.remove(key).map(drop),
            Op::PutNode(node) => self.node.put(&0, node),
            Op::PutRangeV4(key) => self.v4.ranges.put(key, &1),
            Op::PutRangeV6(key) => self.v6.ranges.put(key, &1),
            Op::RemoveRangeV4(key) => self.v4.ranges.remove(key).map(drop),
            Op::RemoveRangeV6(key) => self.v6.ranges.remove(key).map(drop),
            Op::PutFrontendV4(key, frontend) => self.v4.frontends.put(key, frontend),
            Op::PutFrontendV6(key, frontend) => self.v6.frontends.put(key, frontend),
            Op::RemoveFrontendV4(key) => self.v4.frontends.remove(key).map(drop),
            Op::RemoveFrontendV6(key) => self.v6.frontends.remove(key).map(drop),
            Op::Grace => sys::synchronize().map_err(|error| failed("grace", "wait", error)),
        }
    }

    fn observe(&self) -> Result<Observed, StoreError> {
        // Names are written before what they name and removed after it. A reader next to a running agent reads them on both
        // sides.
        let mut names = self.all_names()?;
        let frontends_v4 = collect(&self.v4.frontends)?;
        let frontends_v6 = collect(&self.v6.frontends)?;
        let extents = frontends_v4.values().chain(frontends_v6.values());
        let slots = extents
            .filter(|frontend| frontend.slot_count > 0)
            .map(|frontend| {
                let end = frontend.slot_first.saturating_add(frontend.slot_count).min(self.slots.len());
                let slots = (frontend.slot_first..end).map(|slot| self.slots.load_u32(slot));
                (frontend.slot_first, slots.collect())
            })
            .collect();
        let ever_used = (0..self.generations.len()).filter(|index| self.generations.load_u32(*index) != 0);
        let backends =
            ever_used.filter_map(|index| Some(self.backends.get(&index).transpose()?.map(|record| (index, record))));
        let usage = self.usage.iter().map(|entry| entry.map(|(key, _)| key));
        Ok(Observed {
            frontends_v4,
            frontends_v6,
            ranges_v4: keys(&self.v4.ranges)?,
            ranges_v6: keys(&self.v6.ranges)?,
            node: self.node.get(&0)?.unwrap_or_default(),
            slots,
            members: collect(&self.members)?,
            backends: backends.collect::<Result<_, _>>()?,
            usage: usage.collect::<Result<BTreeSet<_>, _>>()?,
            names: {
                names.append(&mut self.all_names()?);
                names
            },
        })
    }

    fn capacity(&self) -> Capacity {
        Capacity {
            backends: self.backends.info().max_entries,
            slots: self.slots.len(),
            ranges: self.v4.ranges.info().max_entries.min(self.v6.ranges.info().max_entries),
        }
    }
}

impl KernelStore {
    fn all_names(&self) -> Result<BTreeMap<NameKey, String>, StoreError> {
        self.names.iter().map(|entry| entry.map(|(key, name)| (key, name.as_str().to_owned()))).collect()
    }
}
