//! A service of eight pods in the kernel's maps, with the kernel's own clock, and clients that connect to it through
//! `BPF_PROG_TEST_RUN`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use affinity_common::{
    abi::{
        AFFINITY, Backend, Direction, Flow, FlowKey, Frontend, FrontendKey, Member, MemberKey, Port, SECOND_NS,
        Selection, Session, SessionKey, Timer, V4, V6, filter_bit,
    },
    headers::TCP,
    model::Model,
    pipeline::Verdict,
};
use affinity_tests::{
    kernel::{Fixed, Hook, Kernel, ModelFamily, SMALL, empty_model},
    lab::Family,
    packet::{Frame, tcp_flags::RST},
};
use affinity_user::{load::Sizes, sys::monotonic_ns};
use anyhow::{Context, Result, ensure};

/// The service's timeout.
pub(crate) const TIMEOUT_NS: u64 = 20 * SECOND_NS;
/// Pods of the service; their indices are below this.
pub(crate) const PODS: u32 = 8;
/// Generation of the pods.
pub(crate) const GENERATION: u32 = 1;
/// The scope of all pins.
pub(crate) const GROUP: u32 = 100;
/// Entries of the flow tables: few, so that tests about sessions also flood them.
pub(crate) const SIZES: Sizes = Sizes { flows: 1 << 14, ..SMALL };

const PORT: u16 = 80;
const POOLS: [(u32, Family); 2] = [(10, Family::V4), (11, Family::V6)];

/// The address of the service.
pub(crate) fn service(family: Family) -> SocketAddr {
    SocketAddr::new(family.cluster_ip(1), PORT)
}

/// The address of a service with the same pods and no affinity.
pub(crate) fn plain_service(family: Family) -> SocketAddr {
    SocketAddr::new(family.cluster_ip(2), PORT)
}

/// Loads the programs and publishes the service, with a change of its frontend.
pub(crate) fn site(sizes: Sizes, change: impl Fn(&mut Frontend)) -> Result<Kernel> {
    let mut model = empty_model(&sizes, Fixed { now_ns: 1, random: 0 });
    for (index, family) in (0..).zip(Family::BOTH.repeat(PODS as usize)) {
        let address = match family.pod(index as usize) {
            IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            IpAddr::V6(address) => address.octets(),
        };
        model.backends.insert(index, Backend { address, generation: GENERATION, flags: 0 });
        let (pool, _) = POOLS[index as usize % 2];
        let member = Member::ready(GENERATION, Port::new(8080));
        model.members.insert(MemberKey { pool, backend: index }, member);
        model.slots.insert(pool % 2 * PODS + index / 2, index);
    }
    publish::<V4>(&mut model, Family::V4, &change);
    publish::<V6>(&mut model, Family::V6, &change);
    let mut kernel = Kernel::load(sizes, None)?;
    kernel.put(&model)?;
    Ok(kernel)
}

fn publish<A: ModelFamily>(model: &mut Model, family: Family, change: impl Fn(&mut Frontend)) {
    let (pool, _) = POOLS[usize::from(family == Family::V6)];
    for (at, flags) in [(service(family), AFFINITY), (plain_service(family), 0)] {
        let mut frontend = Frontend {
            timeout_ns: TIMEOUT_NS,
            service: 1,
            pool,
            group: GROUP,
            own: GROUP + 1,
            slot_first: pool % 2 * PODS,
            slot_count: PODS,
            seed: 5,
            select: Selection::Random as u8,
            timer: Timer::Connection as u8,
            prefix: 128,
            flags,
        };
        if flags == AFFINITY {
            change(&mut frontend);
        }
        let (address, port) = (address::<A>(at.ip()), Port::new(at.port()));
        A::frontends_mut(model).insert(FrontendKey::new(address, port, TCP), frontend);
        model.filter.borrow_mut().insert((Direction::Dnat, filter_bit(address, port, TCP)));
    }
    for (index, _) in (0..2 * PODS).zip(Family::BOTH.repeat(PODS as usize)).filter(|(_, of)| *of == family) {
        let pod = address::<A>(family.pod(index as usize));
        model.filter.borrow_mut().insert((Direction::RevDnat, filter_bit(pod, Port::new(8080), TCP)));
    }
}

/// Sends a segment to a service; returns the pod that it goes to.
pub(crate) fn send(kernel: &Kernel, hook: Hook, from: SocketAddr, to: SocketAddr, flags: u8) -> Result<IpAddr> {
    let frame = Frame::tcp(from, to, flags);
    // A reset has a number that the other side has acknowledged, as every other frame does.
    let frame = if flags & RST == 0 { frame } else { frame.numbers(2000, 0) }.build();
    let ran = kernel.run(hook, &frame)?;
    ensure!(ran.verdict == Verdict::Forward, "{from} to {to}: {:?}", ran.verdict);
    destination(&ran.frame)
}

/// Sends a pod's segment back to a client; it must come from the service.
pub(crate) fn answer(kernel: &Kernel, pod: IpAddr, to: SocketAddr, flags: u8) -> Result<()> {
    let frame = Frame::tcp(SocketAddr::new(pod, 8080), to, flags).build();
    let ran = kernel.run(Hook::TcReverse, &frame)?;
    ensure!(ran.verdict == Verdict::Forward, "{pod} to {to}: {:?}", ran.verdict);
    Ok(())
}

/// The address that a frame goes to.
pub(crate) fn destination(frame: &[u8]) -> Result<IpAddr> {
    let is_v4 = frame.get(12..14) == Some(&[0x08, 0x00]);
    let address = frame.get(if is_v4 { 30..34 } else { 38..54 }).context("a frame that ends early")?;
    Ok(if is_v4 {
        Ipv4Addr::from(<[u8; 4]>::try_from(address)?).into()
    } else {
        Ipv6Addr::from(<[u8; 16]>::try_from(address)?).into()
    })
}

/// The session of an IPv4 client.
pub(crate) fn session(kernel: &Kernel, client: IpAddr) -> Result<Session> {
    kernel.store.v4.sessions.get(&session_key(client))?.with_context(|| format!("{client} has no session"))
}

/// The key of an IPv4 client's session.
pub(crate) fn session_key(client: IpAddr) -> SessionKey<V4> {
    SessionKey::new(GROUP, address(client), 32)
}

/// Simulates the passing of time for an IPv4 client: its session and its flows become this much older.
pub(crate) fn age(kernel: &Kernel, client: IpAddr, by_ns: u64) -> Result<()> {
    let older = |time_ns: u64| time_ns.checked_sub(by_ns).context("this machine started too short a time ago");
    let session = session(kernel, client)?;
    let (created_ns, last_used_ns) = (older(session.created_ns)?, older(session.last_used_ns)?);
    kernel.store.v4.sessions.put(&session_key(client), &Session { created_ns, last_used_ns, ..session })?;
    let client: V4 = address(client);
    let flows: Vec<(FlowKey<V4>, Flow<V4>)> = kernel.store.v4.flows.iter().collect::<Result<_, _>>()?;
    for (key, flow) in flows.into_iter().filter(|(key, _)| key.saddr == client || key.daddr == client) {
        let (created_ns, last_used_ns) = (older(flow.created_ns)?, older(flow.last_used_ns)?);
        kernel.store.v4.flows.put(&key, &Flow { created_ns, last_used_ns, ..flow })?;
    }
    Ok(())
}

/// Whether a time is now, to the precision of the programs' clock.
pub(crate) fn is_now(time_ns: u64) -> bool {
    monotonic_ns().abs_diff(time_ns) < SECOND_NS
}

fn address<A: ModelFamily>(of: IpAddr) -> A {
    A::of(of).expect("an address of this family")
}
