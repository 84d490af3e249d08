//! Takes over the terminal, and restores it in all cases.
//!
//! [`Screen`] restores it when it is dropped. That covers errors, signals (they end the loop that holds it) and panics of its
//! thread; the hook that ratatui installs prints a panic's message after that.

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
    /// Takes over the terminal at standard output.
    ///
    /// # Errors
    /// If it is not a terminal, or cannot be read.
    pub fn open() -> io::Result<Self> {
        let terminal = ratatui::try_init().inspect_err(|_| give_back())?;
        Ok(Self { terminal })
    }

    /// Draws a state, and stores the number of rows of a page in it.
    ///
    /// # Errors
    /// If the terminal cannot be written.
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

/// A terminal that is gone cannot be restored; the error is ignored.
fn give_back() {
    let _ = ratatui::try_restore();
}

/// An input event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Input {
    /// A key was pressed.
    Key(KeyEvent),
    /// The size of the terminal has changed.
    Resized,
    /// A signal asks to quit, or the terminal is gone.
    End,
}

/// Starts to receive keys and signals.
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
        // The receiver may be gone.
        let _ = sender.send(Input::End);
    });
    Ok(receiver)
}

/// Runs until the terminal or the receiver is gone.
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
