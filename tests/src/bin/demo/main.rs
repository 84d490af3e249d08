//! `cargo xtask demo`: what affinity does, shown with real packets in a lab of network namespaces, in under a minute.
//!
//! Each act states what should hold, shows it, and judges the result. The last line lists the acts that held; the exit code is
//! 0 only if all did. In every case the lab is removed when the program ends.

mod acts;
mod scene;
mod stage;

use std::process::ExitCode;

use affinity_tests::lab::Interrupt;
use affinity_user::load;
use anyhow::{Result, bail, ensure};

use crate::{
    acts::{ACTS, Act},
    scene::Scene,
    stage::Stage,
};

const HELP: &str = "\
Shows affinity at work in a lab of network namespaces. Needs root.

Usage: cargo xtask demo [--keep]

Options:
      --keep  Leave the lab up afterwards, to play with, until Ctrl-C
  -h, --help  Print this help

Exit codes: 0 all held, 1 something did not, 2 usage error.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let keep = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--keep"] => true,
        ["-h" | "--help"] => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("error: unknown arguments: {}\n\n{HELP}", arguments.join(" "));
            return ExitCode::from(2);
        }
    };
    match perform(keep) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the whole demo; returns whether everything held.
fn perform(keep: bool) -> Result<bool> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the demo makes network namespaces and loads programs: run it as root"
    );
    // Reported before anything is set up, in one line.
    if let Some(refusal) = load::trial(&load::Options::default())?.first() {
        bail!("{refusal}; `affinity check` tells more");
    }
    let mut stage = Stage::new();
    let mut scene = Scene::set(&stage, Interrupt::listen()?)?;
    let told = ACTS.iter().try_for_each(|act| tell(act, &mut scene, &mut stage));
    if let Err(error) = &told {
        stage.trouble(error);
    }
    if keep && !scene.interrupt.came() {
        scene.invite(&stage);
        scene.interrupt.wait();
    }
    drop(scene);
    Ok(stage.close(ACTS.iter().map(|act| act.name)) && told.is_ok())
}

fn tell(act: &Act, scene: &mut Scene, stage: &mut Stage) -> Result<()> {
    scene.interrupt.check()?;
    stage.open(act.title);
    let finding = (act.tell)(scene, stage)?;
    stage.judge(act.name, finding.holds, &finding.evidence);
    Ok(())
}
