//! kube-proxy's nftables mode.

use std::fmt::Write;

use super::{MASQUERADE_MARK, POD_CIDR, ServicePort};

/// The input for `nft -f`.
pub(super) fn rules(ports: &[ServicePort]) -> String {
    let mut chains = String::new();
    let (mut cluster_ips, mut service_ips, mut rejected) = (Vec::new(), Vec::new(), Vec::new());
    for (number, port) in ports.iter().enumerate() {
        let ServicePort { protocol, cluster_ip, port: dport, .. } = port;
        cluster_ips.push(cluster_ip.clone());
        if port.endpoints.is_empty() {
            rejected.push(format!("{cluster_ip} . {protocol} . {dport} comment \"{}\" : goto reject-chain", port.name));
        } else {
            service_ips
                .push(format!("{cluster_ip} . {protocol} . {dport} comment \"{}\" : goto service-{number}", port.name));
            service_chain(number, port, &mut chains);
        }
    }
    cluster_ips.sort_unstable();
    cluster_ips.dedup();
    BASE.replace("%MARK%", MASQUERADE_MARK)
        .replace("%POD_CIDR%", POD_CIDR)
        .replace("%CLUSTER_IPS%", &elements(&cluster_ips))
        .replace("%SERVICE_IPS%", &elements(&service_ips))
        .replace("%REJECTED%", &elements(&rejected))
        .replace("%CHAINS%", &chains)
}

fn elements(list: &[String]) -> String {
    if list.is_empty() { String::new() } else { format!("elements = {{ {} }}", list.join(", ")) }
}

/// Without affinity one rule that chooses and translates. With it, a set of clients and a chain for each endpoint.
fn service_chain(number: usize, port: &ServicePort, text: &mut String) {
    let ServicePort { protocol, cluster_ip, port: dport, affinity_timeout_s, endpoints, .. } = port;
    let count = endpoints.len();
    let mark =
        format!("ip daddr {cluster_ip} {protocol} dport {dport} ip saddr != {POD_CIDR} jump mark-for-masquerade");
    let Some(timeout_s) = affinity_timeout_s else {
        let to: Vec<String> = endpoints
            .iter()
            .enumerate()
            .map(|(index, endpoint)| format!("{index} : {} . {}", endpoint.address, endpoint.port))
            .collect();
        let _ = writeln!(
            text,
            "chain service-{number} {{\n {mark}\n meta l4proto {protocol} dnat ip addr . port to numgen random mod \
             {count} map {{ {} }}\n}}",
            to.join(", ")
        );
        return;
    };
    let mut service = format!("chain service-{number} {{\n {mark}\n");
    for (index, endpoint) in endpoints.iter().enumerate() {
        let id = format!("{number}-{index}");
        let _ = writeln!(
            text,
            "set affinity-{id} {{ type ipv4_addr; flags dynamic,timeout; timeout {timeout_s}s; }}\n\
             chain endpoint-{id} {{\n ip saddr {address} jump mark-for-masquerade\n update @affinity-{id} {{ ip saddr }}\n \
             meta l4proto {protocol} dnat to {address}:{port}\n}}",
            address = endpoint.address,
            port = endpoint.port
        );
        let _ = writeln!(service, " ip saddr @affinity-{id} goto endpoint-{id}");
    }
    let goto: Vec<String> = (0..count).map(|index| format!("{index} : goto endpoint-{number}-{index}")).collect();
    let _ = writeln!(text, "{service} numgen random mod {count} vmap {{ {} }}\n}}", goto.join(", "));
}

const BASE: &str = "\
table ip kube-proxy
delete table ip kube-proxy
table ip kube-proxy {
chain mark-for-masquerade { meta mark set mark or %MARK%; }
chain masquerading {
 meta mark & %MARK% == 0 return
 meta mark set mark xor %MARK%
 masquerade fully-random
}
chain reject-chain { reject; }
%CHAINS%
set cluster-ips { type ipv4_addr; %CLUSTER_IPS%; }
map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; %SERVICE_IPS%; }
map service-nodeports { type inet_proto . inet_service : verdict; }
map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; %REJECTED%; }
map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }
chain services {
 ip daddr . meta l4proto . th dport vmap @service-ips
 fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports
}
chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
chain nat-output { type nat hook output priority -100; jump services; }
chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
chain service-endpoints-check {
 ip daddr . meta l4proto . th dport vmap @no-endpoint-services
 fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @no-endpoint-nodeports
}
chain cluster-ips-check { ip daddr @cluster-ips reject; }
chain filter-input { type filter hook input priority -110; ct state new jump service-endpoints-check; }
chain filter-forward {
 type filter hook forward priority -110
 ct state new jump service-endpoints-check
 ct state new jump cluster-ips-check
}
chain filter-output {
 type filter hook output priority -110
 ct state new jump service-endpoints-check
 ct state new jump cluster-ips-check
}
}
";
