//! The state of a flow: a set of bits, which packets only add to.
//!
//! | packet | sender | adds | in RFC 9293, figure 5 |
//! |---|---|---|---|
//! | SYN | client | nothing: the flow is half-open | SYN-SENT |
//! | any but RST | server | [`FLOW_ANSWERED`] | SYN-RECEIVED |
//! | ACK without SYN, once answered | client | [`FLOW_OPEN`] | ESTABLISHED |
//! | FIN | either | [`FLOW_FIN_CLIENT`] or [`FLOW_FIN_SERVER`] | FIN-WAIT, CLOSE-WAIT |
//! | FIN | the other one | the other bit: the flow is closed | CLOSING, LAST-ACK, TIME-WAIT |
//! | RST that its receiver would accept | either | [`FLOW_RESET`]: closed | CLOSED |
//! | datagram | server | [`FLOW_ANSWERED`] and [`FLOW_OPEN`] | |
//!
//! Bits are only added, by an atomic operation that returns the bits before. So two CPUs that handle two packets at once lose
//! neither, in any order.
//!
//! In shadow mode no packet of the server is seen ([`FLOW_SHADOW`]): only the client's packets decide.

use crate::{
    abi::{FLOW_ANSWERED, FLOW_FIN_CLIENT, FLOW_FIN_SERVER, FLOW_OPEN, FLOW_RESET, FLOW_SHADOW},
    headers::Segment,
    headers::{ACK, FIN, RST, SYN, UDP},
};

/// The phase of a flow. The agent's sweep decides how long a flow may be idle in each.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// The client has sent SYN; the handshake is not complete.
    HalfOpen,
    /// The handshake is complete.
    Open,
    /// One side has sent FIN; the other one may go on.
    Closing,
    /// Both sides have sent FIN, or one has sent RST. Late segments are still delivered.
    Closed,
    /// Datagrams of the client without an answer.
    Unanswered,
    /// Datagrams in both directions.
    Answered,
}

impl Phase {
    /// The phase of a flow of this protocol.
    #[inline(always)]
    #[must_use]
    pub const fn of(protocol: u8, state: u8) -> Self {
        if protocol == UDP {
            if state & FLOW_ANSWERED == 0 { Self::Unanswered } else { Self::Answered }
        } else if is_closed(state) {
            Self::Closed
        } else if state & (FLOW_FIN_CLIENT | FLOW_FIN_SERVER) != 0 {
            Self::Closing
        } else if state & FLOW_OPEN != 0 {
            Self::Open
        } else {
            Self::HalfOpen
        }
    }
}

/// Whether a connection is over.
#[inline(always)]
#[must_use]
pub const fn is_closed(state: u8) -> bool {
    let has_server_end = state & (FLOW_FIN_SERVER | FLOW_SHADOW) != 0;
    state & FLOW_RESET != 0 || state & FLOW_FIN_CLIENT != 0 && has_server_end
}

/// Whether either side has ended a connection.
#[inline(always)]
#[must_use]
pub const fn is_ending(state: u8) -> bool {
    state & (FLOW_FIN_CLIENT | FLOW_FIN_SERVER | FLOW_RESET) != 0
}

/// Whether the handshake is not complete, and neither side has ended it.
#[inline(always)]
#[must_use]
pub const fn is_half_open(state: u8) -> bool {
    state & (FLOW_OPEN | FLOW_RESET) == 0 && !is_closed(state)
}

/// Whether the connection counts for the timer `alive`: it has opened and has not closed.
#[inline(always)]
#[must_use]
pub const fn is_live(state: u8) -> bool {
    state & FLOW_OPEN != 0 && !is_closed(state)
}

/// The bits that a packet adds to the state of its flow. RST adds none here: see [`accepts_reset`].
#[inline(always)]
#[must_use]
pub const fn added(state: u8, is_from_client: bool, protocol: u8, flags: u8) -> u8 {
    if flags & RST != 0 {
        return 0;
    }
    let answer = if is_from_client {
        let is_answered = state & (FLOW_ANSWERED | FLOW_SHADOW) != 0;
        if is_answered && flags & (SYN | ACK) == ACK { FLOW_OPEN } else { 0 }
    } else if protocol == UDP {
        FLOW_ANSWERED | FLOW_OPEN
    } else {
        FLOW_ANSWERED
    };
    let end = if flags & FIN == 0 {
        0
    } else if is_from_client {
        FLOW_FIN_CLIENT
    } else {
        FLOW_FIN_SERVER
    };
    answer | end
}

/// The state of a flow that begins with this packet of the client. If the packet does not open a connection, it belongs to an
/// open one whose handshake was not seen.
#[inline(always)]
#[must_use]
pub const fn first(protocol: u8, flags: u8) -> u8 {
    if protocol == UDP || flags & (SYN | ACK) == SYN {
        0
    } else if flags & RST != 0 {
        FLOW_RESET
    } else {
        FLOW_ANSWERED | FLOW_OPEN | added(FLOW_ANSWERED, true, protocol, flags)
    }
}

/// The sequence number.
#[inline(always)]
const fn sequence(segment: Segment) -> u32 {
    let [a, b, c, d, ..] = segment.to_ne_bytes();
    u32::from_be_bytes([a, b, c, d])
}

/// The acknowledgment number.
#[inline(always)]
const fn acknowledged(segment: Segment) -> u32 {
    let [.., a, b, c, d] = segment.to_ne_bytes();
    u32::from_be_bytes([a, b, c, d])
}

/// Bytes that a sender may have sent after its last segment that was seen: one segment, whose length is not known.
const UNSEEN: u32 = 1 << 16;
/// The limit for bytes in flight, so that a forged segment does not prepare a forged RST.
const IN_FLIGHT: i32 = 1 << 22;

/// Whether the receiver of an RST would accept it: its sequence number lies between what the receiver has acknowledged and what
/// the sender has sent (RFC 9293, section 3.10.7.4). RFC 5961, section 3.2, requires exactly the first of these numbers, which
/// is known here only if the last acknowledgment has passed. `sender` is the last other segment of the side that resets,
/// `receiver` the last one of the other side.
#[inline(always)]
#[must_use]
pub const fn accepts_reset(reset: Segment, sender: Segment, receiver: Segment) -> bool {
    let expected = acknowledged(receiver);
    let in_flight = sequence(sender).wrapping_sub(expected) as i32;
    let in_flight = if in_flight < 0 {
        0
    } else if in_flight > IN_FLIGHT {
        IN_FLIGHT
    } else {
        in_flight
    };
    sequence(reset).wrapping_sub(expected) <= in_flight as u32 + UNSEEN
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::headers::TCP;

    const CLIENT: bool = true;
    const SERVER: bool = false;

    /// The phase after these packets, each by its sender and flags. The first one begins the flow.
    fn phase(protocol: u8, packets: &[(bool, u8)]) -> Phase {
        let [(CLIENT, begins), rest @ ..] = packets else { panic!("the client begins") };
        let state = rest.iter().fold(first(protocol, *begins), |state, &(is_from_client, flags)| {
            state | if flags & RST == 0 { added(state, is_from_client, protocol, flags) } else { FLOW_RESET }
        });
        Phase::of(protocol, state)
    }

    /// RFC 9293, figure 5, as a middlebox sees it: each row is a packet and the phase after it.
    #[test]
    fn the_states_of_a_connection_are_those_of_tcp() {
        let opened = [(CLIENT, SYN), (SERVER, SYN | ACK), (CLIENT, ACK)];
        for (row, packets, is) in [
            ("SYN-SENT", [].as_slice(), Phase::Open),
            ("data", &[(SERVER, ACK), (CLIENT, ACK)], Phase::Open),
            ("SYN-ACK sent again", &[(SERVER, SYN | ACK)], Phase::Open),
            ("CLOSE-WAIT: the client has closed", &[(CLIENT, FIN | ACK)], Phase::Closing),
            ("data of the half that is open", &[(CLIENT, FIN | ACK), (SERVER, ACK), (SERVER, ACK)], Phase::Closing),
            ("FIN sent again", &[(CLIENT, FIN | ACK), (CLIENT, FIN | ACK)], Phase::Closing),
            ("FIN-WAIT: the server has closed", &[(SERVER, FIN | ACK)], Phase::Closing),
            ("LAST-ACK", &[(CLIENT, FIN | ACK), (SERVER, FIN | ACK)], Phase::Closed),
            ("CLOSING: both at once", &[(SERVER, FIN | ACK), (CLIENT, FIN | ACK)], Phase::Closed),
            ("TIME-WAIT", &[(CLIENT, FIN | ACK), (SERVER, FIN | ACK), (CLIENT, ACK)], Phase::Closed),
            ("RST of the client", &[(CLIENT, RST)], Phase::Closed),
            ("RST of the server", &[(SERVER, RST | ACK)], Phase::Closed),
        ] {
            assert_eq!(phase(TCP, &[&opened, packets].concat()), is, "{row}");
        }
    }

    #[test]
    fn a_connection_is_half_open_until_the_client_has_answered_the_server() {
        for packets in [
            [(CLIENT, SYN)].as_slice(),
            &[(CLIENT, SYN), (CLIENT, SYN)],
            &[(CLIENT, SYN), (SERVER, SYN | ACK)],
            &[(CLIENT, SYN), (SERVER, SYN | ACK), (SERVER, SYN | ACK)],
            &[(CLIENT, SYN), (CLIENT, ACK)],
        ] {
            assert_eq!(phase(TCP, packets), Phase::HalfOpen, "{packets:?}");
        }
        assert_eq!(phase(TCP, &[(CLIENT, SYN), (SERVER, RST | ACK)]), Phase::Closed, "refused");
    }

    #[test]
    fn a_connection_whose_beginning_was_not_seen_is_open() {
        assert_eq!(phase(TCP, &[(CLIENT, ACK)]), Phase::Open);
        assert_eq!(phase(TCP, &[(CLIENT, FIN | ACK)]), Phase::Closing);
        assert_eq!(phase(TCP, &[(CLIENT, RST)]), Phase::Closed);
    }

    #[test]
    fn datagrams_are_answered_or_not() {
        assert_eq!(phase(UDP, &[(CLIENT, 0), (CLIENT, 0)]), Phase::Unanswered);
        assert_eq!(phase(UDP, &[(CLIENT, 0), (SERVER, 0)]), Phase::Answered);
    }

    #[test]
    fn in_shadow_mode_the_client_alone_decides() {
        let by_client = |state: u8, flags| state | added(state, CLIENT, TCP, flags);
        let opened = by_client(FLOW_SHADOW, ACK);
        assert_eq!(Phase::of(TCP, opened), Phase::Open);
        assert_eq!(Phase::of(TCP, by_client(opened, FIN | ACK)), Phase::Closed);
    }

    /// Two CPUs may add what they see in any order: the result is the same.
    #[test]
    fn the_order_of_added_state_bits_is_irrelevant() {
        for state in 0..=u8::MAX {
            for (one, other) in [(FIN | ACK, FIN | ACK), (ACK, FIN | ACK), (FIN | ACK, ACK)] {
                let (client, server) = (added(state, CLIENT, TCP, one), added(state, SERVER, TCP, other));
                let together = state | client | server;
                assert_eq!(
                    together & !FLOW_OPEN,
                    (state | client | added(state | client, SERVER, TCP, other)) & !FLOW_OPEN
                );
                assert_eq!(is_closed(together), is_closed(state | server | client));
            }
        }
    }

    fn segment(sequence: u32, acknowledged: u32) -> Segment {
        let ([a, b, c, d], [e, f, g, h]) = (sequence.to_be_bytes(), acknowledged.to_be_bytes());
        Segment::from_ne_bytes([a, b, c, d, e, f, g, h])
    }

    #[test]
    fn a_reset_counts_within_what_is_in_flight() {
        for base in [5_000_000_u32, u32::MAX - 500, 3] {
            let at = |offset: u32| base.wrapping_add(offset);
            // The receiver has acknowledged up to `base`; the sender's last segment began 3,000 bytes after that.
            let accepts = |sequence| accepts_reset(segment(sequence, 0), segment(at(3_000), 0), segment(77, base));
            assert!(accepts(base), "exactly what is expected");
            assert!(accepts(at(3_000)) && accepts(at(3_000 + UNSEEN)));
            assert!(!accepts(at(3_000 + UNSEEN + 1)));
            assert!(!accepts(base.wrapping_sub(1)) && !accepts(at(1 << 31)));
        }
    }

    #[test]
    fn a_forged_segment_makes_no_room_for_a_forged_reset() {
        let forged = segment(0x7000_0000, 0);
        assert!(!accepts_reset(segment(0x6fff_0000, 0), forged, segment(0, 0)));
    }
}
