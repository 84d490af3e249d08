//! The agent as `deploy/` runs it.

use affinity_tests::lab::{CAPABILITIES, Lab};
use affinity_tests::story::{Hook, Route, web};
use anyhow::{Result, ensure};

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
