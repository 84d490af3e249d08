//! The fields of records that several CPUs read and write concurrently.

use core::marker::PhantomData;

use bytemuck::Pod;

use super::{Address, Backend, Edit, Flow, Foreign, Port, Session, Socket, V6};

/// The offset of a field of type `F` in a record `V`.
#[derive(Debug)]
pub struct Field<V, F> {
    offset: usize,
    types: PhantomData<fn(V) -> F>,
}

impl<V, F> Clone for Field<V, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V, F> Copy for Field<V, F> {}

impl<V: Pod, F: Pod> Field<V, F> {
    /// The field at `offset`. Any bytes there are a valid `F`, because both are plain data.
    ///
    /// # Panics
    /// If the offset is not aligned or not within the record; for a constant, at compile time.
    #[must_use]
    pub const fn new(offset: usize) -> Self {
        assert!(offset + size_of::<F>() <= size_of::<V>() && offset.is_multiple_of(align_of::<F>()));
        assert!(align_of::<F>() <= align_of::<V>());
        Self { offset, types: PhantomData }
    }

    /// The offset in bytes.
    #[inline(always)]
    #[must_use]
    pub const fn offset(self) -> usize {
        self.offset
    }

    /// The field of a copy of the record.
    #[must_use]
    pub fn of(self, record: &V) -> F {
        bytemuck::pod_read_unaligned(&bytemuck::bytes_of(record)[self.offset..][..size_of::<F>()])
    }

    /// Sets the field of a copy of the record.
    pub fn set(self, record: &mut V, value: &F) {
        bytemuck::bytes_of_mut(record)[self.offset..][..size_of::<F>()].copy_from_slice(bytemuck::bytes_of(value));
    }
}

/// Names fields of a record as constants of its type: `fields!(Session { LAST_USED_NS = last_used_ns: u64 })`.
#[macro_export]
macro_rules! fields {
    ($record:ty $(where $parameter:ident: $bound:ident)? { $($name:ident = $($field:ident).+: $of:ty),+ $(,)? }) => {
        impl $(<$parameter: $bound>)? $record {
            $(
                #[doc = concat!("`", stringify!($($field).+), "`, where several processors read and write it.")]
                pub const $name: $crate::abi::Field<Self, $of> = {
                    // Does not compile unless the field is of that type.
                    let _: fn(&Self) -> &$of = |record| &record.$($field).+;
                    $crate::abi::Field::new(::core::mem::offset_of!($record, $($field).+))
                };
            )+
        }
    };
}

fields!(Session {
    CREATED_NS = created_ns: u64,
    LAST_USED_NS = last_used_ns: u64,
    BACKEND = backend.index: u32,
    GENERATION = backend.generation: u32,
    SERVICE = service: u32,
    DRAW = draw: u32,
    CONNECTIONS = connections: u32,
    USES = uses: u32,
    REASON = reason: u8,
});

fields!(Flow<A> where A: Address {
    CREATED_NS = created_ns: u64,
    LAST_USED_NS = last_used_ns: u64,
    SEGMENT = segment: u64,
    EDIT = edit: Edit<A>,
    NEW_DADDR = edit.daddr: A,
    NEW_DPORT = edit.dport: Port,
    BACKEND = backend.index: u32,
    GENERATION = backend.generation: u32,
    POOL = pool: u32,
    SCOPE = scope: u32,
    TIMEOUT_S = timeout_s: u32,
    STATE = state: u8,
    TIMER = timer: u8,
    PREFIX = prefix: u8,
    FLAGS = flags: u8,
});

impl<A: Address> Flow<A> {
    /// The word that begins with [`Flow::state`], because bits can only be added to a whole word.
    pub const STATE_WORD: Field<Self, u32> = Field::new(core::mem::offset_of!(Self, state));
}

fields!(Backend {
    GENERATION = generation: u32,
});

fields!(Foreign {
    LAST_SENT_NS = last_sent_ns: u64,
    STATE = state: u32,
});

fields!(Socket {
    CREATED_NS = created_ns: u64,
    LAST_USED_NS = last_used_ns: u64,
    TIMEOUT_NS = timeout_ns: u64,
    CLIENT = client: V6,
    FRONTEND = frontend: V6,
    PEER = peer: V6,
    FRONTEND_PORT = frontend_port: Port,
    PEER_PORT = peer_port: Port,
    BACKEND = backend.index: u32,
    GENERATION = backend.generation: u32,
    POOL = pool: u32,
    SCOPE = scope: u32,
    TIMER = timer: u8,
});

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

    use super::*;
    use crate::abi::V4;

    #[test]
    fn a_field_is_where_the_record_has_it() {
        let mut flow = Flow::<V4>::zeroed();
        Flow::STATE.set(&mut flow, &7);
        Flow::NEW_DADDR.set(&mut flow, &V4([10, 0, 0, 1]));
        assert_eq!(flow, Flow { state: 7, edit: Edit { daddr: V4([10, 0, 0, 1]), ..flow.edit }, ..Flow::zeroed() });
        assert_eq!((Flow::STATE.of(&flow), Flow::EDIT.of(&flow)), (7, flow.edit));
        assert_eq!(Flow::STATE_WORD.of(&flow), u32::from_ne_bytes([7, 0, 0, 0]));
    }
}
