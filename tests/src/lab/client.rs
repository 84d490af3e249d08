//! Clients: each call is a new connection (or a new UDP socket) from an address of the caller's choice.
//!
//! Errors are those of the sockets, so that a test can tell a refusal (`ConnectionRefused`) from a reset
//! (`ConnectionReset`) and from silence (`TimedOut`).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with, sockopt};

use super::address::{Family, Protocol};
use super::netns::Door;
use super::sctp::{self, Association};
use super::server::DATAGRAM_MAX;
use crate::patience::patience;

/// How long a client waits for a connection, and for an answer, by default. Long enough for a few retransmissions.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Threads that share the work of many clients.
const WORKERS: usize = 8;

/// Opens connections from inside one namespace.
#[derive(Clone, Debug)]
pub struct Client {
    door: Door,
    patience: Duration,
}

impl Client {
    pub(super) fn new(door: &Door) -> Self {
        Self { door: door.clone(), patience: patience(PATIENCE) }
    }

    /// The same, with this limit for a connection, and for an answer.
    pub fn with_patience(self, usual: Duration) -> Self {
        Self { patience: patience(usual), ..self }
    }

    pub(super) fn door(&self) -> &Door {
        &self.door
    }

    /// One request on a new connection; returns the body without its final newline.
    pub fn http_get(&self, from: IpAddr, to: SocketAddr, path: &str) -> io::Result<String> {
        self.door.run(|| self.open(Protocol::Tcp, from, to)?.ask_last(path))?
    }

    /// One datagram from a new socket; returns the answer without its final newline.
    pub fn udp_ask(&self, from: IpAddr, to: SocketAddr, path: &str) -> io::Result<String> {
        self.door.run(|| self.open(Protocol::Udp, from, to)?.ask(path))?
    }

    /// The name of the pod that answers a new connection, over either protocol.
    pub fn ask(&self, protocol: Protocol, from: IpAddr, to: SocketAddr) -> io::Result<String> {
        self.door.run(|| self.open(protocol, from, to)?.ask_last("/"))?
    }

    /// Begins an SCTP association from an address and a port: returns its pod. A pod answers after [`super::Lab::serve_sctp`].
    pub fn associate(&self, from: SocketAddr, to: SocketAddr) -> io::Result<Association> {
        sctp::associate(&self.door, from, to, self.patience).map_err(timed_out)
    }

    /// A connection to keep.
    pub fn connect(&self, protocol: Protocol, from: IpAddr, to: SocketAddr) -> io::Result<Connection> {
        self.door.run(|| self.open(protocol, from, to))?
    }

    /// The same from a port of the caller's choice, which other connections may use, too.
    pub fn connect_by(&self, protocol: Protocol, from: SocketAddr, to: SocketAddr) -> io::Result<Connection> {
        self.door.run(|| Connection::open(protocol, from, to, self.patience))?
    }

    /// The pod that answers each of these clients, each on a new connection, in the order of the clients.
    ///
    /// # Errors
    /// The first failure, with the client's address.
    pub fn ask_all(&self, protocol: Protocol, clients: Range<u32>, to: SocketAddr) -> io::Result<Vec<String>> {
        let family = family_of(to);
        let clients: Vec<u32> = clients.collect();
        self.in_parallel(&clients, |client| {
            let from = family.client(*client);
            self.open(protocol, from, to)
                .and_then(|mut connection| connection.ask_last("/"))
                .map_err(|error| io::Error::new(error.kind(), format!("{from} to {to}: {error}")))
        })
    }

    /// Does some work for each of these, in the client's namespace and on several threads, until one fails. The results
    /// are in the order of the items.
    ///
    /// # Errors
    /// A failure of the work.
    pub fn in_parallel<T: Sync, U: Send>(
        &self,
        items: &[T],
        work: impl Fn(&T) -> io::Result<U> + Sync,
    ) -> io::Result<Vec<U>> {
        let next = AtomicUsize::new(0);
        let share = || -> io::Result<Vec<(usize, U)>> {
            self.door.enter()?;
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(item) = items.get(index) else { return Ok(done) };
                let result = work(item).inspect_err(|_| next.store(items.len(), Ordering::Relaxed));
                done.push((index, result?));
            }
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..WORKERS.min(items.len())).map(|_| scope.spawn(share)).collect();
            let mut results = Vec::with_capacity(items.len());
            for worker in workers {
                results.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
            }
            results.sort_by_key(|(index, _)| *index);
            Ok(results.into_iter().map(|(_, result)| result).collect())
        })
    }

    /// Opens a connection from `from`, any port, in the namespace of the calling thread: inside
    /// [`Client::in_parallel`] the client's.
    pub fn open(&self, protocol: Protocol, from: IpAddr, to: SocketAddr) -> io::Result<Connection> {
        Connection::open(protocol, SocketAddr::new(from, 0), to, self.patience)
    }
}

/// An open connection, or a connected UDP socket.
#[derive(Debug)]
pub enum Connection {
    /// HTTP/1.1 over TCP.
    Http {
        /// Both ways.
        stream: BufReader<TcpStream>,
        /// Whether the server has announced that its answer was the last.
        ended: bool,
    },
    /// Datagrams.
    Udp(UdpSocket),
}

impl Connection {
    /// Opens one from `from`, from any port if that is zero, in the namespace of the calling thread.
    pub(super) fn open(protocol: Protocol, from: SocketAddr, to: SocketAddr, patience: Duration) -> io::Result<Self> {
        match protocol {
            Protocol::Tcp => {
                let stream = TcpStream::from(socket(SocketType::STREAM, from, to, patience)?);
                stream.set_nodelay(true)?;
                Ok(Self::Http { stream: BufReader::new(stream), ended: false })
            }
            Protocol::Udp => Ok(Self::Udp(socket(SocketType::DGRAM, from, to, patience)?.into())),
        }
    }

    /// One request; returns the body without its final newline. The connection stays open.
    pub fn ask(&mut self, path: &str) -> io::Result<String> {
        self.exchange(path, "keep-alive")
    }

    /// The last request: the server closes the connection after its answer.
    pub fn ask_last(&mut self, path: &str) -> io::Result<String> {
        self.exchange(path, "close")
    }

    /// Sends a datagram, and closes the socket before the answer arrives.
    ///
    /// # Errors
    /// Also if this is no UDP socket.
    pub fn ask_and_leave(self, path: &str) -> io::Result<()> {
        match self {
            Self::Http { .. } => Err(io::ErrorKind::Unsupported.into()),
            Self::Udp(socket) => socket.send(path.as_bytes()).map(|_| ()),
        }
    }

    /// Whether the server has announced, with its last answer, that it ends the connection.
    pub fn has_ended(&self) -> bool {
        match self {
            Self::Http { ended, .. } => *ended,
            Self::Udp(_) => false,
        }
    }

    fn exchange(&mut self, path: &str, connection: &str) -> io::Result<String> {
        let mut body = match self {
            Self::Http { stream, ended } => {
                let request = format!("GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: {connection}\r\n\r\n");
                stream.get_mut().write_all(request.as_bytes()).map_err(timed_out)?;
                let body;
                (body, *ended) = read_response(stream).map_err(timed_out)?;
                body
            }
            Self::Udp(socket) => {
                socket.send(path.as_bytes())?;
                let mut datagram = vec![0; DATAGRAM_MAX];
                let length = socket.recv(&mut datagram).map_err(timed_out)?;
                datagram.truncate(length);
                String::from_utf8(datagram).map_err(io::Error::other)?
            }
        };
        if body.ends_with('\n') {
            body.pop();
        }
        Ok(body)
    }
}

/// The family of an address.
fn family_of(address: SocketAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

/// A connected socket, in the namespace of the calling thread.
fn socket(kind: SocketType, from: SocketAddr, to: SocketAddr, patience: Duration) -> io::Result<OwnedFd> {
    let domain = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(domain, kind, SocketFlags::CLOEXEC, None)?;
    // No interface has the client addresses: a local route for their prefix makes them local.
    if to.is_ipv4() {
        sockopt::set_ip_freebind(&socket, true)?;
    } else {
        sockopt::set_ipv6_freebind(&socket, true)?;
    }
    for direction in [sockopt::Timeout::Send, sockopt::Timeout::Recv] {
        sockopt::set_socket_timeout(&socket, direction, Some(patience))?;
    }
    if from.port() != 0 {
        sockopt::set_socket_reuseaddr(&socket, true)?;
        sockopt::set_socket_reuseport(&socket, true)?;
    }
    bind(&socket, &from)?;
    connect(&socket, &to).map_err(|error| timed_out(error.into()))?;
    Ok(socket)
}

/// A socket's timeout is reported as EAGAIN, or as EINPROGRESS if it was connecting: converts both to `TimedOut`.
fn timed_out(error: io::Error) -> io::Error {
    match Errno::from_io_error(&error) {
        Some(Errno::AGAIN | Errno::INPROGRESS) => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}

/// The body, and whether it was the last.
fn read_response(stream: &mut BufReader<TcpStream>) -> io::Result<(String, bool)> {
    let mut status = String::new();
    let mut length = 0;
    let mut last = false;
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        } else if status.is_empty() {
            status = line.to_owned();
        } else if let Some((name, value)) = line.split_once(": ") {
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().map_err(io::Error::other)?,
                "connection" => last = value == "close",
                _ => {}
            }
        }
    }
    if status != "HTTP/1.1 200 OK" {
        return Err(io::Error::other(status));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((String::from_utf8(body).map_err(io::Error::other)?, last))
}
