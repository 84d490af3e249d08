//! The agent as `deploy/` runs it.

use affinity_tests::lab::{CAPABILITIES, Lab, MemoryLimit};
use affinity_tests::story::{Hook, Route, web};
use anyhow::{Context, Result, ensure};

#[test]
fn the_capabilities_of_the_tight_variant_are_enough() -> Result<()> {
    for hook in Hook::ALL {
        let (lab, web) = (Lab::with_pods(3)?, web().client_ip());
        lab.publish(&web)?;
        let mut agent = lab.confined_agent(&CAPABILITIES, &hook.args())?;
        let dial =
            || Route::all_to(&web).map(|route| route.dial_all(&lab, 0..50)).into_iter().collect::<Result<Vec<_>>>();
        let before = dial()?;
        // The next agent finds the maps and the links of this one.
        agent.kill()?;
        agent.restart()?;
        assert_eq!(dial()?, before);
        agent.terminate()?;
    }
    Ok(())
}

#[test]
fn each_of_the_capabilities_is_needed() -> Result<()> {
    let (lab, web) = (Lab::with_pods(3)?, web().client_ip());
    lab.publish(&web)?;
    for lacking in CAPABILITIES {
        let rest: Vec<_> = CAPABILITIES.into_iter().filter(|name| *name != lacking).collect();
        ensure!(lab.confined_agent(&rest, &Hook::Tc.args()).is_err(), "the agent runs without {lacking}");
    }
    Ok(())
}

#[test]
fn tables_fit_the_memory_limit_of_a_container() -> Result<()> {
    let (lab, web) = (Lab::with_pods(3)?, web().client_ip());
    lab.publish(&web)?;
    let limit = MemoryLimit::create(200 << 20)?;
    let agent = lab.limited_agent(&limit, &Hook::Tc.args())?;
    let log = agent.log().join("\n");
    let (_, said) = log.split_once("tables take ").context("the log says nothing of the tables")?;
    ensure!(said.contains(" MiB of the cgroup's memory limit of 200 MiB"), "{said}");
    let mib: u64 = said.split(' ').next().context("a number")?.parse()?;
    ensure!(mib <= 100, "the tables take {mib} MiB of 200");
    Route::all_to(&web).iter().try_for_each(|route| route.dial_all(&lab, 0..10).map(drop))?;
    agent.terminate()
}

#[test]
fn tables_that_do_not_fit_are_refused_with_the_reason_and_advice() -> Result<()> {
    let (lab, web) = (Lab::with_pods(3)?, web().client_ip());
    lab.publish(&web)?;
    let limit = MemoryLimit::create(120 << 20)?;
    let sizes = ["--max-sessions", "1000000", "--max-flows", "2000000"];
    let refused = lab.limited_agent(&limit, &[Hook::Tc.args().as_slice(), &sizes].concat());
    let error = format!("{:#}", refused.err().context("the agent runs")?);
    for part in [
        "cannot be created: Cannot allocate memory",
        "(os error 12)",
        "the cgroup's memory limit of 120 MiB",
        "lower --max-sessions",
    ] {
        ensure!(error.contains(part), "no {part:?} in: {error}");
    }
    Ok(())
}
