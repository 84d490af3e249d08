//! Properties of parsing, rewriting and rejecting that hold for every frame.

use bytemuck::Zeroable;
use proptest::prelude::*;

use crate::{
    abi::{
        AFFINITY, Address, BACKEND_LOCAL, Backend, Direction, Frontend, FrontendKey, Port, Reason, V4, V6, filter_bit,
    },
    headers::{ACK, FIN, Headers, RST, SYN, TCP, UDP},
    model::Model,
    packet::Packet,
    parse::{self, Network},
    pipeline::{self, Verdict},
    reject, rewrite,
    testing::{Ends, Shape, ends_v4, ends_v6, octets, pseudo_header, shapes, sum},
};

/// A family's parser.
trait Parsed: Address {
    fn parse<P: Packet>(frame: &P, l3: usize) -> Result<Headers<Self>, Reason>;
}

impl Parsed for V4 {
    fn parse<P: Packet>(frame: &P, l3: usize) -> Result<Headers<Self>, Reason> {
        parse::ipv4(frame, l3, Direction::Dnat)
    }
}

impl Parsed for V6 {
    fn parse<P: Packet>(frame: &P, l3: usize) -> Result<Headers<Self>, Reason> {
        parse::ipv6(frame, l3, Direction::Dnat)
    }
}

fn parsed_as_built<A: Parsed>(shape: &Shape, ends: &Ends<A>) -> Result<(), TestCaseError> {
    let frame = shape.frame(ends);
    let network = if A::BITS == V4::BITS { Network::V4(shape.l3()) } else { Network::V6(shape.l3()) };
    prop_assert_eq!(parse::network(&frame), Ok(network));
    let headers = A::parse(&frame, shape.l3()).map_err(|reason| TestCaseError::fail(reason.name()))?;
    prop_assert_eq!((headers.l3(), headers.l4()), (shape.l3(), shape.l4::<A>()));
    prop_assert_eq!((headers.key.saddr, headers.key.sport.get()), ends.from);
    prop_assert_eq!((headers.key.daddr, headers.key.dport.get()), ends.to);
    prop_assert_eq!(headers.key.protocol, shape.protocol);
    prop_assert_eq!(headers.flags, if shape.protocol == TCP { shape.flags } else { 0 });
    Ok(())
}

/// A frame that is cut within its headers is `truncated`; one that is cut behind them is parsed.
fn cut_is_truncated<A: Parsed>(shape: &Shape, ends: &Ends<A>) -> Result<(), TestCaseError> {
    let frame = shape.frame(ends);
    let headers_len = shape.l4::<A>() + if shape.protocol == TCP { 20 } else { 8 };
    for end in 0..=frame.len() {
        let cut = frame[..end].to_vec();
        let result = parse::network(&cut).and_then(|_| A::parse(&cut, shape.l3()).map(|_| ()));
        prop_assert_eq!(result, if end < headers_len { Err(Reason::Truncated) } else { Ok(()) }, "at {}", end);
    }
    Ok(())
}

/// A translated frame is the frame that its sender would have sent to the new address.
fn rewritten_as_built<A: Parsed>(shape: &Shape, old: &Ends<A>, new: &Ends<A>) -> Result<(), TestCaseError> {
    let mut frame = shape.frame(old);
    let headers = A::parse(&frame, shape.l3()).map_err(|reason| TestCaseError::fail(reason.name()))?;
    let (sport, dport) = (Port::new(new.from.1), Port::new(new.to.1));
    let edit = rewrite::edit(&headers.key, new.from.0, new.to.0, sport, dport);
    prop_assert!(rewrite::in_place(&mut frame, &headers, &edit));
    prop_assert_eq!(frame, shape.frame(new));
    Ok(())
}

/// Translating it back restores the frame.
fn translation_is_undone<A: Parsed>(shape: &Shape, old: &Ends<A>, new: &Ends<A>) -> Result<(), TestCaseError> {
    let mut frame = shape.frame(old);
    for ends in [new, old] {
        let headers = A::parse(&frame, shape.l3()).map_err(|reason| TestCaseError::fail(reason.name()))?;
        let (sport, dport) = (Port::new(ends.from.1), Port::new(ends.to.1));
        let edit = rewrite::edit(&headers.key, ends.from.0, ends.to.0, sport, dport);
        prop_assert!(rewrite::in_place(&mut frame, &headers, &edit));
    }
    prop_assert_eq!(frame, shape.frame(old));
    Ok(())
}

/// An answer goes back to the sender, has the length that its header says, and all its checksums are valid.
fn refused_rightly<A: Parsed>(shape: &Shape, ends: &Ends<A>) -> Result<(), TestCaseError> {
    let mut frame = shape.frame(ends);
    let headers = A::parse(&frame, shape.l3()).map_err(|reason| TestCaseError::fail(reason.name()))?;
    prop_assert!(reject::reject(&mut frame, &headers));
    let packet = &frame[shape.l3()..];
    let (header_len, len, protocol) = if A::BITS == V4::BITS {
        prop_assert_eq!(sum(&[&packet[..20]]), 0xffff);
        (20, usize::from(u16::from_be_bytes([packet[2], packet[3]])), packet[9])
    } else {
        (40, 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])), packet[6])
    };
    prop_assert_eq!(packet.len(), len);
    prop_assert_eq!(
        &packet[header_len - 2 * octets(ends.to.0).len()..header_len],
        [octets(ends.to.0), octets(ends.from.0)].concat()
    );
    let segment = &packet[header_len..];
    let is_icmp_v4 = protocol == 1;
    let pseudo = pseudo_header(octets(ends.to.0), octets(ends.from.0), protocol, segment.len());
    prop_assert_eq!(sum(&[if is_icmp_v4 { &[] } else { &pseudo }, segment]), 0xffff);
    if shape.protocol == TCP {
        let occupied =
            shape.payload.len() as u32 + u32::from(shape.flags & SYN != 0) + u32::from(shape.flags & FIN != 0);
        let acknowledged = shape.sequence.wrapping_add(occupied);
        let (number, up_to, flags) =
            if shape.flags & ACK != 0 { (shape.acknowledged, 0, RST) } else { (0, acknowledged, RST | ACK) };
        prop_assert_eq!(&segment[4..8], number.to_be_bytes());
        prop_assert_eq!(&segment[8..12], up_to.to_be_bytes());
        prop_assert_eq!(segment[13], flags);
    }
    Ok(())
}

/// A model with one service of each family, on port 80 of the address made of 9s.
fn one_service() -> Model {
    let mut model = Model::new(64);
    model.now_ns.set(1);
    model.backends.insert(0, Backend { address: [10; 16], generation: 1, flags: BACKEND_LOCAL });
    let (timeout_ns, prefix, flags) = (1, 128, AFFINITY);
    let frontend = Frontend { timeout_ns, service: 1, pool: 1, group: 1, own: 1, prefix, flags, ..Frontend::zeroed() };
    for protocol in [TCP, UDP] {
        let port = Port::new(80);
        model.frontends_v4.insert(FrontendKey::new(V4([9; 4]), port, protocol), frontend);
        model.frontends_v6.insert(FrontendKey::new(V6([9; 16]), port, protocol), frontend);
        model.filter.borrow_mut().insert((Direction::Dnat, filter_bit(V4([9; 4]), port, protocol)));
        model.filter.borrow_mut().insert((Direction::Dnat, filter_bit(V6([9; 16]), port, protocol)));
    }
    model
}

/// A packet that is not for the service passes unchanged, in both directions.
fn passes_untouched(frame: &[u8]) -> Result<(), TestCaseError> {
    let model = one_service();
    let mut bytes = frame.to_vec();
    prop_assert_eq!(pipeline::forward(&mut bytes, &model), Verdict::Pass);
    prop_assert_eq!(pipeline::reverse(&mut bytes, &model), Verdict::Pass);
    prop_assert_eq!(bytes, frame);
    prop_assert!(model.sessions_v4.borrow().iter().next().is_none() && model.flows_v4.borrow().iter().next().is_none());
    prop_assert!(model.sessions_v6.borrow().iter().next().is_none() && model.flows_v6.borrow().iter().next().is_none());
    prop_assert_eq!(model.counters.borrow().values().sum::<u64>(), 2);
    Ok(())
}

proptest! {
    #[test]
    fn every_shape_is_parsed_as_it_was_built(shape in shapes(), v4 in ends_v4(), v6 in ends_v6()) {
        parsed_as_built(&shape, &v4)?;
        parsed_as_built(&shape, &v6)?;
    }

    #[test]
    fn a_frame_cut_within_its_headers_is_truncated(shape in shapes(), v4 in ends_v4(), v6 in ends_v6()) {
        cut_is_truncated(&shape, &v4)?;
        cut_is_truncated(&shape, &v6)?;
    }

    #[test]
    fn a_rewrite_equals_a_recomputation(shape in shapes(), v4 in [ends_v4(), ends_v4()], v6 in [ends_v6(), ends_v6()]) {
        rewritten_as_built(&shape, &v4[0], &v4[1])?;
        rewritten_as_built(&shape, &v6[0], &v6[1])?;
    }

    /// Few words with few values: sums that are zero in either form, and carries that run through all bits.
    #[test]
    fn a_rewrite_equals_a_recomputation_at_the_edges(
        is_tcp in prop::bool::ANY,
        words in prop::collection::vec(prop::sample::select(vec![0u16, 1, 0x7fff, 0x8000, 0xfffe, 0xffff]), 14),
    ) {
        let address = |at: usize| V4::from_mapped([[0; 12].as_slice(), &words[at].to_be_bytes(), &words[at + 1].to_be_bytes()].concat().try_into().unwrap_or_default());
        let ends = |at: usize| Ends { from: (address(at), words[at + 4]), to: (address(at + 2), words[at + 5]) };
        let shape = Shape { payload: [words[12].to_be_bytes(), words[13].to_be_bytes()].concat(), ..Shape::tcp(ACK) };
        let shape = if is_tcp { shape } else { Shape { protocol: UDP, ..shape } };
        rewritten_as_built(&shape, &ends(0), &ends(6))?;
    }

    #[test]
    fn a_translation_back_restores_every_bit(shape in shapes(), v4 in [ends_v4(), ends_v4()], v6 in [ends_v6(), ends_v6()]) {
        translation_is_undone(&shape, &v4[0], &v4[1])?;
        translation_is_undone(&shape, &v6[0], &v6[1])?;
    }

    #[test]
    fn an_answer_is_right_in_every_checksum(shape in shapes(), v4 in ends_v4(), v6 in ends_v6()) {
        refused_rightly(&shape, &v4)?;
        refused_rightly(&shape, &v6)?;
    }

    #[test]
    fn a_packet_that_is_not_for_a_frontend_is_never_changed(shape in shapes(), v4 in ends_v4(), v6 in ends_v6()) {
        // The last three ends share all but one thing with the service: its port, its address.
        for ends in [v4, Ends { to: (v4.to.0, 80), ..v4 }, Ends { to: (V4([9; 4]), v4.to.1 | 1), ..v4 }] {
            passes_untouched(&shape.frame(&ends))?;
        }
        for ends in [v6, Ends { to: (v6.to.0, 80), ..v6 }, Ends { to: (V6([9; 16]), v6.to.1 | 1), ..v6 }] {
            passes_untouched(&shape.frame(&ends))?;
        }
    }

    /// Noise is touched only if it happens to be a packet to the service, which is too unlikely to occur.
    #[test]
    fn noise_passes_untouched(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        passes_untouched(&bytes)?;
    }

    /// Noise behind a link header that makes it look like IP.
    #[test]
    fn noise_that_looks_like_ip_passes_untouched(is_v4: bool, mut bytes in prop::collection::vec(any::<u8>(), 15..200)) {
        bytes[12..15].copy_from_slice(if is_v4 { &[0x08, 0x00, 0x45] } else { &[0x86, 0xdd, 0x60] });
        passes_untouched(&bytes)?;
    }

    /// A damaged frame to the service is answered, dropped or passed unchanged; it is never forwarded, and nothing panics.
    #[test]
    fn damaged_frames_to_the_service_are_not_forwarded(
        shape in shapes(),
        from in any::<([u8; 4], u16)>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        end in any::<prop::sample::Index>(),
    ) {
        let mut frame = shape.frame(&Ends { from: (V4(from.0), from.1), to: (V4([9; 4]), 80) });
        for (at, byte) in damage {
            let at = at.index(frame.len());
            frame[at] ^= byte;
        }
        frame.truncate(end.index(frame.len() + 1));
        let before = frame.clone();
        match pipeline::forward(&mut frame, &one_service()) {
            Verdict::Pass | Verdict::Drop => prop_assert_eq!(frame, before),
            Verdict::Answer => prop_assert_ne!(frame, before),
            Verdict::Forward | Verdict::Redirect => prop_assert!(false, "forwarded without an endpoint"),
        }
    }
}
