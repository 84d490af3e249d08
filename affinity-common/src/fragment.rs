//! IP fragments (RFC 791; RFC 8200, section 4.5). The first fragment has the ports, and is handled like any packet. Later
//! fragments follow it by their common identification. A fragment that arrives before the first one passes unchanged.

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::{
    abi::{Address, Edit, FLOW_SHADOW, Flow, FragmentKey, Reason, V4},
    headers::Headers,
    packet::Packet,
    parse::fragment_id,
    rewrite::{IPV4_CHECKSUM, write_addresses},
    tables::{Entry, FamilyTables},
};

/// Stores the flow of a first fragment, under its addresses before translation.
#[inline(never)]
pub fn remember<A: Address, P: Packet, T: FamilyTables<A>>(packet: &P, tables: &T, headers: &Headers<A>) {
    if let Some(key) = key_of(packet, headers.l3(), !headers.key.is_entering()) {
        tables.put_fragment(&key, &headers.key);
    }
}

/// Translates a later fragment at `l3` like its first one.
///
/// # Errors
/// The reason why it is not translated, and passes.
#[inline(never)]
pub fn follow<A: Address, P: Packet, T: FamilyTables<A>>(
    packet: &mut P,
    tables: &T,
    l3: usize,
    is_leaving: bool,
) -> Result<(), Reason> {
    let key = key_of(packet, l3, is_leaving).ok_or(Reason::Fragment)?;
    let first = tables.fragment(&key).ok_or(Reason::Fragment)?;
    let flow = tables.flow(&first).filter(|flow| flow.read(Flow::STATE) & FLOW_SHADOW == 0);
    let flow = flow.ok_or(Reason::Fragment)?;
    let checksum = if A::BITS == V4::BITS { packet.read(l3 + IPV4_CHECKSUM) } else { Some([0; 2]) };
    let checksum = checksum.ok_or(Reason::Fragment)?;
    let Edit { saddr, daddr, addr_delta, .. } = flow.read(Flow::EDIT);
    if write_addresses(packet, l3, checksum, addr_delta, saddr, daddr) { Ok(()) } else { Err(Reason::NotRewritten) }
}

/// The key of a fragment's packet.
#[inline(always)]
fn key_of<A: Address, P: Packet>(packet: &P, l3: usize, is_leaving: bool) -> Option<FragmentKey<A>> {
    let is_leaving = u8::from(is_leaving);
    if A::BITS == V4::BITS {
        let header: [u8; Ipv4Hdr::LEN] = packet.read(l3)?;
        let [_, _, _, _, hi, lo, _, _, _, protocol, _, _, a, b, c, d, e, f, g, h] = header;
        let (saddr, daddr) = (V4([a, b, c, d]).to_mapped(), V4([e, f, g, h]).to_mapped());
        let (saddr, daddr) = (A::from_mapped(saddr), A::from_mapped(daddr));
        return Some(FragmentKey { saddr, daddr, id: [hi, lo, 0, 0], protocol, is_leaving, pad: [0; 2] });
    }
    let [_, _, _, _, _, _, first, _]: [u8; 8] = packet.read(l3)?;
    let (saddr, daddr) = (A::from_mapped(packet.read(l3 + 8)?), A::from_mapped(packet.read(l3 + 24)?));
    let id = fragment_id(packet, l3 + Ipv6Hdr::LEN, first)?;
    // In IPv6 the identification is unique between two hosts, whatever the protocol.
    Some(FragmentKey { saddr, daddr, id, protocol: 0, is_leaving, pad: [0; 2] })
}
