//! Which devices are attached if none is named, and why: a pure function of links, addresses and routes.
//!
//! Packets for frontends enter a node through devices that lead out of it (external), or through those that lead to its pods
//! and guests (internal). Kinds and places decide, not names, so it does not matter which network plugin created them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use super::devices::{Device, Framing, OtherEnd};

/// Kinds with frames from tunnels: what they carry was translated where it entered the first node, and its replies are
/// translated where they leave it.
const TUNNELS: [&str; 8] = ["vxlan", "geneve", "gretap", "ip6gretap", "erspan", "ip6erspan", "batadv", "bareudp"];
/// Kinds that have addresses, but that no frame enters through.
const INWARD: [&str; 3] = ["dummy", "ifb", "vrf"];

/// What a device leads to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Role {
    /// Out of the node.
    External,
    /// To pods and guests of the node.
    Internal,
}

impl Role {
    /// Its name in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::External => "external",
            Self::Internal => "internal",
        }
    }
}

/// Why a device has its role, or none.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Why {
    /// A default route leaves through it.
    DefaultRoute,
    /// It carries an address of the node.
    Address(IpAddr),
    /// Its other end is in another network namespace: a pod's.
    PodSide,
    /// A bridge with ports that lead to pods and guests.
    Bridge,
    /// A guest's network card.
    Tap,
    /// The loopback device.
    Loopback,
    /// Its frames have no Ethernet header.
    NotEthernet,
    /// A tunnel with Ethernet frames inside.
    Tunnel,
    /// No frame enters through it.
    Inward,
    /// Its other end is in this network namespace, too.
    BothEndsHere,
    /// It has no default route and no address.
    Unused,
}

impl Why {
    const fn role(&self) -> Option<Role> {
        match self {
            Self::DefaultRoute | Self::Address(_) => Some(Role::External),
            Self::PodSide | Self::Bridge | Self::Tap => Some(Role::Internal),
            Self::Loopback | Self::NotEthernet | Self::Tunnel | Self::Inward | Self::BothEndsHere | Self::Unused => {
                None
            }
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DefaultRoute => "has a default route",
            Self::Address(address) => return write!(f, "has the address {address}"),
            Self::PodSide => "its peer is in another network namespace",
            Self::Bridge => "bridge of pods or guests",
            Self::Tap => "tap device of a guest",
            // The route was chosen when the packets were sent, and the stack keeps it: even translated, they would end here.
            // See https://elixir.bootlin.com/linux/v6.18/source/drivers/net/loopback.c#L69
            Self::Loopback => "loopback: its packets are already routed",
            Self::NotEthernet => "its frames have no Ethernet header",
            Self::Tunnel => "tunnel: packets are translated before they enter it",
            Self::Inward => "receives no frames",
            Self::BothEndsHere => "its peer is in this network namespace",
            Self::Unused => "no default route, no address",
        })
    }
}

/// A device's role, and the reason.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// None: it is not attached unless it is named.
    pub role: Option<Role>,
    /// Why.
    pub why: Why,
}

/// The default routes and addresses of devices.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Network {
    /// Indices of the devices that default routes leave through.
    pub default_routes: BTreeSet<u32>,
    /// Addresses of global scope and the lengths of their prefixes, by device.
    pub addresses: BTreeMap<u32, BTreeSet<(IpAddr, u8)>>,
}

impl Network {
    /// The node's addresses of global scope; first those of devices with default routes.
    #[must_use]
    pub fn own_addresses(&self) -> Vec<IpAddr> {
        let leads_out = |(device, _): &(&u32, _)| !self.default_routes.contains(device);
        let mut devices: Vec<_> = self.addresses.iter().collect();
        devices.sort_by_key(leads_out);
        let mut addresses = Vec::new();
        for (address, _) in devices.into_iter().flat_map(|(_, addresses)| addresses) {
            if !addresses.contains(address) {
                addresses.push(*address);
            }
        }
        addresses
    }
}

/// The role of each device, by index.
#[must_use]
pub fn roles(devices: &[Device], network: &Network) -> BTreeMap<u32, Finding> {
    let leads_out: BTreeSet<u32> =
        devices.iter().filter(|device| is_outward(device)).filter_map(|device| device.controller).collect();
    let mut findings = BTreeMap::new();
    for device in devices {
        let why = why(device, network, leads_out.contains(&device.index));
        findings.insert(device.index, Finding { role: why.role(), why });
    }
    leave_out_second_ends(devices, &mut findings);
    findings
}

/// The devices with default routes that cannot be attached: their frames have no link header, like those of WireGuard and other
/// tunnels of IP packets.
#[must_use]
pub fn unserved<'d>(devices: &'d [Device], network: &Network) -> Vec<&'d Device> {
    let is_unserved =
        |device: &&Device| device.framing == Framing::Other && network.default_routes.contains(&device.index);
    devices.iter().filter(is_unserved).collect()
}

/// The warning about such a device, in one line.
#[must_use]
pub fn unserved_text(device: &str) -> String {
    format!(
        "{device}: has a default route, but its frames have no Ethernet header: packets for services that arrive \
         by it are not handled"
    )
}

/// If both ends are in this namespace, one is enough: what enters through it leaves through it as well.
fn leave_out_second_ends(devices: &[Device], findings: &mut BTreeMap<u32, Finding>) {
    for device in devices {
        let OtherEnd::Here(other) = device.other_end else { continue };
        let (Some(this), Some(that)) = (findings.get(&device.index), findings.get(&other)) else { continue };
        let both = is_pair(device) && this.role.is_some() && that.role.is_some();
        let rank = |finding: &Finding| finding.why == Why::DefaultRoute;
        if both && (rank(that), device.index) > (rank(this), other) {
            findings.insert(device.index, Finding { role: None, why: Why::BothEndsHere });
        }
    }
}

fn why(device: &Device, network: &Network, leads_out: bool) -> Why {
    let kind = device.kind.as_deref().unwrap_or_default();
    match device.framing {
        Framing::Loopback => return Why::Loopback,
        Framing::Other => return Why::NotEthernet,
        Framing::Ethernet => {}
    }
    if INWARD.contains(&kind) {
        return Why::Inward;
    }
    if network.default_routes.contains(&device.index) {
        return Why::DefaultRoute;
    }
    if TUNNELS.contains(&kind) {
        return Why::Tunnel;
    }
    if kind == "bridge" && !leads_out {
        return Why::Bridge;
    }
    if let Some(address) = node_address(device, network) {
        return Why::Address(address);
    }
    match (kind, device.other_end) {
        ("veth" | "netkit", OtherEnd::Elsewhere) => Why::PodSide,
        ("veth" | "netkit", OtherEnd::Here(_)) => Why::BothEndsHere,
        ("tun", _) => Why::Tap,
        _ => Why::Unused,
    }
}

fn is_pair(device: &Device) -> bool {
    matches!(device.kind.as_deref(), Some("veth" | "netkit"))
}

/// Whether a bridge with this port leads out of the node.
fn is_outward(device: &Device) -> bool {
    let kind = device.kind.as_deref().unwrap_or_default();
    !is_pair(device) && kind != "tun" && !TUNNELS.contains(&kind) && !INWARD.contains(&kind)
}

/// The first address of a device that is one of the node's. On a pod's device, an address that is alone in its network is the
/// pod's gateway instead, as some network plugins configure it.
fn node_address(device: &Device, network: &Network) -> Option<IpAddr> {
    let mut addresses = network.addresses.get(&device.index)?.iter();
    let is_alone = |&(address, prefix): &(IpAddr, u8)| prefix == if address.is_ipv4() { 32 } else { 128 };
    addresses.find(|address| !is_pair(device) || !is_alone(address)).map(|&(address, _)| address)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: (&str, u8) = ("192.0.2.1", 24);
    const GATEWAY: (&str, u8) = ("10.244.0.1", 32);
    const BRIDGE: (&str, u8) = ("10.244.0.1", 24);

    /// A device, with its addresses and default route.
    struct Case {
        device: Device,
        addresses: Vec<(&'static str, u8)>,
        default_route: bool,
    }

    fn case(index: u32, kind: &str) -> Case {
        let device = Device {
            index,
            name: format!("d{index}"),
            kind: Some(kind.to_owned()).filter(|kind| !kind.is_empty()),
            framing: Framing::Ethernet,
            other_end: OtherEnd::None,
            controller: None,
            mac: None,
            mtu: 1500,
            has_vlans: false,
        };
        Case { device, addresses: Vec::new(), default_route: false }
    }

    impl Case {
        fn address(mut self, address: (&'static str, u8)) -> Self {
            self.addresses.push(address);
            self
        }

        fn default_route(mut self) -> Self {
            self.default_route = true;
            self
        }

        fn port_of(mut self, bridge: u32) -> Self {
            self.device.controller = Some(bridge);
            self
        }

        fn end(mut self, end: OtherEnd) -> Self {
            self.device.other_end = end;
            self
        }

        fn framing(mut self, framing: Framing) -> Self {
            self.device.framing = framing;
            self
        }
    }

    /// The roles of some devices of one node, in their order.
    fn found(cases: impl IntoIterator<Item = Case>) -> Vec<String> {
        let (mut devices, mut network) = (Vec::new(), Network::default());
        for case in cases {
            let index = case.device.index;
            let addresses = case.addresses.iter().map(|(address, prefix)| (address.parse().unwrap(), *prefix));
            network.addresses.entry(index).or_default().extend(addresses);
            network.default_routes.extend(case.default_route.then_some(index));
            devices.push(case.device);
        }
        let name = |role: Option<Role>| role.map_or("-", Role::name);
        roles(&devices, &network).values().map(|finding| format!("{}: {}", name(finding.role), finding.why)).collect()
    }

    fn one(case: Case) -> String {
        found([case]).remove(0)
    }

    #[test]
    fn devices_that_lead_out_of_the_node() {
        assert_eq!(one(case(2, "").default_route()), "external: has a default route");
        assert_eq!(one(case(2, "").address(NODE)), "external: has the address 192.0.2.1");
        assert_eq!(one(case(2, "").address(("2001:db8::1", 128))), "external: has the address 2001:db8::1");
        assert_eq!(one(case(2, "")), "-: no default route, no address");
        for kind in ["bond", "vlan", "macvlan", "team", "openvswitch", "virt_wifi"] {
            assert_eq!(one(case(2, kind).address(NODE)), "external: has the address 192.0.2.1", "{kind}");
        }
        // A node that is itself a container.
        let inner = case(2, "veth").end(OtherEnd::Elsewhere);
        assert_eq!(one(inner.default_route().address(GATEWAY)), "external: has a default route");
        let inner = case(2, "veth").end(OtherEnd::Elsewhere);
        assert_eq!(one(inner.address(GATEWAY).address(NODE)), "external: has the address 192.0.2.1");
        // A network over a tunnel.
        assert_eq!(one(case(2, "vxlan").default_route()), "external: has a default route");
    }

    #[test]
    fn devices_that_lead_to_pods() {
        for kind in ["veth", "netkit"] {
            let pod = || case(9, kind).end(OtherEnd::Elsewhere);
            assert_eq!(one(pod()), "internal: its peer is in another network namespace");
            assert_eq!(one(pod().port_of(3)), "internal: its peer is in another network namespace");
            assert_eq!(one(pod().address(GATEWAY)), "internal: its peer is in another network namespace");
            assert_eq!(one(pod().address(("fd00:244::1", 128))), "internal: its peer is in another network namespace");
        }
        assert_eq!(one(case(3, "bridge").address(BRIDGE)), "internal: bridge of pods or guests");
        assert_eq!(one(case(3, "bridge")), "internal: bridge of pods or guests");
        assert_eq!(one(case(4, "tun")), "internal: tap device of a guest");
    }

    #[test]
    fn a_bridge_is_what_its_ports_are() {
        let bridge = || case(3, "bridge").address(NODE);
        let inside = [
            bridge(),
            case(4, "veth").end(OtherEnd::Elsewhere).port_of(3),
            case(5, "vxlan").port_of(3),
            case(6, "tun").port_of(3),
        ];
        assert_eq!(found(inside)[0], "internal: bridge of pods or guests");
        for kind in ["", "bond", "vlan"] {
            let external = [bridge(), case(4, kind).port_of(3)];
            assert_eq!(
                found(external),
                ["external: has the address 192.0.2.1", "-: no default route, no address"],
                "{kind}"
            );
        }
        // Frames only pass through it.
        assert_eq!(found([case(3, "bridge"), case(4, "").port_of(3)])[0], "-: no default route, no address");
        assert_eq!(one(bridge().default_route()), "external: has a default route");
    }

    #[test]
    fn devices_that_no_packet_for_a_frontend_enters_by() {
        let loopback = case(1, "").framing(Framing::Loopback).address(("192.0.2.9", 32));
        assert!(one(loopback).starts_with("-: loopback: its packets are already routed"));
        for kind in ["wireguard", "ipip", "gre", "sit", "tun", "ppp"] {
            let tunnel = case(7, kind).framing(Framing::Other).address(NODE).default_route();
            assert_eq!(one(tunnel), "-: its frames have no Ethernet header", "{kind}");
        }
        let (tunnel, card) = (case(7, "wireguard").framing(Framing::Other), case(2, ""));
        let mut network = Network { default_routes: BTreeSet::from([2]), ..Network::default() };
        let devices = [card.device, tunnel.device];
        assert!(unserved(&devices, &network).is_empty(), "no default route leaves by it");
        network.default_routes.insert(7);
        assert_eq!(unserved(&devices, &network), [&devices[1]]);
        for kind in TUNNELS {
            assert_eq!(one(case(7, kind).address(NODE)), "-: tunnel: packets are translated before they enter it");
        }
        for kind in INWARD {
            assert_eq!(one(case(7, kind).address(NODE).default_route()), "-: receives no frames", "{kind}");
        }
    }

    #[test]
    fn at_most_one_end_of_a_pair_in_this_namespace_is_used() {
        let (first, second) = (|| case(5, "veth").end(OtherEnd::Here(6)), || case(6, "veth").end(OtherEnd::Here(5)));
        let (both_here, address) = ("-: its peer is in this network namespace", "external: has the address 192.0.2.1");
        assert_eq!(found([first(), second()]), [both_here, both_here]);
        assert_eq!(found([first(), second().address(NODE)]), [both_here, address]);
        assert_eq!(found([first().address(NODE), second().address(NODE)]), [address, both_here]);
        assert_eq!(
            found([first().address(NODE), second().default_route()]),
            [both_here, "external: has a default route"]
        );
        // The device below a VLAN is not its other end.
        let vlan = case(6, "vlan").end(OtherEnd::Here(5)).address(NODE);
        assert_eq!(found([case(5, "").address(NODE), vlan]), [address, address]);
    }
}
