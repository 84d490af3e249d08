//! The kernel programs against the model: random frames over random states must have equal results: verdict, bytes, counters,
//! events and every table. The explanation of a packet must match its result.
//!
//! `AFFINITY_SEED=N` runs another sequence; a failure names the seed that repeats it.

mod explain;
mod frames;
mod world;

use std::{collections::BTreeMap, env};

use affinity_common::{
    abi::{EventKind, REASONS, Reason},
    model::Model,
};
use affinity_tests::kernel::{Fixed, Hook, Kernel, OnProcessor, SMALL, State, limit, run_model};
use anyhow::{Context, Result, bail, ensure};

use crate::world::World;
use affinity_tests::dice::Dice;

/// The default sequence.
const SEED: u64 = 20;
/// Times and random numbers that the programs are loaded with: long after boot, and right after it.
const FIXED: [Fixed; 5] = [
    Fixed { now_ns: 1_000_000_000_000_000, random: 0 },
    Fixed { now_ns: 20_000_000_000_000, random: 0x2a5a_5a5a },
    Fixed { now_ns: 1_000_000_000_000_001, random: 0x7fff_ffff },
    Fixed { now_ns: 1, random: 0xc000_0000 },
    Fixed { now_ns: u64::MAX / 2, random: u32::MAX },
];
/// So few that a state has more frames to reject, and so many that most of these are rejected.
const REJECTIONS_PER_SECOND: u32 = 1;
const STATES_OF_EACH: usize = 80;
const FRAMES_OF_A_STATE: usize = 480;
/// A run in which something occurred less often than this has not tested it.
const OFTEN: u64 = 100;
/// The same for cases that need several matching frames.
const OFTEN_IN_A_ROW: u64 = 10;

/// The events of the whole run.
#[derive(Default)]
struct Coverage {
    frames: u64,
    refused_by_test_run: u64,
    counters: BTreeMap<(Hook, Reason), u64>,
    events: BTreeMap<u8, u64>,
}

fn seed() -> Result<u64> {
    match env::var("AFFINITY_SEED") {
        Ok(text) => text.parse().context("AFFINITY_SEED"),
        Err(_) => Ok(SEED),
    }
}

/// Loads the programs with each of [`FIXED`] and this limit, and runs a scenario over this many random states.
fn over_states(
    states_of_each: usize,
    rejections_per_second: u32,
    mut story: impl FnMut(&mut Kernel, Fixed, &mut Dice) -> Result<()>,
) -> Result<()> {
    let seed = seed()?;
    let mut dice = Dice::new(seed);
    for fixed in FIXED {
        let mut kernel = Kernel::load_limited(SMALL, Some(fixed), rejections_per_second)?;
        for state in 0..states_of_each {
            story(&mut kernel, fixed, &mut dice)
                .with_context(|| format!("AFFINITY_SEED={seed}, {fixed:?}, state {state}"))?;
        }
    }
    Ok(())
}

#[test]
fn random_frames_over_random_states_come_out_alike() -> Result<()> {
    let mut coverage = Coverage::default();
    // The model has one processor.
    let _first = OnProcessor::new(0)?;
    over_states(STATES_OF_EACH, REJECTIONS_PER_SECOND, |kernel, fixed, dice| {
        let mut world = World::new(dice, fixed);
        limit(&mut world.model, REJECTIONS_PER_SECOND);
        let frames: Vec<_> = (0..FRAMES_OF_A_STATE).map(|_| frames::random(dice, &world)).collect();
        run(kernel, &world.model, &frames, &mut coverage)
    })?;
    println!(
        "{} frames over {} states; {} more were too short for BPF_PROG_TEST_RUN",
        coverage.frames,
        FIXED.len() * STATES_OF_EACH,
        coverage.refused_by_test_run
    );
    check_coverage(&coverage)
}

/// Runs all frames through both and compares each result; then the tables. If those differ, runs the frames again and compares
/// the tables after each.
fn run(kernel: &mut Kernel, before: &Model, frames: &[(Hook, Vec<u8>)], coverage: &mut Coverage) -> Result<()> {
    let model = before.clone();
    kernel.put(&model)?;
    for (number, (hook, frame)) in frames.iter().enumerate() {
        if !hook.takes(frame) {
            coverage.refused_by_test_run += 1;
            continue;
        }
        coverage.frames += 1;
        let counted = model.counters.borrow().clone();
        let (ran, expected) = (kernel.run(*hook, frame)?, run_model(&model, *hook, frame));
        ensure!(
            ran == expected,
            "frame {number}, {hook:?}:\n{frame:02x?}\nin the kernel {ran:02x?}\nin the model {expected:02x?}"
        );
        for (reason, count) in model.counters.borrow().iter() {
            *coverage.counters.entry((*hook, *reason)).or_default() += count - counted.get(reason).unwrap_or(&0);
        }
    }
    for event in model.events.borrow().iter() {
        *coverage.events.entry(event.kind).or_default() += 1;
    }
    let differences = State::differences(&kernel.state()?, &State::of_model(&model));
    if differences.is_empty() { Ok(()) } else { find_first(kernel, before, frames) }
}

fn find_first(kernel: &mut Kernel, before: &Model, frames: &[(Hook, Vec<u8>)]) -> Result<()> {
    let model = before.clone();
    kernel.put(&model)?;
    for (number, (hook, frame)) in frames.iter().enumerate().filter(|(_, (hook, frame))| hook.takes(frame)) {
        let (_, ran) = (kernel.run(*hook, frame)?, run_model(&model, *hook, frame));
        let differences = State::differences(&kernel.state()?, &State::of_model(&model));
        if !differences.is_empty() {
            let differences = differences.join("\n");
            bail!("frame {number}, {hook:?}, {:?}:\n{frame:02x?}\n{differences}", ran.verdict);
        }
    }
    bail!("the tables differed at the end, but not when the same frames ran again")
}

/// Every reason that a frame can have occurred often, at every hook where it can.
fn check_coverage(coverage: &Coverage) -> Result<()> {
    let mut seldom = Vec::new();
    for &hook in &Hook::ALL {
        for &reason in REASONS.iter().filter(|reason| can_meet(hook, **reason)) {
            let count = coverage.counters.get(&(hook, reason)).copied().unwrap_or(0);
            println!("{hook:?} {}: {count}", reason.name());
            let in_a_row = matches!(reason, Reason::Masqueraded | Reason::Returned | Reason::LaterFragment);
            if count < if in_a_row { OFTEN_IN_A_ROW } else { OFTEN } {
                seldom.push(format!("{hook:?} {}: {count}", reason.name()));
            }
        }
    }
    for kind in [EventKind::Created, EventKind::Expired, EventKind::Moved] {
        let count = coverage.events.get(&(kind as u8)).copied().unwrap_or(0);
        if count < OFTEN {
            seldom.push(format!("event {}: {count}", kind.name()));
        }
    }
    ensure!(coverage.frames >= 100_000, "{} frames", coverage.frames);
    ensure!(seldom.is_empty(), "met less than {OFTEN} times: {}", seldom.join(", "));
    let beyond = coverage.counters.iter().filter(|((hook, reason), count)| **count > 0 && !can_meet(*hook, *reason));
    let beyond: Vec<_> = beyond.map(|((hook, reason), count)| format!("{hook:?} {}: {count}", reason.name())).collect();
    ensure!(beyond.is_empty(), "met where none was expected: {}", beyond.join(", "));
    Ok(())
}

/// Whether a frame can have a reason in this test. Here no table is ever full, and no other processor runs.
fn can_meet(hook: Hook, reason: Reason) -> bool {
    let is_forward = hook != Hook::TcReverse;
    match reason {
        Reason::NotIp
        | Reason::Truncated
        | Reason::Malformed
        | Reason::Fragment
        | Reason::OtherProtocol
        | Reason::RelatedError
        | Reason::LaterFragment => true,
        Reason::NotReply | Reason::Reply | Reason::Masqueraded => !is_forward,
        Reason::NotFrontend
        | Reason::Established
        | Reason::Selected
        | Reason::Created
        | Reason::Pinned
        | Reason::Expired
        | Reason::BackendGone
        | Reason::NotReady
        | Reason::NotMember
        | Reason::NoEndpoints
        | Reason::FlowGone
        | Reason::NotAnswered
        | Reason::OtherProxy
        | Reason::Shadow
        | Reason::NotInRanges
        | Reason::NoLocalEndpoints
        | Reason::PortsExhausted
        | Reason::RejectionLimited
        | Reason::Returned
        | Reason::NotOurs
        | Reason::PortChanged
        | Reason::Inconsistent => is_forward,
        // A group with equal scopes: the pin is neither usable nor absent.
        Reason::SessionNotStored => is_forward,
        Reason::NoReplyBuilt
        | Reason::NotRewritten
        | Reason::FlowNotStored
        | Reason::SocketNotStored
        | Reason::EventLost
        | Reason::OperatorPinned
        | Reason::TableFull
        | Reason::Redirected
        | Reason::OtherHost => false,
    }
}
