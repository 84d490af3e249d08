//! The ports that Linux gives to the node's own connections, and which of them affinity uses.
//!
//! Linux takes the source port of a connection, and the port of a socket that is not bound to one, from
//! `net.ipv4.ip_local_port_range`, but never a port in `net.ipv4.ip_local_reserved_ports`. Both apply to IPv6 too, and belong
//! to the network namespace: <https://docs.kernel.org/networking/ip-sysctl.html>.

use std::{
    collections::BTreeSet,
    fmt,
    fs::{self, File},
    io::{self, Read},
    net::IpAddr,
    ops::RangeInclusive,
    str::FromStr,
};

use crate::desired::MASQUERADE_PORTS;

const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// Longer than the text of the longest list of ports: every second port.
const LONGEST_LIST: usize = 256 * 1024;

/// The default node port range of Kubernetes (`--service-node-port-range` of its API server).
const DEFAULT_NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;

/// How many ranges of a list are shown in a line.
const RANGES_SHOWN: usize = 8;

/// Ports, read and written as Linux does: `80,8000-8080`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Ports(BTreeSet<u16>);

impl Ports {
    /// The fewest ranges that cover these ports.
    fn ranges(&self) -> Vec<RangeInclusive<u16>> {
        let mut ranges: Vec<RangeInclusive<u16>> = Vec::new();
        for port in &self.0 {
            match ranges.last_mut() {
                Some(last) if last.end() + 1 == *port => *last = *last.start()..=*port,
                _ => ranges.push(*port..=*port),
            }
        }
        ranges
    }

    /// The first ranges, for a readable line.
    fn short(&self) -> String {
        let ranges = self.ranges();
        let more = ranges.len().saturating_sub(RANGES_SHOWN);
        let shown = text_of(&ranges[..ranges.len() - more]);
        if more == 0 { shown } else { format!("{shown} and {more} more ranges") }
    }
}

fn text_of(ranges: &[RangeInclusive<u16>]) -> String {
    let text = |range: &RangeInclusive<u16>| match (range.start(), range.end()) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    };
    ranges.iter().map(text).collect::<Vec<_>>().join(",")
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text_of(&self.ranges()))
    }
}

impl FromStr for Ports {
    type Err = io::Error;

    fn from_str(text: &str) -> Result<Self, io::Error> {
        let mut ports = BTreeSet::new();
        for range in text.trim().split(',').filter(|range| !range.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            ports.extend(port(first)?..=port(last)?);
        }
        Ok(Self(ports))
    }
}

fn port(text: &str) -> Result<u16, io::Error> {
    text.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is not a port")))
}

/// The ports of the node's own addresses that affinity uses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct UsedPorts {
    /// The ports of frontends at the node's addresses.
    node_ports: Ports,
    /// The ports for masqueraded connections; none if nothing is masqueraded.
    masquerade: Option<RangeInclusive<u16>>,
}

impl Default for UsedPorts {
    /// The ports of a node on which no dataplane runs yet.
    fn default() -> Self {
        Self { node_ports: Ports(DEFAULT_NODE_PORTS.collect()), masquerade: Some(MASQUERADE_PORTS) }
    }
}

impl UsedPorts {
    /// The ports of those frontends that are at addresses of the node.
    pub(crate) fn new(
        frontends: impl Iterator<Item = (IpAddr, u16)>,
        node_addresses: &BTreeSet<IpAddr>,
        masquerade: Option<RangeInclusive<u16>>,
    ) -> Self {
        let at_node = frontends.filter(|(ip, _)| node_addresses.contains(ip));
        Self { node_ports: Ports(at_node.map(|(_, port)| port).collect()), masquerade }
    }
}

/// The ports that Linux gives to connections of this network namespace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct LocalPorts {
    range: RangeInclusive<u16>,
    reserved: Ports,
}

/// Ports that affinity uses and that Linux may give to other connections.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Overlap {
    node_ports: Ports,
    masquerade: Ports,
}

impl Overlap {
    /// All of them.
    pub(crate) fn ports(&self) -> Ports {
        Ports(&self.node_ports.0 | &self.masquerade.0)
    }
}

impl LocalPorts {
    /// The ports of this process's network namespace.
    ///
    /// # Errors
    /// The system's error.
    pub(crate) fn read() -> io::Result<Self> {
        let named = |path: &str, error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"));
        let range = fs::read_to_string(RANGE).map_err(|error| named(RANGE, error))?;
        let reserved = read_list().map_err(|error| named(RESERVED, error))?;
        Self::parse(&range, &reserved)
    }

    pub(crate) fn parse(range: &str, reserved: &str) -> io::Result<Self> {
        let mut ends = range.split_whitespace().map(port);
        let (Some(first), Some(last)) = (ends.next(), ends.next()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{range:?} is not a range of ports")));
        };
        Ok(Self { range: first?..=last?, reserved: reserved.parse()? })
    }

    /// Which ports of `used` Linux may give away; none if there are none.
    pub(crate) fn overlap(&self, used: &UsedPorts) -> Option<Overlap> {
        let given = |port: &u16| self.range.contains(port) && !self.reserved.0.contains(port);
        let overlap = Overlap {
            node_ports: Ports(used.node_ports.0.iter().copied().filter(given).collect()),
            masquerade: Ports(used.masquerade.clone().into_iter().flatten().filter(given).collect()),
        };
        (overlap != Overlap { node_ports: Ports::default(), masquerade: Ports::default() }).then_some(overlap)
    }

    /// The same with these ports reserved.
    fn with(&self, overlap: &Overlap) -> Self {
        Self { range: self.range.clone(), reserved: Ports(&self.reserved.0 | &overlap.ports().0) }
    }

    /// Whether at least half of the range is left to the node's own connections once these ports are reserved.
    pub(crate) fn can_spare(&self, overlap: &Overlap) -> bool {
        let reserved = self.with(overlap).reserved.0.range(self.range.clone()).count();
        2 * reserved <= self.range.len()
    }

    /// Reserves these ports, in addition to those that are reserved already.
    ///
    /// # Errors
    /// The system's error.
    pub(crate) fn reserve(&self, overlap: &Overlap) -> io::Result<()> {
        fs::write(RESERVED, self.with(overlap).reserved.to_string())
    }

    /// What overlaps, in words.
    pub(crate) fn describe(&self, overlap: &Overlap) -> String {
        let (first, last) = (self.range.start(), self.range.end());
        let part = |ports: &Ports, what| (!ports.0.is_empty()).then(|| format!("{what} {}", ports.short()));
        let parts = [part(&overlap.node_ports, "node ports"), part(&overlap.masquerade, "masquerade ports")];
        let parts = parts.into_iter().flatten().collect::<Vec<_>>().join(" and ");
        format!(
            "Linux may assign ports of affinity to the node's own connections: {parts} are in \
             net.ipv4.ip_local_port_range ({first}-{last}) and not reserved"
        )
    }

    /// The command that reserves them too; a sentence if the command would be too long.
    pub(crate) fn command(&self, overlap: &Overlap) -> String {
        let reserved = self.with(overlap).reserved;
        if reserved.ranges().len() > RANGES_SHOWN {
            return "add them to net.ipv4.ip_local_reserved_ports".to_owned();
        }
        format!("run `sysctl -w net.ipv4.ip_local_reserved_ports={reserved}`")
    }
}

impl fmt::Display for LocalPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.range.start(), self.range.end())?;
        if self.reserved.0.is_empty() { Ok(()) } else { write!(f, " without {}", self.reserved.short()) }
    }
}

/// Reads the list of reserved ports by one read: the kernel returns nothing to a second one, and the first one returns only
/// what fits, see `proc_do_large_bitmap` in <https://elixir.bootlin.com/linux/v6.12/source/kernel/sysctl.c>.
/// [`fs::read_to_string`] begins with a short read.
fn read_list() -> io::Result<String> {
    let mut text = vec![0; LONGEST_LIST];
    let length = File::open(RESERVED)?.read(&mut text)?;
    text.truncate(length);
    String::from_utf8(text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn local(range: &str, reserved: &str) -> LocalPorts {
        LocalPorts::parse(range, reserved).expect("ports")
    }

    fn used(node_ports: &str, masquerade: RangeInclusive<u16>) -> UsedPorts {
        UsedPorts { node_ports: node_ports.parse().expect("ports"), masquerade: Some(masquerade) }
    }

    #[test]
    fn linuxs_defaults_overlap_with_nothing() {
        let local = local("32768\t60999\n", "\n");
        assert_eq!(local.overlap(&UsedPorts::default()), None);
        assert_eq!(local.to_string(), "32768-60999");
        assert_eq!(
            super::LocalPorts::parse("32768", "").map_err(|error| error.kind()),
            Err(io::ErrorKind::InvalidData)
        );
        for bad in ["a", "1-", "-1", "65536", "1-2-3"] {
            assert!(bad.parse::<Ports>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_overlaps_is_said_with_the_command_that_reserves_it() {
        let local = local("20000 60999", "8080,30443");
        let overlap = local.overlap(&used("443,30080,30443", 1024..=20_015)).expect("an overlap");
        insta::assert_snapshot!(local.describe(&overlap), @"Linux may assign ports of affinity to the node's own connections: node ports 30080 and masquerade ports 20000-20015 are in net.ipv4.ip_local_port_range (20000-60999) and not reserved");
        insta::assert_snapshot!(local.command(&overlap), @"run `sysctl -w net.ipv4.ip_local_reserved_ports=8080,20000-20015,30080,30443`");
        assert_eq!(local.with(&overlap).to_string(), "20000-60999 without 8080,20000-20015,30080,30443");
        assert_eq!(local.with(&overlap).overlap(&used("443,30080,30443", 1024..=20_015)), None);
    }

    #[test]
    fn a_long_list_is_cut_in_lines_for_people() {
        let every_second: Vec<_> = (40_000..40_020).step_by(2).map(|port| port.to_string()).collect();
        let local = local("32768 60999", "");
        let overlap = local.overlap(&used(&every_second.join(","), 1024..=29_999)).expect("an overlap");
        assert!(local.describe(&overlap).contains("40012,40014 and 2 more ranges"), "{}", local.describe(&overlap));
        assert_eq!(local.command(&overlap), "add them to net.ipv4.ip_local_reserved_ports");
    }

    #[test]
    fn reserving_leaves_half_of_the_range() {
        let can_spare = |range: &str, reserved: &str, masquerade| {
            let local = local(range, reserved);
            local.can_spare(&local.overlap(&used("", masquerade)).expect("an overlap"))
        };
        assert!(can_spare("1024 65535", "", MASQUERADE_PORTS));
        assert!(can_spare("30080 30081", "", 30_080..=30_080));
        assert!(can_spare("30080 30083", "8080,30083", 30_080..=30_080), "what is outside does not count");
        assert!(!can_spare("30080 30083", "30082-30083", 30_080..=30_080));
        assert!(!can_spare("1024 29999", "", MASQUERADE_PORTS));
    }

    /// Few ports, so that ranges overlap; the last port is one of them.
    fn range() -> impl Strategy<Value = RangeInclusive<u16>> {
        let port = 65_400..=u16::MAX;
        (port.clone(), port).prop_map(|(one, other)| one.min(other)..=one.max(other))
    }

    fn ports() -> impl Strategy<Value = Ports> {
        let short = (range(), 0..5u16).prop_map(|(range, more)| *range.start()..=range.start().saturating_add(more));
        proptest::collection::vec(short, 0..20).prop_map(|ranges| Ports(ranges.into_iter().flatten().collect()))
    }

    proptest! {
        /// Whatever is reserved stays reserved, and afterwards Linux gives away none of the used ports.
        #[test]
        fn reserving_keeps_what_was_there_and_covers_what_was_asked(reserved in ports(), node_ports in ports(),
                range in range(), masquerade in range()) {
            prop_assert_eq!(&reserved.to_string().parse::<Ports>().expect("ports"), &reserved);
            let local = LocalPorts { range, reserved };
            let used = UsedPorts { node_ports, masquerade: Some(masquerade.clone()) };
            let Some(overlap) = local.overlap(&used) else { return Ok(()) };
            let after = local.with(&overlap);
            prop_assert!(after.reserved.0.is_superset(&local.reserved.0));
            prop_assert_eq!(after.overlap(&used), None);
            for port in &after.reserved.0 - &local.reserved.0 {
                prop_assert!(local.range.contains(&port), "{port} is not given away");
                prop_assert!(used.node_ports.0.contains(&port) || masquerade.contains(&port), "{port} is not used");
            }
            prop_assert_eq!(after.reserved.to_string().parse::<Ports>().expect("ports"), after.reserved);
        }
    }
}
