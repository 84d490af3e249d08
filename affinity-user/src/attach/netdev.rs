//! What drivers of network devices report about XDP: the kernel's `netdev` family of generic netlink (Linux 6.3 and later). A
//! query changes nothing, unlike attaching a program to see whether that works.
//!
//! <https://docs.kernel.org/networking/netlink_spec/netdev.html>

use std::{collections::BTreeMap, io};

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

use crate::netns;

/// The driver runs programs (`NETDEV_XDP_ACT_BASIC`).
const BASIC: u64 = 1;
/// It sends frames that arrived on another device (`NETDEV_XDP_ACT_NDO_XMIT`).
const NDO_XMIT: u64 = 1 << 2;
/// It accepts programs even if frames may span buffers (`NETDEV_XDP_ACT_RX_SG`).
const RX_SG: u64 = 1 << 5;

const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;

/// What a driver can do for XDP programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct XdpFeatures {
    /// It runs them itself: native XDP.
    pub native: bool,
    /// Also on frames that span several buffers: jumbo frames.
    pub multi_buffer: bool,
    /// It sends frames that arrived on another device. Some drivers do so only while they run a program.
    pub sends: bool,
}

/// The features of every device in the calling thread's network namespace, by index.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] if the kernel has no such family, otherwise the system's error.
pub fn xdp_features() -> io::Result<BTreeMap<u32, XdpFeatures>> {
    let mut request = GenlMessage::from_payload(DeviceGet::default());
    request.set_resolved_family_id(family()?);
    let mut devices = BTreeMap::new();
    netns::dump(NETLINK_GENERIC, dump_of(request), |answer: GenlMessage<DeviceGet>| {
        let DeviceGet { ifindex, features } = answer.payload;
        let has = |feature| features & feature != 0;
        let features = XdpFeatures { native: has(BASIC), multi_buffer: has(RX_SG), sends: has(NDO_XMIT) };
        devices.insert(ifindex, features);
    })?;
    Ok(devices)
}

/// The number that the kernel has assigned to the family.
fn family() -> io::Result<u16> {
    let request = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: Vec::new() });
    let mut family = None;
    netns::dump(NETLINK_GENERIC, dump_of(request), |answer: GenlMessage<GenlCtrl>| {
        let attributes = answer.payload.nlas;
        let name = GenlCtrlAttrs::FamilyName(DeviceGet::family_name().to_owned());
        if attributes.contains(&name) {
            let id =
                |attribute: &GenlCtrlAttrs| if let GenlCtrlAttrs::FamilyId(id) = attribute { Some(*id) } else { None };
            family = attributes.iter().find_map(id);
        }
    })?;
    family.ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "no netlink family netdev"))
}

fn dump_of<F>(request: GenlMessage<F>) -> NetlinkMessage<GenlMessage<F>>
where
    NetlinkMessage<GenlMessage<F>>: From<GenlMessage<F>>,
{
    let mut message = NetlinkMessage::from(request);
    message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    message
}

/// An answer. The request for all devices is the same message without content.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct DeviceGet {
    ifindex: u32,
    features: u64,
}

impl GenlFamily for DeviceGet {
    fn family_name() -> &'static str {
        "netdev"
    }

    fn command(&self) -> u8 {
        NETDEV_CMD_DEV_GET
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for DeviceGet {
    fn buffer_len(&self) -> usize {
        0
    }

    fn emit(&self, _buffer: &mut [u8]) {}
}

impl ParseableParametrized<[u8], GenlHeader> for DeviceGet {
    fn parse_with_param(bytes: &[u8], _header: GenlHeader) -> Result<Self, DecodeError> {
        let mut device = Self::default();
        for attribute in NlasIterator::new(bytes) {
            let attribute = attribute?;
            match attribute.kind() {
                NETDEV_A_DEV_IFINDEX => device.ifindex = parse_u32(attribute.value())?,
                NETDEV_A_DEV_XDP_FEATURES => device.features = parse_u64(attribute.value())?,
                _ => {}
            }
        }
        Ok(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_answers_for_the_loopback_device() {
        match xdp_features() {
            Ok(devices) => assert!(!devices[&1].native, "the loopback device has no driver"),
            // Kernels before 6.3.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}"),
        }
    }

    #[test]
    fn a_device_is_read_from_its_attributes_and_a_cut_one_is_an_error() {
        let mut bytes = vec![8, 0, 1, 0, 7, 0, 0, 0];
        bytes.extend([12, 0, 3, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        let read =
            |bytes: &[u8]| DeviceGet::parse_with_param(bytes, GenlHeader { cmd: NETDEV_CMD_DEV_GET, version: 1 });
        assert_eq!(read(&bytes).unwrap(), DeviceGet { ifindex: 7, features: BASIC | NDO_XMIT });
        assert!(read(&bytes[..14]).is_err());
    }
}
