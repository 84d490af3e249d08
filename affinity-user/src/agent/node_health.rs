//! The health check that kube-proxy serves at port 10256. Its clients, mostly load balancers of cloud providers, ask whether
//! the node should get traffic.
//!
//! `/healthz` answers 503 while the node is about to be removed, or is out of step: the agent hangs, or what its source said a
//! minute ago is not in effect. `/livez` ignores that the node is about to be removed. A source that does not answer does not
//! fail the check, as with kube-proxy: the dataplane continues, and otherwise all nodes would lose their traffic together.
//!
//! [`super::health`] has the thread. If a port is taken, usually by kube-proxy, this is logged once, and listening is retried.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
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
use tracing::{info, warn};

use super::server::{self, Limits, TRY_AGAIN};
use crate::{metrics::Vitals, sys::monotonic_ns};

/// kube-proxy's port.
const PORT: u16 = 10_256;

/// Where to answer: at an address and port, or at kube-proxy's port at all addresses of both families.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum NodeHealth {
    /// Nowhere.
    #[default]
    Off,
    /// At kube-proxy's port.
    Everywhere,
    /// At this address and port.
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

/// Starts to answer, on the runtime of the calling task.
pub(super) fn serve(health: NodeHealth, vitals: &Arc<Vitals>) {
    let router =
        Router::new().route("/healthz", get(healthz)).route("/livez", get(livez)).with_state(Arc::clone(vitals));
    for address in health.addresses() {
        let on_taken = move |error| {
            warn!(
                "--node-health {address}: {error}; trying again every {} s. If kube-proxy listens there, use \
                 --node-health off",
                TRY_AGAIN.as_secs()
            );
        };
        info!("node health at http://{address}/healthz");
        tokio::spawn(server::serve_at(address, router.clone(), Limits::default(), on_taken));
    }
}

async fn healthz(State(vitals): State<Arc<Vitals>>) -> Response {
    let is_eligible = vitals.is_node_eligible();
    respond(&vitals, is_eligible, Some(is_eligible))
}

async fn livez(State(vitals): State<Arc<Vitals>>) -> Response {
    respond(&vitals, true, None)
}

/// The answer in kube-proxy's format, including the times.
fn respond(vitals: &Vitals, is_fit: bool, node_eligible: Option<bool>) -> Response {
    let (now, now_ns) = (Timestamp::now(), monotonic_ns());
    let is_healthy = is_fit && vitals.is_in_step(now_ns).is_ok();
    let status = if is_healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    // If the proxy is healthy, everything up to now is in effect.
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
    use std::thread;

    use super::*;
    use crate::agent::{
        health::{
            HealthChecks,
            tests::{ask_for, free_port},
        },
        server::tests::ask_beside_half_sent,
    };

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
        let _checks = HealthChecks::start(NodeHealth::At(at), Arc::clone(&vitals)).expect("a thread");
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
        assert!(ask_beside_half_sent(at, "/healthz").contains("200 OK"), "half-sent requests are in the way");
    }
}
