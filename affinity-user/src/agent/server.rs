//! An HTTP server that clients cannot exhaust, for the ports that the agent opens.
//!
//! It holds a bounded number of connections. When one more arrives, the oldest connection that is not being answered is closed,
//! so a new client is always served: clients that connect and send nothing cannot block probes. A request must arrive within
//! [`Limits::read`], which also bounds how long a connection may stay idle. A connection ends after [`Limits::age`], so a slow
//! reader cannot hold one.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{Router, body::Body, extract::Request};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, listen, socket_with, sockopt};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet, yield_now},
    time::{sleep, timeout},
};
use tower::Service as _;
use tracing::warn;

/// A server's limits for its clients.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Open connections.
    pub(super) connections: usize,
    /// From a connection's start, or from the end of an answer, until the next request has arrived.
    pub(super) read: Duration,
    /// From a connection's start until it is asked to end; it gets [`LAST_ANSWER`] on top.
    pub(super) age: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 256, read: Duration::from_secs(5), age: Duration::from_secs(30) }
    }
}

/// How long an answer may take if it was begun before its connection grew too old.
const LAST_ANSWER: Duration = Duration::from_secs(5);
/// Bytes of a request, and of output that waits for a slow client.
const BUFFER: usize = 16 * 1024;
/// How long to wait after `accept` failed, for example because no file descriptor was left.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// How long to wait before a taken port is tried again.
pub(super) const TRY_AGAIN: Duration = Duration::from_secs(2);

/// Connections that the kernel completes before they are accepted: a burst fits, so no client has to repeat its SYN.
pub(super) const BACKLOG: i32 = 4096;

/// Listens at `at` and answers requests until the future is dropped. While the port is taken, listening is retried; `on_taken`
/// gets the first error. Returns only if this machine does not have the address's family.
pub(super) async fn serve_at(at: SocketAddr, router: Router, limits: Limits, on_taken: impl FnOnce(io::Error)) {
    let mut on_taken = Some(on_taken);
    loop {
        match listener(at) {
            Ok(listener) => match serve(listener, router, limits).await {},
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return,
            Err(error) => {
                if let Some(on_taken) = on_taken.take() {
                    on_taken(error);
                }
            }
        }
        sleep(TRY_AGAIN).await;
    }
}

/// A listener of IPv6 does not accept IPv4, so that each family can have its own.
fn listener(at: SocketAddr) -> io::Result<TcpListener> {
    let family = match at.ip() {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if at.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    bind(&socket, &at)?;
    listen(&socket, BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Answers requests to `listener` until the future is dropped, which closes all connections.
pub(super) async fn serve(listener: TcpListener, router: Router, limits: Limits) -> Infallible {
    let mut connections = Connections::default();
    let mut is_failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                is_failing = false;
                connections.make_room(limits.connections);
                connections.start(stream, router.clone(), limits);
                // A request that came with the connection is answered before the next client is accepted.
                yield_now().await;
            }
            Err(error) if is_the_clients(&error) => {}
            Err(error) => {
                if !is_failing {
                    warn!("cannot accept HTTP connections: {error}");
                }
                is_failing = true;
                sleep(AFTER_FAILURE).await;
            }
        }
    }
}

/// Whether an error of `accept` only means that this client has gone already.
fn is_the_clients(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted)
}

/// The open connections, the oldest first.
#[derive(Default)]
struct Connections {
    tasks: JoinSet<()>,
    open: VecDeque<Connection>,
}

struct Connection {
    task: AbortHandle,
    /// Whether a request is being answered.
    is_busy: Arc<AtomicBool>,
}

impl Connections {
    /// At the limit, closes the oldest idle connection, or the oldest if none is idle.
    fn make_room(&mut self, limit: usize) {
        while self.tasks.try_join_next().is_some() {}
        if self.open.len() >= limit {
            self.open.retain(|connection| !connection.task.is_finished());
        }
        if self.open.len() < limit {
            return;
        }
        let idle = self.open.iter().position(|connection| !connection.is_busy.load(Relaxed));
        if let Some(spared) = self.open.remove(idle.unwrap_or(0)) {
            spared.task.abort();
        }
    }

    fn start(&mut self, stream: TcpStream, router: Router, limits: Limits) {
        let is_busy = Arc::new(AtomicBool::new(false));
        let task = self.tasks.spawn(talk(stream, router, limits, Arc::clone(&is_busy)));
        self.open.push_back(Connection { task, is_busy });
    }
}

/// Answers the requests of one connection. Errors are the client's, and are ignored.
async fn talk(stream: TcpStream, router: Router, limits: Limits, is_busy: Arc<AtomicBool>) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let (mut router, is_busy) = (router.clone(), Arc::clone(&is_busy));
        async move {
            is_busy.store(true, Relaxed);
            let answer = router.call(request.map(Body::new)).await;
            is_busy.store(false, Relaxed);
            answer
        }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.read)
            .max_buf_size(BUFFER)
            .serve_connection(TokioIo::new(stream), service)
    );
    if timeout(limits.age, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        _ = timeout(LAST_ANSWER, connection).await;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{
        io::{Read, Write},
        net::TcpStream,
        thread,
        time::Instant,
    };

    use axum::routing::get;
    use tokio::time::sleep;

    use super::*;

    /// A server with these limits, on a thread that ends with the test.
    fn started(limits: Limits) -> SocketAddr {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a socket");
        let address = listener.local_addr().expect("its address");
        let long = || async {
            sleep(Duration::from_secs(3)).await;
            "long\n"
        };
        let router = Router::new().route("/", get(|| async { "ok\n" })).route("/long", get(long));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        thread::spawn(move || {
            runtime.block_on(async { serve(TcpListener::from_std(listener).expect("a socket"), router, limits).await })
        });
        address
    }

    fn send(at: SocketAddr, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(at).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        stream.write_all(text.as_bytes()).expect("room to write");
        stream
    }

    /// What a client receives until the server closes; errors count as the end.
    fn rest(mut stream: TcpStream) -> String {
        let mut answer = Vec::new();
        _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).expect("text")
    }

    const WHOLE: &str = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    const HALF: &str = "GET / HTTP/1.1\r\nHost: x\r\n";
    const LONG: &str = "GET /long HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

    /// The whole answer to a request, after twice as many other clients as a server accepts have sent half a request. The
    /// oldest of those is closed.
    pub(in crate::agent) fn ask_beside_half_sent(at: SocketAddr, path: &str) -> String {
        let mut half: Vec<_> = (0..2 * Limits::default().connections).map(|_| send(at, HALF)).collect();
        let answer = rest(send(at, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")));
        let end = half[0].read(&mut [0]);
        let is_closed = end.as_ref().map_or_else(|error| error.kind() == ErrorKind::ConnectionReset, |len| *len == 0);
        assert!(is_closed, "{end:?}: it stays open");
        answer
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_waited_for() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let at = taken.local_addr().expect("its number");
        let router = Router::new().route("/", get(|| async { "ok\n" }));
        let (errors, hears) = std::sync::mpsc::channel();
        tokio::spawn(serve_at(at, router, Limits::default(), move |error| errors.send(error).expect("it is awaited")));
        while hears.try_recv().map_err(|error| assert_eq!(error, std::sync::mpsc::TryRecvError::Empty)).is_err() {
            yield_now().await;
        }
        drop(taken);
        let answer = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            while TcpStream::connect(at).is_err() {
                assert!(began.elapsed() < Duration::from_secs(20), "nobody listens");
                thread::sleep(Duration::from_millis(10));
            }
            rest(send(at, WHOLE))
        });
        assert!(answer.await.expect("no panic").ends_with("ok\n"));
    }

    #[test]
    fn half_sent_requests_do_not_block_others() {
        let at = started(Limits { connections: 8, ..Limits::default() });
        let answered_first = send(at, LONG);
        let half: Vec<_> = (0..100).map(|_| send(at, HALF)).collect();
        for _ in 0..20 {
            assert!(rest(send(at, WHOLE)).ends_with("ok\n"));
        }
        assert!(rest(answered_first).ends_with("long\n"), "a request that is being answered was given up");
        let began = Instant::now();
        half.into_iter().for_each(|stream| assert_eq!(rest(stream), ""));
        assert!(began.elapsed() < Duration::from_secs(10), "half-sent requests stay open");
    }

    #[test]
    fn silent_and_old_connections_end() {
        let at = started(Limits { read: Duration::from_millis(200), ..Limits::default() });
        let began = Instant::now();
        assert_eq!(rest(send(at, "")), "");
        assert_eq!(rest(send(at, HALF)), "");
        // One that has been answered and stays idle.
        assert!(rest(send(at, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")).ends_with("ok\n"));
        assert!(began.elapsed() < Duration::from_secs(8));

        let at = started(Limits { age: Duration::from_millis(200), ..Limits::default() });
        let (began, mut stream) = (Instant::now(), send(at, ""));
        while stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").is_ok() {
            assert!(began.elapsed() < Duration::from_secs(8), "one that asks again and again stays open");
            thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn an_old_connection_gets_the_answer_in_progress() {
        let at = started(Limits { age: Duration::from_millis(200), ..Limits::default() });
        assert!(rest(send(at, LONG)).ends_with("long\n"));
    }
}
