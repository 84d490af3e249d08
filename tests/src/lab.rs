//! A small cluster of one node, in network namespaces:
//!
//! ```text
//!  client namespace            node namespace                      pod namespaces
//!  198.18.0.0/15 on lo         forwards, runs affinity             10.244.0.10 ...
//!  2001:db8:c::/64 on lo                                           fd00:244::10 ...
//!         eth0 ------------------ wire0      pod0 --------------------- eth0
//!                "the wire"                  pod1 --------------------- eth0
//! ```
//!
//! The client's end of the wire has `tx off`, so that packets cross it as they cross a real one, with their
//! checksums filled in; and GRO on, because XDP can send back through a veth only if its peer polls.
//! Clients reach pods, and the service range, by routes through the node. Nothing translates service addresses
//! until a test puts something there: `affinity`, or the rules of [`crate::kubeproxy`].
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
mod observe;
mod pod;
mod screen;
mod server;
mod sweep;
mod terminal;
mod yaml;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use affinity_user::objects::LIMITS;
use anyhow::{Context, Result, bail};
use aya::Ebpf;
use aya::programs::{Xdp, XdpMode};

pub use address::{CLIENT_COUNT, Family, Protocol};
pub use agent::{Agent, CAPABILITIES};
pub use capture::{Capture, Direction, read_pcap};
pub use cgroup::{Answer, Cgroup, SocketNumber, SocketProcess};
pub use client::{Client, Connection, PATIENCE};
pub use interrupt::Interrupt;
pub use load::{Load, Report};
pub use netns::{Door, Namespace};
pub use observe::{Backend, Candidate, Explanation, Session};
pub use pod::Pod;
pub use server::{HTTP_PORTS, UDP_PORTS};
pub use sweep::sweep_stale;
pub use terminal::Terminal;
pub use yaml::{EndpointState, Service, pod_name};

pub(crate) use address::{PODS, WIRE_CLIENT};
pub(crate) use netns::feed;

/// The node's end of the wire to the clients.
pub const WIRE: &str = "wire0";
/// The name of the node, in the YAML and for `--node-name`.
pub const NODE_NAME: &str = "node-a";

/// What a lab is to have.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many pods.
    pub pods: usize,
    /// Let the node and the pods leave checksums to the device, as real ones do. Off: every frame has its
    /// checksum filled in before it can be captured.
    pub checksum_offload: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { pods: 3, checksum_offload: true }
    }
}

/// The cluster. Dropping it takes everything away: namespaces, what runs in them, pinned programs, files.
pub struct Lab {
    directories: Directories,
    pods: Vec<Pod>,
    client: Namespace,
    node: Namespace,
    /// Keeps the program on the client's end of the wire.
    _receiver: Ebpf,
    keep: bool,
}

impl Lab {
    /// Brings up a lab with this many pods.
    ///
    /// # Errors
    /// When the caller is not root, or a tool is missing: the command that failed, and what it said.
    pub fn with_pods(pods: usize) -> Result<Self> {
        Self::up(&Options { pods, ..Options::default() })
    }

    /// Brings up a lab, after removing what dead processes left of theirs.
    ///
    /// # Errors
    /// As [`Lab::with_pods`].
    pub fn up(options: &Options) -> Result<Self> {
        sweep_stale()?;
        let name = unique_name();
        let directories = Directories::create(&name)?;
        let node = node_namespace(format!("{name}-node"))?;
        let client = client_namespace(format!("{name}-client"), &node)?;
        if !options.checksum_offload {
            ethtool(&node, WIRE, &["tx", "off"])?;
        }
        // A veth device sends what an XDP program turns back (`XDP_TX`), but tells its peer to look at it only where the
        // peer runs a program too (`veth_xdp_flush`).
        let receiver = pass_by_xdp(&client, "eth0")?;
        let pods = (0..options.pods)
            .map(|index| Pod::start(index, format!("{name}-pod{index}"), &node, options.checksum_offload))
            .collect::<Result<_>>()?;
        Ok(Self { directories, pods, client, node, _receiver: receiver, keep: false })
    }

    /// Removes what labs of processes that no longer live have left behind.
    ///
    /// # Errors
    /// When what is there cannot be read.
    pub fn sweep_stale() -> Result<()> {
        sweep_stale()
    }

    /// Leaves namespaces, programs and files in place when this value is dropped. The pods' servers end with
    /// this process all the same, and then the next lab on this machine takes the rest away.
    pub fn keep(&mut self) {
        self.keep = true;
        self.node.keep();
        self.client.keep();
        self.pods.iter_mut().for_each(Pod::keep);
    }

    /// The external clients.
    pub fn client(&self) -> Client {
        Client::new(self.client.door())
    }

    /// The external clients' namespace.
    pub fn client_namespace(&self) -> &Namespace {
        &self.client
    }

    /// The node's namespace.
    pub fn node(&self) -> &Namespace {
        &self.node
    }

    /// The pods, dead ones too.
    pub fn pods(&self) -> &[Pod] {
        &self.pods
    }

    /// A client inside a pod; it asks from [`Family::pod`] of that index.
    ///
    /// # Panics
    /// When that pod is dead.
    pub fn pod_client(&self, index: usize) -> Client {
        Client::new(self.pods[index].namespace().expect("the pod lives").door())
    }

    /// Takes a pod away as a power cut would: its address no longer answers, and nobody is told.
    pub fn kill_pod(&mut self, index: usize) -> Result<()> {
        self.pods[index].kill(&self.node)
    }

    /// Brings a dead pod back, under its old name and address.
    pub fn return_pod(&mut self, index: usize) -> Result<()> {
        self.pods[index].revive(&self.node)
    }

    /// The directory that the agent takes its YAML from.
    pub fn source(&self) -> &Path {
        &self.directories.source
    }

    /// Where the dataplane of this lab is pinned.
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
    /// file beside, then a rename.
    pub fn publish_text(&self, file_name: &str, text: &str) -> Result<()> {
        let beside = self.directories.scratch.join(file_name);
        fs::write(&beside, text)?;
        fs::rename(&beside, self.source().join(file_name)).with_context(|| file_name.to_owned())
    }

    /// Takes a service's YAML away.
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

/// Waits until `holds` is true, asking again and again.
///
/// # Errors
/// When it has not become true within `limit`.
pub fn eventually(what: &str, limit: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
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

fn node_namespace(name: String) -> Result<Namespace> {
    let node = Namespace::create(name)?;
    node.sysctl(&[
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/default/forwarding", "1"),
        ("ipv6/conf/default/accept_dad", "0"),
    ])?;
    node.ip("link set lo up")?;
    Ok(node)
}

/// The clients' namespace, and the wire between it and the node.
fn client_namespace(name: String, node: &Namespace) -> Result<Namespace> {
    let client = Namespace::create(name)?;
    client.sysctl(&[("ipv6/conf/default/accept_dad", "0")])?;
    let mut on_node = format!("link add {WIRE} type veth peer name eth0 netns {}\n", client.name());
    let mut on_client = "link set lo up\n".to_owned();
    for (index, length) in [24, 64].into_iter().enumerate() {
        let (router, next_hop) = (address::NODE[index], address::WIRE_CLIENT[index]);
        on_node += &format!("addr add {router}/{length} dev {WIRE}\n");
        on_client += &format!("addr add {next_hop}/{length} dev eth0\n");
    }
    on_node += &format!("link set {WIRE} up\n");
    on_client += "link set eth0 up\n";
    for (index, clients) in address::CLIENTS.into_iter().enumerate() {
        let (router, next_hop) = (address::NODE[index], address::WIRE_CLIENT[index]);
        on_node += &format!("route add {clients} via {next_hop}\n");
        // Every address of the prefix is local, without being configured.
        on_client += &format!("route add local {clients} dev lo\n");
        for behind in [address::PODS[index], address::SERVICES[index]] {
            on_client += &format!("route add {behind} via {router}\n");
        }
    }
    node.ip(&on_node)?;
    client.ip(&on_client)?;
    ethtool(&client, "eth0", &["tx", "off", "gro", "on"])?;
    Ok(client)
}

/// Puts an XDP program that passes everything on a device, until what is returned is dropped.
pub(crate) fn pass_by_xdp(namespace: &Namespace, device: &str) -> Result<Ebpf> {
    namespace.run(|| {
        let mut limits = Ebpf::load(LIMITS)?;
        let pass: &mut Xdp = limits.program_mut("xdp_pass").context("program xdp_pass")?.try_into()?;
        pass.load()?;
        pass.attach(device, XdpMode::Driver)?;
        Ok(limits)
    })?
}

/// Switches offloads of a device.
pub(crate) fn ethtool(namespace: &Namespace, device: &str, switches: &[&str]) -> Result<()> {
    netns::run(namespace.command("ethtool").args(["-K", device]).args(switches))
}
