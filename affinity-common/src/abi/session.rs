//! Sessions: the pins.

use bytemuck::Zeroable;

use super::{Address, BackendRef};

/// Key of `sessions_v4` and `sessions_v6`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(C, align(8))]
pub struct SessionKey<A: Address> {
    /// The client's address, masked by the service's prefix.
    pub client: A,
    /// A group's id; or a frontend's own scope if it cannot follow the group.
    pub scope: u32,
    /// Zero.
    pub fill: A::Fill,
}

impl<A: Address> SessionKey<A> {
    /// The key of `client` in `scope`.
    #[inline(always)]
    #[must_use]
    pub fn new(scope: u32, client: A, prefix: u8) -> Self {
        Self { client: client.masked(prefix), scope, fill: A::Fill::zeroed() }
    }
}

/// Value of `sessions_v4` and `sessions_v6`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bytemuck::Pod, Zeroable)]
#[repr(C)]
pub struct Session {
    /// When the client was pinned to this backend, monotonic nanoseconds.
    pub created_ns: u64,
    /// When the timer was last restarted, monotonic nanoseconds.
    pub last_used_ns: u64,
    /// The backend.
    pub backend: BackendRef,
    /// The service of the connection that made the pin: listings show its timeout.
    pub service: u32,
    /// The next random number for this pin. Each pin has its own, so that CPUs that re-pin one client at once mostly choose the
    /// same backend and need not follow each other.
    pub draw: u32,
    /// Below [`MOVES`]: live connections with an end that will be seen (TCP, and connected sockets), only under
    /// [`super::Timer::Alive`]. Above: how often the pin has moved, so that the end of a connection to the former backend is
    /// not counted for the current one.
    pub connections: u32,
    /// New connections that used this pin, the first one included; wraps.
    pub uses: u32,
    /// Why the pin was made: a [`super::Reason`].
    pub reason: u8,
    /// Zero.
    pub pad: [u8; 7],
}

/// [`Session::connections`]: one move.
pub const MOVES: u32 = 1 << 24;

/// The packet of the program `correct`: corrects a pin's number of live connections, if nothing has changed meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bytemuck::Pod, Zeroable)]
#[repr(C)]
pub struct Correction {
    /// The client of the pin's key, as [`Address::to_mapped`] gives it.
    pub client: [u8; 16],
    /// The scope of the pin's key.
    pub scope: u32,
    /// 0: the pin is in `sessions_v4`; 1: in `sessions_v6`.
    pub is_v6: u32,
    /// The backend that the pin points to.
    pub backend: BackendRef,
    /// [`Session::connections`] when it was read.
    pub connections: u32,
    /// How many live connections there are.
    pub live: u32,
}

impl Session {
    /// Live connections.
    #[inline(always)]
    #[must_use]
    pub const fn live_connections(&self) -> u32 {
        self.connections % MOVES
    }
}
