//! All records and keys are plain data: any bytes are a valid value, and there is no padding.
#![expect(
    unsafe_code,
    reason = "bytemuck cannot derive Pod for a type with a parameter; see the assertions at the end"
)]

use bytemuck::{Pod, Zeroable};

use super::{
    Address, Backend, Config, Correction, DeviceMac, Edit, Event, Flow, FlowKey, FlowScratch, Foreign, FragmentKey,
    Frontend, FrontendKey, Member, MemberKey, Name, NameKey, Node, RangeKey, Session, SessionKey, Socket, SocketKey,
    Status, Usage, UsageKey, V4, V6, flow,
};

// SAFETY: all fields may be zero.
unsafe impl<A: Address> Zeroable for FrontendKey<A> {}
// SAFETY: as above.
unsafe impl<A: Address> Zeroable for SessionKey<A> {}
// SAFETY: as above.
unsafe impl<A: Address> Zeroable for RangeKey<A> {}
// SAFETY: `repr(C)`, all fields are Pod, and the sizes asserted below leave no room for padding.
unsafe impl<A: Address> Pod for FrontendKey<A> {}
// SAFETY: as above.
unsafe impl<A: Address> Pod for RangeKey<A> {}
// SAFETY: as above.
unsafe impl<A: Address> Pod for FragmentKey<A> {}
// SAFETY: as above.
unsafe impl<A: Address> Pod for SessionKey<A> {}
// SAFETY: as above.
unsafe impl<A: Address> Pod for FlowKey<A> {}
// SAFETY: as above.
unsafe impl<A: Address> Pod for flow::KeyWords<A> {}
// SAFETY: as above.
unsafe impl<A: Address> Pod for Edit<A> {}
// SAFETY: as above.
unsafe impl<A: Address> Pod for Flow<A> {}
// SAFETY: as above.
unsafe impl<A: Address> Pod for FlowScratch<A> {}

/// Sum of the sizes of the fields: equal to the size of the type if and only if it has no padding.
macro_rules! assert_no_padding {
    ($($type:ty: $size:expr),+ $(,)?) => {
        $(const _: () = assert!(size_of::<$type>() == $size, "padding or a size that the kernel would not expect");)+
    };
}

assert_no_padding!(
    FrontendKey<V4>: 4 + 2 + 1 + 1,
    FrontendKey<V6>: 16 + 2 + 1 + 1 + 4,
    Frontend: 8 + 7 * 4 + 4,
    RangeKey<V4>: 4 + 4 + 4,
    RangeKey<V6>: 4 + 4 + 16,
    Node: 16 + 4 + 2 + 2,
    MemberKey: 4 + 4,
    Member: 4 + 2 + 1 + 1,
    Backend: 4 + 4 + 16,
    SessionKey<V4>: 4 + 4,
    SessionKey<V6>: 16 + 4 + 4,
    Session: 8 + 8 + 6 * 4 + 8,
    FlowKey<V4>: 4 + 4 + 2 + 2 + 1 + 1 + 2,
    FlowKey<V6>: 16 + 16 + 2 + 2 + 1 + 1 + 2,
    flow::KeyWords<V4>: 4 + 4 + 4 + 4,
    flow::KeyWords<V6>: 16 + 16 + 4 + 4,
    FragmentKey<V4>: 4 + 4 + 4 + 1 + 1 + 2,
    FragmentKey<V6>: 16 + 16 + 4 + 1 + 1 + 2,
    Edit<V4>: 4 + 4 + 2 + 2 + 2 + 2,
    Edit<V6>: 16 + 16 + 2 + 2 + 2 + 2,
    Flow<V4>: 3 * 8 + 16 + 5 * 4 + 4,
    Flow<V6>: 3 * 8 + 40 + 5 * 4 + 4,
    Foreign: 8 + 4 + 4,
    Correction: 16 + 6 * 4,
    FlowScratch<V4>: 2 * 64 + 4 * 16,
    FlowScratch<V6>: 2 * 88 + 4 * 40,
    SocketKey: 8 + 16 + 2 + 1 + 1 + 4,
    Socket: 3 * 8 + 3 * 16 + 2 + 2 + 5 * 4 + 1 + 7,
    UsageKey: 4 + 4,
    Usage: 8 * 8,
    Event: 8 + 16 + 6 * 4 + 8,
    NameKey: 4 + 4,
    Name: 2 + 318,
    Status: 8 + 8 + 4 + 4,
    Config: 10 * 8,
    DeviceMac: 6 + 6 + 4,
);
