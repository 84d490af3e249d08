//! The interactive output: `affinity top`, `get --watch` and progress, in a terminal, over a dataplane with real pins.

use std::net::IpAddr;
use std::process::Command;

use affinity_common::abi::{Session, SessionKey, V4};
use affinity_tests::lab::{Family, Lab, Load, Options, Protocol, Service, Terminal};
use affinity_tests::patience::fewer;
use affinity_tests::story::{Hook, Route, tell, tell_in, web};
use affinity_user::store::kernel::KernelStore;
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

/// The default size of a terminal.
const SIZE: (u16, u16) = (80, 24);

/// `affinity ARGS` in a terminal.
fn terminal(lab: &Lab, args: &[&str], (columns, rows): (u16, u16)) -> Result<Terminal> {
    let mut command = lab.affinity_command()?;
    command.args(args);
    Terminal::start(command, columns, rows)
}

const TOP: &[&str] = &["top", "--interval", "200ms"];

fn top(lab: &Lab) -> Result<Terminal> {
    terminal(lab, TOP, SIZE)
}

/// Pins this many IPv4 clients.
fn pin(lab: &Lab, service: &Service, clients: u32) -> Result<Vec<IpAddr>> {
    let route = Route::all_to(service)[0];
    route.dial_all(lab, 0..clients)?;
    Ok((0..clients).map(|client| route.client(client)).collect())
}

#[test]
fn keys_select_a_client_and_unpin_it() -> Result<()> {
    let web = web().client_ip();
    tell(Hook::XdpNative, &[&web], |lab, _| {
        let clients = pin(lab, &web, 12)?;
        let mut top = top(lab)?;
        top.shows("1 service  3 pods  12 pins")?;
        top.press("\r")?;
        top.shows("12 clients")?;
        for pod in ["pod-0", "pod-1", "pod-2"] {
            top.shows(pod)?;
        }
        let chosen = clients[7].to_string();
        top.press(&format!("/{chosen}\r"))?;
        top.shows(&format!("1 client like `{chosen}`"))?;
        top.press("u")?;
        top.shows(&format!("Unpin {chosen} from its pod of default/web?"))?;
        ensure!(lab.sessions(&web, Some(clients[7]))?.len() == 1, "unpinned without a yes");
        top.press("n")?;
        top.wait_for("the question has gone", |screen| !screen.contains("Unpin "))?;
        top.press("uy")?;
        top.shows(&format!("unpinned {chosen} of default/web"))?;
        assert_eq!(lab.sessions(&web, Some(clients[7]))?.len(), 0);
        assert_eq!(lab.sessions(&web, None)?.len(), 11);
        top.shows(&format!("unpinned default/web {chosen}"))?;

        top.press("\x1b")?;
        top.shows("11 clients")?;
        top.press("Uy")?;
        top.shows("unpinned 11 clients of default/web")?;
        assert!(lab.sessions(&web, None)?.is_empty());
        top.shows("0 clients")?;
        top.press("q")?;
        ensure!(top.wait()?.success());
        top.is_given_back()
    })
}

#[test]
fn rates_and_pins_follow_what_happens() -> Result<()> {
    let (web, idle) = (web().client_ip(), Service::new("idle", 11).tcp("http", 80, 8080).client_ip().on(0..1));
    tell(Hook::XdpNative, &[&web, &idle], |lab, _| {
        // A slow machine adds a note to the first line, which does not fit beside it in 80 columns.
        let mut top = terminal(lab, TOP, (120, 24))?;
        top.shows("0 pins  0 connections/s")?;
        let load = Load::start(&lab.client(), Protocol::Tcp, 0..30, web.frontend(Family::V4, "http"));
        top.wait_for("30 pins and a rate", |screen| {
            screen.contains("30 pins") && !screen.contains(" 0 connections/s")
        })?;
        load.stop()?.undisturbed()?;
        top.shows(" 0 connections/s")?;
        // The busiest is first, until another order is selected.
        let first = |screen: &str| screen.lines().nth(2).is_some_and(|line| line.contains("default/web"));
        top.wait_for("default/web first", first)?;
        top.press("r")?;
        top.wait_for("default/idle first", |screen| !first(screen))?;
        top.press("/WEB")?;
        top.wait_for("the filter leaves one", |screen| !screen.contains("default/idle"))?;
        // A signal to redraw comes only with a terminal's session; the next frame has the new size even without it.
        top.resize(40, 10)?;
        top.wait_for("a frame of the new size", |screen| {
            screen.contains("default/web") && !screen.contains("MOVED/S") && screen.lines().count() == 10
        })?;
        top.press("\r")?;
        lab.withdraw(&web)?;
        top.wait_for("the service is listed no more", |screen| !screen.contains("default/web"))
    })
}

#[test]
fn the_terminal_is_restored_on_every_exit() -> Result<()> {
    let web = web().client_ip();
    tell(Hook::Tc, &[&web], |lab, agent| {
        for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
            let mut top = top(lab)?;
            top.shows("1 service")?;
            ensure!(top.is_given_back().is_err(), "it was not taken");
            top.signal(signal)?;
            ensure!(top.wait()?.success(), "{signal:?}");
            top.is_given_back()?;
        }
        let mut top = top(lab)?;
        top.shows("1 service")?;
        agent.kill()?;
        lab.affinity(&["detach"])?;
        top.shows("no dataplane at")?;
        agent.restart()?;
        top.wait_for("the dataplane is back", |screen| screen.contains("1 service") && screen.contains("? help"))?;
        top.press("\x03")?;
        ensure!(top.wait()?.success());
        top.is_given_back()
    })
}

#[test]
fn the_terminal_is_restored_before_a_panic_is_printed() -> Result<()> {
    let mut terminal = Terminal::start(Command::new(env!("CARGO_BIN_EXE_panic_on_screen")), SIZE.0, SIZE.1)?;
    ensure!(!terminal.wait()?.success());
    terminal.is_given_back()?;
    terminal.shows("on purpose")
}

#[test]
fn top_once_prints_plain_text() -> Result<()> {
    let web = web().client_ip();
    tell(Hook::XdpNative, &[&web], |lab, _| {
        let clients = pin(lab, &web, 5)?;
        let text = lab.affinity(&["top", "--once", "--interval", "100ms"])?;
        assert!(text.starts_with("affinity top  1 service  3 pods  5 pins  0 connections/s"), "{text}");
        assert!(text.contains("created default/web 198.18.0."), "{text}");
        ensure!(!text.contains('\x1b') && text.lines().all(|line| line.chars().count() <= 100), "{text}");
        let text = lab.affinity(&["top", "--once", "--interval", "100ms", "--service", "default/web"])?;
        for client in &clients {
            ensure!(text.contains(&client.to_string()), "{client} in {text}");
        }
        let missing = lab.affinity_command()?.args(["top", "--once", "--service", "default/none"]).output()?;
        assert_eq!(missing.status.code(), Some(3));
        let no_terminal = lab.affinity_command()?.arg("top").output()?;
        assert_eq!(no_terminal.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&no_terminal.stderr).contains("--once"));
        Ok(())
    })
}

#[test]
fn watching_repaints_in_place() -> Result<()> {
    let web = web().client_ip();
    tell(Hook::XdpNative, &[&web], |lab, _| {
        pin(lab, &web, 1)?;
        let mut watch = terminal(lab, &["get", "sessions", "--watch"], SIZE)?;
        watch.shows("198.18.0.0 ")?;
        pin(lab, &web, 3)?;
        watch.shows("198.18.0.2 ")?;
        let titles = watch.text().lines().filter(|line| line.starts_with("SERVICE")).count();
        assert_eq!(titles, 1, "{}", watch.text());
        lab.affinity(&["unpin", "--service", "default/web", "--all"])?;
        watch.shows("no sessions")?;
        watch.wait_for("the rows have gone", |screen| !screen.contains("198.18.0."))?;
        watch.signal(Signal::INT)?;
        watch.wait()?;
        watch.is_given_back()
    })
}

#[test]
fn long_commands_show_progress_and_clear_it() -> Result<()> {
    let web = web().client_ip();
    with_large_tables(&web, |lab| {
        let pinned = fill(lab, &web)?;
        let mut unpin = terminal(lab, &["unpin", "--service", "default/web", "--all"], SIZE)?;
        unpin.shows("unpinning: ")?;
        ensure!(unpin.wait()?.success());
        unpin.shows("unpinned ")?;
        unpin.wait_for("the progress has gone", |screen| !screen.contains("unpinning: "))?;
        ensure!(lab.sessions(&web, None)?.is_empty(), "of {pinned}");
        unpin.is_given_back()
    })
}

/// A lab with tables that have room for [`fill`].
fn with_large_tables(service: &Service, story: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    let args = [Hook::XdpNative.args().as_slice(), &["--max-sessions", "600000"]].concat();
    tell_in(&Options::default(), &args, &[service], |lab, _| story(lab))
}

/// Fills the session table with so many pins that no machine lists them within a second. Slow machines get fewer.
fn fill(lab: &Lab, service: &Service) -> Result<u32> {
    let pins = fewer(400_000);
    pin(lab, service, 1)?;
    let store = KernelStore::open(lab.pin_dir())?;
    let (key, session): (SessionKey<V4>, Session) = store.v4.sessions.iter().next().context("a pin")??;
    for number in 0..pins {
        store.v4.sessions.put(&SessionKey { client: V4((0x0a00_0000 + number).to_be_bytes()), ..key }, &session)?;
    }
    Ok(pins)
}

#[test]
fn clients_of_a_large_table_come_in_slices() -> Result<()> {
    let web = web().client_ip();
    with_large_tables(&web, |lab| {
        fill(lab, &web)?;
        let mut top = top(lab)?;
        top.shows("1 service")?;
        top.press("\r")?;
        top.shows("only 1000 are listed")?;
        // Keys are handled during a pass.
        top.press("?")?;
        top.shows("this help")?;
        top.press("x/10.0.7.77\r")?;
        top.wait_for("the one client that was asked for", |screen| screen.contains("1 client like `10.0.7.77`"))?;
        top.press("q")?;
        ensure!(top.wait()?.success());
        top.is_given_back()
    })
}
