//! The event ring, read by any number of readers.
//!
//! A ring buffer of the kernel has one consumer, and drops what was consumed. This one is used differently. Every record is
//! [`RECORD`] bytes long, and the ring's size is a multiple of that. So a reader that only maps the ring finds every record by
//! counting back from the newest. It consumes nothing, and disturbs no other reader. The agent must advance the consumer's
//! position, otherwise the programs would find the ring full: [`Consumer`] does that. What was consumed stays readable until it
//! is overwritten.

use affinity_common::abi::Event;
use bytemuck::Zeroable;

use crate::sys::{Map, Ring, RingConsumer, SysError};

/// Bytes of a record: the kernel's header of eight, and an [`Event`].
pub const RECORD: u64 = 8 + size_of::<Event>() as u64;

/// Bits of a record's header, from `linux/bpf.h`.
const BUSY: u64 = 1 << 31;
const DISCARDED: u64 = 1 << 30;
const LENGTH: u64 = (1 << 30) - 1;

/// The result of reading at a position.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Read {
    Event(Event),
    /// A program reserved the record and discarded it.
    Nothing,
    /// A program is writing it now, or nothing was produced there yet.
    NotYet,
    /// It was overwritten by newer records.
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
    /// Starts at the oldest event that still exists.
    ///
    /// # Errors
    /// [`SysError`] if the map is no ring buffer.
    pub fn from_oldest(events: &Map) -> Result<Self, SysError> {
        let ring = events.ring()?;
        let position = ring.produced().saturating_sub(ring.size() as u64);
        Ok(Self { ring, position, missed: 0 })
    }

    /// Starts now: only new events are read.
    ///
    /// # Errors
    /// [`SysError`] if the map is no ring buffer.
    pub fn from_now(events: &Map) -> Result<Self, SysError> {
        let ring = events.ring()?;
        let position = ring.produced();
        Ok(Self { ring, position, missed: 0 })
    }

    /// Events that were overwritten before this reader reached them.
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

    /// The next event; none if there is none yet. Call it again later.
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
    /// The consumer of a ring.
    ///
    /// # Errors
    /// [`SysError`] if the map is no ring buffer.
    pub fn new(events: &Map) -> Result<Self, SysError> {
        Ok(Self { ring: events.ring()?, consumer: events.ring_consumer()? })
    }

    /// Lets the programs overwrite everything that they have written so far. Call it more often than they fill the ring.
    pub fn keep_up(&self) {
        self.consumer.consume(self.ring.produced());
    }
}
