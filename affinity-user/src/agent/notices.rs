//! Notices for the owners of services: their Service is wrong, it has no endpoint, its pins are evicted.
//!
//! Each notice is sent when its condition begins to hold, and again every [`AGAIN`] while it does, because a cluster keeps
//! Events for that long. A lack of endpoints that lasts less than [`EMPTY_FOR`], as during a rolling update, is not reported.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use crate::{
    desired::{Desired, Pool},
    source::{Notice, Notices, ObjectName, Problem, Severity},
};

/// The text for such a service, in Events and listings.
pub(crate) const CLIENTS_ARE_NODES: &str = "all clients have addresses of cluster nodes: a proxy or NAT in front masquerades \
                                            them, and all clients behind one node share a pin; externalTrafficPolicy: \
                                            Local keeps client addresses for node ports and load balancers";
/// How often to check the conditions.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a service must be without endpoints before it is reported.
const EMPTY_FOR: Duration = Duration::from_secs(30);
/// After how long a notice that still holds is repeated.
const AGAIN: Duration = Duration::from_hours(1);

/// Sends each notice when its condition begins to hold.
pub(super) struct EventRecorder {
    notices: Notices,
    /// The notices that hold, and when they were sent.
    sent: BTreeMap<Notice, Instant>,
    /// Since when services have no endpoint.
    empty_since: BTreeMap<ObjectName, Instant>,
    /// When evictions were reported. An eviction is over when it is noticed.
    evictions: BTreeMap<ObjectName, Instant>,
    /// Services with clients that all look like nodes of the cluster.
    pub(super) clients_are_nodes: BTreeSet<ObjectName>,
}

impl EventRecorder {
    pub(super) fn new(notices: Notices) -> Self {
        Self {
            notices,
            sent: BTreeMap::new(),
            empty_since: BTreeMap::new(),
            evictions: BTreeMap::new(),
            clients_are_nodes: BTreeSet::new(),
        }
    }

    /// Checks all conditions, from the problems and the desired state.
    pub(super) fn look<'a>(&mut self, problems: impl Iterator<Item = &'a Problem>, desired: &Desired, now: Instant) {
        let empty = self.empty(desired, now);
        let masqueraded = self.clients_are_nodes.iter().map(|service| Notice {
            service: service.clone(),
            reason: "ClientsAreNodes",
            message: CLIENTS_ARE_NODES.to_owned(),
        });
        let mut sent = BTreeMap::new();
        for notice in problems.filter_map(misconfigured).chain(empty).chain(masqueraded) {
            let before = self.sent.get(&notice).copied().filter(|before| now.duration_since(*before) < AGAIN);
            // If the queue is full, the next look tries again.
            if before.is_some() || self.notices.send(notice.clone()) {
                sent.insert(notice, before.unwrap_or(now));
            }
        }
        self.sent = sent;
    }

    /// Notices for services without a ready endpoint for [`EMPTY_FOR`].
    fn empty(&mut self, desired: &Desired, now: Instant) -> Vec<Notice> {
        // Pools are in the order of their services.
        let mut pools = desired.pools.iter().map(|(name, pool)| (&name.service, serves(pool))).peekable();
        let mut empty = Vec::new();
        while let Some((service, mut serves)) = pools.next() {
            while let Some((_, other_port)) = pools.next_if(|(of, _)| *of == service) {
                serves |= other_port;
            }
            if !serves {
                empty.push(service);
            }
        }
        let since = |name: &ObjectName| self.empty_since.get(name).copied().unwrap_or(now);
        self.empty_since = empty.into_iter().map(|name| (name.clone(), since(name))).collect();
        let long = self.empty_since.iter().filter(|(_, since)| now.duration_since(**since) >= EMPTY_FOR);
        let message = "no endpoint is ready: connections are rejected";
        let notice = |service: &ObjectName| Notice {
            service: service.clone(),
            reason: "NoEndpoints",
            message: message.to_owned(),
        };
        long.map(|(name, _)| notice(name)).collect()
    }

    /// Reports that pins of this service were evicted from the table of this node.
    pub(super) fn evicted(&mut self, service: &ObjectName, node: &str, now: Instant) {
        if self.evictions.get(service).is_some_and(|before| now.duration_since(*before) < AGAIN) {
            return;
        }
        let message = format!(
            "node {node}: the session table is full: pins are evicted before they expire, and their clients may reach another \
             pod; raise --max-sessions"
        );
        let notice = Notice { service: service.clone(), reason: "PinsEvicted", message };
        if self.notices.send(notice) {
            self.evictions.retain(|_, before| now.duration_since(*before) < AGAIN);
            self.evictions.insert(service.clone(), now);
        }
    }
}

/// Whether any endpoint is ready.
fn serves(pool: &Pool) -> bool {
    pool.members.values().any(|member| member.ready)
}

/// The notice for a problem of a Service, unless it is only informative.
fn misconfigured(problem: &Problem) -> Option<Notice> {
    let object = problem.object.as_ref().filter(|object| object.kind == "Service")?;
    let field = if problem.field.is_empty() { String::new() } else { format!("{}: ", problem.field) };
    (problem.severity > Severity::Info).then(|| Notice {
        service: object.name.clone(),
        reason: "Misconfigured",
        message: format!("{field}{}", problem.message),
    })
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::{
        desired::{self, desired},
        source::directory,
    };

    const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.10, sessionAffinity: ClientIP, ports: [{port: 80}]}
";
    const SLICE: &str = "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: '', port: 8080}]
endpoints: [{addresses: [10.244.0.1]}]
";

    fn desired_of(yaml: &str) -> Desired {
        let snapshot = directory::parse("web.yaml".as_ref(), yaml);
        assert!(snapshot.problems.is_empty(), "{:?}", snapshot.problems);
        desired(&snapshot, &desired::Options::default()).0
    }

    fn reasons(queue: &mut mpsc::Receiver<Notice>) -> Vec<&'static str> {
        std::iter::from_fn(|| queue.try_recv().ok()).map(|notice| notice.reason).collect()
    }

    #[test]
    fn a_service_without_endpoints_is_noticed_once_it_stays_so() {
        let (sender, mut queue) = mpsc::channel(8);
        let mut event_recorder = EventRecorder::new(Notices::new(sender));
        let (empty, full) = (desired_of(SERVICE), desired_of(&format!("{SERVICE}{SLICE}")));
        let start = Instant::now();
        let mut look = |desired: &Desired, after_s: u64| {
            event_recorder.look(std::iter::empty(), desired, start + Duration::from_secs(after_s));
            reasons(&mut queue)
        };
        assert_eq!(look(&empty, 0), [""; 0]);
        assert_eq!(look(&full, 20), [""; 0]);
        assert_eq!(look(&empty, 40), [""; 0], "it had endpoints meanwhile");
        assert_eq!(look(&empty, 70), ["NoEndpoints"]);
        assert_eq!(look(&empty, 72), [""; 0], "once");
        assert_eq!(look(&empty, 70 + 3600), ["NoEndpoints"], "the cluster has forgotten it");
        assert_eq!(look(&full, 4000), [""; 0]);
    }

    #[test]
    fn what_is_wrong_with_a_service_is_noticed_and_nothing_else() {
        let (sender, mut queue) = mpsc::channel(8);
        let mut event_recorder = EventRecorder::new(Notices::new(sender));
        let web = ObjectName::new("shop", "web");
        let problem = |severity, kind: &str| Problem::new(severity, None, "not known").of(kind, &web).field("timer");
        let problems = [
            problem(Severity::Warning, "Service"),
            problem(Severity::Info, "Service"),
            problem(Severity::Error, "EndpointSlice"),
            Problem::new(Severity::Error, None, "of nobody"),
        ];
        event_recorder.look(problems.iter(), &Desired::default(), Instant::now());
        let notice = queue.try_recv().expect("a notice");
        assert_eq!((&notice.service, notice.message.as_str()), (&web, "timer: not known"));
        assert_eq!(reasons(&mut queue), [""; 0]);
        event_recorder.look(problems.iter(), &Desired::default(), Instant::now());
        assert_eq!(reasons(&mut queue), [""; 0], "it is known");
    }

    #[test]
    fn a_full_queue_does_not_block_and_loses_no_current_problem() {
        let (sender, mut queue) = mpsc::channel(1);
        let mut event_recorder = EventRecorder::new(Notices::new(sender));
        let problem = |name| Problem::new(Severity::Error, None, "bad").of("Service", &ObjectName::new("shop", name));
        let problems = [problem("a"), problem("b")];
        for _ in 0..2 {
            event_recorder.look(problems.iter(), &Desired::default(), Instant::now());
            assert_eq!(reasons(&mut queue), ["Misconfigured"]);
        }
    }

    #[test]
    fn clients_that_look_like_nodes_are_noticed_while_they_do() {
        let (sender, mut queue) = mpsc::channel(8);
        let mut event_recorder = EventRecorder::new(Notices::new(sender));
        let start = Instant::now();
        let mut look = |services: &[&str], after_s: u64| {
            event_recorder.clients_are_nodes = services.iter().map(|name| ObjectName::new("shop", name)).collect();
            event_recorder.look(std::iter::empty(), &Desired::default(), start + Duration::from_secs(after_s));
            reasons(&mut queue)
        };
        assert_eq!(look(&["web"], 0), ["ClientsAreNodes"]);
        assert_eq!(look(&["web"], 2), [""; 0], "once");
        assert_eq!(look(&[], 4), [""; 0]);
        assert_eq!(look(&["web", "cart"], 6), ["ClientsAreNodes"; 2]);
    }

    #[test]
    fn evictions_are_noticed_once_in_a_while() {
        let (sender, mut queue) = mpsc::channel(8);
        let mut event_recorder = EventRecorder::new(Notices::new(sender));
        let (web, start) = (ObjectName::new("shop", "web"), Instant::now());
        for after_s in [0, 5, 3599, 3600, 3605] {
            event_recorder.evicted(&web, "node-a", start + Duration::from_secs(after_s));
        }
        assert_eq!(reasons(&mut queue), ["PinsEvicted"; 2]);
    }
}
