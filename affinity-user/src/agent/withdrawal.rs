//! Warns about a source that suddenly gives nothing at all: usually a mistake.

use tracing::warn;

use super::publish::count;
use crate::{source::Snapshot, store::Observed};

/// How many objects of each kind a source gives.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Given {
    services: usize,
    slices: usize,
}

impl Given {
    /// Warns if the snapshot withdraws all objects of a kind that the source gave before.
    pub(super) fn update(&mut self, snapshot: &Snapshot) {
        // A snapshot that may lack objects withdraws nothing.
        if snapshot.partial {
            return;
        }
        let before = *self;
        *self = Self { services: snapshot.services.len(), slices: snapshot.slices.len() };
        if let Some(all) = before.withdrawn_by(*self) {
            warn!("the source withdraws all that it gave: {all}");
        }
    }

    fn withdrawn_by(self, now: Self) -> Option<String> {
        let all = |before: usize, now: usize, noun: &str| (before > 0 && now == 0).then(|| count(before, noun));
        let services = all(self.services, now.services, "Service");
        let slices = all(self.slices, now.slices, "EndpointSlice");
        let kinds: Vec<String> = services.into_iter().chain(slices).collect();
        (!kinds.is_empty()).then(|| kinds.join(" and "))
    }
}

/// Warns if a former agent left frontends in the maps, and none is desired.
pub(super) fn compare_with_former(observed: &Observed, frontends_desired: usize, is_partial: bool) {
    let frontends = observed.frontends_v4.len() + observed.frontends_v6.len();
    if frontends > 0 && frontends_desired == 0 && !is_partial {
        let members = count(observed.members.len(), "member");
        warn!(
            "the source gives no service: all that is in the maps is withdrawn, {} and {members}",
            count(frontends, "frontend")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn withdrawal_of_all_of_a_kind_is_counted() {
        let withdrawn = |before: [usize; 2], now: [usize; 2]| {
            let given = |[services, slices]: [usize; 2]| Given { services, slices };
            given(before).withdrawn_by(given(now))
        };
        assert_eq!(withdrawn([3, 1], [0, 0]).as_deref(), Some("3 Services and 1 EndpointSlice"));
        assert_eq!(withdrawn([1, 2], [1, 0]).as_deref(), Some("2 EndpointSlices"));
        assert_eq!(withdrawn([1, 0], [0, 4]).as_deref(), Some("1 Service"));
        assert_eq!(withdrawn([3, 1], [1, 1]), None);
        assert_eq!(withdrawn([0, 0], [0, 0]), None);
    }
}
