//! Looking up the record of a frontend.

use crate::{
    abi::{Address, FlowKey, Frontend, FrontendKey, PODS, Reason, SPLIT_SCOPE},
    tables::{FamilyTables, Unstable},
};

/// Copies the record of the frontend that a packet of a client goes to: for external clients their own, if there is one. Out of
/// line, to keep the caller's stack frame small.
///
/// # Errors
/// [`Reason::NotFrontend`]; [`Reason::Inconsistent`] if the record could not be read.
#[inline(never)]
pub fn copy_for_client<A: Address, T: FamilyTables<A>>(
    tables: &T,
    key: &FlowKey<A>,
    frontend: &mut Frontend,
) -> Result<(), Reason> {
    let frontend_key = FrontendKey::new(key.daddr, key.dport, key.protocol);
    copy(tables, &frontend_key, frontend)?;
    if frontend.flags & SPLIT_SCOPE == 0 || tables.is_within(PODS, key.saddr) {
        return Ok(());
    }
    copy(tables, &frontend_key.external(), frontend)
}

/// Copies a record.
///
/// # Errors
/// [`Reason::NotFrontend`]; [`Reason::Inconsistent`] if the record could not be read.
#[inline(always)]
pub fn copy<A: Address, T: FamilyTables<A>>(
    tables: &T,
    key: &FrontendKey<A>,
    frontend: &mut Frontend,
) -> Result<(), Reason> {
    let found = tables.frontend(key).map_err(|Unstable| Reason::Inconsistent)?;
    *frontend = found.ok_or(Reason::NotFrontend)?;
    Ok(())
}
