//! Ctrl-C and similar signals as a state to check, so that the lab is removed first.

use std::{
    cell::Cell,
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use anyhow::{Result, bail};
use tokio::{
    runtime::Builder,
    select,
    signal::unix::{SignalKind, signal},
};

/// Whether a signal has asked the program to end.
#[derive(Debug)]
pub struct Interrupt {
    signals: Receiver<()>,
    came: Cell<bool>,
}

impl Interrupt {
    /// From here on the signals no longer end the program by themselves.
    ///
    /// # Errors
    /// When the kernel refuses handlers.
    pub fn listen() -> Result<Self> {
        let (sender, signals) = channel();
        let runtime = Builder::new_current_thread().enable_io().build()?;
        let entered = runtime.enter();
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        drop(entered);
        thread::spawn(move || {
            runtime.block_on(async {
                select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {}, _ = hangup.recv() => {} }
            });
            // If there is no receiver any more, the program is about to end anyway.
            let _ = sender.send(());
            // The handlers stay, so that a second signal does not interrupt the clean-up.
            runtime.block_on(std::future::pending::<()>());
        });
        Ok(Self { signals, came: Cell::new(false) })
    }

    /// Whether a signal has come.
    pub fn came(&self) -> bool {
        self.pause(Duration::ZERO).is_err()
    }

    /// Succeeds only if no signal has come.
    ///
    /// # Errors
    /// When a signal has come.
    pub fn check(&self) -> Result<()> {
        self.pause(Duration::ZERO)
    }

    /// Waits for this long.
    ///
    /// # Errors
    /// When a signal comes meanwhile, or has come.
    pub fn pause(&self, duration: Duration) -> Result<()> {
        if !self.came.get() {
            let timed_out = self.signals.recv_timeout(duration) == Err(RecvTimeoutError::Timeout);
            self.came.set(!timed_out);
        }
        if self.came.get() {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Waits for a signal.
    pub fn wait(&self) {
        if !self.came.get() {
            // An error means that no signal can come any more.
            let _ = self.signals.recv();
            self.came.set(true);
        }
    }
}
