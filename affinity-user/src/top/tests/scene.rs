//! Compact descriptions of dataplanes for frames.

use std::{collections::BTreeMap, time::Duration};

use affinity_common::abi::{SessionKey, V4, V6};

use crate::{
    store::kernel::PinKey,
    top::{
        clients::{ClientRow, Clients},
        sample::{BackendSample, EventSample, Sample, ServiceSample},
        state::State,
    },
    view::Client,
};

const SECOND: u64 = 1_000_000_000;

/// A sample that tests change.
pub(super) struct Scene {
    pub(super) sample: Sample,
}

impl Scene {
    /// Nothing is published.
    pub(super) fn empty() -> Self {
        Self { sample: Sample { at_ns: 10_000 * SECOND, ..Sample::default() } }
    }

    /// Four services: one has a hot pod, one has no affinity, one has a draining pod.
    pub(super) fn shop() -> Self {
        let mut scene = Self::empty();
        scene.service(1, "shop/front", &[("front-0", 900), ("front-1", 2_400), ("front-2", 870)]);
        scene.service(2, "shop/cart", &[("cart-0", 12), ("cart-1", 9)]);
        scene.service(3, "shop/static", &[("static-0", 0)]);
        scene.service(4, "kube-system/dns", &[("dns-0", 3), ("dns-1", 1)]);
        let services = &mut scene.sample.services;
        services.get_mut(&3).unwrap().affinity = false;
        services.get_mut(&3).unwrap().policy = "no affinity select=random".to_owned();
        services.get_mut(&4).unwrap().group = Some("kube-system/infra".to_owned());
        *services.get_mut(&2).unwrap().backends.values_mut().last().unwrap() = false;
        scene.event(2, 1, "created shop/front 198.18.0.9 -> shop/front-1");
        scene.event(75, 2, "moved shop/cart 2001:db8:c::4 -> shop/cart-1 > shop/cart-0 reason=not-ready");
        scene
    }

    /// This many services with two pods each.
    pub(super) fn many(services: u32) -> Self {
        let mut scene = Self::empty();
        for id in 1..=services {
            scene.service(
                id,
                &format!("team-{}/app-{id:03}", id % 7),
                &[("a", u64::from(id)), ("b", u64::from(id) / 2)],
            );
        }
        scene
    }

    /// A service with these pods and their pins.
    pub(super) fn service(&mut self, id: u32, name: &str, pods: &[(&str, u64)]) {
        let first = id * 100;
        for (index, &(name, pins)) in (first..).zip(pods) {
            let address = format!("10.244.{id}.{}", index - first + 10).parse().ok();
            let (pod, name) = (format!("shop/{name}"), name.to_owned());
            let backend = BackendSample { name, pod, address, generation: 1, pins, counts: [0; 8] };
            self.sample.backends.insert(index, backend);
            self.sample.pods += 1;
        }
        let service = ServiceSample {
            name: name.to_owned(),
            policy: "ClientIP timer=connection timeout=10800s select=random".to_owned(),
            affinity: true,
            frontends: vec![format!("10.96.0.{id}:80/TCP")],
            backends: (first..).zip(pods).map(|(index, _)| (index, true)).collect(),
            ..ServiceSample::default()
        };
        self.sample.services.insert(id, service);
    }

    /// An event that is older than those before.
    pub(super) fn event(&mut self, age_s: u64, service: u32, line: &str) {
        self.sample.events.push(EventSample { age_s, service: Some(service), line: line.to_owned() });
    }

    /// Connections of a service to one of its pods: new clients, returning clients, moved ones, rejected ones.
    pub(super) fn count(&mut self, id: u32, pod: u32, [created, pinned, moved, refused]: [u64; 4]) {
        let count = |counts: &mut [u64; 8]| {
            counts[1] += created;
            counts[2] += pinned;
            counts[4] += moved;
            counts[7] += refused;
        };
        count(&mut self.sample.services.get_mut(&id).unwrap().counts);
        count(&mut self.sample.backends.get_mut(&(id * 100 + pod)).unwrap().counts);
    }

    /// The first state: no rates yet.
    pub(super) fn state(&self) -> State {
        let mut state = State::new(Duration::from_secs(1), true);
        state.set_sample(self.sample.clone());
        state
    }

    /// The state this many seconds later.
    pub(super) fn later(&mut self, state: &mut State, seconds: u64) {
        self.sample.at_ns += seconds * SECOND;
        state.set_sample(self.sample.clone());
    }

    /// Answers the state's query with these clients as the complete result.
    pub(super) fn answer(&self, state: &mut State, rows: Vec<ClientRow>) {
        let matching = rows.len() as u64;
        let query = state.query().expect("a service's screen");
        state.set_clients(&Clients { query, rows, matching, read: matching, complete: true });
    }
}

/// This many clients of both families and of a network; each was idle for a second longer than the one before.
pub(super) fn client_rows(number: u32) -> Vec<ClientRow> {
    let reasons = BTreeMap::from([(0, "created"), (1, "backend-gone"), (2, "operator")]);
    let row = |index: u32| {
        let byte = index as u8;
        let (key, client): (PinKey, Client) = match index % 3 {
            0 | 1 => {
                let address = V4([198, 18, 0, byte]);
                (SessionKey::new(1, address, 32).into(), Client::new(std::net::Ipv4Addr::from(address.0).into(), 32))
            }
            _ => {
                let mut bytes = [0x20, 0x01, 0x0d, 0xb8, 0, 0x0c, 0, 0, 0xfe, 0xed, 0xbe, 0xef, 0, 0, 0, byte];
                bytes[6] = byte;
                let client = Client::new(std::net::Ipv6Addr::from(bytes).into(), 128);
                (SessionKey::new(1, V6(bytes), 128).into(), client)
            }
        };
        ClientRow {
            key,
            client,
            name: None,
            pod: format!("front-{}", index % 3),
            created_ns: (10_000 - 600 - u64::from(index)) * SECOND,
            last_used_ns: (10_000 - u64::from(index)) * SECOND,
            expires_in_s: [Some(10_790), None, Some(0)][index as usize % 3],
            reason: reasons[&(index % 3)],
        }
    };
    (0..number).map(row).collect()
}
