//! The terminal: taken over, and given back whatever happens.
//!
//! [`Screen`] gives it back when it is dropped, which covers errors, signals (they end the loop that holds it) and panics
//! of its thread; a panic's message is printed after that, by the hook that ratatui installs.

use std::{
    io,
    sync::mpsc::{self, Receiver, Sender},
    thread,
};

use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyEvent, KeyEventKind},
};
use tokio::signal::unix::{SignalKind, signal};

use super::{draw, state::State};

/// A terminal in raw mode, on its alternate screen.
#[derive(Debug)]
pub struct Screen {
    terminal: DefaultTerminal,
}

impl Screen {
    /// Takes over the terminal that is standard output.
    ///
    /// # Errors
    /// Where it is none, or cannot be read.
    pub fn open() -> io::Result<Self> {
        let terminal = ratatui::try_init().inspect_err(|_| give_back())?;
        Ok(Self { terminal })
    }

    /// Draws a state, and tells it how many rows its pages have.
    ///
    /// # Errors
    /// Where the terminal cannot be written.
    pub fn draw(&mut self, state: &mut State) -> io::Result<()> {
        self.terminal.draw(|frame| {
            state.set_page(draw::page(state, frame.area()));
            draw::draw(state, frame.area(), frame.buffer_mut());
        })?;
        Ok(())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

/// A terminal that has gone cannot be restored; the error is ignored.
fn give_back() {
    let _ = ratatui::try_restore();
}

/// What comes from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Input {
    /// A key was pressed.
    Key(KeyEvent),
    /// The terminal has another size.
    Resized,
    /// A signal asks to end, or the terminal has gone.
    End,
}

/// Keys and signals, as they come.
pub(super) fn inputs() -> io::Result<Receiver<Input>> {
    let (sender, receiver) = mpsc::channel();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let signals = {
        let _inside = runtime.enter();
        [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal)
    };
    let [terminate, interrupt, hangup] = signals;
    let (mut terminate, mut interrupt, mut hangup) = (terminate?, interrupt?, hangup?);
    let keys = sender.clone();
    thread::spawn(move || read_keys(&keys));
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        // The receiver may have gone.
        let _ = sender.send(Input::End);
    });
    Ok(receiver)
}

/// Until the terminal or the receiver has gone.
fn read_keys(inputs: &Sender<Input>) {
    loop {
        let input = match event::read() {
            Ok(Event::Key(key)) if key.kind != KeyEventKind::Release => Input::Key(key),
            Ok(Event::Resize(..)) => Input::Resized,
            Ok(Event::Key(_) | Event::FocusGained | Event::FocusLost | Event::Mouse(_) | Event::Paste(_)) => continue,
            Err(_) => Input::End,
        };
        if inputs.send(input).is_err() || input == Input::End {
            return;
        }
    }
}
