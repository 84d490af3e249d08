//! Posts notices as Kubernetes Events on a Service, where `kubectl describe` shows them.
//!
//! All nodes find the same problems, so the name of an Event is derived from its content: one node posts it, and the API tells
//! the others that it exists. A few are posted at once and then one at a time. Each is given up after a few attempts.

use std::time::Duration;

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, Error, api::PostParams};
use tokio::{
    sync::mpsc::Receiver,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};

use super::{backoff::Backoff, cluster::Cluster};
use crate::{
    hash::{hash32, hash64},
    source::Notice,
};

/// The maximum number of notices that wait to be posted.
pub(super) const QUEUE: usize = 256;
/// This many Events are posted at once, and then one in this interval.
const BURST: u32 = 20;
const EVERY: Duration = Duration::from_secs(3);
/// How many attempts are made for one Event.
const ATTEMPTS: u32 = 4;
/// How long to wait for the API's answer to one Event.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest note that the API accepts, in bytes.
const NOTE_BYTES: usize = 1024;
/// The cause in the API's answer if a namespace is being deleted.
const NAMESPACE_TERMINATING: &str = "NamespaceTerminating";
/// Nodes that find a problem at the same time spread their Events over this time.
const SPREAD: Duration = Duration::from_secs(2);

/// Posts a node's notices as Events.
pub(super) struct Poster<'a> {
    pub(super) client: &'a Client,
    pub(super) cluster: &'a Cluster,
}

impl Poster<'_> {
    /// Runs until the sender of notices is dropped; then idles forever.
    pub(super) async fn run(&self, mut notices: Receiver<Notice>) {
        // Each Event uses up saved time (a token bucket).
        let (mut saved, mut since) = (EVERY * BURST, Instant::now());
        while let Some(notice) = notices.recv().await {
            saved = (saved + since.elapsed()).min(EVERY * BURST);
            since = Instant::now();
            sleep(EVERY.saturating_sub(saved)).await;
            saved = saved.saturating_sub(EVERY);
            let share = hash32(self.cluster.node_name()) % 256;
            sleep(SPREAD * share / 256).await;
            if !self.post(&notice).await {
                warn!("no permission to post Kubernetes Events: grant it, or use --no-kubernetes-events");
                return std::future::pending().await;
            }
        }
        std::future::pending().await
    }

    /// Posts one Event. False: this is not permitted.
    async fn post(&self, notice: &Notice) -> bool {
        let event = self.event(notice);
        let events: Api<Event> = Api::namespaced(self.client.clone(), &notice.service.namespace);
        let mut backoff = Backoff::new(hash32(self.cluster.node_name()));
        for _ in 0..ATTEMPTS {
            let error = match timeout(PATIENCE, events.create(&PostParams::default(), &event)).await {
                Ok(Ok(_)) => return true,
                Ok(Err(error)) => Some(error),
                Err(_) => None,
            };
            match error.as_ref().and_then(code) {
                // Another node was first, or this one has posted it before.
                Some(409) => return true,
                // Nothing can be created in a namespace that is being deleted. Other namespaces are not affected.
                Some(403) if error.as_ref().is_some_and(is_terminating) => break,
                Some(403) => return false,
                // The namespace is gone, or the API does not accept this text.
                Some(404 | 422) => break,
                _ => sleep(backoff.next(error.as_ref())).await,
            }
        }
        debug!(service = %notice.service, "a Kubernetes Event could not be posted: {}", notice.message);
        true
    }

    fn event(&self, notice: &Notice) -> Event {
        let Notice { service, reason, message } = notice;
        let uid = self.cluster.uid(service);
        let identity = format!("{}\n{reason}\n{message}", uid.as_deref().unwrap_or_default());
        Event {
            metadata: ObjectMeta {
                name: Some(format!("{}.{:016x}", service.name, hash64(identity.as_bytes(), 0))),
                namespace: Some(service.namespace.to_string()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(Timestamp::now())),
            regarding: Some(ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Service".to_owned()),
                namespace: Some(service.namespace.to_string()),
                name: Some(service.name.to_string()),
                uid,
                ..ObjectReference::default()
            }),
            reason: Some((*reason).to_owned()),
            action: Some("Balancing".to_owned()),
            note: Some(cut(message, NOTE_BYTES).to_owned()),
            type_: Some("Warning".to_owned()),
            reporting_controller: Some("affinity.dev/agent".to_owned()),
            reporting_instance: Some(self.cluster.node_name().to_owned()),
            ..Event::default()
        }
    }
}

fn code(error: &Error) -> Option<u16> {
    if let Error::Api(status) = error { Some(status.code) } else { None }
}

/// Whether the API rejected the request because the namespace is being deleted.
fn is_terminating(error: &Error) -> bool {
    let Error::Api(status) = error else { return false };
    status.details.iter().flat_map(|details| &details.causes).any(|cause| cause.reason == NAMESPACE_TERMINATING)
}

/// The first bytes of a text, cut at a character boundary.
fn cut(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_cut_at_a_character() {
        assert_eq!(cut("äöü", 3), "ä");
        assert_eq!(cut("abc", 3), "abc");
    }
}
