//! Loads the programs and the maps, and pins them so that they outlive this process.
//!
//! Loading over a running dataplane is an upgrade: pinned maps of the same layout are reused, the entries of maps of another
//! size are copied, and the new programs replace the old ones in the attached links, so that each packet is handled by an old
//! or a new program. Maps of an older layout with the same records (`abi::OLDEST_READABLE`) are used by both versions until the
//! old programs are replaced; flows, which have changed records, are converted. A load that fails leaves the running dataplane
//! as it was.

mod clock;
mod limit;
mod machine;
mod refusal;
pub mod sizes;

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    panic::resume_unwind,
    thread,
};

use affinity_common::{
    abi::{CONFIG_MAGIC, Config, TAIL_TC_REDIRECT, TAIL_TC_REPLY, TAIL_XDP_REDIRECT},
    flow::REFRESH_NS,
    names,
    reject::rejection_interval_ns,
};
use aya::{
    Ebpf, EbpfError, EbpfLoader,
    programs::{Program, ProgramError, ProgramType, SchedClassifier},
    sys::{BpfHelper, is_helper_supported},
};
use aya_log::Level;
use aya_obj::Object;
use tracing::warn;

pub(crate) use self::refusal::JIT_ADVICE;
pub use self::{
    clock::{ClockError, Ticks},
    limit::Memory,
    machine::{Kernel, Unsuitable},
    refusal::{CreationError, Refusal},
    sizes::{MAX_RANGES, Sizes, cost, mib},
};
use crate::{
    attach::{self, AttachError},
    netns,
    objects::PROGRAMS,
    pins::{PinDir, PinError, Pinned},
    store::kernel::{CarryError, carry, carry_late, copy_older_flows},
    sys::{self, Map, MapInfo, SysError, Write},
};

/// The programs for packets, and those that the agent runs. [`names::CLOCK`] is needed only during a load.
const PACKET_PROGRAMS: [&str; 8] = [
    names::XDP_FORWARD,
    names::XDP_REDIRECT,
    names::TC_FORWARD,
    names::TC_REVERSE,
    names::TC_REDIRECT,
    names::TC_REPLY,
    names::REPORT,
    names::CORRECT,
];

/// The entries of the tail-call tables: table, index, program.
const TAIL_CALLS: [(&str, u32, &str); 3] = [
    (names::XDP_TAIL_CALLS, TAIL_XDP_REDIRECT, names::XDP_REDIRECT),
    (names::TC_TAIL_CALLS, TAIL_TC_REDIRECT, names::TC_REDIRECT),
    (names::TC_TAIL_CALLS, TAIL_TC_REPLY, names::TC_REPLY),
];

/// The dataplane cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// This binary was built with `AFFINITY_SKIP_EBPF=1`.
    #[error("this build has no kernel programs: build it without AFFINITY_SKIP_EBPF")]
    NoPrograms,
    /// The pin directory cannot be used.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The object cannot be read.
    #[error("the kernel programs cannot be read: {0}")]
    Object(#[from] aya_obj::ParseError),
    /// The maps cannot be created.
    #[error("the maps cannot be created: {0}")]
    Maps(#[from] EbpfError),
    /// The kernel refused to create a map.
    #[error(transparent)]
    Creation(#[from] CreationError),
    /// A pinned map has another layout.
    #[error(
        "map {name} is pinned at {path} as {pinned}, but this version needs {needed}: remove the old dataplane with \
         `affinity detach` (it deletes all pins and connections), or use another --pin-dir"
    )]
    Layout {
        /// The map.
        name: &'static str,
        /// Where it is pinned.
        path: String,
        /// Its layout.
        pinned: String,
        /// The layout of this version.
        needed: String,
    },
    /// Entries of a map cannot be copied.
    #[error(transparent)]
    Carry(#[from] CarryError),
    /// The kernel rejected a program.
    #[error("{0}")]
    Refused(Refusal),
    /// The programs would not work correctly on this machine or kernel.
    #[error("{0}: {advice}", advice = .0.advice())]
    Unsuitable(#[from] Unsuitable),
    /// The kernel interprets programs. Tail calls between programs with functions need compiled ones.
    #[error("the kernel's BPF JIT is off, and the programs need it: {JIT_ADVICE}")]
    NoJit,
    /// The object lacks a program or map that it should have.
    #[error("the compiled kernel programs have no {0}")]
    Missing(&'static str),
    /// The clock could not be measured.
    #[error(transparent)]
    Clock(#[from] ClockError),
    /// The programs in the links could not be replaced.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

/// How to load.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Sizes of the maps.
    pub sizes: Sizes,
    /// The log level of the programs; none costs nothing.
    pub log_level: Option<Level>,
    /// Whether TC redirects translated packets past the stack.
    pub redirect: bool,
    /// Hooks that nothing will be attached to.
    pub unused: Unused,
    /// How many packets a second each processor may reject in the long run; zero means no limit.
    pub rejections_per_second: u32,
    /// For tests: the programs' time in nanoseconds and random number, instead of the kernel's.
    pub fixed: Option<(u64, u64)>,
    /// For tests: an object file instead of the built-in one.
    pub object: Option<&'static [u8]>,
}

/// Hooks that nothing will be attached to. Their programs are loaded only if they are attached already, because verification
/// takes nearly all the time of a start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Unused {
    /// XDP.
    pub xdp: bool,
    /// Cgroups.
    pub sockets: bool,
}

impl Unused {
    /// Without the hooks that a dataplane of this or another layout is attached to.
    fn but_attached(self, pins: &PinDir) -> Result<Self, LoadError> {
        let mut unused = self;
        for layout in pins.other_layouts()?.iter().chain([pins]) {
            let (xdp, sockets) = attach::hooks_in_use(layout)?;
            unused.xdp &= !xdp;
            unused.sockets &= !sockets;
        }
        Ok(unused)
    }

    /// Whether a program for packets is needed.
    fn needs(self, program: &str, redirect: bool) -> bool {
        match program {
            names::XDP_FORWARD | names::XDP_REDIRECT => !self.xdp,
            names::TC_REDIRECT | names::TC_REPLY => redirect,
            _ => true,
        }
    }
}

impl Options {
    fn object(&self) -> &'static [u8] {
        self.object.unwrap_or(PROGRAMS)
    }
}

/// What was loaded and pinned.
pub struct Loaded {
    /// The paths of the pins.
    pub pins: PinDir,
    /// The maps as they are now.
    pub maps: Vec<(&'static str, MapInfo)>,
    /// The kernel's jiffies as a clock.
    pub ticks: Ticks,
    /// The maps that changed their size.
    pub resized: Vec<&'static str>,
    /// Of those, the ones that had no room for all entries, and how many were dropped.
    pub dropped: Vec<(&'static str, u64)>,
    /// Attachments that run the new programs now.
    pub upgraded: usize,
    /// Why the socket programs could not be loaded; none if they were loaded, or were not needed.
    pub without_sockets: Option<String>,
    /// The object: its log ring is read by `aya_log::EbpfLogger`.
    pub ebpf: Ebpf,
}

impl Loaded {
    /// What the kernel allocated for the maps, in bytes.
    #[must_use]
    pub fn cost(&self) -> u64 {
        self.maps.iter().map(|(_, info)| cost(info)).sum()
    }
}

/// What a load does with a map.
enum Plan {
    /// Create it, or open the pinned one.
    Keep,
    /// Create it next to the pinned one, which it will replace.
    Replace(Map),
}

/// Loads everything under a pin directory. The caller holds the directory's lock.
///
/// A load that fails leaves nothing pinned that was not there before.
///
/// # Errors
/// [`LoadError`].
pub fn load(pins: &PinDir, options: &Options) -> Result<Loaded, LoadError> {
    if options.object().is_empty() {
        return Err(LoadError::NoPrograms);
    }
    Kernel::running().suits()?;
    if jit_is_off() {
        return Err(LoadError::NoJit);
    }
    let before = pins.pinned()?;
    let prepared = prepare(pins, &before, options).inspect_err(|_| roll_back(pins, &before))?;
    let Prepared { plans, ticks, since_ns, loaded } = prepared;
    let Beside { ebpf, programs, without_sockets, dropped } = loaded;
    // If a dataplane runs, a part of it may use the new maps and programs from here on.
    let upgraded = switch(pins, &plans, &programs, since_ns).inspect_err(|_| {
        if !before.has_maps() {
            roll_back(pins, &before);
        }
    })?;
    let maps = names::MAPS.iter().map(|&name| Ok((name, *Map::open(&pins.map(name))?.info())));
    let maps = maps.collect::<Result<_, SysError>>()?;
    let resized = dropped.keys().copied().collect();
    let dropped = dropped.into_iter().filter(|(_, entries)| *entries > 0).collect();
    Ok(Loaded { pins: pins.clone(), maps, ticks, resized, dropped, upgraded, without_sockets, ebpf })
}

/// What is loaded next to a dataplane that may run. It handles no packets yet.
struct Prepared {
    plans: BTreeMap<&'static str, Plan>,
    ticks: Ticks,
    /// Entries that were used since then may be missing in the new maps.
    since_ns: u64,
    loaded: Beside,
}

fn prepare(pins: &PinDir, before: &Pinned, options: &Options) -> Result<Prepared, LoadError> {
    pins.create()?;
    let older = if before.has_maps() { None } else { pins.readable_layout()? };
    if let Some(older) = &older {
        share_maps(older, pins, options)?;
    }
    let plans = plan(pins, options)?;
    let ticks = measure_clock(options)?;
    let since_ns = sys::monotonic_ns().saturating_sub(REFRESH_NS);
    let loaded = load_new_programs(pins, options, &plans, ticks)?;
    if let Some(older) = &older {
        copy_older_flows(older, pins)?;
    }
    Ok(Prepared { plans, ticks, since_ns, loaded })
}

/// Pins the maps of an older dataplane here as well, if this version can use them, so that nothing is lost that the old
/// programs write until they are replaced. Maps that the older layout does not have are created.
fn share_maps(older: &PinDir, pins: &PinDir, options: &Options) -> Result<(), LoadError> {
    for (name, needed) in needed_by(options.object(), &options.sizes)? {
        match Map::open(&older.map(name)) {
            Ok(map) if layout(map.info()) == layout(&needed) => sys::obj_pin(map.as_fd(), &pins.map(name))?,
            Ok(_) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Removes what a load that failed has pinned.
fn roll_back(pins: &PinDir, before: &Pinned) {
    if let Err(error) = pins.roll_back(before) {
        warn!("after a failed start, pins could not be removed: {error}");
    }
}

/// Loads every program as [`load`] would, with the smallest possible maps, and drops them again. Nothing is pinned or attached.
/// Returns what the kernel rejects.
///
/// # Errors
/// [`LoadError`] if that cannot be tried: the maps cannot be created.
pub fn trial(options: &Options) -> Result<Vec<Refusal>, LoadError> {
    if options.object().is_empty() {
        return Err(LoadError::NoPrograms);
    }
    Kernel::running().suits()?;
    if jit_is_off() {
        return Err(LoadError::NoJit);
    }
    let globals = Globals::new(options, Ticks { tick_ns: 1, tick_base: 0, takes_ipv6_flag: false });
    let mut loader = globals.loader();
    for name in names::MAPS {
        if let Some(entries) = Sizes::SMALLEST.entries(name) {
            loader.map_max_entries(name, entries);
        }
    }
    let mut ebpf = loader.load(options.object())?;
    let names: Vec<_> = PACKET_PROGRAMS.into_iter().chain(names::SOCKET_PROGRAMS).chain([names::CLOCK]).collect();
    let mut refusals = Vec::new();
    for loaded in load_each(&mut ebpf, &names) {
        match loaded {
            Err(LoadError::Refused(refusal)) => refusals.push(refusal),
            other => _ = other?,
        }
    }
    Ok(refusals)
}

/// The layout that each map must have.
///
/// # Errors
/// [`LoadError`] if the object cannot be read.
pub(crate) fn needed(sizes: &Sizes) -> Result<Vec<(&'static str, MapInfo)>, LoadError> {
    needed_by(PROGRAMS, sizes)
}

fn needed_by(object: &[u8], sizes: &Sizes) -> Result<Vec<(&'static str, MapInfo)>, LoadError> {
    let object = Object::parse(object)?;
    let maps = names::MAPS.iter().map(|&name| {
        let map = object.maps.get(name).ok_or(LoadError::Missing(name))?;
        let info = MapInfo {
            kind: map.map_type(),
            id: 0,
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: sizes.entries(name).unwrap_or(map.max_entries()),
            flags: map.map_flags(),
        };
        Ok((name, info))
    });
    maps.collect()
}

/// Compares the pinned maps with the needed ones: aya would use any map that it finds, whatever its layout.
fn plan(pins: &PinDir, options: &Options) -> Result<BTreeMap<&'static str, Plan>, LoadError> {
    let mut plans = BTreeMap::new();
    for (name, needed) in needed_by(options.object(), &options.sizes)? {
        let path = pins.map(name);
        let plan = match Map::open(&path) {
            Err(error) if error.is_not_found() => Plan::Keep,
            Err(error) => return Err(error.into()),
            Ok(map) if layout(map.info()) != layout(&needed) => {
                let (path, pinned) = (path.display().to_string(), describe(map.info()));
                return Err(LoadError::Layout { name, path, pinned, needed: describe(&needed) });
            }
            Ok(map) if map.info().max_entries == needed.max_entries => Plan::Keep,
            Ok(map) => Plan::Replace(map),
        };
        plans.insert(name, plan);
    }
    Ok(plans)
}

/// What must be equal for programs to use a map.
const fn layout(info: &MapInfo) -> (u32, u32, u32, u32) {
    (info.kind, info.key_size, info.value_size, info.flags)
}

fn describe(info: &MapInfo) -> String {
    let MapInfo { kind, key_size, value_size, flags, .. } = info;
    format!("type {kind} with keys of {key_size} bytes, values of {value_size} bytes and flags {flags:#x}")
}

/// Loads the clock program alone, with the smallest possible maps, and runs it.
fn measure_clock(options: &Options) -> Result<Ticks, LoadError> {
    let mut loader = EbpfLoader::new();
    for name in names::MAPS {
        loader.map_max_entries(name, 1);
    }
    let mut ebpf = loader.load(options.object())?;
    let clock = load_program(names::CLOCK, ebpf.program_mut(names::CLOCK).ok_or(LoadError::Missing(names::CLOCK))?)?;
    Ok(clock::measure(clock.as_fd())?)
}

/// The maps that the programs write.
const CARRIED_LATE: [&str; 5] =
    [names::SESSIONS_V4, names::SESSIONS_V6, names::FLOWS_V4, names::FLOWS_V6, names::SOCKETS];

type Programs = BTreeMap<&'static str, OwnedFd>;

/// Constants for the programs: about this kernel, and from the options.
struct Globals {
    config: Config,
    log_level: u8,
}

impl Globals {
    fn new(options: &Options, Ticks { tick_ns, tick_base, takes_ipv6_flag }: Ticks) -> Self {
        let (fixed_now_ns, fixed_random) = options.fixed.unwrap_or_default();
        // Without the cookie, the node has no node ports on loopback; everything else works.
        let node_netns = netns::Namespace::own().and_then(|own| own.cookie()).unwrap_or(0);
        let config = Config {
            magic: CONFIG_MAGIC,
            tick_ns,
            tick_base,
            reject_errno: reject_errno(),
            node_netns,
            redirect: u64::from(options.redirect),
            takes_ipv6_flag: u64::from(takes_ipv6_flag),
            rejection_interval_ns: rejection_interval_ns(options.rejections_per_second),
            fixed_now_ns,
            fixed_random,
        };
        Self { config, log_level: options.log_level.map_or(0, |level| level as u8) }
    }

    fn loader(&self) -> EbpfLoader<'_> {
        let mut loader = EbpfLoader::new();
        loader.override_global("CONFIG", bytemuck::bytes_of(&self.config), true);
        loader.override_global("AYA_LOG_LEVEL", &self.log_level, false);
        loader
    }
}

/// Programs and maps, loaded next to what runs.
struct Beside {
    ebpf: Ebpf,
    programs: Programs,
    without_sockets: Option<String>,
    /// For each map that changes its size, how many entries had no room.
    dropped: BTreeMap<&'static str, u64>,
}

/// Loads the programs with the maps that they will use, next to what runs. They handle no packets yet.
fn load_new_programs(
    pins: &PinDir,
    options: &Options,
    plans: &BTreeMap<&'static str, Plan>,
    ticks: Ticks,
) -> Result<Beside, LoadError> {
    let globals = Globals::new(options, ticks);
    let mut loader = globals.loader();
    for (&name, plan) in plans {
        if let Some(entries) = options.sizes.entries(name) {
            loader.map_max_entries(name, entries);
        }
        loader.map_pin_path(
            name,
            match plan {
                Plan::Keep => pins.map(name),
                Plan::Replace(_) => pins.next_map(name),
            },
        );
    }
    let mut ebpf = loader.load(options.object()).map_err(|error| refusal::creation_failed(error, &options.sizes))?;
    let unused = options.unused.but_attached(pins)?;
    let for_packets: Vec<_> = PACKET_PROGRAMS.into_iter().filter(|name| unused.needs(name, options.redirect)).collect();
    let for_sockets = if unused.sockets { &[][..] } else { &names::SOCKET_PROGRAMS };
    let mut programs = load_programs(&mut ebpf, &for_packets)?;
    // A kernel built without cgroup programs can still run the others.
    let without_sockets = match load_programs(&mut ebpf, for_sockets) {
        Ok(for_sockets) => {
            programs.extend(for_sockets);
            None
        }
        Err(error) => Some(error.to_string()),
    };
    let mut dropped = BTreeMap::new();
    for (&name, plan) in plans {
        if let Plan::Replace(old) = plan {
            dropped.insert(name, carry(old, &Map::open(&pins.next_map(name))?)?);
        }
    }
    Ok(Beside { ebpf, programs, without_sockets, dropped })
}

/// Loads all of these programs or none.
fn load_programs(ebpf: &mut Ebpf, names: &[&'static str]) -> Result<Programs, LoadError> {
    load_each(ebpf, names).into_iter().collect()
}

/// Loads these programs in parallel, because verification takes nearly all the time of a start.
fn load_each(ebpf: &mut Ebpf, names: &[&'static str]) -> Vec<Result<(&'static str, OwnedFd), LoadError>> {
    thread::scope(|scope| {
        let mut loads = BTreeMap::new();
        for (found, program) in ebpf.programs_mut() {
            if let Some(&name) = names.iter().find(|name| **name == found) {
                loads.insert(name, scope.spawn(move || load_program(name, program)));
            }
        }
        let load = |&name: &&'static str| {
            let load = loads.remove(name).ok_or(LoadError::Missing(name))?;
            Ok((name, load.join().unwrap_or_else(|panic| resume_unwind(panic))?))
        };
        names.iter().map(load).collect()
    })
}

/// The error number that rejected sockets get; zero, for the kernel's `EPERM`, if programs cannot choose one.
fn reject_errno() -> u64 {
    let supported = is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval);
    if supported.unwrap_or(false) { libc::ECONNREFUSED as u64 } else { 0 }
}

/// Whether the kernel interprets programs. False if that cannot be read; then the load reports it.
pub(crate) fn jit_is_off() -> bool {
    fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").is_ok_and(|value| value.trim() == "0")
}

fn load_program(name: &'static str, program: &mut Program) -> Result<OwnedFd, LoadError> {
    let failed = |error: ProgramError| LoadError::Refused(Refusal::new(name, &error));
    #[expect(clippy::wildcard_enum_match_arm, reason = "all others are for TC, and refused where they are not")]
    let loaded = match &mut *program {
        Program::Xdp(xdp) => xdp.load(),
        Program::CgroupSockAddr(call) => call.load(),
        Program::CgroupSock(end) => end.load(),
        other => <&mut SchedClassifier>::try_from(other).and_then(SchedClassifier::load),
    };
    loaded.map_err(failed)?;
    let fd = program.fd().map_err(failed)?.as_fd().try_clone_to_owned();
    fd.map_err(|error| SysError::new("dup", name, error).into())
}

/// Puts the new programs into the links, and the new maps and programs at their paths. Returns the number of links.
fn switch(
    pins: &PinDir,
    plans: &BTreeMap<&'static str, Plan>,
    programs: &Programs,
    since_ns: u64,
) -> Result<usize, LoadError> {
    for (&name, program) in programs {
        let next = pins.prog(&format!("{name}-next"));
        pins.unpin(&next)?;
        sys::obj_pin(program.as_fd(), &next)?;
        pins.rename(&next, &pins.prog(name))?;
    }
    for program in pins.list_programs()? {
        if !programs.keys().any(|name| pins.prog(name) == program) {
            pins.unpin(&program)?;
        }
    }
    fill_tail_calls(pins, programs)?;
    // Continue even if one attachment was not upgraded: the others use the new maps already.
    let upgraded = attach::upgrade(pins);
    for (&name, plan) in plans {
        let Plan::Replace(old) = plan else { continue };
        let next = pins.next_map(name);
        if CARRIED_LATE.contains(&name) {
            carry_late(old, &Map::open(&next)?, since_ns)?;
        }
        pins.rename(&next, &pins.map(name))?;
    }
    Ok(upgraded?)
}

/// Fills the tail-call tables.
fn fill_tail_calls(pins: &PinDir, programs: &Programs) -> Result<(), LoadError> {
    for (table, index, name) in TAIL_CALLS {
        let table = Map::open(&pins.map(table))?;
        match programs.get(name) {
            Some(program) => table.update(&index.to_ne_bytes(), &program.as_raw_fd().to_ne_bytes(), Write::Any)?,
            None => table.delete(&index.to_ne_bytes())?,
        };
    }
    Ok(())
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { pins, maps, ticks, resized, dropped, upgraded, without_sockets, ebpf: _ } = self;
        f.debug_struct("Loaded")
            .field("pins", pins)
            .field("maps", maps)
            .field("ticks", ticks)
            .field("resized", resized)
            .field("dropped", dropped)
            .field("upgraded", upgraded)
            .field("without_sockets", without_sockets)
            .finish()
    }
}
