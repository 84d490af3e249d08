//! The cases: which program, which packets.

use affinity_common::abi::{MASQUERADE, Reason};

use super::rig::Hook;

/// TCP flags of the packets.
const SYN: u64 = 0x02;
const ACK: u64 = 0x10;
/// More flows than any run has packets.
const ENDLESS: u64 = u64::MAX;
/// The node's ports, as many as there are masqueraded flows at most. The programs use them in turn, so a flow's number
/// determines its port.
pub(super) const NODE_PORTS: std::ops::Range<u16> = 10_000..30_000;

/// A frontend, by its port, and the pods behind it.
#[derive(Clone, Copy)]
pub(super) struct Service {
    /// The port that clients connect to.
    pub port: u16,
    /// The pods' port. Each service has a separate one, because one client port may have a flow to each.
    pub target: u16,
    /// How many pods.
    pub pods: u32,
    /// Flags of its frontend.
    pub flags: u8,
}

/// Three pods, as typical services have.
const THREE: Service = Service { port: 80, target: 8080, pods: 3, flags: 0 };
/// One pod, so that the next reply's pod is known.
const ONE: Service = Service { port: 82, target: 8082, pods: 1, flags: 0 };
/// The same, for clients that get the node's address.
const BEHIND_NODE: Service = Service { port: 83, target: 8083, pods: 1, flags: MASQUERADE };
/// No frontend's port.
const NONE: Service = Service { port: 81, target: 8081, pods: 0, flags: 0 };

/// The services that the tables hold.
pub(super) const SERVICES: [Service; 3] = [THREE, ONE, BEHIND_NODE];

/// Sender and receiver of the packets; the numbers are those of the limit programs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From a client to the frontend.
    ToFrontend = 0,
    /// From the pod to the client.
    FromPod = 1,
    /// From a client to the pod: the destination is translated already.
    ToPod = 2,
    /// From the pod to the node's address.
    ToNode = 3,
}

/// A program and the packets it gets.
#[derive(Clone, Copy)]
pub(super) struct Case {
    /// What is shown.
    pub name: &'static str,
    /// The program, without its hook.
    pub program: &'static str,
    /// The hooks that have this program.
    pub hooks: &'static [Hook],
    /// Flows, or connections if they never end.
    pub flows: u64,
    /// Packets of the flows in random order.
    pub random: bool,
    /// Bits of a flow's number that choose the client; the others choose the port.
    pub client_bits: u64,
    /// The service of the packets.
    pub service: Service,
    /// Their sender and receiver.
    pub way: Way,
    /// TCP flags.
    pub tcp_flags: u64,
    /// Packets that fill the tables before anything is measured, one flow after another.
    pub fill: u32,
    /// Packets right before each measurement, which are not measured: they restore pins that another case has evicted.
    pub warm: u32,
    /// Uses separate tables, which are full.
    pub full: bool,
    /// The reason that our program counts for each packet; none: the program is a limit.
    pub reason: Option<Reason>,
    /// Name of the case that this one is compared with.
    pub limit: &'static str,
}

const BOTH: &[Hook] = &[Hook::Xdp, Hook::Tc];
/// Packets leave only through TC.
const EGRESS: &[Hook] = &[Hook::Tc];

/// Our program on ingress, one flow.
const HOT: Case = Case {
    name: "",
    program: "forward",
    hooks: BOTH,
    flows: 1,
    random: false,
    client_bits: 22,
    service: THREE,
    way: Way::ToFrontend,
    tcp_flags: ACK,
    fill: 2,
    warm: 0,
    full: false,
    reason: Some(Reason::Established),
    limit: LEAST,
};

/// The limits for one flow, for ten thousand, for a hundred thousand, and for new ones.
const LEAST: &str = "least work, 1 flow";
const LEAST_TEN: &str = "least work, 10,000 flows";
const LEAST_HUNDRED: &str = "least work, 100,000 flows";
const LEAST_NEW: &str = "look up and insert, full";

impl Case {
    /// The same packets with a program that does nothing: subtracted.
    pub(super) const fn wrapper(&self) -> Self {
        Self { program: "pass", reason: None, ..*self }
    }

    /// The packets that fill the tables: the same flows, one after another, each in the middle of a connection. After only a
    /// SYN it would be half open, and every packet would be checked for a change of state.
    pub(super) fn filling(&self) -> Self {
        let program = if self.reason.is_some() { "forward" } else { "remember" };
        Self { program, way: Way::ToFrontend, random: false, tcp_flags: ACK, ..*self }
    }

    /// The words of `course` in the limit programs.
    pub(super) fn words(&self) -> [u64; 8] {
        let port = if self.way == Way::ToFrontend { self.service.port } else { self.service.target };
        [
            0,
            self.flows,
            u64::from(self.random),
            self.client_bits,
            u64::from(port),
            self.tcp_flags,
            self.way as u64,
            u64::from(NODE_PORTS.start),
        ]
    }
}

/// Every case that is reported, in the order of the table.
pub(super) const CASES: &[Case] = &[
    limit("parse, swap addresses", "swap", HOT),
    limit(LEAST, "least", HOT),
    limit(LEAST_TEN, "least", flows(10_000)),
    limit(LEAST_HUNDRED, "least", flows(100_000)),
    limit(LEAST_NEW, "remember", endless(22)),
    Case { name: "not for a frontend", service: NONE, reason: Some(Reason::NotFrontend), ..HOT },
    Case { name: "established, 1 flow", ..HOT },
    Case { name: "established, 10,000 flows", ..flows(10_000) },
    Case { name: "established, 100,000 flows", ..flows(100_000) },
    Case { name: "pinned client, new flow", reason: Some(Reason::Pinned), warm: 2048, ..endless(10) },
    Case { name: "client never seen", reason: Some(Reason::Created), ..endless(22) },
    Case { name: "reply to the node, 10,000 flows", reason: Some(Reason::Returned), ..behind_node(Way::ToNode) },
    Case { name: "leaving, no reply", service: NONE, reason: Some(Reason::NotReply), ..leaving(HOT) },
    Case { name: "leaving, reply, 1 flow", ..reply(HOT) },
    Case { name: "leaving, reply, 10,000 flows", ..reply(flows(10_000)) },
    Case { name: "leaving, reply, 100,000 flows", ..reply(flows(100_000)) },
    Case {
        name: "leaving, masqueraded, 10,000 flows",
        reason: Some(Reason::Masqueraded),
        ..leaving(behind_node(Way::ToPod))
    },
];

const fn limit(name: &'static str, program: &'static str, case: Case) -> Case {
    Case { name, program, reason: None, limit: name, ..case }
}

const fn flows(flows: u64) -> Case {
    let limit = if flows == 10_000 { LEAST_TEN } else { LEAST_HUNDRED };
    Case { flows, random: true, fill: flows as u32 + 1, limit, ..HOT }
}

const fn endless(client_bits: u64) -> Case {
    Case { flows: ENDLESS, client_bits, tcp_flags: SYN, fill: 600_000, full: true, limit: LEAST_NEW, ..HOT }
}

const fn behind_node(way: Way) -> Case {
    Case { service: BEHIND_NODE, way, ..flows(10_000) }
}

const fn reply(case: Case) -> Case {
    Case { service: ONE, way: Way::FromPod, reason: Some(Reason::Reply), ..leaving(case) }
}

/// Packets that leave the node.
const fn leaving(case: Case) -> Case {
    Case { program: "reverse", hooks: EGRESS, ..case }
}
