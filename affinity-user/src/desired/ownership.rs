//! Which services are ours, and which are left to another service proxy.

use std::{fmt, str::FromStr};

use super::Options;
use crate::source::api::{Service, label};

/// Our default name.
pub const DEFAULT_PROXY_NAME: &str = "affinity.dev";

/// Which services are ours. Services labelled for another proxy never are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Services {
    /// All: instead of another service proxy.
    #[default]
    All,
    /// Services with `sessionAffinity: ClientIP`, and services labelled for us.
    Affinity,
    /// Services labelled for us.
    Labelled,
}

impl Services {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Affinity, Self::Labelled, Self::All];

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Affinity => "affinity",
            Self::Labelled => "labelled",
        }
    }
}

impl fmt::Display for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that selects no services.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is none of affinity, labelled, all")]
pub struct UnknownServices(String);

impl FromStr for Services {
    type Err = UnknownServices;

    fn from_str(name: &str) -> Result<Self, UnknownServices> {
        Self::ALL.into_iter().find(|services| services.name() == name).ok_or_else(|| UnknownServices(name.to_owned()))
    }
}

/// Whether a service is ours.
pub(super) fn is_ours(service: &Service, options: &Options) -> bool {
    let value = |name| service.metadata.labels.as_ref().and_then(|labels| labels.get(name));
    if value(label::HEADLESS).is_some() {
        return false;
    }
    let affinity = service.spec.as_ref().and_then(|spec| spec.session_affinity.as_deref());
    match (value(label::PROXY_NAME), options.services) {
        (Some(name), _) => *name == options.proxy_name,
        (None, Services::All) => true,
        (None, Services::Affinity) => affinity == Some("ClientIP"),
        (None, Services::Labelled) => false,
    }
}
