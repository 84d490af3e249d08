//! Records that are replaced while packets read them. The kernel gives a hash element without preallocation to the next key at
//! once, so a pointer to one may show the record of another key:
//! <https://elixir.bootlin.com/linux/v6.1/source/kernel/bpf/memalloc.c> (`unit_free`, `unit_alloc`).

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use affinity_common::{
    abi::{AFFINITY, Flow, Frontend, FrontendKey, Member, MemberKey, Port, Reason, V4, timeout_s},
    headers::TCP,
    pipeline::Verdict,
};
use affinity_tests::{
    kernel::{Hook, Kernel, OnProcessor},
    lab::Family,
    packet::{Frame, tcp_flags::SYN},
};
use anyhow::{Context, Result, ensure};

use crate::site::{GENERATION, SIZES, destination, plain_service, service, site};

const CONNECTIONS: u32 = 200_000;
/// Connections that may be dropped because a record changed during each attempt to read it.
const DROPPED_MOST: u64 = 20;

/// A service with one pod. All fields that differ between the two must come from one record.
struct Service {
    at: SocketAddr,
    pod: u32,
    port: u16,
    frontend: Frontend,
}

impl Service {
    /// One of two services with records that differ in every field.
    fn new(number: u32, at: SocketAddr, flags: u8) -> Self {
        const POOL: u32 = 20;
        const SLOT: u32 = 16;
        let unique = |base: u32| base + number;
        let frontend = Frontend {
            timeout_ns: u64::from(unique(10)) * 1_000_000_000,
            service: unique(30),
            pool: unique(POOL),
            group: unique(200),
            own: unique(300),
            slot_first: unique(SLOT),
            slot_count: 1,
            seed: unique(7),
            select: 0,
            timer: number as u8,
            prefix: 128 - number as u8,
            flags,
        };
        // Pods with an even index have IPv4 addresses.
        Self { at, pod: 2 * number, port: 8080 + number as u16, frontend }
    }

    fn key(&self) -> FrontendKey<V4> {
        let IpAddr::V4(address) = self.at.ip() else { panic!("{} is not IPv4", self.at) };
        FrontendKey::new(V4(address.octets()), Port::new(self.at.port()), TCP)
    }

    fn publish(&self, kernel: &Kernel) -> Result<()> {
        let key = MemberKey { pool: self.frontend.pool, backend: self.pod };
        let member = Member::ready(GENERATION, Port::new(self.port));
        kernel.store.members.put(&key, &member)?;
        Ok(kernel.store.v4.frontends.put(&self.key(), &self.frontend)?)
    }
}

/// While the records of two services are replaced in turn, each connection goes to the pod and the port of its own service, and
/// its stored records are of that service.
#[test]
fn a_record_that_is_replaced_is_never_mistaken_for_another() -> Result<()> {
    for flags in [0, AFFINITY] {
        for hook in [Hook::XdpForward, Hook::TcForward] {
            connect_while_replaced(flags, hook)?;
        }
    }
    Ok(())
}

fn connect_while_replaced(flags: u8, hook: Hook) -> Result<()> {
    let kernel = site(SIZES, |_| {})?;
    let services = [Service::new(0, service(Family::V4), flags), Service::new(1, plain_service(Family::V4), flags)];
    for service in &services {
        kernel.store.slots.store_u32(service.frontend.slot_first, service.pod);
        service.publish(&kernel)?;
    }
    let (is_over, replaced) = (AtomicBool::new(false), AtomicU64::new(0));
    let strayed = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let _second = OnProcessor::new(1)?.context("this test needs two processors")?;
            while !is_over.load(Ordering::Relaxed) {
                for service in &services {
                    service.publish(&kernel)?;
                }
                replaced.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        });
        let strayed = connect_all(&kernel, hook, &services[0]);
        is_over.store(true, Ordering::Relaxed);
        writer.join().expect("a writer that does not panic")?;
        strayed
    })?;
    let replaced = replaced.load(Ordering::Relaxed);
    println!(
        "{hook:?}, flags {flags}: {CONNECTIONS} connections, records replaced {replaced} times, {strayed} strayed"
    );
    ensure!(replaced > u64::from(CONNECTIONS) / 100, "records were replaced only {replaced} times");
    ensure!(strayed == 0, "{strayed} of {CONNECTIONS} connections were decided by another service's records");
    Ok(())
}

/// Opens connections from the first processor; returns how many reached a wrong pod or left a record of another service.
fn connect_all(kernel: &Kernel, hook: Hook, service: &Service) -> Result<u64> {
    let _first = OnProcessor::new(0)?.context("this test needs a processor")?;
    let expected = SocketAddr::new(Family::V4.pod(service.pod as usize), service.port);
    let mut strayed = 0;
    for number in 0..CONNECTIONS {
        let from = SocketAddr::new(Family::V4.client(number % 1000), 1024 + (number / 1000) as u16);
        let ran = kernel.run(hook, &Frame::tcp(from, service.at, SYN).build())?;
        let arrived = match ran.verdict {
            Verdict::Forward => Some(SocketAddr::new(destination(&ran.frame)?, port(&ran.frame))),
            Verdict::Pass | Verdict::Redirect | Verdict::Answer | Verdict::Drop => None,
        };
        if ran.verdict != Verdict::Drop && arrived != Some(expected) {
            println!("{from}: {:?} to {arrived:?}", ran.verdict);
            strayed += 1;
        }
    }
    let state = kernel.state()?;
    let dropped = state.count(Reason::Inconsistent);
    ensure!(dropped <= DROPPED_MOST, "{dropped} of {CONNECTIONS} were dropped");
    let other = |flow: &Flow<V4>| {
        let Frontend { timeout_ns, pool, .. } = service.frontend;
        (flow.timeout_s, flow.pool) != (timeout_s(timeout_ns), pool)
    };
    strayed += state.flows_v4.values().filter(|flow| other(flow)).count() as u64;
    strayed += state.sessions_v4.keys().filter(|key| key.scope != service.frontend.group).count() as u64;
    Ok(strayed)
}

/// The port that a frame goes to.
fn port(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[36], frame[37]])
}
