//! Reads a catalog from a running dataplane.

use std::collections::BTreeMap;

use affinity_common::abi::{Frontend, FrontendKey};

use super::{Catalog, Clock};
use crate::store::{
    Store, StoreError,
    kernel::{Family, KernelStore},
};

/// If the agent never stops publishing, a possibly inconsistent reading is accepted after this many attempts.
const MAX_READINGS: u32 = 10;

impl Catalog {
    /// A consistent reading of the small tables, as far as packets can tell. A concurrent plan switches frontends after it has
    /// written the records that they refer to, and before it removes such records. So if the frontends are the same at the end
    /// of the reading, these records existed the whole time.
    ///
    /// # Errors
    /// [`StoreError`] if a map could not be read.
    pub fn read(store: &KernelStore) -> Result<Self, StoreError> {
        let mut observed = store.observe()?;
        for _ in 0..MAX_READINGS {
            if observed.frontends_v4 == frontends(store)? && observed.frontends_v6 == frontends(store)? {
                break;
            }
            observed = store.observe()?;
        }
        let status = store.status.get(&0)?.unwrap_or_default();
        let service_conditions = store.service_conditions.iter().collect::<Result<_, _>>()?;
        Ok(Self::new(observed, store.usage_sums()?, Clock::now()).with_status(&status).with_remarks(service_conditions))
    }
}

fn frontends<A: Family>(store: &KernelStore) -> Result<BTreeMap<FrontendKey<A>, Frontend>, StoreError> {
    store.family::<A>().frontends.iter().collect()
}
