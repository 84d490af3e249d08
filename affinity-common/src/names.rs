//! Names of the maps and programs: in the object, in the pin directory, and in `affinity dump`.

/// `hash`: [`crate::abi::FrontendKey`] -> [`crate::abi::Frontend`], IPv4.
pub const FRONTENDS_V4: &str = "frontends_v4";
/// `hash`: [`crate::abi::FrontendKey`] -> [`crate::abi::Frontend`], IPv6.
pub const FRONTENDS_V6: &str = "frontends_v6";
/// `array`, mmapable: slot -> backend index, `u32`.
pub const SLOTS: &str = "slots";
/// `array`, mmapable: 64 bits of the filter in each word; one part for each [`crate::abi::Direction`].
pub const FILTER: &str = "filter";
/// `lpm_trie`: [`crate::abi::RangeKey`] -> 1, `u32`, IPv4.
pub const RANGES_V4: &str = "ranges_v4";
/// `lpm_trie`: [`crate::abi::RangeKey`] -> 1, `u32`, IPv6.
pub const RANGES_V6: &str = "ranges_v6";
/// `array` of one [`crate::abi::Node`].
pub const NODE: &str = "node";
/// `hash`: [`crate::abi::MemberKey`] -> [`crate::abi::Member`].
pub const MEMBERS: &str = "members";
/// `array`: index -> [`crate::abi::Backend`].
pub const BACKENDS: &str = "backends";
/// `array`, mmapable: backend index -> live sessions, `u64`.
pub const LOADS: &str = "loads";
/// `lru_hash`: [`crate::abi::SessionKey`] -> [`crate::abi::Session`], IPv4.
pub const SESSIONS_V4: &str = "sessions_v4";
/// `lru_hash`: [`crate::abi::SessionKey`] -> [`crate::abi::Session`], IPv6.
pub const SESSIONS_V6: &str = "sessions_v6";
/// `lru_hash`: [`crate::abi::FlowKey`] -> [`crate::abi::Flow`], IPv4.
pub const FLOWS_V4: &str = "flows_v4";
/// `lru_hash`: [`crate::abi::FlowKey`] -> [`crate::abi::Flow`], IPv6.
pub const FLOWS_V6: &str = "flows_v6";
/// `lru_hash`: [`crate::abi::FlowKey`] of replies -> [`crate::abi::Foreign`], IPv4: connections to no frontend.
pub const FOREIGN_V4: &str = "foreign_v4";
/// `lru_hash`: [`crate::abi::FlowKey`] of replies -> [`crate::abi::Foreign`], IPv6: connections to no frontend.
pub const FOREIGN_V6: &str = "foreign_v6";
/// `lru_hash`: [`crate::abi::FragmentKey`] -> [`crate::abi::FlowKey`], IPv4.
pub const FRAGMENTS_V4: &str = "fragments_v4";
/// `lru_hash`: [`crate::abi::FragmentKey`] -> [`crate::abi::FlowKey`], IPv6.
pub const FRAGMENTS_V6: &str = "fragments_v6";
/// `percpu_array` of one [`crate::abi::FlowScratch`], IPv4.
pub const FLOW_SCRATCH_V4: &str = "flow_scratch_v4";
/// `percpu_array` of one [`crate::abi::FlowScratch`], IPv6.
pub const FLOW_SCRATCH_V6: &str = "flow_scratch_v6";
/// `percpu_array` of one [`crate::abi::Frontend`]: the record of the connection that is being opened.
pub const FRONTEND_SCRATCH: &str = "frontend_scratch";
/// `percpu_array` of one [`crate::reject::Bucket`]: limits how many packets a processor rejects.
pub const REJECTIONS: &str = "rejections";
/// `array`: backend index -> position in the range of SNAT ports, counting up, `u64`.
pub const SNAT_PORT_CURSOR: &str = "snat_port_cursor";
/// `lru_hash`: [`crate::abi::SocketKey`] -> [`crate::abi::Socket`].
pub const SOCKETS: &str = "sockets";
/// `percpu_array`: [`crate::abi::Reason`] -> packets, `u64`.
pub const COUNTERS: &str = "counters";
/// `percpu_hash`: [`crate::abi::UsageKey`] -> [`crate::abi::Usage`].
pub const USAGE: &str = "usage";
/// `ringbuf` of [`crate::abi::Event`].
pub const EVENTS: &str = "events";
/// `hash`: [`crate::abi::NameKey`] -> [`crate::abi::Name`].
pub const NAMES: &str = "names";
/// `array` of one [`crate::abi::Status`]: written by the agent, read by no program.
pub const STATUS: &str = "status";

/// `hash`: service id -> conditions that the agent has noticed, `u32`: [`crate::abi::CLIENTS_ARE_NODES`]. Read by no program.
pub const SERVICE_CONDITIONS: &str = "service_conditions";

/// `hash`: ifindex -> flags of an attached device, `u32`: [`crate::abi::DEVICE_REDIRECT_XDP`],
/// [`crate::abi::DEVICE_REDIRECT_TC`], [`crate::abi::DEVICE_POD`], [`crate::abi::DEVICE_UPPER`]; from
/// [`crate::abi::DEVICE_NOTE_SHIFT`] on, a note.
pub const DEVICES: &str = "devices";
/// `array`: [`crate::abi::DeviceMac::slot`] -> [`crate::abi::DeviceMac`], of devices with XDP.
pub const DEVICE_MACS: &str = "device_macs";
/// `prog_array`: the program that [`XDP_FORWARD`] tail-calls: [`XDP_REDIRECT`].
pub const XDP_TAIL_CALLS: &str = "xdp_tail_calls";
/// `prog_array`: the programs that [`TC_FORWARD`] tail-calls: [`TC_REDIRECT`], [`TC_REPLY`].
pub const TC_TAIL_CALLS: &str = "tc_tail_calls";

/// Every map, in the order of a dump.
pub const MAPS: [&str; 34] = [
    FRONTENDS_V4,
    FRONTENDS_V6,
    RANGES_V4,
    RANGES_V6,
    NODE,
    SLOTS,
    FILTER,
    MEMBERS,
    BACKENDS,
    LOADS,
    SESSIONS_V4,
    SESSIONS_V6,
    FLOWS_V4,
    FLOWS_V6,
    FOREIGN_V4,
    FOREIGN_V6,
    FRAGMENTS_V4,
    FRAGMENTS_V6,
    FLOW_SCRATCH_V4,
    FLOW_SCRATCH_V6,
    FRONTEND_SCRATCH,
    REJECTIONS,
    SNAT_PORT_CURSOR,
    SOCKETS,
    COUNTERS,
    USAGE,
    EVENTS,
    NAMES,
    STATUS,
    SERVICE_CONDITIONS,
    DEVICES,
    DEVICE_MACS,
    XDP_TAIL_CALLS,
    TC_TAIL_CALLS,
];

/// XDP program: forward translation.
pub const XDP_FORWARD: &str = "xdp_forward";
/// XDP program, tail-called by [`XDP_FORWARD`]: redirects packets to other nodes, and their replies to clients.
pub const XDP_REDIRECT: &str = "xdp_redirect";
/// TC program on ingress: forward translation.
pub const TC_FORWARD: &str = "tc_forward";
/// TC program on egress: reverse translation.
pub const TC_REVERSE: &str = "tc_reverse";
/// TC program, tail-called by [`TC_FORWARD`] and [`TC_REPLY`]: redirects translated packets, and replies.
pub const TC_REDIRECT: &str = "tc_redirect";
/// TC program, tail-called by [`TC_FORWARD`]: finds the replies among the packets that it passed.
pub const TC_REPLY: &str = "tc_reply";
/// Programs on a cgroup: for system calls on sockets.
pub const SOCKET_PROGRAMS: [&str; 9] = [
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
    "sock_release",
];
/// TC program run only by the agent: writes the [`crate::abi::Event`] in its packet to the ring buffer.
pub const REPORT: &str = "report";
/// TC program run only by the agent: applies the [`crate::abi::Correction`] in its packet.
pub const CORRECT: &str = "correct";
/// TC program run only by the loader: writes three native `u64` into its packet: jiffies, the monotonic clock, and whether the
/// kernel's `bpf_l4_csum_replace` takes `BPF_F_IPV6`.
pub const CLOCK: &str = "clock";
