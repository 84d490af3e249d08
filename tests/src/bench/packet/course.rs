//! The cases: which program, which packets.

/// TCP flags of the packets.
const SYN: u64 = 0x02;
const ACK: u64 = 0x10;
/// The frontend's port, and one that is none's.
const FRONTEND: u64 = 80;
const ELSEWHERE: u64 = 81;
/// More flows than any run has packets.
const ENDLESS: u64 = u64::MAX;

/// A program and the packets it gets.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Case {
    /// What is shown.
    pub name: &'static str,
    /// The program, without its hook; `forward` is ours, all else a limit.
    pub program: &'static str,
    /// Flows, or connections where they never end.
    pub flows: u64,
    /// Packets of the flows in random order.
    pub random: bool,
    /// Bits of a flow's number that choose the client; the others choose the port.
    pub client_bits: u64,
    /// Destination port.
    pub dport: u64,
    /// TCP flags.
    pub tcp_flags: u64,
    /// Packets that fill the tables before anything is measured, one flow after another.
    pub fill: u32,
    /// Works on tables of its own, which are full.
    pub full: bool,
    /// Name of the case that this one is a multiple of.
    pub limit: &'static str,
}

const HOT: Case = Case {
    name: "",
    program: "forward",
    flows: 1,
    random: false,
    client_bits: 22,
    dport: FRONTEND,
    tcp_flags: ACK,
    fill: 2,
    full: false,
    limit: "least work, 1 flow",
};

impl Case {
    /// The wrapper alone: subtracted from all others.
    pub(super) const WRAPPER: Self = Self { name: "wrapper", program: "pass", limit: "wrapper", ..HOT };

    /// What fills the tables: the same flows, one after another, each begun by a SYN.
    pub(super) fn filling(&self) -> Self {
        let program = if self.program == "least" { "remember" } else { self.program };
        Self { program, random: false, tcp_flags: SYN, ..*self }
    }

    /// The words of `course` in the limit programs.
    pub(super) fn words(&self) -> [u64; 6] {
        [0, self.flows, u64::from(self.random), self.client_bits, self.dport, self.tcp_flags]
    }
}

/// Every case that is reported, in the order of the table.
pub(super) const CASES: &[Case] = &[
    Case { name: "parse, swap addresses", program: "swap", ..HOT },
    Case { name: "least work, 1 flow", program: "least", ..HOT },
    Case { name: "least work, 10,000 flows", program: "least", limit: "least work, 10,000 flows", ..flows(10_000) },
    Case { name: "least work, 100,000 flows", program: "least", limit: "least work, 100,000 flows", ..flows(100_000) },
    Case { name: "look up and insert, full", program: "remember", limit: "look up and insert, full", ..endless(22) },
    Case { name: "affinity: not a frontend", dport: ELSEWHERE, ..HOT },
    Case { name: "affinity: established, 1 flow", ..HOT },
    Case { name: "affinity: established, 10,000 flows", limit: "least work, 10,000 flows", ..flows(10_000) },
    Case { name: "affinity: established, 100,000 flows", limit: "least work, 100,000 flows", ..flows(100_000) },
    Case { name: "affinity: pinned client, new flow", limit: "look up and insert, full", ..endless(10) },
    Case { name: "affinity: client never seen", limit: "look up and insert, full", ..endless(22) },
];

const fn flows(flows: u64) -> Case {
    Case { flows, random: true, fill: flows as u32 + 1, ..HOT }
}

const fn endless(client_bits: u64) -> Case {
    Case { flows: ENDLESS, client_bits, tcp_flags: SYN, fill: 600_000, full: true, ..HOT }
}
