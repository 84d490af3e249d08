//! Tables for the tests of views and listings: two services, one of them in a group, and a pod that has gone.

use std::collections::BTreeMap;

use affinity_common::{
    abi::{
        AFFINITY, Address, Backend, BackendRef, DROP_IF_NO_LOCAL, Event, EventKind, FLOW_FIN_CLIENT, Flow, FlowKey,
        Frontend, FrontendKey, MASQUERADE, MEMBER_DRAINING, MEMBER_READY, Member, MemberKey, NameKey, NameKind, Node,
        PODS, Port, RANGES, RangeKey, Reason, SPLIT_SCOPE, Session, SessionKey, TIMEOUT_UNLIMITED, Usage, UsageKey,
        UsageOf, V4, V6,
    },
    rewrite,
};

use super::{Catalog, Clock};
use crate::store::Observed;

pub(crate) const SECOND: u64 = 1_000_000_000;
/// The monotonic second at which the fixture is read.
pub(crate) const NOW_S: u64 = 10_000;

/// A pin to backend `backend`, generation 1, for service 1.
pub(crate) fn session(created_s: u64, last_used_s: u64, backend: u32) -> Session {
    Session {
        created_ns: created_s * SECOND,
        last_used_ns: last_used_s * SECOND,
        backend: BackendRef { index: backend, generation: 1 },
        service: 1,
        draw: 0,
        connections: 0,
        uses: 3,
        reason: Reason::Created as u8,
        pad: [0; 7],
    }
}

pub(crate) fn clock() -> Clock {
    Clock { now_ns: NOW_S * SECOND, wall: "2026-03-01T12:00:00Z".parse().unwrap() }
}

pub(crate) fn v6(last: u8) -> V6 {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
    bytes[15] = last;
    V6(bytes)
}

fn frontend(service: u32, pool: u32, timeout_ns: u64) -> Frontend {
    Frontend {
        timeout_ns,
        service,
        pool,
        group: service,
        own: service,
        slot_first: pool * 8,
        slot_count: 2,
        seed: 7,
        select: 0,
        timer: 0,
        prefix: 32,
        flags: AFFINITY,
    }
}

fn observed() -> Observed {
    let mut observed = Observed::default();
    let web = frontend(1, 1, 10_800 * SECOND);
    let (http, https) = (Port::new(80), Port::new(443));
    observed.frontends_v4.insert(FrontendKey::new(V4([10, 96, 0, 10]), http, 6), web);
    observed
        .frontends_v4
        .insert(FrontendKey::new(V4([10, 96, 0, 10]), https, 6), Frontend { pool: 2, slot_first: 16, ..web });
    let dns = Frontend { timer: 3, select: 1, slot_count: 0, group: 9, own: 2, ..frontend(2, 3, TIMEOUT_UNLIMITED) };
    observed
        .frontends_v4
        .insert(FrontendKey::new(V4([10, 96, 0, 53]), Port::new(53), 17), Frontend { prefix: 24, ..dns });
    let (key, dns) =
        (FrontendKey::new(v6(0x53), Port::new(53), 17), Frontend { pool: 4, slot_first: 32, prefix: 64, ..dns });
    observed.frontends_v6.insert(key, Frontend { flags: dns.flags | SPLIT_SCOPE, ..dns });
    observed
        .frontends_v6
        .insert(key.external(), Frontend { flags: dns.flags | MASQUERADE | RANGES | DROP_IF_NO_LOCAL, ..dns });
    observed.ranges_v4.insert(RangeKey::new(PODS, V4([10, 244, 0, 0]), 16));
    observed.ranges_v6.insert(RangeKey::new(2, v6(0), 32));
    observed.node =
        Node { address_v4: V4([192, 0, 2, 1]), port_first: Port::new(1024), port_count: 28_976, ..Node::default() };
    for (index, last, generation) in [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 4, 2)] {
        let address = V4([10, 244, 0, last]).to_mapped();
        observed.backends.insert(index, Backend { address, generation, flags: u32::from(index == 1) });
    }
    let member = |port, state| Member { generation: 1, port: Port::new(port), state, pad: 0 };
    for (pool, backend, port, state) in [
        (1, 1, 8080, MEMBER_READY),
        (1, 2, 8080, MEMBER_READY),
        (2, 1, 8443, MEMBER_READY),
        (2, 2, 8443, MEMBER_DRAINING),
        (3, 3, 5353, MEMBER_DRAINING),
        (9, 3, 0, MEMBER_DRAINING),
    ] {
        observed.members.insert(MemberKey { pool, backend }, member(port, state));
    }
    observed.slots.insert(8, vec![1, 2]);
    observed.slots.insert(16, vec![1, 1]);
    for (kind, id, name) in [
        (NameKind::Service, 1, "default/web"),
        (NameKind::Service, 2, "kube-system/dns"),
        (NameKind::Pool, 1, "default/web:http/TCP/v4"),
        (NameKind::Pool, 2, "default/web:https/TCP/v4"),
        (NameKind::Pool, 3, "kube-system/dns:dns/UDP/v4"),
        (NameKind::Pool, 4, "kube-system/dns:dns/UDP/v6"),
        (NameKind::Group, 9, "kube-system/infra"),
        (NameKind::Backend, 1, "default/web-0"),
        (NameKind::Backend, 2, "default/web-1"),
        (NameKind::Backend, 4, "default/web-9"),
    ] {
        observed.names.insert(NameKey { kind: kind as u32, id }, name.to_owned());
    }
    observed
}

/// The tables, as read at [`NOW_S`].
pub(crate) fn catalog() -> Catalog {
    let mut usage = BTreeMap::new();
    usage.insert(UsageKey { of: UsageOf::Service as u32, id: 1 }, Usage { counts: [0, 4, 20, 1, 2, 0, 0, 3] });
    usage.insert(UsageKey { of: UsageOf::Backend as u32, id: 1 }, Usage { counts: [0, 2, 15, 1, 0, 0, 0, 0] });
    Catalog::new(observed(), usage, clock())
}

/// Pins of both services: fresh, expired, of a pod that has gone, of a pod about which nothing is known, and of networks.
pub(crate) fn sessions_v4() -> Vec<(SessionKey<V4>, Session)> {
    let alive = Session { service: 2, connections: 2, ..session(9_000, 9_990, 3) };
    vec![
        (SessionKey::new(1, V4([192, 0, 2, 1]), 32), session(9_000, 9_990, 1)),
        (SessionKey::new(1, V4([192, 0, 2, 20]), 32), Session { reason: 13, ..session(9_955, 9_955, 2) }),
        (SessionKey::new(1, V4([198, 51, 100, 7]), 32), session(100, 150, 4)),
        (
            SessionKey::new(1, V4([198, 51, 100, 8]), 32),
            Session { backend: BackendRef { index: 1, generation: 7 }, ..session(9_000, 9_001, 1) },
        ),
        (SessionKey::new(9, V4([203, 0, 113, 0]), 24), alive),
        (SessionKey::new(77, V4([203, 0, 113, 9]), 32), Session { service: 77, ..session(1, 1, 2) }),
    ]
}

/// One pin of a network.
pub(crate) fn sessions_v6() -> Vec<(SessionKey<V6>, Session)> {
    let unlimited = Session { service: 2, reason: Reason::OperatorPinned as u8, ..session(9_000, 9_400, 3) };
    vec![(SessionKey::new(9, v6(0), 64), unlimited)]
}

/// A connection of the first client, in the client's direction.
pub(crate) fn flow() -> (FlowKey<V4>, Flow<V4>) {
    let key = FlowKey {
        saddr: V4([192, 0, 2, 1]),
        daddr: V4([10, 96, 0, 10]),
        sport: Port::new(40_000),
        dport: Port::new(80),
        protocol: 6,
        direction: 0,
        pad: [0; 2],
    };
    let edit = rewrite::edit(&key, key.saddr, V4([10, 244, 0, 1]), key.sport, Port::new(8080));
    let flow = Flow {
        created_ns: 9_000 * SECOND,
        last_used_ns: 9_999 * SECOND,
        segment: 0,
        edit,
        backend: BackendRef { index: 1, generation: 1 },
        pool: 1,
        scope: 1,
        timeout_s: 10_800,
        state: FLOW_FIN_CLIENT,
        timer: 0,
        prefix: 32,
        flags: 0,
    };
    (key, flow)
}

/// One event of each kind.
pub(crate) fn events() -> Vec<Event> {
    let event = |time_s, kind: EventKind, reason: Reason, from: u32, to: u32| Event {
        time_ns: time_s * SECOND,
        client: V4([192, 0, 2, 1]).to_mapped(),
        service: 1,
        scope: 1,
        from: BackendRef { index: from, generation: u32::from(from > 0) },
        to: BackendRef { index: to, generation: u32::from(to > 0) },
        kind: kind as u8,
        reason: reason as u8,
        pad: [0; 6],
    };
    let evicted = event(9_950, EventKind::Evicted, Reason::TableFull, 0, 0);
    vec![
        event(9_000, EventKind::Created, Reason::Created, 0, 1),
        event(9_100, EventKind::Moved, Reason::BackendGone, 4, 2),
        event(9_200, EventKind::Expired, Reason::Expired, 2, 1),
        event(9_300, EventKind::Unpinned, Reason::OperatorPinned, 1, 0),
        event(9_400, EventKind::Pinned, Reason::OperatorPinned, 0, 2),
        Event { from: BackendRef { index: 42, generation: 0 }, service: 0, client: [0; 16], ..evicted },
    ]
}
