//! The connections of lingering backends. They are checked every second while there are any.
//!
//! A lingering backend gets no new connection, so one pass over all flows and sockets finds all connections that it has; after
//! that they are looked up one by one. The cost depends on the number of these connections, not on the number of all
//! connections.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use affinity_common::{
    abi::{Address, BackendRef, Direction, FLOW_SHADOW, Flow, FlowKey, Port, Socket, SocketKey, V4, V6},
    headers::UDP,
    state,
};
use tracing::debug;

use crate::{
    linger::Traffic,
    sockets,
    store::{
        StoreError,
        kernel::{Family, KernelStore},
    },
    sys::monotonic_ns,
};

/// The shortest interval between checks. If a check takes long, the interval is a multiple of that time.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
const REST_FACTOR: u32 = 4;
/// The interval between queries for sockets: a query visits every network namespace.
const ASK_SOCKETS_EVERY: Duration = Duration::from_secs(2);

/// The key of a flow of either family, in the direction of its client's packets.
#[derive(Clone, Copy, Debug)]
struct ClientKey {
    is_v4: bool,
    saddr: [u8; 16],
    daddr: [u8; 16],
    sport: Port,
    dport: Port,
    protocol: u8,
}

impl ClientKey {
    fn new<A: Address>(key: &FlowKey<A>) -> Self {
        let FlowKey { saddr, daddr, sport, dport, protocol, .. } = *key;
        Self { is_v4: A::BITS == V4::BITS, saddr: saddr.to_mapped(), daddr: daddr.to_mapped(), sport, dport, protocol }
    }

    fn key<A: Address>(&self) -> FlowKey<A> {
        FlowKey {
            saddr: A::from_mapped(self.saddr),
            daddr: A::from_mapped(self.daddr),
            sport: self.sport,
            dport: self.dport,
            protocol: self.protocol,
            direction: Direction::Dnat as u8,
            pad: [0; 2],
        }
    }
}

/// The connections of one backend.
#[derive(Clone, Debug, Default)]
struct Connections {
    flows: Vec<ClientKey>,
    sockets: Vec<SocketKey>,
}

/// The connections of all lingering backends.
#[derive(Debug)]
pub(super) struct Watch {
    /// Connections of the backends that lingered when the current pass began.
    found: BTreeMap<BackendRef, Connections>,
    /// Connections of the backends that lingered when the last complete pass began.
    known: BTreeMap<BackendRef, Connections>,
    /// Whether a lingering backend is missing from `known`.
    is_behind: bool,
    due: Instant,
    sockets_due: Instant,
    /// Cookies of sockets that had no answer at the last query, and below, when each socket last got one.
    unanswered: BTreeSet<u64>,
    answered_ns: BTreeMap<u64, u64>,
    traffic: BTreeMap<u32, Traffic>,
}

impl Watch {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            found: BTreeMap::new(),
            known: BTreeMap::new(),
            is_behind: false,
            due: now,
            sockets_due: now,
            unanswered: BTreeSet::new(),
            answered_ns: BTreeMap::new(),
            traffic: BTreeMap::new(),
        }
    }

    /// Begins a pass.
    pub(super) fn begin(&mut self, store: &KernelStore) {
        self.found = store.lingering().into_iter().map(|backend| (backend, Connections::default())).collect();
    }

    /// The pass has met all flows and sockets.
    pub(super) fn finish(&mut self) {
        self.known = std::mem::take(&mut self.found);
        self.is_behind = false;
        self.due = Instant::now();
    }

    /// Notes a flow that the pass has met. Datagrams need a lingering backend only if their service has gone: otherwise they
    /// follow its pool.
    pub(super) fn note_flow<A: Address>(
        &mut self,
        store: &KernelStore,
        key: &FlowKey<A>,
        flow: &Flow<A>,
    ) -> Result<(), StoreError> {
        let counts = key.direction == Direction::Dnat as u8 && flow.state & FLOW_SHADOW == 0;
        let of = self.found.get_mut(&flow.backend).filter(|_| counts);
        let Some(of) = of else { return Ok(()) };
        if !store.follows_pool(key.protocol, V6(key.daddr.to_mapped()), key.dport)? {
            of.flows.push(ClientKey::new(key));
        }
        Ok(())
    }

    /// Notes a socket that the pass has met; the caller leaves out entries of received datagrams.
    pub(super) fn note_socket(
        &mut self,
        store: &KernelStore,
        key: &SocketKey,
        socket: &Socket,
    ) -> Result<(), StoreError> {
        let Some(of) = self.found.get_mut(&socket.backend) else { return Ok(()) };
        if !store.follows_pool(key.protocol, socket.frontend, socket.frontend_port)? {
            of.sockets.push(*key);
        }
        Ok(())
    }

    /// Whether there are lingering backends with unknown connections, so that another pass is wanted.
    pub(super) const fn is_behind(&self) -> bool {
        self.is_behind
    }

    /// The traffic at the last check, by backend.
    pub(super) const fn traffic(&self) -> &BTreeMap<u32, Traffic> {
        &self.traffic
    }

    /// Checks the connections, if that is due.
    pub(super) fn look(&mut self, store: &KernelStore) -> Result<(), StoreError> {
        let began = Instant::now();
        if began < self.due {
            return Ok(());
        }
        let lingering = store.lingering();
        self.known.retain(|backend, _| lingering.contains(backend));
        self.is_behind = lingering.iter().any(|backend| !self.known.contains_key(backend));
        self.traffic.clear();
        self.ask_sockets(store)?;
        let Self { known, unanswered, answered_ns, traffic, .. } = self;
        for (backend, of) in known {
            traffic.insert(backend.index, of.look(store, *backend, unanswered, answered_ns)?);
        }
        self.due = began + LOOK_EVERY.max(began.elapsed() * REST_FACTOR);
        Ok(())
    }

    /// Queries the kernel for the state of sockets: the programs do not see their packets.
    fn ask_sockets(&mut self, store: &KernelStore) -> Result<(), StoreError> {
        let now = Instant::now();
        if now < self.sockets_due {
            return Ok(());
        }
        self.sockets_due = now + ASK_SOCKETS_EVERY;
        let mut wanted = BTreeMap::new();
        for key in self.known.values().flat_map(|of| &of.sockets) {
            wanted.extend(store.sockets.get(key)?.map(|socket| (key.cookie, (*key, socket))));
        }
        self.unanswered.clear();
        self.answered_ns.clear();
        if wanted.is_empty() {
            return Ok(());
        }
        let now_ns = monotonic_ns();
        for (cookie, pulse) in sockets::pulses(&wanted) {
            let ago_ns = u64::try_from(pulse.answered_ago.as_nanos()).unwrap_or(u64::MAX);
            self.answered_ns.insert(cookie, now_ns.saturating_sub(ago_ns));
            self.unanswered.extend(pulse.is_unanswered.then_some(cookie));
        }
        debug!(sockets = wanted.len(), unanswered = self.unanswered.len(), "sweep: sockets of pods that linger");
        Ok(())
    }
}

impl Connections {
    /// Looks up each connection, and forgets those that are gone.
    fn look(
        &mut self,
        store: &KernelStore,
        backend: BackendRef,
        unanswered: &BTreeSet<u64>,
        answered_ns: &BTreeMap<u64, u64>,
    ) -> Result<Traffic, StoreError> {
        let mut traffic = Traffic { generation: backend.generation, ..Traffic::default() };
        let mut flows = Vec::with_capacity(self.flows.len());
        for key in &self.flows {
            let is_there = if key.is_v4 {
                look_up::<V4>(store, &key.key(), backend, &mut traffic)?
            } else {
                look_up::<V6>(store, &key.key(), backend, &mut traffic)?
            };
            flows.extend(is_there.then_some(*key));
        }
        self.flows = flows;
        let mut sockets = Vec::with_capacity(self.sockets.len());
        for key in &self.sockets {
            let socket = store.sockets.get(key)?;
            if socket.is_none_or(|socket| socket.backend != backend) {
                continue;
            }
            traffic.connections += 1;
            traffic.open += 1;
            traffic.answered_ns = traffic.answered_ns.max(answered_ns.get(&key.cookie).copied().unwrap_or(0));
            traffic.unanswered_sockets += u64::from(unanswered.contains(&key.cookie));
            sockets.push(*key);
        }
        self.sockets = sockets;
        Ok(traffic)
    }
}

/// Adds the data of both records of a flow; false if the flow no longer belongs to this backend.
fn look_up<A: Family>(
    store: &KernelStore,
    key: &FlowKey<A>,
    backend: BackendRef,
    traffic: &mut Traffic,
) -> Result<bool, StoreError> {
    let flows = &store.family::<A>().flows;
    let is_its_own = |flow: &Flow<A>| flow.backend == backend;
    let Some(flow) = flows.get(key)?.filter(is_its_own) else { return Ok(false) };
    let reply = flows.get(&key.opposite(&flow.edit))?.filter(is_its_own);
    traffic.connections += 1;
    traffic.open += u64::from(!state::is_closed(flow.state));
    // A datagram need not be answered, so an unanswered one proves nothing about the pod.
    if key.protocol != UDP {
        traffic.asked_ns = traffic.asked_ns.max(flow.last_used_ns);
    }
    traffic.answered_ns = traffic.answered_ns.max(reply.map_or(0, |reply| reply.last_used_ns));
    Ok(true)
}
