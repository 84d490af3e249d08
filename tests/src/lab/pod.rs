//! A pod: a namespace joined to the node by a veth with host routes, as common network plugins do it, and the
//! servers in it.

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

/// What a living pod has. The sockets close before the namespace goes.
struct Life {
    server: Server,
    namespace: Namespace,
}

impl Pod {
    /// Makes the pod's namespace, joins it to the node and starts its servers.
    pub(super) fn start(index: usize, namespace_name: String, node: &Namespace, options: Options) -> Result<Self> {
        let mut pod = Self { index, namespace_name, options, life: None };
        pod.revive(node)?;
        Ok(pod)
    }

    /// The pod's name: what its servers answer.
    pub fn name(&self) -> String {
        pod_name(self.index)
    }

    /// The node's end of the pod's veth, on whichever node that is.
    pub fn device(&self) -> String {
        format!("pod{}", self.index)
    }

    /// Where it lives, if it does.
    pub fn namespace(&self) -> Option<&Namespace> {
        self.life.as_ref().map(|life| &life.namespace)
    }

    /// Tells its servers to end, as a kubelet does by SIGTERM: they go on answering, and each answer over TCP says that it is
    /// the last on its connection.
    pub fn drain(&self) {
        if let Some(life) = &self.life {
            life.server.drain();
        }
    }

    /// How many TCP connections its servers have.
    pub fn connections(&self) -> usize {
        self.life.as_ref().map_or(0, |life| life.server.connections())
    }

    /// The device goes first, so that no goodbye of the closing sockets gets out.
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
            // Redirects take packets from the node's device straight into a pod.
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
