//! Reasons: the named cause of every verdict, each with a counter; and what is counted per service and backend.

use bytemuck::{Pod, Zeroable};

macro_rules! reasons {
    ($($variant:ident = $byte:literal, $name:literal, $text:literal;)+) => {
        /// The reason for a packet's verdict, or an additional incident; index of the per-CPU array `counters`.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        #[repr(u8)]
        pub enum Reason {
            $(#[doc = $text] $variant = $byte,)+
        }

        /// Every reason, in the order of its counter.
        pub const REASONS: &[Reason] = &[$(Reason::$variant,)+];

        impl Reason {
            /// The reason of a byte; `None` for a byte of a later version.
            #[must_use]
            pub const fn from_byte(byte: u8) -> Option<Self> {
                match byte {
                    $($byte => Some(Self::$variant),)+
                    _ => None,
                }
            }

            /// Its name in output.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// What it means, in one sentence.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }
    };
}

reasons! {
    NotIp = 0, "not-ip", "Passed: neither IPv4 nor IPv6.";
    Truncated = 1, "truncated", "Passed: the frame is shorter than its headers.";
    Malformed = 2, "malformed", "Passed: a header is invalid, for example its length.";
    Fragment = 3, "fragment", "Passed: an IP fragment; the first one of its packet was not translated, or has not arrived yet.";
    OtherProtocol = 4, "other-protocol", "Passed: not TCP, UDP or SCTP, and not an ICMP error about a known flow.";
    NotFrontend = 5, "not-frontend", "Passed: the destination is not a frontend.";
    NotReply = 6, "not-reply", "Passed: not a reply of a known flow.";
    Established = 7, "established", "Forwarded: a packet of a known flow.";
    Reply = 8, "reply", "Forwarded: a reply of a known flow.";
    Selected = 9, "selected", "Forwarded: a new connection to a service without affinity.";
    Created = 10, "created", "Forwarded: a new client was pinned.";
    Pinned = 11, "pinned", "Forwarded: a new connection followed its pin.";
    Expired = 12, "expired", "Forwarded: the pin had expired; a pod was selected again.";
    BackendGone = 13, "backend-gone", "Forwarded: the pinned pod is gone; the pin moved.";
    NotReady = 14, "not-ready", "Forwarded: the pinned pod takes no new connections; the pin moved.";
    NotMember = 15, "not-member", "Forwarded: the pinned pod is no longer an endpoint of the service; the pin moved.";
    NoEndpoints = 16, "no-endpoints", "Rejected: the service has no usable endpoint.";
    FlowGone = 17, "flow-gone", "Rejected: the flow's pod is gone; the client should connect again.";
    NotAnswered = 18, "not-answered", "Dropped: cannot be rejected, because an RST or a packet to a group address must not be answered.";
    NoReplyBuilt = 19, "no-reply-built", "Dropped: the RST or ICMP error could not be built.";
    NotRewritten = 20, "not-rewritten", "Dropped: the frame could not be rewritten.";
    FlowNotStored = 21, "flow-not-stored", "Dropped: the flow table has no room for a new connection.";
    SessionNotStored = 22, "session-not-stored", "Incident: a connection was forwarded, but its pin could not be stored.";
    EventLost = 23, "event-lost", "Incident: the event ring was full.";
    Inconsistent = 24, "inconsistent", "Dropped: a slot refers to no member of the pool; this should never happen.";
    OperatorPinned = 25, "operator", "Not a packet: an operator set the pin.";
    OtherProxy = 26, "other-proxy", "Passed: a packet within a connection that another service proxy opened.";
    Shadow = 27, "shadow", "Passed: shadow mode; decided and counted, but not translated.";
    RelatedError = 28, "related-error", "Forwarded: an ICMP error about a known flow.";
    SocketNotStored = 29, "socket-not-stored", "Refused: the socket table has no room for a new connection.";
    NotInRanges = 30, "not-in-ranges", "Dropped: the client is outside of the service's source ranges.";
    NoLocalEndpoints = 31, "no-local-endpoints", "Dropped: no usable endpoint on this node, and the traffic policy is Local.";
    PortsExhausted = 32, "ports-exhausted", "Rejected: the node has no free source port for another connection to the pod.";
    Masqueraded = 33, "masqueraded", "Forwarded: a packet of a known flow leaves with the node's address as its source.";
    Returned = 34, "returned", "Forwarded: a reply to the node's address goes back to its client.";
    LaterFragment = 35, "later-fragment", "Forwarded: a later fragment; the first one of its packet was translated.";
    TableFull = 36, "table-full", "Not a packet: the session table was full, and the kernel evicted pins.";
    Redirected = 37, "redirected", "Forwarded: redirected to the pod or to the client, without this node's network stack.";
    OtherHost = 38, "other-host", "Passed: XDP received a frame for the MAC address of another host.";
    NotOurs = 39, "not-ours", "Passed: a packet to a frontend's address and port that belongs to another connection.";
    PortChanged = 40, "port-changed", "Forwarded: directly to a pod, with another source port, because a connection through a service uses the original one.";
    RejectionLimited = 41, "rejection-limited", "Dropped: this CPU has reached its limit of rejections (--rejections-per-second).";
}

/// What a [`UsageKey`] counts for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u32)]
pub enum UsageOf {
    /// A service id.
    Service = 1,
    /// A backend index.
    Backend = 2,
}

/// Key of the per-CPU hash `usage`. The agent makes the entries; the programs only add to them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct UsageKey {
    /// A [`UsageOf`].
    pub of: u32,
    /// The service id, or the backend's index.
    pub id: u32,
}

/// Value of `usage`, per CPU: how often each of [`USAGES`] happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Usage {
    /// In the order of [`USAGES`]; the rest zero.
    pub counts: [u64; 8],
}

/// The reasons that [`Usage`] counts, by position: adjacent ones. For a backend they count the connections it received.
pub const USAGES: [Reason; 8] = [
    Reason::Selected,
    Reason::Created,
    Reason::Pinned,
    Reason::Expired,
    Reason::BackendGone,
    Reason::NotReady,
    Reason::NotMember,
    Reason::NoEndpoints,
];

/// The position of a reason in [`USAGES`].
#[inline(always)]
#[must_use]
pub fn usage_index(reason: Reason) -> Option<usize> {
    let index = usize::from((reason as u8).wrapping_sub(USAGES[0] as u8));
    (index < USAGES.len()).then_some(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_where_its_byte_says() {
        for (byte, reason) in REASONS.iter().enumerate() {
            assert_eq!(*reason as usize, byte);
            assert_eq!(Reason::from_byte(byte as u8), Some(*reason));
            assert_eq!(usage_index(*reason), USAGES.iter().position(|counted| counted == reason));
        }
    }
}
