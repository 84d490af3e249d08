//! Other programs that handle packets on these devices: XDP and TC programs of others, and kube-proxy's rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    io,
};

use aya_obj::generated::bpf_attach_type::{BPF_TCX_EGRESS, BPF_TCX_INGRESS};
use rtnetlink::{
    packet_core::{
        NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkSerializable,
        NlasIterator,
    },
    packet_route::{
        RouteNetlinkMessage,
        link::{LinkAttribute, LinkMessage, LinkXdp},
        tc::{TcAttribute, TcHandle, TcMessage},
    },
    sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};

use super::{CLSACT_HANDLE, Hook, attachments};
use crate::{netns, pins::PinDir, sys};

/// The device that kube-proxy creates in its IPVS mode.
const IPVS_DEVICE: &str = "kube-ipvs0";

/// The parents of the filters of a clsact qdisc: `TC_H_MIN_INGRESS` and `TC_H_MIN_EGRESS` of
/// <https://elixir.bootlin.com/linux/v6.12/source/include/uapi/linux/pkt_sched.h>.
const CLSACT_SIDES: [(u16, &str); 2] = [(CLSACT_INGRESS, "ingress"), (CLSACT_EGRESS, "egress")];
const CLSACT_INGRESS: u16 = 0xfff2;
const CLSACT_EGRESS: u16 = 0xfff3;

/// Programs of others on these devices (names by index), one line each. What cannot be queried is left out.
#[must_use]
pub fn programs(pins: &PinDir, devices: &BTreeMap<u32, String>) -> Vec<String> {
    let ours: BTreeSet<u32> =
        attachments(pins).unwrap_or_default().iter().map(|attachment| attachment.prog_id).collect();
    let names = program_names();
    let called = |id: &u32| names.get(id).map_or_else(|| format!("id {id}"), |name| format!("{name}, id {id}"));
    let mut lines = Vec::new();
    let of_xdp = xdp_programs().unwrap_or_default();
    for (index, device) in devices {
        if let Some(id) = of_xdp.get(index).filter(|id| !ours.contains(id)) {
            lines.push(format!("{device}: another XDP program ({}) handles packets first", called(id)));
        }
        for (attach_type, side) in [(BPF_TCX_INGRESS, "ingress"), (BPF_TCX_EGRESS, "egress")] {
            let programs = sys::tcx_programs(*index, attach_type as u32).unwrap_or_default();
            for id in programs.iter().filter(|id| !ours.contains(id)) {
                lines.push(format!("{device}: another TC program ({}) at tcx {side}", called(id)));
            }
        }
        for (minor, side) in CLSACT_SIDES {
            let filters = filters(*index, minor).unwrap_or_default();
            for (_, kind) in filters.iter().filter(|(handle, _)| *handle != u32::from(CLSACT_HANDLE)) {
                lines.push(format!("{device}: a TC filter of kind {kind} at clsact {side}"));
            }
        }
    }
    lines
}

/// How kube-proxy's rules are installed in this network namespace. None if there are none, or if they are installed by the old
/// iptables interface, which cannot be queried for them.
#[must_use]
pub fn kube_proxy() -> Option<String> {
    let chains = chains().unwrap_or_default();
    let is_of_nftables = |(table, _): &(String, String)| table == "kube-proxy";
    let is_of_iptables = |(_, chain): &(String, String)| chain == "KUBE-SERVICES";
    if chains.iter().any(is_of_nftables) {
        return Some("nftables".to_owned());
    }
    if chains.iter().any(is_of_iptables) {
        return Some("iptables".to_owned());
    }
    let devices = links().unwrap_or_default();
    let is_ipvs = |link: &LinkMessage| {
        link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::IfName(name) if name == IPVS_DEVICE))
    };
    devices.iter().any(is_ipvs).then(|| "IPVS".to_owned())
}

/// The names of all programs that are loaded, by id.
fn program_names() -> BTreeMap<u32, String> {
    let loaded = aya::programs::loaded_programs().filter_map(Result::ok);
    loaded.filter_map(|info| Some((info.id(), info.name_as_str()?.to_owned()))).collect()
}

fn links() -> io::Result<Vec<LinkMessage>> {
    let mut links = Vec::new();
    dump_route(RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
        if let RouteNetlinkMessage::NewLink(link) = message {
            links.push(link);
        }
    })?;
    Ok(links)
}

/// The XDP program of each device that has one.
fn xdp_programs() -> io::Result<BTreeMap<u32, u32>> {
    #[expect(clippy::wildcard_enum_match_arm, reason = "of many attributes few name a program")]
    let program = |link: &LinkMessage| {
        let xdp = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Xdp(xdp) => Some(xdp),
            _ => None,
        })?;
        xdp.iter().find_map(|attribute| match attribute {
            LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) | LinkXdp::HwProgId(id) => Some(*id),
            _ => None,
        })
    };
    Ok(links()?.iter().filter_map(|link| Some((link.header.index, program(link)?))).collect())
}

/// Whether our filter is on a device. True if that cannot be queried, for example for a device in another network namespace.
pub(super) fn has_filter(index: u32, hook: Hook) -> bool {
    let minor = if hook.is_ingress() { CLSACT_INGRESS } else { CLSACT_EGRESS };
    let ours = u32::from(CLSACT_HANDLE);
    filters(index, minor).map_or(true, |filters| filters.iter().any(|(handle, _)| *handle == ours))
}

/// The filters on one side of a device's clsact qdisc: handles and kinds.
fn filters(index: u32, minor: u16) -> io::Result<Vec<(u32, String)>> {
    let mut request = TcMessage::default();
    request.header.index = index.cast_signed();
    request.header.parent = TcHandle { major: u16::MAX, minor };
    let mut filters = Vec::new();
    dump_route(RouteNetlinkMessage::GetTrafficFilter(request), |message| {
        let RouteNetlinkMessage::NewTrafficFilter(TcMessage { header, attributes, .. }) = message else { return };
        // The kernel lists each filter's priority too, with no handle.
        if header.handle == TcHandle::UNSPEC {
            return;
        }
        let kind = attributes
            .into_iter()
            .find_map(|attribute| if let TcAttribute::Kind(kind) = attribute { Some(kind) } else { None });
        filters.push((u32::from(header.handle), kind.unwrap_or_default()));
    })?;
    Ok(filters)
}

fn dump_route(request: RouteNetlinkMessage, visit: impl FnMut(RouteNetlinkMessage)) -> io::Result<()> {
    let mut message = NetlinkMessage::from(request);
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    netns::dump(NETLINK_ROUTE, message, visit)
}

/// Tables and chains of nftables, including those that `iptables` creates there.
fn chains() -> io::Result<Vec<(String, String)>> {
    let mut message = NetlinkMessage::from(Chain::default());
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut chains = Vec::new();
    netns::dump(NETLINK_NETFILTER, message, |Chain { table, name }| chains.push((table, name)))?;
    Ok(chains)
}

/// A chain of nftables; as a request, all chains. See
/// <https://elixir.bootlin.com/linux/v6.12/source/include/uapi/linux/netfilter/nf_tables.h>.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Chain {
    table: String,
    name: String,
}

impl Chain {
    /// `NFNL_SUBSYS_NFTABLES` and `NFT_MSG_GETCHAIN`.
    const GET: u16 = 10 << 8 | 4;
    /// `struct nfgenmsg`: of all families.
    const HEADER: [u8; 4] = [0; 4];
    const TABLE: u16 = 1;
    const NAME: u16 = 3;
}

impl NetlinkSerializable for Chain {
    fn message_type(&self) -> u16 {
        Self::GET
    }

    fn buffer_len(&self) -> usize {
        Self::HEADER.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&Self::HEADER);
    }
}

impl NetlinkDeserializable for Chain {
    type Error = Infallible;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        let mut chain = Self::default();
        let attributes = payload.get(Self::HEADER.len()..).unwrap_or_default();
        for attribute in NlasIterator::new(attributes).map_while(Result::ok) {
            let text = || String::from_utf8_lossy(attribute.value()).trim_end_matches('\0').to_owned();
            match attribute.kind() {
                Self::TABLE => chain.table = text(),
                Self::NAME => chain.name = text(),
                _ => {}
            }
        }
        Ok(chain)
    }
}

impl From<Chain> for rtnetlink::packet_core::NetlinkPayload<Chain> {
    fn from(chain: Chain) -> Self {
        Self::InnerMessage(chain)
    }
}
