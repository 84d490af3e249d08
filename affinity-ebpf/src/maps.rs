//! Every map. The loader replaces the sizes here, except those that are fixed.

use affinity_common::abi::{
    Backend, DeviceMac, Event, FILTER_WORDS, Flow, FlowKey, FlowScratch, Foreign, FragmentKey, Frontend, FrontendKey,
    MAC_SLOTS, Member, MemberKey, Name, NameKey, Node, Session, SessionKey, Socket, SocketKey, Status, Usage, UsageKey,
    V4, V6,
};
use affinity_common::reject::Bucket;
use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, ProgramArray, RingBuf},
};

// Without preallocation, because the agent bounds their number and most tables are far from full. The next insertion takes a
// freed element at once (since Linux 6.1, https://elixir.bootlin.com/linux/v6.1/source/kernel/bpf/memalloc.c), so programs keep
// no pointer to an element: see `kernel::stable_copy`.
#[map(name = "frontends_v4")]
pub static FRONTENDS_V4: HashMap<FrontendKey<V4>, Frontend> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "frontends_v6")]
pub static FRONTENDS_V6: HashMap<FrontendKey<V6>, Frontend> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "members")]
pub static MEMBERS: HashMap<MemberKey, Member> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "names")]
pub static NAMES: HashMap<NameKey, Name> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);

#[map(name = "ranges_v4")]
pub static RANGES_V4: LpmTrie<Ranged<V4>, u32> = LpmTrie::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "ranges_v6")]
pub static RANGES_V6: LpmTrie<Ranged<V6>, u32> = LpmTrie::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "node")]
pub static NODE: Array<Node> = Array::with_max_entries(1, 0);

#[map(name = "slots")]
pub static SLOTS: Array<u32> = Array::with_max_entries(1024, BPF_F_MMAPABLE);
#[map(name = "filter")]
pub static FILTER: Array<u64> = Array::with_max_entries(FILTER_WORDS, BPF_F_MMAPABLE);
#[map(name = "backends")]
pub static BACKENDS: Array<Backend> = Array::with_max_entries(1024, BPF_F_MMAPABLE);
#[map(name = "loads")]
pub static LOADS: Array<u64> = Array::with_max_entries(1024, BPF_F_MMAPABLE);

#[map(name = "sessions_v4")]
pub static SESSIONS_V4: LruHashMap<SessionKey<V4>, Session> = LruHashMap::with_max_entries(1024, 0);
#[map(name = "sessions_v6")]
pub static SESSIONS_V6: LruHashMap<SessionKey<V6>, Session> = LruHashMap::with_max_entries(1024, 0);
#[map(name = "flows_v4")]
pub static FLOWS_V4: LruHashMap<FlowKey<V4>, Flow<V4>> = LruHashMap::with_max_entries(1024, 0);
#[map(name = "flows_v6")]
pub static FLOWS_V6: LruHashMap<FlowKey<V6>, Flow<V6>> = LruHashMap::with_max_entries(1024, 0);

#[map(name = "foreign_v4")]
pub static FOREIGN_V4: LruHashMap<FlowKey<V4>, Foreign> = LruHashMap::with_max_entries(1024, 0);
#[map(name = "foreign_v6")]
pub static FOREIGN_V6: LruHashMap<FlowKey<V6>, Foreign> = LruHashMap::with_max_entries(1024, 0);

#[map(name = "fragments_v4")]
pub static FRAGMENTS_V4: LruHashMap<FragmentKey<V4>, FlowKey<V4>> = LruHashMap::with_max_entries(4096, 0);
#[map(name = "fragments_v6")]
pub static FRAGMENTS_V6: LruHashMap<FragmentKey<V6>, FlowKey<V6>> = LruHashMap::with_max_entries(4096, 0);
#[map(name = "flow_scratch_v4")]
pub static FLOW_SCRATCH_V4: PerCpuArray<FlowScratch<V4>> = PerCpuArray::with_max_entries(1, 0);
#[map(name = "flow_scratch_v6")]
pub static FLOW_SCRATCH_V6: PerCpuArray<FlowScratch<V6>> = PerCpuArray::with_max_entries(1, 0);
#[map(name = "frontend_scratch")]
pub static FRONTEND_SCRATCH: PerCpuArray<Frontend> = PerCpuArray::with_max_entries(1, 0);
#[map(name = "rejections")]
pub static REJECTIONS: PerCpuArray<Bucket> = PerCpuArray::with_max_entries(1, 0);
#[map(name = "snat_port_cursor")]
pub static SNAT_PORT_CURSOR: Array<u64> = Array::with_max_entries(1024, 0);

#[map(name = "devices")]
pub static DEVICES: HashMap<u32, u32> = HashMap::with_max_entries(16_384, BPF_F_NO_PREALLOC);
// An array, not a hash: it is read for every frame.
#[map(name = "device_macs")]
pub static DEVICE_MACS: Array<DeviceMac> = Array::with_max_entries(MAC_SLOTS, 0);
// Separate, because all programs of an array have the same type.
#[map(name = "xdp_tail_calls")]
pub static XDP_TAIL_CALLS: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map(name = "tc_tail_calls")]
pub static TC_TAIL_CALLS: ProgramArray = ProgramArray::with_max_entries(2, 0);

#[map(name = "sockets")]
pub static SOCKETS: LruHashMap<SocketKey, Socket> = LruHashMap::with_max_entries(1024, 0);

#[map(name = "counters")]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(64, 0);
#[map(name = "usage")]
pub static USAGE: PerCpuHashMap<UsageKey, Usage> = PerCpuHashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "status")]
pub static STATUS: Array<Status> = Array::with_max_entries(1, 0);
#[map(name = "service_conditions")]
pub static SERVICE_CONDITIONS: HashMap<u32, u32> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);
#[map(name = "events")]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// The part of a [`affinity_common::abi::RangeKey`] behind its prefix length, without the padding that the alignment of an
/// address would insert.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub struct Ranged<A> {
    pub scope: u32,
    pub address: A,
}

const _: () = assert!(size_of::<Event>() + 8 == 64, "records must divide the ring");
