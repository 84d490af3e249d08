//! What the pipeline needs of the maps. Two real implementations: BPF maps in the kernel programs, and
//! [`crate::model`]. Lookups of what the agent publishes are by copy; nothing here blocks.

use bytemuck::Pod;

use crate::{
    abi::{
        Address, Backend, Direction, Event, Field, Flow, FlowKey, FlowScratch, Foreign, FragmentKey, Frontend,
        FrontendKey, Member, MemberKey, Node, Reason, Session, SessionKey, Socket, SocketKey, UsageOf, V4, V6,
    },
    parse::Headers,
    pipeline::Opened,
};

/// A record inside a table, found by a lookup. Other processors read and write it at the same time, so it is accessed field by
/// field, as the kernel does with `READ_ONCE` and `WRITE_ONCE`: each access is one load or one store of what the field holds
/// at that moment, and none is left out, repeated or merged with another. A field that is longer than eight bytes is accessed
/// word by word.
pub trait Entry<V: Pod> {
    /// A copy of the record, word by word.
    fn get(&self) -> V;
    /// What a field holds now.
    fn read<F: Pod>(&self, field: Field<V, F>) -> F;
    /// Changes a field.
    fn write<F: Pod>(&self, field: Field<V, F>, value: F);
    /// Adds bits to a field, in one step, and returns what was there before.
    fn add_bits(&self, field: Field<V, u32>, bits: u32) -> u32;
}

/// A pin inside a table, where another processor may be moving it at the same time: see [`crate::session`].
pub trait Pin: Entry<Session> {
    /// What decides about the pin: its backend with that one's generation, its times, its connections and the number it
    /// draws next, as they were together at one moment. The other fields are zero.
    fn snapshot(&self) -> Session;
    /// Points the pin from one backend and its generation to another, in one step; false, and no change, where it does
    /// not point there.
    fn cas_backend(&self, from: (u32, u32), to: (u32, u32)) -> bool;
    /// The backend and its generation that the pin points to.
    fn backend(&self) -> (u32, u32);
    /// [`Session::connections`]; where [`Pin::backend`] comes after it, that is not older.
    fn connections(&self) -> u32;
    /// Replaces [`Session::connections`], in one step; false, and no change, where it is not `from`.
    fn swap_connections(&self, from: u32, to: u32) -> bool;
}

/// The tables that both families share, the clock, and randomness.
pub trait Tables {
    /// A value found in a table.
    type Entry<V: Pod>: Entry<V>;
    /// A session found in a table.
    type Pin: Pin;

    /// Monotonic time in nanoseconds, as coarse as a jiffy.
    fn now_ns(&self) -> u64;
    /// A random number.
    fn random(&self) -> u32;
    /// Whether a bit is set in the part of the filter that packets of `direction` consult.
    fn filter(&self, direction: Direction, bit: u32) -> bool;
    /// Sets a bit in that part.
    fn mark(&self, direction: Direction, bit: u32);
    /// What masquerading uses.
    fn node(&self) -> Option<Node>;
    /// Whether what comes in by a device has come in by one below it before, a port of a bridge for example, whose programs
    /// have seen it.
    fn is_above_another(&self, ifindex: u32) -> bool;
    /// The position in the range of SNAT ports for connections to a backend; the next call gets the next one.
    fn next_snat_port(&self, backend: u32) -> u64;
    /// The backend index in a slot.
    fn slot(&self, index: u32) -> Option<u32>;
    /// A backend's record.
    fn backend(&self, index: u32) -> Option<Backend>;
    /// A member's record.
    fn member(&self, key: &MemberKey) -> Option<Member>;
    /// Whether a member's record is this one: cheaper than [`Tables::member`] where it is.
    fn is_member(&self, key: &MemberKey, record: &Member) -> bool {
        self.member(key) == Some(*record)
    }
    /// Works with a frontend's record in the processor's own memory, because a program's stack has no room for it; `None` where
    /// there is none, which the kernel rules out. For packets alone: they do not interrupt each other.
    fn frontend_scratch<R>(&self, work: impl FnOnce(&mut Frontend) -> R) -> Option<R>;
    /// Live sessions of a backend, as far as known: zero where more were counted off than on.
    fn load(&self, backend: u32) -> u64;
    /// Adds to the live sessions of a backend.
    fn add_load(&self, backend: u32, sessions: i64);
    /// Whether one more packet may be rejected now, which is then counted in the processor's [`crate::reject::Bucket`].
    fn may_reject(&self) -> bool;
    /// Counts a reason.
    fn count(&self, reason: Reason);
    /// Counts the reason of a packet's verdict, once a packet.
    #[inline(always)]
    fn conclude(&self, reason: Reason) {
        self.count(reason);
    }
    /// Counts a new connection of a service or backend.
    fn count_usage(&self, of: UsageOf, id: u32, reason: Reason);
    /// Reports a state change, which is put together in the ring, because a program's stack has no room for it; counts
    /// [`Reason::EventLost`] where there is none.
    fn report(&self, event: impl FnOnce() -> Event);
}

/// The tables of one family.
pub trait FamilyTables<A: Address>: Tables {
    /// Opens a new connection: [`crate::pipeline::open`], as a global function of the kernel programs.
    fn open(&self, headers: &Headers<A>) -> Opened;
    /// Notes what changes of a flow: [`crate::flow::note_change`], as a global function of the kernel programs.
    fn note_change(&self, headers: &Headers<A>);
    /// Notes a packet of another connection: [`crate::foreign::note_leaving`], as such a function.
    fn note_leaving(&self, headers: &Headers<A>);
    /// Whether a key for replies is to be had: [`crate::snat::is_free`], as such a function.
    fn is_free(&self, replies: &FlowKey<A>) -> bool;
    /// A copy of a frontend's record, whole.
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
    /// [`NotStored`] where another was first, or where the kernel has no room.
    fn add_session(&self, key: &SessionKey<A>, session: &Session) -> Result<(), NotStored>;
    /// A flow.
    fn flow(&self, key: &FlowKey<A>) -> Option<Self::Entry<Flow<A>>>;
    /// Stores a flow, in place of any under its key.
    ///
    /// # Errors
    /// [`NotStored`] where the kernel has no room.
    fn put_flow(&self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), NotStored>;
    /// Stores a flow if there is none under its key.
    ///
    /// # Errors
    /// [`NotStored`] where there is one, or where the kernel has no room.
    fn add_flow(&self, key: &FlowKey<A>, flow: &Flow<A>) -> Result<(), NotStored>;
    /// Removes a flow, if it is there.
    fn remove_flow(&self, key: &FlowKey<A>);
    /// A connection to no frontend, by the key of its replies.
    fn foreign(&self, replies: &FlowKey<A>) -> Option<Self::Entry<Foreign>>;
    /// Stores a connection to no frontend, in place of any under its key; where there is no room it stays unknown.
    fn put_foreign(&self, replies: &FlowKey<A>, foreign: &Foreign);
    /// Works something out in the processor's own memory; `None` where there is none, which the kernel rules out.
    fn flow_scratch<R>(&self, work: impl FnOnce(&mut FlowScratch<A>) -> R) -> Option<R>;
    /// The flow of a packet that came in pieces.
    fn fragment(&self, key: &FragmentKey<A>) -> Option<FlowKey<A>>;
    /// Remembers a packet that comes in pieces; where there is no room, its later pieces pass as they are.
    fn put_fragment(&self, key: &FragmentKey<A>, flow: &FlowKey<A>);
}

/// The table of sockets, and all that a socket's call consults.
pub trait SocketTables: FamilyTables<V4> + FamilyTables<V6> {
    /// The cookie of the node's network namespace.
    fn node_netns(&self) -> u64;
    /// A socket's entry.
    fn socket(&self, key: &SocketKey) -> Option<Self::Entry<Socket>>;
    /// Stores an entry, in place of any under its key.
    ///
    /// # Errors
    /// [`NotStored`] where the kernel has no room.
    fn put_socket(&self, key: &SocketKey, socket: &Socket) -> Result<(), NotStored>;
    /// Removes an entry.
    fn remove_socket(&self, key: &SocketKey);
}

/// A table did not take an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotStored;

/// A record was replaced each time that it was read, so what it holds is not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unstable;
