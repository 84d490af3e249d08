//! `affinity top`: services, their pods and their clients, live, in a terminal.
//!
//! Data flows in one direction. [`sampler`] reads the pinned maps, as the CLI does, and returns a [`sample::Sample`]. A
//! [`state::State`] computes rates and rows from two samples, and handles keys. [`draw`] draws the state into cells. Only the
//! sampler and the terminal have side effects, so everything else is tested as values. The work is bounded: the small tables
//! are read once an interval; sessions are read only for the clients of one service, a slice at a time.

pub mod clients;
pub mod draw;
pub mod input;
pub mod list;
pub mod rows;
pub mod sample;
pub mod sampler;
pub mod state;
mod terminal;
pub mod unpin;

#[cfg(test)]
mod tests;

use std::{
    io,
    path::PathBuf,
    sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    thread,
    time::{Duration, Instant},
};

use ratatui::{buffer::Buffer, layout::Rect};

pub use self::terminal::Screen;
use self::{
    input::action,
    sampler::Sampler,
    state::{Effect, State},
    terminal::Input,
};
use crate::{
    store::{StoreError, kernel::OpenError},
    sys::SysError,
};

/// The width of the output of [`once`].
pub const ONCE_WIDTH: u16 = 100;
/// The pause between two slices of long work, which leaves time for keys and for other processes.
const SLICE_PAUSE: Duration = Duration::from_millis(5);

/// The wait while paused: only keys have an effect then.
const PAUSED: Duration = Duration::from_secs(60);

/// What to show, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The directory in which the dataplane is pinned.
    pub pin_dir: PathBuf,
    /// The time between two samples.
    pub interval: Duration,
    /// Begin with this service's screen: `namespace/name`.
    pub service: Option<String>,
}

/// The reason for an early end.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// The dataplane cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A map cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The event ring cannot be read.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// There is no such service.
    #[error("service {0} not found: `affinity get services` lists all")]
    NoService(String),
    /// The terminal cannot be used.
    #[error("the terminal: {0}")]
    Terminal(#[from] io::Error),
}

/// Shows the screen in the terminal until the user quits or a signal arrives.
///
/// # Errors
/// [`TopError`]; the terminal is restored before. Later errors of the dataplane are shown, and the operation is repeated.
pub fn run(options: &Options) -> Result<(), TopError> {
    let mut sampler = Sampler::open(&options.pin_dir, options.interval)?;
    let mut state = State::new(options.interval, true);
    state.set_sample(sampler.sample()?);
    open(&mut state, options)?;
    let inputs = terminal::inputs()?;
    let mut screen = Screen::open()?;
    loop {
        work(&mut sampler, &mut state);
        screen.draw(&mut state)?;
        if !take_inputs(&inputs, &mut sampler, &mut state) {
            return Ok(());
        }
    }
}

fn open(state: &mut State, options: &Options) -> Result<(), TopError> {
    match &options.service {
        Some(name) if !state.open(name) => Err(TopError::NoService(name.clone())),
        _ => Ok(()),
    }
}

/// Takes a sample if it is due, and processes slices of longer work. A dataplane that was removed may come back.
fn work(sampler: &mut Sampler, state: &mut State) {
    if !state.is_paused() && sampler.sample_due() <= Instant::now() {
        match sampler.sample() {
            Ok(sample) => {
                state.forget_bad_news();
                state.set_sample(sample);
            }
            Err(error) => state.say(error.to_string(), true),
        }
    }
    match sampler.go_on_unpinning() {
        Ok(Some(message)) => state.say(message, false),
        Ok(None) => {}
        Err(error) => state.say(error.to_string(), true),
    }
    match sampler.clients(state.query(), !state.is_paused()) {
        Ok(Some(clients)) => state.set_clients(clients),
        Ok(None) => {}
        Err(error) => state.say(error.to_string(), true),
    }
}

/// Waits until there is something to do, and handles keys; false: quit.
fn take_inputs(inputs: &Receiver<Input>, sampler: &mut Sampler, state: &mut State) -> bool {
    let wait = match (sampler.is_busy(), state.is_paused()) {
        (true, _) => SLICE_PAUSE,
        (false, true) => PAUSED,
        (false, false) => sampler.sample_due().saturating_duration_since(Instant::now()),
    };
    let mut next = inputs.recv_timeout(wait).map_err(|error| match error {
        RecvTimeoutError::Timeout => TryRecvError::Empty,
        RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
    });
    loop {
        match next {
            Ok(Input::Key(key)) => {
                let effect = action(state.mode(), key).and_then(|action| state.act(action));
                if !carry_out(effect, sampler, state) {
                    return false;
                }
            }
            Ok(Input::Resized) => {}
            Ok(Input::End) | Err(TryRecvError::Disconnected) => return false,
            Err(TryRecvError::Empty) => return true,
        }
        next = inputs.try_recv();
    }
}

/// Returns false to quit.
fn carry_out(effect: Option<Effect>, sampler: &mut Sampler, state: &mut State) -> bool {
    match effect {
        None => {}
        Some(Effect::Quit) => return false,
        Some(Effect::Unpin(target)) => match sampler.unpin(&target) {
            Ok(message) => state.say(message, false),
            Err(error) => state.say(error.to_string(), true),
        },
    }
    true
}

/// The text of the screen after one interval: [`ONCE_WIDTH`] columns, and as many lines as needed.
///
/// # Errors
/// [`TopError`].
pub fn once(options: &Options) -> Result<String, TopError> {
    let mut sampler = Sampler::open(&options.pin_dir, options.interval)?;
    let mut state = State::new(options.interval, false);
    state.set_sample(sampler.sample()?);
    thread::sleep(options.interval);
    state.set_sample(sampler.sample()?);
    open(&mut state, options)?;
    while let Some(clients) = sampler.clients(state.query(), false)? {
        state.set_clients(clients);
        if clients.complete {
            break;
        }
    }
    let mut buffer = Buffer::empty(Rect::new(0, 0, ONCE_WIDTH, draw::full_height(&state)));
    let area = buffer.area;
    draw::draw(&state, area, &mut buffer);
    Ok(draw::to_text(&buffer).trim_end().to_owned() + "\n")
}
