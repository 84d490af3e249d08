//! Every map. The loader sets the sizes; those here are the smallest that make sense.

use affinity_common::abi::{
    Backend, Event, FILTER_BITS, Flow, FlowKey, Frontend, FrontendKey, Member, MemberKey, Name, NameKey, Session,
    SessionKey, Socket, SocketKey, Status, Usage, UsageKey, V4, V6,
};
use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf},
};

// Without preallocation a replaced element is freed only when no program can see it, so a copy is never torn.
#[map(name = "frontends_v4")]
pub static FRONTENDS_V4: HashMap<FrontendKey<V4>, Frontend> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "frontends_v6")]
pub static FRONTENDS_V6: HashMap<FrontendKey<V6>, Frontend> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "members")]
pub static MEMBERS: HashMap<MemberKey, Member> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "names")]
pub static NAMES: HashMap<NameKey, Name> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);

#[map(name = "slots")]
pub static SLOTS: Array<u32> = Array::with_max_entries(1024, BPF_F_MMAPABLE);
#[map(name = "filter")]
pub static FILTER: Array<u64> = Array::with_max_entries(2 * FILTER_BITS / 64, BPF_F_MMAPABLE);
#[map(name = "backends")]
pub static BACKENDS: Array<Backend> = Array::with_max_entries(1024, 0);
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

#[map(name = "sockets")]
pub static SOCKETS: LruHashMap<SocketKey, Socket> = LruHashMap::with_max_entries(1024, 0);

#[map(name = "counters")]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(64, 0);
#[map(name = "usage")]
pub static USAGE: PerCpuHashMap<UsageKey, Usage> = PerCpuHashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "status")]
pub static STATUS: Array<Status> = Array::with_max_entries(1, 0);
#[map(name = "events")]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

const _: () = assert!(size_of::<Event>() + 8 == 64, "records must divide the ring");
