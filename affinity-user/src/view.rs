//! The contents of the maps, as objects with names: `affinity get`, `dump` and `explain` print nothing else.
//!
//! A [`Catalog`] is one reading of the small tables. With it, entries of the large tables (sessions, flows) are turned into
//! views one at a time, so a listing of a million rows needs no more memory than a listing of one. Ids become names, monotonic
//! nanoseconds become wall-clock times, masked client addresses become CIDRs. Views borrow from their catalog.
//!
//! The JSON form of a view is stable: fields may be added, but none is renamed or removed within an ABI version.

mod address;
mod backend;
mod catalog;
mod client;
mod clock;
mod counter;
mod device;
mod dump;
mod event;
mod explanation;
mod flow;
mod question;
mod reading;
mod service;
mod session;
mod situation;
mod status;

pub use address::{Client, Endpoint, protocol_name};
pub(crate) use address::{from_mapped, ip, mapped};
pub use backend::{BackendRef, BackendState, BackendView};
pub(crate) use catalog::KnownNamespace;
pub use catalog::{Catalog, Policy};
pub use client::{ClientRef, NETNS, NODE};
pub use clock::{Clock, Moment, short_duration};
pub use counter::CounterView;
pub use device::DeviceView;
pub use dump::{Dump, DumpOptions};
pub use event::EventView;
pub use explanation::{Candidate, ExplainedFrontend, Explanation, Step, explain};
pub use flow::{FlowState, FlowView};
pub use question::{FrontendTables, Question};
pub(crate) use service::policy_text;
pub use service::{Endpoints, FrontendView, LiveSessions, ServiceView};
pub use session::{ServicePins, SessionView, expires_in_s};
pub use situation::Situation;
pub use status::StatusView;

#[cfg(test)]
pub(crate) mod fixture;
