//! Options for the sizes of the maps, shared by the commands that load them and by `affinity check`.

use clap::Args;

use crate::load::Sizes;

/// Sizes that differ from the defaults for this machine.
#[derive(Args, Clone, Copy, PartialEq, Eq, Debug, Default)]
#[command(next_help_heading = "Sizes (defaults follow this machine's memory: see `affinity check`)")]
pub(crate) struct SizeArgs {
    /// Pins of each IP family
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_sessions: Option<u32>,
    /// Flow records of each IP family: two for each connection
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    max_flows: Option<u32>,
    /// Frontends of each IP family: addresses and ports that clients dial
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_frontends: Option<u32>,
    /// Addresses of pods: a pod of both families has two
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_backends: Option<u32>,
    /// Endpoints, once for each port of each service
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_members: Option<u32>,
    /// Slots of all selection tables: one for each ready endpoint; with `consistent` 1,021 for up to 10 endpoints, 16,381
    /// for up to 163, and 65,537 beyond
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_slots: Option<u32>,
}

impl SizeArgs {
    /// The defaults for this machine, with the given options applied.
    pub(crate) fn sizes(&self) -> Sizes {
        let default = Sizes::of_this_machine();
        Sizes {
            sessions: self.max_sessions.unwrap_or(default.sessions),
            flows: self.max_flows.unwrap_or(default.flows),
            frontends: self.max_frontends.unwrap_or(default.frontends),
            members: self.max_members.unwrap_or(default.members),
            slots: self.max_slots.unwrap_or(default.slots),
            ..default
        }
        .with_backends(self.max_backends.unwrap_or(default.backends))
    }
}
