//! Clients of every kind in a [`Scene`]: external, in pods, and processes on the node. Each opens connections, and may keep
//! them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, anyhow, ensure};

use crate::lab::{Answer, Connection, Family, Frontend, Lab, Protocol, Service, SocketNumber, SocketProcess};
use crate::proxy::{Proxy, Scene};

/// A test scenario in a lab with its callers.
pub type Story = fn(&Lab, &mut Callers<'_>) -> Result<()>;

/// Runs scenarios in one lab of two nodes, one after another. `process` is the binary `socket_process`.
///
/// # Errors
/// The first error of a scenario, with its name and the agent's output.
pub fn tell(proxy: Proxy, process: &str, stories: impl IntoIterator<Item = (&'static str, Story)>) -> Result<()> {
    let scene = proxy.start(&[])?;
    let mut callers = Callers::new(&scene, process)?;
    stories.into_iter().try_for_each(|(name, story)| {
        story(scene.lab(), &mut callers).with_context(|| format!("{name}\n{}", scene.log()))
    })
}

/// The caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The external client with this number.
    Outside(u32),
    /// The pod with this index.
    Pod(usize),
    /// A process on node A.
    Node,
}

/// The kind of address that it calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// A frontend that is visible to all.
    Of(Frontend),
    /// The node port on the loopback address, which is only for processes on the node.
    Localhost,
}

impl Door {
    /// The address of a service for this kind; None: it has none.
    pub fn address(self, service: &Service, family: Family, protocol: Protocol) -> Option<SocketAddr> {
        let loopback = match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        match self {
            Self::Of(frontend) => service.address(frontend, family, protocol),
            Self::Localhost => {
                let port = service.address(Frontend::NodePort, family, protocol)?.port();
                Some(SocketAddr::new(loopback, port))
            }
        }
    }
}

/// One way to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The caller.
    pub who: Who,
    /// The kind of address.
    pub door: Door,
    /// The protocol.
    pub protocol: Protocol,
    /// The address.
    pub to: SocketAddr,
}

impl Call {
    /// All calls of these kinds over one protocol, in both families, as far as the service has addresses for them.
    pub fn all(service: &Service, ways: &[(Who, Door)], protocol: Protocol) -> Vec<Self> {
        let call = |family, &(who, door): &(Who, Door)| {
            let to = door.address(service, family, protocol)?;
            Some(Self { who, door, protocol, to })
        };
        Family::BOTH.iter().flat_map(|family| ways.iter().filter_map(|way| call(*family, way))).collect()
    }

    /// The family of the address.
    pub fn family(&self) -> Family {
        if self.to.is_ipv4() { Family::V4 } else { Family::V6 }
    }
}

/// A connection that is kept, or a socket for datagrams to one address.
#[derive(Debug)]
pub enum Line {
    /// Of a client that sends packets through the translation.
    Direct(Connection),
    /// Of a process on the node.
    OfNode(SocketNumber),
    /// Datagrams of such a process from an unconnected socket.
    DatagramsOfNode(SocketNumber, SocketAddr),
}

/// All clients of a scene.
pub struct Callers<'a> {
    scene: &'a Scene,
    node: SocketProcess,
}

impl<'a> Callers<'a> {
    /// `program` is the binary `socket_process`.
    ///
    /// # Errors
    /// When the process on the node does not start.
    pub fn new(scene: &'a Scene, program: &str) -> Result<Self> {
        Ok(Self { scene, node: scene.process_on_node(program)? })
    }

    /// The scene.
    pub fn scene(&self) -> &'a Scene {
        self.scene
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// When it is rejected, or there is no answer.
    pub fn open(&mut self, call: &Call) -> Result<Line> {
        let lab = self.scene.lab();
        let line = match (call.who, call.protocol) {
            (Who::Node, Protocol::Udp) => Line::DatagramsOfNode(self.node.bind(call.to)?, call.to),
            (Who::Node, Protocol::Tcp) => {
                let (socket, peer) = self.node.connect(call.protocol, call.to)?;
                let peer = peer.map_err(|error| anyhow!("{call:?}: {error}"))?;
                ensure!(peer == call.to.to_string(), "{call:?} is told of {peer}");
                Line::OfNode(socket)
            }
            (Who::Outside(number), protocol) => {
                let connection = lab.client().connect(protocol, call.family().client(number), call.to);
                Line::Direct(connection.with_context(|| format!("{call:?}"))?)
            }
            (Who::Pod(pod), protocol) => {
                let connection = lab.pod_client(pod).connect(protocol, call.family().pod(pod), call.to);
                Line::Direct(connection.with_context(|| format!("{call:?}"))?)
            }
        };
        Ok(line)
    }

    /// Asks over a connection: returns the answer, or the name of the error.
    ///
    /// # Errors
    /// When the process on the node has ended, or the answer comes from a different address.
    pub fn ask(&mut self, line: &mut Line, path: &str) -> Result<Answer> {
        match line {
            Line::Direct(connection) => Ok(connection.ask(path).map_err(|error| format!("{:?}", error.kind()))),
            Line::OfNode(socket) => self.node.ask(*socket, path),
            Line::DatagramsOfNode(socket, to) => match self.node.ask_to(*socket, *to, path)? {
                Ok(said) => {
                    let (body, sender) = said.rsplit_once(" from ").context("a sender")?;
                    ensure!(sender == to.to_string(), "asked {to}, answered by {sender}");
                    Ok(Ok(body.to_owned()))
                }
                refused => Ok(refused),
            },
        }
    }

    /// Closes a connection.
    ///
    /// # Errors
    /// When the process on the node has ended.
    pub fn close(&mut self, line: Line) -> Result<()> {
        match line {
            Line::Direct(connection) => drop(connection),
            Line::OfNode(socket) | Line::DatagramsOfNode(socket, _) => self.node.close(socket)?,
        }
        Ok(())
    }

    /// The answer on a new connection.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn dial(&mut self, call: &Call, path: &str) -> Result<String> {
        let mut line = self.open(call)?;
        let answer = self.ask(&mut line, path)?.map_err(|error| anyhow!("{call:?}: {error}"))?;
        self.close(line)?;
        Ok(answer)
    }
}
