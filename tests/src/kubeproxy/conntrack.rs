//! How kube-proxy handles open connections when endpoints change: it deletes the conntrack entries of datagrams that no serving
//! endpoint answers, so that the next datagram meets the new rules. It does not touch TCP. As in
//! [`CleanStaleEntries`](https://github.com/kubernetes/kubernetes/blob/1601b9e27d8570364d9a1b94be16a0ca7b744a7e/pkg/proxy/conntrack/cleanup.go).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};

use crate::lab::{EndpointState, Family, Lab, Protocol, Service, ServicePort, output};

/// The command that lists and deletes entries: it speaks netlink, as kube-proxy does.
pub(super) const COMMAND: &str = "conntrack";

/// Deletes the entries of one family on node A that are stale under these services.
pub(super) fn delete_stale(family: Family, lab: &Lab, services: &[Service]) -> Result<()> {
    let ip = if family == Family::V4 { "ipv4" } else { "ipv6" };
    // It accepts the options for ports only after the protocol.
    let run = |what, args: &[&str]| output(lab.node().command(COMMAND).args([what, "-f", ip, "-p", "udp"]).args(args));
    let entries = run("-L", &[])?.lines().map(Entry::read).collect::<Result<BTreeSet<_>>>()?;
    let ports: Vec<UdpPort> = services.iter().flat_map(|service| UdpPort::all_of(service, family)).collect();
    for Entry { to, answered_by } in entries.iter().filter(|entry| ports.iter().any(|port| port.is_stale(entry))) {
        let (address, port, answered_by) = (to.ip().to_string(), to.port().to_string(), answered_by.to_string());
        run("-D", &["--orig-dst", &address, "--orig-port-dst", &port, "--reply-src", &answered_by])?;
    }
    Ok(())
}

/// The fields of an entry that kube-proxy reads.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    /// The client's destination.
    to: SocketAddr,
    /// The sender of replies.
    answered_by: IpAddr,
}

impl Entry {
    /// Reads a line of `conntrack -L`: the original direction, then that of replies.
    fn read(line: &str) -> Result<Self> {
        let values = |key: &'static str| line.split_whitespace().filter_map(move |word| word.strip_prefix(key));
        let read = || {
            let to = SocketAddr::new(values("dst=").next()?.parse().ok()?, values("dport=").next()?.parse().ok()?);
            Some(Self { to, answered_by: values("src=").nth(1)?.parse().ok()? })
        };
        read().with_context(|| format!("an entry, not {line}"))
    }
}

/// A service port for datagrams, and the addresses of its endpoints that serve, ready or not.
struct UdpPort {
    port: ServicePort,
    serving: BTreeSet<IpAddr>,
}

impl UdpPort {
    fn all_of(service: &Service, family: Family) -> impl Iterator<Item = Self> {
        let serving = service.endpoints().filter(|(_, state)| *state != EndpointState::NotReady);
        let serving: BTreeSet<IpAddr> = serving.map(|(pod, _)| family.pod(pod)).collect();
        let ports = service.ports_of(family).filter(|port| port.protocol == Protocol::Udp);
        ports.map(move |port| Self { port, serving: serving.clone() })
    }

    /// Whether the entry is for this port, and another endpoint should answer it.
    fn is_stale(&self, entry: &Entry) -> bool {
        let ServicePort { cluster_ip, load_balancer, external_ip, node_port, .. } = &self.port;
        let addresses = [Some(*cluster_ip), *load_balancer, *external_ip];
        let is_ours = addresses.contains(&Some(entry.to)) || *node_port == Some(entry.to.port());
        is_ours && !self.serving.is_empty() && !self.serving.contains(&entry.answered_by)
    }
}
