//! `affinity pin` and `affinity unpin`: an operator's changes to pins.

use std::{
    io::{self, Write},
    path::Path,
};

use affinity_common::{
    abi::{MEMBER_READY, MemberKey, Reason, Session, SessionKey, Timer, V4, V6},
    select::next_draw,
};
use clap::{ArgGroup, Args};

use super::{
    client::ClientArg,
    error::Error,
    progress::Progress,
    reading::{Filter, FilterArgs, Reading},
};
use crate::{
    store::kernel::Family,
    view::{Client, Clock, Policy, mapped},
};

/// Options of `affinity unpin`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
#[command(group = ArgGroup::new("which").required(true).args(["client", "backend", "all"]))]
pub(crate) struct UnpinArgs {
    /// The service; pins that it shares with a group are removed for the whole group
    #[arg(long, value_name = "NAMESPACE/NAME")]
    service: String,
    /// This client's pin, or those of all clients in a network, of the node itself (`node`), or of a pod on it
    #[arg(long, value_name = "IP[/PREFIX]|NAME")]
    client: Option<ClientArg>,
    /// All pins to this pod
    #[arg(long, value_name = "IP|NAME")]
    backend: Option<String>,
    /// All pins of the service
    #[arg(long)]
    all: bool,
}

impl UnpinArgs {
    pub(crate) fn run(&self, pin_dir: &Path) -> Result<(), Error> {
        let reading = Reading::open(pin_dir)?;
        let args = FilterArgs {
            service: Some(self.service.clone()),
            client: self.client.clone(),
            backend: self.backend.clone(),
        };
        let filter = Filter::new(&args, &reading.catalog)?;
        let mut progress = Progress::new("unpinning");
        let mut unpinned = 0u64;
        reading.sessions(&filter, &mut |key, _| {
            unpinned += u64::from(reading.store.unpin(&key, Clock::now().now_ns)?);
            progress.step();
            Ok(())
        })?;
        drop(progress);
        let clients = if unpinned == 1 { "client" } else { "clients" };
        writeln!(io::stdout(), "unpinned {unpinned} {clients} of {}", self.service)?;
        Ok(())
    }
}

/// Options of `affinity pin`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct PinArgs {
    /// The service; a pin that it shares with a group is set for the whole group
    #[arg(long, value_name = "NAMESPACE/NAME")]
    service: String,
    /// The client; where the service keys its pins by network, that network
    #[arg(long, value_name = "IP")]
    client: std::net::IpAddr,
    /// The pod: ready, and an endpoint of the service
    #[arg(long, value_name = "IP|NAME")]
    backend: String,
}

impl PinArgs {
    pub(crate) fn run(&self, pin_dir: &Path) -> Result<(), Error> {
        let reading = Reading::open(pin_dir)?;
        let id = reading.catalog.service_id(&self.service).ok_or_else(|| Error::no_service(&self.service))?;
        let policy = reading.catalog.policy(id).ok_or_else(|| Error::no_service(&self.service))?;
        if !policy.affinity {
            let service = &self.service;
            return Err(Error::Usage(format!("{service} keeps no pins: its sessionAffinity is None, not ClientIP")));
        }
        let (prefix, family) = match self.client {
            std::net::IpAddr::V4(_) => (policy.prefix_v4, "IPv4"),
            std::net::IpAddr::V6(_) => (policy.prefix_v6, "IPv6"),
        };
        let Some(prefix) = prefix else {
            return Err(Error::Usage(format!(
                "{} has no {family} address that {} could dial",
                self.service, self.client
            )));
        };
        let backend = self.ready_member(&reading, id)?;
        match self.client {
            std::net::IpAddr::V4(_) => self.put::<V4>(&reading, id, policy, prefix, backend)?,
            std::net::IpAddr::V6(_) => self.put::<V6>(&reading, id, policy, prefix, backend)?,
        }
        let client = Client::new(self.client, prefix);
        let pod = reading.catalog.backend_now(backend);
        writeln!(io::stdout(), "pinned {client} to {pod} for {}", self.service)?;
        Ok(())
    }

    /// The index of the pod, where a frontend of the client's family may choose it.
    fn ready_member(&self, reading: &Reading, service: u32) -> Result<u32, Error> {
        let catalog = &reading.catalog;
        let called = catalog.backends_called(&self.backend);
        if called.is_empty() {
            return Err(Error::no_backend(&self.backend));
        }
        let frontends = catalog.frontend_records(self.client.is_ipv4()).filter(|record| record.service == service);
        let members = &catalog.observed().members;
        let mut candidates = frontends
            .flat_map(|record| called.iter().map(|&backend| MemberKey { pool: record.pool, backend }))
            .filter_map(|key| Some((key.backend, members.get(&key)?)))
            .filter(|(backend, member)| catalog.generation(*backend) == Some(member.generation))
            .peekable();
        if candidates.peek().is_none() {
            let (backend, service, client) = (&self.backend, &self.service, self.client);
            return Err(Error::Usage(format!("{backend} is no endpoint of {service} for clients like {client}")));
        }
        candidates.find(|(_, member)| member.state == MEMBER_READY).map(|(backend, _)| backend).ok_or_else(|| {
            Error::Usage(format!("{} is draining: it takes no new connections of {}", self.backend, self.service))
        })
    }

    fn put<A: Family>(
        &self,
        reading: &Reading,
        service: u32,
        policy: &Policy,
        prefix: u8,
        backend: u32,
    ) -> Result<(), Error> {
        let key = SessionKey::new(policy.group, A::from_mapped(mapped(self.client)), prefix);
        let generation = reading.catalog.generation(backend).unwrap_or(0);
        let old = reading.store.family::<A>().sessions.get(&key)?;
        let same = old.filter(|old| (old.backend, old.generation) == (backend, generation));
        let now_ns = Clock::now().now_ns;
        let session = Session {
            created_ns: now_ns,
            last_used_ns: now_ns,
            backend,
            generation,
            service,
            draw: next_draw(now_ns as u32),
            // Connections that live on go on counting under `alive`, as far as they are to this pod.
            connections: same.filter(|_| policy.timer == Timer::Alive).map_or(0, |same| same.connections),
            uses: 0,
            reason: Reason::OperatorPinned as u8,
            pad: [0; 7],
        };
        Ok(reading.store.put_session(&key, &session)?)
    }
}
