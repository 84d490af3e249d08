//! How attached devices take frames that came in by others: the map `wires`.
//!
//! XDP sends out of those that run it in their driver, where the driver also takes frames of others
//! (`NETDEV_XDP_ACT_NDO_XMIT`). A driver that does not would drop them without a word; where the kernel does not tell, no
//! frame takes that way. TC sends out of those that TC is attached to in both directions: past the stack goes both of a
//! connection's directions or none, for the stack's connection tracking refuses what it has seen half of.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::{
    abi::{WIRE_POD, WIRE_TC, WIRE_XDP},
    names,
};
use tracing::debug;

use super::{Hook, netdev::xdp_features};
use crate::{
    load::PinDir,
    store::{StoreError, kernel::Table},
};

/// Makes `wires` say how these devices take frames; `pods` are those that lead to pods.
///
/// # Errors
/// [`StoreError`].
pub fn publish<'h>(
    pins: &PinDir,
    attached: impl Iterator<Item = (u32, &'h [Hook])>,
    pods: &BTreeSet<u32>,
) -> Result<(), StoreError> {
    let table: Table<u32, u32> = Table::open(&pins.maps(), names::WIRES)?;
    let known = table.iter().collect::<Result<BTreeMap<_, _>, _>>()?;
    let mut wires: BTreeMap<u32, u32> = attached.map(|(ifindex, hooks)| (ifindex, bits(hooks))).collect();
    keep_senders(&mut wires);
    for (ifindex, bits) in &mut wires {
        *bits |= if pods.contains(ifindex) { WIRE_POD } else { 0 };
    }
    for ifindex in known.keys().filter(|ifindex| !wires.contains_key(ifindex)) {
        table.remove(ifindex)?;
    }
    for (ifindex, bits) in wires.iter().filter(|(ifindex, bits)| known.get(ifindex) != Some(bits)) {
        table.put(ifindex, bits)?;
    }
    Ok(())
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

/// Of the devices that run XDP in their driver leaves those that send out frames of others.
fn keep_senders(wires: &mut BTreeMap<u32, u32>) {
    if wires.values().all(|bits| bits & WIRE_XDP == 0) {
        return;
    }
    let features = xdp_features().unwrap_or_else(|error| {
        debug!("netlink: netdev: {error}: XDP sends to no other device");
        BTreeMap::default()
    });
    for (ifindex, bits) in wires {
        if !features.get(ifindex).is_some_and(|of| of.sends) {
            *bits &= !WIRE_XDP;
        }
    }
}

/// Has frames no longer sent out of a device.
///
/// # Errors
/// [`StoreError`].
pub(super) fn withdraw(pins: &PinDir, ifindex: u32) -> Result<(), StoreError> {
    let table: Table<u32, u32> = Table::open(&pins.maps(), names::WIRES)?;
    table.remove(&ifindex).map(drop)
}
