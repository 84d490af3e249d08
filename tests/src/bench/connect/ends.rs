//! Both ends of every connection, in one thread: it creates the sockets of the clients and of the pod, and alternates between
//! them. It never waits for itself: when it reads, the data that it wrote before has arrived, or is about to.
//!
//! It is a separate process, because programs for sockets see those of a cgroup. It reads a [`Course`], then [`Request`]s, one
//! line of JSON each, and writes an [`Answer`] to each.

use std::{
    io::{self, BufRead, ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::{
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, connect, recv, socket_with, sockopt},
    process::setpriority_process,
    thread::{CpuSet, sched_setaffinity},
};
use serde::{Deserialize, Serialize};

use super::Measure;
use crate::lab::{Door, raise_file_limit};

/// How long anything may take before the network counts as broken.
const PATIENCE: Duration = Duration::from_secs(30);
/// The highest priority, which leaves the least time to other work of the machine.
const BEFORE_OTHERS: i32 = -20;
/// Connections that are not kept use these ports in turn, for each client.
const PORTS: std::ops::RangeInclusive<u16> = 4096..=u16::MAX;
/// The port of each client for the connection that it keeps, and that of the stream.
const REQUESTS_PORT: u16 = 1024;
const STREAM_PORT: u16 = 1025;
/// Connections that may wait for the pod.
const BACKLOG: i32 = 128;
/// The block size of a stream.
const BLOCK: usize = 1 << 17;
/// A short request and its answer.
const REQUEST: &[u8] = b"GET /index.html HTTP/1.1\r\nHost: service.default.svc\r\nAccept: */*\r\n\r\n";
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\n\r\nhello\n";

/// The addresses of both ends.
#[derive(Serialize, Deserialize)]
pub(super) struct Course {
    /// The pod's namespace.
    pub(super) pod: PathBuf,
    /// The processor to stay on.
    pub(super) cpu: usize,
    /// The clients' addresses.
    pub(super) clients: Vec<Ipv4Addr>,
    /// The pod's addresses.
    pub(super) endpoints: Vec<IpAddr>,
    /// The pod's TCP port, on each of its addresses.
    pub(super) stream_port: u16,
    /// The pod's port that echoes datagrams.
    pub(super) datagram_port: u16,
    /// The destinations of the clients' TCP connections, in turn.
    pub(super) stream_to: Vec<SocketAddr>,
    /// The destinations of their datagrams, in turn.
    pub(super) datagrams_to: Vec<SocketAddr>,
}

/// A request to the process.
#[derive(Serialize, Deserialize)]
pub(super) enum Request {
    /// Every client connects once: returns the endpoint of each.
    Places,
    /// Count for about this many seconds.
    Measure { measure: Measure, seconds: f64 },
}

/// The answer of the process.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// The endpoint of each client.
    Places(Vec<IpAddr>),
    /// What was counted.
    Measured(Rate),
    /// Why there is no answer.
    Failed(String),
}

/// A count, and its duration.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Rate {
    count: u64,
    seconds: f64,
}

impl Rate {
    pub(super) fn per_second(self) -> f64 {
        self.count as f64 / self.seconds
    }
}

/// The process: acts as both ends until its standard input ends.
///
/// # Errors
/// When its arguments are invalid, or the pod's sockets cannot be made.
pub fn both_ends() -> Result<()> {
    let mut lines = io::stdin().lock().lines();
    let course: Course = serde_json::from_str(&lines.next().context("no course")??)?;
    let mut ends = Ends::make(course)?;
    for line in lines {
        let answer = match ends.answer(&serde_json::from_str(&line?)?) {
            Ok(answer) => answer,
            Err(error) => Answer::Failed(format!("{error:#}")),
        };
        println!("{}", serde_json::to_string(&answer)?);
    }
    Ok(())
}

struct Ends {
    course: Course,
    listener: TcpListener,
    /// One for each of the pod's addresses, so that an answer comes from the address that the request went to.
    echoes: Vec<UdpSocket>,
    next_port: u16,
    next_client: usize,
    requests: Vec<[TcpStream; 2]>,
    datagrams: Vec<(UdpSocket, usize)>,
    stream: Option<[TcpStream; 2]>,
}

impl Ends {
    fn make(course: Course) -> Result<Self> {
        let mut cpus = CpuSet::new();
        cpus.set(course.cpu);
        sched_setaffinity(None, &cpus).with_context(|| format!("processor {}", course.cpu))?;
        setpriority_process(None, BEFORE_OTHERS)?;
        raise_file_limit()?;
        let (listener, echoes) = Door::open(&course.pod)?.run(|| pod_sockets(&course))??;
        Ok(Self {
            course,
            listener,
            echoes,
            next_port: *PORTS.start(),
            next_client: 0,
            requests: Vec::new(),
            datagrams: Vec::new(),
            stream: None,
        })
    }

    fn answer(&mut self, request: &Request) -> Result<Answer> {
        match request {
            Request::Places => {
                Ok(Answer::Places((0..self.course.clients.len()).map(|c| self.place(c)).collect::<Result<_>>()?))
            }
            Request::Measure { measure, seconds } => {
                let length = Duration::from_secs_f64(*seconds);
                Ok(Answer::Measured(match measure {
                    Measure::Connections => count_for(length, || self.connect_once())?,
                    Measure::Requests => {
                        self.keep_requests()?;
                        count_for(length, || self.request_once())?
                    }
                    Measure::Stream => {
                        self.keep_stream()?;
                        self.stream_for(length)?
                    }
                    Measure::Datagrams => {
                        self.keep_datagrams()?;
                        count_for(length, || self.send_once())?
                    }
                }))
            }
        }
    }

    /// The pod's address that a client is connected to.
    fn place(&mut self, client: usize) -> Result<IpAddr> {
        let [near, far] = self.dial_anew(client)?;
        let place = far.local_addr()?.ip();
        close(near, far)?;
        Ok(place)
    }

    /// A new, short connection of a client.
    fn dial_anew(&mut self, client: usize) -> Result<[TcpStream; 2]> {
        self.next_port = self.next_port.checked_add(1).unwrap_or(*PORTS.start());
        self.dial(client, self.next_port)
    }

    /// A new connection of a client: its end and the pod's. It chooses the port, so that the kernel's search for one is not
    /// measured.
    fn dial(&self, client: usize, port: u16) -> Result<[TcpStream; 2]> {
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        let from = SocketAddr::from((self.course.clients[client], port));
        bind(&socket, &from).with_context(|| from.to_string())?;
        let to = self.course.stream_to[client % self.course.stream_to.len()];
        connect(&socket, &to).with_context(|| format!("{from} to {to}"))?;
        let (far, _) = self.listener.accept().with_context(|| format!("{from} to {to} arrives"))?;
        Ok([socket.into(), far])
    }

    fn turn(&mut self) -> usize {
        self.next_client = (self.next_client + 1) % self.course.clients.len();
        self.next_client
    }

    fn connect_once(&mut self) -> Result<u64> {
        let client = self.turn();
        let [mut near, mut far] = self.dial_anew(client)?;
        let mut byte = [0];
        near.write_all(b"?")?;
        far.read_exact(&mut byte)?;
        far.write_all(b"!")?;
        near.read_exact(&mut byte)?;
        close(near, far)?;
        Ok(1)
    }

    fn keep_requests(&mut self) -> Result<()> {
        for client in self.requests.len()..self.course.clients.len() {
            let ends = self.dial_to_keep(client, REQUESTS_PORT)?;
            self.requests.push(ends);
        }
        Ok(())
    }

    fn keep_stream(&mut self) -> Result<()> {
        if self.stream.is_none() {
            let ends = self.dial_to_keep(0, STREAM_PORT)?;
            ends.iter().try_for_each(|end| end.set_nonblocking(true))?;
            self.stream = Some(ends);
        }
        Ok(())
    }

    fn dial_to_keep(&self, client: usize, port: u16) -> Result<[TcpStream; 2]> {
        let ends = self.dial(client, port)?;
        for end in &ends {
            end.set_nodelay(true)?;
            end.set_read_timeout(Some(PATIENCE))?;
        }
        Ok(ends)
    }

    fn request_once(&mut self) -> Result<u64> {
        let client = self.turn();
        let [near, far] = &mut self.requests[client];
        near.write_all(REQUEST)?;
        far.read_exact(&mut [0; REQUEST.len()])?;
        far.write_all(ANSWER)?;
        near.read_exact(&mut [0; ANSWER.len()])?;
        Ok(1)
    }

    fn stream_for(&mut self, length: Duration) -> Result<Rate> {
        let [near, far] = self.stream.as_mut().context("the stream")?;
        let (block, mut received) = (vec![b'x'; BLOCK], vec![0; BLOCK]);
        count_for(length, || {
            let written = unless_blocked(near.write(&block))?;
            let mut bytes = 0;
            loop {
                match unless_blocked(far.read(&mut received))? {
                    0 => break,
                    some => bytes += some as u64,
                }
            }
            if written == 0 && bytes == 0 {
                thread::yield_now();
            }
            Ok(bytes)
        })
    }

    /// Makes a socket for each client, and stores the pod's address that gets its datagrams.
    fn keep_datagrams(&mut self) -> Result<()> {
        for client in self.datagrams.len()..self.course.clients.len() {
            let near = UdpSocket::bind((self.course.clients[client], 0))?;
            near.set_read_timeout(Some(PATIENCE))?;
            near.connect(self.course.datagrams_to[client % self.course.datagrams_to.len()])?;
            near.send(b"?")?;
            let endpoint = self.find_datagram()?;
            self.datagrams.push((near, endpoint));
        }
        Ok(())
    }

    fn find_datagram(&self) -> Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let arrived = |echo: &UdpSocket| recv(echo, &mut [0; 8], RecvFlags::DONTWAIT).is_ok();
            if let Some(index) = self.echoes.iter().position(arrived) {
                return Ok(index);
            }
        }
        anyhow::bail!("a datagram has arrived nowhere in {PATIENCE:?}")
    }

    fn send_once(&mut self) -> Result<u64> {
        let client = self.turn();
        let (near, endpoint) = &self.datagrams[client];
        let mut datagram = [0; 64];
        near.send(&datagram[..32])?;
        let (_, peer) = self.echoes[*endpoint].recv_from(&mut datagram)?;
        self.echoes[*endpoint].send_to(&datagram[..32], peer)?;
        near.recv(&mut datagram)?;
        Ok(1)
    }
}

/// The pod's listening sockets.
fn pod_sockets(course: &Course) -> Result<(TcpListener, Vec<UdpSocket>)> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
    bind(&socket, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, course.stream_port)))?;
    rustix::net::listen(&socket, BACKLOG)?;
    let echo = |endpoint: &IpAddr| -> Result<UdpSocket> {
        let echo = UdpSocket::bind((*endpoint, course.datagram_port))?;
        echo.set_read_timeout(Some(PATIENCE))?;
        Ok(echo)
    };
    Ok((socket.into(), course.endpoints.iter().map(echo).collect::<Result<_>>()?))
}

/// Closes a connection in order, the client first.
fn close(mut near: TcpStream, mut far: TcpStream) -> Result<()> {
    near.shutdown(Shutdown::Write)?;
    anyhow::ensure!(far.read(&mut [0])? == 0, "bytes that nobody has sent");
    drop(far);
    anyhow::ensure!(near.read(&mut [0])? == 0, "bytes that nobody has sent");
    Ok(())
}

fn count_for(length: Duration, mut one: impl FnMut() -> Result<u64>) -> Result<Rate> {
    let begun = Instant::now();
    let mut count = 0;
    loop {
        count += one()?;
        let elapsed = begun.elapsed();
        if elapsed >= length {
            return Ok(Rate { count, seconds: elapsed.as_secs_f64() });
        }
    }
}

/// A count of bytes, 0 if a socket would have to wait.
fn unless_blocked(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        other => other,
    }
}
