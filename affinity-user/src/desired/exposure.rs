//! How a service is reached from outside of the cluster: node ports, load balancers, external IPs, and their policies.

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    Family, Report,
    service::{Exposure, parse_addresses},
};
use crate::source::{
    api::{ServiceSpec as ApiSpec, ServiceStatus},
    parse_network,
};

/// Reads the part of a service that concerns external clients.
pub(super) fn read(
    spec: &ApiSpec,
    status: Option<&ServiceStatus>,
    cluster_ips: &[IpAddr],
    report: &mut Report<'_>,
) -> Exposure {
    if let Some(other) = spec.type_.as_deref().filter(|kind| !["ClusterIP", "NodePort", "LoadBalancer"].contains(kind))
    {
        report.warning("spec.type", format!("{other:?} is unknown; only the cluster IP is handled"));
    }
    let is_load_balancer = spec.type_.as_deref() == Some("LoadBalancer");
    let external = spec.external_ips.iter().flatten().enumerate();
    let external = external.map(|(index, ip)| (format!("spec.externalIPs[{index}]"), ip));
    let mut exposure = Exposure {
        on_nodes: has_node_ports(spec),
        external_ips: of_its_families(parse_addresses(external, report), cluster_ips, "spec.externalIPs", report),
        ..Exposure::default()
    };
    report_missing_node_ports(spec, report);
    if is_load_balancer {
        let field = "status.loadBalancer.ingress";
        let ingress = parse_addresses(ingress(status, field), report);
        exposure.load_balancer = of_its_families(ingress, cluster_ips, field, report);
        read_ranges(spec, &mut exposure, report);
    }
    let is_reached =
        exposure.on_nodes || is_load_balancer || spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty());
    let is_local = is_local(spec.external_traffic_policy.as_deref(), "externalTrafficPolicy", report);
    exposure.local = is_reached && is_local;
    if exposure.local && is_load_balancer {
        exposure.health_check = health_check(spec, report);
    }
    exposure
}

/// Whether a service's type gives its ports node ports.
pub(super) fn has_node_ports(spec: &ApiSpec) -> bool {
    matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer"))
}

/// Whether a policy is `Local`.
pub(super) fn is_local(policy: Option<&str>, field: &str, report: &mut Report<'_>) -> bool {
    match policy {
        None | Some("" | "Cluster") => false,
        Some("Local") => true,
        Some(other) => {
            report.error(format!("spec.{field}"), format!("{other:?} is not one of Cluster, Local; Cluster is used"));
            false
        }
    }
}

fn report_missing_node_ports(spec: &ApiSpec, report: &mut Report<'_>) {
    if spec.type_.as_deref() != Some("NodePort") {
        return;
    }
    let without = spec.ports.iter().flatten().enumerate().filter(|(_, port)| port.node_port.unwrap_or(0) == 0);
    for (index, _) in without {
        let field = format!("spec.ports[{index}].nodePort");
        report.warning(field, "missing: set one, because affinity does not assign node ports");
    }
}

/// The addresses of a load balancer that the nodes serve. (With `ipMode: Proxy` it sends to the nodes' own addresses.)
fn ingress<'a>(status: Option<&'a ServiceStatus>, field: &str) -> impl Iterator<Item = (String, &'a String)> {
    let ingress = status.and_then(|status| status.load_balancer.as_ref()?.ingress.as_ref());
    let served = ingress.into_iter().flatten().enumerate().filter(|(_, one)| one.ip_mode.as_deref() != Some("Proxy"));
    served.filter_map(move |(index, one)| {
        let ip = one.ip.as_ref().filter(|ip| !ip.is_empty())?;
        Some((format!("{field}[{index}].ip"), ip))
    })
}

/// Keeps the addresses of families in which the service has a cluster IP.
fn of_its_families(
    mut addresses: Vec<IpAddr>,
    cluster_ips: &[IpAddr],
    field: &str,
    report: &mut Report<'_>,
) -> Vec<IpAddr> {
    addresses.retain(|address| {
        let is_of = cluster_ips.iter().any(|ip| Family::of(*ip) == Family::of(*address));
        if !is_of {
            report.info(field, format!("{address} is ignored: the service has no cluster IP of its family"));
        }
        is_of
    });
    addresses
}

/// The ranges of a family apply to that family's addresses. A range that cannot be parsed restricts too, so that no client is
/// admitted by mistake. As in kube-proxy, a range of length zero admits every client of its family, whatever other ranges there
/// are.
fn read_ranges(spec: &ApiSpec, exposure: &mut Exposure, report: &mut Report<'_>) {
    let mut open = BTreeSet::new();
    for (index, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        match parse_network(text) {
            Ok(range) if range.prefix_len() == 0 => _ = open.insert(Family::of(range.addr())),
            Ok(range) => {
                exposure.restricted.insert(Family::of(range.addr()));
                exposure.ranges.insert(range);
            }
            Err(error) => {
                exposure.restricted.insert(if text.contains(':') { Family::V6 } else { Family::V4 });
                report.error(format!("spec.loadBalancerSourceRanges[{index}]"), error.to_string());
            }
        }
    }
    exposure.restricted.retain(|family| !open.contains(family));
    exposure.ranges.retain(|range| !open.contains(&Family::of(range.addr())));
}

fn health_check(spec: &ApiSpec, report: &mut Report<'_>) -> Option<u16> {
    let port = spec.health_check_node_port.filter(|port| *port != 0)?;
    let number = u16::try_from(port).ok();
    if number.is_none() {
        report.error("spec.healthCheckNodePort", format!("{port} is not a port from 1 to 65535; it is not served"));
    }
    number
}
