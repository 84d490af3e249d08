//! The output of the `affinity` command in a lab, as values.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::address::{CLIENT_COUNT, Family, Protocol};
use super::yaml::{Service, pod_name};
use super::{Lab, eventually};

/// The last client for which packets are explained: these never connect, so no pin restricts their candidates.
const NEVER_DIALS: u32 = CLIENT_COUNT - 1;

/// How long a change of the YAML may take to be effective.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);

/// A pin, as `affinity get sessions -o json` shows it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// `namespace/name` of the service.
    pub service: String,
    /// The client's address, or prefix.
    pub client: String,
    /// The backend that it is pinned to.
    pub backend: Backend,
    /// When it was pinned: RFC 3339.
    pub created: String,
    /// When its timer was last restarted: RFC 3339.
    pub last_used: String,
    /// Seconds left; None: it never expires.
    pub expires_in_seconds: Option<f64>,
    /// Why it was pinned there.
    pub reason: String,
}

/// A backend, as sessions show it.
#[derive(Clone, Debug, Deserialize)]
pub struct Backend {
    /// The pod's address.
    pub address: IpAddr,
    /// The pod's name.
    pub name: String,
}

/// The output of `affinity explain -o json` for the next packet.
#[derive(Clone, Debug, Deserialize)]
pub struct Explanation {
    /// forward, reject, drop or pass.
    pub verdict: String,
    /// Why.
    pub reason: String,
    /// The client's session, if it has one.
    pub pinned: Option<Value>,
    /// The backends that it could reach.
    pub candidates: Vec<Candidate>,
    /// Whether each of them would see the node's address.
    pub masquerade: bool,
}

/// A backend that an explanation names.
#[derive(Clone, Debug, Deserialize)]
pub struct Candidate {
    /// The pod's address.
    pub address: IpAddr,
    /// The pod's port.
    pub port: u16,
    /// The pod's name.
    pub name: String,
    /// Whether it would see the node's address.
    pub masquerade: bool,
}

impl Lab {
    /// The pins of a service, of one client or of all.
    ///
    /// # Errors
    /// When the command fails, or its JSON lacks the documented fields.
    pub fn sessions(&self, service: &Service, client: Option<IpAddr>) -> Result<Vec<Session>> {
        let (service, client) = (service.full_name(), client.map(|client| client.to_string()));
        let mut args = vec!["get", "sessions", "--service", &service];
        if let Some(client) = &client {
            args.extend(["--client", client]);
        }
        let json = self.affinity_json(&args)?;
        serde_json::from_value(json.clone()).with_context(|| format!("sessions as documented, not {json}"))
    }

    /// How many packets have been counted for a reason.
    ///
    /// # Errors
    /// When the command fails, or there is no such reason.
    pub fn count(&self, reason: &str) -> Result<u64> {
        let counters = self.affinity_json(&["get", "counters"])?;
        let rows = counters.as_array().context("an array")?;
        let row = rows.iter().find(|row| row["reason"] == reason).with_context(|| format!("no counter {reason}"))?;
        row["packets"].as_u64().with_context(|| row.to_string())
    }

    /// The verdict for the next packet of this client to this frontend; or for the next socket, if the client is `node` or a
    /// pod's name.
    ///
    /// # Errors
    /// As [`Lab::sessions`].
    pub fn explain(&self, protocol: Protocol, from: impl Display, to: SocketAddr) -> Result<Explanation> {
        self.explain_each(from, &[(protocol, to)])?.pop().context("one explanation")
    }

    /// The same for several frontends, at one moment and in their order.
    ///
    /// # Errors
    /// As [`Lab::sessions`].
    pub fn explain_each(&self, from: impl Display, to: &[(Protocol, SocketAddr)]) -> Result<Vec<Explanation>> {
        let from = from.to_string();
        let to: Vec<_> = to.iter().map(|(protocol, to)| format!("{to}/{protocol}")).collect();
        let mut args = vec!["explain", "--from", &from];
        args.extend(to.iter().flat_map(|to| ["--to", to]));
        let json = self.affinity_json(&args)?;
        let json = if json.is_array() { json } else { Value::Array(vec![json]) };
        let said: Vec<_> = Deserialize::deserialize(&json).with_context(|| format!("explanations, not {json}"))?;
        ensure!(said.len() == to.len(), "{} explanations of {}", said.len(), to.len());
        Ok(said)
    }

    /// Writes the service's YAML as [`Lab::publish`] does, and waits as [`Lab::settle`] does.
    ///
    /// # Errors
    /// As [`Lab::settle`].
    pub fn publish_and_settle(&self, service: &Service) -> Result<()> {
        self.publish(service)?;
        self.settle(service)
    }

    /// Waits until a withdrawn service is no longer served.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn settle_deleted(&self, service: &Service) -> Result<()> {
        eventually(&format!("{} is deleted", service.full_name()), SYNC_PATIENCE, || {
            let to: Vec<_> = service.ports_of(Family::V4).map(|port| (port.protocol, port.cluster_ip)).collect();
            let said = self.explain_each(Family::V4.client(NEVER_DIALS), &to)?;
            Ok(said.iter().all(|said| said.verdict == "pass"))
        })
    }

    /// Waits until the candidates of a service's ClusterIPs are exactly its ready endpoints; under the internal policy Local,
    /// those on node A. A change of affinity alone is not visible in this way.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn settle(&self, service: &Service) -> Result<()> {
        // Under `consistent`, a client has one candidate: several clients together have all of them.
        const PROBES: u32 = 5;
        let wanted: BTreeSet<String> = service.ready_pods().map(pod_name).collect();
        let probes = if service.is_consistent() { PROBES } else { 1 };
        eventually(&format!("{} has {wanted:?}", service.full_name()), SYNC_PATIENCE, || {
            let mut found = BTreeSet::new();
            for family in Family::BOTH {
                let to: Vec<_> = service.ports_of(family).map(|port| (port.protocol, port.cluster_ip)).collect();
                for probe in 0..probes {
                    for said in self.explain_each(family.client(NEVER_DIALS - probe), &to)? {
                        let names: BTreeSet<String> = said.candidates.into_iter().map(|pod| pod.name).collect();
                        if said.verdict == "pass" || probes == 1 && names != wanted {
                            return Ok(false);
                        }
                        found.extend(names);
                    }
                }
            }
            Ok(found == wanted)
        })
    }
}
