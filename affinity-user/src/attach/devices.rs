//! The network devices of this namespace: a list, and a wake-up when it changes.
//!
//! Whoever is woken reads the whole list again. So a lost message, a rename, or a device that vanished and came back
//! under its old name with a new index needs no case of its own.

use std::{io, time::Duration};

use futures::{StreamExt, TryStreamExt, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection,
    packet_core::NetlinkMessage,
    packet_route::{
        RouteNetlinkMessage,
        link::{LinkAttribute, LinkInfo, LinkLayerType, LinkMessage},
    },
    sys::SocketAddr,
};
use tokio::{task::JoinHandle, time::Instant};

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
        let mut name = None;
        let mut kind = None;
        for attribute in message.attributes {
            #[expect(clippy::wildcard_enum_match_arm, reason = "of many attributes two matter")]
            match attribute {
                LinkAttribute::IfName(is) => name = Some(is),
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
        Some(Self { index: message.header.index, name: name?, kind, framing })
    }
}

/// Lists devices and waits for changes. Needs a tokio runtime.
#[derive(Debug)]
pub struct Devices {
    handle: Handle,
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    connection: JoinHandle<()>,
    /// When the changes seen so far will have settled.
    rest_at: Option<Instant>,
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Devices {
    /// How long to wait for more changes after the first: devices come in crowds.
    const SETTLE: Duration = Duration::from_millis(20);

    /// Of the network namespace that the calling thread is in.
    ///
    /// # Errors
    /// The system's answer where there is no netlink socket to be had.
    pub fn new() -> io::Result<Self> {
        let (connection, handle, messages) = new_multicast_connection(&[MulticastGroup::Link])?;
        Ok(Self { handle, messages, connection: tokio::spawn(connection), rest_at: None })
    }

    /// All devices, by index.
    ///
    /// # Errors
    /// The system's answer.
    pub async fn list(&self) -> io::Result<Vec<Device>> {
        let messages = self.handle.link().get().execute();
        let messages: Vec<_> = messages.try_collect().await.map_err(io::Error::other)?;
        let mut devices: Vec<_> = messages.into_iter().filter_map(Device::from_message).collect();
        devices.sort();
        Ok(devices)
    }

    /// Waits until a device has come, gone or changed, and for a moment of rest after that. Dropped before it is ready,
    /// it loses nothing: the next call goes on waiting for the same rest.
    ///
    /// # Errors
    /// Where the socket has closed.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let message = match self.rest_at {
                None => self.messages.next().await,
                Some(rest_at) => match tokio::time::timeout_at(rest_at, self.messages.next()).await {
                    Ok(message) => message,
                    Err(_) => {
                        self.rest_at = None;
                        return Ok(());
                    }
                },
            };
            if message.is_none() {
                return Err(io::Error::other("the netlink socket has closed"));
            }
            self.rest_at = Some(Instant::now() + Self::SETTLE);
        }
    }
}
