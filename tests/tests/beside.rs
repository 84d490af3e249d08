//! With kube-proxy: its rules are on the node, and each proxy serves its own services. A service changes from one proxy to the
//! other under load, and no connection breaks.

use std::time::Duration;

use affinity_tests::kubeproxy::Mode;
use affinity_tests::lab::{Client, Connection, Family, Lab, Protocol, Service, eventually};
use affinity_tests::story::{Hook, Route, report, web};
use anyhow::{Context, Result, ensure};

const PATIENCE: Duration = Duration::from_secs(10);
const CLIENTS: u32 = 20;

/// A second service on the same pods.
fn shop() -> Service {
    Service::new("shop", 11).tcp("http", 80, 8080).udp("dns", 53, 5353).on(0..3)
}

/// Runs a scenario on a node with kube-proxy's rules for these services, where affinity takes those with affinity.
fn beside(
    hook: Hook,
    mode: Mode,
    services: &[&Service],
    more: &[&str],
    story: impl FnOnce(&mut Lab) -> Result<()>,
) -> Result<()> {
    let mut lab = Lab::with_pods(3)?;
    services.iter().try_for_each(|service| lab.publish(service))?;
    let owned: Vec<Service> = services.iter().map(|service| (*service).clone()).collect();
    mode.install(&lab, &owned)?;
    let agent = lab.agent(&[hook.args().as_slice(), &["--services", "affinity"], more].concat())?;
    story(&mut lab).with_context(|| format!("the agent's log:\n{}", agent.log().join("\n")))
}

/// Every combination of a hook and a mode of kube-proxy.
fn everywhere(story: impl Fn(Hook, Mode) -> Result<()>) -> Result<()> {
    for mode in [Mode::Iptables, Mode::Nftables] {
        for hook in Hook::ALL {
            story(hook, mode).with_context(|| format!("{hook:?} beside {mode:?}"))?;
        }
    }
    Ok(())
}

/// One open connection of each client.
fn connect_all(client: &Client, clients: std::ops::Range<u32>, to: std::net::SocketAddr) -> Result<Vec<Connection>> {
    clients.map(|number| Ok(client.connect(Protocol::Tcp, Family::V4.client(number), to)?)).collect()
}

/// The pods that answer on each of these connections.
fn ask_all(connections: &mut [Connection]) -> Result<Vec<String>> {
    let asked = connections.iter_mut().enumerate();
    asked.map(|(number, open)| open.ask("/").with_context(|| format!("connection {number}"))).collect()
}

fn is_ours(lab: &Lab, service: &Service) -> Result<bool> {
    let services = lab.affinity_json(&["get", "services"])?;
    Ok(services.as_array().context("an array")?.iter().any(|row| row["service"] == service.full_name()))
}

#[test]
fn each_proxy_serves_its_own() -> Result<()> {
    everywhere(|hook, mode| {
        let (web, shop) = (web().client_ip(), shop());
        beside(hook, mode, &[&web, &shop], &[], |lab| {
            ensure!(is_ours(lab, &web)? && !is_ours(lab, &shop)?);
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let port = if protocol == Protocol::Tcp { "http" } else { "dns" };
                let ask = |service: &Service| {
                    lab.client().ask_all(protocol, 0..60, service.frontend(Family::V4, port)).context(port)
                };
                ensure!(ask(&web)? == ask(&web)?, "{port}: a client of web has moved");
                ensure!(ask(&shop)? != ask(&shop)?, "{port}: 60 clients of shop stayed by chance");
            }
            let pinned = lab.affinity_json(&["get", "sessions"])?;
            let pinned = pinned.as_array().context("an array")?;
            ensure!(pinned.iter().all(|pin| pin["service"] == web.full_name()), "{pinned:?}");
            Ok(())
        })
    })
}

#[test]
fn connections_survive_a_change_of_the_proxy() -> Result<()> {
    everywhere(|hook, mode| {
        let theirs = web();
        beside(hook, mode, &[&theirs], &[], |lab| {
            let (client, to) = (lab.client(), theirs.frontend(Family::V4, "http"));
            let mut before = connect_all(&client, 0..CLIENTS, to)?;
            let at_first = ask_all(&mut before)?;
            ensure!(lab.count("established")? == 0, "kube-proxy's service went through affinity");

            // Taken over: open connections stay where they are, new ones are pinned.
            let ours = web().client_ip();
            lab.publish_and_settle(&ours)?;
            ensure!(ask_all(&mut before)? == at_first, "an open connection moved");
            let mut between = connect_all(&client, 0..CLIENTS, to)?;
            let pinned = ask_all(&mut between)?;
            ensure!(ask_all(&mut between)? == pinned && ask_all(&mut before)? == at_first);
            ensure!(lab.client().ask_all(Protocol::Tcp, 0..CLIENTS, to)? == pinned, "a pinned client moved");
            ensure!(lab.count("other-proxy")? > 0);

            // Returned to kube-proxy.
            lab.publish(&theirs)?;
            eventually("the service is kube-proxy's again", PATIENCE, || Ok(!is_ours(lab, &ours)?))?;
            ensure!(ask_all(&mut between)? == pinned && ask_all(&mut before)? == at_first);
            let created = lab.count("created")?;
            let asked = lab.client().ask_all(Protocol::Tcp, 0..200, to)?;
            ensure!(asked.iter().collect::<std::collections::BTreeSet<_>>().len() == 3, "they do not spread");
            ensure!(lab.count("created")? == created, "a new connection went through affinity");
            ensure!(ask_all(&mut between)? == pinned && ask_all(&mut before)? == at_first);
            Ok(())
        })
    })
}

#[test]
fn shadow_mode_decides_and_counts_and_changes_nothing() -> Result<()> {
    everywhere(|hook, mode| {
        let web = web().client_ip();
        beside(hook, mode, &[&web], &["--shadow"], |lab| {
            for route in Route::all_to(&web).into_iter().filter(|route| route.family == Family::V4) {
                let seen = route.dial_all(lab, 0..200)?;
                ensure!(seen.len() == 200);
                ensure!(route.dial_all(lab, 0..200)? == seen, "kube-proxy pins 200 clients of 3 endpoints");
            }
            let sessions = lab.affinity_json(&["get", "sessions"])?;
            ensure!(sessions.as_array().context("an array")?.len() == 400, "each client is pinned in shadow");
            let services = lab.affinity_json(&["get", "services"])?;
            let row = &services[0];
            // A datagram socket that happens to get the port of the client's last one continues its flow.
            let pinned = row["connections"]["pinned"].as_u64().context("a number")?;
            ensure!(row["shadow"] == true && (398..=400).contains(&pinned), "{row}");
            for reason in ["established", "reply", "created", "pinned"] {
                ensure!(lab.count(reason)? == 0, "{reason}: a packet was changed");
            }
            let to = web.frontend(Family::V4, "http").to_string();
            let explained = lab.affinity_json(&["explain", "--from", "198.18.0.1", "--to", &to])?;
            ensure!(explained["verdict"] == "pass" && explained["reason"] == "shadow", "{explained}");
            ensure!(explained["candidates"].as_array().is_some_and(|candidates| candidates.len() == 1), "{explained}");
            let backends = lab.affinity_json(&["get", "backends"])?;
            let even: Vec<u64> =
                backends.as_array().context("an array")?.iter().filter_map(|row| row["sessions"].as_u64()).collect();
            report(&format!("{hook:?} beside {mode:?}: shadow pins by pod: {even:?}"));
            ensure!(even.iter().sum::<u64>() == 400);
            Ok(())
        })
    })
}
