//! One frame through the pipeline, and the properties of every passage.

use affinity_common::{
    abi::{
        BackendRef, COEXIST, Direction, Frontend, FrontendKey, MEMBER_READY, MemberKey, Port, Reason, SHADOW, V4, V6,
    },
    model::Model,
    pipeline::{self, Verdict},
};

use crate::{
    frame::{ACK, FIN, ICMP, ICMPV6, RST, Reading, SYN, TCP, UDP, header_error, network_places, read},
    pins::Pins,
};

/// A frame before and after, and the result.
#[derive(Debug)]
pub(crate) struct Passage {
    pub(crate) before: Vec<u8>,
    pub(crate) after: Vec<u8>,
    pub(crate) verdict: Verdict,
    pub(crate) reason: Reason,
}

impl Passage {
    /// Sends a frame through the pipeline, and checks the result.
    pub(crate) fn new(model: &Model, direction: Direction, frame: &[u8]) -> Self {
        let counters = model.counters.borrow().clone();
        let pins_before = pins_of(model, frame);
        let mut after = frame.to_vec();
        let verdict = match direction {
            Direction::Dnat | Direction::RevSnat => pipeline::forward(&mut after, model),
            Direction::RevDnat | Direction::Snat => pipeline::reverse(&mut after, model),
        };
        // No pod is on this node, and the hook's action for that is not tested here.
        let verdict = if verdict == Verdict::Redirect { Verdict::Forward } else { verdict };
        let counted = model.counters.borrow();
        let grown: Vec<_> =
            counted.iter().filter(|(reason, count)| counters.get(reason) != Some(count)).map(|(r, _)| *r).collect();
        let [reason] = grown[..] else { panic!("one packet has one reason, not {grown:?}") };
        assert_eq!(counted.values().sum::<u64>(), counters.values().sum::<u64>() + 1);

        let passage = Self { before: frame.to_vec(), after, verdict, reason };
        match verdict {
            Verdict::Pass => assert_eq!(passage.after, passage.before, "a frame that passes stays as it is"),
            Verdict::Drop => assert!(is_dropped(reason), "{reason:?}"),
            Verdict::Forward if reason == Reason::RelatedError => passage.judge_error(),
            Verdict::Forward if reason == Reason::LaterFragment => passage.judge_fragment(),
            Verdict::Forward | Verdict::Redirect => passage.judge_translation(),
            Verdict::Answer => passage.judge_answer(),
        }
        if direction == Direction::Dnat {
            passage.judge_destination(model, pins_before);
        }
        passage
    }

    /// The frame's plain reading before its passage. Only packets with a transport header are ever translated here.
    pub(crate) fn reading(&self) -> Reading {
        read(&self.before).expect("only a whole packet is touched")
    }

    /// Only addresses, ports and checksums have changed, and the error of each checksum is the same as before.
    fn judge_translation(&self) {
        let before = self.reading();
        let after = read(&self.after).expect("a translated frame is as whole as before");
        assert_eq!(after.network_error(&self.after), before.network_error(&self.before), "network checksum");
        let checksum = before.checksum_at()..before.checksum_at() + 2;
        if before.protocol == UDP && self.before[checksum.clone()] == [0, 0] {
            assert_eq!(self.after[checksum.clone()], [0, 0], "no UDP checksum stays none");
        } else {
            let length = before.end - before.l4;
            let (was, is) = (before.transport_error(&self.before, length), after.transport_error(&self.after, length));
            assert_eq!(is, was, "transport checksum");
            assert!(before.protocol != UDP || self.after[checksum.clone()] != [0, 0], "a UDP checksum is not lost");
        }
        let mut restored = self.after.clone();
        let network_checksum = if before.is_v6 { 0..0 } else { before.l3 + 10..before.l3 + 12 };
        for place in before.places().into_iter().chain([checksum, network_checksum]) {
            restored[place.clone()].copy_from_slice(&self.before[place]);
        }
        assert_eq!(restored, self.before, "nothing else changes");
    }

    /// Only addresses have changed, and the error of the IPv4 header's checksum is the same as before.
    fn judge_fragment(&self) {
        let places = network_places(&self.before).expect("only an IP packet is touched");
        assert_eq!(header_error(&self.after), header_error(&self.before), "network checksum");
        let mut restored = self.after.clone();
        for place in places {
            restored[place.clone()].copy_from_slice(&self.before[place]);
        }
        assert_eq!(restored, self.before, "nothing else changes");
    }

    /// Only addresses and checksums of the error have changed, and addresses, ports and checksums of the quoted packet. The
    /// checksums of the ICMP message are off by as much as before.
    fn judge_error(&self) {
        let before = self.reading();
        let after = read(&self.after).expect("a translated error is as whole as before");
        assert!(matches!(before.protocol, ICMP | ICMPV6));
        assert_eq!(after.network_error(&self.after), before.network_error(&self.before), "network checksum");
        let length = before.end - before.l4;
        let (was, is) = (before.transport_error(&self.before, length), after.transport_error(&self.after, length));
        assert_eq!(is, was, "the error's checksum");

        let mut restored = self.after.clone();
        let [source, destination, _] = before.places();
        let quote = before.l4 + 8;
        let mut changeable = vec![source, destination, before.checksum_at()..before.checksum_at() + 2];
        if before.is_v6 {
            changeable.push(quote + 8..quote + 40);
        } else {
            changeable.extend([before.l3 + 10..before.l3 + 12, quote + 10..quote + 20]);
        }
        for place in changeable {
            restored[place.clone()].copy_from_slice(&self.before[place]);
        }
        let differing: Vec<_> = (0..restored.len()).filter(|at| restored[*at] != self.before[*at]).collect();
        let span = differing.last().map_or(0, |last| last - differing[0]);
        assert!(span < 18 && differing.len() <= 6, "ports and a checksum of TCP or UDP, no more: {differing:?}");
    }

    /// A rejection goes back where the frame came from, is complete and correct, and does not answer a rejection.
    fn judge_answer(&self) {
        let before = self.reading();
        let after = read(&self.after).expect("an answer is a whole packet");
        assert_eq!(self.after[..6], self.before[6..12], "to the sender's link address");
        assert_eq!(self.after[6..12], self.before[..6], "from the frame's destination");
        assert_eq!(self.after[12..after.l3], self.before[12..before.l3], "in its VLAN");
        let [source, destination] = &before.addresses;
        assert_eq!([&after.addresses[1], &after.addresses[0]], [source, destination]);
        assert_eq!(after.end, self.after.len());
        assert_eq!(after.network_error(&self.after), 0);
        assert_eq!(after.transport_error(&self.after, after.end - after.l4), 0);
        if before.protocol == TCP {
            assert_eq!((after.protocol, after.ports), (TCP, [before.ports[1], before.ports[0]]));
            self.judge_reset(&before, after.l4);
        } else {
            let quote = after.l4 + 8 + if after.is_v6 { 40 } else { 20 };
            assert_eq!(after.protocol, if after.is_v6 { ICMPV6 } else { ICMP });
            assert_eq!(self.after[quote..], self.before[before.l4..before.l4 + 8], "it quotes what it refuses");
        }
    }

    /// A reset as in RFC 9293, section 3.10.7.1.
    fn judge_reset(&self, before: &Reading, l4: usize) {
        let number = |frame: &[u8], at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().expect("four bytes"));
        let flags = self.before[before.l4 + 13];
        assert_eq!(flags & RST, 0, "a reset is not answered");
        let (sequence, acknowledged) = (number(&self.after, l4 + 4), number(&self.after, l4 + 8));
        if flags & ACK != 0 {
            assert_eq!((self.after[l4 + 13], sequence), (RST, number(&self.before, before.l4 + 8)));
        } else {
            assert_eq!((self.after[l4 + 13], sequence), (RST | ACK, 0));
            let data = before.l4 + usize::from(self.before[before.l4 + 12] >> 4) * 4;
            let occupied =
                before.end.saturating_sub(data) + usize::from(flags & SYN != 0) + usize::from(flags & FIN != 0);
            let expected = number(&self.before, before.l4 + 4).wrapping_add(occupied as u32);
            assert!(!before.is_complete || acknowledged == expected, "{acknowledged}, not {expected}");
        }
    }

    /// Only packets to frontends are touched, and all of them except those of another proxy. They reach existing pods, and new
    /// connections only ready ones.
    fn judge_destination(&self, model: &Model, pins_before: Option<Pins>) {
        let frontend = read(&self.before).and_then(|reading| frontend_of(model, &reading));
        let is_ours = frontend.is_some_and(|frontend| frontend.flags & SHADOW == 0);
        if self.reason == Reason::NotOurs {
            assert_eq!(self.verdict, Verdict::Pass);
            return;
        }
        if self.reason == Reason::OtherProxy {
            let flags = self.before[self.reading().l4 + 13];
            assert_eq!(self.verdict, Verdict::Pass);
            assert!(frontend.is_some_and(|frontend| frontend.flags & (COEXIST | SHADOW) != 0));
            assert_ne!(flags & (SYN | ACK), SYN, "who opens a connection is served");
        } else {
            let is_related = matches!(self.reason, Reason::RelatedError | Reason::LaterFragment | Reason::PortChanged);
            let is_touched = self.verdict != Verdict::Pass && !is_related;
            assert_eq!(
                is_ours, is_touched,
                "packets to our frontends are touched, and no others but errors and fragments"
            );
        }
        if matches!(self.reason, Reason::RelatedError | Reason::LaterFragment) {
            return;
        }
        let (Some(frontend), Verdict::Forward) = (frontend, self.verdict) else { return };
        let before = self.reading();
        let after = read(&self.after).expect("a translated frame is as whole as before");
        assert_eq!((&after.addresses[0], after.ports[0]), (&before.addresses[0], before.ports[0]), "from the client");
        let backend = model.backends.iter().find(|(_, backend)| backend.address.ends_with(&after.addresses[1]));
        let (index, backend) = backend.expect("a frontend's packets go to its pods");
        assert_eq!(backend.generation % 2, 1, "the pod is gone");
        if self.reason == Reason::Established {
            if before.protocol == TCP {
                return;
            }
        } else if let (Some(pins), Some(after)) = (pins_before, pins_of(model, &self.before)) {
            pins.judge(&after, self.reason, BackendRef { index: *index, generation: backend.generation });
        }
        let member = model.members.get(&MemberKey { pool: frontend.pool, backend: *index });
        let member = member.expect("a connection goes to a member");
        assert_eq!((member.state, member.port), (MEMBER_READY, Port::new(after.ports[1])));
    }
}

/// Whether packets are dropped for this reason.
const fn is_dropped(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::NotAnswered
            | Reason::Inconsistent
            | Reason::NotInRanges
            | Reason::NoLocalEndpoints
            | Reason::RejectionLimited
    )
}

fn pins_of(model: &Model, frame: &[u8]) -> Option<Pins> {
    let reading = read(frame)?;
    Pins::now(model, &reading, frontend_of(model, &reading)?)
}

/// The frontend of a packet.
pub(crate) fn frontend_of(model: &Model, reading: &Reading) -> Option<Frontend> {
    let address = reading.addresses[1].as_slice();
    let port = Port::new(reading.ports[1]);
    if reading.is_v6 {
        let key = FrontendKey::new(V6(address.try_into().ok()?), port, reading.protocol);
        model.frontends_v6.get(&key).copied()
    } else {
        let key = FrontendKey::new(V4(address.try_into().ok()?), port, reading.protocol);
        model.frontends_v4.get(&key).copied()
    }
}
