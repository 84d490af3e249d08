//! Errors of commands, in one line each, and their exit codes.

use std::{
    io,
    process::{ExitCode, Termination},
};

use super::logging::LogFormat;
use crate::{
    agent::AgentError,
    attach::AttachError,
    store::{StoreError, kernel::OpenError},
    sys::SysError,
    top::TopError,
};

/// Exit codes, as `affinity --help` documents them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Done.
    Done = 0,
    /// A failure.
    Failed = 1,
    /// Usage error; clap uses the same code.
    Usage = 2,
    /// An object that the command line names does not exist.
    NotFound = 3,
}

impl Termination for Exit {
    fn report(self) -> ExitCode {
        ExitCode::from(self as u8)
    }
}

/// The reason for an early end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The dataplane cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A map cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The devices cannot be attached or read.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// A call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The agent cannot continue.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The live view has failed.
    #[error(transparent)]
    Top(#[from] TopError),
    /// Standard output cannot be written.
    #[error("writing to standard output: {0}")]
    Output(#[from] io::Error),
    /// Another failure: what it is, and what to do.
    #[error("{0}")]
    Failed(String),
    /// Options that contradict each other or the current state.
    #[error("{0}")]
    Usage(String),
    /// A service, pod or client that does not exist, and where to look for it.
    #[error("{what} not found: {hint}")]
    NotFound {
        /// The kind of object, and its name.
        what: String,
        /// What to do.
        hint: &'static str,
    },
}

impl Error {
    /// The exit code. A reader that closes the pipe early (`| head`) is no error.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => Exit::Done,
            Self::Usage(_) | Self::Agent(AgentError::Pattern(_)) => Exit::Usage,
            Self::NotFound { .. }
            | Self::Agent(AgentError::NoDevice(_) | AgentError::NotAttached(_))
            | Self::Top(TopError::NoService(_)) => Exit::NotFound,
            Self::Open(_)
            | Self::Store(_)
            | Self::Attach(_)
            | Self::Sys(_)
            | Self::Agent(_)
            | Self::Top(_)
            | Self::Output(_)
            | Self::Failed(_) => Exit::Failed,
        }
    }

    /// Prints the reason to standard error, in one line and in the form of the log, because both are read together.
    pub(crate) fn print(&self, format: LogFormat) {
        if self.exit() != Exit::Done {
            let text = self.to_string();
            let line: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            match format {
                LogFormat::Text => eprintln!("error: {}", line.join(" ")),
                LogFormat::Json => tracing::error!("{}", line.join(" ")),
            }
        }
    }

    pub(crate) fn no_service(name: &str) -> Self {
        Self::NotFound { what: format!("service {name}"), hint: "`affinity get services` lists all" }
    }

    pub(crate) fn no_namespace(name: &str) -> Self {
        let hint = "known names are `node`, netns:COOKIE, and pods of this node that are endpoints; give others by their address";
        Self::NotFound { what: format!("client {name}"), hint }
    }

    pub(crate) fn no_backend(name: &str) -> Self {
        Self::NotFound { what: format!("pod {name}"), hint: "`affinity get backends` lists all" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_left_is_no_error() {
        let left = Error::Output(io::ErrorKind::BrokenPipe.into());
        assert_eq!(left.exit(), Exit::Done);
        assert_eq!(Error::Output(io::ErrorKind::StorageFull.into()).exit(), Exit::Failed);
    }

    #[test]
    fn errors_say_what_and_what_to_do() {
        let error = Error::no_service("default/nope");
        assert_eq!(error.exit(), Exit::NotFound);
        assert_eq!(error.to_string(), "service default/nope not found: `affinity get services` lists all");
    }
}
