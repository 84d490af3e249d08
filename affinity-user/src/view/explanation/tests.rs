//! Explanations of the fixture's tables.

use affinity_common::{
    abi::{
        BackendRef, FLOW_ANSWERED, FLOW_OPEN, FLOW_RESET, FrontendKey, MASQUERADE, MEMBER_DRAINING, PODS, Port, RANGES,
        RangeKey, SPLIT_SCOPE, Selection, Session, SessionKey, V4, V6, netns_client,
    },
    headers::TCP,
};

use super::*;
use crate::view::{KnownNamespace, fixture, ip, question::session_keys};

/// A packet of the first client to the first frontend.
fn ask(catalog: &Catalog, from: &str, to: &str, sessions: &[(SessionKey<V4>, Session)]) -> (Question, Situation<V4>) {
    let (to, protocol) = to.split_once('/').unwrap_or((to, "tcp"));
    let to: std::net::SocketAddr = to.parse().unwrap();
    let question = Question {
        from: from.parse().unwrap(),
        from_port: None,
        to: Endpoint { address: to.ip(), port: to.port() },
        protocol: if protocol == "udp" { 17 } else { 6 },
    };
    let keys = session_keys::<V4>(catalog, &question);
    let situation = Situation {
        in_filter: question.is_frontend::<V4>(catalog),
        sessions: sessions.iter().filter(|(key, _)| keys.contains(key)).copied().collect(),
        flow: None,
        flow_pin: None,
        foreign: None,
        is_masqueraded: false,
        loads: BTreeMap::new(),
    };
    (question, situation)
}

fn steps(explanation: &Explanation<'_>) -> String {
    let lines = explanation.steps.iter().map(|step| format!("{}: {}", step.step, step.finds));
    lines.collect::<Vec<_>>().join("\n")
}

/// A client outside of the pod networks, with and without a connection.
#[test]
fn an_outsider_has_a_record_and_a_source_of_its_own() {
    let mut catalog = fixture::catalog();
    let key = FrontendKey::new(V4([10, 96, 0, 10]), Port::new(80), TCP);
    let record = catalog.observed.frontends_v4[&key];
    let (internal, external) = (record.flags | SPLIT_SCOPE, record.flags | MASQUERADE | RANGES);
    catalog.observed.frontends_v4.insert(key, Frontend { flags: internal, ..record });
    catalog.observed.frontends_v4.insert(key.external(), Frontend { flags: external, ..record });
    catalog.observed.ranges_v4.insert(RangeKey::new(PODS, V4([10, 244, 0, 0]), 16));
    catalog.observed.ranges_v4.insert(RangeKey::new(record.service, V4([192, 0, 2, 0]), 24));
    let node = (V4([192, 0, 2, 1]), Port::new(1024));
    (catalog.observed.node.address_v4, catalog.observed.node.port_first) = node;
    catalog.observed.node.port_count = 9;

    let met = |from: &str| {
        let (question, situation) = ask(&catalog, from, "10.96.0.10:80", &[]);
        let explanation = explain(&catalog, &question, &situation);
        (explanation.verdict, explanation.reason, explanation.masquerade)
    };
    assert_eq!(met("10.244.7.7"), ("forward", "created", false));
    assert_eq!(met("192.0.2.77"), ("forward", "created", true));
    assert_eq!(met("198.51.100.1"), ("drop", "not-in-ranges", false));
}

#[test]
fn a_new_client_may_reach_every_ready_pod() {
    let catalog = fixture::catalog();
    let (question, situation) = ask(&catalog, "192.0.2.99", "10.96.0.10:80", &fixture::sessions_v4());
    let answer = explain(&catalog, &question, &situation);
    insta::assert_snapshot!(steps(&answer), @r"
    packet: TCP SYN from 192.0.2.99, new source port, to 10.96.0.10:80
    filter: match: a frontend may have this address and port
    frontend: default/web: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=random
    session: 192.0.2.99 has no pin: it will be pinned
    selection: random: web-0 (10.244.0.1:8080) 50.0 %, web-1 (10.244.0.2:8080) 50.0 %
    verdict: forward (created): a new client was pinned. The destination becomes the address and port of one candidate.
    ");
}

#[test]
fn an_explanation_is_one_object() {
    let catalog = fixture::catalog();
    let (question, situation) = ask(&catalog, "192.0.2.99", "10.96.0.10:80", &fixture::sessions_v4());
    let answer = explain(&catalog, &question, &situation);
    insta::assert_snapshot!(serde_json::to_string_pretty(&answer).unwrap(), @r#"
    {
      "frontend": {
        "service": "default/web",
        "address": "10.96.0.10",
        "port": 80,
        "protocol": "TCP"
      },
      "verdict": "forward",
      "reason": "created",
      "pinned": null,
      "candidates": [
        {
          "address": "10.244.0.1",
          "port": 8080,
          "name": "web-0",
          "namespace": "default",
          "probability": 0.5,
          "masquerade": false
        },
        {
          "address": "10.244.0.2",
          "port": 8080,
          "name": "web-1",
          "namespace": "default",
          "probability": 0.5,
          "masquerade": false
        }
      ],
      "masquerade": false,
      "flow": null,
      "steps": [
        {
          "step": "packet",
          "finds": "TCP SYN from 192.0.2.99, new source port, to 10.96.0.10:80"
        },
        {
          "step": "filter",
          "finds": "match: a frontend may have this address and port"
        },
        {
          "step": "frontend",
          "finds": "default/web: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=random"
        },
        {
          "step": "session",
          "finds": "192.0.2.99 has no pin: it will be pinned"
        },
        {
          "step": "selection",
          "finds": "random: web-0 (10.244.0.1:8080) 50.0 %, web-1 (10.244.0.2:8080) 50.0 %"
        },
        {
          "step": "verdict",
          "finds": "forward (created): a new client was pinned. The destination becomes the address and port of one candidate."
        }
      ]
    }
    "#);
}

#[test]
fn a_pinned_client_reaches_its_pod() {
    let catalog = fixture::catalog();
    let (question, situation) = ask(&catalog, "192.0.2.1", "10.96.0.10:443", &fixture::sessions_v4());
    let answer = explain(&catalog, &question, &situation);
    insta::assert_snapshot!(steps(&answer), @r"
    packet: TCP SYN from 192.0.2.1, new source port, to 10.96.0.10:443
    filter: match: a frontend may have this address and port
    frontend: default/web: 1 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=random
    session: 192.0.2.1 is pinned to web-0 in default/web for 16m40s, expires in 2h59m; this pin is used
    selection: none: pinned to web-0 (10.244.0.1:8443)
    verdict: forward (pinned): a new connection followed its pin. The destination becomes 10.244.0.1:8443.
    ");
    assert_eq!((answer.verdict, answer.reason), ("forward", "pinned"));
    assert_eq!(answer.candidates.iter().map(|c| (c.name, c.port)).collect::<Vec<_>>(), [(Some("web-0"), 8443)]);
    assert_eq!(answer.pinned.unwrap().backend.name, Some("web-0"));
}

#[test]
fn a_pin_that_cannot_be_followed_is_no_pin() {
    let catalog = fixture::catalog();
    for (client, to, reason) in [
        ("198.51.100.7", "10.96.0.10:80", "backend-gone"),
        ("198.51.100.8", "10.96.0.10:80", "backend-gone"),
        ("192.0.2.20", "10.96.0.10:443", "not-ready"),
    ] {
        let (question, situation) = ask(&catalog, client, to, &fixture::sessions_v4());
        let answer = explain(&catalog, &question, &situation);
        assert_eq!((answer.verdict, answer.reason, answer.candidates.len()), ("forward", reason, 1), "{client}");
        assert!(answer.pinned.is_none());
    }
    let old = vec![(SessionKey::new(1, V4([192, 0, 2, 1]), 32), fixture::session(1, 2, 1))];
    let mut observed = catalog.observed.clone();
    observed.frontends_v4.values_mut().for_each(|frontend| frontend.timeout_ns = 60 * fixture::SECOND);
    let catalog = Catalog::new(observed, BTreeMap::new(), fixture::clock());
    let (question, situation) = ask(&catalog, "192.0.2.1", "10.96.0.10:80", &old);
    let answer = explain(&catalog, &question, &situation);
    insta::assert_snapshot!(steps(&answer), @r"
    packet: TCP SYN from 192.0.2.1, new source port, to 10.96.0.10:80
    filter: match: a frontend may have this address and port
    frontend: default/web: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=60s select=random
    session: 192.0.2.1 is pinned to web-0 in default/web for 2h46m, expired; so a pod is selected again
    selection: random, with the random number stored in the pin: web-0 (10.244.0.1:8080)
    verdict: forward (expired): the pin had expired; a pod was selected again. The destination becomes 10.244.0.1:8080.
    ");
}

#[test]
fn what_is_no_frontend_passes_and_what_has_no_pod_is_refused() {
    let catalog = fixture::catalog();
    let (question, situation) = ask(&catalog, "192.0.2.1", "10.96.0.10:81", &[]);
    let answer = explain(&catalog, &question, &situation);
    assert_eq!((answer.verdict, answer.reason, answer.frontend.is_none()), ("pass", "not-frontend", true));
    insta::assert_snapshot!(steps(&answer), @r"
    packet: TCP SYN from 192.0.2.1, new source port, to 10.96.0.10:81
    filter: no match: no frontend has this address and port
    verdict: pass (not-frontend): the destination is not a frontend.
    ");
    let (question, situation) = ask(&catalog, "192.0.2.1", "10.96.0.53:53/udp", &[]);
    let answer = explain(&catalog, &question, &situation);
    assert_eq!((answer.verdict, answer.reason, answer.candidates.len()), ("reject", "no-endpoints", 0));
    insta::assert_snapshot!(steps(&answer), @r"
    packet: UDP datagram from 192.0.2.1, new source port, to 10.96.0.53:53
    filter: match: a frontend may have this address and port
    frontend: kube-system/dns: 0 of 1 pods ready, ClientIP affinity, timer=alive timeout=unlimited select=consistent
    verdict: reject (no-endpoints): the service has no usable endpoint.
    ");
}

#[test]
fn a_flow_keeps_its_pod_whatever_becomes_of_the_pin() {
    let catalog = fixture::catalog();
    let (key, flow) = fixture::flow();
    let (mut question, mut situation) = ask(&catalog, "192.0.2.1", "10.96.0.10:80", &[]);
    question.from_port = Some(key.sport.get());
    situation.flow = Some(Flow { state: FLOW_ANSWERED | FLOW_OPEN, ..flow });
    let answer = explain(&catalog, &question, &situation);
    assert_eq!((answer.verdict, answer.reason), ("forward", "established"));
    assert_eq!(answer.flow.as_ref().unwrap().backend.name, Some("web-0"));
    insta::assert_snapshot!(steps(&answer), @r"
    packet: TCP packet from 192.0.2.1:40000 to 10.96.0.10:80
    filter: match: a frontend may have this address and port
    flow: a connection to web-0 (10.244.0.1:8080), open for 16m40s
    frontend: default/web: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=random
    verdict: forward (established): a packet of a known flow. The destination becomes 10.244.0.1:8080.
    ");
}

#[test]
fn the_less_loaded_of_two_wins_as_often_as_it_is_drawn() {
    let catalog = fixture::catalog();
    let mut observed = catalog.observed.clone();
    observed.frontends_v4.values_mut().for_each(|frontend| frontend.select = Selection::Least as u8);
    let catalog = Catalog::new(observed, BTreeMap::new(), fixture::clock());
    let (question, mut situation) = ask(&catalog, "192.0.2.99", "10.96.0.10:80", &[]);
    let chances = |situation: &Situation<V4>| -> Vec<_> {
        let answer = explain(&catalog, &question, situation);
        answer.candidates.iter().map(|candidate| (candidate.name, candidate.probability)).collect()
    };
    assert_eq!(chances(&situation), [(Some("web-0"), 0.5), (Some("web-1"), 0.5)]);
    situation.loads = BTreeMap::from([(1, 7), (2, 6)]);
    assert_eq!(chances(&situation), [(Some("web-1"), 1.0)]);
}

#[test]
fn a_socket_follows_the_pin_of_its_namespace() {
    let catalog = fixture::catalog();
    let to = Endpoint { address: "10.96.0.10".parse().unwrap(), port: 80 };
    let from = ip(netns_client(77, 4));
    let question = Question { from, from_port: None, to, protocol: TCP };
    let mut situation = Situation::<V6> {
        in_filter: true,
        sessions: BTreeMap::new(),
        flow: None,
        flow_pin: None,
        foreign: None,
        is_masqueraded: false,
        loads: BTreeMap::new(),
    };
    let answer = explain(&catalog, &question, &situation);
    assert_eq!((answer.verdict, answer.reason, answer.candidates.len()), ("forward", "created", 2));
    insta::assert_snapshot!(steps(&answer), @r"
    packet: TCP socket of netns:77 that connects to 10.96.0.10:80
    filter: match: a frontend may have this address and port
    frontend: default/web: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=random
    session: netns:77 has no pin: it will be pinned
    selection: random: web-0 (10.244.0.1:8080) 50.0 %, web-1 (10.244.0.2:8080) 50.0 %
    verdict: forward (created): a new client was pinned. The destination becomes the address and port of one candidate.
    ");
    let [key] = session_keys::<V6>(&catalog, &question)[..] else { panic!("one scope, one key") };
    assert_eq!(key, SessionKey::new(1, netns_client(77, 4), 128));
    situation.sessions.insert(key, fixture::session(9_000, 9_000, 2));
    let answer = explain(&catalog, &question, &situation);
    assert_eq!(answer.pinned.as_ref().unwrap().client.to_string(), "netns:77");
    insta::assert_snapshot!(steps(&answer), @r"
    packet: TCP socket of netns:77 that connects to 10.96.0.10:80
    filter: match: a frontend may have this address and port
    frontend: default/web: 2 of 2 pods ready, ClientIP affinity, timer=connection timeout=10800s select=random
    session: netns:77 is pinned to web-1 in default/web for 16m40s, expires in 2h43m; this pin is used
    selection: none: pinned to web-1 (10.244.0.2:8080)
    verdict: forward (pinned): a new connection followed its pin. The destination becomes 10.244.0.2:8080.
    ");
}

#[test]
fn a_draining_pod_is_no_candidate() {
    let mut observed = fixture::catalog().observed;
    observed.members.values_mut().for_each(|member| member.state = MEMBER_DRAINING);
    observed.frontends_v4.values_mut().for_each(|frontend| frontend.slot_count = 0);
    let catalog = Catalog::new(observed, BTreeMap::new(), fixture::clock());
    let (question, situation) = ask(&catalog, "192.0.2.99", "10.96.0.10:80", &[]);
    let answer = explain(&catalog, &question, &situation);
    assert_eq!((answer.verdict, answer.candidates.len()), ("reject", 0));
}

#[test]
fn a_pod_that_may_reach_itself_is_masqueraded_where_it_does() {
    let mut catalog = fixture::catalog();
    catalog.observed.node.address_v4 = V4([192, 0, 2, 1]);
    catalog.observed.node.port_count = 9;
    let (question, situation) = ask(&catalog, "10.244.0.1", "10.96.0.10:80", &[]);
    let answer = explain(&catalog, &question, &situation);
    let candidates: Vec<_> = answer.candidates.iter().map(|pod| (pod.name, pod.masquerade)).collect();
    assert_eq!(candidates, [(Some("web-0"), true), (Some("web-1"), false)]);
    assert!(!answer.masquerade, "not whichever is chosen");
    assert!(
        steps(&answer).ends_with("The source becomes an address of the node if the chosen pod is the client itself.")
    );
    catalog.observed.node.port_count = 0;
    let answer = explain(&catalog, &question, &situation);
    assert!(answer.candidates.iter().all(|pod| !pod.masquerade), "no port to masquerade with");
}

#[test]
fn a_connection_without_its_pod_is_rejected_on_its_next_packet() {
    let catalog = fixture::catalog();
    let (key, flow) = fixture::flow();
    let (mut question, mut situation) = ask(&catalog, "192.0.2.1", "10.96.0.10:80", &[]);
    question.from_port = Some(key.sport.get());
    let mut meets = |state| {
        situation.flow = Some(Flow { state, backend: BackendRef { generation: 99, ..flow.backend }, ..flow });
        let answer = explain(&catalog, &question, &situation);
        (answer.verdict, answer.reason)
    };
    assert_eq!(meets(0), ("reject", "flow-gone"));
    assert_eq!(meets(FLOW_RESET), ("forward", "created"), "its port begins another connection");
}

#[test]
fn a_datagram_whose_frontend_has_gone_keeps_to_its_pod_while_that_lives() {
    let mut catalog = fixture::catalog();
    let (key, flow) = fixture::flow();
    let (mut question, mut situation) = ask(&catalog, "192.0.2.1", "10.96.0.10:80/udp", &[]);
    question.from_port = Some(key.sport.get());
    situation.flow = Some(Flow { state: 0, ..flow });
    situation.in_filter = true;
    let meets = |catalog: &Catalog| explain(catalog, &question, &situation).reason;
    assert_eq!(meets(&catalog), "established", "its frontend has gone, its pool has not");
    catalog.observed.members.retain(|key, _| key.pool != flow.pool);
    assert_eq!(meets(&catalog), "established", "its pool has gone, its pod has not");
    catalog.observed.backends.get_mut(&flow.backend.index).unwrap().generation += 1;
    assert_eq!(meets(&catalog), "not-frontend");
}

#[test]
fn a_socket_knows_no_source_ranges() {
    let mut observed = fixture::catalog().observed;
    observed.frontends_v4.values_mut().for_each(|frontend| frontend.flags |= RANGES);
    observed.ranges_v6.insert(RangeKey::new(1, V6([0; 16]), 0));
    let catalog = Catalog::new(observed, BTreeMap::new(), fixture::clock());
    let to = Endpoint { address: "10.96.0.10".parse().unwrap(), port: 80 };
    let question = Question { from: ip(netns_client(77, 4)), from_port: None, to, protocol: TCP };
    let situation = Situation::<V6>::untouched(&catalog, &question);
    let answer = explain(&catalog, &question, &situation);
    assert_eq!((answer.verdict, answer.reason, answer.candidates.len()), ("pass", "not-in-ranges", 0));
    assert!(steps(&answer).contains("a socket has no source address yet"));
}

#[test]
fn loopback_is_the_node_for_the_node_alone() {
    let mut observed = fixture::catalog().observed;
    let key = FrontendKey::new(V4([10, 96, 0, 10]), Port::new(80), TCP);
    let record = observed.frontends_v4[&key];
    observed.frontends_v4.insert(FrontendKey::new(V4([127, 0, 0, 1]), Port::new(30_080), TCP), record);
    let names = [(7, "node"), (77, "default/web-0")]
        .map(|(cookie, name)| (cookie, KnownNamespace { name: Some(name.to_owned()), addresses: Vec::new() }));
    let catalog = Catalog::new(observed, BTreeMap::new(), fixture::clock()).with_namespaces(names.into());
    let to = Endpoint { address: "127.0.0.1".parse().unwrap(), port: 30_080 };
    for (cookie, reason) in [(7, "created"), (77, "not-frontend")] {
        let question = Question { from: ip(netns_client(cookie, 4)), from_port: None, to, protocol: TCP };
        let situation = Situation::<V6> { in_filter: true, ..Situation::untouched(&catalog, &question) };
        assert_eq!(explain(&catalog, &question, &situation).reason, reason);
    }
    let question = Question { from: "198.51.100.7".parse().unwrap(), from_port: None, to, protocol: TCP };
    let situation = Situation::<V4> { in_filter: true, ..Situation::untouched(&catalog, &question) };
    assert_eq!(explain(&catalog, &question, &situation).reason, "not-frontend", "no packet comes there by a wire");
}
