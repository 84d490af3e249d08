//! Rows of services and pods: rates from two samples, and hot spots.

use std::{cmp::Ordering, collections::BTreeMap};

use affinity_common::abi::{Reason, USAGES};

use super::{
    list::Row,
    sample::{BackendSample, Counts, Sample, ServiceSample},
};

/// A pod is a hot spot if its pins exceed this multiple of the mean of its service's ready pods ...
pub const HOT_FACTOR: f64 = 1.5;
/// ... and exceed the mean by more than this many standard deviations of a fair draw: small numbers of pins are never even.
pub const HOT_DEVIATIONS: f64 = 5.0;

/// The ratio of a pod's pins to the mean, if the pod is a hot spot.
#[must_use]
pub fn hot_factor(pins: u64, mean: f64) -> Option<f64> {
    let pins = pins as f64;
    // The standard deviation of pins that are distributed to many pods at random is the square root of the mean.
    let by_chance = mean + HOT_DEVIATIONS * mean.sqrt();
    (mean > 0.0 && pins > HOT_FACTOR * mean && pins > by_chance).then(|| pins / mean)
}

/// New connections per second.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Rates {
    /// All connections that got a pod.
    pub accepted: f64,
    /// Connections that created a pin: for a new client, or after the old pin had expired.
    pub pinned: f64,
    /// Connections that moved the pin, because its pod could not be used.
    pub moved: f64,
    /// Connections that no pod could take.
    pub refused: f64,
}

impl Rates {
    /// The rates between two counts, `elapsed_ns` apart. A count that decreased was reset.
    fn new(new: &Counts, old: &Counts, elapsed_ns: u64) -> Self {
        let elapsed_s = elapsed_ns.max(1) as f64 / 1e9;
        let mut rates = Self::default();
        for ((reason, &new), &old) in USAGES.iter().zip(new).zip(old) {
            let rate = new.checked_sub(old).unwrap_or(new) as f64 / elapsed_s;
            if *reason == Reason::NoEndpoints {
                rates.refused += rate;
            } else {
                rates.accepted += rate;
            }
            if matches!(reason, Reason::Created | Reason::Expired) {
                rates.pinned += rate;
            }
            if matches!(reason, Reason::BackendGone | Reason::NotReady | Reason::NotMember) {
                rates.moved += rate;
            }
        }
        rates
    }

    /// The sum of both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            accepted: self.accepted + other.accepted,
            pinned: self.pinned + other.pinned,
            moved: self.moved + other.moved,
            refused: self.refused + other.refused,
        }
    }
}

/// The row of a service.
#[derive(Clone, PartialEq, Debug)]
pub struct ServiceRow {
    /// Its id.
    pub id: u32,
    /// `namespace/name`.
    pub name: String,
    /// Pods that take new connections.
    pub ready: u32,
    /// Pods that only keep their existing connections.
    pub draining: u32,
    /// Live pins of its pods; `None` if the service keeps no pins.
    pub pins: Option<u64>,
    /// `None` before there are two samples.
    pub rates: Option<Rates>,
    /// Its hottest pod, and the ratio of its pins to the mean.
    pub hot: Option<(String, f64)>,
}

/// The sort orders of services.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServiceOrder {
    /// Most pins first.
    Pins,
    /// Most new connections first.
    Connections,
    /// Most moves first.
    Moved,
    /// Hottest first.
    Hot,
    /// By name.
    Name,
}

impl Row for ServiceRow {
    type Key = u32;
    type Order = ServiceOrder;
    const ORDERS: &'static [ServiceOrder] =
        &[ServiceOrder::Pins, ServiceOrder::Connections, ServiceOrder::Moved, ServiceOrder::Hot, ServiceOrder::Name];

    fn key(&self) -> u32 {
        self.id
    }

    fn matches(&self, filter: &str) -> bool {
        self.name.to_lowercase().contains(filter)
    }

    fn compare(&self, other: &Self, order: ServiceOrder) -> Ordering {
        let rates = |row: &Self| row.rates.unwrap_or_default();
        let hot = |row: &Self| row.hot.as_ref().map_or(0.0, |(_, factor)| *factor);
        let most_first = match order {
            ServiceOrder::Name => Ordering::Equal,
            ServiceOrder::Pins => other.pins.cmp(&self.pins),
            ServiceOrder::Connections => rates(other).accepted.total_cmp(&rates(self).accepted),
            ServiceOrder::Moved => rates(other).moved.total_cmp(&rates(self).moved),
            ServiceOrder::Hot => hot(other).total_cmp(&hot(self)),
        };
        most_first.then_with(|| self.name.cmp(&other.name))
    }
}

/// The row of a pod of a service.
#[derive(Clone, PartialEq, Debug)]
pub struct PodRow {
    /// The index of the first of its backends.
    pub index: u32,
    /// Its name, else its address.
    pub name: String,
    /// The first of its addresses, and the number of further ones.
    pub address: String,
    /// Whether it takes new connections of the service.
    pub ready: bool,
    /// Live pins, for all its services.
    pub pins: u64,
    /// New connections per second; `None` before there are two samples.
    pub accepted: Option<f64>,
    /// The ratio of its pins to the mean, if it is a hot spot.
    pub hot: Option<f64>,
}

/// The sort orders of pods.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PodOrder {
    /// Most pins first.
    Pins,
    /// Most new connections first.
    Connections,
    /// By name.
    Name,
}

impl Row for PodRow {
    type Key = u32;
    type Order = PodOrder;
    const ORDERS: &'static [PodOrder] = &[PodOrder::Pins, PodOrder::Connections, PodOrder::Name];

    fn key(&self) -> u32 {
        self.index
    }

    /// The filter of a service's screen applies to its clients, not to its pods.
    fn matches(&self, _: &str) -> bool {
        true
    }

    fn compare(&self, other: &Self, order: PodOrder) -> Ordering {
        let rate = |row: &Self| row.accepted.unwrap_or(0.0);
        let most_first = match order {
            PodOrder::Name => Ordering::Equal,
            PodOrder::Pins => other.pins.cmp(&self.pins),
            PodOrder::Connections => rate(other).total_cmp(&rate(self)),
        };
        most_first.then_with(|| (&self.name, &self.address).cmp(&(&other.name, &other.address)))
    }
}

/// A sample and the one before it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair<'s> {
    pub(super) new: &'s Sample,
    pub(super) old: Option<&'s Sample>,
}

impl Pair<'_> {
    pub(super) fn service_rows(&self) -> Vec<ServiceRow> {
        self.new.services.iter().map(|(&id, service)| self.service_row(id, service)).collect()
    }

    fn service_row(&self, id: u32, service: &ServiceSample) -> ServiceRow {
        let pods = self.pods(service);
        let mean = mean(service, &pods);
        let factors = pods.iter().filter_map(|pod| Some((pod, pod.hot_factor(mean)?)));
        let hottest = factors.max_by(|one, other| one.1.total_cmp(&other.1));
        let ready = pods.iter().filter(|pod| pod.ready).count();
        ServiceRow {
            id,
            name: service.name.clone(),
            ready: ready as u32,
            draining: (pods.len() - ready) as u32,
            pins: service.affinity.then(|| pods.iter().map(|pod| pod.pins).sum()),
            rates: self.rates(&service.counts, |old| Some(old.services.get(&id)?.counts)),
            hot: hottest.map(|(pod, factor)| (pod.backend.name.clone(), factor)),
        }
    }

    pub(super) fn pod_rows(&self, service: &ServiceSample) -> Vec<PodRow> {
        let pods = self.pods(service);
        let mean = mean(service, &pods);
        let row = |pod: &Pod<'_>| PodRow {
            index: pod.index,
            name: pod.backend.name.clone(),
            address: pod.address(),
            ready: pod.ready,
            pins: pod.pins,
            accepted: pod.accepted,
            hot: pod.hot_factor(mean),
        };
        pods.iter().map(row).collect()
    }

    /// The mean number of pins of a ready pod; `None` if the service keeps no pins, or has no ready pod.
    pub(super) fn mean(&self, service: &ServiceSample) -> Option<f64> {
        mean(service, &self.pods(service))
    }

    /// The pods of a service, by name.
    fn pods(&self, service: &ServiceSample) -> Vec<Pod<'_>> {
        let mut pods: BTreeMap<&str, Pod<'_>> = BTreeMap::new();
        for (&index, &ready) in &service.backends {
            let Some(backend) = self.new.backends.get(&index) else { continue };
            let pod = pods.entry(&backend.pod).or_insert(Pod {
                index,
                backend,
                addresses: 0,
                ready: false,
                pins: 0,
                accepted: None,
            });
            pod.addresses += 1;
            pod.ready |= ready;
            pod.pins += backend.pins;
            if let Some(accepted) = self.accepted(index, backend) {
                *pod.accepted.get_or_insert_default() += accepted;
            }
        }
        pods.into_values().collect()
    }

    fn accepted(&self, index: u32, backend: &BackendSample) -> Option<f64> {
        // Another generation of this index was another pod.
        let is_same = |old: &&BackendSample| old.generation == backend.generation;
        let before = |old: &Sample| old.backends.get(&index).filter(is_same).map(|old| old.counts);
        Some(self.rates(&backend.counts, before)?.accepted)
    }

    fn rates(&self, new: &Counts, before: impl FnOnce(&Sample) -> Option<Counts>) -> Option<Rates> {
        let old = self.old?;
        let counts = before(old).unwrap_or_default();
        Some(Rates::new(new, &counts, self.new.at_ns.saturating_sub(old.at_ns)))
    }
}

/// The backends of a service that belong to one pod.
#[derive(Clone, Copy)]
struct Pod<'s> {
    /// The index of the first backend.
    index: u32,
    /// The first backend.
    backend: &'s BackendSample,
    addresses: usize,
    ready: bool,
    pins: u64,
    accepted: Option<f64>,
}

impl Pod<'_> {
    /// The first address, and the number of further ones.
    fn address(&self) -> String {
        let address = self.backend.address.map(|address| address.to_string()).unwrap_or_default();
        if self.addresses > 1 { format!("{address} +{}", self.addresses - 1) } else { address }
    }

    fn hot_factor(&self, mean: Option<f64>) -> Option<f64> {
        mean.filter(|_| self.ready).and_then(|mean| hot_factor(self.pins, mean))
    }
}

fn mean(service: &ServiceSample, pods: &[Pod<'_>]) -> Option<f64> {
    let ready = || pods.iter().filter(|pod| pod.ready);
    let pins = || ready().map(|pod| pod.pins).sum::<u64>() as f64;
    (service.affinity && ready().count() > 0).then(|| pins() / ready().count() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences_over_time() {
        let old = [1, 10, 100, 5, 1, 0, 0, 7];
        let new = [3, 14, 120, 6, 2, 1, 1, 9];
        let rates = Rates::new(&new, &old, 2_000_000_000);
        assert_eq!(rates, Rates { accepted: 15.0, pinned: 2.5, moved: 1.5, refused: 1.0 });
        assert_eq!(rates.plus(rates).accepted, 30.0);
    }

    #[test]
    fn a_count_that_decreased_was_reset() {
        let rates = Rates::new(&[0, 4, 0, 0, 0, 0, 0, 0], &[0, 1_000, 0, 0, 0, 0, 0, 0], 1_000_000_000);
        assert_eq!(rates.accepted, 4.0);
    }

    #[test]
    fn a_hot_spot_is_far_above_the_mean_and_not_by_chance() {
        // Three pods with a thousand pins each: 1.4 times the mean is uneven, 1.6 times is hot.
        assert_eq!(hot_factor(1_400, 1_000.0), None);
        assert_eq!(hot_factor(1_600, 1_000.0), Some(1.6));
        // Two pins instead of an expected one prove nothing; neither do twenty instead of ten.
        assert_eq!(hot_factor(2, 1.0), None);
        assert_eq!(hot_factor(20, 10.0), None);
        assert_eq!(hot_factor(30, 10.0), Some(3.0));
        // There are no pins, or the only pod has all.
        assert_eq!(hot_factor(0, 0.0), None);
        assert_eq!(hot_factor(900, 900.0), None);
    }
}
