//! kube-proxy's iptables mode. Its chain names contain 16 characters of a hash; here those of services contain a number of the
//! same length.

use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;

use super::MASQUERADE_MARK;
use super::service::{Refusal, ServicePort};
use crate::lab::{Family, Policy};

/// The input for `iptables-restore`.
pub(super) fn rules(family: Family, ports: &[ServicePort]) -> String {
    let mut text = Text::of(family);
    for port in ports {
        let chains = Chains(port);
        chains.capture(&mut text);
        chains.internal(&mut text);
        if port.has_endpoints() && port.is_external() {
            chains.external(&mut text);
            chains.firewall(&mut text);
        }
        for policy in port.policies() {
            chains.service(policy, &mut text);
        }
        chains.endpoints(&mut text);
    }
    let Text { filter, chains, services, node_ports, details, .. } = text;
    let filter_base = FILTER.replace("%MARK%", MASQUERADE_MARK);
    let jumps = NAT_JUMPS.replace("%MARK%", MASQUERADE_MARK);
    // As with `--localhost-nodeports=false`; for IPv6 this is the only way.
    let loopback = if family == Family::V4 { "127.0.0.0/8" } else { "::1/128" };
    let last = format!("-A KUBE-SERVICES -m addrtype --dst-type LOCAL ! -d {loopback} -j KUBE-NODEPORTS\n");
    format!("{filter_base}{filter}COMMIT\n{NAT_CHAINS}{chains}{jumps}{services}{last}{node_ports}{details}COMMIT\n")
}

/// The parts of the input that grow with the services.
struct Text {
    family: Family,
    filter: String,
    chains: String,
    services: String,
    node_ports: String,
    details: String,
}

impl Text {
    fn of(family: Family) -> Self {
        let none = String::new;
        Self { family, filter: none(), chains: none(), services: none(), node_ports: none(), details: none() }
    }

    fn refuse(&mut self, chain: &str, what: &str, refusal: Refusal) {
        let target = match (refusal, self.family) {
            (Refusal::Drop, _) => "DROP",
            (Refusal::Reject, Family::V4) => "REJECT --reject-with icmp-port-unreachable",
            (Refusal::Reject, Family::V6) => "REJECT --reject-with icmp6-port-unreachable",
        };
        let _ = writeln!(self.filter, "-A {chain} {what} -j {target}");
    }
}

/// The chains of one service port.
struct Chains<'a>(&'a ServicePort);

impl Chains<'_> {
    fn of_policy(&self, policy: Policy) -> String {
        match policy {
            Policy::Cluster => format!("KUBE-SVC-{:016}", self.0.number),
            Policy::Local => format!("KUBE-SVL-{:016}", self.0.number),
        }
    }

    fn of_external(&self) -> String {
        format!("KUBE-EXT-{:016}", self.0.number)
    }

    fn of_firewall(&self) -> String {
        format!("KUBE-FW-{:016}", self.0.number)
    }

    fn of_endpoint(&self, endpoint: usize) -> String {
        // By the endpoint, not by its index: the list of recent clients with this name must not become another endpoint's when
        // the set of endpoints changes.
        let mut hasher = DefaultHasher::new();
        (&self.0.name, self.0.protocol, self.0.endpoints[endpoint]).hash(&mut hasher);
        format!("KUBE-SEP-{:016X}", hasher.finish())
    }

    fn comment(&self) -> String {
        format!("-m comment --comment \"{}\"", self.0.name)
    }

    fn matches(&self, address: IpAddr) -> String {
        let ServicePort { protocol, port, .. } = self.0;
        format!("-d {address} -p {protocol} -m {protocol} --dport {port}")
    }

    /// Sends packets for a frontend to a chain of the service, or rejects them.
    fn capture(&self, text: &mut Text) {
        let (port, comment) = (self.0, self.comment());
        let mut send = |to: IpAddr, chain: &str| {
            let _ = writeln!(text.services, "-A KUBE-SERVICES {comment} {} -j {chain}", self.matches(to));
        };
        if port.refusal(port.internal).is_none() {
            send(port.cluster_ip, &self.of_policy(port.internal));
        }
        if port.has_endpoints() {
            port.external_ip.iter().for_each(|to| send(*to, &self.of_external()));
            let firewall = if port.source_ranges.is_empty() { self.of_external() } else { self.of_firewall() };
            port.load_balancer.iter().for_each(|to| send(*to, &firewall));
        }
        let node_port = |port: u16| {
            let protocol = self.0.protocol;
            format!("{comment} -p {protocol} -m {protocol} --dport {port}")
        };
        if let Some(number) = port.node_port.filter(|_| port.has_endpoints()) {
            let _ = writeln!(text.node_ports, "-A KUBE-NODEPORTS {} -j {}", node_port(number), self.of_external());
        }
        if let Some(refusal) = port.refusal(port.internal) {
            text.refuse("KUBE-SERVICES", &format!("{comment} {}", self.matches(port.cluster_ip)), refusal);
        }
        if let Some(refusal) = port.refusal(port.external) {
            for to in port.external_addresses() {
                text.refuse("KUBE-EXTERNAL-SERVICES", &format!("{comment} {}", self.matches(to)), refusal);
            }
            if let Some(number) = port.node_port {
                let what = format!("{} -m addrtype --dst-type LOCAL", node_port(number));
                text.refuse("KUBE-EXTERNAL-SERVICES", &what, refusal);
            }
        }
    }

    /// Packets from outside the pod networks to the ClusterIP may have to leave the node again: masqueraded.
    fn internal(&self, text: &mut Text) {
        if self.0.refusal(self.0.internal).is_none() {
            let (chain, to) = (self.of_policy(self.0.internal), self.matches(self.0.cluster_ip));
            let _ = writeln!(text.details, "-A {chain} {to} ! -s {} -j KUBE-MARK-MASQ", text.family.pods());
        }
    }

    fn external(&self, text: &mut Text) {
        let (chain, cluster) = (self.of_external(), self.of_policy(Policy::Cluster));
        let _ = writeln!(text.chains, ":{chain} - [0:0]");
        match self.0.external {
            Policy::Cluster => {
                let _ = writeln!(text.details, "-A {chain} -j KUBE-MARK-MASQ");
            }
            Policy::Local => {
                let pods = text.family.pods();
                let _ = writeln!(
                    text.details,
                    "-A {chain} -s {pods} -j {cluster}\n-A {chain} -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ\n\
                     -A {chain} -m addrtype --src-type LOCAL -j {cluster}"
                );
            }
        }
        if self.0.refusal(self.0.external).is_none() {
            let _ = writeln!(text.details, "-A {chain} -j {}", self.of_policy(self.0.external));
        }
    }

    /// Packets from outside the source ranges are not translated, and the filter drops them.
    fn firewall(&self, text: &mut Text) {
        let Some(to) = self.0.load_balancer.filter(|_| !self.0.source_ranges.is_empty()) else { return };
        let chain = self.of_firewall();
        let _ = writeln!(text.chains, ":{chain} - [0:0]");
        for range in &self.0.source_ranges {
            let _ = writeln!(text.details, "-A {chain} -s {range} -j {}", self.of_external());
        }
        let what = format!("{} {}", self.comment(), self.matches(to));
        text.refuse("KUBE-PROXY-FIREWALL", &what, Refusal::Drop);
    }

    /// One rule for each endpoint's list of recent clients, then random selection.
    fn service(&self, policy: Policy, text: &mut Text) {
        let (chain, pool) = (self.of_policy(policy), self.0.pool(policy));
        let _ = writeln!(text.chains, ":{chain} - [0:0]");
        if let Some(timeout_s) = self.0.affinity_timeout_s {
            for endpoint in pool.iter().map(|endpoint| self.of_endpoint(*endpoint)) {
                let _ = writeln!(
                    text.details,
                    "-A {chain} -m recent --name {endpoint} --rcheck --seconds {timeout_s} --reap -j {endpoint}"
                );
            }
        }
        for (index, endpoint) in pool.iter().enumerate() {
            let dice = match pool.len() - index {
                1 => String::new(),
                left => format!("-m statistic --mode random --probability {:.11} ", 1.0 / left as f64),
            };
            let _ = writeln!(text.details, "-A {chain} {dice}-j {}", self.of_endpoint(*endpoint));
        }
    }

    fn endpoints(&self, text: &mut Text) {
        for (index, endpoint) in self.0.used_endpoints() {
            let chain = self.of_endpoint(index);
            let _ = writeln!(text.chains, ":{chain} - [0:0]");
            // Otherwise a reply to the endpoint itself would never pass the node again.
            let _ = writeln!(text.details, "-A {chain} -s {} -j KUBE-MARK-MASQ", endpoint.ip());
            let set = match self.0.affinity_timeout_s {
                Some(_) => format!("-m recent --name {chain} --set "),
                None => String::new(),
            };
            let protocol = self.0.protocol;
            let _ = writeln!(text.details, "-A {chain} {set}-p {protocol} -j DNAT --to-destination {endpoint}");
        }
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
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
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
