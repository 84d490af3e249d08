//! The event ring, read by any number of readers.
//!
//! A ring buffer of the kernel has one consumer and forgets what was consumed. This one is used differently: every
//! record is [`RECORD`] bytes long and the ring's size a multiple of that, so a reader that only maps the ring finds
//! every record by counting back from the newest, consumes nothing, and disturbs no other reader. The agent must move the
//! consumer's position on, or the programs would find the ring full: [`Consumer`] does, in the agent. What was
//! consumed stays readable until it is written over.

use affinity_common::abi::Event;
use bytemuck::Zeroable;

use crate::sys::{Map, Ring, RingConsumer, SysError};

/// Bytes of a record: the kernel's header of eight, and an [`Event`].
pub const RECORD: u64 = 8 + size_of::<Event>() as u64;

/// Bits of a record's header, from `linux/bpf.h`.
const BUSY: u64 = 1 << 31;
const DISCARDED: u64 = 1 << 30;
const LENGTH: u64 = (1 << 30) - 1;

/// What reading at a position gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Read {
    Event(Event),
    /// A program took the place and gave it back.
    Nothing,
    /// A program is writing it at this moment, or nothing was produced there yet.
    NotYet,
    /// Newer records were written over it.
    Overwritten,
}

/// Follows the ring from some point on.
#[derive(Debug)]
pub struct EventReader {
    ring: Ring,
    position: u64,
    missed: u64,
}

impl EventReader {
    /// From the oldest event that is still there.
    ///
    /// # Errors
    /// [`SysError`] where the map is no ring buffer.
    pub fn from_oldest(events: &Map) -> Result<Self, SysError> {
        let ring = events.ring()?;
        let position = ring.produced().saturating_sub(ring.size() as u64);
        Ok(Self { ring, position, missed: 0 })
    }

    /// From now on: only what is still to come.
    ///
    /// # Errors
    /// [`SysError`] where the map is no ring buffer.
    pub fn from_now(events: &Map) -> Result<Self, SysError> {
        let ring = events.ring()?;
        let position = ring.produced();
        Ok(Self { ring, position, missed: 0 })
    }

    /// Events that were written over before this reader came to them.
    #[must_use]
    pub const fn missed(&self) -> u64 {
        self.missed
    }

    fn read(&self) -> Read {
        if self.position >= self.ring.produced() {
            return Read::NotYet;
        }
        let header = self.ring.word(self.position);
        let mut event = Event::zeroed();
        let words = bytemuck::bytes_of_mut(&mut event).chunks_exact_mut(8);
        for (at, bytes) in (self.position + 8..).step_by(8).zip(words) {
            bytes.copy_from_slice(&self.ring.word(at).to_ne_bytes());
        }
        // A writer moves the producer's position before it overwrites this record.
        if self.ring.produced() - self.position > self.ring.size() as u64 {
            Read::Overwritten
        } else if header & BUSY != 0 {
            Read::NotYet
        } else if header & DISCARDED != 0 || header & LENGTH != RECORD - 8 {
            Read::Nothing
        } else {
            Read::Event(event)
        }
    }

    fn skip_overwritten(&mut self) {
        let oldest = self.ring.produced().saturating_sub(self.ring.size() as u64);
        self.missed += oldest.saturating_sub(self.position) / RECORD;
        self.position = self.position.max(oldest);
    }
}

impl Iterator for EventReader {
    type Item = Event;

    /// The next event; none where there is none yet. It may be asked again later.
    fn next(&mut self) -> Option<Event> {
        loop {
            let read = self.read();
            match read {
                Read::NotYet => return None,
                Read::Overwritten => self.skip_overwritten(),
                Read::Nothing => self.position += RECORD,
                Read::Event(event) => {
                    self.position += RECORD;
                    return Some(event);
                }
            }
        }
    }
}

/// Keeps room in the ring for the programs.
#[derive(Debug)]
pub struct Consumer {
    ring: Ring,
    consumer: RingConsumer,
}

impl Consumer {
    /// Of a ring.
    ///
    /// # Errors
    /// [`SysError`] where the map is no ring buffer.
    pub fn new(events: &Map) -> Result<Self, SysError> {
        Ok(Self { ring: events.ring()?, consumer: events.ring_consumer()? })
    }

    /// Lets the programs write over everything that they wrote so far. To be called more often than they fill the ring.
    pub fn keep_up(&self) {
        self.consumer.consume(self.ring.produced());
    }
}
