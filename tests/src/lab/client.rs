//! Clients: each call is a new connection (or a new UDP socket) from an address of the caller's choice.
//!
//! Errors are those of the sockets, so that a test can tell a refusal (`ConnectionRefused`) from a reset
//! (`ConnectionReset`) and from silence (`TimedOut`).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with, sockopt};

use super::address::{Family, Protocol};
use super::netns::Door;

/// How long a client waits for a connection, and for an answer. Long enough for a few retransmissions.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Threads that share the work of many clients.
const WORKERS: usize = 8;

/// Opens connections from inside one namespace.
#[derive(Clone, Debug)]
pub struct Client {
    door: Door,
}

impl Client {
    pub(super) fn new(door: &Door) -> Self {
        Self { door: door.clone() }
    }

    pub(super) fn door(&self) -> &Door {
        &self.door
    }

    /// One request on a new connection; returns the body without its final newline.
    pub fn http_get(&self, from: IpAddr, to: SocketAddr, path: &str) -> io::Result<String> {
        self.door.run(|| Connection::open(Protocol::Tcp, from, to)?.ask_last(path))?
    }

    /// One datagram from a new socket; returns the answer without its final newline.
    pub fn udp_ask(&self, from: IpAddr, to: SocketAddr, path: &str) -> io::Result<String> {
        self.door.run(|| Connection::open(Protocol::Udp, from, to)?.ask(path))?
    }

    /// The name of the pod that answers a new connection, over either protocol.
    pub fn ask(&self, protocol: Protocol, from: IpAddr, to: SocketAddr) -> io::Result<String> {
        self.door.run(|| Connection::open(protocol, from, to)?.ask_last("/"))?
    }

    /// A connection to keep.
    pub fn connect(&self, protocol: Protocol, from: IpAddr, to: SocketAddr) -> io::Result<Connection> {
        self.door.run(|| Connection::open(protocol, from, to))?
    }

    /// The pod that answers each of these clients, each on a new connection, in the order of the clients.
    ///
    /// # Errors
    /// The first failure, with the client's address.
    pub fn ask_all(&self, protocol: Protocol, clients: Range<u32>, to: SocketAddr) -> io::Result<Vec<String>> {
        let family = family_of(to);
        let share = clients.len().div_ceil(WORKERS).max(1);
        let clients: Vec<u32> = clients.collect();
        let ask = |client: &u32| {
            let from = family.client(*client);
            Connection::open(protocol, from, to)
                .and_then(|mut connection| connection.ask_last("/"))
                .map_err(|error| io::Error::new(error.kind(), format!("{from} to {to}: {error}")))
        };
        thread::scope(|scope| {
            let workers: Vec<_> = clients
                .chunks(share)
                .map(|share| {
                    scope.spawn(move || {
                        self.door.enter()?;
                        share.iter().map(ask).collect::<io::Result<Vec<_>>>()
                    })
                })
                .collect();
            let mut names = Vec::with_capacity(clients.len());
            for worker in workers {
                names.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
            }
            Ok(names)
        })
    }
}

/// An open connection, or a connected UDP socket.
#[derive(Debug)]
pub enum Connection {
    /// HTTP/1.1 over TCP.
    Http(BufReader<TcpStream>),
    /// Datagrams.
    Udp(UdpSocket),
}

impl Connection {
    /// Opens one from `from`, any port, in the namespace of the calling thread.
    pub(super) fn open(protocol: Protocol, from: IpAddr, to: SocketAddr) -> io::Result<Self> {
        match protocol {
            Protocol::Tcp => {
                let stream = TcpStream::from(socket(SocketType::STREAM, from, to)?);
                stream.set_nodelay(true)?;
                Ok(Self::Http(BufReader::new(stream)))
            }
            Protocol::Udp => Ok(Self::Udp(socket(SocketType::DGRAM, from, to)?.into())),
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

    /// A datagram whose answer finds nobody.
    ///
    /// # Errors
    /// Also where this is no UDP socket.
    pub fn ask_and_leave(self, path: &str) -> io::Result<()> {
        match self {
            Self::Http(_) => Err(io::ErrorKind::Unsupported.into()),
            Self::Udp(socket) => socket.send(path.as_bytes()).map(|_| ()),
        }
    }

    fn exchange(&mut self, path: &str, connection: &str) -> io::Result<String> {
        let mut body = match self {
            Self::Http(stream) => {
                let request = format!("GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: {connection}\r\n\r\n");
                stream.get_mut().write_all(request.as_bytes()).map_err(timed_out)?;
                read_response(stream).map_err(timed_out)?
            }
            Self::Udp(socket) => {
                socket.send(path.as_bytes())?;
                let mut datagram = vec![0; 2048];
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
fn socket(kind: SocketType, from: IpAddr, to: SocketAddr) -> io::Result<OwnedFd> {
    let domain = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(domain, kind, SocketFlags::CLOEXEC, None)?;
    // No interface has the client addresses: a local route for their prefix makes them ours.
    if to.is_ipv4() {
        sockopt::set_ip_freebind(&socket, true)?;
    } else {
        sockopt::set_ipv6_freebind(&socket, true)?;
    }
    for direction in [sockopt::Timeout::Send, sockopt::Timeout::Recv] {
        sockopt::set_socket_timeout(&socket, direction, Some(PATIENCE))?;
    }
    bind(&socket, &SocketAddr::new(from, 0))?;
    connect(&socket, &to).map_err(|error| timed_out(error.into()))?;
    Ok(socket)
}

/// A socket's timeout shows as EAGAIN, or EINPROGRESS where it was connecting: calls it by its name.
fn timed_out(error: io::Error) -> io::Error {
    match Errno::from_io_error(&error) {
        Some(Errno::AGAIN | Errno::INPROGRESS) => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}

fn read_response(stream: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut status = String::new();
    let mut length = 0;
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
        } else if let Some(value) = line.strip_prefix("Content-Length: ") {
            length = value.parse().map_err(io::Error::other)?;
        }
    }
    if status != "HTTP/1.1 200 OK" {
        return Err(io::Error::other(status));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    String::from_utf8(body).map_err(io::Error::other)
}
