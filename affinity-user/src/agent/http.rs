//! The agent's HTTP server: `/metrics`, `/healthz`, `/readyz`.
//!
//! It runs on a thread of its own, reads the maps by itself, and shares with the agent's loop only [`Vitals`]; so no
//! scrape can keep the loop waiting.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use tracing::{error, info};

use crate::{
    attach,
    load::{PinDir, monotonic_ns},
    metrics::{self, Bounds, Tables, Vitals, exposition},
    store::{Store, kernel::KernelStore},
    view::{Catalog, Clock},
};

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
}

/// Listens, and answers for as long as the process lives.
///
/// # Errors
/// The system's answer where it cannot listen there.
pub(super) fn serve(options: &Options, pin_dir: &Path, vitals: Arc<Vitals>) -> io::Result<()> {
    let listener = TcpListener::bind(options.address)?;
    listener.set_nonblocking(true)?;
    info!("metrics at http://{}/metrics", listener.local_addr()?);
    let bounds = Mutex::new(Bounds::new(options.max_series));
    let exporter = Arc::new(Exporter { pin_dir: pin_dir.to_owned(), vitals, bounds });
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(health))
        .route("/readyz", get(readiness))
        .with_state(exporter);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("http".to_owned()).spawn(move || {
        let served =
            runtime.block_on(async { axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await });
        if let Err(error) = served {
            error!("metrics are served no longer: {error}");
        }
    })?;
    Ok(())
}

async fn metrics(State(exporter): State<Arc<Exporter>>) -> Response {
    // On another thread: probes are answered meanwhile.
    let text = tokio::task::spawn_blocking(move || exporter.text()).await;
    match text.map_err(|error| error.to_string()).and_then(|text| text) {
        Ok(text) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
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
    fn text(&self) -> Result<String, String> {
        let pins = PinDir::new(&self.pin_dir);
        // While the agent loads there may be no dataplane.
        let there = pins.exists().map_err(|error| error.to_string())?;
        let tables = if there { Some(self.tables(&pins)?) } else { None };
        exposition(Arc::clone(&self.vitals), tables, &self.bounds).map_err(|error| error.to_string())
    }

    fn tables(&self, pins: &PinDir) -> Result<Tables, String> {
        // Opened anew: a map that has changed its size is another map.
        let store = KernelStore::open(&self.pin_dir).map_err(|error| error.to_string())?;
        let read = || -> Result<_, crate::store::StoreError> {
            let status = store.status.get(&0)?.unwrap_or_default();
            let catalog = Catalog::new(store.observe()?, store.usage_sums()?, Clock::now()).with_status(&status);
            Ok((catalog, store.counter_sums()?))
        };
        let (catalog, packets) = read().map_err(|error| error.to_string())?;
        let mut attachments = BTreeMap::from(attach::Hook::ALL.map(|hook| (hook.name(), 0)));
        for attachment in attach::attachments(pins).map_err(|error| error.to_string())? {
            *attachments.entry(attachment.hook.name()).or_default() += 1;
        }
        let capacities = store.maps().iter().map(|&(map, ref info)| (map, u64::from(info.max_entries))).collect();
        Ok(Tables { catalog, packets, capacities, attachments })
    }
}
