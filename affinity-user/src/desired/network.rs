//! Networks: an address and a prefix length.

use std::{fmt, net::IpAddr, str::FromStr};

use super::Family;
use crate::source::parse_address;

/// A network, such as `10.0.0.0/8`. The bits after the prefix are zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// Text that is not a network.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no network: expected ADDRESS/LENGTH, such as 10.0.0.0/8 or fd00::/8")]
pub struct NetworkError(String);

impl Network {
    /// The network of an address; `None` if `prefix` is longer than the address.
    #[must_use]
    pub fn of(address: IpAddr, prefix: u8) -> Option<Self> {
        if prefix > length(Family::of(address)) {
            return None;
        }
        let address = match address {
            IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() & !u32::MAX.checked_shr(prefix.into()).unwrap_or(0)).into()),
            IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() & !u128::MAX.checked_shr(prefix.into()).unwrap_or(0)).into()),
        };
        Some(Self { address, prefix })
    }

    /// The network of one address.
    #[must_use]
    pub const fn host(address: IpAddr) -> Self {
        Self { address, prefix: length(Family::of(address)) }
    }

    /// Its first address.
    #[must_use]
    pub const fn address(&self) -> IpAddr {
        self.address
    }

    /// The prefix length.
    #[must_use]
    pub const fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Its family.
    #[must_use]
    pub const fn family(&self) -> Family {
        Family::of(self.address)
    }

    /// Whether it contains an address; never one of the other family.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::of(address, self.prefix).as_ref() == Some(self)
    }
}

const fn length(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    /// As Kubernetes reads them: bits after the prefix may be set, numbers may begin with zeros, and surrounding white space is
    /// ignored.
    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let network = || {
            let (address, prefix) = text.trim().split_once('/')?;
            let is_number = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
            Self::of(parse_address(address)?, is_number.then(|| prefix.parse().ok())??)
        };
        network().ok_or_else(|| NetworkError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Network {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn what_counts_and_what_does_not() {
        for (text, canonical, inside, outside) in [
            ("10.1.2.3/8", "10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
            ("192.0.2.7/32", "192.0.2.7/32", "192.0.2.7", "192.0.2.8"),
            ("1.2.3.4/0", "0.0.0.0/0", "255.255.255.255", "::1"),
            (" fd00:1::5/32 ", "fd00:1::/32", "fd00:1:ffff::", "fd00:2::"),
            ("fd00::/0", "::/0", "fe80::1", "10.0.0.1"),
            ("fd00::1/128", "fd00::1/128", "fd00::1", "fd00::2"),
            ("010.001.0.0/016", "10.1.0.0/16", "10.1.255.1", "10.2.0.0"),
        ] {
            assert_eq!(network(text).to_string(), canonical);
            assert!(network(text).contains(inside.parse().expect("an address")), "{inside} in {text}");
            assert!(!network(text).contains(outside.parse().expect("an address")), "{outside} not in {text}");
        }
        for bad in ["", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/+8", "fd00::/129", "web/8", "10.0.0/8"] {
            assert!(bad.parse::<Network>().is_err(), "{bad:?}");
        }
    }
}
