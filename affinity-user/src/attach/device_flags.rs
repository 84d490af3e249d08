//! The flags of attached devices (map `devices`): which of them accept redirected frames. And their MAC addresses, for XDP
//! (map `device_macs`).
//!
//! XDP redirects to devices with native XDP and a driver that accepts redirected frames (`NETDEV_XDP_ACT_NDO_XMIT`). Other
//! drivers drop such frames silently, so XDP redirects nothing if the kernel does not report the feature. TC redirects to
//! devices with TC programs in both directions: both directions of a connection are redirected, or none, because conntrack
//! drops packets of a connection that it has seen only half of.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::{
    abi::{DEVICE_POD, DEVICE_REDIRECT_TC, DEVICE_REDIRECT_XDP, DEVICE_UPPER, DeviceMac},
    names,
};
use tracing::debug;

use super::{Hook, Note, netdev::xdp_features};
use crate::{
    pins::PinDir,
    store::{StoreError, kernel::Table},
};

/// An attached device.
#[derive(Clone, Copy, Debug)]
pub struct AttachedDevice<'h> {
    /// Its index.
    pub ifindex: u32,
    /// Where it is attached.
    pub hooks: &'h [Hook],
    /// Whether it is one end of a pair, with a pod at the other.
    pub leads_to_pod: bool,
    /// The bridge or bond that it is a port of, by index.
    pub controller: Option<u32>,
    /// The device that it is a VLAN on, by index.
    pub below: Option<u32>,
    /// Its link address, and that of its controller.
    pub macs: Option<[[u8; 6]; 2]>,
    /// Whether it is one end of a pair.
    pub is_pair: bool,
    /// Why there is no XDP on it.
    pub note: Option<Note>,
}

/// Writes the flags and MAC addresses of these devices. Returns the devices on which answers by XDP are lost from now on.
///
/// # Errors
/// [`StoreError`].
pub fn publish(pins: &PinDir, attached: &[AttachedDevice<'_>]) -> Result<Vec<u32>, StoreError> {
    publish_macs(pins, attached)?;
    let table: Table<u32, u32> = Table::open(&pins.maps(), names::DEVICES)?;
    let known = table.iter().collect::<Result<BTreeMap<_, _>, _>>()?;
    let mut flags = flags_of(attached);
    let pairs = attached.iter().filter(|device| device.is_pair).map(|device| device.ifindex).collect();
    keep_senders(&mut flags, &pairs);
    for ifindex in known.keys().filter(|ifindex| !flags.contains_key(ifindex)) {
        table.remove(ifindex)?;
    }
    for (ifindex, bits) in flags.iter().filter(|(ifindex, bits)| known.get(ifindex) != Some(bits)) {
        table.put(ifindex, bits)?;
    }
    let loses = |bits: Option<&u32>| bits.copied().and_then(Note::from_bits) == Some(Note::AnswersLost);
    let is_new = |ifindex: &u32| loses(flags.get(ifindex)) && !loses(known.get(ifindex));
    Ok(flags.keys().copied().filter(is_new).collect())
}

/// Writes the MAC addresses of devices with XDP. If two devices share a slot, the first one gets it.
fn publish_macs(pins: &PinDir, attached: &[AttachedDevice<'_>]) -> Result<(), StoreError> {
    let table: Table<u32, DeviceMac> = Table::open(&pins.maps(), names::DEVICE_MACS)?;
    let mut macs: BTreeMap<u32, DeviceMac> = BTreeMap::new();
    for device in attached.iter().filter(|device| device.hooks.contains(&Hook::XdpNative)) {
        let Some([own, controller]) = device.macs else { continue };
        macs.entry(DeviceMac::slot(device.ifindex)).or_insert(DeviceMac { own, controller, ifindex: device.ifindex });
    }
    for entry in table.iter() {
        let (slot, known) = entry?;
        let mac = macs.get(&slot).copied().unwrap_or_default();
        if mac != known {
            table.put(&slot, &mac)?;
        }
    }
    Ok(())
}

/// The flags of each device. TC does not redirect to bridges with attached ports, or to these ports: a packet that is
/// translated at a port is routed from the bridge, and its reply may never leave the bridge.
fn flags_of(attached: &[AttachedDevice<'_>]) -> BTreeMap<u32, u32> {
    let bridges: BTreeSet<u32> = attached.iter().filter_map(|device| device.controller).collect();
    let flags = |device: &AttachedDevice<'_>| {
        let is_bridged = device.controller.is_some() || bridges.contains(&device.ifindex);
        let pod = if device.leads_to_pod { DEVICE_POD } else { 0 };
        let by_tc = if is_bridged { 0 } else { DEVICE_REDIRECT_TC | pod };
        let is_above = bridges.contains(&device.ifindex)
            || attached.iter().any(|other| device.below == Some(other.ifindex) && !other.hooks.is_empty());
        let above = if is_above { DEVICE_UPPER } else { 0 };
        let note = device.note.map_or(0, Note::to_bits);
        (device.ifindex, (bits(device.hooks) | pod) & (DEVICE_REDIRECT_XDP | by_tc) | above | note)
    };
    attached.iter().map(flags).collect()
}

/// The flags by hooks.
fn bits(hooks: &[Hook]) -> u32 {
    let bit = |hook: &Hook| match hook {
        Hook::XdpNative => DEVICE_REDIRECT_XDP,
        Hook::TcxIngress | Hook::ClsactIngress => DEVICE_REDIRECT_TC,
        Hook::XdpGeneric | Hook::TcxEgress | Hook::ClsactEgress => 0,
    };
    hooks.iter().map(bit).fold(0, |bits, bit| bits | bit)
}

/// Clears the flag of devices with a driver that does not accept redirected frames. Such an end of a veth pair loses its own
/// answers (`XDP_TX`) as well, because both need NAPI on the other end.
///
/// <https://elixir.bootlin.com/linux/v6.18/source/drivers/net/veth.c> (`veth_set_xdp_features`)
fn keep_senders(flags: &mut BTreeMap<u32, u32>, pairs: &BTreeSet<u32>) {
    if flags.values().all(|bits| bits & DEVICE_REDIRECT_XDP == 0) {
        return;
    }
    let features = xdp_features().unwrap_or_else(|error| {
        debug!("netlink: netdev: {error}: XDP sends to no other device");
        BTreeMap::default()
    });
    for (ifindex, bits) in flags.iter_mut().filter(|(_, bits)| **bits & DEVICE_REDIRECT_XDP != 0) {
        let features = features.get(ifindex);
        if !features.is_some_and(|of| of.sends) {
            *bits &= !DEVICE_REDIRECT_XDP;
            if features.is_some() && pairs.contains(ifindex) {
                *bits |= Note::AnswersLost.to_bits();
            }
        }
    }
}

/// The notes of devices, by index.
///
/// # Errors
/// [`StoreError`].
pub fn notes(pins: &PinDir) -> Result<BTreeMap<u32, Note>, StoreError> {
    let table: Table<u32, u32> = Table::open(&pins.maps(), names::DEVICES)?;
    let mut notes = BTreeMap::new();
    for entry in table.iter() {
        let (ifindex, bits) = entry?;
        notes.extend(Note::from_bits(bits).map(|note| (ifindex, note)));
    }
    Ok(notes)
}

/// Stops redirecting frames to a device.
///
/// # Errors
/// [`StoreError`].
pub(super) fn withdraw(pins: &PinDir, ifindex: u32) -> Result<(), StoreError> {
    let table: Table<u32, u32> = Table::open(&pins.maps(), names::DEVICES)?;
    table.remove(&ifindex).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TC: [Hook; 2] = [Hook::TcxIngress, Hook::TcxEgress];

    fn device(ifindex: u32, hooks: &[Hook]) -> AttachedDevice<'_> {
        AttachedDevice {
            ifindex,
            hooks,
            leads_to_pod: false,
            controller: None,
            below: None,
            macs: None,
            is_pair: false,
            note: None,
        }
    }

    #[test]
    fn hooks_say_what_may_be_sent_out() {
        let both = [Hook::XdpNative, Hook::ClsactIngress, Hook::ClsactEgress];
        let (xdp, generic) = ([Hook::XdpNative, Hook::TcxEgress], [Hook::XdpGeneric, Hook::TcxEgress]);
        let pod = AttachedDevice { leads_to_pod: true, ..device(6, &TC) };
        let attached = [device(2, &TC), device(3, &xdp), device(4, &both), device(5, &generic), pod];
        let expected = [
            (2, DEVICE_REDIRECT_TC),
            (3, DEVICE_REDIRECT_XDP),
            (4, DEVICE_REDIRECT_XDP | DEVICE_REDIRECT_TC),
            (5, 0),
            (6, DEVICE_REDIRECT_TC | DEVICE_POD),
        ];
        assert_eq!(flags_of(&attached), BTreeMap::from(expected));
        let noted = AttachedDevice { note: Some(Note::Mtu), ..device(2, &TC) };
        assert_eq!(flags_of(&[noted]), BTreeMap::from([(2, DEVICE_REDIRECT_TC | Note::Mtu.to_bits())]));
    }

    #[test]
    fn nothing_is_redirected_to_a_bridge_or_its_ports() {
        let port = AttachedDevice { leads_to_pod: true, controller: Some(3), ..device(6, &TC) };
        let attached = [device(2, &TC), device(3, &TC), port];
        assert_eq!(flags_of(&attached), BTreeMap::from([(2, DEVICE_REDIRECT_TC), (3, DEVICE_UPPER), (6, 0)]));
        assert_eq!(
            flags_of(&attached[..2]),
            BTreeMap::from([(2, DEVICE_REDIRECT_TC), (3, DEVICE_REDIRECT_TC)]),
            "its ports are not attached"
        );
    }

    #[test]
    fn a_vlan_is_above_its_device() {
        let vlan = AttachedDevice { below: Some(2), ..device(7, &TC) };
        let attached = [device(2, &TC), vlan];
        assert_eq!(
            flags_of(&attached),
            BTreeMap::from([(2, DEVICE_REDIRECT_TC), (7, DEVICE_REDIRECT_TC | DEVICE_UPPER)])
        );
        assert_eq!(flags_of(&attached[1..]), BTreeMap::from([(7, DEVICE_REDIRECT_TC)]), "its device is not attached");
    }
}
