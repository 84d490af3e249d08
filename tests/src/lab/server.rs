//! The servers of a pod: HTTP/1.1 and UDP servers that answer with the pod's name.
//!
//! | asked for | answer |
//! |---|---|
//! | `/` | the pod's name |
//! | `/port` | the port that was reached |
//! | `/client` | the client's address, as the server sees it |
//! | `/who` | the pod's name and the client's address |
//! | `/bytes/N` | N bytes |
//! | `/late` | the name, over UDP a while later |
//!
//! Over UDP the datagram is the path. Each answer but the last ends in a newline.

use std::io;
use std::net::{SocketAddr, UdpSocket as StdUdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Result;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::Runtime;

use super::netns::Door;

/// A pod's ports for HTTP.
pub const HTTP_PORTS: [u16; 2] = [8080, 8443];
/// A pod's ports for UDP.
pub const UDP_PORTS: [u16; 2] = [5353, 5354];

/// A request's head may not be longer than this.
const HEAD_MAX: usize = 8192;
/// No datagram is longer than this.
pub(super) const DATAGRAM_MAX: usize = 1 << 16;
/// Connections that may wait for the server: more than a burst of clients opens at once.
const BACKLOG: i32 = 4096;

/// The servers of one pod. Dropping it closes every socket.
pub(super) struct Server {
    runtime: Option<Runtime>,
    duty: Arc<Duty>,
}

/// The shared state of a server's tasks.
struct Duty {
    name: String,
    /// The server is to end: every answer is the last on its connection.
    draining: AtomicBool,
    /// TCP connections that are open.
    connections: AtomicUsize,
}

impl Server {
    /// Starts the servers of the pod `name`, behind `door`, on all their ports and both families.
    pub(super) fn start(door: &Door, name: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let duty = Arc::new(Duty {
            name: name.to_owned(),
            draining: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
        });
        let context = runtime.enter();
        for port in HTTP_PORTS {
            let listener = std::net::TcpListener::from(door.run(|| listen_on(port))??);
            let listener = TcpListener::from_std(listener)?;
            runtime.spawn(accept(listener, Arc::clone(&duty)));
        }
        for port in UDP_PORTS {
            let socket = StdUdpSocket::from(door.run(|| socket_on(SocketType::DGRAM, port))??);
            runtime.spawn(echo(UdpSocket::from_std(socket)?, port, Arc::clone(&duty)));
        }
        drop(context);
        Ok(Self { runtime: Some(runtime), duty })
    }

    /// From now on every answer over TCP is the last on its connection.
    pub(super) fn drain(&self) {
        self.duty.draining.store(true, Ordering::Relaxed);
    }

    /// How many TCP connections are open.
    pub(super) fn connections(&self) -> usize {
        self.duty.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

/// A bound socket for both families that does not block.
fn socket_on(kind: SocketType, port: u16) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET6, kind, flags, None)?;
    sockopt::set_ipv6_v6only(&socket, false)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port)))?;
    Ok(socket)
}

fn listen_on(port: u16) -> io::Result<OwnedFd> {
    let socket = socket_on(SocketType::STREAM, port)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

async fn accept(listener: TcpListener, duty: Arc<Duty>) {
    loop {
        // A client that has gone before it was accepted does not affect the others.
        if let Ok((stream, peer)) = listener.accept().await {
            let duty = Arc::clone(&duty);
            tokio::spawn(async move {
                duty.connections.fetch_add(1, Ordering::Relaxed);
                // No action of a client is a failure of the server.
                let _ = converse(stream, peer, &duty).await;
                duty.connections.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }
}

/// Answers requests on one connection, until the client closes it or asks the server to.
async fn converse(mut stream: TcpStream, peer: SocketAddr, duty: &Duty) -> io::Result<()> {
    let port = stream.local_addr()?.port();
    stream.set_nodelay(true)?;
    let mut input = Vec::new();
    loop {
        let Some(head) = read_head(&mut stream, &mut input).await? else { return Ok(()) };
        let mut words = head.split_ascii_whitespace();
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (status, body) = match answer(path, &duty.name, port, peer) {
            _ if method != "GET" => ("405 Method Not Allowed", Vec::new()),
            Some(body) => ("200 OK", body),
            None => ("404 Not Found", Vec::new()),
        };
        let asked_to = head.to_ascii_lowercase().contains("\r\nconnection: close");
        let close = asked_to || duty.draining.load(Ordering::Relaxed);
        let connection = if close { "close" } else { "keep-alive" };
        let mut response =
            format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n", body.len())
                .into_bytes();
        response.extend(body);
        stream.write_all(&response).await?;
        if close {
            return Ok(());
        }
    }
}

/// Reads up to the empty line and leaves in `input` what came after it. None: no further request.
async fn read_head(stream: &mut TcpStream, input: &mut Vec<u8>) -> io::Result<Option<String>> {
    loop {
        if let Some(end) = input.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = input.drain(..end + 4).collect();
            return Ok(String::from_utf8(head).ok());
        }
        if input.len() > HEAD_MAX || stream.read_buf(input).await? == 0 {
            return Ok(None);
        }
    }
}

async fn echo(socket: UdpSocket, port: u16, duty: Arc<Duty>) {
    let mut datagram = vec![0; DATAGRAM_MAX];
    loop {
        // Errors here are about clients that have closed their sockets.
        let Ok((length, peer)) = socket.recv_from(&mut datagram).await else { continue };
        let path = String::from_utf8_lossy(&datagram[..length]);
        if path == LATE {
            tokio::time::sleep(LATE_BY).await;
        }
        let body = answer(&path, &duty.name, port, peer).unwrap_or_default();
        let _ = socket.send_to(&body, peer).await;
    }
}

/// Datagrams with this path are answered late.
const LATE: &str = "/late";
const LATE_BY: Duration = Duration::from_millis(200);

fn answer(path: &str, name: &str, port: u16, peer: SocketAddr) -> Option<Vec<u8>> {
    match path {
        "/" | LATE => Some(format!("{name}\n").into_bytes()),
        "/port" => Some(format!("{port}\n").into_bytes()),
        "/who" => Some(format!("{name} {}\n", peer.ip().to_canonical()).into_bytes()),
        "/client" => Some(format!("{}\n", peer.ip().to_canonical()).into_bytes()),
        _ => path.strip_prefix("/bytes/")?.parse().ok().map(|count| vec![b'x'; count]),
    }
}
