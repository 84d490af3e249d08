//! The properties of a network card, and what they mean for XDP: why the driver rejects programs, or what XDP cannot do there.
//!
//! The kernel has texts for that, but returns them only to netlink callers, and links are not created by netlink. So the cause
//! is derived from the error number and from the card's properties.

use std::{ffi::OsStr, fmt, fs, io, path::Path};

use affinity_common::abi::DEVICE_NOTE_SHIFT;

use super::{Device, XdpFeatures, xdp_features};
use crate::sys;

/// `ETH_FLAG_RXVLAN` of linux/ethtool.h: the card removes VLAN tags from frames.
const RX_VLAN: u32 = 1 << 8;
/// `ETH_FLAG_LRO`: the card merges packets.
const LRO: u32 = 1 << 15;

/// The longest packet for which no driver needs more than one buffer.
const MTU_OF_ETHERNET: u32 = 1500;

/// Offloads of a virtio guest that make frames arrive merged or without checksums, and the one that allows switching them off:
/// bits of linux/virtio_net.h.
const GUEST_OFFLOADS: [usize; 7] = [1, 7, 8, 9, 10, 54, 55];
const CTRL_GUEST_OFFLOADS: usize = 2;

/// Information about a device beyond its hooks. Its number is in the map `devices`, see [`DEVICE_NOTE_SHIFT`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Note {
    /// The driver runs no XDP programs.
    NoDriverSupport,
    /// A virtio device: the host merges frames or omits checksums, and that cannot be switched off.
    GuestOffloads,
    /// Packets are too long for the driver.
    Mtu,
    /// The driver needs queues for XDP that are in use.
    Queues,
    /// The card merges packets.
    LargeReceive,
    /// Another XDP program is there.
    OtherProgram,
    /// The card removes VLAN tags before XDP sees the frame.
    StripsTags,
    /// Generic XDP was requested.
    NotGeneric,
    /// XDP runs, but the packets that it sends back are lost.
    AnswersLost,
    /// Another reason: the kernel's error number.
    Refused(u16),
}

impl Note {
    const PLAIN: [Self; 9] = [
        Self::NoDriverSupport,
        Self::GuestOffloads,
        Self::Mtu,
        Self::Queues,
        Self::LargeReceive,
        Self::OtherProgram,
        Self::StripsTags,
        Self::NotGeneric,
        Self::AnswersLost,
    ];
    /// The number of [`Note::Refused`]; the error number follows it.
    const REFUSED: u32 = 255;

    /// As bits of a value of `devices`.
    #[must_use]
    pub fn to_bits(self) -> u32 {
        let number = if let Self::Refused(errno) = self {
            Self::REFUSED | u32::from(errno) << 8
        } else {
            (1..).zip(Self::PLAIN).find(|(_, note)| *note == self).map_or(0, |(number, _)| number)
        };
        number << DEVICE_NOTE_SHIFT
    }

    /// The inverse of [`Note::to_bits`]; none if there is no note, or one of a later version.
    #[must_use]
    pub fn from_bits(bits: u32) -> Option<Self> {
        let bits = bits >> DEVICE_NOTE_SHIFT;
        match bits & 0xff {
            Self::REFUSED => Some(Self::Refused((bits >> 8) as u16)),
            number => Self::PLAIN.get((number as usize).checked_sub(1)?).copied(),
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoDriverSupport => "the driver has no XDP",
            Self::GuestOffloads => {
                "no XDP: the host merges frames (LRO) for this virtio device, and the device cannot turn that off"
            }
            Self::Mtu => "no XDP: the MTU is too large for the driver",
            Self::Queues => "no XDP: the driver has too few free queues: use fewer channels (ethtool -L)",
            Self::LargeReceive => "no XDP: the card merges packets: turn LRO off (ethtool -K DEVICE lro off)",
            Self::OtherProgram => "no XDP: another XDP program is attached",
            Self::StripsTags => "no XDP: the card strips VLAN tags, which its VLAN device needs (ethtool -K DEVICE rxvlan off)",
            Self::NotGeneric => "no XDP: generic XDP cannot detect partial checksums",
            Self::AnswersLost => "packets that XDP sends are lost, because the peer does not poll: turn on its GRO (ethtool -K PEER gro on)",
            Self::Refused(errno) => {
                return write!(f, "no XDP: {}", io::Error::from_raw_os_error(i32::from(*errno)));
            }
        })
    }
}

/// Whether a device removes VLAN tags from frames before XDP sees them. True if it does not report that.
#[must_use]
pub fn strips_tags(device: &str) -> bool {
    sys::card_flags(device).map_or(true, |flags| flags & RX_VLAN != 0)
}

/// The properties of a card.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Card {
    /// The name of the driver.
    driver: Option<String>,
    mtu: u32,
    /// The XDP features that the driver reports; none on kernels before 6.3.
    features: Option<XdpFeatures>,
    merges: bool,
    /// Pairs of queues: in use, and at most.
    queues: Option<(u32, u32)>,
    /// The features of a virtio device, a character each.
    virtio: Option<String>,
}

impl Card {
    /// Queries a card. What it does not report is left out.
    #[must_use]
    pub fn of(device: &Device) -> Self {
        let name = &device.name;
        let (driver, bus) = sys::card_driver(name).unwrap_or_default();
        Self {
            virtio: if driver == "virtio_net" { virtio_features(&bus) } else { None },
            driver: Some(driver).filter(|driver| !driver.is_empty()),
            mtu: device.mtu,
            features: xdp_features().ok().and_then(|all| all.get(&device.index).copied()),
            merges: sys::card_flags(name).is_ok_and(|flags| flags & LRO != 0),
            queues: sys::card_queues(name).ok(),
        }
    }

    /// Why the driver rejected a program with this error number.
    #[must_use]
    pub fn cause(&self, errno: i32) -> Note {
        let native = self.features.map(|features| features.native);
        let takes_long = self.features.is_some_and(|features| features.multi_buffer);
        match errno {
            libc::EBUSY | libc::EEXIST => Note::OtherProgram,
            libc::EOPNOTSUPP if self.has_fixed_offloads() => Note::GuestOffloads,
            libc::EOPNOTSUPP | libc::EINVAL if native == Some(false) => Note::NoDriverSupport,
            libc::EOPNOTSUPP | libc::EINVAL | libc::ERANGE if self.mtu > MTU_OF_ETHERNET && !takes_long => Note::Mtu,
            libc::EOPNOTSUPP | libc::EINVAL if self.merges => Note::LargeReceive,
            libc::EINVAL | libc::ENOMEM if self.queues.is_some_and(|(used, most)| 2 * used > most) => Note::Queues,
            // veth returns this if its other end has more queues.
            libc::ENOSPC => Note::Queues,
            libc::EOPNOTSUPP if native.is_none() => Note::NoDriverSupport,
            _ => Note::Refused(errno as u16),
        }
    }

    fn has_fixed_offloads(&self) -> bool {
        let Some(virtio) = &self.virtio else { return false };
        let has = |bit: usize| virtio.as_bytes().get(bit) == Some(&b'1');
        !has(CTRL_GUEST_OFFLOADS) && GUEST_OFFLOADS.into_iter().any(has)
    }
}

/// The features of the virtio device at this place on its bus. `/sys/class/net` may lack it: it has the devices of the network
/// namespace that it was mounted in.
fn virtio_features(bus: &str) -> Option<String> {
    let devices = fs::read_dir("/sys/bus/virtio/devices").ok()?;
    let mut devices = devices.filter_map(|device| fs::canonicalize(device.ok()?.path()).ok());
    let device = devices.find(|device| device.parent().and_then(Path::file_name) == Some(OsStr::new(bus)))?;
    fs::read_to_string(device.join("features")).ok()
}

impl fmt::Display for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "driver {}, MTU {}", self.driver.as_deref().unwrap_or("unknown"), self.mtu)?;
        match self.queues {
            Some((used, most)) => write!(f, ", {used} of {most} queues"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_round_trip() {
        for note in Note::PLAIN.into_iter().chain([Note::Refused(1), Note::Refused(4095)]) {
            assert_eq!(Note::from_bits(note.to_bits() | 7), Some(note));
            assert_eq!(note.to_bits() & ((1 << DEVICE_NOTE_SHIFT) - 1), 0, "the programs' bits are untouched");
        }
        assert_eq!(Note::from_bits(7), None);
        assert_eq!(Note::from_bits(200 << DEVICE_NOTE_SHIFT), None);
    }

    #[test]
    fn the_cause_of_a_refusal_is_told_from_the_card() {
        let features = |native, multi_buffer| Some(XdpFeatures { native, multi_buffer, sends: false });
        let card =
            |driver: &str, features| Card { driver: Some(driver.to_owned()), mtu: 1500, features, ..Card::default() };
        // Features of a virtio device by bit; with and without control of guest offloads.
        let virtio = |features: &str| Card { virtio: Some(features.to_owned()), ..card("virtio_net", None) };
        let igb = card("igb", features(true, false));
        let ena = Card { queues: Some((8, 8)), ..card("ena", features(true, true)) };
        let cases = [
            (libc::EBUSY, igb.clone(), Note::OtherProgram),
            (libc::EOPNOTSUPP, virtio("11010001"), Note::GuestOffloads),
            (libc::EOPNOTSUPP, virtio("11110001"), Note::NoDriverSupport),
            (libc::EOPNOTSUPP, card("e1000e", features(false, false)), Note::NoDriverSupport),
            (libc::EOPNOTSUPP, card("e1000e", None), Note::NoDriverSupport),
            (libc::EINVAL, Card { mtu: 9000, ..igb.clone() }, Note::Mtu),
            (libc::EOPNOTSUPP, Card { mtu: 9000, ..card("vmxnet3", features(true, false)) }, Note::Mtu),
            (libc::EINVAL, Card { merges: true, ..igb.clone() }, Note::LargeReceive),
            (libc::EINVAL, Card { mtu: 9000, ..ena.clone() }, Note::Queues),
            (libc::ENOMEM, ena, Note::Queues),
            (libc::EINVAL, igb.clone(), Note::Refused(libc::EINVAL as u16)),
            (libc::EPERM, igb, Note::Refused(libc::EPERM as u16)),
        ];
        for (errno, card, expected) in cases {
            assert_eq!(card.cause(errno), expected, "{errno} of {card:?}");
        }
    }

    #[test]
    fn the_loopback_device_tells_what_it_is() {
        assert!(!strips_tags("lo"));
        assert!(sys::card_flags("no-such-device").is_err());
        assert!(sys::card_driver("a-name-that-is-longer-than-any-device-has").is_err());
    }
}
