//! Health checks of services. Load balancers ask every node at a service's `healthCheckNodePort` whether it has endpoints of
//! the service. The answers are those of kube-proxy: 200 with the number of ready endpoints on this node, or 503 if there are
//! none. Load balancers also ask at one port whether the node should get traffic at all: [`super::node_health`].
//!
//! The servers of both run on their own thread, so an answer never waits until a plan is carried out. If a port is taken, this
//! is logged once, and listening is retried.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use tokio::{sync::watch, task::AbortHandle};
use tracing::warn;

use super::{
    node_health::{self, NodeHealth},
    server::{self, Limits},
};
use crate::{
    desired::{Desired, Family, HealthCheck},
    metrics::Vitals,
    source::ObjectName,
    sys::monotonic_ns,
    threads,
};

/// How many connections to one address and port may be open. There is one such pair for each service and address of the node.
const CONNECTIONS: usize = 32;

/// The answer at one address and port.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Answer {
    service: ObjectName,
    local: usize,
}

type Answers = BTreeMap<SocketAddr, Answer>;

/// Answers for the node and its services, until it is dropped.
pub(super) struct HealthChecks {
    answers: watch::Sender<Answers>,
}

impl HealthChecks {
    /// Starts the servers: for the node, and for no service yet.
    ///
    /// # Errors
    /// The system's error if no thread can be started.
    pub(super) fn start(node: NodeHealth, vitals: Arc<Vitals>) -> io::Result<Self> {
        let (answers, changes) = watch::channel(Answers::new());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let servers = Servers { current: Arc::default(), vitals, running: BTreeMap::new(), taken: Arc::default() };
        threads::spawn("health", move || {
            runtime.block_on(async {
                node_health::serve(node, &servers.vitals);
                servers.follow(changes).await;
            });
        })?;
        Ok(Self { answers })
    }

    /// Updates the servers to the desired state.
    pub(super) fn follow(&self, desired: &Desired) {
        let answers = answers(desired);
        self.answers.send_if_modified(|current| {
            let is_news = *current != answers;
            *current = answers;
            is_news
        });
    }
}

/// If two services request one port, the first by name gets it.
fn answers(desired: &Desired) -> Answers {
    let mut answers = Answers::new();
    for (service, HealthCheck { port, local }) in &desired.health_checks {
        for address in &desired.health_addresses {
            // As with kube-proxy, there is no listener for a family that the service does not have.
            let Some(&local) = local.get(&Family::of(*address)) else { continue };
            let answer = Answer { service: service.clone(), local };
            answers.entry(SocketAddr::new(*address, *port)).or_insert(answer);
        }
    }
    answers
}

/// The servers for services, one for each address and port.
struct Servers {
    current: Arc<Mutex<Answers>>,
    vitals: Arc<Vitals>,
    running: BTreeMap<SocketAddr, AbortHandle>,
    /// Ports that a warning was logged for.
    taken: Arc<Mutex<BTreeSet<u16>>>,
}

impl Servers {
    /// Follows changes until the channel closes.
    async fn follow(mut self, mut changes: watch::Receiver<Answers>) {
        while changes.changed().await.is_ok() {
            let answers = changes.borrow_and_update().clone();
            self.running.retain(|at, server| {
                let stays = answers.contains_key(at);
                if !stays {
                    server.abort();
                }
                stays
            });
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) = answers.clone();
            let is_asked = |port: &u16| answers.keys().any(|at| at.port() == *port);
            self.taken.lock().unwrap_or_else(PoisonError::into_inner).retain(is_asked);
            // Let stopped servers end: only then are their ports free.
            tokio::task::yield_now().await;
            for (at, answer) in answers {
                if !self.running.contains_key(&at) {
                    self.start(at, &answer.service);
                }
            }
        }
    }

    fn start(&mut self, at: SocketAddr, service: &ObjectName) {
        let asked = Arc::new(Asked { at, current: Arc::clone(&self.current), vitals: Arc::clone(&self.vitals) });
        let router = Router::new().fallback(answer).with_state(asked);
        let (service, taken) = (service.clone(), Arc::clone(&self.taken));
        let on_taken = move |error| {
            // One warning a port: usually a program has it at all addresses.
            if taken.lock().unwrap_or_else(PoisonError::into_inner).insert(at.port()) {
                warn!("Service {service}: spec.healthCheckNodePort: cannot listen at {at}: {error}");
            }
        };
        let limits = Limits { connections: CONNECTIONS, ..Limits::default() };
        let server = tokio::spawn(server::serve_at(at, router, limits, on_taken));
        self.running.insert(at, server.abort_handle());
    }
}

/// The state of a handler.
struct Asked {
    at: SocketAddr,
    current: Arc<Mutex<Answers>>,
    vitals: Arc<Vitals>,
}

async fn answer(State(asked): State<Arc<Asked>>) -> Response {
    let answer = asked.current.lock().unwrap_or_else(PoisonError::into_inner).get(&asked.at).cloned();
    let Some(answer) = answer else { return StatusCode::SERVICE_UNAVAILABLE.into_response() };
    respond(&answer, asked.vitals.is_healthy(monotonic_ns()).is_ok())
}

fn respond(Answer { service, local }: &Answer, is_healthy: bool) -> Response {
    let status = if *local > 0 && is_healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    // Names are DNS labels, which need no escapes in JSON.
    let body = format!(
        "{{\"service\":{{\"namespace\":\"{}\",\"name\":\"{}\"}},\"localEndpoints\":{local},\"serviceProxyHealthy\":{is_healthy}}}",
        service.namespace, service.name
    );
    let headers = [
        (CONTENT_TYPE.as_str(), "application/json".to_owned()),
        ("x-content-type-options", "nosniff".to_owned()),
        ("x-load-balancing-endpoint-weight", local.to_string()),
    ];
    (status, headers, body).into_response()
}

#[cfg(test)]
pub(super) mod tests {
    use std::{
        io::{Read, Write},
        net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream},
        thread,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::agent::server::tests::ask_beside_half_sent;

    fn ask(at: SocketAddr) -> io::Result<String> {
        ask_for(at, "/")
    }

    /// The whole answer to a request.
    pub(in crate::agent) fn ask_for(at: SocketAddr, path: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect(at)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Asks until the answer is right; fails after too long.
    fn comes_to(at: SocketAddr, is_right: impl Fn(&io::Result<String>) -> bool) -> String {
        let began = Instant::now();
        loop {
            let answer = ask(at);
            if is_right(&answer) {
                return answer.unwrap_or_default();
            }
            assert!(began.elapsed() < Duration::from_secs(10), "{answer:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// A port without a listener, for the moment.
    pub(in crate::agent) fn free_port() -> u16 {
        let listener = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).expect("a port");
        listener.local_addr().expect("its number").port()
    }

    fn desired(port: u16, local: &[(Family, usize)]) -> Desired {
        let check = HealthCheck { port, local: local.iter().copied().collect() };
        let addresses = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        Desired {
            health_addresses: addresses.into(),
            health_checks: BTreeMap::from([(ObjectName::new("shop", "web"), check)]),
            ..Desired::default()
        }
    }

    #[test]
    fn load_balancers_are_told_how_many_endpoints_are_here() {
        let vitals = Arc::new(Vitals::default());
        vitals.tick();
        let checks = HealthChecks::start(NodeHealth::Off, vitals).expect("a thread");
        let port = free_port();
        let (v4, v6) = ((Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into());
        let has = |text: &'static str| move |answer: &io::Result<String>| matches!(answer, Ok(is) if is.contains(text));

        checks.follow(&desired(port, &[(Family::V4, 2), (Family::V6, 0)]));
        let answer = comes_to(v4, has("200 OK"));
        assert!(answer.contains("x-load-balancing-endpoint-weight: 2\r\n"), "{answer}");
        assert!(answer.contains("content-type: application/json\r\n"), "{answer}");
        assert!(
            answer.ends_with(
                r#"{"service":{"namespace":"shop","name":"web"},"localEndpoints":2,"serviceProxyHealthy":true}"#
            ),
            "{answer}"
        );
        // This node has no endpoint of the other family.
        comes_to(v6, has("503 Service Unavailable"));
        assert!(ask_beside_half_sent(v4, "/").contains("200 OK"), "half-sent requests are in the way");
        checks.follow(&desired(port, &[(Family::V4, 0), (Family::V6, 1)]));
        comes_to(v4, has("\"localEndpoints\":0"));
        comes_to(v6, has("200 OK"));
        // The service becomes single-stack: the port of the other family is closed.
        checks.follow(&desired(port, &[(Family::V6, 1)]));
        comes_to(v4, Result::is_err);
        comes_to(v6, has("200 OK"));
        // The service is gone.
        checks.follow(&Desired::default());
        comes_to(v4, Result::is_err);
        comes_to(v6, Result::is_err);
    }

    #[test]
    fn a_port_that_is_taken_hinders_no_other() {
        let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = taken.local_addr().expect("its number").port();
        let vitals = Arc::new(Vitals::default());
        vitals.tick();
        let checks = HealthChecks::start(NodeHealth::Off, vitals).expect("a thread");
        checks.follow(&desired(port, &[(Family::V4, 1), (Family::V6, 1)]));
        comes_to((Ipv6Addr::LOCALHOST, port).into(), Result::is_ok);
        // Listening is retried.
        drop(taken);
        checks.follow(&desired(port, &[(Family::V4, 3), (Family::V6, 1)]));
        let answer = comes_to((Ipv4Addr::LOCALHOST, port).into(), Result::is_ok);
        assert!(answer.contains("\"localEndpoints\":3"), "{answer}");
    }
}
