//! Connections with the node's address as their source: to the pod, and back through the node.

use affinity_common::{
    abi::{Address as _, Direction, MASQUERADE, PODS, RangeKey, Reason, SPLIT_SCOPE, V4, V6},
    model::Model,
    pipeline::Verdict,
};

use crate::{
    frame::{Reading, error, quoted, read, turned},
    later_fragment,
    passage::{Passage, frontend_of},
    state::{NODE_PORT, NODE_V4, NODE_V6},
};

/// Lets a translated packet leave for its pod. If its source becomes the node's, returns the pod's reply after it has come back
/// here: a packet from the pod to the client.
pub(crate) fn by_the_node(model: &Model, first: &Passage) -> Option<Vec<u8>> {
    let sent = read(&first.after).expect("a translated frame is as whole as before");
    if sent.addresses[0] == sent.addresses[1] && sent.ports[0] == sent.ports[1] {
        // Its directions cannot be distinguished.
        return None;
    }
    let leaving = Passage::new(model, Direction::Snat, &first.after);
    let is_masqueraded = becomes_the_nodes(model, &first.reading(), &sent);
    assert_eq!(leaving.reason, if is_masqueraded { Reason::Masqueraded } else { Reason::NotReply });
    if !is_masqueraded {
        return None;
    }
    later_fragment(model, Direction::Snat, &leaving);
    let left = read(&leaving.after).expect("a translated frame is as whole as before");
    let node = if left.is_v6 { NODE_V6.0.to_vec() } else { NODE_V4.0.to_vec() };
    assert_eq!(left.addresses, [node, sent.addresses[1].clone()]);
    assert_eq!(left.ports[1], sent.ports[1]);
    let ports = NODE_PORT..NODE_PORT + model.node.port_count;
    assert!(ports.contains(&left.ports[0]), "{} is no port of the node", left.ports[0]);

    let returned = Passage::new(model, Direction::RevSnat, &turned(&leaving.after, &left));
    assert_eq!((returned.verdict, returned.reason), (Verdict::Forward, Reason::Returned));
    later_fragment(model, Direction::RevSnat, &returned);
    let reading = read(&returned.after).expect("a translated frame is as whole as before");
    assert_eq!(reading.addresses, [sent.addresses[1].clone(), sent.addresses[0].clone()]);
    assert_eq!(reading.ports, [sent.ports[1], sent.ports[0]]);
    error_by_the_pod(model, &leaving, &sent, &left);
    Some(returned.after)
}

/// An error of the pod, or of a router before it, quotes the client's packet, and goes to the client.
fn error_by_the_pod(model: &Model, leaving: &Passage, sent: &Reading, left: &Reading) {
    let error = error(left, &leaving.after, &leaving.after[left.l3..]);
    let passage = Passage::new(model, Direction::RevSnat, &error);
    assert_eq!((passage.verdict, passage.reason), (Verdict::Forward, Reason::RelatedError));
    let reading = read(&passage.after).expect("it is whole");
    assert_eq!(reading.addresses, [sent.addresses[1].clone(), sent.addresses[0].clone()]);
    let quoted = quoted(&passage.after);
    assert_eq!((&quoted.addresses, quoted.ports), (&sent.addresses, sent.ports));
}

/// Whether the source of a client's new connection becomes the node's: if a pod connects to itself, or if its frontend requires
/// it.
fn becomes_the_nodes(model: &Model, asked: &Reading, sent: &Reading) -> bool {
    let frontend = frontend_of(model, asked).expect("only packets to frontends are translated");
    let is_outside = frontend.flags & SPLIT_SCOPE != 0 && !is_of_a_pod(model, &asked.addresses[0]);
    sent.addresses[0] == sent.addresses[1] || is_outside || frontend.flags & MASQUERADE != 0
}

fn is_of_a_pod(model: &Model, address: &[u8]) -> bool {
    match (<[u8; 4]>::try_from(address), <[u8; 16]>::try_from(address)) {
        (Ok(v4), _) => model.ranges_v4.contains(&RangeKey::new(PODS, V4(v4), V4::BITS)),
        (_, Ok(v6)) => model.ranges_v6.contains(&RangeKey::new(PODS, V6(v6), V6::BITS)),
        _ => false,
    }
}
