//! kube-proxy's rules as a function, and the known differences of each proxy.

use std::collections::BTreeSet;

use affinity_tests::lab::{EndpointState, FIRST_OF_B, Frontend, Policy};
use affinity_tests::proxy::{Failure, Met, Proxy, Seen};

use crate::cases::{Case, IpMode, Meant, Source, Spec};

/// All results that a client can get at one frontend.
pub(crate) type Outcome = BTreeSet<Met>;

/// The expected outcome for a client.
pub(crate) fn outcome(case: &Case) -> Outcome {
    let Case { spec, frontend, source, .. } = case;
    let inside = matches!(source, Source::Pod(_));
    let [cluster, local] = [usable(spec, |pod| is_meant_for_us(spec, pod)), usable(spec, |pod| pod < FIRST_OF_B)];
    if *frontend == Frontend::Unclaimed {
        return Outcome::from([Err(Failure::Silence)]);
    }
    if *frontend == Frontend::LoadBalancer && spec.ip_mode == IpMode::Proxy {
        return Outcome::from([Err(Failure::Silence)]);
    }
    if cluster.is_empty() {
        return Outcome::from([Err(Failure::Refused)]);
    }
    if *frontend == Frontend::LoadBalancer && !spec.ranges.let_in(*source, case.family) {
        return Outcome::from([Err(Failure::Silence)]);
    }
    let (pool, is_masqueraded) = match (frontend.is_external(), spec.internal, spec.external) {
        (false, Policy::Cluster, _) => (cluster, !inside),
        (false, Policy::Local, _) => (local, !inside),
        (true, _, Policy::Cluster) => (cluster, true),
        (true, _, Policy::Local) if source.is_outside() || *source == Source::NodeB => (local, false),
        (true, _, Policy::Local) => (cluster, *source == Source::Node),
    };
    if pool.is_empty() {
        return Outcome::from([Err(Failure::Silence)]);
    }
    let answer = |pod: &usize| {
        let is_hairpin = *source == Source::Pod(*pod);
        Ok((*pod, if is_masqueraded || is_hairpin { Seen::Node } else { Seen::Client }))
    };
    pool.iter().map(answer).collect()
}

/// How many endpoints on node A are ready.
pub(crate) fn local_ready(spec: &Spec) -> usize {
    spec.endpoints.iter().filter(|(pod, state)| *pod < FIRST_OF_B && *state == EndpointState::Ready).count()
}

/// Whether an endpoint may be used on node A if there is a choice: hints count if every ready endpoint has one, and any of them
/// is for node A. Endpoints that are not ready are used only if there is no choice.
fn is_meant_for_us(spec: &Spec, pod: usize) -> bool {
    let is_ready = |pod: usize| spec.endpoints.contains(&(pod, EndpointState::Ready));
    let ours = |is_ours: fn(usize) -> bool| {
        let is_there = spec.endpoints.iter().any(|(pod, _)| is_ready(*pod) && is_ours(*pod));
        !is_there || !is_ready(pod) || is_ours(pod)
    };
    let is_first_ready = spec.endpoints.first().is_some_and(|(pod, _)| is_ready(*pod));
    match spec.meant {
        Meant::Unsaid => true,
        Meant::Incomplete if is_first_ready => true,
        Meant::ForNodes | Meant::ForZones | Meant::Incomplete | Meant::ForAnother => ours(|pod| pod < FIRST_OF_B),
        Meant::Crossed => ours(|pod| pod >= FIRST_OF_B),
    }
}

/// The ready ones; if there are none, the terminating ones that still serve.
pub(crate) fn usable(spec: &Spec, is_meant: impl Fn(usize) -> bool) -> Vec<usize> {
    let in_state = |wanted| {
        let pods = spec.endpoints.iter().filter(|(pod, state)| *state == wanted && is_meant(*pod));
        pods.map(|(pod, _)| *pod).collect::<Vec<_>>()
    };
    let ready = in_state(EndpointState::Ready);
    if ready.is_empty() { in_state(EndpointState::Terminating) } else { ready }
}

/// Whether there is an expected answer. For all other clients, loopback is another node. If a pod of node B reached another pod
/// of node B through node A with its own address, the reply would go directly, and node A would never see it.
pub(crate) fn can_be_asked(case: &Case) -> bool {
    let from_b = matches!(case.source, Source::Pod(pod) if pod >= FIRST_OF_B);
    let by_short_way = |met: &Met| matches!(met, Ok((pod, Seen::Client)) if *pod >= FIRST_OF_B);
    let is_of_another_node = case.frontend == Frontend::Loopback && case.source != Source::Node;
    let goes_by_short_way = || from_b && outcome(case).iter().any(by_short_way);
    !is_of_another_node && !goes_by_short_way()
}

/// A cause for which a proxy may behave differently.
pub(crate) struct Difference {
    pub(crate) of: &'static [Proxy],
    pub(crate) reason: &'static str,
    pub(crate) applies: fn(&Case) -> bool,
    /// The result instead.
    pub(crate) instead: Met,
}

/// All known differences. Each must occur, so that none outlives its cause.
pub(crate) const DIFFERENCES: [Difference; 8] = [
    Difference {
        of: &[Proxy::Iptables],
        reason: "KUBE-EXTERNAL-SERVICES drops what is for a node port without local endpoints, on loopback too",
        applies: |case| {
            let is_local = case.spec.external == Policy::Local;
            case.frontend == Frontend::Loopback && is_local && is_only_elsewhere(case)
        },
        instead: Err(Failure::Silence),
    },
    Difference {
        of: &[Proxy::Iptables, Proxy::Nftables],
        reason: "there are no node ports on loopback (`--nodeport-addresses primary`)",
        applies: |case| case.frontend == Frontend::Loopback,
        instead: Err(Failure::Refused),
    },
    Difference {
        of: &[Proxy::Nftables],
        reason: "the chain cluster-ips rejects what is for other ports of a ClusterIP",
        applies: |case| case.frontend == Frontend::Unclaimed,
        instead: Err(Failure::Refused),
    },
    Difference {
        of: &[Proxy::Iptables],
        reason: "KUBE-EXTERNAL-SERVICES is not looked at for the node's own packets: they leave for nowhere",
        applies: |case| case.source == Source::Node && is_beyond(case) && usable(&case.spec, |_| true).is_empty(),
        instead: Err(Failure::Silence),
    },
    Difference {
        of: &[Proxy::Nftables],
        reason: "filter-output drops the node's own packets before nat-output could send them to the cluster's pool",
        applies: |case| {
            let is_local = case.spec.external == Policy::Local;
            case.source == Source::Node && is_beyond(case) && is_local && is_only_elsewhere(case)
        },
        instead: Err(Failure::Silence),
    },
    Difference {
        of: &[Proxy::Nftables, Proxy::Tc, Proxy::TcRedirect, Proxy::Xdp, Proxy::XdpRedirect],
        reason: "ranges are looked at before endpoints: a source out of range is not told that nobody is there",
        applies: |case| case.frontend == Frontend::LoadBalancer && !case.spec.ranges.let_in(case.source, case.family),
        instead: Err(Failure::Silence),
    },
    Difference {
        of: &Proxy::OURS,
        reason: "a process on the node is told when it connects that nobody will answer, and need not wait",
        applies: |case| {
            let is_local = case.spec.internal == Policy::Local;
            case.source == Source::Node && case.frontend == Frontend::ClusterIp && is_local && is_only_elsewhere(case)
        },
        instead: Err(Failure::Refused),
    },
    Difference {
        of: &Proxy::OURS,
        reason: "when a socket connects, its address is not known yet: ranges are left to the load balancer to look at",
        applies: |case| {
            let has_ranges = case.spec.ranges.all_of(case.family).next().is_some();
            case.source == Source::Node && case.frontend == Frontend::LoadBalancer && has_ranges
        },
        instead: Err(Failure::Silence),
    },
];

/// Whether there are endpoints, and none on node A.
fn is_only_elsewhere(case: &Case) -> bool {
    usable(&case.spec, |pod| pod < FIRST_OF_B).is_empty() && !usable(&case.spec, |_| true).is_empty()
}

/// Whether the frontend is an address that belongs to no node.
fn is_beyond(case: &Case) -> bool {
    let has_ingress = case.frontend == Frontend::LoadBalancer && case.spec.ip_mode != IpMode::Proxy;
    has_ingress || case.frontend == Frontend::ExternalIp
}
