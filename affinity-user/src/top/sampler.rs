//! Reads a running dataplane: a sample when it is due, and slices of longer work in between.
//!
//! Neither takes more than a fifth of the time, whatever the size of the tables: work that took long is repeated less often.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use affinity_common::abi::Event;

use super::{
    TopError,
    clients::{Clients, Query, Scan},
    sample::Sample,
    unpin::{Target, Unpin},
};
use crate::{events::EventReader, store::kernel::KernelStore, sys::monotonic_ns, view::Catalog};

/// The number of events that are kept.
const EVENTS: usize = 256;
/// Work is repeated at the earliest after this multiple of the time that it took.
const REST_FACTOR: u32 = 4;

/// A dataplane, and the work in progress on it.
#[derive(Debug)]
pub struct Sampler {
    pin_dir: PathBuf,
    interval: Duration,
    dataplane: Dataplane,
    unpin: Option<Unpin>,
    scan: Option<Scan>,
    scan_began: Instant,
    scan_due: Instant,
    sample_due: Instant,
}

/// The pinned maps, and the last reading of them.
#[derive(Debug)]
struct Dataplane {
    store: KernelStore,
    catalog: Catalog,
    reader: EventReader,
    /// The newest events, oldest first.
    events: VecDeque<Event>,
}

impl Dataplane {
    fn open(pin_dir: &Path) -> Result<Self, TopError> {
        let store = KernelStore::open(pin_dir)?;
        let (catalog, reader) = (Catalog::read(&store)?, EventReader::from_oldest(&store.events)?);
        Ok(Self { store, catalog, reader, events: VecDeque::new() })
    }

    fn read(&mut self) -> Result<(), TopError> {
        for event in self.reader.by_ref() {
            if self.events.len() == EVENTS {
                self.events.pop_front();
            }
            self.events.push_back(event);
        }
        // Read after the events, so it contains all their names.
        self.catalog = Catalog::read(&self.store)?;
        Ok(())
    }

    fn sample(&self) -> Sample {
        let loads = &self.store.loads;
        let pins = |backend| if backend < loads.len() { loads.load_u64(backend) } else { 0 };
        Sample::new(&self.catalog, pins, self.events.iter())
    }

    /// Whether these are the currently pinned maps.
    fn is_current(&self, pinned: &KernelStore) -> bool {
        let ids = |store: &KernelStore| store.maps().iter().map(|(_, info)| info.id).collect::<Vec<_>>();
        ids(&self.store) == ids(pinned)
    }
}

impl Sampler {
    /// Opens the dataplane at `pin_dir`.
    ///
    /// # Errors
    /// [`TopError`].
    pub fn open(pin_dir: &Path, interval: Duration) -> Result<Self, TopError> {
        let now = Instant::now();
        Ok(Self {
            pin_dir: pin_dir.to_owned(),
            interval,
            dataplane: Dataplane::open(pin_dir)?,
            unpin: None,
            scan: None,
            scan_began: now,
            scan_due: now,
            sample_due: now,
        })
    }

    /// Takes a sample of the current dataplane: an agent that was restarted may have replaced the maps.
    ///
    /// # Errors
    /// [`TopError`], for example if the dataplane was removed.
    pub fn sample(&mut self) -> Result<Sample, TopError> {
        let began = Instant::now();
        self.sample_due = began + self.interval;
        if !self.dataplane.is_current(&KernelStore::open(&self.pin_dir)?) {
            self.dataplane = Dataplane::open(&self.pin_dir)?;
            (self.scan, self.unpin) = (None, None);
        }
        self.dataplane.read()?;
        self.sample_due = self.sample_due.max(began + began.elapsed() * (1 + REST_FACTOR));
        Ok(self.dataplane.sample())
    }

    /// When the next sample is due.
    #[must_use]
    pub fn sample_due(&self) -> Instant {
        self.sample_due
    }

    /// Continues to collect clients. Starts again if the query has changed, or if the last result is old and `again` is set.
    /// `None` if there is nothing new.
    ///
    /// # Errors
    /// [`TopError`].
    pub fn clients(&mut self, wanted: Option<Query>, again: bool) -> Result<Option<&Clients>, TopError> {
        let Some(query) = wanted else {
            self.scan = None;
            return Ok(None);
        };
        let now = Instant::now();
        let Dataplane { store, catalog, .. } = &self.dataplane;
        let begin = self.scan.as_ref().is_none_or(|scan| {
            let clients = scan.clients();
            clients.query != query || again && clients.complete && self.scan_due <= now
        });
        if begin {
            self.scan_began = now;
            self.scan = Some(Scan::new(store, catalog, query));
        }
        let Some(mut scan) = self.scan.take_if(|scan| !scan.clients().complete) else { return Ok(None) };
        scan.step(store, catalog)?;
        self.scan_due = now + self.interval.max(self.scan_began.elapsed() * REST_FACTOR);
        Ok(Some(self.scan.insert(scan).clients()))
    }

    /// Starts to unpin; returns the first message about it.
    ///
    /// # Errors
    /// [`TopError`].
    pub fn unpin(&mut self, target: &Target) -> Result<String, TopError> {
        let Dataplane { store, catalog, .. } = &self.dataplane;
        match target {
            Target::Client { key, client, service } => {
                let removed = store.unpin(key, monotonic_ns())?;
                store.forget_datagrams(&[*key].into())?;
                self.scan_due = Instant::now();
                let what = if removed { "unpinned" } else { "already unpinned:" };
                Ok(format!("{what} {client} of {service}"))
            }
            Target::Service { id, service, .. } => {
                let unpin = Unpin::new(store, catalog, *id, service.clone());
                let progress = unpin.progress();
                self.unpin = Some(unpin);
                Ok(progress)
            }
        }
    }

    /// Continues to unpin; returns the progress, or `None` if there is nothing to unpin.
    ///
    /// # Errors
    /// [`TopError`].
    pub fn go_on_unpinning(&mut self) -> Result<Option<String>, TopError> {
        let Some(mut unpin) = self.unpin.take() else { return Ok(None) };
        let more = unpin.step(&self.dataplane.store)?;
        let progress = unpin.progress();
        if more {
            self.unpin = Some(unpin);
        } else {
            self.scan_due = Instant::now();
        }
        Ok(Some(progress))
    }

    /// Whether there is a slice to process soon.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.unpin.is_some() || self.scan.as_ref().is_some_and(|scan| !scan.clients().complete)
    }
}
