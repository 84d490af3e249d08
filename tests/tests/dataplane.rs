//! User space and a real kernel: loading, pinning, carrying over, attaching, and the store.
//!
//! Each test has a separate pin directory and, if it needs devices, a separate network namespace. Both are removed at its end.

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use affinity_common::{
    abi::{
        BACKEND_LINGERING, Backend, BackendRef, Direction, Edit, Event, EventKind, FILTER_BITS, FLOW_ANSWERED,
        FLOW_OPEN, FLOW_RESET, Flow, FlowKey, Frontend, FrontendKey, Member, MemberKey, NameKey, NameKind, Port,
        Reason, Session, SessionKey, Timer, UsageKey, UsageOf, V4, V6, filter_bit,
    },
    names,
};
use affinity_tests::lab::{eventually, has_tcx};
use affinity_tests::packet::{Frame, tcp_flags};
use affinity_tests::patience::patience;
use affinity_user::{
    agent,
    attach::{self, Device, Devices, Framing, Hook, XdpPolicy, cgroup::SocketPolicy},
    desired::{DEFAULT_PROXY_NAME, NodeFacts, Services},
    events::{Consumer, EventReader},
    linger::Limits,
    load::{self, Loaded, Options, Sizes, Unused},
    pins::PinDir,
    source::{NodeAddresses, Source},
    store::{
        Op, Store,
        kernel::{KernelStore, OpenError},
    },
    sweep::{FilterPlans, LOOK_EVERY, Sweeper, Totals},
    sys::{self, Map, MapInfo, Write, monotonic_ns},
};
use anyhow::{Context, Result, ensure};
use aya::programs::ProgramInfo;
use bytemuck::Zeroable;

/// Sizes for every test: small maps that are quick to create.
const SIZES: Sizes = Sizes {
    sessions: 4096,
    flows: 8192,
    frontends: 256,
    members: 256,
    backends: 128,
    slots: 1024,
    names: 256,
    usage: 256,
    events_bytes: 1 << 16,
};

/// A separate pin directory.
struct Pins(PinDir);

impl Pins {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("affinity-dp-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self(PinDir::new(&Path::new("/sys/fs/bpf").join(name)))
    }

    fn load(&self, sizes: Sizes) -> Result<Loaded> {
        Ok(load::load(&self.0, &Options { sizes, ..Options::default() })?)
    }

    fn store(&self) -> Result<KernelStore> {
        Ok(KernelStore::open(self.0.root())?)
    }

    fn ids(&self) -> Result<Vec<u32>> {
        Ok(self.store()?.maps().iter().map(|(_, info)| info.id).collect())
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.0.remove().expect("the pins go away");
    }
}

/// A network namespace with one end of a veth pair, `wire`, and the other, `peer`.
struct Wire {
    namespace: String,
}

impl Wire {
    fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let namespace = format!("aff-dp-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &namespace])?;
        let wire = Self { namespace };
        wire.ip(&["link", "add", "wire", "type", "veth", "peer", "name", "peer"])?;
        Ok(wire)
    }

    fn ip(&self, args: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.namespace], args].concat())
    }

    /// Runs `work` inside, on a separate thread.
    fn on_a_thread<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = PathBuf::from("/run/netns").join(&self.namespace);
        let enter = || -> Result<T> {
            let file = fs::File::open(path)?;
            let network = rustix::thread::LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(file.as_fd(), Some(network))?;
            work()
        };
        thread::scope(|scope| scope.spawn(enter).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }

    /// The same, with a runtime for netlink.
    fn inside<T: Send>(&self, work: impl AsyncFnOnce() -> Result<T> + Send) -> Result<T> {
        self.on_a_thread(|| tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work()))
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.namespace]).expect("the namespace goes away");
    }
}

fn ip(args: &[&str]) -> Result<()> {
    let done = Command::new("ip").args(args).output()?;
    ensure!(done.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

fn session_key(client: u32) -> SessionKey<V4> {
    SessionKey::new(7, V4(client.to_be_bytes()), 32)
}

fn session(client: u32) -> Session {
    Session {
        created_ns: 5,
        last_used_ns: 6,
        backend: BackendRef { index: client % 3, generation: 1 },
        uses: client,
        ..Zeroable::zeroed()
    }
}

fn put_sessions(store: &KernelStore, clients: std::ops::Range<u32>) -> Result<()> {
    clients.into_iter().try_for_each(|client| Ok(store.v4.sessions.put(&session_key(client), &session(client))?))
}

fn clients(store: &KernelStore) -> Result<Vec<u32>> {
    let mut clients = Vec::new();
    for entry in &store.v4.sessions {
        let (key, value) = entry?;
        let client = u32::from_be_bytes(key.client.0);
        assert_eq!((key.scope, value), (7, session(client)));
        clients.push(client);
    }
    clients.sort_unstable();
    Ok(clients)
}

const SERVICE: V4 = V4([10, 96, 0, 10]);
const POD: V4 = V4([10, 244, 0, 10]);
/// The backend of [`POD`] in tests with open connections.
const POD_3: BackendRef = BackendRef { index: 3, generation: 1 };
const HTTP: Port = Port::new(80);
const SERVED: Port = Port::new(8080);
const TCP: u8 = 6;
const UDP: u8 = 17;

fn frontend() -> Frontend {
    Frontend {
        timeout_ns: 60_000_000_000,
        service: 1,
        pool: 2,
        group: 1,
        own: 2,
        slot_first: 16,
        slot_count: 1,
        seed: 0,
        select: 0,
        timer: 0,
        prefix: 32,
        flags: affinity_common::abi::AFFINITY,
    }
}

/// A service of one pod, as a plan would publish it.
fn publish() -> Vec<Op> {
    let key = FrontendKey::new(SERVICE, HTTP, TCP);
    let address = affinity_common::abi::Address::to_mapped(POD);
    let member = Member::ready(1, SERVED);
    vec![
        Op::PutName(NameKey { kind: NameKind::Service as u32, id: 1 }, "default/web".to_owned()),
        Op::PutUsage(UsageKey { of: UsageOf::Service as u32, id: 1 }),
        Op::PutUsage(UsageKey { of: UsageOf::Backend as u32, id: 3 }),
        Op::PutBackend(3, Backend { address, generation: 1, flags: 0 }),
        Op::PutMember(MemberKey { pool: 2, backend: 3 }, member),
        Op::WriteSlots { first: 16, backends: vec![3] },
        Op::SetFilter(Direction::Dnat, vec![filter_bit(SERVICE, HTTP, TCP)]),
        Op::SetFilter(Direction::RevDnat, vec![filter_bit(POD, SERVED, TCP)]),
        Op::PutFrontendV4(key, frontend()),
        Op::Grace,
    ]
}

fn syn(client: u8) -> Vec<u8> {
    let from = format!("198.18.0.{client}:40000").parse().expect("an address");
    Frame::tcp(from, "10.96.0.10:80".parse().expect("an address"), tcp_flags::SYN).build()
}

/// Instructions that the verifier may follow for one program; the kernel gives up at a million
/// (<https://elixir.bootlin.com/linux/v6.1/A/ident/BPF_COMPLEXITY_LIMIT_INSNS>). Old kernels follow more: `xdp_forward` takes
/// 360,000 on 6.1 and 226,000 on 6.18.
const VERIFIED_INSTRUCTIONS: u32 = 250_000;

#[test]
fn programs_stay_within_a_budget_of_verified_instructions() -> Result<()> {
    const OTHERS: [&str; 8] = [
        names::XDP_FORWARD,
        names::XDP_REDIRECT,
        names::TC_FORWARD,
        names::TC_REVERSE,
        names::TC_REDIRECT,
        names::TC_REPLY,
        names::REPORT,
        names::CORRECT,
    ];
    let mut counts = Vec::new();
    for redirect in [false, true] {
        let pins = Pins::new();
        load::load(&pins.0, &Options { sizes: SIZES, redirect, ..Options::default() })?;
        let is_loaded = |name: &&str| redirect || ![names::TC_REDIRECT, names::TC_REPLY].contains(name);
        for name in OTHERS.into_iter().filter(is_loaded).chain(names::SOCKET_PROGRAMS) {
            let info = ProgramInfo::from_pin(pins.0.prog(name))?;
            let verified = info.verified_instruction_count().context("a kernel that counts: 5.16")?;
            println!("{name}, redirect {redirect}: {verified} instructions verified");
            counts.push((verified, name));
        }
    }
    let (most, name) = counts.iter().max().context("programs")?;
    ensure!(*most <= VERIFIED_INSTRUCTIONS, "{name}: {most} instructions verified");
    Ok(())
}

#[test]
fn what_is_not_there_is_said_in_one_line() {
    let pins = Pins::new();
    let error = KernelStore::open(pins.0.root()).unwrap_err();
    assert!(matches!(error, OpenError::None(_)));
    assert!(error.to_string().ends_with("run `affinity run` or `affinity attach`"), "{error}");
}

#[test]
fn a_loaded_dataplane_is_pinned_in_full_and_translates_by_the_kernels_own_clock() -> Result<()> {
    let pins = Pins::new();
    let loaded = pins.load(SIZES)?;
    assert!(loaded.resized.is_empty() && loaded.upgraded == 0);
    for (name, info) in &loaded.maps {
        if let Some(entries) = SIZES.entries(name) {
            assert_eq!(info.max_entries, entries, "{name}");
        }
    }
    let mut store = pins.store()?;
    publish().iter().try_for_each(|op| store.apply(op))?;
    for program in [names::XDP_FORWARD, names::TC_FORWARD] {
        let program = sys::obj_get(&pins.0.prog(program))?;
        let run = sys::test_run(program.as_fd(), &syn(1), 1)?;
        assert_eq!(run.data_out[30..34], POD.0, "the destination is the pod");
    }
    let key = SessionKey::new(1, V4([198, 18, 0, 1]), 32);
    let session = store.v4.sessions.get(&key)?.context("the client was pinned")?;
    let age = Duration::from_nanos(monotonic_ns() - session.created_ns);
    assert!(age < patience(Duration::from_secs(2)), "never early, and late by two ticks at most: {age:?}");
    assert_eq!((session.backend, session.uses, store.loads.load_u64(3)), (POD_3, 1, 1));
    Ok(())
}

#[test]
fn the_store_holds_what_was_applied_and_applying_twice_changes_nothing() -> Result<()> {
    let pins = Pins::new();
    pins.load(SIZES)?;
    let mut store = pins.store()?;
    assert_eq!(store.observe()?, affinity_user::store::Observed::default());
    publish().iter().try_for_each(|op| store.apply(op))?;
    let observed = store.observe()?;
    publish().iter().try_for_each(|op| store.apply(op))?;
    assert_eq!(store.observe()?, observed);
    assert_eq!(observed.frontends_v4, [(FrontendKey::new(SERVICE, HTTP, TCP), frontend())].into());
    assert_eq!(observed.slots, [(16, vec![3])].into());
    assert_eq!(observed.members.len(), 1);
    assert_eq!(observed.backends.keys().collect::<Vec<_>>(), [&3]);
    assert_eq!(observed.names.values().collect::<Vec<_>>(), ["default/web"]);
    assert_eq!(observed.usage.len(), 2);
    assert_eq!(store.capacity().slots, SIZES.slots);

    let beyond = Op::WriteSlots { first: SIZES.slots - 1, backends: vec![1, 2] };
    assert!(store.apply(&beyond).unwrap_err().to_string().contains("write slots 1023..1025"));
    for op in [
        Op::RemoveFrontendV4(FrontendKey::new(SERVICE, HTTP, TCP)),
        Op::RemoveFrontendV6(FrontendKey::new(V6([0; 16]), HTTP, TCP)),
        Op::RemoveMember(MemberKey { pool: 2, backend: 3 }),
        Op::RemoveUsage(UsageKey { of: UsageOf::Service as u32, id: 1 }),
        Op::RemoveName(NameKey { kind: NameKind::Service as u32, id: 1 }),
    ] {
        store.apply(&op)?;
        store.apply(&op)?;
    }
    let observed = store.observe()?;
    assert!(observed.frontends_v4.is_empty() && observed.members.is_empty() && observed.names.is_empty());
    Ok(())
}

#[test]
fn a_filter_bit_is_where_the_programs_look() -> Result<()> {
    let pins = Pins::new();
    pins.load(SIZES)?;
    let mut store = pins.store()?;
    let last = FILTER_BITS - 1;
    store.apply(&Op::SetFilter(Direction::RevDnat, vec![0, last]))?;
    let words: Vec<_> = (0..store.filter.len()).filter(|&word| store.filter.load_u64(word) != 0).collect();
    assert_eq!(words, [FILTER_BITS / 64, 2 * FILTER_BITS / 64 - 1]);
    assert_eq!(store.filter.load_u64(words[1]), 1 << 63);
    Ok(())
}

#[test]
fn a_large_table_is_walked_without_a_gap_or_a_repetition() -> Result<()> {
    let pins = Pins::new();
    pins.load(Sizes { sessions: 1 << 18, ..SIZES })?;
    let store = pins.store()?;
    put_sessions(&store, 0..100_000)?;
    let start = Instant::now();
    assert_eq!(clients(&store)?, (0..100_000).collect::<Vec<_>>());
    assert!(
        start.elapsed() < patience(Duration::from_secs(5)),
        "batches, not a call for each entry: {:?}",
        start.elapsed()
    );
    Ok(())
}

#[test]
fn a_second_load_keeps_every_map_and_entry() -> Result<()> {
    let pins = Pins::new();
    pins.load(SIZES)?;
    put_sessions(&pins.store()?, 0..2000)?;
    let ids = pins.ids()?;
    let loaded = pins.load(SIZES)?;
    assert!(loaded.resized.is_empty());
    assert_eq!(pins.ids()?, ids);
    assert_eq!(clients(&pins.store()?)?, (0..2000).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn another_size_carries_the_entries_over() -> Result<()> {
    let pins = Pins::new();
    pins.load(SIZES)?;
    let mut store = pins.store()?;
    publish().iter().try_for_each(|op| store.apply(op))?;
    put_sessions(&store, 0..2000)?;
    let flow = FlowKey { saddr: V6([1; 16]), daddr: V6([2; 16]), direction: 1, ..Zeroable::zeroed() };
    store.v6.flows.put(&flow, &Zeroable::zeroed())?;
    let observed = store.observe()?;

    let larger = Sizes { sessions: 10_000, flows: 20_000, backends: 256, slots: 2048, usage: 300, names: 300, ..SIZES };
    let loaded = pins.load(larger)?;
    let resized = [
        names::BACKENDS,
        names::FLOWS_V4,
        names::FLOWS_V6,
        names::FOREIGN_V4,
        names::FOREIGN_V6,
        names::LOADS,
        names::NAMES,
        names::SESSIONS_V4,
        names::SESSIONS_V6,
        names::SLOTS,
        names::SNAT_PORT_CURSOR,
        names::SOCKETS,
        names::USAGE,
    ];
    assert_eq!(loaded.resized, resized);
    let store = pins.store()?;
    assert_eq!(clients(&store)?, (0..2000).collect::<Vec<_>>());
    assert!(store.v6.flows.get(&flow)?.is_some());
    assert_eq!(store.observe()?, observed);

    pins.load(Sizes { sessions: 3000, ..SIZES })?;
    let store = pins.store()?;
    assert_eq!(store.v4.sessions.info().max_entries, 3000);
    assert_eq!(clients(&store)?, (0..2000).collect::<Vec<_>>());
    assert_eq!(store.observe()?, observed);
    let pinned = fs::read_dir(pins.0.maps())?.count();
    assert_eq!(pinned, names::MAPS.len(), "nothing is left behind");
    Ok(())
}

#[test]
fn a_size_that_holds_too_little_is_refused_and_changes_nothing() -> Result<()> {
    let pins = Pins::new();
    pins.load(SIZES)?;
    let mut store = pins.store()?;
    publish().iter().try_for_each(|op| store.apply(op))?;
    store.apply(&Op::PutBackend(100, Backend { generation: 1, ..Backend::default() }))?;
    let (observed, ids) = (store.observe()?, pins.ids()?);
    let error = pins.load(Sizes { backends: 64, ..SIZES }).unwrap_err().to_string();
    assert_eq!(error, "map backends: its entries do not fit into the new size of 64: choose a larger size");
    assert_eq!((pins.store()?.observe()?, pins.ids()?), (observed, ids));
    assert_eq!(fs::read_dir(pins.0.maps())?.count(), names::MAPS.len(), "nothing is left behind");
    Ok(())
}

#[test]
fn a_map_of_another_layout_is_never_used() -> Result<()> {
    let pins = Pins::new();
    pins.0.create()?;
    let other = MapInfo { kind: 9, key_size: 12, value_size: 64, max_entries: 16, ..Zeroable::zeroed() };
    sys::obj_pin(Map::create("flows_v4", &other)?.as_fd(), &pins.0.map(names::FLOWS_V4))?;
    let error = pins.load(SIZES).unwrap_err().to_string();
    for part in ["map flows_v4", "keys of 12 bytes", "keys of 16 bytes", "affinity detach"] {
        assert!(error.contains(part), "{error}");
    }
    Ok(())
}

#[test]
fn raw_maps_do_what_they_say() -> Result<()> {
    const HASH: u32 = 1;
    let spec = MapInfo { kind: HASH, key_size: 4, value_size: 8, max_entries: 4, ..Zeroable::zeroed() };
    let map = Map::create("raw", &spec)?;
    let (key, mut value) = ([1, 2, 3, 4], [0; 8]);
    assert!(!map.lookup(&key, &mut value)?);
    assert!(map.update(&key, &[7; 8], Write::New)?);
    assert!(!map.update(&key, &[8; 8], Write::New)?);
    assert!(map.lookup(&key, &mut value)? && value == [7; 8]);
    assert!(map.update(&key, &[8; 8], Write::Any)?);
    assert!(map.lookup(&key, &mut value)? && value == [8; 8]);
    let mut next = [0; 4];
    assert!(map.next_key(None, &mut next)? && next == key);
    assert!(!map.next_key(Some(&key), &mut next)?);
    assert!(map.delete(&key)? && !map.delete(&key)?);
    assert_eq!(map.update_batch(&[0, 0, 0, 1, 0, 0, 0, 2], &[9; 16])?, 2);
    sys::synchronize()?;
    let error = Map::open(Path::new("/sys/fs/bpf/affinity-dp-nothing")).unwrap_err();
    assert!(error.is_not_found() && error.to_string().starts_with("BPF_OBJ_GET /sys/fs/bpf/affinity-dp-nothing: "));
    Ok(())
}

#[test]
#[should_panic(expected = "length of the values of raw")]
fn a_value_of_the_wrong_length_never_reaches_the_kernel() {
    let spec = MapInfo { kind: 1, key_size: 4, value_size: 8, max_entries: 4, ..Zeroable::zeroed() };
    let map = Map::create("raw", &spec).expect("a map");
    let _ = map.lookup(&[0; 4], &mut [0; 4]);
}

async fn device(name: &str) -> Result<Device> {
    let devices = Devices::new()?.list().await?;
    devices.into_iter().find(|device| device.name == name).with_context(|| format!("{name} is not listed"))
}

#[test]
fn each_policy_has_its_hooks_and_switching_leaves_no_other() -> Result<()> {
    let (pins, wire) = (Pins::new(), Wire::new()?);
    pins.load(SIZES)?;
    let has_tcx = has_tcx()?;
    let cases = [
        (XdpPolicy::Native, true, [Hook::XdpNative, Hook::TcxEgress]),
        (XdpPolicy::Off, true, [Hook::TcxIngress, Hook::TcxEgress]),
        (XdpPolicy::Generic, false, [Hook::ClsactIngress, Hook::ClsactEgress]),
        (XdpPolicy::Native, false, [Hook::XdpNative, Hook::ClsactEgress]),
        (XdpPolicy::Auto, false, [Hook::ClsactIngress, Hook::ClsactEgress]),
        (XdpPolicy::Auto, true, [Hook::TcxIngress, Hook::TcxEgress]),
    ];
    wire.inside(async || {
        let device = device("wire").await?;
        assert_eq!((device.kind.as_deref(), device.framing), (Some("veth"), Framing::Ethernet));
        let here = |hook: Hook| match (hook, has_tcx) {
            (Hook::TcxIngress, false) => Hook::ClsactIngress,
            (Hook::TcxEgress, false) => Hook::ClsactEgress,
            (hook, _) => hook,
        };
        for (xdp, tcx, hooks) in cases {
            let hooks = hooks.map(here);
            for _ in 0..2 {
                let attached =
                    attach::attach(&pins.0, &device, attach::Options { xdp, tcx, ..attach::Options::default() })?;
                assert_eq!(attached.hooks, hooks, "{:?}", attached.refused);
                let attachments = attach::attachments(&pins.0)?;
                assert_eq!(attachments.iter().map(|attachment| attachment.hook).collect::<Vec<_>>(), hooks);
                assert!(attachments.iter().all(|attachment| attachment.device().as_deref() == Some("wire")));
            }
        }
        Ok(())
    })
}

#[test]
fn an_upgrade_reaches_every_hook_and_detach_every_program() -> Result<()> {
    for tcx in [true, false] {
        let (pins, wire) = (Pins::new(), Wire::new()?);
        pins.load(SIZES)?;
        wire.inside(async || {
            let options = [("wire", XdpPolicy::Native), ("peer", XdpPolicy::Off)];
            for (name, xdp) in options {
                attach::attach(
                    &pins.0,
                    &device(name).await?,
                    attach::Options { xdp, tcx, ..attach::Options::default() },
                )?;
            }
            let before = attach::attachments(&pins.0)?;
            assert_eq!(before.len(), 4);
            assert_eq!(pins.load(SIZES)?.upgraded, 4);
            let after = attach::attachments(&pins.0)?;
            for (old, new) in before.iter().zip(&after) {
                assert_eq!((old.ifindex, old.hook), (new.ifindex, new.hook));
                assert_ne!(old.prog_id, new.prog_id, "{}", old.hook);
                assert_eq!(new.prog_id, program_id(&pins, new.hook)?);
            }
            assert_eq!(attach::detach(&pins.0, Some(device("peer").await?.index))?.len(), 2);
            assert_eq!(attach::attachments(&pins.0)?.len(), 2);
            assert_eq!(attach::detach(&pins.0, None)?.len(), 2);
            Ok(())
        })?;
        assert!(!wire.runs_a_program()?, "tcx: {tcx}");
    }
    Ok(())
}

#[test]
fn filters_that_have_lost_their_pins_are_replaced() -> Result<()> {
    let (pins, wire) = (Pins::new(), Wire::new()?);
    let options = attach::Options { xdp: XdpPolicy::Off, tcx: false, ..attach::Options::default() };
    wire.inside(async || {
        let device = device("wire").await?;
        pins.load(SIZES)?;
        attach::attach(&pins.0, &device, options)?;
        fs::remove_dir_all(pins.0.root())?;
        pins.load(SIZES)?;
        attach::attach(&pins.0, &device, options)?;
        assert_eq!(attach::detach(&pins.0, None)?.len(), 2);
        Ok(())
    })?;
    assert!(!wire.runs_a_program()?);
    Ok(())
}

#[test]
fn programs_are_loaded_where_they_are_used() -> Result<()> {
    const ALWAYS: [&str; 4] = [names::CORRECT, names::REPORT, names::TC_FORWARD, names::TC_REVERSE];
    let (pins, wire) = (Pins::new(), Wire::new()?);
    let loaded_by = |unused| -> Result<Vec<String>> {
        load::load(&pins.0, &Options { sizes: SIZES, unused, ..Options::default() })?;
        let names = pins.0.list_programs()?.into_iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
        let mut names: Vec<_> = names.collect();
        names.sort();
        Ok(names)
    };
    let all = Unused { xdp: true, sockets: true };
    assert_eq!(loaded_by(all)?, ALWAYS);
    assert_eq!(loaded_by(Unused::default())?.len(), ALWAYS.len() + 2 + names::SOCKET_PROGRAMS.len());
    wire.inside(async || {
        let native = attach::Options { xdp: XdpPolicy::Native, ..attach::Options::default() };
        attach::attach(&pins.0, &device("wire").await?, native)?;
        assert_eq!(loaded_by(all)?, [&ALWAYS[..], &[names::XDP_FORWARD, names::XDP_REDIRECT]].concat());
        attach::detach(&pins.0, None)?;
        assert_eq!(loaded_by(all)?, ALWAYS);
        Ok(())
    })
}

fn program_id(pins: &Pins, hook: Hook) -> Result<u32> {
    Ok(sys::prog_info(sys::obj_get(&pins.0.prog(hook.program()))?.as_fd())?.id)
}

impl Wire {
    /// Whether any program is attached to `wire` or `peer`, according to the kernel's own listing of devices and filters.
    fn runs_a_program(&self) -> Result<bool> {
        let mut listing = Vec::new();
        for args in [["-d", "link", "show"].as_slice(), &["-d", "-s", "link", "show"]] {
            listing.extend(Command::new("ip").args(["-n", &self.namespace]).args(args).output()?.stdout);
        }
        for device in ["wire", "peer"] {
            for side in ["ingress", "egress"] {
                let filters =
                    Command::new("tc").args(["-n", &self.namespace, "filter", "show", "dev", device, side]).output()?;
                listing.extend(filters.stdout);
            }
        }
        let listing = String::from_utf8(listing)?;
        Ok(["prog/xdp", "tc_forward", "tc_reverse"].iter().any(|trace| listing.contains(trace)))
    }
}

#[test]
fn a_frame_that_crosses_an_attached_device_is_translated() -> Result<()> {
    let (pins, wire) = (Pins::new(), Wire::new()?);
    pins.load(SIZES)?;
    let mut store = pins.store()?;
    publish().iter().try_for_each(|op| store.apply(op))?;
    store.apply(&Op::PutFrontendV4(FrontendKey::new(SERVICE, HTTP, UDP), frontend()))?;
    store.apply(&Op::SetFilter(Direction::Dnat, vec![filter_bit(SERVICE, HTTP, UDP)]))?;
    wire.carry_clients()?;
    wire.inside(async || {
        let device = device("wire").await?;
        for (client, (xdp, tcx)) in (1..).zip([
            (XdpPolicy::Native, true),
            (XdpPolicy::Generic, true),
            (XdpPolicy::Off, true),
            (XdpPolicy::Off, false),
        ]) {
            attach::attach(&pins.0, &device, attach::Options { xdp, tcx, ..attach::Options::default() })?;
            say_hello(client)?;
            let key = SessionKey::new(1, V4([198, 18, 0, client]), 32);
            eventually(&format!("a pin by {xdp}, tcx: {tcx}"), Duration::from_secs(5), || {
                Ok(store.v4.sessions.get(&key)?.is_some())
            })?;
        }
        Ok(())
    })
}

fn event(kind: EventKind, service: u32) -> Event {
    Event { time_ns: monotonic_ns(), service, kind: kind as u8, ..Zeroable::zeroed() }
}

#[test]
fn every_reader_sees_every_event_and_consumes_none() -> Result<()> {
    let pins = Pins::new();
    pins.load(Sizes { events_bytes: 4096, ..SIZES })?;
    let store = pins.store()?;
    let consumer = Consumer::new(&store.events)?;
    let mut follower = EventReader::from_now(&store.events)?;
    let mut slow = EventReader::from_now(&store.events)?;
    for number in 0..1000 {
        store.report(&event(EventKind::Unpinned, number))?;
        consumer.keep_up();
        assert_eq!(follower.next().map(|event| event.service), Some(number));
        assert_eq!(follower.next(), None);
    }
    // The ring holds 64 records of 64 bytes.
    let history = || Ok::<_, anyhow::Error>(EventReader::from_oldest(&store.events)?.map(|event| event.service));
    assert_eq!(history()?.collect::<Vec<_>>(), (936..1000).collect::<Vec<_>>());
    assert_eq!(history()?.count(), 64, "reading consumes nothing");
    assert_eq!(slow.next().map(|event| event.service), Some(936));
    assert_eq!((slow.missed(), slow.count()), (936, 63));
    assert_eq!(lost_events(&store)?, 0);
    Ok(())
}

#[test]
fn events_are_counted_as_lost_where_nobody_keeps_up() -> Result<()> {
    let pins = Pins::new();
    pins.load(Sizes { events_bytes: 4096, ..SIZES })?;
    let store = pins.store()?;
    (0..100).try_for_each(|number| store.report(&event(EventKind::Unpinned, number)))?;
    let history: Vec<_> = EventReader::from_oldest(&store.events)?.map(|event| event.service).collect();
    assert_eq!(history.len() as u64 + lost_events(&store)?, 100);
    Ok(())
}

fn lost_events(store: &KernelStore) -> Result<u64> {
    Ok(store.counter_sums()?[Reason::EventLost as usize])
}

/// Sweeps once through everything, without pauses.
fn sweep(sweeper: &mut Sweeper) -> Totals {
    let passes = sweeper.totals().passes;
    while sweeper.totals().passes == passes {
        sweeper.step();
    }
    sweeper.totals()
}

const SECOND: u64 = 1_000_000_000;

/// A dataplane with one service of one pod, and its sweeper.
fn swept(sizes: Sizes, frontend: Frontend) -> Result<(Pins, KernelStore, Sweeper)> {
    swept_beside(sizes, frontend, Arc::default())
}

fn swept_beside(sizes: Sizes, frontend: Frontend, plans: Arc<FilterPlans>) -> Result<(Pins, KernelStore, Sweeper)> {
    let pins = Pins::new();
    pins.load(sizes)?;
    let mut store = pins.store()?;
    publish().iter().try_for_each(|op| store.apply(op))?;
    store.apply(&Op::PutFrontendV4(FrontendKey::new(SERVICE, HTTP, TCP), frontend))?;
    let sweeper = Sweeper::new(pins.store()?, plans, NodeAddresses::default())?;
    Ok((pins, store, sweeper))
}

fn pin_of(scope: u32, client: u8, used_ago_s: u64) -> (SessionKey<V4>, Session) {
    let last_used_ns = monotonic_ns() - used_ago_s * SECOND;
    let session = Session { last_used_ns, backend: POD_3, service: scope, ..Zeroable::zeroed() };
    (SessionKey::new(scope, V4([198, 18, 0, client]), 32), session)
}

#[test]
fn the_sweep_removes_what_has_expired_and_says_so() -> Result<()> {
    let (_pins, store, mut sweeper) = swept(SIZES, Frontend { timeout_ns: 30 * SECOND, ..frontend() })?;
    let mut events = EventReader::from_now(&store.events)?;
    let (fresh, old) = (pin_of(1, 1, 20), pin_of(1, 2, 40));
    let (orphan, old_orphan) = (pin_of(77, 3, 50), pin_of(77, 4, 70));
    let mut of_the_dead = pin_of(1, 5, 20);
    of_the_dead.1.backend.generation = 99;
    for (key, session) in [&fresh, &old, &orphan, &old_orphan, &of_the_dead] {
        store.v4.sessions.put(key, session)?;
    }
    store.loads.store_u64(3, 1000);
    assert_eq!(sweep(&mut sweeper).expired, 1);
    // An orphan stays for its time, independent of its last use, because its service may come back.
    for (key, stays) in [(fresh.0, true), (old.0, false), (orphan.0, true), (old_orphan.0, true), (of_the_dead.0, true)]
    {
        assert_eq!(store.v4.sessions.get(&key)?.is_some(), stays, "{key:?}");
    }
    assert_eq!(store.loads.load_u64(3), 3, "the live sessions of a live backend");
    let expired: Vec<_> = events.by_ref().map(|event| (event.kind, event.client, event.from.index)).collect();
    let mapped = |key: SessionKey<V4>| affinity_common::abi::Address::to_mapped(key.client);
    assert_eq!(expired, [(EventKind::Expired as u8, mapped(old.0), 3)]);
    assert_eq!(sweep(&mut sweeper).expired, 1, "once is enough");
    Ok(())
}

/// The agent's input for judging whether a pod that has left its service still answers.
#[test]
fn the_connections_of_a_backend_that_lingers_are_looked_at() -> Result<()> {
    let (_pins, mut store, mut sweeper) = swept(SIZES, frontend())?;
    let seen = |sweeper: &mut Sweeper| {
        // Looks are a second apart; a pass that has seen all flows advances the next one.
        sweep(sweeper);
        sweeper.look();
        sweeper.traffic().get(&3).copied()
    };
    let open = flow_of(1, OPEN, [2, 40]);
    let closed = flow_of(2, OPEN | FLOW_RESET, [5, 5]);
    let mut of_another = flow_of(3, OPEN, [0, 0]);
    of_another.iter_mut().for_each(|(_, flow)| flow.backend.generation = 9);
    for (key, flow) in open.iter().chain(&closed).chain(&of_another) {
        store.v4.flows.put(key, flow)?;
    }
    assert_eq!(seen(&mut sweeper), None, "it does not linger");
    let record = store.backends.get(&3)?.context("a backend")?;
    store.apply(&Op::PutBackend(3, Backend { flags: record.flags | BACKEND_LINGERING, ..record }))?;
    assert_eq!(store.lingering(), BTreeSet::from([POD_3]));
    let traffic = seen(&mut sweeper).context("it lingers")?;
    assert!(!sweeper.is_behind());
    assert_eq!((traffic.generation, traffic.connections, traffic.open), (1, 2, 1));
    let ago_s = |ns: u64| (monotonic_ns() - ns) / SECOND;
    assert_eq!((ago_s(traffic.asked_ns), ago_s(traffic.answered_ns)), (2, 5));

    // The pod answers, and one connection is gone.
    store.v4.flows.put(&open[1].0, &Flow { last_used_ns: monotonic_ns(), ..open[1].1 })?;
    store.v4.flows.remove(&closed[0].0)?;
    eventually("one connection", 10 * LOOK_EVERY, || {
        sweeper.look();
        Ok(sweeper.traffic()[&3].connections == 1)
    })?;
    let traffic = sweeper.traffic()[&3];
    assert!(traffic.open == 1 && ago_s(traffic.answered_ns) < 5, "it has answered again");

    store.apply(&Op::PutBackend(3, Backend { generation: 2, ..record }))?;
    eventually("it is retired", 10 * LOOK_EVERY, || {
        sweeper.look();
        Ok(sweeper.traffic().is_empty())
    })
}

/// The state of an open connection.
const OPEN: u8 = FLOW_ANSWERED | FLOW_OPEN;

/// Both records of a flow of the pod.
fn flow_of(client: u8, state: u8, used_ago_s: [u64; 2]) -> [(FlowKey<V4>, Flow<V4>); 2] {
    let client = V4([198, 18, 0, client]);
    let forward = FlowKey {
        saddr: client,
        daddr: SERVICE,
        sport: Port::new(40_000),
        dport: HTTP,
        protocol: TCP,
        direction: Direction::Dnat as u8,
        pad: [0; 2],
    };
    let edit = Edit { saddr: client, daddr: POD, sport: forward.sport, dport: SERVED, addr_delta: 0, port_delta: 0 };
    let reverse = forward.opposite(&edit);
    let back = Edit { saddr: SERVICE, daddr: client, sport: HTTP, dport: forward.sport, addr_delta: 0, port_delta: 0 };
    let used = |ago_s: u64| monotonic_ns() - ago_s * SECOND;
    let flow = Flow { edit, state, backend: POD_3, scope: 1, prefix: 32, timer: 3, ..Zeroable::zeroed() };
    [
        (forward, Flow { last_used_ns: used(used_ago_s[0]), ..flow }),
        (reverse, Flow { last_used_ns: used(used_ago_s[1]), edit: back, ..flow }),
    ]
}

#[test]
fn a_flow_goes_when_both_of_its_directions_are_idle() -> Result<()> {
    let (_pins, store, mut sweeper) = swept(SIZES, frontend())?;
    let cases = [
        (flow_of(1, OPEN | FLOW_RESET, [121, 121]), false),
        (flow_of(2, OPEN | FLOW_RESET, [121, 5]), true),
        (flow_of(3, OPEN | FLOW_RESET, [5, 121]), true),
        (flow_of(4, OPEN, [600, 600]), true),
        (flow_of(6, FLOW_ANSWERED, [61, 61]), false),
        (
            flow_of(5, OPEN, [61, 61])
                .map(|(key, flow)| (key, Flow { backend: BackendRef { generation: 99, ..POD_3 }, ..flow })),
            false,
        ),
    ];
    for (key, flow) in cases.iter().flat_map(|(records, _)| records) {
        store.v4.flows.put(key, flow)?;
    }
    assert_eq!(sweep(&mut sweeper).flows, 6);
    for (records, stays) in &cases {
        for (key, _) in records {
            assert_eq!(store.v4.flows.get(key)?.is_some(), *stays, "{key:?}");
        }
    }
    Ok(())
}

#[test]
fn connections_that_ended_unseen_hold_no_pin() -> Result<()> {
    let alive = Frontend { timeout_ns: 30 * SECOND, timer: Timer::Alive as u8, ..frontend() };
    let (_pins, store, mut sweeper) = swept(SIZES, alive)?;
    let [mut held, mut forgotten, mut young] = [pin_of(1, 1, 100), pin_of(1, 2, 100), pin_of(1, 3, 10)];
    for pin in [&mut held, &mut forgotten, &mut young] {
        pin.1.connections = 2;
        store.v4.sessions.put(&pin.0, &pin.1)?;
    }
    for (key, flow) in flow_of(1, OPEN, [1, 1]).into_iter().chain(flow_of(2, FLOW_ANSWERED, [1, 1])) {
        store.v4.flows.put(&key, &flow)?;
    }
    assert_eq!(sweep(&mut sweeper).expired, 1);
    let connections = |key| Ok::<_, anyhow::Error>(store.v4.sessions.get(&key)?.map(|session| session.connections));
    assert_eq!(connections(held.0)?, Some(1));
    assert_eq!(connections(forgotten.0)?, None);
    assert_eq!(connections(young.0)?, Some(0));
    Ok(())
}

#[test]
fn filter_bits_go_when_neither_frontend_nor_member_nor_flow_needs_them() -> Result<()> {
    let plans = Arc::<FilterPlans>::default();
    let (_pins, mut store, mut sweeper) = swept_beside(SIZES, frontend(), Arc::clone(&plans))?;
    for (key, flow) in flow_of(1, 0, [1, 1]) {
        store.v4.flows.put(&key, &flow)?;
    }
    let stray = FILTER_BITS - 1;
    store.apply(&Op::SetFilter(Direction::Dnat, vec![stray]))?;
    assert_eq!(sweep(&mut sweeper).filter_bits, 0, "one pass is not enough");
    assert_eq!(sweep(&mut sweeper).filter_bits, 1);

    // The service goes, its connection stays.
    store.apply(&Op::RemoveFrontendV4(FrontendKey::new(SERVICE, HTTP, TCP)))?;
    store.apply(&Op::RemoveMember(MemberKey { pool: 2, backend: 3 }))?;
    (0..3).for_each(|_| assert_eq!(sweep(&mut sweeper).filter_bits, 1));
    for (key, _) in flow_of(1, 0, [1, 1]) {
        store.v4.flows.remove(&key)?;
    }
    assert_eq!(sweep(&mut sweeper).filter_bits, 1);
    drop(plans.begin());
    assert_eq!(sweep(&mut sweeper).filter_bits, 1, "a plan came in between");
    let plan = plans.begin();
    (0..3).for_each(|_| assert_eq!(sweep(&mut sweeper).filter_bits, 1, "a plan is carried out"));
    drop(plan);
    assert_eq!(sweep(&mut sweeper).filter_bits, 1, "it was, when this pass found no need");
    assert_eq!(sweep(&mut sweeper).filter_bits, 3);
    assert!((0..store.filter.len()).all(|word| store.filter.load_u64(word) == 0));
    Ok(())
}

#[test]
fn a_full_table_counts_every_lost_pin() -> Result<()> {
    let (pins, store, mut sweeper) = swept(Sizes { sessions: 512, events_bytes: 1 << 18, ..SIZES }, frontend())?;
    let mut events = EventReader::from_now(&store.events)?;
    assert_eq!(sweep(&mut sweeper).evicted, 0);
    let program = sys::obj_get(&pins.0.prog(names::XDP_FORWARD))?;
    let dial = |client: u32| -> Result<()> {
        let [_, _, high, low] = client.to_be_bytes();
        let from = format!("198.18.{high}.{low}:40000").parse()?;
        let frame = Frame::tcp(from, "10.96.0.10:80".parse()?, tcp_flags::SYN).build();
        sys::test_run(program.as_fd(), &frame, 1)?;
        Ok(())
    };
    (0..100).try_for_each(dial)?;
    assert_eq!(sweep(&mut sweeper).evicted, 0);
    // An operator removes one: that is no eviction.
    let key = SessionKey::new(1, V4([198, 18, 0, 0]), 32);
    store.remove_session(&key, EventKind::Unpinned, Reason::OperatorPinned, monotonic_ns())?.context("was pinned")?;
    assert_eq!(sweep(&mut sweeper).evicted, 0);
    (100..2000).try_for_each(dial)?;
    let evicted = sweep(&mut sweeper).evicted;
    let live = store.v4.sessions.iter().count() as u64;
    assert_eq!(evicted, 1999 - live, "created, less removed, less live");
    let told: Vec<_> = events.by_ref().filter(|event| event.kind == EventKind::Evicted as u8).collect();
    assert!(told.iter().all(|event| event.reason == Reason::TableFull as u8));
    assert_eq!(told.iter().map(|event| u64::from(event.from.index)).sum::<u64>(), evicted);
    Ok(())
}

const YAML: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 10.96.0.10
  sessionAffinity: ClientIP
  ports: [{port: 80, targetPort: 8080, protocol: TCP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.244.0.10], conditions: {ready: true}, targetRef: {kind: Pod, name: web-0, namespace: default}}]
ports: [{name: '', port: 8080, protocol: TCP}]
";

#[test]
fn attach_loads_and_pins_everything_and_detach_removes_it() -> Result<()> {
    let (pins, wire) = (Pins::new(), Wire::new()?);
    let source = std::env::temp_dir().join(format!("affinity-dp-{}.yaml", std::process::id()));
    fs::write(&source, YAML)?;
    let mut options = agent::Options {
        source: Source::Directory { path: source.clone(), node_name: String::new() },
        devices: vec!["wire".to_owned(), "pe*".to_owned()],
        xdp_devices: Vec::new(),
        attach: attach::Options::default(),
        sockets: agent::SocketOptions { policy: SocketPolicy::Off, cgroup: None },
        load: Options { sizes: SIZES, ..Options::default() },
        pin_dir: pins.0.root().to_owned(),
        node: NodeFacts::default(),
        services: Services::All,
        proxy_name: DEFAULT_PROXY_NAME.to_owned(),
        shadow: false,
        limits: Limits::default(),
        reserve_ports: false,
        detach_on_exit: false,
        http: None,
        node_health: agent::NodeHealth::Off,
        json: false,
    };
    let outcome = wire.on_a_thread(|| {
        agent::attach(&options)?;
        let store = pins.store()?;
        assert_eq!(store.observe()?.frontends_v4.len(), 1);
        let program = sys::obj_get(&pins.0.prog(names::XDP_FORWARD))?;
        assert_eq!(sys::test_run(program.as_fd(), &syn(1), 1)?.data_out[30..34], POD.0);
        assert_eq!(attach::attachments(&pins.0)?.len(), 4);

        let lock = agent::Lock::take(pins.0.root())?;
        let refused = agent::detach(pins.0.root(), None).unwrap_err().to_string();
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        drop(lock);

        assert_eq!(agent::detach(pins.0.root(), Some("peer"))?.devices.len(), 2);
        let nothing = agent::detach(pins.0.root(), Some("peer")).unwrap_err().to_string();
        assert_eq!(nothing, "peer: nothing is attached to it");
        assert_eq!(agent::detach(pins.0.root(), None)?.devices.len(), 2);
        assert!(!pins.0.exists()?);

        options.devices.push("nowhere0".to_owned());
        let missing = agent::attach(&options).unwrap_err().to_string();
        assert_eq!(missing, "--device nowhere0: no such device: `ip link` lists all devices");
        Ok(())
    });
    fs::remove_file(source)?;
    outcome?;
    assert!(!wire.runs_a_program()?);
    Ok(())
}

#[test]
fn devices_without_an_ethernet_header_are_refused_by_name() -> Result<()> {
    let (pins, wire) = (Pins::new(), Wire::new()?);
    pins.load(SIZES)?;
    wire.ip(&["tuntap", "add", "raw0", "mode", "tun"])?;
    wire.inside(async || {
        let device = device("raw0").await?;
        let error = attach::attach(&pins.0, &device, attach::Options::default()).unwrap_err();
        assert_eq!(error.to_string(), "raw0: cannot be attached: its frames have no Ethernet header");
        Ok(())
    })
}

#[test]
fn a_changed_device_wakes_waiters_and_leaves_no_pin() -> Result<()> {
    let (pins, wire) = (Pins::new(), Wire::new()?);
    pins.load(SIZES)?;
    wire.inside(async || {
        let mut devices = Devices::new()?;
        let first = device("wire").await?;
        for tcx in [true, false] {
            let device = device("wire").await?;
            attach::attach(
                &pins.0,
                &device,
                attach::Options { xdp: XdpPolicy::Native, tcx, ..attach::Options::default() },
            )?;
            wire.ip(&["link", "del", "wire"])?;
            wire.ip(&["link", "add", "wire", "type", "veth", "peer", "name", "peer"])?;
            tokio::time::timeout(patience(Duration::from_secs(5)), devices.changed()).await??;
            let again = devices.list().await?.into_iter().find(|device| device.name == "wire").context("wire")?;
            assert!(again.index > device.index, "a new device under the old name");
            let present = devices.list().await?.iter().map(|device| device.index).collect();
            assert_eq!(attach::prune(&pins.0, &present)?, 2);
            assert_eq!(fs::read_dir(pins.0.links())?.count(), 0);
        }
        assert_eq!(first.name, "wire");
        Ok(())
    })
}

#[test]
fn no_client_moves_while_maps_change_their_size_under_its_traffic() -> Result<()> {
    let (pins, wire) = (Pins::new(), Wire::new()?);
    pins.load(SIZES)?;
    let mut store = pins.store()?;
    let pods = [3, 4, 5];
    for pod in pods {
        let address = affinity_common::abi::Address::to_mapped(V4([10, 244, 0, pod]));
        let backend = u32::from(pod);
        store.apply(&Op::PutBackend(backend, Backend { address, generation: 1, flags: 0 }))?;
        let member = Member::ready(1, SERVED);
        store.apply(&Op::PutMember(MemberKey { pool: 2, backend }, member))?;
    }
    store.apply(&Op::WriteSlots { first: 16, backends: pods.map(u32::from).to_vec() })?;
    store.apply(&Op::SetFilter(Direction::Dnat, vec![filter_bit(SERVICE, HTTP, UDP)]))?;
    store.apply(&Op::PutFrontendV4(FrontendKey::new(SERVICE, HTTP, UDP), Frontend { slot_count: 3, ..frontend() }))?;
    wire.carry_clients()?;
    wire.inside(async || {
        let options = attach::Options { xdp: XdpPolicy::Native, ..attach::Options::default() };
        attach::attach(&pins.0, &device("wire").await?, options)?;
        let dial_all = || (1..=250).try_for_each(say_hello);
        dial_all()?;
        let mut events = EventReader::from_now(&store.events)?;
        let stop = std::sync::atomic::AtomicBool::new(false);
        let rounds = thread::scope(|scope| -> Result<u32> {
            let traffic = scope.spawn(|| -> Result<u32> {
                wire.on_a_thread(|| {
                    let mut rounds = 0;
                    while !stop.load(Ordering::Relaxed) {
                        dial_all()?;
                        rounds += 1;
                    }
                    Ok(rounds)
                })
            });
            let resized = (0..6).try_for_each(|round| {
                let (sessions, flows) = if round % 2 == 0 { (10_000, 300_000) } else { (4096, 200_000) };
                let loaded = pins.load(Sizes { sessions, flows, ..SIZES })?;
                ensure!(loaded.resized.len() == 7 && loaded.upgraded == 2, "{loaded:?}");
                Ok(())
            });
            stop.store(true, Ordering::Relaxed);
            resized?;
            traffic.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        ensure!(rounds >= 6, "traffic all the time: {rounds} rounds");
        assert_eq!(events.next(), None, "nobody was pinned again or moved");
        assert_eq!(pins.store()?.v4.sessions.iter().count(), 250);
        Ok(())
    })
}

impl Wire {
    /// Routes packets from the clients 198.18.0.0/24 at `peer` to the service through `wire`.
    fn carry_clients(&self) -> Result<()> {
        self.ip(&["link", "set", "wire", "up", "address", "02:00:00:00:00:01"])?;
        self.ip(&["link", "set", "peer", "up"])?;
        self.ip(&["address", "add", "198.18.0.0/24", "dev", "peer"])?;
        self.ip(&["route", "add", "local", "198.18.0.0/24", "dev", "peer"])?;
        self.ip(&["route", "add", "10.96.0.0/16", "dev", "peer"])?;
        self.ip(&["neighbour", "add", "10.96.0.10", "lladdr", "02:00:00:00:00:01", "dev", "peer"])
    }
}

/// Sends a datagram from a new port of a client to the service. The caller is in the wire's namespace.
fn say_hello(client: u8) -> Result<()> {
    UdpSocket::bind((Ipv4Addr::new(198, 18, 0, client), 0))?.send_to(b"hello", "10.96.0.10:80")?;
    Ok(())
}
