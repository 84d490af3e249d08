//! Changes of pins.

use std::borrow::Cow;

use affinity_common::abi::{BackendRef, Event, EventKind, Reason};
use serde::Serialize;

use super::{Catalog, ClientRef, Moment, PodRef, address::from_mapped};

/// A change of a pin.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct EventView<'a> {
    /// When it happened.
    pub time: Moment,
    /// The name of an [`EventKind`].
    pub kind: &'static str,
    /// The service with the packet that caused it; null if it concerns all.
    pub service: Option<Cow<'a, str>>,
    /// The client; null if it concerns many.
    pub client: Option<ClientRef<'a>>,
    /// The pod before; null: none.
    pub from: Option<PodRef<'a>>,
    /// The pod after; null: none.
    pub to: Option<PodRef<'a>>,
    /// The name of a [`Reason`].
    pub reason: Option<&'static str>,
    /// Pins dropped because the table was full; null for other kinds.
    pub evicted: Option<u32>,
}

impl<'a> EventView<'a> {
    /// A record of the ring; `None` if a later version introduced its kind.
    #[must_use]
    pub fn new(catalog: &'a Catalog, event: &Event) -> Option<Self> {
        let kind = EventKind::from_byte(event.kind)?;
        let time = catalog.clock.moment(event.time_ns);
        let service = Some(catalog.service_name(event.service)).filter(|_| event.service != 0);
        let reason = Reason::from_byte(event.reason).map(Reason::name);
        if kind == EventKind::Evicted {
            let evicted = Some(event.from.index);
            return Some(Self {
                time,
                kind: kind.name(),
                service,
                client: None,
                from: None,
                to: None,
                reason,
                evicted,
            });
        }
        let pod = |of: BackendRef| (of.generation != 0).then(|| catalog.backend(of));
        Some(Self {
            time,
            kind: kind.name(),
            service,
            client: Some(catalog.client(from_mapped(event.client), event.service)),
            from: pod(event.from),
            to: pod(event.to),
            reason,
            evicted: None,
        })
    }

    /// `kind service client -> from > to (reason)`, without the parts that do not apply.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = self.kind.to_owned();
        if let Some(service) = &self.service {
            line += &format!(" {service}");
        }
        if let Some(client) = self.client {
            line += &format!(" {client}");
        }
        if let Some(evicted) = self.evicted {
            line += &format!(" -> {evicted} pins");
        }
        line += &match (&self.from, &self.to) {
            (Some(from), Some(to)) => format!(" -> {} > {}", from.full_name(), to.full_name()),
            (Some(from), None) => format!(" -> {} > (none)", from.full_name()),
            (None, Some(to)) => format!(" -> {}", to.full_name()),
            (None, None) => String::new(),
        };
        if let Some(reason) = self.reason.filter(|&reason| reason != self.kind) {
            line += &format!(" reason={reason}");
        }
        line
    }
}
