//! Reads a running dataplane: its small tables at once, sessions and flows one at a time.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
};

use affinity_common::{
    abi::{
        Address, BackendRef, Direction, Flow, FlowKey, Frontend, Session, SessionKey, SocketRole, V4, V6, netns_client,
    },
    headers::UDP,
};
use clap::Args;

use super::{client::ClientArg, error::Error, output::Progress};
use crate::{
    store::kernel::{Family, KernelStore, PinKey},
    view::{Catalog, Client, ClientRef, FlowState, FlowView, LiveSessions, ServicePins, SessionView},
};

/// Which objects to list.
#[derive(Args, Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct FilterArgs {
    /// Only this service
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub(crate) service: Option<String>,
    /// Only this client: an address, a network, or by name the sockets of the node itself (`node`) or of a pod on it
    #[arg(long, value_name = "IP[/PREFIX]|NAME")]
    pub(crate) client: Option<ClientArg>,
    /// Only this pod
    #[arg(long, value_name = "IP|NAME")]
    pub(crate) backend: Option<String>,
}

/// [`FilterArgs`] with names looked up.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Filter {
    service: Option<ServicePins>,
    /// The pools of the service.
    pools: Option<BTreeSet<u32>>,
    client: Option<ClientArg>,
    backends: Option<BTreeSet<u32>>,
}

impl Filter {
    /// Fails if a name is unknown.
    pub(crate) fn new(args: &FilterArgs, catalog: &Catalog) -> Result<Self, Error> {
        let service = args.service.as_ref().map(|name| {
            let id = catalog.service_id(name).ok_or_else(|| Error::no_service(name))?;
            Ok::<_, Error>(catalog.service_pins(id))
        });
        let backends = args.backend.as_ref().map(|name| {
            let called = catalog.backends_called(name);
            if called.is_empty() { Err(Error::no_backend(name)) } else { Ok(called) }
        });
        Ok(Self {
            service: service.transpose()?,
            pools: args.service.as_ref().map(|name| catalog.pools_of(name)),
            client: args.client.clone(),
            backends: backends.transpose()?,
        })
    }

    fn takes_session(&self, scope: u32, session: &Session) -> bool {
        self.service.as_ref().is_none_or(|pins| pins.contain(scope, session))
            && self.takes_backend(session.backend.index)
    }

    fn takes_flow<A: Address>(&self, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
        let client = || ClientRef { key: Client::new(crate::view::ip(key.saddr), A::BITS), name: None, addresses: &[] };
        self.pools.as_ref().is_none_or(|pools| pools.contains(&flow.pool))
            && self.takes_backend(flow.backend.index)
            && self.client.as_ref().is_none_or(|wanted| wanted.takes(&client()))
    }

    fn takes_backend(&self, backend: u32) -> bool {
        self.backends.as_ref().is_none_or(|backends| backends.contains(&backend))
    }
}

/// A running dataplane and its small tables, as they were when it was opened.
pub(crate) struct Reading {
    pub(crate) store: KernelStore,
    pub(crate) catalog: Catalog,
}

/// The callback for sessions.
type VisitSession<'v> = &'v mut dyn FnMut(PinKey, &SessionView<'_>) -> Result<(), Error>;

impl Reading {
    /// Opens the dataplane at `pin_dir`.
    pub(crate) fn open(pin_dir: &Path) -> Result<Self, Error> {
        let store = KernelStore::open(pin_dir)?;
        let catalog = Catalog::read(&store)?;
        Ok(Self { store, catalog })
    }

    /// Reads the small tables again.
    pub(crate) fn refresh(&mut self) -> Result<(), Error> {
        self.catalog = Catalog::read(&self.store)?;
        Ok(())
    }

    /// Visits the pins that match the filter, in the order of the maps. The pins of a single client are looked up without a
    /// search.
    pub(crate) fn sessions(&self, filter: &Filter, visit: VisitSession<'_>) -> Result<(), Error> {
        match filter.client.as_ref().and_then(ClientArg::address) {
            Some(client) => {
                match client.address() {
                    IpAddr::V4(_) => self.sessions_of::<V4>(filter, client, visit)?,
                    IpAddr::V6(_) => self.sessions_of::<V6>(filter, client, visit)?,
                }
                self.sessions_of_sockets(filter, client, visit)
            }
            None => {
                self.all_sessions::<V4>(filter, visit)?;
                self.all_sessions::<V6>(filter, visit)
            }
        }
    }

    fn all_sessions<A: Family>(&self, filter: &Filter, visit: VisitSession<'_>) -> Result<(), Error>
    where
        PinKey: From<SessionKey<A>>,
    {
        for entry in self.store.family::<A>().sessions.iter() {
            let (key, session) = entry?;
            if !filter.takes_session(key.scope, &session) {
                continue;
            }
            let view = SessionView::new(&self.catalog, &key, &session);
            if filter.client.as_ref().is_none_or(|wanted| wanted.takes(&view.client)) {
                visit(key.into(), &view)?;
            }
        }
        Ok(())
    }

    fn sessions_of<A: Family>(&self, filter: &Filter, client: Client, visit: VisitSession<'_>) -> Result<(), Error>
    where
        PinKey: From<SessionKey<A>>,
    {
        let address = A::from_mapped(crate::view::mapped(client.address()));
        let frontends = self.catalog.frontend_records(client.address().is_ipv4());
        let key = |scope, frontend: &Frontend| SessionKey::new(scope, address, frontend.prefix);
        let keys: BTreeSet<_> =
            frontends.flat_map(|frontend| [key(frontend.group, frontend), key(frontend.own, frontend)]).collect();
        for key in keys {
            let Some(session) = self.store.family::<A>().sessions.get(&key)? else { continue };
            if filter.takes_session(key.scope, &session) {
                visit(key.into(), &SessionView::new(&self.catalog, &key, &session))?;
            }
        }
        Ok(())
    }

    /// The pins of the sockets of a pod that has the address.
    fn sessions_of_sockets(&self, filter: &Filter, client: Client, visit: VisitSession<'_>) -> Result<(), Error> {
        let frontends = [true, false].into_iter().flat_map(|is_ipv4| self.catalog.frontend_records(is_ipv4));
        let scopes: BTreeSet<_> = frontends.flat_map(|frontend| [frontend.group, frontend.own]).collect();
        for cookie in ClientArg::Network(client).cookies(&self.catalog)? {
            for key in [4, 6].map(|family| netns_client(cookie, family)) {
                for key in scopes.iter().map(|&scope| SessionKey::new(scope, key, V6::BITS)) {
                    let Some(session) = self.store.v6.sessions.get(&key)? else { continue };
                    if filter.takes_session(key.scope, &session) {
                        visit(key.into(), &SessionView::new(&self.catalog, &key, &session))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Visits the connections that match the filter, in the order of the maps.
    pub(crate) fn flows(
        &self,
        filter: &Filter,
        visit: &mut dyn FnMut(&FlowView<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.flows_of::<V4>(filter, visit)?;
        self.flows_of::<V6>(filter, visit)
    }

    fn flows_of<A: Family>(
        &self,
        filter: &Filter,
        visit: &mut dyn FnMut(&FlowView<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        for entry in self.store.family::<A>().flows.iter() {
            let (key, flow) = entry?;
            if !filter.takes_flow(&key, &flow) {
                continue;
            }
            if let Some(view) = FlowView::new(&self.catalog, &key, &flow) {
                visit(&view)?;
            }
        }
        Ok(())
    }

    /// Counts the open connections to each lingering backend.
    pub(crate) fn open_connections(&self) -> Result<BTreeMap<u32, u64>, Error> {
        let mut open = BTreeMap::new();
        let lingering = self.store.lingering();
        if lingering.is_empty() {
            return Ok(open);
        }
        self.count_open::<V4>(&lingering, &mut open)?;
        self.count_open::<V6>(&lingering, &mut open)?;
        for entry in &self.store.sockets {
            let (key, socket) = entry?;
            if key.role == SocketRole::Connected as u8 && lingering.contains(&socket.backend) {
                *open.entry(socket.backend.index).or_default() += 1;
            }
        }
        Ok(open)
    }

    fn count_open<A: Family>(
        &self,
        lingering: &BTreeSet<BackendRef>,
        open: &mut BTreeMap<u32, u64>,
    ) -> Result<(), Error> {
        for entry in self.store.family::<A>().flows.iter() {
            let (key, flow) = entry?;
            let is_its_own = lingering.contains(&flow.backend);
            let is_open = matches!(FlowState::new(key.protocol, flow.state), FlowState::Open | FlowState::Closing);
            if is_its_own && is_open && key.direction == Direction::Dnat as u8 && key.protocol != UDP {
                *open.entry(flow.backend.index).or_default() += 1;
            }
        }
        Ok(())
    }

    /// Counts the live pins of every service and pod.
    pub(crate) fn live_sessions(&self) -> Result<LiveSessions, Error> {
        let mut live = LiveSessions::default();
        let mut progress = Progress::new("counting sessions");
        for entry in self.store.v4.sessions.iter() {
            live.add(&self.catalog, &entry?.1);
            progress.step();
        }
        for entry in self.store.v6.sessions.iter() {
            live.add(&self.catalog, &entry?.1);
            progress.step();
        }
        Ok(live)
    }
}
