//! The programs on the bench: ours and the limits, with tables for flows that last and tables that are full.

use affinity_common::{
    abi::{
        AFFINITY, Address, BACKEND_LOCAL, Backend, CONFIG_MAGIC, Config, Direction, Frontend, FrontendKey, Member,
        MemberKey, Node, Port, Reason, V4, V6, filter_bit,
    },
    headers::{ACK, TCP},
    names,
};
use affinity_user::{events::RECORD, store::kernel::filter_word};
use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, ProgramArray, RingBuf},
    programs::{Program, SchedClassifier, TestRun as _, TestRunOptions, Xdp},
};
use bytemuck::must_cast;
use clap::ValueEnum;

use super::course::{Case, NODE_PORTS, SERVICES, Service};
use crate::packet::Frame;

/// Entries of the session table, and half of the flow table: room for 100,000 flows of each service, and quickly full.
const ENTRIES: u32 = 1 << 18;
/// Bytes of the event ring, as the agent sets it.
const RING_BYTES: u32 = 1 << 20;
/// Packets before the ring must be emptied, at most: each may report an event, and all must fit, as they do if an agent runs.
const PACKETS_PER_RING: u32 = RING_BYTES / RECORD as u32 - 1;
/// A measurement is the mean of at least this many runs: the kernel reports the time of a run's packets in whole nanoseconds.
const RUNS: u32 = 20;
/// At least this percentage of packets must have been those of the case. Not all: a full table may drop a pin.
const EXPECTED_PERCENT: u64 = 99;

/// The hook of the programs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub(super) enum Hook {
    /// XDP.
    Xdp,
    /// TC: ingress, and egress for packets that leave.
    Tc,
}

impl Hook {
    /// As in the names of the programs.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Tc => "tc",
        }
    }
}

/// The family of the packets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub(super) enum Family {
    /// IPv4.
    #[value(name = "ipv4")]
    V4,
    /// IPv6.
    #[value(name = "ipv6")]
    V6,
}

impl Family {
    /// As in output.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// Nanoseconds per packet.
#[derive(Clone, Copy)]
pub(super) struct Measured {
    /// Of the program under test only.
    pub net_ns: f64,
    /// Of the wrapper: subtracted already.
    pub wrapper_ns: f64,
}

/// Programs and tables for one hook and family.
pub(super) struct Rig {
    lasting: Bench,
    full: Bench,
}

impl Rig {
    /// Loads everything.
    pub(super) fn new(hook: Hook, family: Family) -> Result<Self> {
        Ok(Self { lasting: Bench::new(hook, family)?, full: Bench::new(hook, family)? })
    }

    /// Fills the tables for a case.
    pub(super) fn prepare(&mut self, case: &Case) -> Result<()> {
        self.bench(case).run(&case.filling(), case.fill).map(drop)
    }

    /// Measures a case.
    ///
    /// # Errors
    /// If packets were not those of the case, or an event did not fit: the figure would be wrong.
    pub(super) fn measure(&mut self, case: &Case, packets: u32) -> Result<Measured> {
        let bench = self.bench(case);
        let wrapper_ns = bench.run(&case.wrapper(), packets)?;
        let Some(reason) = case.reason else {
            return Ok(Measured { net_ns: bench.run(case, packets)? - wrapper_ns, wrapper_ns });
        };
        bench.run(case, case.warm)?;
        let (counted, lost) = (bench.count(reason)?, bench.count(Reason::EventLost)?);
        let gross_ns = bench.run(case, packets)?;
        let (counted, lost) = (bench.count(reason)? - counted, bench.count(Reason::EventLost)? - lost);
        let case = case.name;
        ensure!(
            counted * 100 >= u64::from(packets) * EXPECTED_PERCENT,
            "\"{case}\": {counted} of {packets} packets were {}",
            reason.name()
        );
        ensure!(lost == 0, "\"{case}\": {lost} events found the ring full");
        Ok(Measured { net_ns: gross_ns - wrapper_ns, wrapper_ns })
    }

    fn bench(&mut self, case: &Case) -> &mut Bench {
        if case.full { &mut self.full } else { &mut self.lasting }
    }
}

/// One set of tables.
struct Bench {
    hook: Hook,
    ours: Ebpf,
    limits: Ebpf,
    frame: Vec<u8>,
    /// Packets of endless courses so far: a client that was seen once is not "never seen" again.
    begun: u64,
}

impl Bench {
    fn new(hook: Hook, family: Family) -> Result<Self> {
        let mut ours = load_ours(family)?;
        let mut limits = Ebpf::load(affinity_user::objects::LIMITS).context("loading the limit programs")?;
        match family {
            Family::V4 => publish::<V4>(&mut ours)?,
            Family::V6 => publish::<V6>(&mut ours)?,
        }
        let hook_name = hook.name();
        load(&mut ours, hook, &format!("{hook_name}_forward"))?;
        if hook == Hook::Tc {
            load(&mut ours, hook, names::TC_REVERSE)?;
        }
        for program in ["pass", "swap", "least", "remember", "drive"] {
            load(&mut limits, hook, &format!("{hook_name}_{program}"))?;
        }
        let frame = match family {
            Family::V4 => Frame::tcp("10.64.0.0:1024".parse()?, "10.96.0.10:80".parse()?, ACK),
            Family::V6 => Frame::tcp("[fd00:64::]:1024".parse()?, "[fd00:96::10]:80".parse()?, ACK),
        };
        Ok(Self { hook, ours, limits, frame: frame.payload(&[0; 6]).build(), begun: 0 })
    }

    /// Nanoseconds per packet.
    fn run(&mut self, case: &Case, packets: u32) -> Result<f64> {
        let hook = self.hook.name();
        let is_ours = matches!(case.program, "forward" | "reverse");
        let owner = if is_ours { &self.ours } else { &self.limits };
        let target = program(owner, &format!("{hook}_{}", case.program))?.fd()?.try_clone()?;
        ProgramArray::try_from(map(&mut self.limits, "under_test")?)?.set(0, &target, 0)?;
        let mut words = case.words();
        if case.full {
            words[0] = self.begun;
            self.begun += u64::from(packets);
        }
        array::<[u64; 8]>(&mut self.limits, "course")?.set(0, words, 0)?;

        if packets == 0 {
            return Ok(0.0);
        }
        let per_run = packets.div_ceil(RUNS).clamp(1, PACKETS_PER_RING);
        let (mut left, mut total_ns) = (packets, 0.0);
        while left > 0 {
            let repeat = left.min(per_run);
            self.empty_ring()?;
            total_ns += self.run_once(repeat)? * f64::from(repeat);
            left -= repeat;
        }
        Ok(total_ns / f64::from(packets))
    }

    /// Nanoseconds per packet as the kernel reports them: the time of the programs only. By this process's clock, a run of XDP
    /// also contains the kernel's wait for readers before and after it, some milliseconds
    /// (<https://elixir.bootlin.com/linux/v6.12/source/net/bpf/test_run.c>, `bpf_prog_test_run_xdp`).
    fn run_once(&self, repeat: u32) -> Result<f64> {
        let options = TestRunOptions { data_in: Some(&self.frame), repeat, ..TestRunOptions::new() };
        let drive = program(&self.limits, &format!("{}_drive", self.hook.name()))?;
        let ran = match self.hook {
            Hook::Xdp => <&Xdp>::try_from(drive)?.test_run(options)?,
            Hook::Tc => <&SchedClassifier>::try_from(drive)?.test_run(options)?,
        };
        Ok(ran.duration.as_nanos() as f64)
    }

    fn empty_ring(&mut self) -> Result<()> {
        let mut ring = RingBuf::try_from(map(&mut self.ours, names::EVENTS)?)?;
        while ring.next().is_some() {}
        Ok(())
    }

    /// How many packets had a reason.
    fn count(&mut self, reason: Reason) -> Result<u64> {
        let counters: PerCpuArray<_, u64> = PerCpuArray::try_from(map(&mut self.ours, names::COUNTERS)?)?;
        Ok(counters.get(&(reason as u32), 0)?.iter().sum())
    }
}

/// Our programs as the agent loads them: without log, and with its event ring.
fn load_ours(family: Family) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    let (sessions, flows) = match family {
        Family::V4 => (names::SESSIONS_V4, names::FLOWS_V4),
        Family::V6 => (names::SESSIONS_V6, names::FLOWS_V6),
    };
    loader.map_max_entries(sessions, ENTRIES).map_max_entries(flows, 2 * ENTRIES);
    loader.map_max_entries(names::EVENTS, RING_BYTES);
    // Any tick works: nothing expires while this runs.
    let config = Config {
        magic: CONFIG_MAGIC,
        tick_ns: 4_000_000,
        tick_base: 0,
        reject_errno: 0,
        node_netns: 0,
        redirect: 0,
        takes_ipv6_flag: 0,
        rejection_interval_ns: 0,
        fixed_now_ns: 0,
        fixed_random: 0,
    };
    let words: [u64; 10] = must_cast(config);
    loader.override_global("CONFIG", &words, true);
    loader.override_global("AYA_LOG_LEVEL", &0u8, false);
    loader.load(affinity_user::objects::PROGRAMS).context("loading the programs")
}

fn load(ebpf: &mut Ebpf, hook: Hook, name: &str) -> Result<()> {
    let program = ebpf.program_mut(name).with_context(|| format!("program {name}"))?;
    match hook {
        Hook::Xdp => <&mut Xdp>::try_from(program)?.load(),
        Hook::Tc => <&mut SchedClassifier>::try_from(program)?.load(),
    }
    .with_context(|| format!("loading {name}"))
}

fn program<'a>(ebpf: &'a Ebpf, name: &str) -> Result<&'a Program> {
    ebpf.program(name).with_context(|| format!("program {name}"))
}

/// A family's addresses, as in `affinity-ebpf/src/limits.rs`, and its tables.
trait Published: Address {
    const FRONTEND: Self;
    fn pod(number: u32) -> Self;
    fn put_frontend(ebpf: &mut Ebpf, key: FrontendKey<Self>, frontend: Frontend) -> Result<()>;
}

impl Published for V4 {
    const FRONTEND: Self = Self([10, 96, 0, 10]);

    fn pod(number: u32) -> Self {
        Self([10, 244, 0, 1 + number as u8])
    }

    fn put_frontend(ebpf: &mut Ebpf, key: FrontendKey<Self>, frontend: Frontend) -> Result<()> {
        let (key, frontend): ([u64; 1], [u64; 5]) = (must_cast(key), must_cast(frontend));
        Ok(table::<[u64; 1], [u64; 5]>(ebpf, names::FRONTENDS_V4)?.insert(key, frontend, 0)?)
    }
}

impl Published for V6 {
    const FRONTEND: Self = Self([0xfd, 0, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10]);

    fn pod(number: u32) -> Self {
        Self([0xfd, 0, 0, 0xf4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1 + number as u8])
    }

    fn put_frontend(ebpf: &mut Ebpf, key: FrontendKey<Self>, frontend: Frontend) -> Result<()> {
        let (key, frontend): ([u64; 3], [u64; 5]) = (must_cast(key), must_cast(frontend));
        Ok(table::<[u64; 3], [u64; 5]>(ebpf, names::FRONTENDS_V6)?.insert(key, frontend, 0)?)
    }
}

/// The services, and the node that masquerades.
fn publish<A: Published>(ebpf: &mut Ebpf) -> Result<()> {
    let node = Node {
        address_v6: V6([0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        address_v4: V4([192, 0, 2, 1]),
        port_first: Port::new(NODE_PORTS.start),
        port_count: NODE_PORTS.len() as u16,
    };
    let node: [u64; 3] = must_cast(node);
    array::<[u64; 3]>(ebpf, names::NODE)?.set(0, node, 0)?;
    (0u32..).zip(SERVICES).try_for_each(|(number, service)| publish_service::<A>(ebpf, number, service))
}

/// A service with separate backends: each backend has its own counter of ports.
fn publish_service<A: Published>(ebpf: &mut Ebpf, number: u32, service: Service) -> Result<()> {
    let (scope, slot_first) = (1 + number, 8 * number);
    let target = Port::new(service.target);
    for pod in 0..service.pods {
        let (index, address) = (slot_first + pod, A::pod(pod));
        let backend: [u64; 3] =
            must_cast(Backend { address: address.to_mapped(), generation: 1, flags: BACKEND_LOCAL });
        array::<[u64; 3]>(ebpf, names::BACKENDS)?.set(index, backend, 0)?;
        array::<u32>(ebpf, names::SLOTS)?.set(index, index, 0)?;
        let key: [u64; 1] = must_cast(MemberKey { pool: scope, backend: index });
        let member: [u64; 1] = must_cast(Member::ready(1, target));
        table::<[u64; 1], [u64; 1]>(ebpf, names::MEMBERS)?.insert(key, member, 0)?;
        set_filter(ebpf, Direction::RevDnat, filter_bit(address, target, TCP))?;
    }
    set_filter(ebpf, Direction::Dnat, filter_bit(A::FRONTEND, Port::new(service.port), TCP))?;
    let frontend = Frontend {
        timeout_ns: 10_800_000_000_000,
        service: scope,
        pool: scope,
        group: scope,
        own: scope,
        slot_first,
        slot_count: service.pods,
        seed: 0,
        select: 0,
        timer: 0,
        prefix: 128,
        flags: AFFINITY | service.flags,
    };
    A::put_frontend(ebpf, FrontendKey::new(A::FRONTEND, Port::new(service.port), TCP), frontend)
}

fn set_filter(ebpf: &mut Ebpf, direction: Direction, bit: u32) -> Result<()> {
    let (word, mask) = filter_word(direction, bit);
    let mut filter = array::<u64>(ebpf, names::FILTER)?;
    let bits = filter.get(&word, 0)?;
    Ok(filter.set(word, bits | mask, 0)?)
}

fn array<'a, V: aya::Pod>(ebpf: &'a mut Ebpf, name: &str) -> Result<Array<&'a mut MapData, V>> {
    Ok(Array::try_from(map(ebpf, name)?)?)
}

fn table<'a, K: aya::Pod, V: aya::Pod>(ebpf: &'a mut Ebpf, name: &str) -> Result<HashMap<&'a mut MapData, K, V>> {
    Ok(HashMap::try_from(map(ebpf, name)?)?)
}

fn map<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Map> {
    ebpf.map_mut(name).with_context(|| format!("map {name}"))
}
