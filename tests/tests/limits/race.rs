//! Two processors that see one client's first packets at once agree on its pod, whatever happened to its old pin.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use affinity_common::{
    abi::{BackendRef, Frontend, Reason, SECOND_NS, Selection, Session, TIMEOUT_UNLIMITED, Timer},
    pipeline::Verdict,
};
use affinity_tests::{
    kernel::{Hook, Kernel},
    lab::Family,
    packet::{
        Frame,
        tcp_flags::{ACK, SYN},
    },
};
use affinity_user::{load::Sizes, sys::monotonic_ns};
use anyhow::{Context, Result, bail, ensure};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::site::{GENERATION, SIZES, TIMEOUT_NS, destination, service, session_key, site};

const CLIENTS: u32 = 10_000;

#[test]
fn two_processors_agree_on_a_new_client() -> Result<()> {
    for select in [Selection::Random, Selection::Consistent, Selection::Least] {
        let kernel = crowd(select)?;
        race(&kernel, None, &[Reason::Created])?;
    }
    Ok(())
}

#[test]
fn two_processors_agree_on_a_client_whose_pin_has_expired() -> Result<()> {
    for select in [Selection::Random, Selection::Consistent, Selection::Least] {
        let kernel = crowd(select)?;
        let last_used_ns =
            monotonic_ns().checked_sub(TIMEOUT_NS + SECOND_NS).context("started too short a time ago")?;
        pin_all(&kernel, |session| session.last_used_ns = last_used_ns)?;
        // A CPU that comes between the steps of a move sees the pod as gone.
        race(&kernel, None, &[Reason::Expired, Reason::BackendGone])?;
    }
    Ok(())
}

#[test]
fn two_processors_agree_on_a_client_whose_pod_has_gone() -> Result<()> {
    for select in [Selection::Random, Selection::Consistent, Selection::Least] {
        let kernel = crowd(select)?;
        pin_all(&kernel, |session| session.backend.generation = GENERATION + 2)?;
        race(&kernel, None, &[Reason::BackendGone])?;
    }
    Ok(())
}

#[test]
fn two_processors_count_both_connections() -> Result<()> {
    let kernel = crowd_of(|frontend| (frontend.timeout_ns, frontend.timer) = (TIMEOUT_UNLIMITED, Timer::Alive as u8))?;
    pin_all(&kernel, |session| session.connections = 1)?;
    race(&kernel, Some(3), &[])?;
    let kernel = crowd_of(|frontend| frontend.timer = Timer::Alive as u8)?;
    let last_used_ns = monotonic_ns().checked_sub(TIMEOUT_NS + SECOND_NS).context("started too short a time ago")?;
    pin_all(&kernel, |session| session.last_used_ns = last_used_ns)?;
    race(&kernel, Some(2), &[Reason::Expired, Reason::BackendGone])
}

fn crowd(select: Selection) -> Result<Kernel> {
    crowd_of(|frontend| frontend.select = select as u8)
}

fn crowd_of(change: impl Fn(&mut Frontend)) -> Result<Kernel> {
    let sizes = Sizes { sessions: 1 << 16, flows: 1 << 17, events_bytes: 1 << 23, ..SIZES };
    site(sizes, change)
}

/// Pins every client to the first pod, which has no higher load than the others. The session is changed before it is stored.
fn pin_all(kernel: &Kernel, change: impl Fn(&mut Session)) -> Result<()> {
    let now_ns = monotonic_ns();
    for client in 0..CLIENTS {
        let mut session = Session {
            created_ns: now_ns - SECOND_NS,
            last_used_ns: now_ns - SECOND_NS,
            backend: BackendRef { index: 0, generation: GENERATION },
            service: 1,
            draw: client.wrapping_mul(0x9e37_79b1),
            connections: 0,
            uses: 1,
            reason: Reason::Created as u8,
            pad: [0; 7],
        };
        change(&mut session);
        kernel.store.v4.sessions.put(&session_key(Family::V4.client(client)), &session)?;
    }
    for pod in 0..kernel.store.loads.len() {
        kernel.store.loads.store_u64(pod, u64::from(CLIENTS));
    }
    Ok(())
}

/// Each client connects from two ports on two processors at the same moment. Both connections must reach one pod, and the pin
/// must name it. One of them creates or moves the pin, for one of these reasons; if none is given, neither does. (A move to the
/// pod that it had may count twice.) The pin then has this many connections, if they are counted. The connections are in their
/// middle, because one that begins does not count yet.
fn race(kernel: &Kernel, connections: Option<u32>, reasons: &[Reason]) -> Result<()> {
    let (cpus, arrived) = (two_cpus()?, AtomicUsize::new(0));
    let flags = if connections.is_some() { ACK } else { SYN };
    let [one, other] = thread::scope(|scope| {
        let runners = [0, 1].map(|runner| {
            let (cpu, port, arrived) = (cpus[runner], 40_000 + runner as u16, &arrived);
            scope.spawn(move || connect_all(kernel, cpu, (port, flags), arrived))
        });
        runners.map(|runner| runner.join().expect("a runner that does not panic"))
    });
    let (one, other) = (one?, other?);
    let disagreed = one.iter().zip(&other).filter(|(one, other)| one != other).count();
    let (mut misplaced, mut miscounted) = (0, 0);
    for (client, pod) in (0..).zip(&one) {
        let session = kernel.store.v4.sessions.get(&session_key(Family::V4.client(client)))?.context("no session")?;
        misplaced += usize::from(Family::V4.pod(session.backend.index as usize) != *pod);
        miscounted += usize::from(connections.is_some_and(|expected| session.live_connections() != expected));
    }
    let state = kernel.state()?;
    ensure!(disagreed == 0, "{disagreed} of {CLIENTS} clients went to two pods");
    ensure!(misplaced == 0, "{misplaced} of {CLIENTS} pins name another pod");
    ensure!(miscounted == 0, "{miscounted} of {CLIENTS} pins have a wrong number of connections");
    let made: u64 = reasons.iter().map(|reason| state.count(*reason)).sum();
    let expected = if reasons.is_empty() { 0 } else { u64::from(CLIENTS) };
    ensure!(made >= expected && state.count(Reason::Pinned) == 2 * u64::from(CLIENTS) - made, "{:?}", state.counters);
    Ok(())
}

/// Connects every client from a port, on one processor; returns the pods that they reach. Waits for the other runner before
/// each.
fn connect_all(kernel: &Kernel, cpu: usize, (port, flags): (u16, u8), arrived: &AtomicUsize) -> Result<Vec<IpAddr>> {
    let mut only = CpuSet::new();
    only.set(cpu);
    let frame = |client| {
        let from = SocketAddr::new(Family::V4.client(client), port);
        Frame::tcp(from, service(Family::V4), flags).build()
    };
    let connect = |frame: &[u8]| {
        let ran = kernel.run(Hook::XdpForward, frame)?;
        ensure!(ran.verdict == Verdict::Forward, "{:?}", ran.verdict);
        destination(&ran.frame)
    };
    let pinned_down = sched_setaffinity(None, &only);
    let frames: Vec<_> = (0..CLIENTS).map(frame).collect();
    // A runner that fails still meets the other one, which would otherwise wait forever.
    let pods: Vec<Result<IpAddr>> = (1..)
        .zip(&frames)
        .map(|(round, frame)| {
            meet(arrived, 2 * round);
            connect(frame)
        })
        .collect();
    pinned_down?;
    pods.into_iter().collect()
}

/// Waits until this many have arrived. Spins, because the moment matters; yields, because others may need the processor.
fn meet(arrived: &AtomicUsize, together: usize) {
    arrived.fetch_add(1, Ordering::AcqRel);
    let mut spins = 0;
    while arrived.load(Ordering::Acquire) < together {
        spins += 1;
        if spins % 10_000 == 0 {
            thread::yield_now();
        }
        std::hint::spin_loop();
    }
}

/// Two processors that this process may use. On one, nothing would run at the same moment, so nothing would be tested.
fn two_cpus() -> Result<[usize; 2]> {
    two_of(&sched_getaffinity(None)?)
}

fn two_of(allowed: &CpuSet) -> Result<[usize; 2]> {
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    match (cpus.next(), cpus.next()) {
        (Some(first), Some(second)) => Ok([first, second]),
        (first, _) => bail!("this test needs two processors, and may use {}", usize::from(first.is_some())),
    }
}

#[test]
fn race_needs_two_processors() {
    let mut allowed = CpuSet::new();
    allowed.set(3);
    assert_eq!(two_of(&allowed).unwrap_err().to_string(), "this test needs two processors, and may use 1");
    allowed.set(5);
    assert_eq!(two_of(&allowed).unwrap(), [3, 5]);
}
