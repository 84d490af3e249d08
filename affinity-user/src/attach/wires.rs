//! How attached devices take frames that came in by others: the map `wires`. And whose frames XDP takes: the map
//! `device_macs`.
//!
//! XDP sends out of those that run it in their driver, where the driver also takes frames of others
//! (`NETDEV_XDP_ACT_NDO_XMIT`). A driver that does not would drop them without a word; where the kernel does not tell, no
//! frame takes that way. TC sends out of those that TC is attached to in both directions: past the stack goes both of a
//! connection's directions or none, for the stack's connection tracking refuses what it has seen half of.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::{
    abi::{DeviceMac, WIRE_ABOVE, WIRE_POD, WIRE_TC, WIRE_XDP},
    names,
};
use tracing::debug;

use super::{Hook, Note, netdev::xdp_features};
use crate::{
    load::PinDir,
    store::{StoreError, kernel::Table},
};

/// An attached device.
#[derive(Clone, Copy, Debug)]
pub struct Wire<'h> {
    /// Its index.
    pub ifindex: u32,
    /// Where it is attached.
    pub hooks: &'h [Hook],
    /// Whether it is one end of a pair, with a pod at the other.
    pub leads_to_pod: bool,
    /// The bridge or bond that it is a port of, by index.
    pub controller: Option<u32>,
    /// The device of which it is a VLAN, by index.
    pub below: Option<u32>,
    /// Its link address, and that of its controller.
    pub macs: Option<[[u8; 6]; 2]>,
    /// Whether it is one end of a pair.
    pub is_pair: bool,
    /// Why there is no XDP on it.
    pub note: Option<Note>,
}

/// Makes the maps say how these devices take frames. Returns those whose answers by XDP are lost now, and were not before.
///
/// # Errors
/// [`StoreError`].
pub fn publish(pins: &PinDir, attached: &[Wire<'_>]) -> Result<Vec<u32>, StoreError> {
    publish_macs(pins, attached)?;
    let table: Table<u32, u32> = Table::open(&pins.maps(), names::WIRES)?;
    let known = table.iter().collect::<Result<BTreeMap<_, _>, _>>()?;
    let mut wires = ways(attached);
    let pairs = attached.iter().filter(|wire| wire.is_pair).map(|wire| wire.ifindex).collect();
    keep_senders(&mut wires, &pairs);
    for ifindex in known.keys().filter(|ifindex| !wires.contains_key(ifindex)) {
        table.remove(ifindex)?;
    }
    for (ifindex, bits) in wires.iter().filter(|(ifindex, bits)| known.get(ifindex) != Some(bits)) {
        table.put(ifindex, bits)?;
    }
    let loses = |bits: Option<&u32>| bits.copied().and_then(Note::from_bits) == Some(Note::AnswersLost);
    let is_new = |ifindex: &u32| loses(wires.get(ifindex)) && !loses(known.get(ifindex));
    Ok(wires.keys().copied().filter(is_new).collect())
}

/// Writes the addresses of devices with XDP. Of two that want the same place the first has it.
fn publish_macs(pins: &PinDir, attached: &[Wire<'_>]) -> Result<(), StoreError> {
    let table: Table<u32, DeviceMac> = Table::open(&pins.maps(), names::DEVICE_MACS)?;
    let mut macs: BTreeMap<u32, DeviceMac> = BTreeMap::new();
    for wire in attached.iter().filter(|wire| wire.hooks.contains(&Hook::XdpNative)) {
        let Some([own, controller]) = wire.macs else { continue };
        macs.entry(DeviceMac::slot(wire.ifindex)).or_insert(DeviceMac { own, controller, ifindex: wire.ifindex });
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

/// The bits of each device. What comes in by a bridge or a VLAN has come in by a device below before. TC sends nothing out of ports and of what they are ports of: a packet that is translated at a
/// port is routed from the bridge, and its reply may never leave the bridge.
fn ways(attached: &[Wire<'_>]) -> BTreeMap<u32, u32> {
    let bridges: BTreeSet<u32> = attached.iter().filter_map(|wire| wire.controller).collect();
    let way = |wire: &Wire<'_>| {
        let is_bridged = wire.controller.is_some() || bridges.contains(&wire.ifindex);
        let pod = if wire.leads_to_pod { WIRE_POD } else { 0 };
        let by_tc = if is_bridged { 0 } else { WIRE_TC | pod };
        let is_above = bridges.contains(&wire.ifindex)
            || attached.iter().any(|other| wire.below == Some(other.ifindex) && !other.hooks.is_empty());
        let above = if is_above { WIRE_ABOVE } else { 0 };
        let note = wire.note.map_or(0, Note::to_bits);
        (wire.ifindex, (bits(wire.hooks) | pod) & (WIRE_XDP | by_tc) | above | note)
    };
    attached.iter().map(way).collect()
}

/// What hooks make possible.
fn bits(hooks: &[Hook]) -> u32 {
    let bit = |hook: &Hook| match hook {
        Hook::XdpNative => WIRE_XDP,
        Hook::TcxIngress | Hook::ClsactIngress => WIRE_TC,
        Hook::XdpGeneric | Hook::TcxEgress | Hook::ClsactEgress => 0,
    };
    hooks.iter().map(bit).fold(0, |bits, bit| bits | bit)
}

/// Of the devices that run XDP in their driver leaves those that send out frames of others. Of pairs, one end that does not
/// loses its own answers, too: both need the other end to poll.
///
/// <https://elixir.bootlin.com/linux/v6.18/source/drivers/net/veth.c> (`veth_set_xdp_features`)
fn keep_senders(wires: &mut BTreeMap<u32, u32>, pairs: &BTreeSet<u32>) {
    if wires.values().all(|bits| bits & WIRE_XDP == 0) {
        return;
    }
    let features = xdp_features().unwrap_or_else(|error| {
        debug!("netlink: netdev: {error}: XDP sends to no other device");
        BTreeMap::default()
    });
    for (ifindex, bits) in wires.iter_mut().filter(|(_, bits)| **bits & WIRE_XDP != 0) {
        let features = features.get(ifindex);
        if !features.is_some_and(|of| of.sends) {
            *bits &= !WIRE_XDP;
            if features.is_some() && pairs.contains(ifindex) {
                *bits |= Note::AnswersLost.to_bits();
            }
        }
    }
}

/// What is noted of each device, by index.
///
/// # Errors
/// [`StoreError`].
pub fn notes(pins: &PinDir) -> Result<BTreeMap<u32, Note>, StoreError> {
    let table: Table<u32, u32> = Table::open(&pins.maps(), names::WIRES)?;
    let mut notes = BTreeMap::new();
    for entry in table.iter() {
        let (ifindex, bits) = entry?;
        notes.extend(Note::from_bits(bits).map(|note| (ifindex, note)));
    }
    Ok(notes)
}

/// Has frames no longer sent out of a device.
///
/// # Errors
/// [`StoreError`].
pub(super) fn withdraw(pins: &PinDir, ifindex: u32) -> Result<(), StoreError> {
    let table: Table<u32, u32> = Table::open(&pins.maps(), names::WIRES)?;
    table.remove(&ifindex).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TC: [Hook; 2] = [Hook::TcxIngress, Hook::TcxEgress];

    fn wire(ifindex: u32, hooks: &[Hook]) -> Wire<'_> {
        Wire {
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
        let pod = Wire { leads_to_pod: true, ..wire(6, &TC) };
        let attached = [wire(2, &TC), wire(3, &xdp), wire(4, &both), wire(5, &generic), pod];
        let expected = [(2, WIRE_TC), (3, WIRE_XDP), (4, WIRE_XDP | WIRE_TC), (5, 0), (6, WIRE_TC | WIRE_POD)];
        assert_eq!(ways(&attached), BTreeMap::from(expected));
        let noted = Wire { note: Some(Note::Mtu), ..wire(2, &TC) };
        assert_eq!(ways(&[noted]), BTreeMap::from([(2, WIRE_TC | Note::Mtu.to_bits())]));
    }

    #[test]
    fn nothing_is_redirected_to_a_bridge_or_its_ports() {
        let port = Wire { leads_to_pod: true, controller: Some(3), ..wire(6, &TC) };
        let attached = [wire(2, &TC), wire(3, &TC), port];
        assert_eq!(ways(&attached), BTreeMap::from([(2, WIRE_TC), (3, WIRE_ABOVE), (6, 0)]));
        assert_eq!(ways(&attached[..2]), BTreeMap::from([(2, WIRE_TC), (3, WIRE_TC)]), "its ports are not attached");
    }

    #[test]
    fn a_vlan_is_above_its_device() {
        let vlan = Wire { below: Some(2), ..wire(7, &TC) };
        let attached = [wire(2, &TC), vlan];
        assert_eq!(ways(&attached), BTreeMap::from([(2, WIRE_TC), (7, WIRE_TC | WIRE_ABOVE)]));
        assert_eq!(ways(&attached[1..]), BTreeMap::from([(7, WIRE_TC)]), "its device is not attached");
    }
}
