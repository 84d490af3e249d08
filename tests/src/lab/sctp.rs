//! SCTP without kernel support, which is missing here: raw sockets, and packets of a common header and one chunk (RFC 9260)
//! with their CRC32c.
//!
//! A pod answers INIT with INIT ACK, and COOKIE ECHO with COOKIE ACK. Instead of a cookie, its chunks contain the pod's name
//! and the address that it saw.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, socket_with, sockopt};

use super::address::Family;
use super::netns::Door;

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const COOKIE_ECHO: u8 = 10;
const COOKIE_ACK: u8 = 11;
/// The common header: ports, verification tag, checksum.
const HEADER: usize = 12;
/// The verification tag that both ends choose. A node that tracks connections checks it.
const TAG: u32 = 1;
/// The start of INIT and INIT ACK: the tag, a window, streams in both directions, the first sequence number.
const PARAMETERS: [u8; 16] = [0, 0, 0, TAG as u8, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1];
/// How often a pod checks whether it should end.
const TICK: Duration = Duration::from_millis(100);

/// A packet of one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    source: u16,
    destination: u16,
    chunk: u8,
    value: Vec<u8>,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [self.source.to_be_bytes(), self.destination.to_be_bytes()].concat();
        // The receiver's tag. The sender of INIT does not know one yet.
        let tag = if self.chunk == INIT { 0 } else { TAG };
        bytes.extend(tag.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend([self.chunk, 0]);
        let parameters = parameters(self.chunk);
        bytes.extend((4 + parameters.len() as u16 + self.value.len() as u16).to_be_bytes());
        bytes.extend(parameters);
        bytes.extend(&self.value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let checksum = crc32c(&bytes);
        bytes[8..HEADER].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// None: it is not SCTP, or its checksum is wrong.
    fn read(bytes: &[u8]) -> Option<Self> {
        let mut bare = bytes.to_vec();
        bare.get_mut(8..HEADER)?.fill(0);
        if crc32c(&bare).to_le_bytes() != bytes[8..HEADER] {
            return None;
        }
        let word = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let length = usize::from(word(HEADER + 2)?);
        let chunk = *bytes.get(HEADER)?;
        Some(Self {
            source: word(0)?,
            destination: word(2)?,
            chunk,
            value: bytes.get(HEADER + 4 + parameters(chunk).len()..HEADER + length)?.to_vec(),
        })
    }
}

/// The start of a chunk.
fn parameters(chunk: u8) -> &'static [u8] {
    if matches!(chunk, INIT | INIT_ACK) { &PARAMETERS } else { &[] }
}

/// With the Castagnoli polynomial, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0x82f6_3b78 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), bit))
}

/// A raw socket for SCTP at an address, in the namespace of the calling thread.
fn socket(at: IpAddr, patience: Duration) -> io::Result<UdpSocket> {
    let domain = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket: OwnedFd = socket_with(domain, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::SCTP))?;
    if at.is_ipv4() {
        sockopt::set_ip_freebind(&socket, true)?;
    } else {
        sockopt::set_ipv6_freebind(&socket, true)?;
    }
    bind(&socket, &SocketAddr::new(at, 0))?;
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(patience))?;
    Ok(socket)
}

/// The next valid packet, and its sender. With IPv4 the IP header is included.
fn receive(socket: &UdpSocket) -> io::Result<(IpAddr, Packet)> {
    let mut bytes = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut bytes)?;
        let skipped = if from.is_ipv4() { usize::from(bytes[0] & 0xf) * 4 } else { 0 };
        if let Some(packet) = bytes.get(skipped..length).and_then(Packet::read) {
            return Ok((from.ip(), packet));
        }
    }
}

/// The answer to a client.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Association {
    /// The pod's name.
    pub pod: String,
    /// The client, as the pod saw it.
    pub client: IpAddr,
}

/// Begins an association with a frontend, from an address and a port, in the namespace behind `door`: all four packets.
///
/// # Errors
/// When there is no answer in time, or it comes from elsewhere.
pub(super) fn associate(door: &Door, from: SocketAddr, to: SocketAddr, patience: Duration) -> io::Result<Association> {
    let socket = door.run(|| socket(from.ip(), patience))??;
    let mut met = Vec::new();
    for (chunk, acknowledgement) in [(INIT, INIT_ACK), (COOKIE_ECHO, COOKIE_ACK)] {
        let packet = Packet { source: from.port(), destination: to.port(), chunk, value: vec![0; 16] };
        socket.send_to(&packet.bytes(), SocketAddr::new(to.ip(), 0))?;
        let (sender, answer) = receive(&socket)?;
        let ends = (sender, answer.source, answer.destination, answer.chunk);
        if ends != (to.ip(), to.port(), from.port(), acknowledgement) {
            return Err(io::Error::other(format!("asked {to} from {from}, answered by {ends:?}")));
        }
        met.push(String::from_utf8(answer.value).map_err(io::Error::other)?);
    }
    let (pod, client) = met[0].split_once(' ').ok_or(io::ErrorKind::InvalidData)?;
    if met[0] != met[1] {
        return Err(io::Error::other(format!("one association with {met:?}")));
    }
    Ok(Association { pod: pod.to_owned(), client: client.parse().map_err(io::Error::other)? })
}

/// The SCTP server of a pod, at both of its addresses and every port. Dropping it ends it.
#[derive(Debug)]
pub struct SctpServer {
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl SctpServer {
    pub(super) fn start(door: &Door, name: &str, pod: usize) -> io::Result<Self> {
        let is_over = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for family in Family::BOTH {
            let socket = door.run(|| socket(family.pod(pod), TICK))??;
            let (name, is_over) = (name.to_owned(), Arc::clone(&is_over));
            threads.push(thread::spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    let Ok((from, asked)) = receive(&socket) else { continue };
                    let chunk = if asked.chunk == INIT { INIT_ACK } else { COOKIE_ACK };
                    let value = format!("{name} {from}").into_bytes();
                    let answer = Packet { source: asked.destination, destination: asked.source, chunk, value };
                    // The client decides whether it still waits for the answer.
                    let _ = socket.send_to(&answer.bytes(), SocketAddr::new(from, 0));
                }
            }));
        }
        Ok(Self { is_over, threads })
    }
}

impl Drop for SctpServer {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_rfc_3720() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn a_packet_is_read_as_it_was_written_and_not_with_a_damaged_byte() {
        let packet = Packet { source: 1, destination: 2, chunk: COOKIE_ECHO, value: vec![7; 5] };
        let mut bytes = packet.bytes();
        assert_eq!(Packet::read(&bytes), Some(packet));
        bytes[1] ^= 1;
        assert_eq!(Packet::read(&bytes), None);
    }
}
