//! The size of the cluster, and its services.

use std::fmt;

use serde::Serialize;

use crate::lab::{FIRST_OF_B, Service};

/// The ports of the measured service, and the pod's: none that the kernel inspects, as it may inspect DNS.
pub(super) const PORTS: [(u16, u16); 2] = [(80, 9000), (7, 9001)];
/// Services, and endpoints of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Size {
    pub(super) services: u16,
    pub(super) endpoints: u16,
}

impl Size {
    /// Each number of services with the first number of endpoints, then the other way round.
    pub(super) fn all_of(services: &[u16], endpoints: &[u16]) -> Vec<Self> {
        let by_services = services.iter().map(|services| Self { services: *services, endpoints: endpoints[0] });
        let by_endpoints = endpoints[1..].iter().map(|endpoints| Self { services: services[0], endpoints: *endpoints });
        by_services.chain(by_endpoints).collect()
    }

    /// All services, with affinity; the last is the measured one. Each has separate endpoints, as far as the node has pod
    /// addresses.
    pub(super) fn cluster(self) -> Vec<Service> {
        (1..=self.services).map(|number| self.service(number)).collect()
    }

    /// The service that is measured.
    pub(super) fn measured(self) -> Service {
        self.service(self.services)
    }

    fn service(self, number: u16) -> Service {
        let [(http, http_target), (echo, echo_target)] = PORTS;
        let service = Service::new(&format!("service-{number}"), number).tcp("http", http, http_target).client_ip();
        let service = if number == self.services { service.udp("echo", echo, echo_target) } else { service };
        service.on(self.endpoints_of(number))
    }

    /// The indices of a service's endpoints: the measured service has the first.
    fn endpoints_of(self, number: u16) -> impl Iterator<Item = usize> {
        let first = u32::from(self.services - number) * u32::from(self.endpoints);
        (first..first + u32::from(self.endpoints)).map(|index| index as usize % FIRST_OF_B)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.services == 1 { "" } else { "s" };
        write!(f, "{} service{plural}, {} endpoints each", self.services, self.endpoints)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_share_their_first() {
        let size = |(services, endpoints)| Size { services, endpoints };
        let expected = [(1, 3), (1_000, 3), (1, 100)].map(size);
        assert_eq!(Size::all_of(&[1, 1_000], &[3, 100]), expected);
    }

    #[test]
    fn the_last_service_is_the_measured_one_and_has_the_first_pods() {
        let size = Size { services: 4, endpoints: 3 };
        let pods: Vec<Vec<usize>> = size.cluster().iter().map(|service| service.ready_pods().collect()).collect();
        assert_eq!(pods, [[9, 10, 11], [6, 7, 8], [3, 4, 5], [0, 1, 2]]);
        assert_eq!(size.measured().name(), size.cluster()[3].name());
    }
}
