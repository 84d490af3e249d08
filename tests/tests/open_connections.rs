//! Connections that are open when endpoints leave, with kube-proxy's rules in both modes and with `affinity`, side by side:
//! `affinity` keeps the connections that kube-proxy's rules keep. Intended differences are declared with the reason, and must
//! occur.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::ops::Range;
use std::thread::{self, sleep};
use std::time::Duration;

use affinity_tests::lab::{
    Client, Connection, EndpointState, FIRST_OF_B, Family, Frontend, Protocol, Service, eventually, pod_name,
};
use affinity_tests::proxy::{Proxy, Scene};
use affinity_tests::story::report;
use anyhow::{Context, Result, ensure};

/// Pods that leave: one on each node.
const LEAVERS: [usize; 2] = [0, FIRST_OF_B];
/// Pods that stay.
const STAYERS: [usize; 2] = [1, FIRST_OF_B + 1];
/// A pod that is a client.
const CLIENT_POD: usize = 2;
/// External clients, for each frontend, family and protocol: those that connect while there are only leavers, and those that
/// connect while there are all pods. The latter are so many that some reach a pod that stays.
const CLIENTS: [Range<u32>; 2] = [0..4, 4..16];
/// How long a client waits for an answer before its connection counts as silent.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);
/// How long a change may take to be effective for every datagram.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);
/// Longer than `affinity` remembers endpoints that left.
const GAP: Duration = Duration::from_secs(12);

// The stories.
const SWITCHED: &str = "selector switched";
const NOT_READY: &str = "not ready";
const TERMINATING: &str = "terminating";
const FLAP: &str = "flap";
const DELETED: &str = "service deleted";
const ROLLOUT: &str = "rollout";
const DEAD: &str = "pod dead";

/// All proxies: kube-proxy's rules come first, because they determine what must be kept.
const PROXIES: [Proxy; 4] = [Proxy::Iptables, Proxy::Nftables, Proxy::Tc, Proxy::Xdp];

/// The fate of a connection, or of an exchange of datagrams. The worst is last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// Its pod answered every time.
    Kept,
    /// Another pod answered.
    Moved,
    /// The client got an immediate error that it has ended.
    Reset,
    /// There was no answer.
    Silent,
}

/// Connections that are counted together: by protocol, and whether their pod leaves.
type Group = (Protocol, Side);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    /// Their pod leaves.
    Leaver,
    /// Their pod stays.
    Stayer,
}

const TCP_OF_LEAVERS: Group = (Protocol::Tcp, Side::Leaver);
const UDP_OF_LEAVERS: Group = (Protocol::Udp, Side::Leaver);

/// An intended behaviour of `affinity` in a scenario where kube-proxy's rules differ.
struct Difference {
    story: &'static str,
    group: Group,
    instead: Fate,
    reason: &'static str,
}

/// All known differences. Each must occur, so that none outlives its cause.
const DIFFERENCES: [Difference; 3] = [
    Difference {
        story: TERMINATING,
        group: UDP_OF_LEAVERS,
        instead: Fate::Moved,
        reason: "a datagram has no connection to lose: it goes to a pod that is ready at once, where kube-proxy waits until \
                 the endpoint serves no longer",
    },
    Difference {
        story: FLAP,
        group: UDP_OF_LEAVERS,
        instead: Fate::Kept,
        reason: "pins survive a gap in which their client asks nothing",
    },
    Difference {
        story: DEAD,
        group: TCP_OF_LEAVERS,
        instead: Fate::Reset,
        reason: "a client is told at once that its pod is dead, on whichever node it was; kube-proxy's rules end in an RST only \
                 where a device went with the pod: the kernel forgets what was masqueraded by it, and another pod answers",
    },
];

/// An open connection, and its fate so far.
struct Line {
    protocol: Protocol,
    from: IpAddr,
    connection: Connection,
    pod: String,
    fate: Fate,
}

impl Line {
    fn open(client: &Client, protocol: Protocol, from: IpAddr, to: std::net::SocketAddr) -> Result<Self> {
        let what = || format!("{protocol} from {from} to {to}");
        let mut connection = client.connect(protocol, from, to).with_context(what)?;
        let pod = connection.ask("/").with_context(what)?;
        Ok(Self { protocol, from, connection, pod, fate: Fate::Kept })
    }

    fn group(&self) -> Group {
        let leaves = LEAVERS.iter().any(|leaver| self.pod == pod_name(*leaver));
        (self.protocol, if leaves { Side::Leaver } else { Side::Stayer })
    }

    /// Asks once more, unless it has ended.
    fn ask(&mut self) {
        if self.fate > Fate::Moved || self.connection.has_ended() {
            return;
        }
        let met = match self.connection.ask("/") {
            Ok(pod) if pod == self.pod => Fate::Kept,
            Ok(_) => Fate::Moved,
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused) => {
                Fate::Reset
            }
            Err(_) => Fate::Silent,
        };
        self.fate = self.fate.max(met);
    }
}

/// One proxy, and the connections that were opened before the scenario begins.
struct Stage {
    scene: Scene,
    proxy: Proxy,
    lines: Vec<Line>,
}

fn web() -> Service {
    Service::new("web", 10).tcp("http", 80, 8080).udp("dns", 53, 5353).node_ports(30_080).client_ip()
}

/// With all pods.
fn full() -> Service {
    web().on(LEAVERS.into_iter().chain(STAYERS))
}

fn with_leavers(state: EndpointState) -> Service {
    LEAVERS.into_iter().fold(full(), |service, leaver| service.endpoint(leaver, state))
}

fn without_leavers() -> Service {
    web().on(STAYERS)
}

impl Stage {
    /// Opens connections while there are only leavers, and then more while there are all pods.
    fn set(proxy: Proxy) -> Result<Self> {
        let mut stage = Self { scene: proxy.start(&[web().on(LEAVERS)])?, proxy, lines: Vec::new() };
        let [first, second] = CLIENTS;
        stage.open(first)?;
        stage.publish(&[full()])?;
        stage.open(second)?;
        Ok(stage)
    }

    fn open(&mut self, clients: Range<u32>) -> Result<()> {
        let (web, lab) = (web(), self.scene.lab());
        let outside = lab.client().with_patience(ANSWER_PATIENCE);
        let inside = lab.pod_client(CLIENT_POD).with_patience(ANSWER_PATIENCE);
        for (family, protocol) in Family::BOTH.into_iter().flat_map(|family| Protocol::BOTH.map(|it| (family, it))) {
            let to = |frontend| web.address(frontend, family, protocol).context("it has this frontend");
            for frontend in [Frontend::ClusterIp, Frontend::NodePort] {
                for number in clients.clone() {
                    self.lines.push(Line::open(&outside, protocol, family.client(number), to(frontend)?)?);
                }
            }
            let pod = family.pod(CLIENT_POD);
            self.lines.push(Line::open(&inside, protocol, pod, to(Frontend::ClusterIp)?)?);
        }
        Ok(())
    }

    /// Puts these into effect instead of the former ones, also for datagrams of known clients.
    fn publish(&mut self, services: &[Service]) -> Result<()> {
        self.scene.update(services)?;
        if !self.scene.has_agent() {
            return Ok(());
        }
        let ready: Vec<String> =
            services.iter().flat_map(Service::ready_pods).map(|pod| format!("/{} ", pod_name(pod))).collect();
        eventually(&format!("{ready:?} alone are ready members"), SYNC_PATIENCE, || {
            let members = self.scene.lab().affinity(&["dump", "members"])?;
            let mut used = members.lines().filter(|line| line.contains("state=ready"));
            Ok(used.all(|line| ready.iter().any(|pod| line.contains(pod))))
        })
    }

    /// Sends one more request on every connection.
    fn ask(&mut self) {
        thread::scope(|scope| self.lines.iter_mut().for_each(|line| drop(scope.spawn(|| line.ask()))));
    }

    /// The worst fate in each group.
    fn fates(&self) -> BTreeMap<Group, Fate> {
        let mut fates = BTreeMap::new();
        for line in &self.lines {
            let fate = fates.entry(line.group()).or_insert(Fate::Kept);
            *fate = line.fate.max(*fate);
        }
        fates
    }

    /// One line: how many of the opened connections were kept, and the fates of the others.
    fn report(&self, story: &str) {
        let of = |protocol| {
            let lines: Vec<&Line> = self.lines.iter().filter(|line| line.protocol == protocol).collect();
            let count = |fate| lines.iter().filter(|line| line.fate == fate).count();
            let others = [Fate::Moved, Fate::Reset, Fate::Silent].map(|fate| (fate, count(fate)));
            let others = others.into_iter().filter(|(_, count)| *count > 0);
            let others: String = others.map(|(fate, count)| format!(", {count} {fate:?}").to_lowercase()).collect();
            format!("{protocol} {} of {} kept{others}", count(Fate::Kept), lines.len())
        };
        report(&format!("{story}, {:?}: {}; {}", self.proxy, of(Protocol::Tcp), of(Protocol::Udp)));
    }

    /// Some connections of a group that did not keep their pod, to find the cause.
    fn lost(&self, group: Group) -> Vec<String> {
        let lost = self.lines.iter().filter(|line| line.group() == group && line.fate != Fate::Kept);
        lost.take(6).map(|line| format!("{} at {}: {:?}", line.from, line.pod, line.fate)).collect()
    }
}

/// Runs a scenario with every proxy, and compares `affinity` with kube-proxy's rules.
fn side_by_side(story: &str, tell: impl Fn(&mut Stage) -> Result<()>) -> Result<()> {
    let mut oracle: Option<BTreeMap<Group, Fate>> = None;
    let mut wrong = Vec::new();
    for proxy in PROXIES {
        let mut stage = Stage::set(proxy)?;
        tell(&mut stage).with_context(|| format!("{story}, {proxy:?}\n{}", stage.scene.log()))?;
        stage.report(story);
        let fates = stage.fates();
        let Some(oracle) = &oracle else {
            oracle = Some(fates);
            continue;
        };
        for (group, usual) in oracle {
            let known = DIFFERENCES
                .iter()
                .find(|known| stage.scene.has_agent() && known.story == story && known.group == *group);
            let expected = known.map_or(*usual, |known| known.instead);
            if known.is_some() && expected == *usual {
                wrong.push(format!("{group:?} is {expected:?} by kube-proxy's rules, too: that is no difference"));
            }
            let met = fates.get(group).copied();
            if met != Some(expected) {
                wrong.push(format!("{proxy:?}: {group:?}: {met:?}, not {expected:?}: {:?}", stage.lost(*group)));
            }
        }
    }
    ensure!(wrong.is_empty(), "{story}:\n{}", wrong.join("\n"));
    let known = DIFFERENCES.iter().filter(|known| known.story == story);
    known.for_each(|known| report(&format!("{story}: {:?} is {:?}: {}", known.group, known.instead, known.reason)));
    Ok(())
}

/// The service changes, and stays so for longer than the gap.
fn endpoints_change(story: &'static str, service: impl Fn() -> Service) -> Result<()> {
    side_by_side(story, |stage| {
        stage.publish(&[service()])?;
        stage.ask();
        sleep(GAP);
        stage.ask();
        Ok(())
    })
}

#[test]
fn endpoints_leave_their_slices_while_their_pods_live() -> Result<()> {
    endpoints_change(SWITCHED, without_leavers)
}

#[test]
fn endpoints_lose_their_readiness() -> Result<()> {
    endpoints_change(NOT_READY, || with_leavers(EndpointState::NotReady))
}

#[test]
fn endpoints_terminate() -> Result<()> {
    endpoints_change(TERMINATING, || with_leavers(EndpointState::Terminating))
}

#[test]
fn endpoints_flap() -> Result<()> {
    side_by_side(FLAP, |stage| {
        for _ in 0..3 {
            stage.publish(&[without_leavers()])?;
            stage.publish(&[full()])?;
            stage.ask();
        }
        Ok(())
    })
}

#[test]
fn a_service_is_deleted() -> Result<()> {
    side_by_side(DELETED, |stage| {
        stage.publish(&[])?;
        stage.ask();
        sleep(GAP);
        stage.ask();
        Ok(())
    })
}

/// New pods are ready; the old ones end their connections in order and go.
#[test]
fn pods_are_replaced() -> Result<()> {
    side_by_side(ROLLOUT, |stage| {
        stage.publish(&[with_leavers(EndpointState::Terminating)])?;
        stage.ask();
        LEAVERS.into_iter().for_each(|leaver| stage.scene.lab().pod(leaver).drain());
        stage.ask();
        let open = |stage: &Stage| LEAVERS.map(|leaver| stage.scene.lab().pod(leaver).connections());
        eventually("no connection to old pods is open", SYNC_PATIENCE, || Ok(open(stage) == [0; 2]))?;
        LEAVERS.into_iter().try_for_each(|leaver| stage.scene.lab_mut().kill_pod(leaver))?;
        stage.publish(&[without_leavers()])?;
        stage.ask();
        Ok(())
    })
}

/// As in a rollout, but the pods are gone before their connections have ended.
#[test]
fn pods_die_with_open_connections() -> Result<()> {
    side_by_side(DEAD, |stage| {
        stage.publish(&[with_leavers(EndpointState::Terminating)])?;
        LEAVERS.into_iter().try_for_each(|leaver| stage.scene.lab_mut().kill_pod(leaver))?;
        stage.publish(&[without_leavers()])?;
        stage.ask();
        Ok(())
    })
}
