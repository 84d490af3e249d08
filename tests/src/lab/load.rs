//! Clients that send requests in the background until they are stopped. What happened to them meanwhile is the test's result.
//!
//! Each client alternates between a new connection and a connection that it keeps. So a report distinguishes pins that moved
//! (`moved`), requests that failed (`failed`) and connections that broke (`broken`). If a pod ends a connection in order, the
//! client opens another one (`handed_over`).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, ensure};

use super::address::{Family, Protocol};
use super::client::{Client, Connection, PATIENCE};
use super::eventually;
use crate::patience::patience;

/// Threads that share the clients.
const WORKERS: u32 = 4;
/// A pause after each client's turn leaves processor time to the system under test.
const PAUSE: Duration = Duration::from_millis(1);

/// What happened to the clients.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Requests sent, on new and on kept connections.
    pub requests: u64,
    /// Requests on a new connection that got no answer.
    pub failed: u64,
    /// New connections that another pod answered than the client's one before.
    pub moved: u64,
    /// Kept connections that broke: a request got no answer.
    pub broken: u64,
    /// Answers of another pod on a kept connection.
    pub switched: u64,
    /// Kept connections that their pod ended with an answer.
    pub handed_over: u64,
    /// Answers by pod.
    pub pods: BTreeMap<String, u64>,
    /// The first of the failures, moves and breaks, in words.
    pub first_trouble: Option<String>,
}

impl Report {
    /// Nothing failed, moved or broke, and there were requests.
    ///
    /// # Errors
    /// What happened, with the numbers.
    pub fn undisturbed(&self) -> Result<()> {
        self.answered()?;
        ensure!(self.moved == 0 && self.switched == 0 && self.handed_over == 0, "{self:?}");
        Ok(())
    }

    /// Every request got an answer, from any pod, and there were requests.
    ///
    /// # Errors
    /// What happened, with the numbers.
    pub fn answered(&self) -> Result<()> {
        ensure!(self.requests > 0, "no request was sent");
        ensure!(self.failed == 0 && self.broken == 0, "{self:?}");
        Ok(())
    }

    fn add(&mut self, other: Self) {
        let Self { requests, failed, moved, broken, switched, handed_over, pods, first_trouble } = other;
        self.requests += requests;
        self.failed += failed;
        self.moved += moved;
        self.broken += broken;
        self.switched += switched;
        self.handed_over += handed_over;
        for (pod, answers) in pods {
            *self.pods.entry(pod).or_default() += answers;
        }
        self.first_trouble = self.first_trouble.take().or(first_trouble);
    }

    fn trouble(&mut self, what: impl FnOnce() -> String) {
        self.first_trouble.get_or_insert_with(what);
    }
}

/// Clients at work. Dropping it stops them.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<std::io::Result<Report>>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    requests: AtomicU64,
}

impl Load {
    /// Starts these clients.
    pub fn start(client: &Client, protocol: Protocol, clients: Range<u32>, to: SocketAddr) -> Self {
        let shared = Arc::<Shared>::default();
        let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
        let workers = (0..WORKERS)
            .map(|worker| {
                let (client, shared) = (client.clone(), Arc::clone(&shared));
                let mut callers: Vec<Caller> = clients
                    .clone()
                    .filter(|number| number % WORKERS == worker)
                    .map(|number| Caller::new(protocol, family.client(number), to))
                    .collect();
                thread::spawn(move || {
                    client.door().enter()?;
                    let mut report = Report::default();
                    let mut next = 0;
                    while !callers.is_empty() && !shared.stop.load(Ordering::Relaxed) {
                        callers[next].turn(&mut report, &shared);
                        next = (next + 1) % callers.len();
                    }
                    Ok(report)
                })
            })
            .collect();
        Self { shared, workers }
    }

    /// Waits until that many further requests have been answered or have failed.
    ///
    /// # Errors
    /// When they take several times longer than the patience of a client that never gets an answer.
    pub fn wait_for(&self, requests: u64) -> Result<()> {
        let until = self.shared.requests.load(Ordering::Relaxed) + requests;
        eventually(&format!("{requests} requests of the clients"), 10 * PATIENCE, || {
            Ok(self.shared.requests.load(Ordering::Relaxed) >= until)
        })
    }

    /// Lets each client finish its turn, and adds up.
    ///
    /// # Errors
    /// When a worker could not enter the clients' namespace.
    pub fn stop(mut self) -> Result<Report> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut total = Report::default();
        for worker in self.workers.drain(..) {
            total.add(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(total)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// One client: the pod that served it last, and its kept connection with the pod at the other end.
struct Caller {
    protocol: Protocol,
    from: IpAddr,
    to: SocketAddr,
    last_pod: Option<String>,
    kept: Option<(Connection, String)>,
}

impl Caller {
    fn new(protocol: Protocol, from: IpAddr, to: SocketAddr) -> Self {
        Self { protocol, from, to, last_pod: None, kept: None }
    }

    fn turn(&mut self, report: &mut Report, shared: &Shared) {
        self.ask_anew(report);
        shared.requests.fetch_add(1, Ordering::Relaxed);
        self.ask_again(report);
        shared.requests.fetch_add(1, Ordering::Relaxed);
        thread::sleep(PAUSE);
    }

    fn ask_anew(&mut self, report: &mut Report) {
        report.requests += 1;
        let answer = Connection::open(self.protocol, SocketAddr::new(self.from, 0), self.to, patience(PATIENCE))
            .and_then(|mut connection| connection.ask_last("/"));
        match answer {
            Ok(pod) => {
                *report.pods.entry(pod.clone()).or_default() += 1;
                if let Some(last) = self.last_pod.replace(pod.clone()).filter(|last| *last != pod) {
                    report.moved += 1;
                    report.trouble(|| format!("{} moved from {last} to {pod}", self.from));
                }
            }
            Err(error) => {
                report.failed += 1;
                report.trouble(|| format!("{} got no answer: {error}", self.from));
            }
        }
    }

    fn ask_again(&mut self, report: &mut Report) {
        report.requests += 1;
        let Some((connection, pod)) = &mut self.kept else {
            self.kept = self.keep_one();
            if self.kept.is_none() {
                report.failed += 1;
                report.trouble(|| format!("{} got no connection to keep", self.from));
            }
            return;
        };
        match connection.ask("/") {
            Ok(answer) => {
                *report.pods.entry(answer.clone()).or_default() += 1;
                if answer != *pod {
                    report.switched += 1;
                    report.trouble(|| format!("the connection of {} went from {pod} to {answer}", self.from));
                    pod.clone_from(&answer);
                }
                if connection.has_ended() {
                    report.handed_over += 1;
                    self.kept = None;
                }
            }
            Err(error) => {
                report.broken += 1;
                report.trouble(|| format!("the connection of {} to {pod}: {error}", self.from));
                self.kept = None;
            }
        }
    }

    fn keep_one(&self) -> Option<(Connection, String)> {
        let mut connection =
            Connection::open(self.protocol, SocketAddr::new(self.from, 0), self.to, patience(PATIENCE)).ok()?;
        let pod = connection.ask("/").ok()?;
        Some((connection, pod))
    }
}
