//! `affinity get`: listings.

use std::{
    io::{self, BufWriter, IsTerminal, Write},
    path::Path,
    thread,
    time::Duration,
};

use clap::{Args, ValueEnum};

use super::{
    error::Error,
    output::{Format, Listing, Progress, Row, Tone, list, paint, wants_colour},
    reading::{Filter, FilterArgs, Reading},
};
use crate::{
    agent::CLIENTS_ARE_NODES,
    attach::{self, device_name},
    pins::PinDir,
    view::{
        BackendView, Catalog, CounterView, DeviceView, FlowView, ServiceView, SessionView, StatusView, short_duration,
    },
};

/// How often `--watch` lists again.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// What to list.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Resource {
    /// Services: frontends, endpoints and affinity policy
    #[value(alias = "service")]
    Services,
    /// Pods, with the number of pinned clients and of connections
    #[value(alias = "backend")]
    Backends,
    /// Pins: which client is pinned to which pod, and for how long
    #[value(alias = "session")]
    Sessions,
    /// Translated connections
    #[value(alias = "flow")]
    Flows,
    /// Network devices and cgroups with attached programs
    #[value(alias = "device")]
    Devices,
    /// Number of packets by reason
    #[value(alias = "counter")]
    Counters,
}

impl Resource {
    fn name(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::Backends => "backends",
            Self::Sessions => "sessions",
            Self::Flows => "flows",
            Self::Devices => "devices",
            Self::Counters => "counters",
        }
    }
}

/// Options of `affinity get`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct GetArgs {
    /// What to list
    resource: Resource,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    filter: FilterArgs,
    /// Repeat the list every second, until interrupted
    #[arg(short, long)]
    watch: bool,
}

impl GetArgs {
    pub(crate) fn run(&self, pin_dir: &Path) -> Result<(), Error> {
        self.check_filter()?;
        let out = io::stdout().lock();
        let terminal = out.is_terminal();
        let mut out = BufWriter::with_capacity(1 << 16, out);
        loop {
            if self.watch && terminal {
                out.write_all(b"\x1b[H\x1b[2J\x1b[3J")?;
            }
            let rows = self.print(pin_dir, &mut out)?;
            out.flush()?;
            if rows == 0 && matches!(self.output, Format::Table | Format::Wide) {
                eprintln!("no {}", self.resource.name());
            }
            if !self.watch {
                return Ok(());
            }
            thread::sleep(WATCH_INTERVAL);
        }
    }

    /// A filter that cannot have any effect is an error.
    fn check_filter(&self) -> Result<(), Error> {
        let FilterArgs { service, client, backend } = &self.filter;
        let (by_service, by_client, by_backend) = match self.resource {
            Resource::Sessions | Resource::Flows => (true, true, true),
            Resource::Backends => (true, false, true),
            Resource::Services => (true, false, false),
            Resource::Devices | Resource::Counters => (false, false, false),
        };
        let given = [
            ("--service", service.is_some() && !by_service),
            ("--client", client.is_some() && !by_client),
            ("--backend", backend.is_some() && !by_backend),
        ];
        match given.iter().find(|(_, useless)| *useless) {
            Some((option, _)) => {
                Err(Error::Usage(format!("{option} does not apply to `affinity get {}`", self.resource.name())))
            }
            None => Ok(()),
        }
    }

    /// Prints the listing, and returns the number of rows.
    fn print(&self, pin_dir: &Path, out: &mut impl Write) -> Result<u64, Error> {
        let reading = Reading::open(pin_dir)?;
        let catalog = &reading.catalog;
        let filter = Filter::new(&self.filter, catalog)?;
        match self.resource {
            Resource::Sessions => self.sessions(&reading, &filter, out),
            Resource::Flows => {
                let mut listing = self.listing::<FlowView<'_>, _>(catalog, out);
                reading.flows(&filter, &mut |flow| Ok(listing.push(flow)?))?;
                Ok(listing.finish()?)
            }
            Resource::Services => {
                let mut services = ServiceView::all(catalog, &reading.live_sessions()?);
                services.retain(|view| self.filter.service.as_ref().is_none_or(|wanted| *wanted == view.service));
                let rows = self.list(out, &services)?;
                self.masqueraded(&services, out)?;
                self.age(catalog.status(), out)?;
                Ok(rows)
            }
            Resource::Backends => {
                let mut backends = BackendView::all(catalog, &reading.live_sessions()?, &reading.open_connections()?);
                let FilterArgs { service, backend, .. } = &self.filter;
                backends.retain(|view| {
                    service.as_ref().is_none_or(|wanted| view.services.contains(wanted))
                        && backend.as_ref().is_none_or(|wanted| view.backend.is_called(wanted))
                });
                self.list(out, &backends)
            }
            Resource::Counters => self.list(out, &CounterView::all(&reading.store.counter_sums()?)),
            Resource::Devices => self.list(out, &devices(pin_dir)?),
        }
    }

    /// Lines below the table: services with clients that all look like nodes.
    fn masqueraded(&self, services: &[ServiceView<'_>], out: &mut impl Write) -> Result<(), Error> {
        let named = services.iter().filter(|service| service.clients_are_nodes);
        let lines = named.map(|service| format!("{}: {CLIENTS_ARE_NODES}", service.service));
        let is_table = matches!(self.output, Format::Table | Format::Wide);
        for (number, line) in lines.filter(|_| is_table).enumerate() {
            let line = paint(&line, Tone::Attention, wants_colour());
            writeln!(out, "{}{line}", if number == 0 { "\n" } else { "" })?;
        }
        Ok(())
    }

    /// A line below the table: the age of the source's data.
    fn age(&self, status: Option<&StatusView>, out: &mut impl Write) -> Result<(), Error> {
        let (Format::Table | Format::Wide, Some(status)) = (self.output, status) else { return Ok(()) };
        let (age, tone) = match &status.as_of {
            Some(moment) if moment.age < StatusView::STALE => (short_duration(moment.age.as_secs()), Tone::Faint),
            Some(moment) => (short_duration(moment.age.as_secs()), Tone::Attention),
            None => return Ok(writeln!(out, "\nsource: {}, not read yet", status.source)?),
        };
        let line = paint(&format!("source: {}, as of {age} ago", status.source), tone, wants_colour());
        Ok(writeln!(out, "\n{line}")?)
    }

    fn sessions(&self, reading: &Reading, filter: &Filter, out: &mut impl Write) -> Result<u64, Error> {
        let mut listing = self.listing::<SessionView<'_>, _>(&reading.catalog, out);
        // On a terminal the rows themselves show the progress.
        let mut progress = (!io::stdout().is_terminal()).then(|| Progress::new("reading sessions"));
        reading.sessions(filter, &mut |_, session| {
            if let Some(progress) = &mut progress {
                progress.step();
            }
            Ok(listing.push(session)?)
        })?;
        Ok(listing.finish()?)
    }

    fn listing<R: Row, W: Write>(&self, catalog: &Catalog, out: W) -> Listing<W> {
        Listing::new::<R>(out, self.output, wants_colour()).with_known_widths(vec![catalog.longest_service_name()])
    }

    fn list<R: Row>(&self, out: &mut impl Write, rows: &[R]) -> Result<u64, Error> {
        Ok(list(out, self.output, wants_colour(), rows)?)
    }
}

fn devices(pin_dir: &Path) -> Result<Vec<DeviceView>, Error> {
    let pins = PinDir::new(pin_dir);
    let (devices, network) = attach::survey()?;
    let roles = attach::roles(&devices, &network);
    let mut views =
        DeviceView::all(&attach::attachments(&pins)?, device_name, &roles, &attach::device_flags::notes(&pins)?);
    views.extend(DeviceView::cgroups(&attach::cgroup::attachments(&pins)?, attach::cgroup::directory));
    Ok(views)
}
