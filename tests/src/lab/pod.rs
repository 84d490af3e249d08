//! A pod: a namespace that is connected to the node by a veth with host routes, as with common network plugins, and its
//! servers.

use anyhow::{Result, ensure};

use super::Options;
use super::address::{Family, POD_ROUTER};
use super::netns::Namespace;
use super::network::{ethtool, steer};
use super::server::Server;
use super::yaml::pod_name;

/// A pod, alive or dead.
pub struct Pod {
    index: usize,
    namespace_name: String,
    options: Options,
    life: Option<Life>,
}

/// The parts of a living pod. The sockets close before the namespace goes.
struct Life {
    server: Server,
    namespace: Namespace,
}

impl Pod {
    /// Creates the pod's namespace, connects it to the node and starts its servers.
    pub(super) fn start(index: usize, namespace_name: String, node: &Namespace, options: Options) -> Result<Self> {
        let mut pod = Self { index, namespace_name, options, life: None };
        pod.revive(node)?;
        Ok(pod)
    }

    /// The pod's name: its servers answer with it.
    pub fn name(&self) -> String {
        pod_name(self.index)
    }

    /// The node's end of the pod's veth, on the pod's node.
    pub fn device(&self) -> String {
        format!("pod{}", self.index)
    }

    /// Its namespace, if it is alive.
    pub fn namespace(&self) -> Option<&Namespace> {
        self.life.as_ref().map(|life| &life.namespace)
    }

    /// Tells its servers to end, as a kubelet does with SIGTERM: they continue to answer, and each answer over TCP announces
    /// that it is the last on its connection.
    pub fn drain(&self) {
        if let Some(life) = &self.life {
            life.server.drain();
        }
    }

    /// How many TCP connections its servers have.
    pub fn connections(&self) -> usize {
        self.life.as_ref().map_or(0, |life| life.server.connections())
    }

    /// The device goes first, so that the closing sockets send no FIN or RST.
    pub(super) fn kill(&mut self, node: &Namespace) -> Result<()> {
        ensure!(self.life.is_some(), "{} is dead already", self.name());
        node.ip(&format!("link del {}", self.device()))?;
        self.life = None;
        Ok(())
    }

    pub(super) fn revive(&mut self, node: &Namespace) -> Result<()> {
        ensure!(self.life.is_none(), "{} lives", self.name());
        let namespace = Namespace::create(self.namespace_name.clone())?;
        namespace.sysctl(&[("ipv6/conf/default/accept_dad", "0"), ("core/somaxconn", "4096")])?;
        let device = self.device();
        let mut on_node = format!("link add {device} type veth peer name eth0 netns {}\n", namespace.name());
        on_node += &format!("addr add {}/32 dev {device} scope link\n", POD_ROUTER[0]);
        on_node += &format!("addr add {}/64 dev {device}\nlink set {device} up\n", POD_ROUTER[1]);
        let mut on_pod = "link set lo up\nlink set eth0 up\n".to_owned();
        for family in Family::BOTH {
            let address = family.pod(self.index);
            on_node += &format!("route add {address} dev {device}\n");
            on_pod += &format!("addr add {address} dev eth0\n");
        }
        on_pod += &format!("route add {} dev eth0 scope link\n", POD_ROUTER[0]);
        for router in POD_ROUTER {
            on_pod += &format!("route add default via {router} dev eth0\n");
        }
        node.ip(&on_node)?;
        namespace.ip(&on_pod)?;
        if !self.options.checksum_offload {
            ethtool(node, &device, &["tx", "off"])?;
            ethtool(&namespace, "eth0", &["tx", "off"])?;
        }
        if self.options.steering {
            // Redirects take packets from the node's device directly into a pod.
            steer(node, &device)?;
            steer(&namespace, "eth0")?;
        }
        let server = Server::start(namespace.door(), &self.name())?;
        self.life = Some(Life { server, namespace });
        Ok(())
    }

    pub(super) fn keep(&mut self) {
        if let Some(life) = &mut self.life {
            life.namespace.keep();
        }
    }
}
