//! The devices that XDP may send frames out of: those that run it in their driver, where the driver also takes frames that
//! came in by others (`NETDEV_XDP_ACT_NDO_XMIT`).
//!
//! A driver that does not would drop them without a word. Where the kernel does not tell, no frame takes that way.

use std::collections::BTreeSet;

use affinity_common::names;
use tracing::debug;

use super::netdev::xdp_features;
use crate::{
    load::PinDir,
    store::{StoreError, kernel::Table},
};

/// Makes `wires` hold those of the devices, which run XDP in their driver, that frames may be sent out of.
///
/// # Errors
/// [`StoreError`].
pub fn publish(pins: &PinDir, native: &BTreeSet<u32>) -> Result<(), StoreError> {
    let table: Table<u32, u32> = Table::open(&pins.maps(), names::WIRES)?;
    let known = table.iter().map(|entry| entry.map(|(ifindex, _)| ifindex)).collect::<Result<BTreeSet<_>, _>>()?;
    let mut wires = BTreeSet::new();
    if !native.is_empty() {
        match xdp_features() {
            Ok(features) => {
                wires =
                    native.iter().copied().filter(|ifindex| features.get(ifindex).is_some_and(|of| of.sends)).collect();
            }
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
