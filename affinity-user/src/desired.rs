//! What the dataplane should hold for a [`Snapshot`]: a pure function of the snapshot and this node's options.
//!
//! A [`DesiredState`] keeps what was decided, so that the next snapshot costs what has changed in it.
//!
//! Everything here goes by name. Numbers - ids, backend indices, slots - are given by the `plan` module, which knows
//! what is there already.
//!
//! Frontends are a service's cluster IPs, its node ports on this node's addresses, the addresses of its load balancer and
//! its external IPs. What a frontend does may differ for external clients: [`Frontend`].
//!
//! Each service port has a pool for each IP family, and another one of this node's own endpoints where a policy asks for
//! it; a pool's members are the endpoints that its service's slices list for that port. Ready ones take connections; if
//! there are none, those that are terminating but still serve do. All others are kept as draining members, so that their
//! established connections go on. What becomes of pods that no pool has any more is up to the `plan` module.

mod endpoints;
mod exposure;
mod frontends;
mod groups;
mod hash;
mod network;
mod node;
mod ownership;
mod service;
mod state;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use affinity_common::abi::{Selection, Timer};

use crate::source::{ObjectName, Origin, Problem, Severity, Snapshot, Sourced};
use node::Node;
use ownership::is_ours;

pub(crate) use groups::unions;
pub(crate) use hash::{hash32, hash64};
pub use network::{Network, NetworkError};
pub(crate) use node::is_global;
pub use node::{MASQUERADE_PORTS, Masquerade, NodeFacts};
pub use ownership::{DEFAULT_PROXY_NAME, Services, UnknownServices};
pub use state::{Change, DesiredState};

/// What depends on the node.
#[derive(Clone, Debug)]
pub struct Options {
    /// What is known of the node, beside what the snapshot tells of it. Endpoints on it are local.
    pub node: NodeFacts,
    /// Which services are ours.
    pub services: Services,
    /// Our name in the label that gives services to a proxy.
    pub proxy_name: String,
    /// Decide and count, and let every packet pass.
    pub shadow: bool,
}

impl Default for Options {
    /// All services, for real, on a node without a name.
    fn default() -> Self {
        Self {
            node: NodeFacts::default(),
            services: Services::default(),
            proxy_name: DEFAULT_PROXY_NAME.to_owned(),
            shadow: false,
        }
    }
}

/// An IP family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// A transport protocol.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP: frontends whose port is the one that endpoints serve.
    Sctp,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The IANA protocol number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// Its name in Kubernetes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// What clients dial.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct FrontendAddress {
    /// The address.
    pub ip: IpAddr,
    /// The port.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

impl fmt::Display for FrontendAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", std::net::SocketAddr::new(self.ip, self.port), self.protocol.name())
    }
}

/// Whose endpoints are in a pool.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Reach {
    /// Those of all nodes.
    Cluster,
    /// This node's own.
    Local,
}

/// Name of a pool: `namespace/service:port/PROTOCOL/family`, the port by name where it has one; `/local` follows where
/// only this node's endpoints are used.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PoolName {
    /// The service.
    pub service: ObjectName,
    /// Name or number of the service port.
    pub port: String,
    /// The protocol.
    pub protocol: Protocol,
    /// The family of its members.
    pub family: Family,
    /// Whose endpoints take connections.
    pub reach: Reach,
}

impl fmt::Display for PoolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::V4 => "v4",
            Family::V6 => "v6",
        };
        let reach = match self.reach {
            Reach::Cluster => "",
            Reach::Local => "/local",
        };
        write!(f, "{}:{}/{}/{family}{reach}", self.service, self.port, self.protocol.name())
    }
}

impl PoolName {
    /// The inverse of its `Display`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (service, rest) = text.split_once(':')?;
        let (namespace, name) = service.split_once('/')?;
        let mut parts = rest.split('/');
        let port = parts.next()?.to_owned();
        let protocol = Protocol::ALL.into_iter().find(|protocol| Some(protocol.name()) == parts.clone().next())?;
        let family = match parts.nth(1)? {
            "v4" => Family::V4,
            "v6" => Family::V6,
            _ => return None,
        };
        let reach = match parts.next() {
            None => Reach::Cluster,
            Some("local") => Reach::Local,
            Some(_) => return None,
        };
        let service = ObjectName::new(namespace, name);
        parts.next().is_none().then_some(Self { service, port, protocol, family, reach })
    }
}

/// Identity of a backend. An address that passes to another pod is another backend.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct BackendName {
    /// The pod's address.
    pub address: IpAddr,
    /// `namespace/pod`; empty where the slices name none, or `address:port` of a further server at one address.
    pub pod: Arc<str>,
}

impl BackendName {
    /// As slices list it: there, servers that share an address are not told apart.
    fn as_listed(&self) -> Self {
        // The name of a pod has a slash, that of a server at an address has none.
        let pod = if self.pod.contains('/') { Arc::clone(&self.pod) } else { Arc::default() };
        Self { address: self.address, pod }
    }
}

/// The scope within which a client has one pin.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Scope {
    /// One service.
    Service(ObjectName),
    /// A named group of services.
    Group(ObjectName),
}

impl Scope {
    /// The name of the service or group.
    #[must_use]
    pub const fn name(&self) -> &ObjectName {
        match self {
            Self::Service(name) | Self::Group(name) => name,
        }
    }
}

/// How a service pins its clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Affinity {
    /// What restarts the timeout.
    pub timer: Timer,
    /// The timeout in nanoseconds, or [`affinity_common::abi::TIMEOUT_UNLIMITED`].
    pub timeout_ns: u64,
}

/// A backend in a pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    /// The port that it serves there.
    pub port: u16,
    /// Whether it takes new connections; if not, it drains.
    pub ready: bool,
}

/// The members that a frontend may use, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pool {
    /// Scope of its clients' pins.
    pub scope: Scope,
    /// How clients are pinned; none: they are not.
    pub affinity: Option<Affinity>,
    /// How a member is chosen.
    pub select: Selection,
    /// Seed of the `consistent` selection: the same on every node.
    pub seed: u32,
    /// Prefix length of the client key.
    pub prefix: u8,
    /// The members.
    pub members: BTreeMap<BackendName, Member>,
}

/// What a frontend does with the clients that it is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// The pool that they are spread over.
    pub pool: Arc<PoolName>,
    /// Whether they come to a backend from the node's address.
    pub masquerade: bool,
    /// Whether packets are dropped, not rejected: the pool has no usable member, but other nodes have some.
    pub drop_if_no_local: bool,
}

/// What a frontend does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frontend {
    /// With all clients, or with those in the networks of pods.
    pub internal: Route,
    /// For external clients, if they are treated differently.
    pub external: Option<Route>,
    /// Whether only clients in the service's ranges may use it.
    pub ranges: bool,
}

/// What those ask for who want to know whether this node can serve a service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HealthCheck {
    /// The port that they ask at, on the node's addresses.
    pub port: u16,
    /// How many ready endpoints are on this node, for each family of the service.
    pub local: BTreeMap<Family, usize>,
}

/// What the dataplane should hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Desired {
    /// Frontends, each with what it does.
    pub frontends: BTreeMap<FrontendAddress, Frontend>,
    /// Of services with frontends that are for clients in ranges: these ranges.
    pub ranges: BTreeMap<ObjectName, BTreeSet<Network>>,
    /// The networks of pods.
    pub pod_networks: BTreeSet<Network>,
    /// The addresses of this node, which its own connections have, too.
    pub node_addresses: BTreeSet<IpAddr>,
    /// What masquerading uses; none: as it is.
    pub masquerade: Option<Masquerade>,
    /// Where load balancers ask for services: on these addresses, or on all of the node's.
    pub health_addresses: BTreeSet<IpAddr>,
    /// The ports at which they ask.
    pub health_checks: BTreeMap<ObjectName, HealthCheck>,
    /// The pools of these frontends.
    pub pools: BTreeMap<PoolName, Pool>,
    /// The members of all pools of a scope, and whether each is ready in any: only for scopes whose pools differ.
    pub unions: BTreeMap<Scope, BTreeMap<BackendName, bool>>,
    /// The backends of these pools, and whether each is on this node.
    pub backends: BTreeMap<BackendName, bool>,
    /// The pods that some slice lists, but that are in none of these pools: of services that are not ours, or of which
    /// only slices are left. They live, and so do the connections that they have.
    pub others: BTreeSet<BackendName>,
    /// The pods that some slice says are terminating: once no slice lists them, they are dead.
    pub terminating: BTreeSet<BackendName>,
    /// Whether another service proxy handles the other services, and whatever is not known here.
    pub beside: bool,
    /// Whether everything is only decided and counted.
    pub shadow: bool,
    /// Present where the source was read in part only: the plan then keeps what is there of everything else.
    pub known: Option<Known>,
}

/// What a source that was read in part is sure about.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Known {
    /// Services that were read.
    pub services: BTreeSet<ObjectName>,
    /// Services of which some endpoint slice was read.
    pub with_slices: BTreeSet<ObjectName>,
}

/// Decides what the dataplane should hold.
#[must_use]
pub fn desired(snapshot: &Snapshot, options: &Options) -> (Desired, Vec<Problem>) {
    let mut state = DesiredState::new(options.clone());
    state.update(snapshot);
    let problems = state.problems().cloned().collect();
    (state.into_desired(), problems)
}

/// Collects the problems of one object.
struct Report<'a> {
    kind: &'static str,
    name: &'a ObjectName,
    origin: Option<&'a Origin>,
    problems: &'a mut Vec<Problem>,
}

impl<'a> Report<'a> {
    fn new<T>(kind: &'static str, name: &'a ObjectName, of: &'a Sourced<T>, problems: &'a mut Vec<Problem>) -> Self {
        Self { kind, name, origin: of.origin.as_ref(), problems }
    }

    fn add(&mut self, severity: Severity, field: impl Into<String>, message: impl Into<String>) {
        let problem = Problem::new(severity, self.origin.cloned(), message).of(self.kind, self.name).field(field);
        self.problems.push(problem);
    }

    fn info(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.add(Severity::Info, field, message);
    }

    fn warning(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.add(Severity::Warning, field, message);
    }

    fn error(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.add(Severity::Error, field, message);
    }
}

#[cfg(test)]
pub(crate) use state::tests::{options, snapshots};

#[cfg(test)]
mod tests;
