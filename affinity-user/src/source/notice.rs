//! What a service's owner should know, on its way to wherever owners look.

use tokio::sync::mpsc::Sender;

use super::ObjectName;

/// Something that the owner of a service should know.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Notice {
    /// The service.
    pub service: ObjectName,
    /// What it is about, in one word for programs: `Misconfigured`.
    pub reason: &'static str,
    /// What is wrong and what to do, in one line.
    pub message: String,
}

/// Takes notices without ever blocking: what there is no room for is lost.
#[derive(Clone, Debug)]
pub struct Notices(Sender<Notice>);

impl Notices {
    /// Into a queue.
    #[must_use]
    pub fn new(queue: Sender<Notice>) -> Self {
        Self(queue)
    }

    /// Says whether there was room.
    pub fn send(&self, notice: Notice) -> bool {
        self.0.try_send(notice).is_ok()
    }
}
