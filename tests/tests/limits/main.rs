//! Many clients, full tables, floods, two processors at once, and the passing of time: with the kernel's own clock and random
//! numbers, without a network. No test waits: the entries of the maps are made older instead.

mod ports;
mod race;
mod reuse;
mod site;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use affinity_common::abi::{Frontend, Reason, SECOND_NS, Selection, TIMEOUT_UNLIMITED, Timer};
use affinity_tests::{
    kernel::{Hook, Kernel},
    lab::Family,
    packet::tcp_flags::{ACK, FIN, PSH, RST, SYN},
};
use affinity_user::load::Sizes;
use anyhow::{Result, ensure};

use crate::site::{GROUP, SIZES, TIMEOUT_NS, age, answer, is_now, plain_service, send, service, session, site};

#[test]
fn sixty_five_thousand_clients_stay_where_they_are() -> Result<()> {
    const CLIENTS: u32 = 65_000;
    // A slow machine takes longer than the usual timeout.
    let sizes = Sizes { sessions: 1 << 17, events_bytes: 1 << 23, ..SIZES };
    let mut kernel = site(sizes, |frontend| frontend.timeout_ns = TIMEOUT_UNLIMITED)?;
    for (family, hook) in [(Family::V4, Hook::XdpForward), (Family::V6, Hook::TcForward)] {
        kernel.put_counters_aside()?;
        let first = round(&kernel, hook, family, CLIENTS, 40_000)?;
        let second = round(&kernel, hook, family, CLIENTS, 40_001)?;
        let moved = first.iter().filter(|(client, pod)| second[*client] != **pod).count();
        println!("{family}: {CLIENTS} clients, {moved} moved");
        ensure!(moved == 0 && second.len() == first.len(), "{moved} of {} moved", first.len());
        let state = kernel.state()?;
        let counted = [(Reason::Created, u64::from(CLIENTS)), (Reason::Pinned, u64::from(CLIENTS))];
        ensure!(state.counters == BTreeMap::from(counted), "{:?}", state.counters);
        let pods: BTreeSet<_> = first.values().collect();
        ensure!(pods.len() == site::PODS as usize, "only {} pods were chosen", pods.len());
    }
    Ok(())
}

/// The remaining entries show what the kernel evicted; and under `consistent`, clients that lost their pins return.
#[test]
fn a_full_session_table_counts_its_losses_and_consistent_clients_return() -> Result<()> {
    const CLIENTS: u32 = 5_000;
    const ENTRIES: u32 = 1_024;
    let kernel = site(Sizes { sessions: ENTRIES, ..SIZES }, |frontend| frontend.select = Selection::Consistent as u8)?;
    for (family, hook) in [(Family::V4, Hook::TcForward), (Family::V6, Hook::XdpForward)] {
        let live = |kernel: &Kernel| -> Result<usize> {
            let state = kernel.state()?;
            Ok(if family == Family::V4 { state.sessions_v4.len() } else { state.sessions_v6.len() })
        };
        let created_before = kernel.state()?.count(Reason::Created);
        let loads_before: u64 = kernel.state()?.loads.values().sum();
        let first = round(&kernel, hook, family, CLIENTS, 40_000)?;
        let left = live(&kernel)?;
        ensure!(left <= ENTRIES as usize && left > 0, "{left} sessions in a table of {ENTRIES}");
        let second = round(&kernel, hook, family, CLIENTS, 40_001)?;
        ensure!(first == second, "a client went to another pod");
        let state = kernel.state()?;
        let created = state.count(Reason::Created) - created_before;
        ensure!(created > u64::from(CLIENTS), "nobody was evicted");
        let evicted = created - live(&kernel)? as u64;
        println!("{family}: {created} pins made, {} live, {evicted} evicted", live(&kernel)?);
        ensure!(evicted >= u64::from(CLIENTS - ENTRIES), "{evicted} evicted");
        // The programs do not see evictions: the agent subtracts them from these loads.
        ensure!(state.loads.values().sum::<u64>() - loads_before == created, "{:?}", state.loads);
        ensure!(state.count(Reason::SessionNotStored) == 0 && state.count(Reason::FlowNotStored) == 0);
    }
    Ok(())
}

#[test]
fn a_flood_of_flows_evicts_no_session() -> Result<()> {
    const CLIENTS: u32 = 1_000;
    const FLOOD: u32 = 100_000;
    // However long the flood takes.
    let kernel = site(Sizes { sessions: 4_096, ..SIZES }, |frontend| frontend.timeout_ns = TIMEOUT_UNLIMITED)?;
    let first = round(&kernel, Hook::XdpForward, Family::V4, CLIENTS, 40_000)?;
    let pins = kernel.state()?.sessions_v4;
    for number in 0..FLOOD {
        let from = SocketAddr::new(Family::V4.client(CLIENTS + number), 1024);
        send(&kernel, Hook::XdpForward, from, plain_service(Family::V4), SYN)?;
    }
    let state = kernel.state()?;
    ensure!(state.flows_v4.len() <= SIZES.flows as usize, "{} flow records", state.flows_v4.len());
    ensure!(state.sessions_v4 == pins, "the flood touched the sessions");
    ensure!(state.count(Reason::Selected) == u64::from(FLOOD) && state.count(Reason::FlowNotStored) == 0);
    let second = round(&kernel, Hook::XdpForward, Family::V4, CLIENTS, 40_001)?;
    ensure!(first == second, "a client was moved");
    ensure!(kernel.state()?.count(Reason::Created) == u64::from(CLIENTS));
    Ok(())
}

/// SYNs with forged sources, three times as many as the table holds connections, to a service without affinity. Their records
/// are not used, so records of connections with an occasional packet stay. A connection that was idle for as long loses its
/// records, and finds the same pod.
#[test]
fn a_flood_of_half_open_connections_ends_no_open_one() -> Result<()> {
    const OPEN: u32 = 1_000;
    const FLOOD: u32 = 60_000;
    const ROUND: u32 = 10_000;
    let to = plain_service(Family::V4);
    let client = |number| SocketAddr::new(Family::V4.client(number), 40_000);
    for hook in [Hook::XdpForward, Hook::TcForward] {
        let kernel = site(Sizes { flows: 40_000, ..SIZES }, |_| {})?;
        let mut pods = Vec::new();
        for number in 0..OPEN {
            let pod = send(&kernel, hook, client(number), to, SYN)?;
            answer(&kernel, pod, client(number), SYN | ACK)?;
            send(&kernel, hook, client(number), to, ACK)?;
            pods.push(pod);
        }
        let busy = || (0..OPEN).zip(&pods).step_by(2);
        for number in 0..FLOOD {
            send(&kernel, hook, client(OPEN + number), to, SYN)?;
            if number % ROUND == 0 {
                for (number, pod) in busy() {
                    send(&kernel, hook, client(number), to, ACK | PSH)?;
                    answer(&kernel, *pod, client(number), ACK)?;
                }
            }
        }
        let established = kernel.state()?.count(Reason::Established);
        for (number, pod) in busy() {
            answer(&kernel, *pod, client(number), ACK | PSH)?;
            send(&kernel, hook, client(number), to, ACK)?;
        }
        let kept = kernel.state()?.count(Reason::Established) - established;
        ensure!(kept == u64::from(OPEN / 2), "{hook:?}: of {OPEN} records of busy connections {kept} were kept");
        for (number, pod) in (0..).zip(&pods) {
            let went = send(&kernel, hook, client(number), to, ACK | PSH)?;
            ensure!(went == *pod, "{hook:?}: connection {number} went from {pod} to {went}");
            answer(&kernel, *pod, client(number), ACK)?;
        }
    }
    Ok(())
}

/// One client with as many connections as it has ports floods the flows, and every packet of an old one still finds its pod, by
/// the pin.
#[test]
fn connections_that_the_flow_table_forgot_go_on() -> Result<()> {
    let kernel = site(SIZES, |_| {})?;
    let client = Family::V4.client(9);
    let pod = connect(&kernel, client, 1)?;
    for port in 1..=u16::MAX {
        ensure!(connect(&kernel, client, port)? == pod, "port {port}");
    }
    for port in (1..=u16::MAX).step_by(97) {
        let from = SocketAddr::new(client, port);
        ensure!(send(&kernel, Hook::TcForward, from, service(Family::V4), ACK | PSH)? == pod, "port {port}");
    }
    Ok(())
}

// ---- time ----

#[test]
fn timer_connection_is_restarted_by_connections_alone() -> Result<()> {
    let (kernel, client) = (site(SIZES, |_| {})?, Family::V4.client(1));
    connect(&kernel, client, 1)?;
    for port in 2..5 {
        age(&kernel, client, TIMEOUT_NS - SECOND_NS)?;
        expect(&kernel, Reason::Pinned, || connect(&kernel, client, port))?;
        ensure!(is_now(session(&kernel, client)?.last_used_ns));
    }
    age(&kernel, client, TIMEOUT_NS)?;
    // The old connection continues beyond its pin's timeout, and does not restore the pin.
    expect(&kernel, Reason::Established, || {
        send(&kernel, Hook::XdpForward, SocketAddr::new(client, 4), service(Family::V4), ACK)
    })?;
    ensure!(!is_now(session(&kernel, client)?.last_used_ns));
    expect(&kernel, Reason::Expired, || connect(&kernel, client, 5))?;
    ensure!(is_now(session(&kernel, client)?.created_ns));
    Ok(())
}

#[test]
fn timer_packet_is_restarted_by_the_packets_of_a_busy_connection() -> Result<()> {
    let (kernel, client) = (site(SIZES, |frontend| frontend.timer = Timer::Packet as u8)?, Family::V4.client(2));
    let pod = connect(&kernel, client, 1)?;
    for _ in 0..5 {
        age(&kernel, client, TIMEOUT_NS - SECOND_NS)?;
        let from = SocketAddr::new(client, 1);
        expect(&kernel, Reason::Established, || send(&kernel, Hook::TcForward, from, service(Family::V4), ACK))?;
        ensure!(is_now(session(&kernel, client)?.last_used_ns));
    }
    // Its pods' answers do not.
    age(&kernel, client, TIMEOUT_NS - SECOND_NS)?;
    answer(&kernel, pod, SocketAddr::new(client, 1), ACK)?;
    ensure!(!is_now(session(&kernel, client)?.last_used_ns));
    expect(&kernel, Reason::Pinned, || connect(&kernel, client, 2))?;
    age(&kernel, client, TIMEOUT_NS)?;
    expect(&kernel, Reason::Expired, || connect(&kernel, client, 3))?;
    Ok(())
}

#[test]
fn timer_absolute_is_never_restarted() -> Result<()> {
    let (kernel, client) = (site(SIZES, |frontend| frontend.timer = Timer::Absolute as u8)?, Family::V4.client(3));
    connect(&kernel, client, 1)?;
    age(&kernel, client, TIMEOUT_NS / 2)?;
    expect(&kernel, Reason::Pinned, || connect(&kernel, client, 2))?;
    age(&kernel, client, TIMEOUT_NS / 2)?;
    expect(&kernel, Reason::Expired, || connect(&kernel, client, 3))?;
    Ok(())
}

#[test]
fn timer_alive_runs_from_the_end_of_the_last_connection() -> Result<()> {
    let (kernel, client) = (site(SIZES, |frontend| frontend.timer = Timer::Alive as u8)?, Family::V4.client(4));
    let to = service(Family::V4);
    let complete = |pod, port| {
        answer(&kernel, pod, SocketAddr::new(client, port), SYN | ACK)?;
        send(&kernel, Hook::XdpForward, SocketAddr::new(client, port), to, ACK)
    };
    let pod = connect(&kernel, client, 1)?;
    complete(pod, 1)?;
    connect(&kernel, client, 2)?;
    complete(pod, 2)?;
    ensure!(session(&kernel, client)?.connections == 2);
    send(&kernel, Hook::XdpForward, SocketAddr::new(client, 2), to, RST)?;
    age(&kernel, client, 3 * TIMEOUT_NS)?;
    expect(&kernel, Reason::Pinned, || connect(&kernel, client, 3))?;
    complete(pod, 3)?;
    send(&kernel, Hook::XdpForward, SocketAddr::new(client, 3), to, FIN | ACK)?;
    answer(&kernel, pod, SocketAddr::new(client, 3), FIN | ACK)?;
    ensure!(session(&kernel, client)?.connections == 1);
    answer(&kernel, pod, SocketAddr::new(client, 1), FIN | ACK)?;
    ensure!(session(&kernel, client)?.connections == 1, "one side has not ended yet");
    age(&kernel, client, 3 * TIMEOUT_NS)?;
    send(&kernel, Hook::XdpForward, SocketAddr::new(client, 1), to, FIN | ACK)?;
    ensure!(session(&kernel, client)?.connections == 0 && is_now(session(&kernel, client)?.last_used_ns));
    age(&kernel, client, TIMEOUT_NS - SECOND_NS)?;
    expect(&kernel, Reason::Pinned, || connect(&kernel, client, 4))?;
    complete(pod, 4)?;
    send(&kernel, Hook::XdpForward, SocketAddr::new(client, 4), to, RST)?;
    age(&kernel, client, TIMEOUT_NS)?;
    expect(&kernel, Reason::Expired, || connect(&kernel, client, 5))?;
    Ok(())
}

#[test]
fn an_unlimited_pin_outlives_everything() -> Result<()> {
    for timer in [Timer::Connection, Timer::Packet, Timer::Absolute, Timer::Alive] {
        let change = |frontend: &mut Frontend| (frontend.timeout_ns, frontend.timer) = (TIMEOUT_UNLIMITED, timer as u8);
        let (kernel, client) = (site(SIZES, change)?, Family::V4.client(5));
        let pod = connect(&kernel, client, 1)?;
        send(&kernel, Hook::XdpForward, SocketAddr::new(client, 1), service(Family::V4), RST)?;
        let since_boot_ns = session(&kernel, client)?.created_ns;
        age(&kernel, client, since_boot_ns)?;
        ensure!(expect(&kernel, Reason::Pinned, || connect(&kernel, client, 2))? == pod, "{timer:?}");
    }
    Ok(())
}

/// Upstream's test of the timeout. A pure hash would fail it.
#[test]
fn single_requests_a_timeout_apart_reach_several_pods() -> Result<()> {
    let (kernel, client) = (site(SIZES, |_| {})?, Family::V4.client(6));
    let mut pods = BTreeSet::from([connect(&kernel, client, 1)?]);
    for port in 2..40 {
        age(&kernel, client, TIMEOUT_NS)?;
        pods.insert(expect(&kernel, Reason::Expired, || connect(&kernel, client, port))?);
    }
    ensure!(pods.len() > 1, "38 times the same pod");
    Ok(())
}

/// A change of the timeout applies from the next connection on.
#[test]
fn a_new_timeout_applies_to_live_pins() -> Result<()> {
    let (kernel, client) = (site(SIZES, |_| {})?, Family::V4.client(7));
    let set = |timeout_ns: u64| -> Result<()> {
        let frontends: Vec<_> = kernel.store.v4.frontends.iter().collect::<Result<_, _>>()?;
        for (key, frontend) in frontends.into_iter().filter(|(_, frontend)| frontend.group == GROUP) {
            kernel.store.v4.frontends.put(&key, &Frontend { timeout_ns, ..frontend })?;
        }
        Ok(())
    };
    connect(&kernel, client, 1)?;
    age(&kernel, client, TIMEOUT_NS + SECOND_NS)?;
    set(2 * TIMEOUT_NS)?;
    expect(&kernel, Reason::Pinned, || connect(&kernel, client, 2))?;
    age(&kernel, client, 5 * SECOND_NS)?;
    set(5 * SECOND_NS)?;
    expect(&kernel, Reason::Expired, || connect(&kernel, client, 3))?;
    Ok(())
}

// ---- helpers ----

/// Opens one new connection of each client; returns the pod that each reached.
fn round(kernel: &Kernel, hook: Hook, family: Family, clients: u32, port: u16) -> Result<BTreeMap<IpAddr, IpAddr>> {
    let connect = |number| {
        let from = SocketAddr::new(family.client(number), port);
        Ok((from.ip(), send(kernel, hook, from, service(family), SYN)?))
    };
    (0..clients).map(connect).collect()
}

/// Opens a client's connection from a port; returns the pod that it reaches.
fn connect(kernel: &Kernel, client: IpAddr, port: u16) -> Result<IpAddr> {
    send(kernel, Hook::XdpForward, SocketAddr::new(client, port), service(Family::V4), SYN)
}

/// Runs something that counts this reason and no other.
fn expect<T>(kernel: &Kernel, reason: Reason, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let mut before = kernel.state()?.counters;
    let done = act()?;
    *before.entry(reason).or_default() += 1;
    let after = kernel.state()?.counters;
    ensure!(after == before, "{after:?}, not {before:?}");
    Ok(done)
}
