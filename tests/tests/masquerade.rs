//! Connections that leave with the node's address, with real sockets: the node has only so many ports.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use affinity_tests::lab::{Connection, Family, Frontend, Lab, Options, Protocol, Service, eventually};
use affinity_tests::story::tell_in;
use anyhow::{Context, Result, ensure};

/// As many as `ARGS` grants.
const PORTS: u32 = 16;
const ARGS: [&str; 7] = ["--device", "wire0", "pod*", "--xdp", "off", "--masquerade-ports", "20000-20015"];
/// "At once", for what must not wait for a time-out.
const AT_ONCE: Duration = Duration::from_millis(900);
/// How long a port may take to be free again, once its connection has been closed.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

fn exhausted(lab: &Lab) -> Result<u64> {
    let counters = lab.affinity_json(&["get", "counters"])?;
    let rows = counters.as_array().context("an array")?;
    let row = rows.iter().find(|row| row["reason"] == "ports-exhausted").context("it has a counter")?;
    row["packets"].as_u64().with_context(|| row.to_string())
}

#[test]
fn a_connection_beyond_the_nodes_ports_is_refused_and_a_closed_one_makes_room() -> Result<()> {
    let web = Service::new("web", 10).tcp("http", 80, 8080).node_ports(30_080).on([0]);
    tell_in(&Options { pods: 1, ..Options::default() }, &ARGS, &[&web], |lab, _| {
        for family in Family::BOTH {
            let to = web.address(Frontend::NodePort, family, Protocol::Tcp).context("a node port")?;
            let dial = |number: u32| lab.client().connect(Protocol::Tcp, family.client(number), to);
            let mut open: Vec<Connection> = (0..PORTS).map(dial).collect::<Result<_, _>>()?;
            for connection in &mut open {
                let seen: std::net::IpAddr = connection.ask("/client")?.parse()?;
                ensure!(family.node_addresses().contains(&seen), "the pod sees {seen}");
            }
            let (before, began) = (exhausted(lab)?, Instant::now());
            let kind = dial(PORTS).map(drop).map_err(|error| error.kind());
            ensure!(kind == Err(ErrorKind::ConnectionRefused) && began.elapsed() < AT_ONCE, "{kind:?}");
            ensure!(exhausted(lab)? > before, "it is counted");
            for connection in &mut open {
                connection.ask("/").context("those that are there go on")?;
            }
            drop(open.pop());
            eventually("the closed connection's port serves another", CLOSE_PATIENCE, || Ok(dial(PORTS).is_ok()))?;
        }
        Ok(())
    })
}
