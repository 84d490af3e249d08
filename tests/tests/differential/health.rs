//! Load balancers ask each node whether it has endpoints of a service, on a separate port. kube-proxy answers them itself and
//! not by rules, so only `affinity` is tested.

use std::net::SocketAddr;

use affinity_tests::lab::{Family, Lab, PATIENCE, eventually};
use anyhow::Result;
use serde_json::Value;

use crate::cases::Spec;
use crate::oracle::local_ready;

/// Asks about these services, by their numbers; returns how many answers there were.
///
/// # Errors
/// When an answer does not come to match the endpoints on node A.
pub(crate) fn check_health<'a>(lab: &Lab, services: impl Iterator<Item = (u16, &'a Spec)>) -> Result<usize> {
    let mut asked = 0;
    for (number, spec) in services {
        let Some(port) = spec.health_check(number) else { continue };
        let (ready, service) = (local_ready(spec), spec.service(number));
        for family in Family::BOTH {
            let to = SocketAddr::new(family.node_addresses()[0], port);
            let what = format!("{to} says that {ready} endpoints of {} are here: {spec:?}", service.name());
            eventually(&what, PATIENCE, || match lab.client().http_get(family.client(0), to, "/healthz") {
                Ok(body) => {
                    let body: Value = serde_json::from_str(&body)?;
                    Ok(ready > 0 && body["localEndpoints"] == ready && body["service"]["name"] == service.name())
                }
                Err(error) => Ok(ready == 0 && error.to_string().starts_with("HTTP/1.1 503")),
            })?;
            asked += 1;
        }
    }
    Ok(asked)
}
