//! The agent's HTTP server: `/metrics`, `/healthz`, `/readyz`.
//!
//! It runs on its own thread, reads the maps itself, and shares only [`Vitals`] with the agent's loop, so no scrape can delay
//! the loop. However many clients ask, one scrape at a time reads the maps, at most once in [`FRESH`], and all clients share
//! its text: a scrape of a large cluster takes tens of megabytes while it is made.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use affinity_common::{
    abi::{FrontendKey, Name, RangeKey, Status, Usage, UsageKey, V4, V6},
    names,
};
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{
        HeaderMap, StatusCode,
        header::{ACCEPT, CONTENT_TYPE, VARY},
    },
    response::{IntoResponse, Response},
    routing::get,
};
use bytemuck::Pod;
use rustix::net::listen;
use tracing::info;

use super::server::{self, Limits};
use crate::{
    attach,
    metrics::{Bounds, Format, Tables, Vitals, classic, exposition},
    pins::PinDir,
    store::{
        StoreError,
        kernel::{PerCpu, Table},
    },
    sys::{Map, monotonic_ns},
    threads,
    view::{Clock, StatusView},
};

/// How long the text of a scrape is reused.
const FRESH: Duration = Duration::from_secs(1);

/// Where to listen, and what to export.
#[derive(Clone, Debug)]
pub struct Options {
    /// Address and port.
    pub address: SocketAddr,
    /// How many services, and how many backends, have series of their own.
    pub max_series: usize,
}

/// What the handlers need.
struct Exporter {
    pin_dir: PathBuf,
    vitals: Arc<Vitals>,
    bounds: Mutex<Bounds>,
    /// The holder of the lock builds the text.
    last: Arc<tokio::sync::Mutex<Option<Scrape>>>,
}

/// What was read at one moment, in both formats.
struct Scrape {
    at: Instant,
    openmetrics: Bytes,
    classic: Bytes,
}

impl Scrape {
    fn new(openmetrics: String) -> Self {
        let classic = classic(&openmetrics).into();
        Self { at: Instant::now(), openmetrics: openmetrics.into(), classic }
    }

    /// The text, without copying it.
    fn text(&self, format: Format) -> Bytes {
        match format {
            Format::OpenMetrics => self.openmetrics.clone(),
            Format::Classic => self.classic.clone(),
        }
    }
}

/// Listens, and answers until the process ends.
///
/// # Errors
/// The system's error if it cannot listen at this address.
pub(super) fn serve(options: &Options, pin_dir: &Path, vitals: Arc<Vitals>) -> io::Result<()> {
    let listener = TcpListener::bind(options.address)?;
    listener.set_nonblocking(true)?;
    listen(&listener, server::BACKLOG)?;
    info!("metrics at http://{}/metrics", listener.local_addr()?);
    let bounds = Mutex::new(Bounds::new(options.max_series));
    let exporter = Arc::new(Exporter { pin_dir: pin_dir.to_owned(), vitals, bounds, last: Arc::default() });
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(health))
        .route("/readyz", get(readiness))
        .with_state(exporter);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = {
        let _context = runtime.enter();
        tokio::net::TcpListener::from_std(listener)?
    };
    threads::spawn("http", move || runtime.block_on(server::serve(listener, router, Limits::default())))?;
    Ok(())
}

async fn metrics(State(exporter): State<Arc<Exporter>>, headers: HeaderMap) -> Response {
    let accepted: Vec<_> = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    let format = Format::accepted(&accepted.join(","));
    match exporter.text(format).await {
        Ok(text) => ([(CONTENT_TYPE, format.content_type()), (VARY, "accept")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn health(State(exporter): State<Arc<Exporter>>) -> Response {
    answer(exporter.vitals.is_healthy(monotonic_ns()))
}

async fn readiness(State(exporter): State<Arc<Exporter>>) -> Response {
    answer(exporter.vitals.is_ready())
}

fn answer(state: Result<(), String>) -> Response {
    match state {
        Ok(()) => "ok\n".into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

impl Exporter {
    /// The last text while it is fresh, else a new one.
    async fn text(self: Arc<Self>, format: Format) -> Result<Bytes, String> {
        let mut last = Arc::clone(&self.last).lock_owned().await;
        if let Some(scrape) = last.as_ref().filter(|scrape| scrape.at.elapsed() < FRESH) {
            return Ok(scrape.text(format));
        }
        // On another thread, so that probes are answered meanwhile. The lock moves there too: this future ends when its client
        // disconnects, and the next scrape must not begin before that thread is done.
        let made = tokio::task::spawn_blocking(move || {
            // Never two texts in memory.
            *last = None;
            let scrape = last.insert(Scrape::new(self.read()?));
            Ok(scrape.text(format))
        });
        made.await.map_err(|error| error.to_string())?
    }

    fn read(&self) -> Result<String, String> {
        let pins = PinDir::new(&self.pin_dir);
        // While the agent loads there may be no dataplane.
        let there = pins.exists().map_err(|error| error.to_string())?;
        let tables = if there { Some(self.tables(&pins)?) } else { None };
        exposition(Arc::clone(&self.vitals), tables, &self.bounds).map_err(|error| error.to_string())
    }

    fn tables(&self, pins: &PinDir) -> Result<Tables, String> {
        let mut attachments = BTreeMap::from(attach::Hook::ALL.map(|hook| (hook.name(), 0)));
        for attachment in attach::attachments(pins).map_err(|error| error.to_string())? {
            *attachments.entry(attachment.hook.name()).or_default() += 1;
        }
        let capacities = names::MAPS.iter().map(|&name| {
            let map = Map::open(&pins.map(name)).map_err(|error| error.to_string())?;
            Ok((name, u64::from(map.info().max_entries)))
        });
        read(&pins.maps(), capacities.collect::<Result<_, String>>()?, attachments).map_err(|error| error.to_string())
    }
}

/// Reads what metrics need, entry by entry: reading all small tables at once would take several times as much memory. Maps are
/// opened each time, because a resized map is another map. Only those that are read are opened: a
/// [`KernelStore`](crate::store::kernel::KernelStore) maps the large arrays into memory, and shared pages count as this
/// process's.
fn read(
    maps: &Path,
    capacities: Vec<(&'static str, u64)>,
    attachments: BTreeMap<&'static str, u64>,
) -> Result<Tables, StoreError> {
    let status = Table::<u32, Status>::open(maps, names::STATUS)?.get(&0)?.unwrap_or_default();
    let as_of = StatusView::new(&status, &Clock::now()).and_then(|status| status.as_of);
    let packets = PerCpu::<u32, u64>::open(maps, names::COUNTERS)?;
    let packets = packets.iter().map(|entry| entry.map(|(_, counts)| counts.iter().sum()));
    let packets = packets.collect::<Result<_, _>>()?;
    let mut tables = Tables::new(packets, capacities, attachments, as_of.map(|as_of| as_of.age));
    // Names are published before what they name and removed after it, so they are read before and after it.
    let add_name = |tables: &mut Tables, key, name: Name| tables.add_name(key, name.as_str());
    walk(maps, names::NAMES, &mut tables, add_name)?;
    walk(maps, names::FRONTENDS_V4, &mut tables, |tables, _: FrontendKey<V4>, frontend| {
        tables.add_frontend(&frontend)
    })?;
    walk(maps, names::FRONTENDS_V6, &mut tables, |tables, _: FrontendKey<V6>, frontend| {
        tables.add_frontend(&frontend)
    })?;
    walk(maps, names::RANGES_V4, &mut tables, |_, _: RangeKey<V4>, _: u32| {})?;
    walk(maps, names::RANGES_V6, &mut tables, |_, _: RangeKey<V6>, _: u32| {})?;
    walk(maps, names::BACKENDS, &mut tables, |tables, index, backend| tables.add_backend(index, &backend))?;
    walk(maps, names::MEMBERS, &mut tables, |tables, key, member| tables.add_member(&key, &member))?;
    for entry in PerCpu::<UsageKey, Usage>::open(maps, names::USAGE)?.iter() {
        let (key, counts) = entry?;
        tables.add_usage(key, &counts);
    }
    walk(maps, names::NAMES, &mut tables, add_name)?;
    Ok(tables)
}

/// Passes every entry of a map to `add`, and stores their number.
fn walk<K: Pod + Debug, V: Pod>(
    maps: &Path,
    name: &'static str,
    tables: &mut Tables,
    mut add: impl FnMut(&mut Tables, K, V),
) -> Result<(), StoreError> {
    let mut entries = 0;
    for entry in &Table::<K, V>::open(maps, name)? {
        let (key, value) = entry?;
        add(tables, key, value);
        entries += 1;
    }
    tables.entries.insert(name, entries);
    Ok(())
}
