//! `affinity events`: changes of pins that are still in the ring, and new ones.

use std::{
    io::{self, BufWriter, StdoutLock, Write},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use affinity_common::{abi::Event, names};
use clap::Args;

use super::{
    error::Error,
    output::{Format, Listing, wants_colour},
    reading::{FilterArgs, Reading},
};
use crate::{
    events::EventReader,
    pins::PinDir,
    sys::{Map, SysError},
    view::{Catalog, EventView},
};

/// How often to read the ring.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How often to look for the dataplane: it may be removed, or get another ring.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Options of `affinity events`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct EventsArgs {
    /// Keep printing new events, until interrupted
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    filter: FilterArgs,
    /// Output format; JSON is one object per line
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl EventsArgs {
    pub(crate) fn run(&self, pin_dir: &Path) -> Result<(), Error> {
        let mut source = Source::open(pin_dir)?;
        let mut printer = self.printer(&source.reading.catalog);
        loop {
            while let Some(event) = source.next()? {
                if let Some(view) = EventView::new(&source.reading.catalog, &event)
                    && self.takes(&view)
                {
                    printer.print(&view)?;
                }
            }
            printer.flush()?;
            source.report_missed();
            if !self.follow {
                return printer.finish();
            }
            thread::sleep(POLL_INTERVAL);
            source.check(pin_dir)?;
        }
    }

    fn takes(&self, event: &EventView<'_>) -> bool {
        let FilterArgs { service, client, backend } = &self.filter;
        let is_called = |wanted: &String| [event.from, event.to].iter().flatten().any(|pod| pod.is_called(wanted));
        service.as_ref().is_none_or(|wanted| event.service.as_deref() == Some(wanted))
            && client.as_ref().is_none_or(|wanted| event.client.is_some_and(|client| wanted.takes(&client)))
            && backend.as_ref().is_none_or(is_called)
    }

    fn printer(&self, catalog: &Catalog) -> Printer {
        let out = BufWriter::new(io::stdout().lock());
        if self.output == Format::Json {
            return Printer::Lines(out);
        }
        let time_and_kind = [24, 8];
        let widths = time_and_kind.into_iter().chain([catalog.longest_service_name(), 15]).collect();
        let listing = Listing::new::<EventView<'_>>(out, self.output, wants_colour());
        Printer::Listing(listing.with_known_widths(widths))
    }
}

/// Events are a stream: JSON has one per line, so that a reader can use each at once.
enum Printer {
    Lines(BufWriter<StdoutLock<'static>>),
    Listing(Listing<BufWriter<StdoutLock<'static>>>),
}

impl Printer {
    fn print(&mut self, event: &EventView<'_>) -> io::Result<()> {
        match self {
            Self::Lines(out) => {
                serde_json::to_writer(&mut *out, event)?;
                out.write_all(b"\n")
            }
            Self::Listing(listing) => listing.push(event),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Lines(out) => out.flush(),
            Self::Listing(listing) => listing.flush(),
        }
    }

    fn finish(self) -> Result<(), Error> {
        let rows = match self {
            Self::Lines(mut out) => return Ok(out.flush()?),
            Self::Listing(listing) => listing.finish()?,
        };
        if rows == 0 {
            eprintln!("no events");
        }
        Ok(())
    }
}

/// The ring, with a catalog that knows the names in the last event.
struct Source {
    reading: Reading,
    events: EventReader,
    reported_missed: u64,
    checked: Instant,
}

impl Source {
    fn open(pin_dir: &Path) -> Result<Self, Error> {
        let reading = Reading::open(pin_dir)?;
        let events = EventReader::from_oldest(&reading.store.events)?;
        Ok(Self { reading, events, reported_missed: 0, checked: Instant::now() })
    }

    /// The next event; `None` if there is no new one. The catalog is read again for services and pods that it does not know.
    fn next(&mut self) -> Result<Option<Event>, Error> {
        let Some(event) = self.events.next() else { return Ok(None) };
        if !knows(&self.reading.catalog, &event) {
            self.reading.refresh()?;
        }
        Ok(Some(event))
    }

    fn report_missed(&mut self) {
        let missed = self.events.missed();
        if missed > self.reported_missed {
            eprintln!("warning: {} events were overwritten before they could be read", missed - self.reported_missed);
            self.reported_missed = missed;
        }
    }

    /// Fails if the dataplane was removed, and starts again if it has another ring.
    fn check(&mut self, pin_dir: &Path) -> Result<(), Error> {
        if self.checked.elapsed() < CHECK_INTERVAL {
            return Ok(());
        }
        self.checked = Instant::now();
        let ring = Map::open(&PinDir::new(pin_dir).map(names::EVENTS));
        match ring {
            Ok(ring) if ring.info().id == self.reading.store.events.info().id => {}
            Err(error) if !error.is_not_found() => return Err(SysError::into(error)),
            _ => *self = Self::open(pin_dir)?,
        }
        Ok(())
    }
}

fn knows(catalog: &Catalog, event: &Event) -> bool {
    let known = |backend, generation| generation == 0 || catalog.generation(backend) == Some(generation);
    (event.service == 0 || catalog.policy(event.service).is_some()) && known(event.to.index, event.to.generation)
}
