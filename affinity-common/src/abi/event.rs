//! Events: state changes of sessions, never packets.

use bytemuck::{Pod, Zeroable};

use super::BackendRef;

/// A record of the `events` ring buffer. With the ring's own header of eight bytes it is 64 bytes long, so records never
/// straddle the ring's end and a reader may walk back from the newest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Event {
    /// Monotonic nanoseconds.
    pub time_ns: u64,
    /// The client key: IPv6, or IPv4-mapped, network byte order.
    pub client: [u8; 16],
    /// The service of the packet that caused it.
    pub service: u32,
    /// The session's scope.
    pub scope: u32,
    /// The backend it was pinned to; meaningful for `moved`, `expired` and `evicted`.
    pub from: BackendRef,
    /// The backend it is pinned to now; meaningful for `created`, `moved` and `expired` seen by a packet.
    pub to: BackendRef,
    /// An [`EventKind`].
    pub kind: u8,
    /// Why: a [`super::Reason`].
    pub reason: u8,
    /// Zero.
    pub pad: [u8; 6],
}

/// What happened to a session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum EventKind {
    /// A client was pinned.
    Created = 1,
    /// A pin went to another backend because its own could not be used.
    Moved = 2,
    /// A pin's timeout had passed.
    Expired = 3,
    /// The table was full and the kernel dropped pins; the index of `from` is the number, reported by the agent.
    Evicted = 4,
    /// An operator removed a pin.
    Unpinned = 5,
    /// An operator set a pin.
    Pinned = 6,
}

impl EventKind {
    /// The kind of a record; `None` for a byte of a later version.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Created,
            2 => Self::Moved,
            3 => Self::Expired,
            4 => Self::Evicted,
            5 => Self::Unpinned,
            6 => Self::Pinned,
            _ => return None,
        })
    }

    /// Its name in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Moved => "moved",
            Self::Expired => "expired",
            Self::Evicted => "evicted",
            Self::Unpinned => "unpinned",
            Self::Pinned => "pinned",
        }
    }
}
