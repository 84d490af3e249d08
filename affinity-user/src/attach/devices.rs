//! The network devices of this namespace: a list, and a wake-up when it changes.
//!
//! A notification makes the agent read the whole list again. So a lost message, a rename, or a device that vanished and came back
//! under its old name with a new index needs no case of its own.

use std::{collections::BTreeSet, io, net::IpAddr, time::Duration};

use futures::{StreamExt, TryStreamExt, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage, AddressScope},
        link::{LinkAttribute, LinkExtentMask, LinkInfo, LinkLayerType, LinkMessage},
        route::{RouteAttribute, RouteMessage, RouteType},
    },
    sys::SocketAddr,
};
use tokio::{task::JoinHandle, time::Instant};

use super::discover::Network;

/// A network device.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Device {
    /// Its index: unique in the namespace, and not given to another device later.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// The kind of a virtual device: `veth`, `bridge`, ...; none for hardware.
    pub kind: Option<String>,
    /// What its frames begin with.
    pub framing: Framing,
    /// The other end of a pair, or the device that it is on.
    pub other_end: OtherEnd,
    /// The bridge or bond that it is a port of, by index.
    pub controller: Option<u32>,
    /// Its MAC address, if it has one.
    pub mac: Option<[u8; 6]>,
    /// The longest packet that it sends, in bytes.
    pub mtu: u32,
    /// Whether a VLAN device of this namespace is on it.
    pub has_vlans: bool,
}

/// Where the other end of a pair is, or the device that another one is on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum OtherEnd {
    /// There is none.
    None,
    /// In this network namespace, with this index.
    Here(u32),
    /// In another network namespace.
    Elsewhere,
}

/// What the frames of a device begin with.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Framing {
    /// An Ethernet header.
    Ethernet,
    /// An Ethernet header of zeros: the loopback device.
    Loopback,
    /// Anything else: tunnels of IP packets, for example.
    Other,
}

impl Device {
    fn from_message(message: LinkMessage) -> Option<Self> {
        let (mut name, mut kind, mut controller) = (None, None, None);
        let (mut link, mut is_elsewhere) = (None, false);
        let (mut mac, mut mtu) = (None, 0);
        for attribute in message.attributes {
            #[expect(clippy::wildcard_enum_match_arm, reason = "of many attributes a few matter")]
            match attribute {
                LinkAttribute::IfName(is) => name = Some(is),
                LinkAttribute::Controller(index) => controller = Some(index),
                LinkAttribute::Address(address) => mac = address.try_into().ok(),
                LinkAttribute::Mtu(bytes) => mtu = bytes,
                LinkAttribute::Link(index) => link = Some(index),
                LinkAttribute::LinkNetNsId(_) => is_elsewhere = true,
                LinkAttribute::LinkInfo(infos) => {
                    kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        #[expect(clippy::wildcard_enum_match_arm, reason = "of many layers two have an Ethernet header")]
        let framing = match message.header.link_layer_type {
            LinkLayerType::Ether => Framing::Ethernet,
            LinkLayerType::Loopback => Framing::Loopback,
            _ => Framing::Other,
        };
        let other_end = match link {
            _ if is_elsewhere => OtherEnd::Elsewhere,
            Some(index) if index != message.header.index && index != 0 => OtherEnd::Here(index),
            _ => OtherEnd::None,
        };
        let index = message.header.index;
        Some(Self { index, name: name?, kind, framing, other_end, controller, mac, mtu, has_vlans: false })
    }
}

/// Lists devices and waits for changes. Needs a tokio runtime.
#[derive(Debug)]
pub struct Devices {
    handle: Handle,
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    connection: JoinHandle<()>,
    /// The changes that are not reported yet.
    debounce: Option<Debounce>,
    /// How many devices the last list had.
    number: usize,
}

/// Changes come in bursts, and each burst is reported once: when it began, and when its last change came.
#[derive(Clone, Copy, Debug)]
struct Debounce {
    began: Instant,
    last: Instant,
}

impl Debounce {
    /// How long to wait for more changes after each: listing many devices costs more, so it is done less often.
    fn rest(devices: usize) -> Duration {
        Duration::from_millis(20) + Duration::from_micros(100) * u32::try_from(devices).unwrap_or(u32::MAX)
    }

    /// When to report the burst, even if it does not end.
    fn is_over_at(self, devices: usize) -> Instant {
        let rest = Self::rest(devices);
        (self.last + rest).min(self.began + rest * 10)
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Devices {
    /// Devices of the network namespace that the calling thread is in.
    ///
    /// # Errors
    /// The system's error if no netlink socket can be opened.
    pub fn new() -> io::Result<Self> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, handle, messages) = new_multicast_connection(&groups)?;
        Ok(Self { handle, messages, connection: tokio::spawn(connection), debounce: None, number: 0 })
    }

    /// All devices, by index.
    ///
    /// # Errors
    /// The system's error.
    pub async fn list(&mut self) -> io::Result<Vec<Device>> {
        let request = self.handle.link().get();
        let request = request.set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats]);
        let messages: Vec<_> = request.execute().try_collect().await.map_err(io::Error::other)?;
        let mut devices: Vec<_> = messages.into_iter().filter_map(Device::from_message).collect();
        mark_below_vlans(&mut devices);
        devices.sort();
        self.number = devices.len();
        Ok(devices)
    }

    /// The addresses and default routes of the devices.
    ///
    /// # Errors
    /// The system's error.
    pub async fn network(&self) -> io::Result<Network> {
        let mut network = Network::default();
        let mut addresses = self.handle.address().get().execute();
        while let Some(message) = addresses.try_next().await.map_err(io::Error::other)? {
            if let Some(address) = global_address(&message) {
                let device = network.addresses.entry(message.header.index).or_default();
                device.insert((address, message.header.prefix_len));
            }
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            let mut routes = self.handle.route().get(request).execute();
            while let Some(message) = routes.try_next().await.map_err(io::Error::other)? {
                if is_default(&message) {
                    network.default_routes.extend(ways_out(&message));
                }
            }
        }
        Ok(network)
    }

    /// Waits until a device, or the result of [`Devices::network`], may have changed, and then until changes pause, but not for
    /// long. Dropping the future loses nothing: the next call continues the same wait.
    ///
    /// # Errors
    /// If the socket has closed.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let message = match self.debounce {
                None => self.messages.next().await,
                Some(debounce) => {
                    match tokio::time::timeout_at(debounce.is_over_at(self.number), self.messages.next()).await {
                        Ok(message) => message,
                        Err(_) => {
                            self.debounce = None;
                            return Ok(());
                        }
                    }
                }
            };
            let Some((message, _)) = message else { return Err(io::Error::other("the netlink socket has closed")) };
            if matters(&message) {
                let now = Instant::now();
                let began = self.debounce.map_or(now, |debounce| debounce.began);
                self.debounce = Some(Debounce { began, last: now });
            }
        }
    }
}

/// Marks the devices that VLAN devices are on.
fn mark_below_vlans(devices: &mut [Device]) {
    let below = |device: &Device| {
        let OtherEnd::Here(index) = device.other_end else { return None };
        (device.kind.as_deref() == Some("vlan")).then_some(index)
    };
    let below: BTreeSet<u32> = devices.iter().filter_map(below).collect();
    for device in devices {
        device.has_vlans = below.contains(&device.index);
    }
}

/// All devices, and their addresses and default routes, for callers without a runtime.
///
/// # Errors
/// The system's error.
pub fn survey() -> io::Result<(Vec<Device>, Network)> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let mut devices = Devices::new()?;
        Ok((devices.list().await?, devices.network().await?))
    })
}

/// Whether a message may report a relevant change. Every pod adds routes and link-local addresses, which are not relevant.
fn matters(message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    #[expect(clippy::wildcard_enum_match_arm, reason = "what is not known to be of no interest may be of some")]
    match &message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route)) => {
            is_default(route)
        }
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address),
        ) => global_address(address).is_some(),
        _ => true,
    }
}

/// The address in a message, if others may reach the device by it.
fn global_address(message: &AddressMessage) -> Option<IpAddr> {
    if message.header.scope != AddressScope::Universe {
        return None;
    }
    let of = |local: bool| {
        #[expect(clippy::wildcard_enum_match_arm, reason = "of many attributes two are addresses")]
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) if local => Some(*address),
            AddressAttribute::Address(address) if !local => Some(*address),
            _ => None,
        })
    };
    // On point-to-point links, `Local` is the own address and `Address` the peer's. Otherwise IPv6 has only `Address`.
    of(true).or_else(|| of(false))
}

fn is_default(route: &RouteMessage) -> bool {
    route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast
}

/// The devices that a route leaves through.
fn ways_out(route: &RouteMessage) -> Vec<u32> {
    #[expect(clippy::wildcard_enum_match_arm, reason = "of many attributes two name devices")]
    let devices = route.attributes.iter().flat_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    });
    devices.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_below_a_vlan_is_marked() {
        let device = |index, kind: &str, other_end| Device {
            index,
            name: format!("d{index}"),
            kind: Some(kind.to_owned()).filter(|kind| !kind.is_empty()),
            framing: Framing::Ethernet,
            other_end,
            controller: None,
            mac: None,
            mtu: 1500,
            has_vlans: false,
        };
        let (none, on_first) = (OtherEnd::None, OtherEnd::Here(1));
        let mut devices = [
            device(1, "", none),
            device(2, "", none),
            device(3, "vlan", on_first),
            device(4, "macvlan", OtherEnd::Here(2)),
            device(5, "vlan", OtherEnd::Elsewhere),
        ];
        mark_below_vlans(&mut devices);
        assert_eq!(devices.map(|device| device.has_vlans), [true, false, false, false, false]);
    }
}
