//! A terminal for one command: a pseudo-terminal, and the screen of an xterm (vt100).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use vt100::Parser;

use super::eventually;

/// How long a change may take to be visible.
const PATIENCE: Duration = Duration::from_secs(15);

/// The same command with default signal handlers, including its environment.
fn with_default_signals(command: &Command) -> Command {
    let mut env = Command::new("env");
    env.arg("--default-signal").arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => env.env(name, value),
            None => env.env_remove(name),
        };
    }
    env
}

/// A command with its own terminal. Dropping it kills the command.
pub struct Terminal {
    child: Child,
    /// The user's end.
    keyboard: File,
    /// The command's end, kept open so that its settings can be read when the command has ended.
    line: OwnedFd,
    screen: Arc<Mutex<Parser>>,
}

impl Terminal {
    /// Starts a command with this terminal as its standard input, output and error. Signals have their default effect, even if
    /// the parent of the tests ignores them.
    pub fn start(command: Command, columns: u16, rows: u16) -> Result<Self> {
        let mut command = with_default_signals(&command);
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&keyboard)?;
        unlockpt(&keyboard)?;
        let name = ptsname(&keyboard, Vec::new())?;
        let line = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        set_size(&line, columns, rows)?;
        let end = || Ok::<_, std::io::Error>(Stdio::from(line.try_clone()?));
        command.stdin(end()?).stdout(end()?).stderr(end()?).env("TERM", "xterm-256color").env_remove("NO_COLOR");
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        let keyboard = File::from(keyboard);
        let screen = Arc::new(Mutex::new(Parser::new(rows, columns, 0)));
        let (mut written, seen) = (keyboard.try_clone()?, Arc::clone(&screen));
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = written.read(&mut bytes) {
                lock(&seen).process(&bytes[..count]);
            }
        });
        Ok(Self { child, keyboard, line, screen })
    }

    /// Types.
    pub fn press(&mut self, keys: &str) -> Result<()> {
        Ok(self.keyboard.write_all(keys.as_bytes())?)
    }

    /// What is on the screen: its lines, without blanks at their ends.
    pub fn text(&self) -> String {
        let parser = lock(&self.screen);
        let (_, columns) = parser.screen().size();
        let lines: Vec<_> = parser.screen().rows(0, columns).map(|line| line.trim_end().to_owned()).collect();
        lines.join("\n")
    }

    /// Waits until the screen satisfies `holds`.
    ///
    /// # Errors
    /// If that does not happen in time: the current contents of the screen.
    pub fn wait_for(&self, what: &str, mut holds: impl FnMut(&str) -> bool) -> Result<()> {
        eventually(what, PATIENCE, || Ok(holds(&self.text()))).with_context(|| self.text())
    }

    /// Waits until a text is on the screen.
    ///
    /// # Errors
    /// As [`Terminal::wait_for`].
    pub fn shows(&self, text: &str) -> Result<()> {
        self.wait_for(&format!("`{text}` on the screen"), |screen| screen.contains(text))
    }

    /// Gives the terminal another size.
    pub fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        let mut parser = lock(&self.screen);
        parser.screen_mut().set_size(rows, columns);
        // So that all that is shown afterwards was drawn for the new size.
        parser.process(b"\x1b[2J");
        drop(parser);
        set_size(&self.line, columns, rows)
    }

    /// Sends the command a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Waits until the command has ended.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let mut status = None;
        let ended = eventually("the command ends", PATIENCE, || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        });
        ended.with_context(|| self.text())?;
        status.context("it has ended")
    }

    /// Whether the terminal is as a shell expects it: lines are edited and echoed, the cursor is visible, and the main screen
    /// is shown.
    ///
    /// # Errors
    /// If it is not: the differences.
    pub fn is_given_back(&self) -> Result<()> {
        let modes = tcgetattr(&self.line)?.local_modes;
        ensure!(modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG), "still raw: {modes:?}");
        eventually("the cursor, and the main screen", PATIENCE, || {
            let parser = lock(&self.screen);
            Ok(!parser.screen().hide_cursor() && !parser.screen().alternate_screen())
        })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn set_size(line: impl AsFd, columns: u16, rows: u16) -> Result<()> {
    Ok(tcsetwinsize(line, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?)
}

fn lock(screen: &Mutex<Parser>) -> MutexGuard<'_, Parser> {
    screen.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
