//! The hooks of a device, where programs can be attached.

use std::{fmt, str::FromStr};

use affinity_common::names;
use aya_obj::generated::{
    BPF_F_BEFORE, XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE,
    bpf_attach_type::{BPF_TCX_EGRESS, BPF_TCX_INGRESS, BPF_XDP},
};

/// A place in a device's packet path, and the kind of attachment. Its name is the second half of a pin's name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Hook {
    /// Ingress, in the driver.
    XdpNative,
    /// Ingress, before traffic control. Earlier versions attached there; it is kept so that it can be detached.
    XdpGeneric,
    /// Ingress, by a tcx link.
    TcxIngress,
    /// Ingress, by a filter of the clsact qdisc, if the kernel has no tcx.
    ClsactIngress,
    /// Egress, by a tcx link.
    TcxEgress,
    /// Egress, by a filter of the clsact qdisc.
    ClsactEgress,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::XdpNative, Self::XdpGeneric, Self::TcxIngress, Self::ClsactIngress, Self::TcxEgress, Self::ClsactEgress];

    /// Its name in pins and output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::XdpNative => "xdp-native",
            Self::XdpGeneric => "xdp-generic",
            Self::TcxIngress => "tcx-ingress",
            Self::ClsactIngress => "clsact-ingress",
            Self::TcxEgress => "tcx-egress",
            Self::ClsactEgress => "clsact-egress",
        }
    }

    /// The program for this hook.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::XdpNative | Self::XdpGeneric => names::XDP_FORWARD,
            Self::TcxIngress | Self::ClsactIngress => names::TC_FORWARD,
            Self::TcxEgress | Self::ClsactEgress => names::TC_REVERSE,
        }
    }

    /// Whether packets from clients pass it: the forward translation.
    #[must_use]
    pub const fn is_ingress(self) -> bool {
        !matches!(self, Self::TcxEgress | Self::ClsactEgress)
    }

    /// Whether it is one of the two modes of XDP.
    #[must_use]
    pub const fn is_xdp(self) -> bool {
        matches!(self, Self::XdpNative | Self::XdpGeneric)
    }

    /// The attach type and flags of its link; none for clsact, which has no link.
    ///
    /// tcx programs go first, so that no other program's verdict keeps packets from ours.
    pub(super) const fn link(self) -> Option<(u32, u32)> {
        match self {
            Self::XdpNative => Some((BPF_XDP as u32, XDP_FLAGS_DRV_MODE)),
            Self::XdpGeneric => Some((BPF_XDP as u32, XDP_FLAGS_SKB_MODE)),
            Self::TcxIngress => Some((BPF_TCX_INGRESS as u32, BPF_F_BEFORE)),
            Self::TcxEgress => Some((BPF_TCX_EGRESS as u32, BPF_F_BEFORE)),
            Self::ClsactIngress | Self::ClsactEgress => None,
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Not the name of a hook.
#[derive(Debug, thiserror::Error)]
#[error("no hook is called {0:?}")]
pub struct UnknownHook(String);

impl FromStr for Hook {
    type Err = UnknownHook;

    fn from_str(name: &str) -> Result<Self, UnknownHook> {
        Self::ALL.into_iter().find(|hook| hook.name() == name).ok_or_else(|| UnknownHook(name.to_owned()))
    }
}

/// How to use XDP: `--xdp`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum XdpPolicy {
    /// Native, otherwise TC. TC on devices that lead to pods, where frames have partial checksums.
    #[default]
    Auto,
    /// Only native; but TC if a VLAN is on a device that strips tags.
    Native,
    /// TC, with a warning: generic XDP cannot tell whether a frame's checksum is partial, and TC runs at the same place.
    Generic,
    /// TC.
    Off,
}

impl XdpPolicy {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Native, Self::Generic, Self::Off];

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Off => "off",
        }
    }
}

impl fmt::Display for XdpPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Not the name of a policy.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not one of auto, native, generic, off")]
pub struct UnknownPolicy(String);

impl FromStr for XdpPolicy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for hook in Hook::ALL {
            assert_eq!(hook.name().parse::<Hook>().unwrap(), hook);
        }
        for policy in XdpPolicy::ALL {
            assert_eq!(policy.name().parse::<XdpPolicy>().unwrap(), policy);
        }
        assert!("xdp".parse::<Hook>().is_err());
    }
}
