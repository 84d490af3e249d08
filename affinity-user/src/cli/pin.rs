//! `affinity pin` and `affinity unpin`: operators' changes of pins.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    net::IpAddr,
    path::Path,
};

use affinity_common::{
    abi::{
        Address, BackendRef, MEMBER_READY, MOVES, MemberKey, Reason, Session, SessionKey, Timer, V4, V6, netns_client,
    },
    select::next_draw,
};
use clap::{ArgGroup, Args};

use super::{
    client::ClientArg,
    error::Error,
    output::Progress,
    reading::{Filter, FilterArgs, Reading},
};
use crate::{
    store::kernel::Family,
    sys::monotonic_ns,
    view::{Catalog, Client, Policy, ip, mapped},
};

/// Options of `affinity unpin`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
#[command(group = ArgGroup::new("which").required(true).args(["client", "backend", "all"]))]
pub(crate) struct UnpinArgs {
    /// The service; pins that it shares with a group are removed for the whole group
    #[arg(long, value_name = "NAMESPACE/NAME")]
    service: String,
    /// Remove the pins of this client: an address, a network, or by name the sockets of the node itself (`node`) or of a
    /// pod on it
    #[arg(long, value_name = "IP[/PREFIX]|NAME")]
    client: Option<ClientArg>,
    /// Remove all pins to this pod
    #[arg(long, value_name = "IP|NAME")]
    backend: Option<String>,
    /// Remove all pins of the service
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
        let mut unpinned = BTreeSet::new();
        reading.sessions(&filter, &mut |key, _| {
            if reading.store.unpin(&key, monotonic_ns())? {
                unpinned.insert(key);
            }
            progress.step();
            Ok(())
        })?;
        reading.store.forget_datagrams(&unpinned)?;
        let unpinned = unpinned.len();
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
    /// The client: an address, or by name the sockets of the node itself (`node`) or of a pod on it. If the service pins
    /// networks (annotation client-prefix), the network of the address is pinned
    #[arg(long, value_name = "IP|NAME")]
    client: ClientArg,
    /// The pod: a ready endpoint of the service
    #[arg(long, value_name = "IP|NAME")]
    backend: String,
}

/// A client, in the form that the frontends of one family use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Key {
    client: Client,
    /// Whether these are IPv4 frontends.
    ipv4: bool,
}

impl PinArgs {
    pub(crate) fn run(&self, pin_dir: &Path) -> Result<(), Error> {
        let reading = Reading::open(pin_dir)?;
        let id = reading.catalog.service_id(&self.service).ok_or_else(|| Error::no_service(&self.service))?;
        let policy = reading.catalog.policy(id).ok_or_else(|| Error::no_service(&self.service))?;
        if !policy.affinity {
            let service = &self.service;
            return Err(Error::Usage(format!(
                "service {service} has no pins: its sessionAffinity is None, not ClientIP"
            )));
        }
        let keys = self.keys(&reading.catalog, policy)?;
        // A namespace connects to frontends of both families, and is pinned in the families in which the pod serves.
        let members: Vec<_> = keys.iter().map(|key| (key, self.ready_member(&reading, id, *key))).collect();
        if members.iter().all(|(_, member)| member.is_err()) {
            return members.into_iter().find_map(|(_, member)| member.err()).map_or(Ok(()), Err);
        }
        let mut lines = BTreeSet::new();
        for (key, backend) in members.into_iter().filter_map(|(key, member)| Some((key, member.ok()?))) {
            if key.client.address().is_ipv4() {
                self.put::<V4>(&reading, id, policy, key.client, backend)?;
            } else {
                self.put::<V6>(&reading, id, policy, key.client, backend)?;
            }
            let client = reading.catalog.client(key.client.address(), id);
            let pod = reading.catalog.backend_now(backend);
            lines.insert(format!("pinned {client} to {pod} for {}", self.service));
        }
        for line in lines {
            writeln!(io::stdout(), "{line}")?;
        }
        Ok(())
    }

    /// The keys of the client in the service's tables: one for an address, and up to two, one for each family of the service,
    /// for each namespace with the name or the address.
    fn keys(&self, catalog: &Catalog, policy: &Policy) -> Result<Vec<Key>, Error> {
        let key = |client, ipv4| Key { client, ipv4 };
        let cookies = self.client.cookies(catalog)?;
        let of = |cookie, family| Client::new(ip(netns_client(cookie, family)), V6::BITS);
        let v4 = cookies.iter().filter_map(|cookie| policy.prefix_v4.map(|_| key(of(*cookie, 4), true)));
        let v6 = cookies.iter().filter_map(|cookie| policy.prefix_v6.map(|_| key(of(*cookie, 6), false)));
        let mut keys: Vec<_> = v4.chain(v6).collect();
        let address = self.client.address();
        if address.is_none() && !keys.is_empty() {
            return Ok(keys);
        }
        let Some(address) = address.map(|client| client.address()) else {
            return Err(Error::Usage("--client: `pin` takes one client: give an address, not a network".to_owned()));
        };
        let (prefix, family) = match address {
            IpAddr::V4(_) => (policy.prefix_v4, "IPv4"),
            IpAddr::V6(_) => (policy.prefix_v6, "IPv6"),
        };
        let prefix = prefix.ok_or_else(|| {
            Error::Usage(format!("service {} has no {family} frontend for client {address}", self.service))
        })?;
        keys.push(key(Client::new(address, prefix), address.is_ipv4()));
        Ok(keys)
    }

    /// The index of the pod, if a frontend of the client's family may select it.
    fn ready_member(&self, reading: &Reading, service: u32, key: Key) -> Result<u32, Error> {
        let catalog = &reading.catalog;
        let called = catalog.backends_called(&self.backend);
        if called.is_empty() {
            return Err(Error::no_backend(&self.backend));
        }
        let frontends = catalog.frontend_records(key.ipv4).filter(|record| record.service == service);
        let members = &catalog.observed().members;
        let mut candidates = frontends
            .flat_map(|record| called.iter().map(|&backend| MemberKey { pool: record.pool, backend }))
            .filter_map(|key| Some((key.backend, members.get(&key)?)))
            .filter(|(backend, member)| catalog.generation(*backend) == Some(member.generation))
            .peekable();
        if candidates.peek().is_none() {
            let (backend, service) = (&self.backend, &self.service);
            let client = catalog.client(key.client.address(), 0);
            return Err(Error::Usage(format!("{backend} is not an endpoint of {service} for client {client}")));
        }
        candidates.find(|(_, member)| member.state == MEMBER_READY).map(|(backend, _)| backend).ok_or_else(|| {
            Error::Usage(format!(
                "{} is draining and takes no new connections of {}: choose a ready pod",
                self.backend, self.service
            ))
        })
    }

    fn put<A: Family>(
        &self,
        reading: &Reading,
        service: u32,
        policy: &Policy,
        client: Client,
        backend: u32,
    ) -> Result<(), Error> {
        let key = SessionKey::new(policy.group, A::from_mapped(mapped(client.address())), client.prefix());
        let backend = BackendRef { index: backend, generation: reading.catalog.generation(backend).unwrap_or(0) };
        let old = reading.store.family::<A>().sessions.get(&key)?;
        let same = old.filter(|old| old.backend == backend);
        let now_ns = monotonic_ns();
        let session = Session {
            created_ns: now_ns,
            last_used_ns: now_ns,
            backend,
            service,
            draw: next_draw(now_ns as u32),
            // With `alive`, continuing connections are still counted if they are to this pod.
            connections: match (same, old) {
                (Some(same), _) if policy.timer == Timer::Alive => same.connections,
                (_, old) => old.map_or(0, |old| old.connections).wrapping_add(MOVES) / MOVES * MOVES,
            },
            uses: 0,
            reason: Reason::OperatorPinned as u8,
            pad: [0; 7],
        };
        Ok(reading.store.put_session(&key, &session)?)
    }
}
