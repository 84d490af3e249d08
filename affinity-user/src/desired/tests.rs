use std::path::Path;

use affinity_common::abi::TIMEOUT_UNLIMITED;

use super::*;
use crate::source::directory;

/// YAML in, the desired state and the problems out, one line each.
fn case(yaml: &str) -> String {
    case_at(NodeFacts { name: Some("here".to_owned()), ..NodeFacts::default() }, None, yaml)
}

/// The same on a given node.
fn case_at(node: NodeFacts, zone: Option<&str>, yaml: &str) -> String {
    let mut snapshot = directory::parse(Path::new("case.yaml"), yaml);
    snapshot.node = zone.map(|zone| {
        let mut node = crate::source::api::Node::default();
        let labels = node.metadata.labels.get_or_insert_default();
        labels.insert("topology.kubernetes.io/zone".to_owned(), zone.to_owned());
        Sourced { origin: None, object: node.into() }
    });
    let (desired, problems) = desired(&snapshot, &Options { node, ..Options::default() });
    let mut lines = text(&desired);
    let all = snapshot.problems.iter().chain(&problems);
    lines.extend(all.map(|problem| format!("{}: {problem}", problem.severity.name())));
    lines.join("\n")
}

fn text(desired: &Desired) -> Vec<String> {
    let mut lines = Vec::new();
    for (address, Frontend { internal, external, ranges }) in &desired.frontends {
        let mut line = format!("{address} -> {}", route_text(internal));
        if let Some(external) = external {
            line += &format!(", external {}", route_text(external));
        }
        lines.push(line + if *ranges { ", in ranges" } else { "" });
    }
    for (service, ranges) in &desired.ranges {
        let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
        lines.push(format!("ranges of {service}: {}", ranges.join(" ")));
    }
    for (service, HealthCheck { port, local }) in &desired.health_checks {
        lines.push(format!("health of {service} at {port}: {local:?}"));
    }
    for (name, pool) in &desired.pools {
        lines.push(format!("{name} {}", pool_text(pool)));
        for (backend, member) in &pool.members {
            let local = if desired.backends[backend] { " local" } else { "" };
            let state = if member.ready { "ready" } else { "draining" };
            lines.push(format!("  {} {} port {} {state}{local}", backend.address, backend.pod, member.port));
        }
    }
    for (scope, union) in &desired.unions {
        lines.push(format!("union {}", scope.name()));
        for (backend, ready) in union {
            lines.push(format!("  {} {}", backend.address, if *ready { "ready" } else { "draining" }));
        }
    }
    lines
}

fn route_text(route: &Route) -> String {
    let flag = |is_set, flag| if is_set { flag } else { "" };
    format!(
        "{}{}{}",
        route.pool,
        flag(route.masquerade, " masqueraded"),
        flag(route.drop_if_no_local, " drop-if-no-local")
    )
}

fn pool_text(pool: &Pool) -> String {
    let Some(affinity) = pool.affinity else {
        return format!("{:?}", pool.select);
    };
    let timeout = match affinity.timeout_ns {
        TIMEOUT_UNLIMITED => "unlimited".to_owned(),
        ns => format!("{}s", ns / 1_000_000_000),
    };
    let group = match &pool.scope {
        Scope::Service(_) => String::new(),
        Scope::Group(name) => format!(" group {name}"),
    };
    format!("{:?} /{} {:?} {timeout}{group}", pool.select, pool.prefix, affinity.timer)
}

#[test]
fn names_of_pools_come_back() {
    for family in [Family::V4, Family::V6] {
        for (protocol, reach) in Protocol::ALL.into_iter().flat_map(|p| [(p, Reach::Cluster), (p, Reach::Local)]) {
            let service = ObjectName::new("shop", "web");
            let name = PoolName { service, port: "http".to_owned(), protocol, family, reach };
            assert_eq!(PoolName::parse(&name.to_string()), Some(name));
        }
    }
    for bad in [
        "",
        "shop/web",
        "web:80/TCP/v4",
        "shop/web:80/TCP",
        "shop/web:80/sctp/v4",
        "shop/web:80/TCP/v5",
        "shop/web:80/TCP/v4/",
        "shop/web:80/TCP/v4/cluster",
        "shop/web:80/TCP/v4/local/",
    ] {
        assert_eq!(PoolName::parse(bad), None, "{bad:?}");
    }
}

/// A service, with `more` lines of its spec.
fn service(name: &str, ip: &str, more: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  clusterIP: {ip}\n  {}\n",
        more.trim().replace("; ", "\n  ")
    )
}

/// A service with client-IP affinity, one port, and annotations (`key: value`, without the prefix).
fn pinned(name: &str, ip: &str, annotations: &[&str]) -> String {
    let annotations: Vec<String> = annotations.iter().map(|annotation| format!("affinity.dev/{annotation}")).collect();
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, annotations: {{{}}}}}\n\
         spec: {{clusterIP: {ip}, sessionAffinity: ClientIP, ports: [{{port: 80}}]}}\n",
        annotations.join(", ")
    )
}

/// A slice with ports (`name:number`) and endpoints (`address` or `address=conditions`, of a pod named after it).
fn slice(name: &str, service: &str, ports: &[&str], endpoints: &[&str]) -> String {
    let family = if endpoints.iter().any(|endpoint| endpoint.contains(':')) { "IPv6" } else { "IPv4" };
    let ports: Vec<String> = ports
        .iter()
        .map(|port| {
            let (name, number) = port.split_once(':').expect("name:number");
            format!("{{name: \"{name}\", port: {number}}}")
        })
        .collect();
    let endpoints: Vec<String> = endpoints
        .iter()
        .map(|endpoint| {
            let (address, conditions) = endpoint.split_once('=').unwrap_or((endpoint, ""));
            let conditions: Vec<String> = conditions
                .split_terminator(',')
                .map(|condition| match condition.strip_prefix('!') {
                    Some(condition) => format!("{condition}: false"),
                    None => format!("{condition}: true"),
                })
                .collect();
            let pod = address.replace(['.', ':'], "-");
            format!(
                "{{addresses: [\"{address}\"], conditions: {{{}}}, targetRef: {{kind: Pod, name: p{pod}}}}}",
                conditions.join(", ")
            )
        })
        .collect();
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: {family}\n\
         ports: [{}]\nendpoints: [{}]\n",
        ports.join(", "),
        endpoints.join(", ")
    )
}

#[test]
fn a_service_as_people_write_it() {
    let yaml = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, 'fd00::10']
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 3600}}
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: http}
  - {name: dns, port: 53, targetPort: 5353, protocol: UDP}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-abc, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}, {name: dns, port: 5353, protocol: UDP}]
endpoints:
- {addresses: [10.244.0.5], nodeName: here, targetRef: {kind: Pod, name: web-0, namespace: shop}}
- {addresses: [10.244.1.5], nodeName: there, conditions: {ready: true}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-def, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: http, port: 8080}, {name: dns, port: 5353, protocol: UDP}]
endpoints: [{addresses: ['fd00:1::5']}]
";
    insta::assert_snapshot!(case(yaml), @r"
    10.96.0.10:53/UDP -> shop/web:dns/UDP/v4
    10.96.0.10:80/TCP -> shop/web:http/TCP/v4
    [fd00::10]:53/UDP -> shop/web:dns/UDP/v6
    [fd00::10]:80/TCP -> shop/web:http/TCP/v6
    shop/web:dns/UDP/v4 Random /32 Connection 3600s
      10.244.0.5 shop/web-0 port 5353 ready local
      10.244.1.5  port 5353 ready
    shop/web:dns/UDP/v6 Random /128 Connection 3600s
      fd00:1::5  port 5353 ready
    shop/web:http/TCP/v4 Random /32 Connection 3600s
      10.244.0.5 shop/web-0 port 8080 ready local
      10.244.1.5  port 8080 ready
    shop/web:http/TCP/v6 Random /128 Connection 3600s
      fd00:1::5  port 8080 ready
    ");
}

#[test]
fn named_target_ports_differ_between_slices() {
    let yaml = service("web", "10.0.0.1", "ports: [{name: http, port: 80, targetPort: http}]")
        + &slice("a", "web", &["http:8080"], &["10.1.0.1"])
        + &slice("b", "web", &["http:9090", "other:1"], &["10.1.0.2"])
        + &slice("c", "web", &["other:1"], &["10.1.0.3"]);
    insta::assert_snapshot!(case(&yaml), @r"
    10.0.0.1:80/TCP -> default/web:http/TCP/v4
    default/web:http/TCP/v4 Random
      10.1.0.1 default/p10-1-0-1 port 8080 ready
      10.1.0.2 default/p10-1-0-2 port 9090 ready
    ");
}

#[test]
fn conditions_decide_who_is_ready() {
    let of = |endpoints: &[&str]| {
        let yaml = service("web", "10.0.0.1", "ports: [{port: 80}]") + &slice("a", "web", &[":80"], endpoints);
        case(&yaml).lines().skip(2).collect::<Vec<_>>().join("\n")
    };
    let unready = "10.1.0.2=!ready,!serving";
    let leaving = "10.1.0.3=!ready,serving,terminating";
    let gone = "10.1.0.4=!ready,!serving,terminating";
    // publishNotReadyAddresses: terminating, but published as ready.
    let published = "10.1.0.5=ready,!serving,terminating";
    insta::assert_snapshot!(of(&["10.1.0.1", unready, leaving, gone, published]), @r"
    10.1.0.1 default/p10-1-0-1 port 80 ready
    10.1.0.2 default/p10-1-0-2 port 80 draining
    10.1.0.3 default/p10-1-0-3 port 80 draining
    10.1.0.4 default/p10-1-0-4 port 80 draining
    10.1.0.5 default/p10-1-0-5 port 80 ready
    ");
    insta::assert_snapshot!(of(&[unready, leaving, gone]), @r"
    10.1.0.2 default/p10-1-0-2 port 80 draining
    10.1.0.3 default/p10-1-0-3 port 80 ready
    10.1.0.4 default/p10-1-0-4 port 80 draining
    ");
    insta::assert_snapshot!(of(&[unready, gone]), @r"
    10.1.0.2 default/p10-1-0-2 port 80 draining
    10.1.0.4 default/p10-1-0-4 port 80 draining
    ");
    insta::assert_snapshot!(of(&[]), @"");
}

#[test]
fn an_endpoint_in_two_slices_counts_once_in_its_better_state() {
    let yaml = service("web", "10.0.0.1", "ports: [{port: 80}]")
        + &slice("a", "web", &[":80"], &["10.1.0.1=!ready,!serving", "10.1.0.2"])
        + &slice("b", "web", &[":80"], &["10.1.0.1"])
        + &slice("c", "web", &[":81"], &["10.1.0.2"]);
    insta::assert_snapshot!(case(&yaml), @r"
    10.0.0.1:80/TCP -> default/web:80/TCP/v4
    default/web:80/TCP/v4 Random
      10.1.0.1 default/p10-1-0-1 port 80 ready
      10.1.0.2 default/p10-1-0-2 port 80 ready
    warning: case.yaml, document 1: Service default/web: endpoint 10.1.0.2 has two ports for default/web:80/TCP/v4, 80 and 81; 80 is used
    ");
}

#[test]
fn pools_of_one_service_that_differ_share_a_union() {
    let ports = "sessionAffinity: ClientIP; ports: [{name: a, port: 80}, {name: b, port: 81}]";
    let both = service("web", "10.0.0.1", ports)
        + &slice("a", "web", &["a:80", "b:81"], &["10.1.0.1"])
        + &slice("b", "web", &["a:80"], &["10.1.0.2", "10.1.0.3=!ready"]);
    insta::assert_snapshot!(case(&both), @r"
    10.0.0.1:80/TCP -> default/web:a/TCP/v4
    10.0.0.1:81/TCP -> default/web:b/TCP/v4
    default/web:a/TCP/v4 Random /32 Connection 10800s
      10.1.0.1 default/p10-1-0-1 port 80 ready
      10.1.0.2 default/p10-1-0-2 port 80 ready
      10.1.0.3 default/p10-1-0-3 port 80 draining
    default/web:b/TCP/v4 Random /32 Connection 10800s
      10.1.0.1 default/p10-1-0-1 port 81 ready
    union default/web
      10.1.0.1 ready
      10.1.0.2 ready
      10.1.0.3 draining
    ");
    // A member that drains in one pool and is absent from the other does not affect any pin.
    let drains = service("web", "10.0.0.1", ports)
        + &slice("a", "web", &["a:80", "b:81"], &["10.1.0.1"])
        + &slice("b", "web", &["a:80"], &["10.1.0.3=!ready"]);
    assert!(!case(&drains).contains("union"));
    // Neither does the other family.
    let dual =
        service("web", "10.0.0.1", "clusterIPs: [10.0.0.1, 'fd00::1']; sessionAffinity: ClientIP; ports: [{port: 80}]")
            + &slice("a", "web", &[":80"], &["10.1.0.1"])
            + &slice("b", "web", &[":80"], &["fd01::1", "fd01::2"]);
    assert!(!case(&dual).contains("union"));
}

#[test]
fn annotations_and_groups() {
    let yaml =
        pinned("a", "10.0.0.1", &["timer: packet", "select: consistent", "client-prefix-v4: '24'", "timeout: 7d"])
            + &pinned("b", "10.0.0.2", &["group: shop", "timeout: unlimited"])
            + &pinned("c", "10.0.0.3", &["group: shop", "timer: alive"])
            + &slice("a", "a", &[":80"], &["10.1.0.1"])
            + &slice("b", "b", &[":80"], &["10.1.0.1", "10.1.0.2"])
            + &slice("c", "c", &[":80"], &["10.1.0.1"]);
    insta::assert_snapshot!(case(&yaml), @r"
    10.0.0.1:80/TCP -> default/a:80/TCP/v4
    10.0.0.2:80/TCP -> default/b:80/TCP/v4
    10.0.0.3:80/TCP -> default/c:80/TCP/v4
    default/a:80/TCP/v4 Consistent /24 Packet 604800s
      10.1.0.1 default/p10-1-0-1 port 80 ready
    default/b:80/TCP/v4 Random /32 Connection unlimited group default/shop
      10.1.0.1 default/p10-1-0-1 port 80 ready
      10.1.0.2 default/p10-1-0-2 port 80 ready
    default/c:80/TCP/v4 Random /32 Alive 10800s group default/shop
      10.1.0.1 default/p10-1-0-1 port 80 ready
    union default/shop
      10.1.0.1 ready
      10.1.0.2 ready
    warning: case.yaml, document 3: Service default/c: metadata.annotations: in group default/shop, these annotations differ from service default/b: timer, timeout; each service keeps its own values
    ");
}

#[test]
fn a_group_of_equal_pools_needs_no_union() {
    let yaml = pinned("b", "10.0.0.2", &["group: shop"])
        + &pinned("c", "10.0.0.3", &["group: shop"])
        + &slice("b", "b", &[":80"], &["10.1.0.1"])
        + &slice("c", "c", &[":80"], &["10.1.0.1"]);
    insta::assert_snapshot!(case(&yaml), @r"
    10.0.0.2:80/TCP -> default/b:80/TCP/v4
    10.0.0.3:80/TCP -> default/c:80/TCP/v4
    default/b:80/TCP/v4 Random /32 Connection 10800s group default/shop
      10.1.0.1 default/p10-1-0-1 port 80 ready
    default/c:80/TCP/v4 Random /32 Connection 10800s group default/shop
      10.1.0.1 default/p10-1-0-1 port 80 ready
    ");
}

#[test]
fn a_clash_is_won_by_the_older_service_and_then_by_name() {
    let dated = |name: &str, date: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, creationTimestamp: {date}}}\n\
             spec: {{clusterIP: 10.0.0.1, ports: [{{port: 80}}]}}\n"
        )
    };
    insta::assert_snapshot!(case(&(dated("a", "2025-01-02T00:00:00Z") + &dated("b", "2025-01-01T00:00:00Z"))), @r"
    10.0.0.1:80/TCP -> default/b:80/TCP/v4
    default/b:80/TCP/v4 Random
    error: case.yaml, document 1: Service default/a: spec.ports[0]: 10.0.0.1:80/TCP is taken by service default/b; this service does not get it
    ");
    insta::assert_snapshot!(case(&(dated("a", "null") + &dated("b", "2025-01-01T00:00:00Z"))), @r"
    10.0.0.1:80/TCP -> default/b:80/TCP/v4
    default/b:80/TCP/v4 Random
    error: case.yaml, document 1: Service default/a: spec.ports[0]: 10.0.0.1:80/TCP is taken by service default/b; this service does not get it
    ");
    insta::assert_snapshot!(case(&(dated("b", "null") + &dated("a", "null"))), @r"
    10.0.0.1:80/TCP -> default/a:80/TCP/v4
    default/a:80/TCP/v4 Random
    error: case.yaml, document 1: Service default/b: spec.ports[0]: 10.0.0.1:80/TCP is taken by service default/a; this service does not get it
    ");
}

#[test]
fn services_are_ours_or_anothers() {
    let labelled = |name: &str, ip: &str, label: &str, affinity: &str| {
        let label = format!("service.kubernetes.io/{label}");
        service(name, ip, &format!("sessionAffinity: {affinity}; ports: [{{port: 80}}]"))
            .replace("metadata: {", &format!("metadata: {{labels: {{{label}}}, "))
    };
    // Problems of another proxy's services and their slices are not ours to report.
    let bad = "sessionAffinity: Nonsense; ports: [{port: 80}]";
    let yaml = service("a-pinned", "10.0.0.1", "sessionAffinity: ClientIP; ports: [{port: 80}]")
        + &service("b-plain", "10.0.0.2", bad).replace("Nonsense", "None")
        + &labelled("c-ours", "10.0.0.3", "service-proxy-name: affinity.dev", "None")
        + &labelled("d-other", "10.0.0.4", "service-proxy-name: another", "ClientIP")
        + &labelled("e-headless", "10.0.0.5", "headless: ''", "ClientIP")
        + &slice("a", "a-pinned", &[":80"], &["10.1.0.1"])
        + &slice("b", "b-plain", &[":80"], &["10.1.0.2", "10.1.0.300"])
        + &slice("d", "d-other", &[":80"], &["10.1.0.4"]);
    let snapshot = directory::parse(Path::new("case.yaml"), &yaml);
    let ask = |services, proxy_name: &str| {
        let options = Options { services, proxy_name: proxy_name.to_owned(), ..Options::default() };
        let (desired, problems) = desired(&snapshot, &options);
        let ours: BTreeSet<_> =
            desired.frontends.values().map(|frontend| &*frontend.internal.pool.service.name).collect();
        let others: Vec<_> = desired.others.iter().map(|backend| backend.address.to_string()).collect();
        (ours.into_iter().collect::<Vec<_>>().join(" "), others.join(" "), desired.coexists, problems.len())
    };
    let expect =
        |ours: &str, others: &str, coexists, problems| (ours.to_owned(), others.to_owned(), coexists, problems);
    let name = DEFAULT_PROXY_NAME;
    assert_eq!(ask(Services::Affinity, name), expect("a-pinned c-ours", "10.1.0.2 10.1.0.4", true, 0));
    assert_eq!(ask(Services::Labelled, name), expect("c-ours", "10.1.0.1 10.1.0.2 10.1.0.4", true, 0));
    assert_eq!(ask(Services::All, name), expect("a-pinned b-plain c-ours", "10.1.0.4", false, 1));
    assert_eq!(ask(Services::Labelled, "another"), expect("d-other", "10.1.0.1 10.1.0.2", true, 0));
}

#[test]
fn services_without_frontends() {
    let yaml = service("headless", "None", "ports: [{port: 80}]")
        + &service("elsewhere", "''", "type: ExternalName; externalName: example.org")
        + &service("unassigned", "''", "ports: [{port: 80}]")
        + &service("empty", "10.0.0.1", "type: ClusterIP")
        + &slice("a", "nobody", &[":80"], &["10.1.0.1"]);
    insta::assert_snapshot!(case(&yaml), @r"
    error: case.yaml, document 4: Service default/empty: spec.ports: missing: the service has no port
    error: case.yaml, document 3: Service default/unassigned: spec.clusterIP: missing: set one, because affinity does not assign addresses
    ");
}

#[test]
fn what_is_wrong_is_named() {
    let yaml = service(
        "web",
        "10.0.0.1",
        "sessionAffinity: ClientIp; type: NodePort; internalTrafficPolicy: local; externalIPs: [192.0.2.1, x, '2001:db8::1', 127.0.0.1]; \
            ports: [{name: a, port: 80, protocol: SCTP}, {name: b, port: 0, nodePort: 30001}, {name: c, port: 1, protocol: tcp, nodePort: 70000}, {name: d, port: 2}, {name: e, port: 2}, {port: 3}, {name: D, port: 4}]",
    ) + &service("v6", "'fd00::x'", "ports: [{port: 80}]")
        + &service("both", "10.0.0.2", "clusterIPs: [10.0.0.3, 10.0.0.3, 127.0.0.1]; ports: [{port: 80}]")
        + &service("Upper", "10.0.0.4", "ports: [{port: 80}]")
        + &service(
            "long",
            "10.0.0.5",
            "sessionAffinity: ClientIP; sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}; ports: [{port: 80}]",
        )
        + &pinned("typo", "10.0.0.6", &["timer: connect", "tiemout: 3s"])
        + &pinned("none", "10.0.0.7", &["timer: packet", "selekt: least"]).replace("ClientIP", "None")
        + &slice("s", "v6", &[":80"], &["10.1.0.1", "127.0.0.1", "10.1.0.300", "10.1.0.4"]).replace("IPv4", "IPv6")
        + &slice("t", "v6", &[":0", "x:70000"], &["127.0.0.1", "0.0.0.0", "169.254.0.1", "10.1.0.300"])
        + &slice("u", "v6", &[], &[]).replace("IPv4", "FQDN")
        + "---\n{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: v}, addressType: IPv4, endpoints: [{addresses: []}]}";
    let problems: Vec<String> = case(&yaml)
        .lines()
        .filter(|line| line.contains("case.yaml"))
        .map(|line| line.replace("case.yaml, ", ""))
        .collect();
    insta::assert_snapshot!(problems.join("\n"), @r#"
    error: document 8: EndpointSlice default/s: endpoints[0].addresses[0]: 10.1.0.1 is not of the slice's addressType
    error: document 8: EndpointSlice default/s: endpoints[1].addresses[0]: 127.0.0.1 is not of the slice's addressType
    error: document 8: EndpointSlice default/s: endpoints[2].addresses[0]: "10.1.0.300" is not an IP address; the endpoint is ignored
    error: document 8: EndpointSlice default/s: endpoints[3].addresses[0]: 10.1.0.4 is not of the slice's addressType
    error: document 9: EndpointSlice default/t: endpoints[0].addresses[0]: 127.0.0.1 cannot be the address of an endpoint
    error: document 9: EndpointSlice default/t: endpoints[1].addresses[0]: 0.0.0.0 cannot be the address of an endpoint
    error: document 9: EndpointSlice default/t: endpoints[2].addresses[0]: 169.254.0.1 cannot be the address of an endpoint
    error: document 9: EndpointSlice default/t: endpoints[3].addresses[0]: "10.1.0.300" is not an IP address; the endpoint is ignored
    error: document 9: EndpointSlice default/t: ports[0].port: not within 1 to 65535; the port is ignored
    error: document 9: EndpointSlice default/t: ports[1].port: not within 1 to 65535; the port is ignored
    warning: document 10: EndpointSlice default/u: addressType: "FQDN" is not one of IPv4, IPv6; the slice is ignored
    info: document 11: EndpointSlice default/v: metadata.labels: kubernetes.io/service-name is missing; the slice is ignored
    error: document 4: Service default/Upper: metadata.name: not a DNS label (a-z, 0-9, '-', at most 63)
    warning: document 3: Service default/both: spec.clusterIP: "10.0.0.2" differs from spec.clusterIPs[0], "10.0.0.3"; that one is used
    warning: document 3: Service default/both: spec.clusterIPs[1]: 10.0.0.3 is listed twice
    error: document 3: Service default/both: spec.clusterIPs[2]: 127.0.0.1 cannot be the address of a service
    warning: document 5: Service default/long: spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is not within 1 to 86400; 10800 is used (for longer: annotation affinity.dev/timeout)
    warning: document 7: Service default/none: metadata.annotations[affinity.dev/selekt]: unknown annotation; known annotations are affinity.dev/timer, affinity.dev/select, affinity.dev/client-prefix-v4, affinity.dev/client-prefix-v6, affinity.dev/group, affinity.dev/timeout
    warning: document 7: Service default/none: metadata.annotations[affinity.dev/timer]: has no effect without spec.sessionAffinity: ClientIP
    warning: document 6: Service default/typo: metadata.annotations[affinity.dev/tiemout]: unknown annotation; known annotations are affinity.dev/timer, affinity.dev/select, affinity.dev/client-prefix-v4, affinity.dev/client-prefix-v6, affinity.dev/group, affinity.dev/timeout
    warning: document 6: Service default/typo: metadata.annotations[affinity.dev/timer]: "connect" is not one of connection, packet, absolute, alive; connection is used
    error: document 2: Service default/v6: spec.clusterIP: "fd00::x" is not an IP address
    error: document 1: Service default/web: spec.externalIPs[1]: "x" is not an IP address
    error: document 1: Service default/web: spec.externalIPs[3]: 127.0.0.1 cannot be the address of a service
    info: document 1: Service default/web: spec.externalIPs: 2001:db8::1 is ignored: the service has no cluster IP of its family
    warning: document 1: Service default/web: spec.ports[0].nodePort: missing: set one, because affinity does not assign node ports
    warning: document 1: Service default/web: spec.ports[3].nodePort: missing: set one, because affinity does not assign node ports
    warning: document 1: Service default/web: spec.ports[4].nodePort: missing: set one, because affinity does not assign node ports
    warning: document 1: Service default/web: spec.ports[5].nodePort: missing: set one, because affinity does not assign node ports
    warning: document 1: Service default/web: spec.ports[6].nodePort: missing: set one, because affinity does not assign node ports
    error: document 1: Service default/web: spec.ports[1].port: 0 is not a port from 1 to 65535; the port is ignored
    error: document 1: Service default/web: spec.ports[2].protocol: "tcp" is not one of TCP, UDP, SCTP; the port is ignored
    error: document 1: Service default/web: spec.ports[4]: has the same name, number or node port as spec.ports[3]; it is ignored
    warning: document 1: Service default/web: spec.ports[5].name: missing: a service with several ports must name them
    error: document 1: Service default/web: spec.ports[6].name: not a DNS label (a-z, 0-9, '-', at most 63); the port is ignored
    error: document 1: Service default/web: spec.sessionAffinity: "ClientIp" is not one of ClientIP, None; None is used
    error: document 1: Service default/web: spec.internalTrafficPolicy: "local" is not one of Cluster, Local; Cluster is used
    "#);
}

/// The node of the cases below: two addresses of each family, and a network of pods of each.
fn here() -> NodeFacts {
    let network = |text: &str| text.parse().expect("a network");
    NodeFacts {
        name: Some("here".to_owned()),
        addresses: ["192.0.2.1", "2001:db8::1"].iter().map(|text| text.parse().expect("an address")).collect(),
        pod_networks: vec![network("10.1.0.0/16"), network("fd01::/16")],
        ..NodeFacts::default()
    }
}

/// A slice of one port 80 over endpoints `address@node`, with `=conditions` or `~zones/nodes` after it.
fn placed(service: &str, endpoints: &[&str]) -> String {
    let mut yaml = slice(service, service, &[":80"], &[]);
    let endpoints: Vec<String> = endpoints
        .iter()
        .map(|text| {
            let (text, hints) = text.split_once('~').unwrap_or((text, "/"));
            let (text, condition) = text.split_once('=').unwrap_or((text, "ready"));
            let (address, node) = text.split_once('@').expect("address@node");
            let (zones, nodes) = hints.split_once('/').expect("zones/nodes");
            let names =
                |list: &str| list.split_terminator('+').map(|name| format!("{{name: {name}}}")).collect::<Vec<_>>();
            let conditions = match condition {
                "ready" => "ready: true",
                "leaving" => "ready: false, serving: true, terminating: true",
                _ => "ready: false, serving: false",
            };
            format!(
                "{{addresses: [\"{address}\"], nodeName: {node}, conditions: {{{conditions}}}, \
                 hints: {{forZones: [{}], forNodes: [{}]}}}}",
                names(zones).join(", "),
                names(nodes).join(", ")
            )
        })
        .collect();
    yaml = yaml.replace("endpoints: []", &format!("endpoints: [{}]", endpoints.join(", ")));
    if endpoints.iter().any(|endpoint| endpoint.contains("::")) {
        yaml = yaml.replace("IPv4", "IPv6");
    }
    yaml
}

/// The frontend lines of a case: those that contain `which`.
fn lines(text: &str, which: &str) -> String {
    text.lines().filter(|line| line.contains(which)).collect::<Vec<_>>().join("\n")
}

const EXPOSED: &str = "clusterIPs: [10.0.0.1, 'fd00::1']; type: LoadBalancer; externalIPs: [203.0.113.1]; \
    loadBalancerSourceRanges: [198.51.100.0/24, 198.51.100.7/24]; ports: [{port: 80, nodePort: 30080}]; \
    healthCheckNodePort: 32000";

fn exposed(policies: &str) -> String {
    service("web", "10.0.0.1", [EXPOSED, policies].join("; ").trim_end_matches("; "))
        + "status: {loadBalancer: {ingress: [{ip: 203.0.113.2}, {ip: 203.0.113.3, ipMode: Proxy}, {hostname: x}, \
           {ip: '2001:db8::5', ipMode: VIP}]}}\n"
}

#[test]
fn every_kind_of_frontend() {
    let yaml = exposed("") + &placed("web", &["10.1.0.1@here", "10.1.0.2@there"]);
    insta::assert_snapshot!(case_at(here(), None, &yaml), @r"
    10.0.0.1:80/TCP -> default/web:80/TCP/v4, external default/web:80/TCP/v4 masqueraded
    127.0.0.1:30080/TCP -> default/web:80/TCP/v4 masqueraded
    192.0.2.1:30080/TCP -> default/web:80/TCP/v4 masqueraded
    203.0.113.1:80/TCP -> default/web:80/TCP/v4 masqueraded
    203.0.113.2:80/TCP -> default/web:80/TCP/v4 masqueraded, in ranges
    [::1]:30080/TCP -> default/web:80/TCP/v6 masqueraded
    [2001:db8::1]:30080/TCP -> default/web:80/TCP/v6 masqueraded
    [2001:db8::5]:80/TCP -> default/web:80/TCP/v6 masqueraded
    [fd00::1]:80/TCP -> default/web:80/TCP/v6, external default/web:80/TCP/v6 masqueraded
    ranges of default/web: 198.51.100.0/24
    default/web:80/TCP/v4 Random
      10.1.0.1  port 80 ready local
      10.1.0.2  port 80 ready
    default/web:80/TCP/v6 Random
    ");
    let local = exposed("externalTrafficPolicy: Local; internalTrafficPolicy: Local")
        + &placed("web", &["10.1.0.1@here", "10.1.0.2@there"]);
    insta::assert_snapshot!(case_at(here(), None, &local), @r"
    10.0.0.1:80/TCP -> default/web:80/TCP/v4/local, external default/web:80/TCP/v4/local masqueraded
    127.0.0.1:30080/TCP -> default/web:80/TCP/v4, external default/web:80/TCP/v4/local
    192.0.2.1:30080/TCP -> default/web:80/TCP/v4, external default/web:80/TCP/v4/local
    203.0.113.1:80/TCP -> default/web:80/TCP/v4, external default/web:80/TCP/v4/local
    203.0.113.2:80/TCP -> default/web:80/TCP/v4, external default/web:80/TCP/v4/local, in ranges
    [::1]:30080/TCP -> default/web:80/TCP/v6, external default/web:80/TCP/v6/local
    [2001:db8::1]:30080/TCP -> default/web:80/TCP/v6, external default/web:80/TCP/v6/local
    [2001:db8::5]:80/TCP -> default/web:80/TCP/v6, external default/web:80/TCP/v6/local
    [fd00::1]:80/TCP -> default/web:80/TCP/v6/local, external default/web:80/TCP/v6/local masqueraded
    ranges of default/web: 198.51.100.0/24
    health of default/web at 32000: {V4: 1, V6: 0}
    default/web:80/TCP/v4 Random
      10.1.0.1  port 80 ready local
      10.1.0.2  port 80 ready
    default/web:80/TCP/v4/local Random
      10.1.0.1  port 80 ready local
      10.1.0.2  port 80 draining
    default/web:80/TCP/v6 Random
    default/web:80/TCP/v6/local Random
    ");
}

#[test]
fn without_endpoints_here_outsiders_are_not_answered_and_without_any_they_are_refused() {
    let local = "externalTrafficPolicy: Local; internalTrafficPolicy: Local";
    let of =
        |endpoints: &[&str]| lines(&case_at(here(), None, &(exposed(local) + &placed("web", endpoints))), "0.0.1:80");
    insta::assert_snapshot!(of(&["10.1.0.2@there"]), @"10.0.0.1:80/TCP -> default/web:80/TCP/v4/local drop-if-no-local, external default/web:80/TCP/v4/local masqueraded drop-if-no-local");
    insta::assert_snapshot!(of(&["10.1.0.2@there=leaving", "10.1.0.1@here=unready"]), @"10.0.0.1:80/TCP -> default/web:80/TCP/v4/local drop-if-no-local, external default/web:80/TCP/v4/local masqueraded drop-if-no-local");
    insta::assert_snapshot!(of(&["10.1.0.2@there=unready", "10.1.0.1@here=unready"]), @"10.0.0.1:80/TCP -> default/web:80/TCP/v4/local, external default/web:80/TCP/v4/local masqueraded");
    insta::assert_snapshot!(of(&["10.1.0.2@there", "10.1.0.1@here=leaving"]), @"10.0.0.1:80/TCP -> default/web:80/TCP/v4/local, external default/web:80/TCP/v4/local masqueraded");
}

#[test]
fn pools_of_the_cluster_and_of_the_node_fall_back_on_their_own() {
    let of = |endpoints: &[&str]| {
        let yaml = exposed("externalTrafficPolicy: Local") + &placed("web", endpoints);
        let case = case_at(here(), None, &yaml);
        let lines = case.lines().skip_while(|line| !line.starts_with("default/web:80/TCP/v4"));
        lines.take_while(|line| !line.starts_with("default/web:80/TCP/v6")).collect::<Vec<_>>().join("\n")
    };
    insta::assert_snapshot!(of(&["10.1.0.1@here=leaving", "10.1.0.2@here=unready", "10.1.0.3@there", "10.1.0.4@there=leaving"]), @r"
    default/web:80/TCP/v4 Random
      10.1.0.1  port 80 draining local
      10.1.0.2  port 80 draining local
      10.1.0.3  port 80 ready
      10.1.0.4  port 80 draining
    default/web:80/TCP/v4/local Random
      10.1.0.1  port 80 ready local
      10.1.0.2  port 80 draining local
      10.1.0.3  port 80 draining
      10.1.0.4  port 80 draining
    ");
    insta::assert_snapshot!(of(&["10.1.0.1@here=leaving", "10.1.0.3@there=leaving", "10.1.0.4@there=unready"]), @r"
    default/web:80/TCP/v4 Random
      10.1.0.1  port 80 ready local
      10.1.0.3  port 80 ready
      10.1.0.4  port 80 draining
    default/web:80/TCP/v4/local Random
      10.1.0.1  port 80 ready local
      10.1.0.3  port 80 draining
      10.1.0.4  port 80 draining
    ");
    insta::assert_snapshot!(of(&["10.1.0.1@here", "10.1.0.2@here=leaving"]), @r"
    default/web:80/TCP/v4 Random
      10.1.0.1  port 80 ready local
      10.1.0.2  port 80 draining local
    default/web:80/TCP/v4/local Random
      10.1.0.1  port 80 ready local
      10.1.0.2  port 80 draining local
    ");
}

#[test]
fn hints_count_if_all_ready_endpoints_have_them_and_one_is_for_us() {
    let of = |endpoints: &[&str]| {
        let yaml = service("web", "10.0.0.1", "ports: [{port: 80}]") + &placed("web", endpoints);
        let ready = case_at(here(), Some("z"), &yaml);
        let ready = ready.lines().filter_map(|line| line.strip_suffix(" ready").or(line.strip_suffix(" ready local")));
        ready.map(|line| line.split_whitespace().next().unwrap_or("").to_owned()).collect::<Vec<_>>().join(" ")
    };
    // Node hints before zone hints.
    assert_eq!(of(&["10.1.0.1@here~z/here", "10.1.0.2@there~z/there"]), "10.1.0.1");
    assert_eq!(of(&["10.1.0.1@here~y/there", "10.1.0.2@there~z/here+there"]), "10.1.0.2");
    // One without a node hint, or none for us: zones.
    assert_eq!(of(&["10.1.0.1@here~z/here", "10.1.0.2@there~z/", "10.1.0.3@there~y/there"]), "10.1.0.1 10.1.0.2");
    assert_eq!(of(&["10.1.0.1@here~y/a", "10.1.0.2@there~z+y/b"]), "10.1.0.2");
    // One without a zone hint, or no zone is ours: all.
    assert_eq!(of(&["10.1.0.1@here~z/", "10.1.0.2@there"]), "10.1.0.1 10.1.0.2");
    assert_eq!(of(&["10.1.0.1@here~x/", "10.1.0.2@there~y/"]), "10.1.0.1 10.1.0.2");
    // Endpoints that are not ready do not affect whether hints count, and their own hints are ignored.
    assert_eq!(of(&["10.1.0.1@here~y/", "10.1.0.2@there~z/", "10.1.0.3@there=leaving"]), "10.1.0.2");
    assert_eq!(of(&["10.1.0.1@here=leaving~y/a", "10.1.0.2@there=leaving~z/here"]), "10.1.0.1 10.1.0.2");
    // This node's pool ignores hints.
    let local = service("web", "10.0.0.1", "internalTrafficPolicy: Local; ports: [{port: 80}]");
    let local = local + &placed("web", &["10.1.0.1@here~y/there", "10.1.0.2@there~z/here"]);
    insta::assert_snapshot!(case_at(here(), Some("z"), &local), @r"
    10.0.0.1:80/TCP -> default/web:80/TCP/v4/local, external default/web:80/TCP/v4/local masqueraded
    default/web:80/TCP/v4/local Random
      10.1.0.1  port 80 ready local
      10.1.0.2  port 80 draining
    ");
}

/// The control plane turns it into hints, and a proxy reads nothing else: hints for the zone, or for the node with the zone as
/// fallback. If no endpoint is there, hints are for the remaining ones.
#[test]
fn traffic_distribution_comes_as_hints_and_falls_back() {
    let of = |distribution: &str, endpoints: &[&str]| {
        let spec = format!("trafficDistribution: {distribution}; ports: [{{port: 80}}]");
        let case = case_at(here(), Some("z"), &(service("web", "10.0.0.1", &spec) + &placed("web", endpoints)));
        assert!(!case.contains("warning") && !case.contains("error"), "{case}");
        let ready =
            case.lines().filter(|line| line.contains(" ready")).filter_map(|line| line.split_whitespace().next());
        ready.map(str::to_owned).collect::<Vec<_>>().join(" ")
    };
    for distribution in ["PreferClose", "PreferSameZone"] {
        assert_eq!(of(distribution, &["10.1.0.1@here~z/", "10.1.0.2@near~z/", "10.1.0.3@far~y/"]), "10.1.0.1 10.1.0.2");
        assert_eq!(of(distribution, &["10.1.0.3@far~y/", "10.1.0.4@far~y/"]), "10.1.0.3 10.1.0.4", "none in the zone");
    }
    let [here, near, far] = ["10.1.0.1@here~z/here", "10.1.0.2@near~z/near", "10.1.0.3@far~y/far"];
    assert_eq!(of("PreferSameNode", &[here, near, far]), "10.1.0.1");
    assert_eq!(of("PreferSameNode", &[near, far]), "10.1.0.2", "none on the node");
    assert_eq!(of("PreferSameNode", &[far]), "10.1.0.3", "none in the zone");
}

#[test]
fn without_pod_networks_no_client_of_a_cluster_ip_is_external() {
    let unknown = NodeFacts { pod_networks: Vec::new(), ..here() };
    let yaml = exposed("externalTrafficPolicy: Local") + &placed("web", &["10.1.0.1@here"]);
    insta::assert_snapshot!(lines(&case_at(unknown, None, &yaml), ":80/TCP ->"), @r"
    10.0.0.1:80/TCP -> default/web:80/TCP/v4
    203.0.113.1:80/TCP -> default/web:80/TCP/v4, external default/web:80/TCP/v4/local
    203.0.113.2:80/TCP -> default/web:80/TCP/v4, external default/web:80/TCP/v4/local, in ranges
    [2001:db8::5]:80/TCP -> default/web:80/TCP/v6, external default/web:80/TCP/v6/local
    [fd00::1]:80/TCP -> default/web:80/TCP/v6
    ");
    let only_v4 = NodeFacts { pod_networks: here().pod_networks[..1].to_vec(), ..here() };
    insta::assert_snapshot!(lines(&case_at(only_v4, None, &exposed("")), ":80/TCP ->"), @r"
    10.0.0.1:80/TCP -> default/web:80/TCP/v4, external default/web:80/TCP/v4 masqueraded
    203.0.113.1:80/TCP -> default/web:80/TCP/v4 masqueraded
    203.0.113.2:80/TCP -> default/web:80/TCP/v4 masqueraded, in ranges
    [2001:db8::5]:80/TCP -> default/web:80/TCP/v6 masqueraded
    [fd00::1]:80/TCP -> default/web:80/TCP/v6
    ");
}

#[test]
fn sctp_where_no_port_changes() {
    let port = "type: NodePort; ports: [{port: 80, nodePort: 30080, protocol: SCTP}]";
    let yaml = service("web", "10.0.0.1", port)
        + &placed("web", &["10.1.0.1@here"]).replace("port: 80", "protocol: SCTP, port: 80");
    insta::assert_snapshot!(case_at(here(), None, &yaml), @r"
    10.0.0.1:80/SCTP -> default/web:80/SCTP/v4, external default/web:80/SCTP/v4 masqueraded
    default/web:80/SCTP/v4 Random
      10.1.0.1  port 80 ready local
    warning: case.yaml, document 1: Service default/web: spec.ports[0]: endpoints do not serve port 30080 itself, and SCTP's ports cannot be translated; frontends with that port are ignored
    ");
}

#[test]
fn a_node_port_goes_to_the_older_service() {
    let dated = |name: &str, ip: &str, year: u16, port: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, creationTimestamp: {year}-01-01T00:00:00Z}}\n\
             spec: {{clusterIP: {ip}, type: NodePort, ports: [{port}]}}\n"
        )
    };
    let yaml = dated("a", "10.0.0.1", 2026, "{port: 80, nodePort: 30080}")
        + &dated("b", "10.0.0.2", 2025, "{port: 80, nodePort: 30080}")
        + &dated("c", "10.0.0.3", 2025, "{port: 80, nodePort: 30080, protocol: UDP}");
    insta::assert_snapshot!(case_at(here(), None, &yaml), @r"
    10.0.0.1:80/TCP -> default/a:80/TCP/v4, external default/a:80/TCP/v4 masqueraded
    10.0.0.2:80/TCP -> default/b:80/TCP/v4, external default/b:80/TCP/v4 masqueraded
    10.0.0.3:80/UDP -> default/c:80/UDP/v4, external default/c:80/UDP/v4 masqueraded
    127.0.0.1:30080/TCP -> default/b:80/TCP/v4 masqueraded
    127.0.0.1:30080/UDP -> default/c:80/UDP/v4 masqueraded
    192.0.2.1:30080/TCP -> default/b:80/TCP/v4 masqueraded
    192.0.2.1:30080/UDP -> default/c:80/UDP/v4 masqueraded
    default/a:80/TCP/v4 Random
    default/b:80/TCP/v4 Random
    default/c:80/UDP/v4 Random
    error: case.yaml, document 1: Service default/a: spec.ports[0].nodePort: 30080/TCP is taken by service default/b; this service does not get it
    ");
}

#[test]
fn ranges_have_one_family_each_and_invalid_ones_admit_no_client() {
    let of = |ranges: &str| {
        let yaml = exposed("").replace("[198.51.100.0/24, 198.51.100.7/24]", ranges);
        let text = case_at(here(), None, &yaml);
        let ours = |line: &&str| line.contains("ranges") || line.contains("Ranges");
        text.lines().filter(ours).collect::<Vec<_>>().join("\n")
    };
    insta::assert_snapshot!(of("[198.51.100.0/24]"), @r"
    203.0.113.2:80/TCP -> default/web:80/TCP/v4 masqueraded, in ranges
    ranges of default/web: 198.51.100.0/24
    ");
    insta::assert_snapshot!(of("['2001:db8::/32']"), @r"
    [2001:db8::5]:80/TCP -> default/web:80/TCP/v6 masqueraded, in ranges
    ranges of default/web: 2001:db8::/32
    ");
    insta::assert_snapshot!(of("[198.51.100.0, 'fd00::x/8']"), @r#"
    203.0.113.2:80/TCP -> default/web:80/TCP/v4 masqueraded, in ranges
    [2001:db8::5]:80/TCP -> default/web:80/TCP/v6 masqueraded, in ranges
    error: case.yaml: Service default/web: spec.loadBalancerSourceRanges[0]: "198.51.100.0" is not a network: expected ADDRESS/LENGTH, such as 10.0.0.0/8 or fd00::/8
    error: case.yaml: Service default/web: spec.loadBalancerSourceRanges[1]: "fd00::x/8" is not a network: expected ADDRESS/LENGTH, such as 10.0.0.0/8 or fd00::/8
    "#);
    insta::assert_snapshot!(of("[]"), @"");
    // A range of length zero admits every client of its family, whatever other ranges there are.
    insta::assert_snapshot!(of("[0.0.0.0/0, 198.51.100.0/24, 198.51.100.0]"), @r#"error: case.yaml: Service default/web: spec.loadBalancerSourceRanges[2]: "198.51.100.0" is not a network: expected ADDRESS/LENGTH, such as 10.0.0.0/8 or fd00::/8"#);
    insta::assert_snapshot!(of("[198.51.100.0/24, '::/0', 'fd00::/8']"), @r"
    203.0.113.2:80/TCP -> default/web:80/TCP/v4 masqueraded, in ranges
    ranges of default/web: 198.51.100.0/24
    ");
}

#[test]
fn addresses_with_leading_zeros_are_decimal_everywhere() {
    let plain = exposed("") + &placed("web", &["10.1.0.8@here"]);
    let mut odd = plain.clone();
    for (address, zeros) in [
        ("10.0.0.1,", "010.000.0.01,"),
        ("10.1.0.8", "10.01.0.08"),
        ("203.0.113.2", "203.0.113.02"),
        ("[198.51.100.0/24", "[198.051.100.0/024"),
    ] {
        assert!(odd.contains(address), "{address} in {odd}");
        odd = odd.replace(address, zeros);
    }
    assert_eq!(case_at(here(), None, &odd), case_at(here(), None, &plain));
}

/// A slice of an address without a pod, with ports (`name:number`).
fn of_address(name: &str, address: &str, ports: &[&str]) -> String {
    let slice = slice(name, "web", ports, &[address]);
    slice.replace(&format!(", targetRef: {{kind: Pod, name: p{}}}", address.replace(['.', ':'], "-")), "")
}

#[test]
fn servers_that_share_an_address_are_told_apart_by_their_ports() {
    let web = service("web", "10.0.0.1", "ports: [{name: http, port: 80}, {name: admin, port: 81}]");
    let both = of_address("a", "192.0.2.1", &["http:8081", "admin:9001"])
        + &of_address("b", "192.0.2.1", &["http:8082", "admin:9001"]);
    insta::assert_snapshot!(case(&(web.clone() + &both)), @r"
    10.0.0.1:80/TCP -> default/web:http/TCP/v4
    10.0.0.1:81/TCP -> default/web:admin/TCP/v4
    default/web:admin/TCP/v4 Random
      192.0.2.1  port 9001 ready
      192.0.2.1 192.0.2.1:8082,9001 port 9001 ready
    default/web:http/TCP/v4 Random
      192.0.2.1  port 8081 ready
      192.0.2.1 192.0.2.1:8082,9001 port 8082 ready
    ");
    // Slices that do not contradict each other describe one server.
    let one = of_address("a", "192.0.2.1", &["http:8081"]) + &of_address("b", "192.0.2.1", &["admin:9001"]);
    insta::assert_snapshot!(case(&(web + &one)), @r"
    10.0.0.1:80/TCP -> default/web:http/TCP/v4
    10.0.0.1:81/TCP -> default/web:admin/TCP/v4
    default/web:admin/TCP/v4 Random
      192.0.2.1  port 9001 ready
    default/web:http/TCP/v4 Random
      192.0.2.1  port 8081 ready
    ");
}

#[test]
fn a_port_that_no_slice_has_says_so() {
    let yaml = service("web", "10.0.0.1", "ports: [{name: http, port: 80}]")
        + &slice("a", "web", &["web:8080", ":53"], &["10.1.0.1"])
        + &slice("b", "web", &["web:8080"], &["10.1.0.2=!ready"])
        + &service("bare", "10.0.0.2", "ports: [{port: 80}]")
        + &slice("c", "bare", &[], &["10.1.0.3"])
        + &service("none", "10.0.0.3", "ports: [{name: http, port: 80}]")
        + &slice("d", "none", &["web:8080"], &["10.1.0.4=!ready"])
        + "---\napiVersion: v1\nkind: Endpoints\nmetadata: {name: web}\n";
    insta::assert_snapshot!(case(&yaml).lines().filter(|line| line.contains(": ")).collect::<Vec<_>>().join("\n"), @r#"
    warning: case.yaml: 1 of kind Endpoints ignored: write the addresses as EndpointSlices
    warning: case.yaml, document 4: Service default/bare: spec.ports[0]: has no endpoints: no EndpointSlice of this service has a TCP port without a name, like this port; the slices have no port
    warning: case.yaml, document 1: Service default/web: spec.ports[0]: has no endpoints: no EndpointSlice of this service has a TCP port named "http", like this port; the slices have "web" (8080/TCP), 53/TCP without a name
    "#);
}

#[test]
fn a_service_changes_its_type_while_it_lives() {
    let mut state = DesiredState::new(Options { node: here(), ..Options::default() });
    let mut text_of = |yaml: &str| {
        state.update(&directory::parse(Path::new("case.yaml"), yaml));
        text(state.desired()).into_iter().filter(|line| line.contains("->")).count()
    };
    let endpoints = placed("web", &["10.1.0.1@here"]);
    let of = |kind: &str| exposed("").replace("type: LoadBalancer", &format!("type: {kind}")) + &endpoints;
    // Cluster IPs, an external IP; node ports at two addresses and two of loopback; two of the load balancer.
    assert_eq!(text_of(&of("ClusterIP")), 3);
    assert_eq!(text_of(&of("NodePort")), 7);
    assert_eq!(text_of(&of("LoadBalancer")), 9);
    assert_eq!(text_of(&of("ClusterIP")), 3);
    assert_eq!(text_of(&of("ExternalName")), 0);
}
