//! The kernel programs next to the model: the same state is put into both, the same frame runs through both, and the resulting
//! states can be compared.
//!
//! Loaded with a fixed clock and a fixed random number ([`Fixed`]), a program's answer depends only on the maps and the frame.
//! Nothing is attached: frames run through `BPF_PROG_TEST_RUN`. Nothing is pinned: the kernel frees everything when the process
//! ends.

mod family;
mod state;

use std::{
    collections::BTreeSet,
    fmt::Debug,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
};

use affinity_common::{
    abi::{Backend, Event, FILTER_WORDS, REASONS, V4, V6},
    model::Model,
    names,
    pipeline::{self, Verdict},
    reject::{Bucket, rejection_interval_ns},
};
use affinity_user::{
    load::{self, Options, Sizes},
    pins::PinDir,
    store::kernel::{Family as StoreFamily, KernelStore, PerCpu, Table, filter_word},
    sys::{self, Ring, RingConsumer},
};
use anyhow::{Context, Result, bail, ensure};
use bytemuck::{Pod, Zeroable};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

pub use family::ModelFamily;
pub use state::State;

/// Maps that are quick to create and to read, and larger than the tests need.
pub const SMALL: Sizes = Sizes {
    sessions: 4096,
    flows: 8192,
    frontends: 64,
    members: 256,
    backends: 32,
    slots: 64,
    names: 1,
    usage: 64,
    events_bytes: 1 << 18,
};

/// The clock and the random numbers of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixed {
    /// Monotonic nanoseconds; not zero.
    pub now_ns: u64,
    /// The result of every draw.
    pub random: u32,
}

/// The program that a frame runs through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// A client's frame, before a socket buffer exists.
    XdpForward,
    /// A client's frame, as a socket buffer.
    TcForward,
    /// A backend's reply.
    TcReverse,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::XdpForward, Self::TcForward, Self::TcReverse];

    const fn program(self) -> &'static str {
        match self {
            Self::XdpForward => names::XDP_FORWARD,
            Self::TcForward => names::TC_FORWARD,
            Self::TcReverse => names::TC_REVERSE,
        }
    }

    /// Whether `BPF_PROG_TEST_RUN` accepts a frame: it needs a whole link header and, as a socket buffer, a whole IP header if
    /// its type says so.
    pub fn takes(self, frame: &[u8]) -> bool {
        let shortest = match (self, frame.get(12..14)) {
            (_, None) | (Self::XdpForward, _) => 14,
            (Self::TcForward | Self::TcReverse, Some([0x08, 0x00])) => 14 + 20,
            (Self::TcForward | Self::TcReverse, Some([0x86, 0xdd])) => 14 + 40,
            (Self::TcForward | Self::TcReverse, Some(_)) => 15,
        };
        frame.len() >= shortest
    }

    /// The verdict of a program's return code and frame.
    fn verdict(self, retval: u32, is_changed: bool) -> Result<Verdict> {
        const XDP: [u32; 3] = [2, 3, 1];
        const TC: [u32; 3] = [u32::MAX, 7, 2];
        let [goes_on, sent_back, dropped] = if self == Self::XdpForward { XDP } else { TC };
        Ok(match retval {
            code if code == goes_on && is_changed => Verdict::Forward,
            code if code == goes_on => Verdict::Pass,
            code if code == sent_back => Verdict::Answer,
            code if code == dropped => Verdict::Drop,
            code => bail!("{} returned {code}", self.program()),
        })
    }
}

/// The result of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// What happens to it.
    pub verdict: Verdict,
    /// Its bytes.
    pub frame: Vec<u8>,
}

/// Runs a frame through the model. No device is known here that frames could be redirected to.
pub fn run_model(model: &Model, hook: Hook, frame: &[u8]) -> Ran {
    let mut bytes = frame.to_vec();
    let verdict = match hook {
        Hook::XdpForward | Hook::TcForward => pipeline::forward(&mut bytes, model),
        Hook::TcReverse => pipeline::reverse(&mut bytes, model),
    };
    // A return code does not show a translation that changed nothing: a later fragment, if only the first one's port changed.
    let verdict = match verdict {
        Verdict::Forward | Verdict::Redirect if bytes == frame => Verdict::Pass,
        Verdict::Forward | Verdict::Redirect => Verdict::Forward,
        verdict @ (Verdict::Pass | Verdict::Answer | Verdict::Drop) => verdict,
    };
    Ran { verdict, frame: bytes }
}

/// A model with arrays as long as the kernel's and, like those, full of zeros; everything else is empty.
pub fn empty_model(sizes: &Sizes, fixed: Fixed) -> Model {
    let mut model = Model::new(usize::MAX);
    model.now_ns.set(fixed.now_ns);
    model.random.set(fixed.random);
    model.fixed_random = true;
    model.slots = (0..sizes.slots).map(|slot| (slot, 0)).collect();
    model.backends = (0..sizes.backends).map(|index| (index, Backend::zeroed())).collect();
    model
}

/// Limits the packets that a model rejects in a second.
pub fn limit(model: &mut Model, rejections_per_second: u32) {
    model.rejection_interval_ns = rejection_interval_ns(rejections_per_second);
}

/// Keeps the thread that created it on one processor while it lives.
#[derive(Debug)]
pub struct OnProcessor {
    before: CpuSet,
}

impl OnProcessor {
    /// On the processor with this position among those that the thread may use; none if there are fewer.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(number: usize) -> Result<Option<Self>> {
        let before = sched_getaffinity(None).context("sched_getaffinity")?;
        let Some(cpu) = (0..CpuSet::MAX_CPU).filter(|cpu| before.is_set(*cpu)).nth(number) else { return Ok(None) };
        let mut only = CpuSet::new();
        only.set(cpu);
        sched_setaffinity(None, &only).context("sched_setaffinity")?;
        Ok(Some(Self { before }))
    }
}

impl Drop for OnProcessor {
    fn drop(&mut self) {
        sched_setaffinity(None, &self.before).expect("the processors that the thread had before");
    }
}

/// The programs and maps, loaded for one test.
#[derive(Debug)]
pub struct Kernel {
    /// The maps.
    pub store: KernelStore,
    programs: [OwnedFd; 3],
    ring: Ring,
    consumer: RingConsumer,
    rejections: PerCpu<u32, Bucket>,
    /// Words of the filter that are not zero.
    filter_words: BTreeSet<u32>,
    /// The counters when the last state was put.
    counted: Vec<u64>,
}

impl Kernel {
    /// Loads the programs; without `fixed`, with the kernel's own clock and random numbers.
    ///
    /// # Errors
    /// If the kernel refuses, mostly because the caller is not root.
    pub fn load(sizes: Sizes, fixed: Option<Fixed>) -> Result<Self> {
        Self::load_limited(sizes, fixed, 0)
    }

    /// The same, with a limit for the packets that each processor rejects per second; for a model, see [`limit`].
    ///
    /// # Errors
    /// As [`Kernel::load`].
    pub fn load_limited(sizes: Sizes, fixed: Option<Fixed>, rejections_per_second: u32) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("affinity-kernel-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let pins = PinDir::new(&Path::new("/sys/fs/bpf").join(name));
        let fixed = fixed.map(|Fixed { now_ns, random }| (now_ns, u64::from(random)));
        let kernel = load::load(&pins, &Options { sizes, fixed, rejections_per_second, ..Options::default() })
            .context("load the kernel programs")
            .and_then(|_| Self::open(&pins));
        pins.remove()?;
        kernel
    }

    fn open(pins: &PinDir) -> Result<Self> {
        let store = KernelStore::open(pins.root())?;
        let program = |hook: Hook| sys::obj_get(&pins.prog(hook.program()));
        let [xdp, forward, reverse] = Hook::ALL.map(program);
        let (ring, consumer) = (store.events.ring()?, store.events.ring_consumer()?);
        let counted = store.counter_sums()?;
        let programs = [xdp?, forward?, reverse?];
        let rejections = PerCpu::open(&pins.maps(), names::REJECTIONS)?;
        Ok(Self { store, programs, ring, consumer, rejections, filter_words: BTreeSet::new(), counted })
    }

    /// Runs a frame through a program.
    ///
    /// # Errors
    /// If the kernel does not accept such a frame: see [`Hook::takes`].
    pub fn run(&self, hook: Hook, frame: &[u8]) -> Result<Ran> {
        let run = sys::test_run(self.programs[hook as usize].as_fd(), frame, 1)?;
        let verdict = hook.verdict(run.retval, run.data_out != frame)?;
        Ok(Ran { verdict, frame: run.data_out })
    }

    /// Makes the maps equal to the model; counting restarts.
    ///
    /// # Errors
    /// If a map cannot be written, or is too small.
    pub fn put(&mut self, model: &Model) -> Result<()> {
        self.put_filter(model);
        let store = &self.store;
        put_family::<V4>(store, model)?;
        put_family::<V6>(store, model)?;
        store.node.put(&0, &model.node)?;
        put_hash(&store.members, model.members.iter().map(|(key, member)| (*key, *member)))?;
        for index in 0..store.backends.info().max_entries {
            store.backends.put(&index, model.backends.get(&index).context("the model lacks a backend")?)?;
            store.snat_port_cursor.put(&index, &model.snat_port_cursor.borrow().get(&index).copied().unwrap_or(0))?;
            store.loads.store_u64(index, model.loads.borrow().get(&index).copied().unwrap_or(0));
        }
        for slot in 0..store.slots.len() {
            store.slots.store_u32(slot, *model.slots.get(&slot).context("the model lacks a slot")?);
        }
        for key in store.usage_sums()?.keys() {
            store.usage.remove(key)?;
        }
        for (key, counts) in &*model.usage.borrow() {
            ensure!(counts.is_empty(), "counts of the model cannot be put into the kernel's maps");
            store.usage.make(key)?;
        }
        // A model has one processor. A bucket that was never used is full on all.
        ensure!(model.rejections.get() == Bucket::default(), "a used bucket cannot be put into the kernel's map");
        self.rejections.reset(&0)?;
        self.forget_events();
        self.put_counters_aside()
    }

    /// Restarts counting.
    ///
    /// # Errors
    /// If the counters cannot be read.
    pub fn put_counters_aside(&mut self) -> Result<()> {
        self.counted = self.store.counter_sums()?;
        Ok(())
    }

    fn put_filter(&mut self, model: &Model) {
        // All parts except that of members: the programs set bits in them too.
        const PART: u32 = FILTER_WORDS / 4;
        let parts = (0..PART).chain(2 * PART..FILTER_WORDS);
        let programs = parts.filter(|word| self.store.filter.load_u64(*word) != 0);
        for word in std::mem::take(&mut self.filter_words).into_iter().chain(programs) {
            self.store.filter.store_u64(word, 0);
        }
        for &(direction, bit) in &*model.filter.borrow() {
            let (word, mask) = filter_word(direction, bit);
            self.store.filter.set_bits(word, mask);
            self.filter_words.insert(word);
        }
    }

    /// Everything that programs change, with counts since the last [`Kernel::put`].
    ///
    /// # Errors
    /// If a map cannot be read.
    pub fn state(&self) -> Result<State> {
        State::of_kernel(self)
    }

    /// Counts of every reason since the last [`Kernel::put`], by number.
    fn counts(&self) -> Result<Vec<u64>> {
        let sums = self.store.counter_sums()?;
        ensure!(sums.len() >= REASONS.len(), "a reason has no counter");
        Ok(sums.iter().zip(&self.counted).map(|(now, before)| now - before).collect())
    }

    /// The events that were reported and not yet cleared, oldest first.
    pub fn events(&self) -> Vec<Event> {
        const HEADER: u64 = 8;
        const RECORD: u64 = HEADER + size_of::<Event>() as u64;
        let records = (self.consumer.consumed()..self.ring.produced()).step_by(RECORD as usize);
        let event = |record: u64| {
            let words: [u64; size_of::<Event>() / 8] =
                std::array::from_fn(|word| self.ring.word(record + HEADER + 8 * word as u64));
            bytemuck::cast(words)
        };
        records.map(event).collect()
    }

    /// Empties the event ring.
    pub fn forget_events(&self) {
        self.consumer.consume(self.ring.produced());
    }
}

fn put_family<A: ModelFamily + StoreFamily>(store: &KernelStore, model: &Model) -> Result<()> {
    let tables = store.family::<A>();
    let frontends = A::frontends(model).iter();
    put_hash(&tables.frontends, frontends.map(|(key, frontend)| (*key, *frontend)))?;
    put_hash(&tables.ranges, A::ranges(model).iter().map(|key| (*key, 1)))?;
    put_hash(&tables.sessions, A::sessions(model).borrow().iter())?;
    put_hash(&tables.flows, A::flows(model).borrow().iter())?;
    put_hash(&tables.foreign, A::foreign(model).borrow().iter())?;
    put_hash(&tables.fragments, A::fragments(model).borrow().iter())
}

/// Makes a hash map contain these entries and no others.
fn put_hash<K: Pod + Debug, V: Pod>(table: &Table<K, V>, entries: impl Iterator<Item = (K, V)>) -> Result<()> {
    let old: Vec<_> = table.iter().collect::<Result<_, _>>()?;
    for (key, _) in old {
        table.remove(&key)?;
    }
    for (key, value) in entries {
        table.put(&key, &value)?;
    }
    Ok(())
}
