//! Keeps one kind in sync: lists it, watches it from there, and returns to it after every failure.

use std::{cell::RefCell, time::Duration};

use futures::{Stream, StreamExt};
use kube::{
    Client, Error,
    api::{ListParams, WatchEvent, WatchParams},
    core::Request,
};
use serde_json::Value;
use tokio::time::{Instant, timeout};
use tracing::{debug, info, warn};

use super::{
    backoff::Backoff,
    decode::{self, Item, Watched},
    object_cache::ObjectCache,
};
use crate::sys::monotonic_ns;

/// The number of objects in one page of a list.
const PAGE: u32 = 500;
/// How long to wait for a page: the API itself gives up after a minute.
const PAGE_PATIENCE: Duration = Duration::from_secs(90);
/// How long a watch lasts before the API ends it and it is opened again.
const WATCH_S: u32 = 290;
/// How long a watch may be silent: the API sends a bookmark about every minute, so the connection is dead.
const SILENCE: Duration = Duration::from_secs(150);
/// A watch that lasted this long counts as a success, even without events.
const GOOD_WATCH: Duration = Duration::from_secs(10);
/// The status code for a version that the API no longer knows.
const GONE: u16 = 410;
/// How long to continue without a kind that the API does not permit reading, before the next attempt.
const REFUSED_PAUSE: Duration = Duration::from_mins(5);
/// The status codes for what this process may not read, or what does not exist.
const REFUSED: [u16; 2] = [403, 404];

/// Keeps one kind in sync with the API.
pub(super) struct Reflector<'a, K> {
    pub(super) client: Client,
    /// The field selector; empty: all objects.
    pub(super) fields: String,
    pub(super) cache: &'a RefCell<ObjectCache<K>>,
    /// Called after each event with whether anything differs.
    pub(super) on_event: &'a dyn Fn(bool),
    /// Called with the reason if the API does not permit reading this kind. `None`: the kind is required.
    pub(super) do_without: Option<&'a dyn Fn(String)>,
}

/// Why a list or a watch has ended.
enum End {
    /// It ended normally, or its connection did.
    Over,
    /// The API no longer knows the version to continue from.
    Gone,
    Failed(Error),
    /// No answer in time.
    Silent,
}

impl<K: Watched> Reflector<'_, K> {
    /// Never returns. `seed` spreads the nodes of a cluster.
    pub(super) async fn run(&self, seed: u32) {
        let mut backoff = Backoff::new(seed);
        let mut version = None;
        loop {
            let since = Instant::now();
            let end = match version.take() {
                None => match self.list().await {
                    Ok(listed) => {
                        version = Some(listed);
                        self.well(&mut backoff);
                        continue;
                    }
                    Err(end) => end,
                },
                Some(from) => {
                    let (last, end) = self.watch(from, &mut backoff).await;
                    version = Some(last).filter(|_| !matches!(end, End::Gone));
                    end
                }
            };
            if matches!(end, End::Over | End::Silent) && since.elapsed() >= GOOD_WATCH {
                self.well(&mut backoff);
            }
            tokio::time::sleep(self.pause(&end, &mut backoff)).await;
        }
    }

    /// Records a success.
    fn well(&self, backoff: &mut Backoff) {
        if backoff.failures() > 1 {
            info!("{}s: the cluster's API answers again", K::KIND);
        }
        backoff.reset();
    }

    /// Logs what has ended, and returns how long to wait.
    fn pause(&self, end: &End, backoff: &mut Backoff) -> Duration {
        let kind = K::KIND;
        // A watch ends every few minutes; a pause is needed only if it ends repeatedly.
        let is_first = backoff.failures() == 0;
        let pause = backoff.next(if let End::Failed(error) = end { Some(error) } else { None });
        match end {
            End::Over if is_first => return Duration::ZERO,
            End::Over => debug!("{kind}s: the watch has ended; watching again in {pause:?}"),
            End::Gone => debug!("{kind}s: the resource version has expired; listing again in {pause:?}"),
            End::Silent => warn!("{kind}s: no answer from the cluster's API; trying again in {pause:?}"),
            End::Failed(error) => match self.do_without {
                Some(do_without) if is_refused(error) => {
                    do_without(message(error));
                    return REFUSED_PAUSE;
                }
                _ => warn!("{kind}s: {}; trying again in {pause:?}", message(error)),
            },
        }
        pause
    }

    /// Lists everything, and stores the list once it is complete. Returns the version to watch from.
    async fn list(&self) -> Result<String, End> {
        let begun_ns = monotonic_ns();
        let (items, version) = list(&self.client, &self.fields).await?;
        let differs = self.cache.borrow_mut().replace(items, Some(&version), begun_ns);
        (self.on_event)(differs);
        Ok(version)
    }

    /// Watches from a version. Returns where to continue, and why it has ended.
    async fn watch(&self, mut version: String, backoff: &mut Backoff) -> (String, End) {
        let mut params = WatchParams::default().timeout(WATCH_S);
        params.label_selector = selector(K::LABELS);
        params.field_selector = selector(&self.fields);
        let request = match Request::new(K::PATH).watch(&params, &version) {
            Ok(request) => request,
            Err(error) => return (version, End::Failed(Error::BuildRequest(error))),
        };
        let events = match timeout(PAGE_PATIENCE, self.client.request_events::<Value>(request)).await {
            Ok(Ok(events)) => events,
            Ok(Err(error)) => return (version, failed(error)),
            Err(_) => return (version, End::Silent),
        };
        let mut events = std::pin::pin!(events);
        loop {
            match self.next(&mut events).await {
                Ok(seen) => {
                    self.well(backoff);
                    if !seen.is_empty() {
                        version = seen;
                    }
                }
                Err(end) => return (version, end),
            }
        }
    }

    /// Processes the next event. Returns its version, which may be empty.
    async fn next(
        &self,
        events: &mut (impl Stream<Item = kube::Result<WatchEvent<Value>>> + Unpin),
    ) -> Result<String, End> {
        let event = match timeout(SILENCE, events.next()).await {
            Ok(Some(Ok(event))) => event,
            Ok(Some(Err(error))) => return Err(failed(error)),
            Ok(None) => return Err(End::Over),
            Err(_) => return Err(End::Silent),
        };
        let now_ns = monotonic_ns();
        let mut cache = self.cache.borrow_mut();
        let (version, differs) = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                let (version, item) = decode::object(object);
                (version, cache.put(item, now_ns))
            }
            WatchEvent::Deleted(object) => {
                let (version, item) = decode::object(object);
                (version, cache.remove(item, now_ns))
            }
            WatchEvent::Bookmark(bookmark) => {
                let version = bookmark.metadata.resource_version;
                cache.bookmark(&version, now_ns);
                (version, false)
            }
            WatchEvent::Error(status) => return Err(failed(Error::Api(status))),
        };
        drop(cache);
        (self.on_event)(differs);
        Ok(version)
    }
}

/// All objects of a kind, page by page, and the version of the list.
async fn list<K: Watched>(client: &Client, fields: &str) -> Result<(Vec<Item<K>>, String), End> {
    let request = Request::new(K::PATH);
    let mut params = ListParams::default().limit(PAGE);
    params.label_selector = selector(K::LABELS);
    params.field_selector = selector(fields);
    let mut items = Vec::new();
    loop {
        let request = request.list(&params).map_err(|error| End::Failed(Error::BuildRequest(error)))?;
        let text = match timeout(PAGE_PATIENCE, client.request_text(request)).await {
            Ok(Ok(text)) => text,
            Ok(Err(error)) => return Err(failed(error)),
            Err(_) => return Err(End::Silent),
        };
        let page = decode::page(&text).map_err(|error| End::Failed(Error::SerdeError(error)))?;
        items.extend(page.items);
        params.continue_token = page.next;
        if params.continue_token.is_none() {
            return Ok((items, page.version));
        }
    }
}

/// Lists all objects of a kind once.
///
/// # Errors
/// A message for users, and whether the API does not permit reading the kind.
pub(super) async fn list_once<K: Watched>(client: &Client, fields: &str) -> Result<Vec<Item<K>>, (String, bool)> {
    match list(client, fields).await {
        Ok((items, _)) => Ok(items),
        Err(End::Failed(error)) => Err((message(&error), is_refused(&error))),
        Err(End::Gone) => Err(("the list changed too much while it was read".to_owned(), false)),
        Err(End::Over | End::Silent) => Err(("no answer".to_owned(), false)),
    }
}

fn selector(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn failed(error: Error) -> End {
    if code(&error) == Some(GONE) { End::Gone } else { End::Failed(error) }
}

fn is_refused(error: &Error) -> bool {
    code(error).is_some_and(|code| REFUSED.contains(&code))
}

/// The status code of the API's answer, if there was one.
fn code(error: &Error) -> Option<u16> {
    if let Error::Api(status) = error { Some(status.code) } else { None }
}

/// An error with its causes, for users: the client's own text repeats parts.
fn message(error: &Error) -> String {
    if let Error::Api(status) = error {
        return format!("the cluster's API answers {}: {}", status.code, status.message);
    }
    let mut text = "no connection to the cluster's API".to_owned();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
