//! Converts the flows of an older map layout, so that an upgrade keeps open connections.
//!
//! Up to layout 4 a flow had the pin's timeout in nanoseconds, and its service.

use affinity_common::{
    abi::{Flow, V4},
    names,
};

use super::PinDir;
use crate::{
    store::kernel::Walk,
    sys::{Map, SysError, Write},
};

/// Where the timeout is in a flow of layout 3 or 4: nanoseconds, eight bytes.
const TIMEOUT_NS: usize = 16;
/// Bytes of a flow after the service.
const END: usize = 4;
/// Bytes of the service.
const SERVICE: usize = 4;

/// Copies the flows of an older dataplane that this one does not have, if their layout differs. Call it after the load, and
/// again once no program uses the old maps.
///
/// # Errors
/// [`SysError`].
pub(crate) fn copy_older_flows(older: &PinDir, pins: &PinDir) -> Result<(), SysError> {
    for name in [names::FLOWS_V4, names::FLOWS_V6] {
        let old = match Map::open(&older.map(name)) {
            Err(error) if error.is_not_found() => continue,
            opened => opened?,
        };
        let new = Map::open(&pins.map(name))?;
        if old.value_len() == new.value_len() {
            continue;
        }
        let mut walk = Walk::new(&old);
        while let Some(entry) = walk.next(&old) {
            let (key, flow) = entry?;
            new.update(key, &converted(flow), Write::New)?;
        }
    }
    Ok(())
}

/// A flow of layout 3 or 4 in the layout of this version.
fn converted(flow: &[u8]) -> Vec<u8> {
    let (times, rest) = flow.split_at(TIMEOUT_NS);
    let (timeout_ns, rest) = rest.split_at(8);
    let (rest, end) = rest.split_at(rest.len() - END);
    let seconds = Flow::<V4>::seconds(bytemuck::pod_read_unaligned(timeout_ns));
    [times, &rest[..rest.len() - SERVICE], &seconds.to_ne_bytes(), end].concat()
}
