//! Many devices appear and disappear at once, and the agent keeps up. A separate binary, because it keeps the kernel's network
//! configuration busy for all namespaces, so no other test may run at the same time.

use std::fs;
use std::time::{Duration, Instant};

use affinity_tests::lab::{Agent, Lab, Options, eventually};
use affinity_tests::patience::patience;
use affinity_tests::story::{Route, report, tell_in, web};
use anyhow::{Result, ensure};

/// Number of devices that appear and disappear at once.
const CROWD: usize = 1_100;
/// The kernel waits for two grace periods for each attached device, one after another.
const PATIENCE: Duration = Duration::from_secs(90);

/// The number of pins of attachments, counted without the agent's program.
fn pins(lab: &Lab) -> Result<usize> {
    let versions = fs::read_dir(lab.pin_dir())?.collect::<Result<Vec<_>, _>>()?;
    versions.iter().try_fold(0, |sum, version| Ok(sum + fs::read_dir(version.path().join("links"))?.count()))
}

#[test]
fn a_thousand_devices_come_and_go_without_trouble() -> Result<()> {
    let web = web().client_ip();
    tell_in(&Options::default(), &[], &[&web], |lab, agent| {
        let elsewhere = lab.client_namespace().name().to_owned();
        let before = pins(lab)?;
        let appear: String = (0..CROWD)
            .map(|n| format!("link add crowd{n} group 7 type veth peer name far{n} netns {elsewhere}\n"))
            .collect();
        let vanish = String::from("link del group 7\n");
        for (what, script, expected) in [("appear", appear, before + 2 * CROWD), ("vanish", vanish, before)] {
            watch(lab, agent, what, &script, expected)?;
        }
        for route in Route::all_to(&web) {
            route.dial(lab, 2, 2)?;
        }
        Ok(())
    })
}

/// Runs a script that changes many devices, and waits until as many attachments are there as expected.
fn watch(lab: &Lab, agent: &Agent, what: &str, script: &str, expected: usize) -> Result<()> {
    let (start, cpu) = (Instant::now(), agent.cpu_time()?);
    // `ip` keeps a descriptor open for each namespace that a script names, and may have a thousand.
    for lines in script.lines().collect::<Vec<_>>().chunks(500) {
        lab.node().ip(&lines.join("\n"))?;
    }
    let made = start.elapsed();
    eventually(&format!("the agent has seen {CROWD} devices {what}"), PATIENCE, || Ok(pins(lab)? == expected))?;
    let (elapsed, spent) = (start.elapsed(), agent.cpu_time()? - cpu);
    report(&format!(
        "{CROWD} devices {what} within {made:.1?}; all in step after {elapsed:.1?}, for {spent:.1?} of processor time"
    ));
    ensure!(spent < patience(elapsed / 5), "{spent:?} of processor time");
    Ok(())
}
