//! Two processors that see a new client's first packets at once agree on its pod.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use affinity_common::{
    abi::{Frontend, Reason, Selection},
    pipeline::Verdict,
};
use affinity_tests::{
    kernel::{Hook, Kernel},
    lab::Family,
    packet::{Frame, tcp_flags::SYN},
};
use affinity_user::load::Sizes;
use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::site::{SIZES, destination, service, session_key, site};

const CLIENTS: u32 = 20_000;

#[test]
fn two_processors_agree_on_a_new_client() -> Result<()> {
    for select in [Selection::Random, Selection::Consistent, Selection::Least] {
        let kernel = crowd(select)?;
        race(&kernel, &[Reason::Created])?;
        let state = kernel.state()?;
        ensure!(state.count(Reason::Created) == u64::from(CLIENTS), "{:?}", state.counters);
        ensure!(state.count(Reason::Pinned) == u64::from(CLIENTS), "{:?}", state.counters);
    }
    Ok(())
}

fn crowd(select: Selection) -> Result<Kernel> {
    let sizes = Sizes { sessions: 1 << 16, flows: 1 << 17, ..SIZES };
    site(sizes, |frontend: &mut Frontend| frontend.select = select as u8)
}

/// Each client connects from two ports on two processors at the same moment; both connections must reach one pod, and
/// the pin must name it too.
fn race(kernel: &Kernel, expected: &[Reason]) -> Result<()> {
    let cpus = two_cpus()?;
    let arrived = AtomicUsize::new(0);
    let run = |runner: usize| -> Result<Vec<IpAddr>> {
        let mut only = CpuSet::new();
        only.set(cpus[runner]);
        sched_setaffinity(None, &only)?;
        let frame = |client| {
            let from = SocketAddr::new(Family::V4.client(client), 40_000 + runner as u16);
            Frame::tcp(from, service(Family::V4), SYN).build()
        };
        let frames: Vec<_> = (0..CLIENTS).map(frame).collect();
        let mut pods = Vec::new();
        for (round, frame) in frames.iter().enumerate() {
            meet(&arrived, 2 * (round + 1));
            let ran = kernel.run(Hook::XdpForward, frame)?;
            ensure!(ran.verdict == Verdict::Forward, "client {round}: {:?}", ran.verdict);
            pods.push(destination(&ran.frame)?);
        }
        Ok(pods)
    };
    let [one, other] = thread::scope(|scope| {
        let runners = [scope.spawn(|| run(0)), scope.spawn(|| run(1))];
        runners.map(|runner| runner.join().expect("a runner that does not panic"))
    });
    let (one, other) = (one?, other?);
    let disagreed = one.iter().zip(&other).filter(|(one, other)| one != other).count();
    let mut misplaced = 0;
    for (client, pod) in (0..).zip(&one) {
        let session = kernel.store.v4.sessions.get(&session_key(Family::V4.client(client)))?.context("no session")?;
        misplaced += usize::from(Family::V4.pod(session.backend as usize) != *pod);
    }
    let counters = kernel.state()?.counters;
    println!(
        "{expected:?}: {disagreed} of {CLIENTS} clients went to two pods, {misplaced} pins name a third: {counters:?}"
    );
    ensure!(disagreed == 0 && misplaced == 0, "{disagreed} clients went to two pods, {misplaced} pins name another");
    ensure!(expected.iter().all(|reason| counters.contains_key(reason)), "{counters:?}");
    Ok(())
}

/// Waits until so many have arrived. Spins, because the moment counts; yields, because there may be but one processor.
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

/// Two processors that this process may use; where there is one, it twice.
fn two_cpus() -> Result<[usize; 2]> {
    let allowed = sched_getaffinity(None)?;
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    let first = *cpus.first().context("no processor")?;
    Ok([first, cpus.get(1).copied().unwrap_or(first)])
}
