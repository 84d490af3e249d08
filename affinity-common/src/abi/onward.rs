//! What sends packets on past the stack: how devices take frames that came in by others, and the places of the programs.

/// `wires`: XDP may send frames out of the device. It runs XDP in its driver, which takes frames of others.
pub const WIRE_XDP: u32 = 1;
/// `wires`: TC may, what came in by another such device. What comes back meets TC as well, so that both directions of a
/// connection go the same way.
pub const WIRE_TC: u32 = 2;
/// `wires`: the device is one end of a pair, with a pod at the other.
pub const WIRE_POD: u32 = 4;

/// The metadata of a frame that XDP has looked at, for TC: it passes.
pub const SEEN_PASSED: u32 = 0x6166_6670;
/// The same: it was translated.
pub const SEEN_TRANSLATED: u32 = 0x6166_6674;

/// `xdp_stages`: what sends on the packets of pods on other nodes.
pub const STAGE_XDP_ONWARD: u32 = 0;
/// `tc_stages`: what sends on translated packets.
pub const STAGE_TC_ONWARD: u32 = 0;
/// `tc_stages`: what sends on replies.
pub const STAGE_TC_REPLY: u32 = 1;
