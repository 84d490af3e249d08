//! A small cluster, in network namespaces:
//!
//! ```text
//!  client namespace            node namespace                      pod namespaces
//!  198.18.0.0/15 on lo         forwards, runs affinity             10.244.0.10 ...
//!  2001:db8:c::/64 on lo                                           fd00:244::10 ...
//!         eth0 ------------------ wire0      pod0 --------------------- eth0
//!                "the wire"                  pod1 --------------------- eth0
//! ```
//!
//! The client's end of the wire has `tx off`, so that packets have complete checksums, as on a real wire; and GRO on, because
//! XDP can send back through a veth only if its peer polls. With [`Options::pods_of_b`] there is a second node with its own
//! pods, behind the first one; its end of the wire between them, `wire1` on both, is like the client's. It gets
//! nothing but routes: it stands for the other nodes with their pods.
//!
//! Clients reach pods, and the service range, by routes through the node. Nothing translates service addresses until a test
//! starts a proxy: `affinity`, or the rules of [`crate::kubeproxy`].
//!
//! ```no_run
//! use affinity_tests::lab::{Family, Lab, Service};
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::with_pods(3)?;
//! let web = Service::new("web", 10).tcp("http", 80, 8080).client_ip().on(0..3);
//! lab.publish(&web)?;
//! let agent = lab.agent(&["--device", "wire0"])?;
//! let name = lab.client().http_get(Family::V4.client(1), web.frontend(Family::V4, "http"), "/")?;
//! println!("{name}; {}", lab.affinity(&["get", "sessions"])?);
//! # agent.terminate()
//! # }
//! ```

mod address;
mod agent;
mod capture;
mod cgroup;
mod client;
mod interrupt;
mod load;
mod netns;
mod network;
mod observe;
mod pod;
mod sctp;
mod server;
mod sweep;
mod terminal;
mod yaml;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use aya::Ebpf;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::patience::patience;

pub use address::{CLIENT_COUNT, FIRST_OF_B, Family, PODS, Protocol};
pub use agent::{Agent, CAPABILITIES, Memory};
pub use capture::{Capture, Direction, read_pcap};
pub use cgroup::{Answer, Cgroup, MemoryLimit, SocketNumber, SocketProcess};
pub use client::{Client, Connection, PATIENCE};
pub use interrupt::Interrupt;
pub use load::{Load, Report};
pub use netns::{Door, Namespace};
pub use network::{ethtool, has_tcx, pass_by_xdp, tag_twice, tc_hooks};
pub use observe::{Backend, Candidate, Explanation, Session};
pub use pod::Pod;
pub use sctp::{Association, SctpServer};
pub use server::{HTTP_PORTS, UDP_PORTS};
pub use sweep::sweep_stale;
pub use terminal::Terminal;
pub use yaml::{EndpointState, Frontend, Hints, Policy, Service, ServicePort, node_of, pod_index, pod_name};

pub(crate) use address::WIRE_CLIENT;
pub(crate) use netns::{feed, output};
use network::{client_namespace, join, node_namespace, steer};

/// The node's end of the wire to the clients.
pub const WIRE: &str = "wire0";
/// Node A's end of the wire to node B, in a lab of two nodes.
pub const UNDERLAY_WIRE: &str = "wire1";
/// The name of node A, in the YAML and for `--node-name`.
pub const NODE_NAME: &str = "node-a";
/// The name of node B.
pub const NODE_B_NAME: &str = "node-b";

/// The parts of a lab.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many pods on node A.
    pub pods: usize,
    /// How many pods on node B; none: there is no node B.
    pub pods_of_b: usize,
    /// Let the node and the pods leave checksums to the device, as real ones do. Off: every frame has a complete checksum
    /// before it can be captured.
    pub checksum_offload: bool,
    /// Let one processor handle all packets of a flow to a pod, as the queues of a network card do. Off: the processor that
    /// sent a packet handles it. Then, once in a hundred thousand connections, the client's first data arrives while the pod's
    /// kernel replaces the request by the connection, finds neither, and is answered with a reset, independent of the proxy.
    pub steering: bool,
    /// Network cards instead of the wires: of node A and the clients and, if there is a second node, between node A and node B.
    /// Names in the namespace of this process; the cards are back there when the lab has gone.
    pub cards: Option<[String; 4]>,
}

impl Default for Options {
    fn default() -> Self {
        Self { pods: 3, pods_of_b: 0, checksum_offload: true, steering: true, cards: None }
    }
}

/// The cluster. Dropping it removes everything: namespaces, their processes, pinned programs, files.
pub struct Lab {
    directories: Directories,
    pods: Vec<Pod>,
    client: Namespace,
    node: Namespace,
    second: Option<Second>,
    /// Keeps the program on the client's end of the wire.
    _receiver: Option<Ebpf>,
    keep: bool,
}

/// The second node, if there is one.
struct Second {
    pods: Vec<Pod>,
    node: Namespace,
    /// Keeps the program on this node's end of the wire.
    _receiver: Option<Ebpf>,
}

impl Lab {
    /// Brings up a lab with this many pods.
    ///
    /// # Errors
    /// When the caller is not root, or a tool is missing: the command that failed, and its output.
    pub fn with_pods(pods: usize) -> Result<Self> {
        Self::up(&Options { pods, ..Options::default() })
    }

    /// Brings up a lab, after removing the remains of dead processes' labs.
    ///
    /// # Errors
    /// As [`Lab::with_pods`].
    pub fn up(options: &Options) -> Result<Self> {
        sweep_stale()?;
        let name = unique_name();
        let directories = Directories::create(&name)?;
        let node = node_namespace(format!("{name}-node"))?;
        let cards = options.cards.as_ref().map(|[node, client, a, b]| ([node, client], [a, b]));
        let client = client_namespace(format!("{name}-client"), &node, cards.map(|(outer, _)| outer))?;
        if !options.checksum_offload {
            ethtool(&node, WIRE, &["tx", "off"])?;
        }
        if options.steering {
            steer(&node, WIRE)?;
        }
        // A veth device sends frames that an XDP program returns (`XDP_TX`), but notifies its peer only if the peer runs a
        // program too (`veth_xdp_flush`).
        let receiver = cards.is_none().then(|| pass_by_xdp(&client, "eth0")).transpose()?;
        let start = |index, node: &Namespace| Pod::start(index, format!("{name}-pod{index}"), node, options.clone());
        let pods = (0..options.pods).map(|index| start(index, &node)).collect::<Result<_>>()?;
        let second = match options.pods_of_b {
            0 => None,
            count => {
                let node_b = node_namespace(format!("{name}-node-b"))?;
                join(&node, &node_b, &client, cards.map(|(_, inner)| inner))?;
                let receiver = cards.is_none().then(|| pass_by_xdp(&node_b, UNDERLAY_WIRE)).transpose()?;
                let indices = FIRST_OF_B..FIRST_OF_B + count;
                let pods = indices.map(|index| start(index, &node_b)).collect::<Result<_>>()?;
                Some(Second { pods, node: node_b, _receiver: receiver })
            }
        };
        Ok(Self { directories, pods, client, node, second, _receiver: receiver, keep: false })
    }

    /// Removes the remains of labs of processes that no longer live.
    ///
    /// # Errors
    /// When what is there cannot be read.
    pub fn sweep_stale() -> Result<()> {
        sweep_stale()
    }

    /// Leaves namespaces, programs and files in place when this value is dropped. The pods' servers still end with this
    /// process, and then the next lab on this machine removes the rest.
    pub fn keep(&mut self) {
        self.keep = true;
        self.node.keep();
        self.client.keep();
        self.pods.iter_mut().for_each(Pod::keep);
        if let Some(second) = &mut self.second {
            second.node.keep();
            second.pods.iter_mut().for_each(Pod::keep);
        }
    }

    /// The external clients.
    pub fn client(&self) -> Client {
        Client::new(self.client.door())
    }

    /// The external clients' namespace.
    pub fn client_namespace(&self) -> &Namespace {
        &self.client
    }

    /// Node A's namespace.
    pub fn node(&self) -> &Namespace {
        &self.node
    }

    /// Clients that are processes of node A; they ask from [`Family::node_addresses`].
    pub fn node_client(&self) -> Client {
        Client::new(self.node.door())
    }

    /// Node B's namespace.
    ///
    /// # Panics
    /// When the lab has one node.
    pub fn node_b(&self) -> &Namespace {
        &self.second.as_ref().expect("a lab of two nodes").node
    }

    /// Clients that are processes of node B; they ask from [`Family::node_b`].
    ///
    /// # Panics
    /// When the lab has one node.
    pub fn node_b_client(&self) -> Client {
        Client::new(self.node_b().door())
    }

    /// The zone of the node with this name, after [`Lab::publish_zone`].
    pub fn zone_of(node: &str) -> String {
        format!("zone-of-{node}")
    }

    /// Publishes the zone of node A.
    ///
    /// # Errors
    /// As [`Lab::publish_text`].
    pub fn publish_zone(&self) -> Result<()> {
        let zone = Self::zone_of(NODE_NAME);
        let yaml = format!(
            "apiVersion: v1\nkind: Node\nmetadata:\n  name: {NODE_NAME}\n  labels: {{topology.kubernetes.io/zone: {zone}}}\n"
        );
        self.publish_text("node.yaml", &yaml)
    }

    /// The pods of node A, dead ones too.
    pub fn pods(&self) -> &[Pod] {
        &self.pods
    }

    /// The pod with this index, on either node.
    ///
    /// # Panics
    /// When the lab has no such pod.
    pub fn pod(&self, index: usize) -> &Pod {
        match &self.second {
            Some(second) if index >= FIRST_OF_B => &second.pods[index - FIRST_OF_B],
            _ => &self.pods[index],
        }
    }

    /// A client inside a pod; it asks from [`Family::pod`] of that index.
    ///
    /// # Panics
    /// When that pod is dead.
    pub fn pod_client(&self, index: usize) -> Client {
        Client::new(self.pod(index).namespace().expect("the pod lives").door())
    }

    /// Makes a pod answer SCTP.
    ///
    /// # Errors
    /// When it is dead, or gets no raw socket.
    pub fn serve_sctp(&self, index: usize) -> Result<SctpServer> {
        let pod = self.pod(index);
        Ok(SctpServer::start(pod.namespace().context("the pod is dead")?.door(), &pod.name(), index)?)
    }

    /// Removes a pod like a power cut: its address no longer answers, and nothing is notified.
    pub fn kill_pod(&mut self, index: usize) -> Result<()> {
        let (pod, node) = self.place(index);
        pod.kill(node)
    }

    /// Brings a dead pod back, under its old name and address.
    pub fn return_pod(&mut self, index: usize) -> Result<()> {
        let (pod, node) = self.place(index);
        pod.revive(node)
    }

    /// A pod, and its node.
    fn place(&mut self, index: usize) -> (&mut Pod, &Namespace) {
        match &mut self.second {
            Some(second) if index >= FIRST_OF_B => (&mut second.pods[index - FIRST_OF_B], &second.node),
            _ => (&mut self.pods[index], &self.node),
        }
    }

    /// The directory with the agent's YAML.
    pub fn source(&self) -> &Path {
        &self.directories.source
    }

    /// The pin directory of this lab's dataplane.
    pub fn pin_dir(&self) -> &Path {
        &self.directories.pins
    }

    /// A directory for other files, removed with the lab.
    pub fn scratch(&self) -> &Path {
        &self.directories.scratch
    }

    /// Writes the service's YAML into [`Lab::source`], replacing an older version in one step.
    pub fn publish(&self, service: &Service) -> Result<()> {
        self.publish_text(&format!("{}.yaml", service.name()), &service.to_yaml())
    }

    /// Writes a file into [`Lab::source`] in one step, as `kubectl` users and configuration tools do: a new
    /// file next to it, then a rename.
    pub fn publish_text(&self, file_name: &str, text: &str) -> Result<()> {
        let beside = self.directories.scratch.join(file_name);
        fs::write(&beside, text)?;
        fs::rename(&beside, self.source().join(file_name)).with_context(|| file_name.to_owned())
    }

    /// Removes a service's YAML.
    pub fn withdraw(&self, service: &Service) -> Result<()> {
        Ok(fs::remove_file(self.source().join(format!("{}.yaml", service.name())))?)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if self.pin_dir().exists() {
            // Best effort: removing the pins, and then the devices, detaches too.
            let _ = self.affinity(&["detach"]);
        }
        self.directories.remove();
    }
}

/// Raises this process's limit of open files to the hard limit: often the soft limit is 1,024.
///
/// # Errors
/// If the kernel refuses.
pub fn raise_file_limit() -> Result<()> {
    let files = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files })?)
}

/// Waits until `holds` is true, checking repeatedly.
///
/// # Errors
/// When it has not become true within `limit`, times the factor of [`mod@crate::patience`].
pub fn eventually(what: &str, limit: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let limit = patience(limit);
    let deadline = Instant::now() + limit;
    while !holds()? {
        if Instant::now() > deadline {
            bail!("not within {limit:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A lab's files. They are outside the namespaces.
struct Directories {
    source: PathBuf,
    scratch: PathBuf,
    pins: PathBuf,
}

impl Directories {
    fn create(name: &str) -> Result<Self> {
        sweep::mount_bpffs()?;
        let files = std::env::temp_dir().join(name);
        let (source, scratch) = (files.join("source"), files.join("scratch"));
        fs::create_dir_all(&source)?;
        fs::create_dir_all(&scratch)?;
        Ok(Self { source, scratch, pins: Path::new(sweep::BPFFS).join(name) })
    }

    fn remove(&self) {
        let _ = fs::remove_dir_all(&self.pins);
        if let Some(files) = self.source.parent() {
            let _ = fs::remove_dir_all(files);
        }
    }
}

/// A name that no other lab on this machine has.
fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{}{}-{number}", sweep::PREFIX, std::process::id())
}
