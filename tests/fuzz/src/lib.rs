//! The properties that hold for every frame in every state, even for hostile input.
//!
//! An input consists of [`state::HEAD`] bytes that choose a [`state`], and a frame. The frame passes through the pipeline as a
//! client's and as a pod's packet. Follow-ups are made from it: its repetition; the reply, through the node's address if the
//! source became that; later fragments; further connections of the same client; the same packets redirected past the node's
//! stack; and itself once more after pods have gone or time has passed. A second, plain reading of the [`frame`] checks each
//! passage.
//!
//! `cases` contains inputs that have revealed an error in the pipeline, with names that say which.

pub mod frame;
mod passage;
mod pins;
mod redirect;
pub mod seeds;
mod snat;
pub mod state;

use std::collections::BTreeSet;

use affinity_common::{
    abi::{Direction, Reason},
    model::Model,
    pipeline::Verdict,
};

use crate::{
    frame::{ACK, FIN, RST, SYN, TCP, UDP, error, fragment_field, network_places, quoted, read, turned},
    passage::{Passage, frontend_of},
    redirect::redirect,
    snat::by_the_node,
    state::{PORTS, State, send_to},
};

/// Runs one input and returns its reasons.
///
/// # Panics
/// When a property does not hold.
pub fn examine(input: &[u8]) -> BTreeSet<Reason> {
    let Some((state, frame)) = State::split(input) else { return BTreeSet::new() };
    let frame = state.aimed(frame);
    let mut model = state.tables(read(&frame).as_ref());
    let mut met: BTreeSet<_> = answer_to_another(&model, &frame).into_iter().collect();

    let first = Passage::new(&model, Direction::Dnat, &frame);
    if first.verdict == Verdict::Forward {
        repeat(&model, &first);
        later_fragment(&model, Direction::Dnat, &first);
        redirect(&model, &first.after);
        reply(&model, &first);
        errors(&model, &first);
        further_connections(&model, &first);
        met.insert(straight_to_the_pod(&model, &first));
    }
    state.change(&mut model);
    Passage::new(&model, Direction::Dnat, &frame);
    Passage::new(&model, Direction::RevDnat, &frame);
    let counters = model.counters.borrow();
    met.extend(counters.keys().copied());
    met
}

/// A flow's next packet has the same result.
fn repeat(model: &Model, first: &Passage) {
    let reading = first.reading();
    let flags = if reading.protocol == TCP { first.before[reading.l4 + 13] } else { 0 };
    if flags & (SYN | ACK) == SYN && flags & (FIN | RST) != 0 {
        // It opens and ends a connection, so the next one is a new connection.
        return;
    }
    let again = Passage::new(model, Direction::Dnat, &first.before);
    assert_eq!(again.reason, Reason::Established);
    assert_eq!(again.after, first.after);
}

/// The pod's reply comes from the address that the client used.
fn reply(model: &Model, first: &Passage) {
    let asked = first.reading();
    let frame = by_the_node(model, first).unwrap_or_else(|| {
        turned(&first.after, &read(&first.after).expect("a translated frame is as whole as before"))
    });

    redirect(model, &frame);
    let reply = Passage::new(model, Direction::RevDnat, &frame);
    later_fragment(model, Direction::RevDnat, &reply);
    assert_eq!((reply.verdict, reply.reason), (Verdict::Forward, Reason::Reply));
    let reading = read(&reply.after).expect("a translated frame is as whole as before");
    let [client, frontend] = asked.addresses;
    assert_eq!(reading.addresses, [frontend, client]);
    assert_eq!(reading.ports, [asked.ports[1], asked.ports[0]]);
}

/// Later fragments are translated like the first one.
fn later_fragment(model: &Model, direction: Direction, first: &Passage) {
    let reading = first.reading();
    let Some(field) = fragment_field(&first.before, &reading) else { return };
    let later = frame::later_fragment(&first.before, field, reading.is_v6);
    let passage = Passage::new(model, direction, &later);
    assert_eq!((passage.verdict, passage.reason), (Verdict::Forward, Reason::LaterFragment));
    let [addresses, _] = network_places(&later).expect("it is an IP packet");
    assert_eq!(passage.after[addresses.clone()], first.after[addresses]);
}

/// Errors about the translated packet reach the client, and quote its packet; the client's errors about replies reach the pod.
fn errors(model: &Model, first: &Passage) {
    let (sent, translated) = (first.reading(), read(&first.after).expect("a translated frame is as whole as before"));
    let [client, frontend] = &sent.addresses;
    let [_, pod] = &translated.addresses;
    let by_the_pod = error(&translated, &first.after, &first.after[translated.l3..]);
    let passage = Passage::new(model, Direction::RevDnat, &by_the_pod);
    assert_eq!((passage.verdict, passage.reason), (Verdict::Forward, Reason::RelatedError));
    assert_eq!(read(&passage.after).expect("it is whole").addresses, [frontend.clone(), client.clone()]);
    let quoted = quoted(&passage.after);
    assert_eq!((&quoted.addresses, quoted.ports), (&sent.addresses, sent.ports));

    let seen_by_the_client = turned(&first.before, &sent);
    let reading = read(&seen_by_the_client).expect("it is whole");
    let by_the_client = error(&reading, &seen_by_the_client, &seen_by_the_client[reading.l3..]);
    let passage = Passage::new(model, Direction::Dnat, &by_the_client);
    assert_eq!((passage.verdict, passage.reason), (Verdict::Forward, Reason::RelatedError));
    assert_eq!(read(&passage.after).expect("it is whole").addresses, [client.clone(), pod.clone()]);
    let quoted = self::quoted(&passage.after);
    assert_eq!(quoted.addresses, [pod.clone(), client.clone()]);
    assert_eq!(quoted.ports, [translated.ports[1], translated.ports[0]]);
}

/// The client's next connections, one to each port. Each passage itself checks the pins.
fn further_connections(model: &Model, first: &Passage) {
    let reading = first.reading();
    for (port, _) in PORTS {
        let mut frame = first.before.clone();
        send_to(&mut frame, &reading, port);
        let [.., ports] = reading.places();
        frame[ports.start + 1] ^= 1;
        Passage::new(model, Direction::Dnat, &frame);
    }
}

/// The same datagram as the answer to one that left from the frontend's address and port: it belongs to a foreign connection,
/// and passes.
fn answer_to_another(model: &Model, frame: &[u8]) -> Option<Reason> {
    let reading = read(frame).filter(|reading| reading.protocol == UDP && frontend_of(model, reading).is_some())?;
    let model = model.clone();
    let asked = Passage::new(&model, Direction::RevDnat, &turned(frame, &reading));
    assert_eq!(asked.verdict, Verdict::Pass);
    let answer = Passage::new(&model, Direction::Dnat, frame);
    assert_eq!((answer.verdict, answer.reason), (Verdict::Pass, Reason::NotOurs));
    Some(answer.reason)
}

/// The client's connection directly to the same pod from the same port: it gets another port if its replies would match those
/// of the first one, and its replies come back to it.
fn straight_to_the_pod(model: &Model, first: &Passage) -> Reason {
    // On a copy, because it would interfere with later connections.
    let model = &model.clone();
    let straight = Passage::new(model, Direction::Dnat, &first.after);
    if straight.reason != Reason::PortChanged {
        assert_eq!(straight.verdict, Verdict::Pass);
        return straight.reason;
    }
    let [was, is] = [&straight.before, &straight.after].map(|frame| read(frame).expect("it is whole"));
    assert_eq!((&is.addresses, is.ports[1]), (&was.addresses, was.ports[1]));
    assert_ne!(is.ports[0], was.ports[0]);
    let reply = Passage::new(model, Direction::RevDnat, &turned(&straight.after, &is));
    assert_eq!((reply.verdict, reply.reason), (Verdict::Forward, Reason::Reply));
    let came = read(&reply.after).expect("it is whole");
    assert_eq!(came.ports, [was.ports[1], was.ports[0]]);
    straight.reason
}

#[cfg(test)]
mod tests {
    use std::fs;

    use affinity_common::abi::REASONS;

    use super::*;

    /// The reasons that only the kernel, the agent or a socket can give.
    const NOT_OF_THE_MODEL: [Reason; 9] = [
        Reason::NoReplyBuilt,
        Reason::NotRewritten,
        Reason::FlowNotStored,
        Reason::SessionNotStored,
        Reason::EventLost,
        Reason::OperatorPinned,
        Reason::SocketNotStored,
        Reason::TableFull,
        Reason::OtherHost,
    ];

    #[test]
    fn the_seeds_meet_every_reason_in_both_families() {
        for family in ["-v4-", "-v6-"] {
            let seeds = seeds::seeds().into_iter().filter(|(name, _)| name.contains(family));
            let met: BTreeSet<_> = seeds.flat_map(|(_, input)| examine(&input)).collect();
            let expected = REASONS.iter().copied().filter(|reason| !NOT_OF_THE_MODEL.contains(reason));
            assert_eq!(met, expected.collect(), "{family}");
        }
    }

    #[test]
    fn recorded_cases_pass() {
        let mut replayed = 0;
        for case in
            fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/cases")).expect("the cases are in the repository")
        {
            let path = case.expect("it can be listed").path();
            println!("{}", path.display());
            examine(&fs::read(path).expect("it can be read"));
            replayed += 1;
        }
        assert!(replayed > 0);
    }
}
