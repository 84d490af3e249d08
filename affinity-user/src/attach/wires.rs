//! The devices that XDP may send frames out of: those that run it in their driver, where the driver also takes frames that
//! came in by others (`NETDEV_XDP_ACT_NDO_XMIT`).
//!
//! A driver that does not would drop them without a word, so it is asked: the generic netlink family `netdev`, since
//! kernel 6.3 (Documentation/netlink/specs/netdev.yaml). Where there is none, no frame takes that way.

use std::{collections::BTreeSet, io};

use affinity_common::names;
use netlink_packet_generic::{
    GenlFamily, GenlHeader, GenlMessage,
    ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs},
};
use rtnetlink::{
    packet_core::{
        DecodeError, Emitable, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NlasIterator, ParseableParametrized,
        parse_u32, parse_u64,
    },
    sys::protocols::NETLINK_GENERIC,
};
use tracing::debug;

use crate::{
    load::PinDir,
    netns,
    store::{StoreError, kernel::Table},
};

/// `netdev`: the request for devices, and the command of its answers.
const DEV_GET: u8 = 1;
/// Attribute of an answer: the device's index.
const IFINDEX: u16 = 1;
/// Attribute of an answer: what its driver does for XDP.
const XDP_FEATURES: u16 = 3;
/// Of these: it sends out frames that came in by another device.
const NDO_XMIT: u64 = 1 << 2;

/// Makes `wires` hold those of the devices, which run XDP in their driver, that frames may be sent out of.
///
/// # Errors
/// [`StoreError`].
pub fn publish(pins: &PinDir, native: &BTreeSet<u32>) -> Result<(), StoreError> {
    let table: Table<u32, u32> = Table::open(&pins.maps(), names::WIRES)?;
    let known = table.iter().map(|entry| entry.map(|(ifindex, _)| ifindex)).collect::<Result<BTreeSet<_>, _>>()?;
    let mut wires = BTreeSet::new();
    if !native.is_empty() {
        match transmitters() {
            Ok(able) => wires = native & &able,
            Err(error) => debug!("netlink: netdev: {error}: XDP sends to no other device"),
        }
    }
    for ifindex in &known - &wires {
        table.remove(&ifindex)?;
    }
    for ifindex in &wires - &known {
        table.put(&ifindex, &1)?;
    }
    Ok(())
}

/// Has frames no longer sent out of a device.
///
/// # Errors
/// [`StoreError`].
pub(super) fn withdraw(pins: &PinDir, ifindex: u32) -> Result<(), StoreError> {
    let table: Table<u32, u32> = Table::open(&pins.maps(), names::WIRES)?;
    table.remove(&ifindex).map(drop)
}

/// Devices of the calling thread's network namespace whose drivers take frames of others now.
fn transmitters() -> io::Result<BTreeSet<u32>> {
    let mut able = BTreeSet::new();
    let mut request = GenlMessage::from_payload(Features::default());
    request.set_resolved_family_id(family()?);
    netns::dump(NETLINK_GENERIC, dump_of(request), |answer: GenlMessage<Features>| {
        let Features { ifindex, features } = answer.payload;
        able.extend((features & NDO_XMIT != 0).then_some(ifindex));
    })?;
    Ok(able)
}

/// The number that the kernel has given to the family.
fn family() -> io::Result<u16> {
    let request = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: Vec::new() });
    let mut family = None;
    netns::dump(NETLINK_GENERIC, dump_of(request), |answer: GenlMessage<GenlCtrl>| {
        let attributes = answer.payload.nlas;
        let is_meant = |attribute: &GenlCtrlAttrs| matches!(attribute, GenlCtrlAttrs::FamilyName(name) if name == Features::family_name());
        if attributes.iter().any(is_meant) {
            let id =
                |attribute: &GenlCtrlAttrs| if let GenlCtrlAttrs::FamilyId(id) = attribute { Some(*id) } else { None };
            family = attributes.iter().find_map(id);
        }
    })?;
    family.ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
}

fn dump_of<F: GenlFamily + std::fmt::Debug>(request: GenlMessage<F>) -> NetlinkMessage<GenlMessage<F>>
where
    NetlinkMessage<GenlMessage<F>>: From<GenlMessage<F>>,
{
    let mut message = NetlinkMessage::from(request);
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message
}

/// What a device's driver does for XDP. A request for all devices has no content.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Features {
    ifindex: u32,
    features: u64,
}

impl GenlFamily for Features {
    fn family_name() -> &'static str {
        "netdev"
    }

    fn command(&self) -> u8 {
        DEV_GET
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Features {
    fn buffer_len(&self) -> usize {
        0
    }

    fn emit(&self, _buffer: &mut [u8]) {}
}

impl ParseableParametrized<[u8], GenlHeader> for Features {
    fn parse_with_param(bytes: &[u8], _header: GenlHeader) -> Result<Self, DecodeError> {
        let mut read = Self::default();
        for attribute in NlasIterator::new(bytes) {
            let attribute = attribute?;
            match attribute.kind() {
                IFINDEX => read.ifindex = parse_u32(attribute.value())?,
                XDP_FEATURES => read.features = parse_u64(attribute.value())?,
                _ => {}
            }
        }
        Ok(read)
    }
}
