//! kube-proxy's iptables mode. Its chains are named by 16 characters of a hash; here they are numbered, in as many.

use std::fmt::Write;

use super::{MASQUERADE_MARK, POD_CIDR, ServicePort};

/// The input for `iptables-restore`.
pub(super) fn rules(ports: &[ServicePort]) -> String {
    let mut filter = FILTER.replace("%MARK%", MASQUERADE_MARK);
    let mut chains = NAT_CHAINS.to_owned();
    let mut services = NAT_JUMPS.replace("%MARK%", MASQUERADE_MARK);
    let mut details = String::new();
    for (number, port) in ports.iter().enumerate() {
        let ServicePort { name, protocol, cluster_ip, port: dport, .. } = port;
        let to_port = format!("-d {cluster_ip}/32 -p {protocol} -m {protocol} --dport {dport}");
        let comment = format!("-m comment --comment \"{name}\"");
        if port.endpoints.is_empty() {
            let reject = "-j REJECT --reject-with icmp-port-unreachable";
            let _ = writeln!(filter, "-A KUBE-SERVICES {comment} {to_port} {reject}");
        } else {
            let chain = format!("KUBE-SVC-{number:016}");
            let _ = writeln!(chains, ":{chain} - [0:0]");
            let _ = writeln!(services, "-A KUBE-SERVICES {comment} {to_port} -j {chain}");
            let _ = writeln!(details, "-A {chain} {to_port} ! -s {POD_CIDR} -j KUBE-MARK-MASQ");
            service_chain(number, port, &mut chains, &mut details);
        }
    }
    services += "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n";
    format!("{filter}COMMIT\n{chains}{services}{details}COMMIT\n")
}

/// One rule for each endpoint's list of recent clients, then the dice; and a chain for each endpoint.
fn service_chain(number: usize, port: &ServicePort, chains: &mut String, details: &mut String) {
    let ServicePort { protocol, affinity_timeout_s, endpoints, .. } = port;
    let service = format!("KUBE-SVC-{number:016}");
    let chain_of = |endpoint: usize| format!("KUBE-SEP-{number:08}{endpoint:08}");
    if let Some(timeout_s) = affinity_timeout_s {
        for endpoint in (0..endpoints.len()).map(chain_of) {
            let _ = writeln!(
                details,
                "-A {service} -m recent --name {endpoint} --rcheck --seconds {timeout_s} --reap -j {endpoint}"
            );
        }
    }
    for endpoint in 0..endpoints.len() {
        let dice = match endpoints.len() - endpoint {
            1 => String::new(),
            left => format!("-m statistic --mode random --probability {:.11} ", 1.0 / left as f64),
        };
        let _ = writeln!(details, "-A {service} {dice}-j {}", chain_of(endpoint));
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        let chain = chain_of(index);
        let _ = writeln!(chains, ":{chain} - [0:0]");
        let _ = writeln!(details, "-A {chain} -s {}/32 -j KUBE-MARK-MASQ", endpoint.address);
        let set = match affinity_timeout_s {
            Some(_) => format!("-m recent --name {chain} --set "),
            None => String::new(),
        };
        let to = format!("{}:{}", endpoint.address, endpoint.port);
        let _ = writeln!(details, "-A {chain} {set}-p {protocol} -j DNAT --to-destination {to}");
    }
}

const FILTER: &str = "\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A INPUT -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark %MARK%/%MARK% -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
";

const NAT_CHAINS: &str = "\
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
";

const NAT_JUMPS: &str = "\
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark %MARK%/%MARK% -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark %MARK%
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark %MARK%
";
