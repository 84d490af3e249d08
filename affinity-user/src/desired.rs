//! What the dataplane should hold for a [`Snapshot`]: a pure function of the snapshot and this node's options.
//!
//! A [`DesiredState`] keeps its decisions, so the cost of the next snapshot depends only on what has changed in it.
//!
//! Everything here is identified by name. The `plan` module, which knows what the store holds already, assigns the numbers:
//! ids, backend indices, slots.
//!
//! Frontends are a service's cluster IPs, its node ports on this node's addresses, the addresses of its load balancer and
//! its external IPs. What a frontend does may differ for external clients: [`Frontend`].
//!
//! Each service port has a pool for each IP family, and a second one of this node's own endpoints if a policy asks for it. A
//! pool's members are the endpoints that its service's slices list for that port. Ready endpoints take connections; if there
//! are none, endpoints that are terminating but still serve do. All others are kept as draining members, so that their
//! established connections continue. The `plan` module decides about pods that are in no pool any more.

mod endpoints;
mod exposure;
mod frontends;

mod node;
mod service;
mod state;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use affinity_common::abi::{Selection, Timer};
use ipnet::IpNet;

use crate::source::{ObjectName, Origin, Problem, Severity, Snapshot, Sourced};
use node::Node;
use service::is_ours;

pub(crate) use node::is_global;
pub use node::{MASQUERADE_PORTS, Masquerade, NodeFacts};
pub use service::{DEFAULT_PROXY_NAME, Services, UnknownServices};
pub(crate) use state::unions;
pub use state::{Change, DesiredState};

/// What depends on the node.
#[derive(Clone, Debug)]
pub struct Options {
    /// Facts about the node, in addition to those in the snapshot. Endpoints on it are local.
    pub node: NodeFacts,
    /// Which services are ours.
    pub services: Services,
    /// Our name in the label that gives services to a proxy.
    pub proxy_name: String,
    /// Decide and count, but let every packet pass.
    pub shadow: bool,
}

impl Default for Options {
    /// All services, without shadow mode, on a node without a name.
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
    /// SCTP: only frontends with the same port as their endpoints.
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

/// The address and port that clients connect to.
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

/// Which nodes' endpoints are in a pool.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Reach {
    /// Endpoints on all nodes.
    Cluster,
    /// Endpoints on this node.
    Local,
}

/// Name of a pool: `namespace/service:port/PROTOCOL/family`, with the port's name if it has one. `/local` follows if only this
/// node's endpoints are used.
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
    /// Which nodes' endpoints take connections.
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
    /// The service, `namespace/name`, and the rest of a pool's name.
    #[must_use]
    pub fn split(text: &str) -> Option<(&str, &str)> {
        text.split_once(':')
    }

    /// The inverse of its `Display`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (service, rest) = Self::split(text)?;
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
    /// `namespace/pod`. Empty if the slices name no pod, or `address:port` for a further server at the same address.
    pub pod: Arc<str>,
}

impl BackendName {
    /// The name as slices list it: they do not distinguish servers that share an address.
    fn as_listed(&self) -> Self {
        // The name of a pod contains a slash; the name of a server at an address does not.
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

/// The backends of a frontend, and how clients are assigned to them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pool {
    /// Scope of the clients' pins.
    pub scope: Scope,
    /// How clients are pinned; `None`: not pinned.
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

/// How a frontend treats a set of clients.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// The pool that serves them.
    pub pool: Arc<PoolName>,
    /// Whether the node's address becomes the source of their connections.
    pub masquerade: bool,
    /// Whether packets are dropped instead of rejected: the pool has no usable member, but other nodes have some.
    pub drop_if_no_local: bool,
}

/// What a frontend does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frontend {
    /// The route of all clients, or of those in the pod networks.
    pub internal: Route,
    /// The route of external clients, if they are treated differently.
    pub external: Option<Route>,
    /// Whether only clients in the service's ranges may use it.
    pub ranges: bool,
}

/// A service's health check for load balancers, which ask whether this node can serve the service.
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
    /// The frontends.
    pub frontends: BTreeMap<FrontendAddress, Frontend>,
    /// The source ranges of services with frontends that admit only clients in ranges.
    pub ranges: BTreeMap<ObjectName, BTreeSet<IpNet>>,
    /// The networks of pods.
    pub pod_networks: BTreeSet<IpNet>,
    /// The addresses of this node; its own connections have them as source.
    pub node_addresses: BTreeSet<IpAddr>,
    /// What masquerading uses; `None`: unchanged.
    pub masquerade: Option<Masquerade>,
    /// The addresses at which load balancers ask for services; the unspecified addresses mean all of the node's.
    pub health_addresses: BTreeSet<IpAddr>,
    /// The ports at which they ask.
    pub health_checks: BTreeMap<ObjectName, HealthCheck>,
    /// The pools of these frontends.
    pub pools: BTreeMap<PoolName, Pool>,
    /// The members of all pools of a scope, and whether each is ready in any pool. Only for scopes with pools that differ.
    pub unions: BTreeMap<Scope, BTreeMap<BackendName, bool>>,
    /// The backends of these pools, and whether each is on this node.
    pub backends: BTreeMap<BackendName, bool>,
    /// Pods that a slice lists but that are in none of these pools: their service is not ours, or only slices of it are left.
    /// They are alive, and their connections continue.
    pub others: BTreeSet<BackendName>,
    /// Pods that a slice reports as terminating: once no slice lists them, they are dead.
    pub terminating: BTreeSet<BackendName>,
    /// Whether another service proxy handles the other services, and everything that is unknown here.
    pub coexists: bool,
    /// Shadow mode: decide and count, but let every packet pass.
    pub shadow: bool,
    /// Present if only a part of the source was read: the plan then keeps everything else that the store holds.
    pub known: Option<Known>,
}

/// What is known for certain from a source of which only a part was read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Known {
    /// Services that were read.
    pub services: BTreeSet<ObjectName>,
    /// Services of which at least one endpoint slice was read.
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
