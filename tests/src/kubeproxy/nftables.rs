//! kube-proxy's nftables mode.

use std::fmt::Write;
use std::net::IpAddr;

use super::MASQUERADE_MARK;
use super::service::{Refusal, ServicePort};
use crate::lab::{Family, Policy};

/// The input for `nft -f`.
pub(super) fn rules(family: Family, ports: &[ServicePort]) -> String {
    let mut text = Text::of(family);
    for port in ports {
        let chains = Chains(port);
        chains.capture(&mut text);
        if port.has_endpoints() && port.is_external() {
            chains.external(&mut text);
        }
        chains.firewall(&mut text);
        for policy in port.policies() {
            chains.service(policy, &mut text);
        }
        chains.endpoints(&mut text);
    }
    for list in [&mut text.cluster_ips, &mut text.hairpins] {
        list.sort_unstable();
        list.dedup();
    }
    BASE.replace("%MARK%", MASQUERADE_MARK)
        .replace("%IP%", text.ip)
        .replace("%ADDRESS%", text.address)
        .replace("%LOOPBACK%", if family == Family::V4 { "127.0.0.0/8" } else { "::1" })
        .replace("%CLUSTER_IPS%", &elements(&text.cluster_ips))
        .replace("%HAIRPINS%", &elements(&text.hairpins))
        .replace("%SERVICE_IPS%", &elements(&text.service_ips))
        .replace("%NODE_PORTS%", &elements(&text.node_ports))
        .replace("%REFUSED%", &elements(&text.refused))
        .replace("%REFUSED_NODE_PORTS%", &elements(&text.refused_node_ports))
        .replace("%FIREWALLS%", &elements(&text.firewalls))
        .replace("%CHAINS%", &text.chains)
}

fn elements(list: &[String]) -> String {
    if list.is_empty() { String::new() } else { format!("elements = {{ {} }}", list.join(", ")) }
}

/// The parts of the input that grow with the services.
struct Text {
    /// The family's word in rules.
    ip: &'static str,
    /// The type of its addresses.
    address: &'static str,
    pods: &'static str,
    chains: String,
    cluster_ips: Vec<String>,
    hairpins: Vec<String>,
    service_ips: Vec<String>,
    node_ports: Vec<String>,
    refused: Vec<String>,
    refused_node_ports: Vec<String>,
    firewalls: Vec<String>,
}

impl Text {
    fn of(family: Family) -> Self {
        let (ip, address) = match family {
            Family::V4 => ("ip", "ipv4_addr"),
            Family::V6 => ("ip6", "ipv6_addr"),
        };
        Self {
            ip,
            address,
            pods: family.pods(),
            chains: String::new(),
            cluster_ips: Vec::new(),
            hairpins: Vec::new(),
            service_ips: Vec::new(),
            node_ports: Vec::new(),
            refused: Vec::new(),
            refused_node_ports: Vec::new(),
            firewalls: Vec::new(),
        }
    }
}

/// The chains of one service port.
struct Chains<'a>(&'a ServicePort);

impl Chains<'_> {
    fn of_policy(&self, policy: Policy) -> String {
        match policy {
            Policy::Cluster => format!("service-{}", self.0.number),
            Policy::Local => format!("local-{}", self.0.number),
        }
    }

    /// An element of a map of addresses.
    fn entry(&self, address: IpAddr, verdict: &str) -> String {
        let ServicePort { name, protocol, port, .. } = self.0;
        format!("{address} . {protocol} . {port} comment \"{name}\" : {verdict}")
    }

    /// An element of a map of node ports.
    fn port_entry(&self, node_port: u16, verdict: &str) -> String {
        let ServicePort { name, protocol, .. } = self.0;
        format!("{protocol} . {node_port} comment \"{name}\" : {verdict}")
    }

    /// Sends packets for a frontend to a chain of the service, or rejects them.
    fn capture(&self, text: &mut Text) {
        let port = self.0;
        text.cluster_ips.push(port.cluster_ip.to_string());
        match port.refusal(port.internal) {
            Some(refusal) => text.refused.push(self.entry(port.cluster_ip, verdict_of(refusal))),
            None => {
                let chain = format!("goto {}", self.of_policy(port.internal));
                text.service_ips.push(self.entry(port.cluster_ip, &chain));
            }
        }
        if port.has_endpoints() {
            let chain = format!("goto external-{}", self.0.number);
            text.service_ips.extend(port.external_addresses().map(|to| self.entry(to, &chain)));
            text.node_ports.extend(port.node_port.map(|number| self.port_entry(number, &chain)));
        }
        if let Some(refusal) = port.refusal(port.external) {
            let verdict = verdict_of(refusal);
            text.refused.extend(port.external_addresses().map(|to| self.entry(to, verdict)));
            text.refused_node_ports.extend(port.node_port.map(|number| self.port_entry(number, verdict)));
        }
    }

    fn external(&self, text: &mut Text) {
        let Text { ip, pods, chains, .. } = text;
        let cluster = self.of_policy(Policy::Cluster);
        let _ = writeln!(chains, "chain external-{} {{", self.0.number);
        let _ = match self.0.external {
            Policy::Cluster => writeln!(chains, " jump mark-for-masquerade"),
            Policy::Local => writeln!(
                chains,
                " {ip} saddr {pods} goto {cluster}\n fib saddr type local jump mark-for-masquerade\n \
                 fib saddr type local goto {cluster}"
            ),
        };
        if self.0.refusal(self.0.external).is_none() {
            let _ = writeln!(chains, " goto {}", self.of_policy(self.0.external));
        }
        let _ = writeln!(chains, "}}");
    }

    /// Packets from outside the source ranges are dropped before they are translated.
    fn firewall(&self, text: &mut Text) {
        let Some(to) = self.0.load_balancer.filter(|_| !self.0.source_ranges.is_empty()) else { return };
        let ranges = self.0.source_ranges.join(", ");
        let _ =
            writeln!(text.chains, "chain firewall-{} {{\n {} saddr != {{ {ranges} }} drop\n}}", self.0.number, text.ip);
        text.firewalls.push(self.entry(to, &format!("goto firewall-{}", self.0.number)));
    }

    /// Without affinity, one rule that chooses and translates. With affinity, each endpoint's set of clients, then random
    /// selection.
    fn service(&self, policy: Policy, text: &mut Text) {
        let ServicePort { protocol, cluster_ip, port, endpoints, affinity_timeout_s, .. } = self.0;
        let Text { ip, pods, chains, hairpins, .. } = text;
        let pool = self.0.pool(policy);
        let _ = writeln!(chains, "chain {} {{", self.of_policy(policy));
        if self.0.internal == policy {
            let to = format!("{ip} daddr {cluster_ip} {protocol} dport {port}");
            let _ = writeln!(chains, " {to} {ip} saddr != {pods} jump mark-for-masquerade");
        }
        if affinity_timeout_s.is_some() {
            for endpoint in pool {
                let id = format!("{}-{endpoint}", self.0.number);
                let _ = writeln!(chains, " {ip} saddr @affinity-{id} goto endpoint-{id}");
            }
            let goto = |(index, endpoint)| format!("{index} : goto endpoint-{}-{endpoint}", self.0.number);
            let goto: Vec<String> = pool.iter().enumerate().map(goto).collect();
            let _ = writeln!(chains, " numgen random mod {} vmap {{ {} }}\n}}", pool.len(), goto.join(", "));
            return;
        }
        let address = |endpoint: &usize| (endpoints[*endpoint].ip(), endpoints[*endpoint].port());
        let to = pool.iter().map(address).enumerate().map(|(index, (ip, port))| format!("{index} : {ip} . {port}"));
        let to = to.collect::<Vec<_>>().join(", ");
        let _ = writeln!(
            chains,
            " meta l4proto {protocol} dnat {ip} addr . port to numgen random mod {} map {{ {to} }}\n}}",
            pool.len()
        );
        hairpins.extend(pool.iter().map(address).map(|(ip, port)| format!("{ip} . {ip} . {protocol} . {port}")));
    }

    /// With affinity, a chain for each endpoint, which remembers the client.
    fn endpoints(&self, text: &mut Text) {
        let Some(timeout_s) = self.0.affinity_timeout_s else { return };
        let Text { ip, address, chains, .. } = text;
        for (index, endpoint) in self.0.used_endpoints() {
            let (id, protocol) = (format!("{}-{index}", self.0.number), self.0.protocol);
            let _ = writeln!(
                chains,
                "set affinity-{id} {{ type {address}; flags dynamic,timeout; timeout {timeout_s}s; }}\n\
                 chain endpoint-{id} {{\n {ip} saddr {} jump mark-for-masquerade\n update @affinity-{id} {{ {ip} saddr }}\n \
                 meta l4proto {protocol} dnat to {endpoint}\n}}",
                endpoint.ip(),
            );
        }
    }
}

fn verdict_of(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Reject => "goto reject-chain",
        Refusal::Drop => "drop",
    }
}

const BASE: &str = "\
table %IP% kube-proxy
delete table %IP% kube-proxy
table %IP% kube-proxy {
chain mark-for-masquerade { meta mark set mark or %MARK%; }
set hairpin-connections { type %ADDRESS% . %ADDRESS% . inet_proto . inet_service; %HAIRPINS%; }
chain masquerading {
 %IP% saddr . %IP% daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
 meta mark & %MARK% == 0 return
 meta mark set mark xor %MARK%
 masquerade fully-random
}
chain reject-chain { reject; }
%CHAINS%
set cluster-ips { type %ADDRESS%; %CLUSTER_IPS%; }
map service-ips { type %ADDRESS% . inet_proto . inet_service : verdict; %SERVICE_IPS%; }
map service-nodeports { type inet_proto . inet_service : verdict; %NODE_PORTS%; }
map no-endpoint-services { type %ADDRESS% . inet_proto . inet_service : verdict; %REFUSED%; }
map no-endpoint-nodeports { type inet_proto . inet_service : verdict; %REFUSED_NODE_PORTS%; }
map firewall-ips { type %ADDRESS% . inet_proto . inet_service : verdict; %FIREWALLS%; }
chain services {
 %IP% daddr . meta l4proto . th dport vmap @service-ips
 fib daddr type local %IP% daddr != %LOOPBACK% meta l4proto . th dport vmap @service-nodeports
}
chain firewall-check { %IP% daddr . meta l4proto . th dport vmap @firewall-ips; }
chain service-endpoints-check { %IP% daddr . meta l4proto . th dport vmap @no-endpoint-services; }
chain nodeport-endpoints-check {
 fib daddr type local %IP% daddr != %LOOPBACK% meta l4proto . th dport vmap @no-endpoint-nodeports
}
chain cluster-ips-check { %IP% daddr @cluster-ips reject; }
chain filter-prerouting { type filter hook prerouting priority -110; ct state new jump firewall-check; }
chain filter-input {
 type filter hook input priority -110
 ct state new jump nodeport-endpoints-check
 ct state new jump service-endpoints-check
}
chain filter-forward {
 type filter hook forward priority -110
 ct state new jump service-endpoints-check
 ct state new jump cluster-ips-check
}
chain filter-output {
 type filter hook output priority -110
 ct state new jump service-endpoints-check
 ct state new jump firewall-check
}
chain filter-output-post-dnat { type filter hook output priority -90; ct state new jump cluster-ips-check; }
chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
chain nat-output { type nat hook output priority -100; jump services; }
chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
}
";
