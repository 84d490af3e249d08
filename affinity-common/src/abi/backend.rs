//! Backends: the identity of a pod. Members: a backend in a pool.

use bytemuck::{Pod, Zeroable};

use super::Port;

/// A backend, as records name it: its index in `backends`, and the generation that it had then. All zero: none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct BackendRef {
    /// Index in `backends`.
    pub index: u32,
    /// The backend's generation.
    pub generation: u32,
}

/// Value of `backends`, an array: a pod's address under a generation.
///
/// A record is in use while its generation is odd. Retiring a backend and reusing its index each add one, so a session or flow
/// with an index and an odd generation can never reach another pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Backend {
    /// Odd: in use; even: vacant; zero: never used. The first field, because the agent reads it from all records at once.
    pub generation: u32,
    /// [`BACKEND_LOCAL`], and flags for the agent, which no program reads.
    pub flags: u32,
    /// IPv6, or IPv4-mapped, network byte order.
    pub address: [u8; 16],
}

/// [`Backend::flags`]: the pod runs on this node.
pub const BACKEND_LOCAL: u32 = 1;
/// [`Backend::flags`]: the backend has left every pool. It has no member and no slot, so it gets no new connections, and pins to it
/// are not followed, but its open connections go on.
pub const BACKEND_LINGERING: u32 = 2;
/// [`Backend::flags`]: an EndpointSlice has said that the pod is terminating. Once no slice lists it, it is dead.
pub const BACKEND_TERMINATING: u32 = 4;

/// Key of `members`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct MemberKey {
    /// A pool's id, or a group's if its frontends are [`super::SHARED`].
    pub pool: u32,
    /// Index in `backends`.
    pub backend: u32,
}

/// Value of `members`: whether the backend may serve the pool, and on which port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Member {
    /// The backend's generation.
    pub generation: u32,
    /// The port it serves in this pool; zero under a group's id.
    pub port: Port,
    /// [`MEMBER_READY`] or [`MEMBER_DRAINING`].
    pub state: u8,
    /// Zero.
    pub pad: u8,
}

impl Member {
    /// A backend that takes new connections at a port.
    #[inline(always)]
    #[must_use]
    pub const fn ready(generation: u32, port: Port) -> Self {
        Self { generation, port, state: MEMBER_READY, pad: 0 }
    }
}

/// [`Member::state`]: takes new connections.
pub const MEMBER_READY: u8 = 1;
/// [`Member::state`]: keeps its open connections; takes no new ones, and pins to it are not followed.
pub const MEMBER_DRAINING: u8 = 2;
