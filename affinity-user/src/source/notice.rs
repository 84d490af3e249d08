//! Messages for a service's owner.

use tokio::sync::mpsc::Sender;

use super::ObjectName;

/// A message for the owner of a service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Notice {
    /// The service.
    pub service: ObjectName,
    /// What it is about, in one machine-readable word: `Misconfigured`.
    pub reason: &'static str,
    /// What is wrong and what to do, in one line.
    pub message: String,
}

/// Accepts notices without blocking: notices that do not fit are lost.
#[derive(Clone, Debug)]
pub struct Notices(Sender<Notice>);

impl Notices {
    /// Writes into a queue.
    #[must_use]
    pub fn new(queue: Sender<Notice>) -> Self {
        Self(queue)
    }

    /// Returns whether the queue had space.
    pub fn send(&self, notice: Notice) -> bool {
        self.0.try_send(notice).is_ok()
    }
}
