//! The API double's answers.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State as Shared};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::state::{self, Kind, Piece, State, Verb, event};
use super::{Answer, Gone};

/// The path prefix of posted Kubernetes Events.
const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/";

/// All its routes.
pub(super) fn router(state: Arc<Mutex<State>>) -> Router {
    Router::new().fallback(answer).with_state(state)
}

async fn answer(
    Shared(shared): Shared<Arc<Mutex<State>>>,
    method: Method,
    uri: Uri,
    Query(query): Query<BTreeMap<String, String>>,
    body: Bytes,
) -> Response {
    let path = uri.path();
    if path.starts_with(EVENTS) {
        return take_event(&shared, &method, path, &body);
    }
    let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.names().2 == path) else { return status(404) };
    let verb = if query.get("watch").is_some_and(|watch| watch == "true") { Verb::Watch } else { Verb::List };
    let begun = state::lock(&shared).begin(kind, verb, &query);
    match begun {
        Some(Answer::Status(code)) => return status(code),
        Some(Answer::TooManyRequests { retry_after_s }) => return too_many_requests(retry_after_s),
        Some(Answer::Late(late)) => tokio::time::sleep(late).await,
        None => {}
    }
    match verb {
        Verb::List => match state::lock(&shared).page(kind, &query) {
            Some(page) => json_answer(StatusCode::OK, &page),
            None => status(410),
        },
        Verb::Watch => watch(&shared, kind, query),
    }
}

fn watch(shared: &Mutex<State>, kind: Kind, query: BTreeMap<String, String>) -> Response {
    let (sender, pieces) = unbounded_channel();
    match state::lock(shared).watch(kind, query, sender.clone()) {
        Ok(()) => {}
        Err(Gone::Http) => return status(410),
        // The receiver is below, so it still exists.
        Err(Gone::Event) => drop(sender.send(Ok(event("ERROR", &status_object(410))))),
    }
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(stream::unfold(pieces, next))).into_response()
}

/// The pieces as they come, each at once. Earlier pieces are sent before one that breaks the connection.
async fn next(mut pieces: UnboundedReceiver<Piece>) -> Option<(io::Result<Bytes>, UnboundedReceiver<Piece>)> {
    let piece = pieces.recv().await?;
    if piece.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Some((piece.map(Bytes::from), pieces))
}

/// A Kubernetes Event that is posted.
fn take_event(shared: &Mutex<State>, method: &Method, path: &str, body: &[u8]) -> Response {
    let Ok(event) = serde_json::from_slice::<Value>(body) else { return status(400) };
    let name = event["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let mut state = state::lock(shared);
    state.event_requests += 1;
    if method != Method::POST || !path.ends_with("/events") {
        return status(405);
    }
    let namespace = path.trim_start_matches(EVENTS).trim_end_matches("/events");
    if state.terminating.contains(namespace) {
        return namespace_terminating(namespace);
    }
    if state.events.contains_key(&name) {
        return status(409);
    }
    state.events.insert(name, event.clone());
    json_answer(StatusCode::CREATED, &event)
}

fn json_answer(code: StatusCode, value: &Value) -> Response {
    (code, [(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

fn status(code: u16) -> Response {
    json_answer(StatusCode::from_u16(code).expect("a code"), &status_object(code))
}

/// The answer of the API's admission when something is created there.
fn namespace_terminating(namespace: &str) -> Response {
    let message = format!("unable to create new content in namespace {namespace} because it is being terminated");
    let cause =
        json!({"reason": "NamespaceTerminating", "message": "is being terminated", "field": "metadata.namespace"});
    let mut status = status_object(403);
    status["reason"] = json!("Forbidden");
    status["message"] = json!(message);
    status["details"] = json!({"kind": "events", "causes": [cause]});
    json_answer(StatusCode::FORBIDDEN, &status)
}

fn status_object(code: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "message": format!("told to answer {code}"),
    })
}

fn too_many_requests(retry_after_s: u64) -> Response {
    let headers = [(header::RETRY_AFTER, retry_after_s.to_string())];
    (StatusCode::TOO_MANY_REQUESTS, headers, "Too many requests, please try again later.\n").into_response()
}
