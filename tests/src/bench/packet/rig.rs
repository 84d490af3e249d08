//! The programs on the bench: ours and the limits, with tables for flows that last and tables that are full.

use std::time::Instant;

use affinity_common::{
    abi::{
        AFFINITY, Backend, CONFIG_MAGIC, Config, Direction, FILTER_BITS, Frontend, FrontendKey, MEMBER_READY, Member,
        MemberKey, Port, V4, V6, filter_bit,
    },
    names,
    parse::{ACK, TCP},
};
use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, ProgramArray},
    programs::{Program, SchedClassifier, TestRun as _, TestRunOptions, Xdp},
};
use bytemuck::must_cast;

use super::course::Case;
use crate::packet::Frame;

/// Entries of each session table, and half of each flow table: room for 100,000 flows, and soon full.
const ENTRIES: u32 = 1 << 18;

/// The hook whose programs run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hook {
    /// XDP.
    Xdp,
    /// TC ingress.
    Tc,
}

impl Hook {
    /// As in the programs' names.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::Tc => "tc",
        }
    }
}

/// The family of the packets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
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

/// Programs and tables for one hook and family.
pub(super) struct Rig {
    /// The hook.
    pub hook: Hook,
    /// The family.
    pub family: Family,
    lasting: Bench,
    full: Bench,
}

impl Rig {
    /// Loads everything.
    pub(super) fn new(hook: Hook, family: Family) -> Result<Self> {
        Ok(Self { hook, family, lasting: Bench::new(hook, family)?, full: Bench::new(hook, family)? })
    }

    /// Fills the tables for a case.
    pub(super) fn prepare(&mut self, case: &Case) -> Result<()> {
        self.bench(case).run(&case.filling(), case.fill).map(drop)
    }

    /// Nanoseconds per packet, the wrapper's included.
    pub(super) fn measure(&mut self, case: &Case, packets: u32) -> Result<f64> {
        self.bench(case).run(case, packets)
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
    /// Packets of endless courses so far: a client once seen is not "never seen" again.
    begun: u64,
}

impl Bench {
    fn new(hook: Hook, family: Family) -> Result<Self> {
        let mut ours = load_ours()?;
        let mut limits = Ebpf::load(affinity_user::objects::LIMITS).context("loading the limit programs")?;
        publish(&mut ours)?;
        let hook_name = hook.name();
        load(&mut ours, hook, &format!("{hook_name}_forward"))?;
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
        let owner = if case.program == "forward" { &self.ours } else { &self.limits };
        let target = program(owner, &format!("{hook}_{}", case.program))?.fd()?.try_clone()?;
        ProgramArray::try_from(map(&mut self.limits, "under_test")?)?.set(0, &target, 0)?;
        let mut words = case.words();
        if case.full {
            words[0] = self.begun;
            self.begun += u64::from(packets);
        }
        array::<[u64; 6]>(&mut self.limits, "course")?.set(0, words, 0)?;

        let options = TestRunOptions { data_in: Some(&self.frame), repeat: packets, ..TestRunOptions::new() };
        let drive = program(&self.limits, &format!("{hook}_drive"))?;
        let start = Instant::now();
        match self.hook {
            Hook::Xdp => <&Xdp>::try_from(drive)?.test_run(options)?,
            Hook::Tc => <&SchedClassifier>::try_from(drive)?.test_run(options)?,
        };
        Ok(start.elapsed().as_nanos() as f64 / f64::from(packets))
    }
}

fn load_ours() -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    for map in [names::SESSIONS_V4, names::SESSIONS_V6] {
        loader.map_max_entries(map, ENTRIES);
    }
    for map in [names::FLOWS_V4, names::FLOWS_V6] {
        loader.map_max_entries(map, 2 * ENTRIES);
    }
    // Any tick does: nothing expires while this runs.
    let config = Config {
        magic: CONFIG_MAGIC,
        tick_ns: 4_000_000,
        tick_base: 0,
        refuse_errno: 0,
        node_netns: 0,
        redirect: 0,
        takes_ipv6_flag: 0,
        fixed_now_ns: 0,
        fixed_random: 0,
    };
    let words: [u64; 9] = must_cast(config);
    loader.override_global("CONFIG", &words, true);
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

/// A service of three pods under both families' frontends.
fn publish(ebpf: &mut Ebpf) -> Result<()> {
    let (v4, v6) = (V4([10, 96, 0, 10]), V6([0xfd, 0, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10]));
    let mut filter = array::<u64>(ebpf, names::FILTER)?;
    for bit in [filter_bit(v4, Port::new(80), TCP), filter_bit(v6, Port::new(80), TCP)] {
        let word = Direction::Forward as u32 * (FILTER_BITS / 64) + bit / 64;
        let bits = filter.get(&word, 0)?;
        filter.set(word, bits | 1 << (bit % 64), 0)?;
    }
    for pod in 0..3u8 {
        publish_member(ebpf, 1, u32::from(pod), V4([10, 244, 0, pod + 1]).0.as_slice())?;
        let address = [0xfd, 0, 0, 0xf4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, pod + 1];
        publish_member(ebpf, 2, 3 + u32::from(pod), &address)?;
    }
    let frontend = Frontend {
        timeout_ns: 10_800_000_000_000,
        service: 3,
        pool: 1,
        group: 3,
        own: 1,
        slot_first: 0,
        slot_count: 3,
        seed: 0,
        select: 0,
        timer: 0,
        prefix: 128,
        flags: AFFINITY,
    };
    let (key, record): ([u64; 1], [u64; 5]) =
        (must_cast(FrontendKey::new(v4, Port::new(80), TCP)), must_cast(frontend));
    table::<[u64; 1], [u64; 5]>(ebpf, names::FRONTENDS_V4)?.insert(key, record, 0)?;
    let frontend = Frontend { pool: 2, own: 2, slot_first: 3, ..frontend };
    let (key, record): ([u64; 3], [u64; 5]) =
        (must_cast(FrontendKey::new(v6, Port::new(80), TCP)), must_cast(frontend));
    table::<[u64; 3], [u64; 5]>(ebpf, names::FRONTENDS_V6)?.insert(key, record, 0)?;
    Ok(())
}

fn publish_member(ebpf: &mut Ebpf, pool: u32, index: u32, octets: &[u8]) -> Result<()> {
    let mut address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0];
    address[16 - octets.len()..].copy_from_slice(octets);
    let backend: [u64; 3] = must_cast(Backend { address, generation: 1, flags: 0 });
    array::<[u64; 3]>(ebpf, names::BACKENDS)?.set(index, backend, 0)?;
    array::<u32>(ebpf, names::SLOTS)?.set(index, index, 0)?;
    let key: [u64; 1] = must_cast(MemberKey { pool, backend: index });
    let member: [u64; 1] = must_cast(Member { generation: 1, port: Port::new(8080), state: MEMBER_READY, pad: 0 });
    table::<[u64; 1], [u64; 1]>(ebpf, names::MEMBERS)?.insert(key, member, 0)?;
    Ok(())
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
