//! The agent's life cycle: what it leaves in place in each way to end, and how it handles its input.

use std::fs;
use std::io::Write as _;
use std::time::Duration;

use affinity_tests::kubeproxy::Mode;
use affinity_tests::lab::{Agent, Family, Lab, Load, Options, Protocol, Service, eventually};
use affinity_tests::story::{Hook, Route, report, tell, tell_in, web};
use anyhow::{Context, Result, ensure};

const SYNC_PATIENCE: Duration = Duration::from_secs(10);

/// Clients on new and on kept connections over both families and protocols, while something happens to the agent.
fn traffic_survives(hook: Hook, event: impl FnOnce(&mut Lab, &mut Agent) -> Result<()>) -> Result<()> {
    let web = web().client_ip();
    tell(hook, &[&web], |lab, agent| {
        let loads = Route::all_to(&web).map(|route| {
            let first = if route.protocol == Protocol::Tcp { 0 } else { 1000 };
            Load::start(&lab.client(), route.protocol, first..first + 50, route.to)
        });
        loads.iter().try_for_each(|load| load.wait_for(300))?;
        event(lab, agent)?;
        loads.iter().try_for_each(|load| load.wait_for(300))?;
        loads.into_iter().try_for_each(|load| load.stop()?.undisturbed())
    })
}

#[test]
fn traffic_survives_agent_restart() -> Result<()> {
    for hook in Hook::ALL {
        traffic_survives(hook, |_, agent| {
            agent.kill()?;
            // Time in which clients are served without an agent.
            std::thread::sleep(Duration::from_millis(500));
            agent.restart()
        })?;
    }
    Ok(())
}

#[test]
fn traffic_survives_repeated_attach() -> Result<()> {
    for hook in Hook::ALL {
        traffic_survives(hook, |lab, agent| {
            agent.kill()?;
            let source = lab.source().display().to_string();
            for _ in 0..3 {
                lab.affinity(&[["attach", "--source", &source].as_slice(), &hook.args()].concat())?;
            }
            agent.restart()
        })?;
    }
    Ok(())
}

#[test]
fn pins_and_their_ids_outlive_the_agent() -> Result<()> {
    let web = web().client_ip();
    tell(Hook::XdpNative, &[&web], |lab, agent| {
        let routes = Route::all_to(&web);
        let before: Vec<_> = routes.iter().map(|route| route.dial_all(lab, 0..200)).collect::<Result<_>>()?;
        agent.kill()?;
        // A service that sorts first would take the first ids, if ids were not restored.
        lab.publish(&Service::new("a", 5).tcp("http", 80, 8080).client_ip().on([2, 1]))?;
        agent.restart()?;
        let after: Vec<_> = routes.iter().map(|route| route.dial_all(lab, 0..200)).collect::<Result<_>>()?;
        assert_eq!(before, after);
        Ok(())
    })
}

#[test]
fn sigterm_keeps_the_dataplane_and_detach_removes_it() -> Result<()> {
    let (lab, web) = (Lab::with_pods(3)?, web().client_ip());
    lab.publish(&web)?;
    lab.agent(&Hook::XdpNative.args())?.terminate()?;
    for route in Route::all_to(&web) {
        let pods = route.dial(&lab, 1, 5)?;
        assert!(pods.iter().all(|pod| *pod == pods[0]), "{pods:?}");
    }
    lab.affinity(&["detach"])?;
    assert_not_served(&lab, &web);
    Ok(())
}

#[test]
fn detach_on_exit_leaves_nothing_attached() -> Result<()> {
    let (lab, web) = (Lab::with_pods(3)?, web().client_ip());
    lab.publish(&web)?;
    let agent = lab.agent(&[Hook::XdpNative.args().as_slice(), &["--detach-on-exit"]].concat())?;
    Route::all_to(&web)[0].dial(&lab, 1, 1)?;
    agent.terminate()?;
    assert_not_served(&lab, &web);
    Ok(())
}

#[test]
fn attach_syncs_once_and_leaves_the_dataplane_running() -> Result<()> {
    let (lab, web) = (Lab::with_pods(3)?, web().client_ip());
    lab.publish(&web)?;
    let source = lab.source().display().to_string();
    lab.affinity(&[["attach", "--source", &source].as_slice(), &Hook::Tc.args()].concat())?;
    for route in Route::all_to(&web) {
        route.dial(&lab, 1, 3)?;
    }
    lab.affinity(&["detach", "--device", affinity_tests::lab::WIRE])?;
    assert_not_served(&lab, &web);
    Ok(())
}

#[test]
fn a_device_that_appears_later_is_attached() -> Result<()> {
    let (mut lab, web) = (Lab::with_pods(4)?, web().client_ip());
    lab.publish(&web)?;
    let _agent = lab.agent(&["--device", "pod*", "--xdp", "off"])?;
    lab.kill_pod(3)?;
    lab.return_pod(3)?;
    let to = web.frontend(Family::V4, "http");
    eventually("the new pod reaches the service", SYNC_PATIENCE, || {
        Ok(lab.pod_client(3).http_get(Family::V4.pod(3), to, "/").is_ok())
    })
}

#[test]
fn bad_files_are_named_and_take_nothing_down() -> Result<()> {
    let web = web().client_ip();
    tell(Hook::XdpNative, &[&web], |lab, agent| {
        let load = Load::start(&lab.client(), Protocol::Tcp, 0..20, web.frontend(Family::V4, "http"));
        lab.publish_text("broken.yaml", "apiVersion: v1\nkind: Service\nmetadata: [not, a, mapping\n")?;
        let odd = Service::new("odd", 12).tcp("http", 80, 8080).client_ip().on(0..3).annotated("timer", "sometimes");
        lab.publish(&odd)?;
        for name in ["broken.yaml", "affinity.dev/timer"] {
            eventually(&format!("the log names {name}"), SYNC_PATIENCE, || {
                Ok(agent.log().iter().any(|line| line.contains(name)))
            })?;
        }
        lab.publish_and_settle(&Service::new("later", 13).tcp("http", 80, 8080).on(0..3))?;
        fs::remove_file(lab.source().join("broken.yaml"))?;
        load.wait_for(100)?;
        load.stop()?.undisturbed()
    })
}

/// As with `kubectl get ... > all.yaml`: the shell truncates the file, and it is filled a moment later.
#[test]
fn file_being_written_breaks_nothing() -> Result<()> {
    let web = web().client_ip();
    tell(Hook::Tc, &[&web], |lab, agent| {
        let load = Load::start(&lab.client(), Protocol::Tcp, 0..20, web.frontend(Family::V4, "http"));
        load.wait_for(50)?;
        let file = lab.source().join("web.yaml");
        let text = fs::read_to_string(&file)?;
        let mut written = fs::File::create(&file)?;
        let says = |what: &str| agent.log().iter().any(|line| line.contains(what));
        eventually("the log says that it waits", SYNC_PATIENCE, || Ok(says("INFO") && says("is being written")))?;
        let (first, rest) = text.split_at(text.len() / 2);
        written.write_all(first.as_bytes())?;
        load.wait_for(200)?;
        written.write_all(rest.as_bytes())?;
        drop(written);
        eventually("the log says that it waits no longer", SYNC_PATIENCE, || Ok(says("resolved: ")))?;
        load.wait_for(50)?;
        ensure!(!says("has removed all of its objects"), "{:#?}", agent.log());
        load.stop()?.undisturbed()?;

        fs::write(&file, "")?;
        let warning = "WARN the source has removed all of its objects: 1 Service and 2 EndpointSlices";
        eventually("the log counts what is withdrawn", SYNC_PATIENCE, || Ok(says(warning)))?;
        lab.settle_deleted(&web)?;
        assert_not_served(lab, &web);
        Ok(())
    })
}

#[test]
fn every_line_of_a_json_log_is_an_object() -> Result<()> {
    let web = web().client_ip();
    let args = [Hook::Tc.args().as_slice(), &["--log-format", "json", "-v"]].concat();
    tell_in(&Options::default(), &args, &[&web], |lab, agent| {
        lab.publish_text("broken.yaml", "apiVersion: v1\nkind: Service\nmetadata: [not,\n a, mapping\n")?;
        eventually("the log names broken.yaml", SYNC_PATIENCE, || {
            Ok(agent.log().iter().any(|line| line.contains("broken.yaml")))
        })?;
        let mut lines = agent.log();
        ensure!(lines.iter().any(|line| line.contains(r#""state":"ready""#)), "{lines:?}");
        // A second agent without a dataplane, and wrong command lines.
        let source = lab.source().display().to_string();
        for args in [["--source", &source, "--device", "none"], ["--source", &source, "--no-such-option", "1"]] {
            let mut command = lab.affinity_command()?;
            let ended = command.arg("run").args(args).args(["--log-format", "json"]).output()?;
            ensure!(!ended.status.success(), "{args:?}");
            let written = [ended.stdout, ended.stderr].concat();
            lines.extend(String::from_utf8(written)?.lines().map(str::to_owned));
        }
        for line in &lines {
            let entry: serde_json::Value = serde_json::from_str(line).with_context(|| line.clone())?;
            for field in ["timestamp", "level", "message"] {
                ensure!(entry[field].is_string(), "no {field} in {line}");
            }
        }
        Ok(())
    })
}

#[test]
fn a_withdrawn_service_is_served_no_longer() -> Result<()> {
    let web = web().client_ip();
    tell(Hook::Tc, &[&web], |lab, _| {
        lab.withdraw(&web)?;
        let route = Route::all_to(&web)[0];
        eventually("the frontend is gone", SYNC_PATIENCE, || {
            Ok(lab.explain(route.protocol, route.client(1), route.to)?.verdict == "pass")
        })?;
        assert_not_served(lab, &web);
        Ok(())
    })
}

/// The comparison in the README: clients that stay on one pod in five rounds, over three pods.
#[test]
fn affinity_holds_where_xt_recent_has_forgotten() -> Result<()> {
    const ROUNDS: usize = 5;
    let web = web().client_ip();
    let to = web.frontend(Family::V4, "http");
    let stay = |lab: &Lab, clients: u32| -> Result<usize> {
        let first = lab.client().ask_all(Protocol::Tcp, 0..clients, to)?;
        let mut stayed = vec![true; first.len()];
        for _ in 1..ROUNDS {
            let again = lab.client().ask_all(Protocol::Tcp, 0..clients, to)?;
            stayed.iter_mut().zip(first.iter().zip(&again)).for_each(|(stayed, (first, again))| {
                *stayed &= first == again;
            });
        }
        Ok(stayed.into_iter().filter(|stayed| *stayed).count())
    };
    let sizes = [100, 400, 1_000, 5_000];
    tell(Hook::XdpNative, &[&web], |lab, _| {
        for clients in sizes {
            let stayed = stay(lab, clients)?;
            report(&format!("affinity: {stayed} of {clients} clients stay"));
            ensure!(stayed == usize::try_from(clients)?, "{stayed} of {clients}");
        }
        Ok(())
    })?;
    for clients in sizes {
        let lab = Lab::with_pods(3)?;
        Mode::Iptables.install(&lab, std::slice::from_ref(&web))?;
        let stayed = stay(&lab, clients)?;
        report(&format!("iptables: {stayed} of {clients} clients stay"));
        ensure!(clients < 400 || stayed < usize::try_from(clients / 2)?, "{stayed} of {clients}");
    }
    Ok(())
}

/// No pod answers at any frontend of the service.
fn assert_not_served(lab: &Lab, service: &Service) {
    for route in Route::all_to(service) {
        assert!(route.dial(lab, 1, 1).is_err(), "by {route:?}");
    }
}
