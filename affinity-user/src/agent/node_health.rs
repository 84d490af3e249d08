//! What kube-proxy answers at port 10256, for whoever asks whether the node should have traffic: load balancers of cloud
//! providers above all.
//!
//! `/healthz` answers 503 while the node is about to be taken away, or is out of step: the agent hangs, or what its source
//! said a minute ago is not in effect. `/livez` is the same without the first. A source that does not answer is no reason, as
//! it is none for kube-proxy: the dataplane goes on, and all nodes would lose their traffic together.
//!
//! The server has a thread of its own. A port that is taken, by kube-proxy as a rule, is warned of once, and tried again.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    thread,
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use jiff::Timestamp;
use tokio::{net::TcpListener, time::sleep};
use tracing::{error, info, warn};

use super::health::{TRY_AGAIN, listener};
use crate::{load::monotonic_ns, metrics::Vitals};

/// kube-proxy's port.
const PORT: u16 = 10_256;

/// Where the answers are given: an address and port, or kube-proxy's port at all addresses of both families.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum NodeHealth {
    /// Nowhere.
    #[default]
    Off,
    /// At kube-proxy's port.
    Everywhere,
    /// There.
    At(SocketAddr),
}

impl NodeHealth {
    fn addresses(self) -> Vec<SocketAddr> {
        match self {
            Self::Off => Vec::new(),
            Self::Everywhere => vec![(Ipv4Addr::UNSPECIFIED, PORT).into(), (Ipv6Addr::UNSPECIFIED, PORT).into()],
            Self::At(address) => vec![address],
        }
    }
}

/// Answers for as long as the process lives.
///
/// # Errors
/// The system's answer where there is no thread to be had.
pub(super) fn serve(health: NodeHealth, vitals: &Arc<Vitals>) -> io::Result<()> {
    let addresses = health.addresses();
    if addresses.is_empty() {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let router =
        Router::new().route("/healthz", get(healthz)).route("/livez", get(livez)).with_state(Arc::clone(vitals));
    thread::Builder::new().name("node-health".to_owned()).spawn(move || {
        runtime.block_on(async {
            for address in addresses {
                tokio::spawn(serve_at(address, router.clone()));
            }
            std::future::pending::<()>().await;
        });
    })?;
    Ok(())
}

async fn serve_at(address: SocketAddr, router: Router) {
    let Some(listener) = listening(address, TRY_AGAIN).await else { return };
    info!("node health at http://{address}/healthz");
    if let Err(error) = axum::serve(listener, router).await {
        error!("node health at {address} is answered no longer: {error}");
    }
}

/// Waits for the port to be free, and tries it again after each pause. None: this machine does not have the family.
async fn listening(address: SocketAddr, pause: Duration) -> Option<TcpListener> {
    let mut is_told = false;
    loop {
        match listener(address) {
            Ok(listener) => return Some(listener),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return None,
            Err(error) => {
                if !is_told {
                    warn!(
                        "--node-health {address}: {error}; trying again every {} s. If kube-proxy answers there, let it, \
                         and say --node-health off",
                        pause.as_secs()
                    );
                }
                is_told = true;
            }
        }
        sleep(pause).await;
    }
}

async fn healthz(State(vitals): State<Arc<Vitals>>) -> Response {
    let is_eligible = vitals.is_node_eligible();
    respond(&vitals, is_eligible, Some(is_eligible))
}

async fn livez(State(vitals): State<Arc<Vitals>>) -> Response {
    respond(&vitals, true, None)
}

/// As kube-proxy words it, times included.
fn respond(vitals: &Vitals, is_fit: bool, node_eligible: Option<bool>) -> Response {
    let (now, now_ns) = (Timestamp::now(), monotonic_ns());
    let is_healthy = is_fit && vitals.is_in_step(now_ns).is_ok();
    let status = if is_healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    // Of a healthy proxy, everything up to now is in effect.
    let age_ns = now_ns.saturating_sub(vitals.published_ns().unwrap_or(now_ns));
    let updated = if is_healthy { now } else { now.saturating_sub(Duration::from_nanos(age_ns)).unwrap_or(now) };
    let time = |time: Timestamp| time.strftime("%Y-%m-%d %H:%M:%S.%9f +0000 UTC").to_string();
    let eligible = node_eligible.map_or_else(String::new, |is_eligible| format!(", \"nodeEligible\": {is_eligible}"));
    let body = format!("{{\"lastUpdated\": \"{}\",\"currentTime\": \"{}\"{eligible}}}", time(updated), time(now));
    let headers = [(CONTENT_TYPE.as_str(), "application/json"), ("x-content-type-options", "nosniff")];
    (status, headers, body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::health::tests::{ask_for, free_port};

    /// The status line and the body.
    fn answer(at: SocketAddr, path: &str) -> (String, serde_json::Value) {
        let began = std::time::Instant::now();
        loop {
            if let Ok(text) = ask_for(at, path) {
                let (head, body) = text.split_once("\r\n\r\n").expect("an answer");
                let status = head.lines().next().unwrap_or_default().to_owned();
                return (status, serde_json::from_str(body).unwrap_or_default());
            }
            assert!(began.elapsed() < Duration::from_secs(20), "nobody answers at {at}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn load_balancers_are_told_whether_the_node_should_have_traffic() {
        let vitals = Arc::new(Vitals::default());
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        serve(NodeHealth::At(at), &vitals).expect("a thread");
        let (status, body) = answer(at, "/healthz");
        assert!(status.contains("200 OK"), "{status}");
        assert_eq!((&body["nodeEligible"], &body["lastUpdated"]), (&true.into(), &body["currentTime"]));

        vitals.published(1);
        vitals.node_is_leaving(true);
        let (status, body) = answer(at, "/healthz");
        assert!(status.contains("503 Service Unavailable"), "{status}");
        assert_eq!(body["nodeEligible"], false);
        assert!(body["lastUpdated"].as_str() < body["currentTime"].as_str(), "{body}");
        let (status, body) = answer(at, "/livez");
        assert!(status.contains("200 OK") && body.get("nodeEligible").is_none(), "{status} {body}");

        vitals.node_is_leaving(false);
        vitals.pending(monotonic_ns().saturating_sub(2 * 60 * 1_000_000_000));
        for path in ["/healthz", "/livez"] {
            assert!(answer(at, path).0.contains("503"), "{path}: a snapshot waits");
        }
        vitals.published(1);
        assert!(answer(at, "/healthz").0.contains("200"));
        assert!(answer(at, "/metrics").0.contains("404"));
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_waited_for() {
        let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let at = taken.local_addr().expect("its number");
        let pause = Duration::from_millis(10);
        let waiting = tokio::spawn(listening(at, pause));
        sleep(5 * pause).await;
        assert!(!waiting.is_finished());
        drop(taken);
        assert!(waiting.await.expect("no panic").is_some());
    }
}
