//! The pipeline's tables on BPF maps.

use core::mem::offset_of;

use affinity_common::{
    abi::{
        Address, Backend, BackendRef, Config, DEVICE_UPPER, Direction, Event, FILTER_BITS, Flow, FlowKey, FlowScratch,
        Foreign, FragmentKey, Frontend, FrontendKey, Member, MemberKey, Node, Port, Reason, Session, SessionKey,
        Socket, SocketKey, UsageKey, UsageOf, V4, V6, usage_index,
    },
    flow, foreign,
    global::{GlobalFunctions, Opened},
    headers::Headers,
    pipeline, snat,
    tables::{Entry, FamilyTables, NotStored, SocketTables, Tables, Unstable},
};
use aya_ebpf::{bindings::BPF_NOEXIST, maps::lpm_trie::Key};
use aya_log_ebpf::{debug, trace};
use bytemuck::Pod;

use crate::maps::{
    BACKENDS, COUNTERS, DEVICES, EVENTS, FILTER, FLOW_SCRATCH_V4, FLOW_SCRATCH_V6, FLOWS_V4, FLOWS_V6, FOREIGN_V4,
    FOREIGN_V6, FRAGMENTS_V4, FRAGMENTS_V6, FRONTEND_SCRATCH, FRONTENDS_V4, FRONTENDS_V6, LOADS, MEMBERS, NODE,
    RANGES_V4, RANGES_V6, REJECTIONS, Ranged, SESSIONS_V4, SESSIONS_V6, SLOTS, SNAT_PORT_CURSOR, SOCKETS, USAGE,
};
use affinity_ebpf::{
    global_func,
    kernel::{self, CONFIG, MapValue},
};

/// Readers poll: waking one for every event would cost more than the event.
const BPF_RB_NO_WAKEUP: u64 = 1;

/// Log records have no context: the log ring needs none.
const NO_CONTEXT: () = ();

/// A word of the configuration; the verifier knows its value.
#[inline(always)]
fn config(offset: usize) -> u64 {
    CONFIG.word(offset)
}

/// The maps of this object.
pub struct Maps;

impl Tables for Maps {
    type Entry<V: Pod> = MapValue<V>;
    type Pin = MapValue<Session>;

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        match config(offset_of!(Config, fixed_now_ns)) {
            0 => kernel::jiffies()
                .wrapping_sub(config(offset_of!(Config, tick_base)))
                .wrapping_mul(config(offset_of!(Config, tick_ns))),
            fixed => fixed,
        }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        if config(offset_of!(Config, fixed_now_ns)) == 0 {
            kernel::random()
        } else {
            config(offset_of!(Config, fixed_random)) as u32
        }
    }

    #[inline(always)]
    fn filter(&self, direction: Direction, bit: u32) -> bool {
        kernel::read_copy(FILTER.get_ptr(filter_word(direction, bit))).is_some_and(|word| word >> (bit % 64) & 1 == 1)
    }

    #[inline(always)]
    fn mark(&self, direction: Direction, bit: u32) {
        if let Some(word) = FILTER.get_ptr_mut(filter_word(direction, bit)) {
            MapValue::new(word).set_bit(bit % 64);
        }
    }

    #[inline(always)]
    fn node(&self) -> Option<Node> {
        kernel::read_copy(NODE.get_ptr(0))
    }

    #[inline(always)]
    fn is_above_another(&self, ifindex: u32) -> bool {
        matches!(kernel::stable_copy(|| DEVICES.get_ptr(ifindex)), Ok(Some(flags)) if flags & DEVICE_UPPER != 0)
    }

    #[inline(always)]
    fn next_snat_port(&self, backend: u32) -> u64 {
        SNAT_PORT_CURSOR.get_ptr_mut(backend).map_or(0, |cursor| MapValue::new(cursor).fetch_increment())
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<u32> {
        kernel::read_copy(SLOTS.get_ptr(index))
    }

    #[inline(always)]
    fn backend(&self, index: u32) -> Option<Backend> {
        kernel::read_copy(BACKENDS.get_ptr(index))
    }

    #[inline(always)]
    fn has_backend(&self, of: BackendRef) -> bool {
        let record = BACKENDS.get_ptr_mut(of.index);
        record.is_some_and(|record| MapValue::new(record).read(Backend::GENERATION) == of.generation)
    }

    #[inline(always)]
    fn member(&self, key: &MemberKey) -> Option<Member> {
        let member = member(key);
        (member.pad == 0).then_some(member)
    }

    #[inline(always)]
    fn is_member(&self, key: &MemberKey, record: &Member) -> bool {
        // An equal record of another key matches only if that key has just got the element of this key. Then the result is the
        // one that was right a moment earlier.
        kernel::read_copy(MEMBERS.get_ptr(key)) == Some(*record) || member(key) == *record
    }

    #[inline(always)]
    fn frontend_scratch<R>(&self, work: impl FnOnce(&mut Frontend) -> R) -> Option<R> {
        kernel::with_percpu(FRONTEND_SCRATCH.get_ptr_mut(0), work)
    }

    #[inline(always)]
    fn load(&self, backend: u32) -> u64 {
        kernel::read_copy(LOADS.get_ptr(backend)).map_or(0, |load| load.cast_signed().max(0).cast_unsigned())
    }

    #[inline(always)]
    fn add_load(&self, backend: u32, sessions: i64) {
        if let Some(load) = LOADS.get_ptr_mut(backend) {
            MapValue::new(load).add(sessions);
        }
    }

    #[inline(always)]
    fn may_reject(&self) -> bool {
        let interval_ns = config(offset_of!(Config, rejection_interval_ns));
        if interval_ns == 0 {
            return true;
        }
        let taken = kernel::with_percpu(REJECTIONS.get_ptr_mut(0), |bucket| {
            let rest = bucket.take(self.now_ns(), interval_ns);
            if let Some(rest) = rest {
                *bucket = rest;
            }
            rest.is_some()
        });
        taken.unwrap_or(true)
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        if let Some(count) = COUNTERS.get_ptr_mut(reason as u32) {
            MapValue::new(count).increment_own();
        }
    }

    #[inline(always)]
    fn conclude(&self, reason: Reason) {
        // By number: with a name, the verifier would have to follow the copy of the string.
        if matches!(reason, Reason::Established | Reason::Reply | Reason::NotFrontend | Reason::NotReply) {
            trace!(NO_CONTEXT, "packet: reason {}", reason as u8);
        } else {
            debug!(NO_CONTEXT, "packet: reason {}", reason as u8);
        }
        self.count(reason);
    }

    #[inline(always)]
    fn count_usage(&self, of: UsageOf, id: u32, reason: Reason) {
        if let Some(usage) = USAGE.get_ptr_mut(UsageKey { of: of as u32, id })
            && let Some(index) = usage_index(reason)
            && let Some(count) = MapValue::new(usage).counter(index)
        {
            count.increment_own();
        }
    }

    #[inline(always)]
    fn report(&self, event: impl FnOnce() -> Event) {
        match EVENTS.reserve::<Event>(0) {
            Some(mut place) => {
                place.write(event());
                place.submit(BPF_RB_NO_WAKEUP);
            }
            None => self.count(Reason::EventLost),
        }
    }
}

/// A member's record. If there is none, the result has padding that is not zero. If the record changes during each reading, the
/// connection is handled as if the member had just gone. Out of line, to keep the callers' stack frames small.
#[inline(never)]
fn member(key: &MemberKey) -> Member {
    match kernel::stable_copy(|| MEMBERS.get_ptr(key)) {
        Ok(Some(member)) => member,
        Ok(None) | Err(Unstable) => Member { generation: 0, port: Port([0; 2]), state: 0, pad: 1 },
    }
}

/// The word of the filter that holds a bit of one part.
#[inline(always)]
fn filter_word(direction: Direction, bit: u32) -> u32 {
    direction as u32 * (FILTER_BITS / 64) + bit / 64
}

macro_rules! family {
    ($address:ty, $frontends:ident, $ranges:ident, $sessions:ident, $flows:ident, $foreign:ident, $fragments:ident, $flow_scratch:ident,
     $open:ident, $note_change:ident, $note_leaving:ident, $is_free:ident) => {
        impl GlobalFunctions<$address> for Maps {
            #[inline(always)]
            fn open_connection(&self, headers: &Headers<$address>) -> Opened {
                Opened::from_bits(global_func!($open(headers: &Headers<$address>) {
                    pipeline::open(&Maps, headers).to_bits()
                }))
            }

            #[inline(always)]
            fn note_change(&self, headers: &Headers<$address>) {
                global_func!($note_change(headers: &Headers<$address>) {
                    flow::note_change(&Maps, headers);
                    0
                });
            }

            #[inline(always)]
            fn note_leaving(&self, headers: &Headers<$address>) {
                global_func!($note_leaving(headers: &Headers<$address>) {
                    foreign::note_leaving(&Maps, headers);
                    0
                });
            }

            #[inline(always)]
            fn is_free(&self, replies: &FlowKey<$address>) -> bool {
                global_func!($is_free(replies: &FlowKey<$address>) { snat::is_free(&Maps, replies).into() }) == 1
            }
        }

        impl FamilyTables<$address> for Maps {
            #[inline(always)]
            fn frontend(&self, key: &FrontendKey<$address>) -> Result<Option<Frontend>, Unstable> {
                kernel::stable_copy(|| $frontends.get_ptr(key))
            }

            #[inline(always)]
            fn is_within(&self, scope: u32, address: $address) -> bool {
                let bits = 32 + u32::from(<$address>::BITS);
                $ranges.get(Key::new(bits, Ranged { scope, address })).is_some()
            }

            #[inline(always)]
            fn session(&self, key: &SessionKey<$address>) -> Option<MapValue<Session>> {
                $sessions.get_ptr_mut(key).map(MapValue::new)
            }

            #[inline(always)]
            fn add_session(&self, key: &SessionKey<$address>, session: &Session) -> Result<(), NotStored> {
                $sessions.insert(key, session, u64::from(BPF_NOEXIST)).map_err(|_| NotStored)
            }

            #[inline(always)]
            fn flow(&self, key: &FlowKey<$address>) -> Option<MapValue<Flow<$address>>> {
                $flows.get_ptr_mut(key).map(MapValue::new)
            }

            #[inline(always)]
            fn put_flow(&self, key: &FlowKey<$address>, flow: &Flow<$address>) -> Result<(), NotStored> {
                $flows.insert(key, flow, 0).map_err(|_| NotStored)
            }

            #[inline(always)]
            fn add_flow(&self, key: &FlowKey<$address>, flow: &Flow<$address>) -> Result<(), NotStored> {
                $flows.insert(key, flow, u64::from(BPF_NOEXIST)).map_err(|_| NotStored)
            }

            #[inline(always)]
            fn remove_flow(&self, key: &FlowKey<$address>) {
                // If it has gone already, there is nothing to do.
                let _ = $flows.remove(key);
            }

            #[inline(always)]
            fn foreign(&self, replies: &FlowKey<$address>) -> Option<MapValue<Foreign>> {
                $foreign.get_ptr_mut(replies).map(MapValue::new)
            }

            #[inline(always)]
            fn put_foreign(&self, replies: &FlowKey<$address>, foreign: &Foreign) {
                // If there is no room, the connection stays unknown.
                let _ = $foreign.insert(replies, foreign, 0);
            }

            #[inline(always)]
            fn flow_scratch<R>(&self, work: impl FnOnce(&mut FlowScratch<$address>) -> R) -> Option<R> {
                kernel::with_percpu($flow_scratch.get_ptr_mut(0), work)
            }

            #[inline(always)]
            fn opened_flow(&self) -> Option<MapValue<Flow<$address>>> {
                $flow_scratch.get_ptr_mut(0).map(|scratch| MapValue::new(scratch).flow())
            }

            #[inline(always)]
            fn fragment(&self, key: &FragmentKey<$address>) -> Option<FlowKey<$address>> {
                // If it changes during each reading, the fragment passes unchanged.
                kernel::stable_copy(|| $fragments.get_ptr(key)).unwrap_or(None)
            }

            #[inline(always)]
            fn put_fragment(&self, key: &FragmentKey<$address>, flow: &FlowKey<$address>) {
                // If there is no room, later fragments pass unchanged.
                let _ = $fragments.insert(key, flow, 0);
            }
        }
    };
}

family!(
    V4,
    FRONTENDS_V4,
    RANGES_V4,
    SESSIONS_V4,
    FLOWS_V4,
    FOREIGN_V4,
    FRAGMENTS_V4,
    FLOW_SCRATCH_V4,
    open_v4,
    note_change_v4,
    note_leaving_v4,
    is_free_v4
);
family!(
    V6,
    FRONTENDS_V6,
    RANGES_V6,
    SESSIONS_V6,
    FLOWS_V6,
    FOREIGN_V6,
    FRAGMENTS_V6,
    FLOW_SCRATCH_V6,
    open_v6,
    note_change_v6,
    note_leaving_v6,
    is_free_v6
);

impl SocketTables for Maps {
    #[inline(always)]
    fn node_netns(&self) -> u64 {
        config(offset_of!(Config, node_netns))
    }

    #[inline(always)]
    fn socket(&self, key: &SocketKey) -> Option<MapValue<Socket>> {
        SOCKETS.get_ptr_mut(key).map(MapValue::new)
    }

    #[inline(always)]
    fn put_socket(&self, key: &SocketKey, socket: &Socket) -> Result<(), NotStored> {
        SOCKETS.insert(key, socket, 0).map_err(|_| NotStored)
    }

    #[inline(always)]
    fn remove_socket(&self, key: &SocketKey) {
        // If it has gone already, there is nothing to do.
        let _ = SOCKETS.remove(key);
    }
}
