//! Reading a catalog from a running dataplane.

use std::collections::BTreeMap;

use affinity_common::abi::{Frontend, FrontendKey};

use super::{Catalog, Clock};
use crate::store::{
    Store, StoreError,
    kernel::{Family, KernelStore},
};

/// Under an agent that never rests, a reading that may be mixed must do.
const MAX_READINGS: u32 = 10;

impl Catalog {
    /// The small tables as they are at one moment, as far as packets can tell: a plan that is carried out meanwhile
    /// switches frontends after it has written, and before it removes, what they refer to. So if the frontends are the
    /// same at the end of the reading, what they refer to was there all along.
    ///
    /// # Errors
    /// [`StoreError`] where a map could not be read.
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
