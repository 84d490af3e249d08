//! What the dataplane should hold for a [`Snapshot`]: a pure function of the snapshot and this node's options.
//!
//! A [`Memo`] keeps what was decided, so that the next snapshot costs what has changed in it.
//!
//! Everything here goes by name. Numbers - ids, backend indices, slots - are given by the `plan` module, which knows
//! what is there already.
//!
//! Frontends are the cluster IPs of services. Each service port has one pool for each IP family; a pool's members are
//! the endpoints that its service's slices list for that port. Ready ones take connections; if there are none, those
//! that are terminating but still serve do. All others are kept as draining members, so that their established
//! connections go on for as long as a slice lists them.

mod endpoints;
mod groups;
mod hash;
mod memo;
mod ownership;
mod service;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use affinity_common::abi::{Selection, Timer};

use crate::source::{ObjectName, Origin, Problem, Severity, Snapshot, Sourced};
use ownership::is_ours;

pub(crate) use groups::unions;
pub(crate) use hash::{hash32, hash64};
pub use memo::{Change, Memo};
pub use ownership::{DEFAULT_PROXY_NAME, Services, UnknownServices};

/// What depends on the node.
#[derive(Clone, Debug)]
pub struct Options {
    /// This node's name; endpoints on it are local.
    pub node_name: Option<String>,
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
            node_name: None,
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
}

impl Protocol {
    /// The IANA protocol number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// Its name in Kubernetes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
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

/// Name of a pool: `namespace/service:port/PROTOCOL/family`, the port by name where it has one.
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
}

impl fmt::Display for PoolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::V4 => "v4",
            Family::V6 => "v6",
        };
        write!(f, "{}:{}/{}/{family}", self.service, self.port, self.protocol.name())
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
        let protocol = [Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .find(|protocol| Some(protocol.name()) == parts.clone().next())?;
        let family = match parts.nth(1)? {
            "v4" => Family::V4,
            "v6" => Family::V6,
            _ => return None,
        };
        parts.next().is_none().then(|| Self { service: ObjectName::new(namespace, name), port, protocol, family })
    }
}

/// Identity of a backend. An address that passes to another pod is another backend.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct BackendName {
    /// The pod's address.
    pub address: IpAddr,
    /// `namespace/pod`; empty where the slices name none.
    pub pod: String,
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

/// What the dataplane should hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Desired {
    /// Frontends, each with its pool.
    pub frontends: BTreeMap<FrontendAddress, PoolName>,
    /// The pools of these frontends.
    pub pools: BTreeMap<PoolName, Pool>,
    /// The members of all pools of a scope, and whether each is ready in any: only for scopes whose pools differ.
    pub unions: BTreeMap<Scope, BTreeMap<BackendName, bool>>,
    /// The backends of these pools, and whether each is on this node.
    pub backends: BTreeMap<BackendName, bool>,
    /// The pods of services that are not ours: connections of the time when they were go on.
    pub others: BTreeSet<BackendName>,
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
    let mut memo = Memo::new(options.clone());
    memo.update(snapshot);
    let problems = memo.problems().cloned().collect();
    (memo.into_desired(), problems)
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
pub(crate) use memo::tests::{options, snapshots};

#[cfg(test)]
mod tests;
