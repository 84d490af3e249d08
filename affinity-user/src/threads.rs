//! Threads with names. A thread inherits the network namespace of the thread that starts it.

use std::{
    io,
    sync::mpsc::{self, Receiver, Sender},
    thread::{self, JoinHandle},
};

use tracing::error;

/// Starts a thread. Without its handle, nothing waits for its end.
///
/// # Errors
/// The system's error if no thread can be started.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    thread::Builder::new().name(name.to_owned()).spawn(work)
}

/// A thread that works until its channel closes. If this is dropped, the channel closes, and the drop waits for the thread.
#[derive(Debug)]
pub(crate) struct Worker<T> {
    name: &'static str,
    requests: Option<Sender<T>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts the thread. It ends when `work` returns, which must be soon after the channel has closed.
    ///
    /// # Errors
    /// The system's error if no thread can be started.
    pub(crate) fn start(name: &'static str, work: impl FnOnce(&Receiver<T>) + Send + 'static) -> io::Result<Self> {
        let (sender, requests) = mpsc::channel();
        let thread = spawn(name, move || work(&requests))?;
        Ok(Self { name, requests: Some(sender), thread: Some(thread) })
    }

    /// Sends a request to the thread. After [`Worker::stop`] this does nothing.
    ///
    /// # Errors
    /// If the thread has ended by itself.
    pub(crate) fn send(&self, request: T) -> io::Result<()> {
        match &self.requests {
            Some(requests) => {
                requests.send(request).map_err(|_| io::Error::other(format!("the {} has ended", self.name)))
            }
            None => Ok(()),
        }
    }
}

impl<T> Worker<T> {
    /// Whether the thread has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Closes the channel and waits for the thread.
    pub(crate) fn stop(&mut self) {
        self.requests = None;
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            error!("the {} has panicked", self.name);
        }
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        self.stop();
    }
}
