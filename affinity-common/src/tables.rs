//! The maps, as the pipeline needs them. There are two implementations: BPF maps in the kernel programs, and [`crate::model`].
//! Records that the agent publishes are copied by a lookup; nothing blocks.

use bytemuck::Pod;

use crate::abi::{
    Address, Backend, BackendRef, Direction, Event, Field, Flow, FlowKey, FlowScratch, Foreign, FragmentKey, Frontend,
    FrontendKey, Member, MemberKey, Node, Reason, Session, SessionKey, Socket, SocketKey, UsageOf, V4, V6,
};

/// A record inside a table, found by a lookup. Other CPUs read and write it concurrently, so it is accessed field by field, as
/// with the kernel's `READ_ONCE` and `WRITE_ONCE`: each access is one load or one store, and the compiler neither omits, repeats
/// nor merges any. A field of more than eight bytes is accessed word by word.
pub trait Entry<V: Pod> {
    /// A copy of the record, word by word.
    fn get(&self) -> V;
    /// The value of a field.
    fn read<F: Pod>(&self, field: Field<V, F>) -> F;
    /// Writes a field.
    fn write<F: Pod>(&self, field: Field<V, F>, value: F);
    /// Adds bits to a field atomically, and returns the value before.
    fn add_bits(&self, field: Field<V, u32>, bits: u32) -> u32;
}

/// A pin inside a table, which another CPU may be moving concurrently: see [`crate::session`].
pub trait Pin: Entry<Session> {
    /// A consistent copy of the fields that decide about the pin: the backend, the times, the connections and the next random
    /// number. The other fields are zero.
    fn snapshot(&self) -> Session;
    /// Replaces the backend atomically; false, and no change, if it is not `from`.
    fn cas_backend(&self, from: BackendRef, to: BackendRef) -> bool;
    /// The backend.
    fn backend(&self) -> BackendRef;
    /// [`Session::connections`]. A later [`Pin::backend`] returns no older value.
    fn connections(&self) -> u32;
    /// Replaces [`Session::connections`] atomically; false, and no change, if it is not `from`.
    fn swap_connections(&self, from: u32, to: u32) -> bool;
}

/// The tables of both families, the clock, and random numbers.
pub trait Tables {
    /// A value found in a table.
    type Entry<V: Pod>: Entry<V>;
    /// A session found in a table.
    type Pin: Pin;

    /// Monotonic time in nanoseconds, as coarse as a jiffy.
    fn now_ns(&self) -> u64;
    /// A random number.
    fn random(&self) -> u32;
    /// Whether a bit is set in the filter of a direction.
    fn filter(&self, direction: Direction, bit: u32) -> bool;
    /// Sets a bit in the filter of a direction.
    fn mark(&self, direction: Direction, bit: u32);
    /// The address and ports for masquerading.
    fn node(&self) -> Option<Node>;
    /// Whether a device is an upper device, a bridge for example: the programs on its lower device have seen its frames.
    fn is_above_another(&self, ifindex: u32) -> bool;
    /// The position in the range of SNAT ports for connections to a backend; the next call gets the next one.
    fn next_snat_port(&self, backend: u32) -> u64;
    /// The backend index in a slot.
    fn slot(&self, index: u32) -> Option<u32>;
    /// A backend's record.
    fn backend(&self, index: u32) -> Option<Backend>;
    /// Whether a backend still has its generation.
    fn has_backend(&self, of: BackendRef) -> bool {
        self.backend(of.index).is_some_and(|backend| backend.generation == of.generation)
    }
    /// A member's record.
    fn member(&self, key: &MemberKey) -> Option<Member>;
    /// Whether a member has this record: cheaper than [`Tables::member`] if it has.
    fn is_member(&self, key: &MemberKey, record: &Member) -> bool {
        self.member(key) == Some(*record)
    }
    /// Calls `work` with per-CPU scratch memory for a frontend's record, because the stack has no room for it. `None` if there is
    /// none, which cannot happen in the kernel. Only for packet programs: they do not interrupt each other.
    fn frontend_scratch<R>(&self, work: impl FnOnce(&mut Frontend) -> R) -> Option<R>;
    /// The number of live sessions of a backend; zero if the count is below.
    fn load(&self, backend: u32) -> u64;
    /// Adds to the live sessions of a backend.
    fn add_load(&self, backend: u32, sessions: i64);
    /// Whether one more packet may be rejected now. Takes a token from the CPU's [`crate::reject::Bucket`].
    fn may_reject(&self) -> bool;
    /// Counts a reason.
    fn count(&self, reason: Reason);
    /// Counts the reason of a packet's verdict; called once per packet.
    #[inline(always)]
    fn conclude(&self, reason: Reason) {
        self.count(reason);
    }
    /// Counts a new connection of a service or backend.
    fn count_usage(&self, of: UsageOf, id: u32, reason: Reason);
    /// Reports an event. It is built in the ring buffer, because the stack has no room for it. Counts [`Reason::EventLost`] if the
    /// ring is full.
    fn report(&self, event: impl FnOnce() -> Event);
}

/// The tables of one family.
pub trait FamilyTables<A: Address>: Tables {
    /// A consistent copy of a frontend's record.
    ///
    /// # Errors
    /// [`Unstable`].
    fn frontend(&self, key: &FrontendKey<A>) -> Result<Option<Frontend>, Unstable>;
    /// Whether an address lies within a range of `scope`.
    fn is_within(&self, scope: u32, address: A) -> bool;
    /// A session.
    fn session(&self, key: &SessionKey<A>) -> Option<Self::Pin>;
    /// Stores a session if there is none under its key.
    ///
    /// # Errors
    /// [`NotStored`] if there is one, or if the kernel has no room.
    fn add_session(&self, key: &SessionKey<A>, session: &Session) -> Result<(), NotStored>;
    /// A flow.
    fn flow(&self, key: &FlowKey<A>) -> Option<Self::Entry<Flow<A>>>;
    /// Stores a flow; replaces one with the same key.
    ///
    /// # Errors
    /// [`NotStored`] if the kernel has no room.
    fn put_flow(&self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), NotStored>;
    /// Stores a flow if there is none under its key.
    ///
    /// # Errors
    /// [`NotStored`] if there is one, or if the kernel has no room.
    fn add_flow(&self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), NotStored>;
    /// Removes a flow, if it is there.
    fn remove_flow(&self, key: &FlowKey<A>);
    /// A foreign connection, by the key of its replies.
    fn foreign(&self, replies: &FlowKey<A>) -> Option<Self::Entry<Foreign>>;
    /// Stores a foreign connection; replaces one with the same key. If there is no room, it is not noted.
    fn put_foreign(&self, replies: &FlowKey<A>, foreign: &Foreign);
    /// Calls `work` with per-CPU scratch memory; `None` if there is none, which cannot happen in the kernel.
    fn flow_scratch<R>(&self, work: impl FnOnce(&mut FlowScratch<A>) -> R) -> Option<R>;
    /// The flow that was opened just before, in the scratch memory. A lookup would count as a use in the LRU map, so that connections
    /// of a single packet would evict open ones.
    fn opened_flow(&self) -> Option<Self::Entry<Flow<A>>>;
    /// The flow of a fragmented packet.
    fn fragment(&self, key: &FragmentKey<A>) -> Option<FlowKey<A>>;
    /// Stores the flow of a fragmented packet. If there is no room, its later fragments pass unchanged.
    fn put_fragment(&self, key: &FragmentKey<A>, flow: &FlowKey<A>);
}

/// The table of sockets, for the programs on cgroups.
pub trait SocketTables: FamilyTables<V4> + FamilyTables<V6> {
    /// The cookie of the node's network namespace.
    fn node_netns(&self) -> u64;
    /// A socket's entry.
    fn socket(&self, key: &SocketKey) -> Option<Self::Entry<Socket>>;
    /// Stores an entry; replaces one with the same key.
    ///
    /// # Errors
    /// [`NotStored`] if the kernel has no room.
    fn put_socket(&self, key: &SocketKey, socket: &Socket) -> Result<(), NotStored>;
    /// Removes an entry.
    fn remove_socket(&self, key: &SocketKey);
}

/// A table did not take an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotStored;

/// A record was replaced during each attempt to read it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unstable;
