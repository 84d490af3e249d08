//! A process that creates and uses sockets on command, one line each: see `affinity_tests::lab::SocketProcess`.
//!
//! | line | does |
//! |---|---|
//! | `connect TCP\|UDP ADDRESS` | makes the next socket, connects it; answers its peer |
//! | `bind ADDRESS` | makes the next socket: UDP, of that address's family |
//! | `ask N PATH` | asks over socket N; answers the body |
//! | `send N ADDRESS PATH` | asks by a datagram; answers the body and the sender |
//! | `wait N` | waits until socket N fails; answers the error |
//! | `peer N`, `close N` | |

use std::io::{self, BufRead, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use affinity_tests::patience::patience;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long `wait` waits.
const AT_ONCE: Duration = Duration::from_secs(1);

enum Socket {
    Tcp(TcpStream),
    Udp(UdpSocket),
    Closed,
}

fn main() -> io::Result<()> {
    let mut sockets = Vec::new();
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match run(&mut sockets, &words) {
            Ok(text) => format!("ok {text}"),
            Err(error) => format!("error {:?}", error.kind()),
        };
        let mut out = io::stdout().lock();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

fn run(sockets: &mut Vec<Socket>, words: &[&str]) -> io::Result<String> {
    match words {
        ["connect", protocol, to] => {
            let socket = connect(protocol, parse(to)?);
            let peer = socket.as_ref().map_or(Ok(String::new()), peer);
            let (socket, failure) = match socket {
                Ok(socket) => (socket, None),
                Err(error) => (Socket::Closed, Some(error)),
            };
            sockets.push(socket);
            failure.map_or(peer, Err)
        }
        ["bind", like] => {
            sockets.push(Socket::Udp(bind(parse(like)?)?));
            Ok(String::new())
        }
        ["ask", number, path] => ask(find(sockets, number)?, path),
        ["send", number, to, path] => match find(sockets, number)? {
            Socket::Udp(socket) => {
                socket.send_to(path.as_bytes(), parse(to)?)?;
                let mut datagram = [0; 2048];
                let (len, from) = socket.recv_from(&mut datagram)?;
                Ok(format!("{} from {from}", text(&datagram[..len])))
            }
            Socket::Tcp(_) | Socket::Closed => Err(io::ErrorKind::InvalidInput.into()),
        },
        ["wait", number] => wait(find(sockets, number)?),
        ["peer", number] => peer(find(sockets, number)?),
        ["close", number] => {
            *find(sockets, number)? = Socket::Closed;
            Ok(String::new())
        }
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn parse(address: &str) -> io::Result<SocketAddr> {
    address.parse().map_err(io::Error::other)
}

fn find<'a>(sockets: &'a mut [Socket], number: &str) -> io::Result<&'a mut Socket> {
    let number: usize = number.parse().map_err(io::Error::other)?;
    sockets.get_mut(number).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn bind(like: SocketAddr) -> io::Result<UdpSocket> {
    let socket = match like {
        SocketAddr::V4(_) => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)),
    }?;
    socket.set_read_timeout(Some(patience(PATIENCE)))?;
    Ok(socket)
}

fn connect(protocol: &str, to: SocketAddr) -> io::Result<Socket> {
    if protocol == "UDP" {
        let socket = bind(to)?;
        socket.connect(to)?;
        return Ok(Socket::Udp(socket));
    }
    let stream = TcpStream::connect_timeout(&to, patience(PATIENCE))?;
    stream.set_read_timeout(Some(patience(PATIENCE)))?;
    stream.set_nodelay(true)?;
    Ok(Socket::Tcp(stream))
}

fn peer(socket: &Socket) -> io::Result<String> {
    let peer = match socket {
        Socket::Tcp(stream) => stream.peer_addr(),
        Socket::Udp(socket) => socket.peer_addr(),
        Socket::Closed => Err(io::ErrorKind::NotConnected.into()),
    };
    Ok(peer?.to_string())
}

fn ask(socket: &mut Socket, path: &str) -> io::Result<String> {
    let mut bytes = [0; 2048];
    match socket {
        Socket::Udp(socket) => {
            socket.send(path.as_bytes())?;
            let len = socket.recv(&mut bytes)?;
            Ok(text(&bytes[..len]))
        }
        Socket::Tcp(stream) => {
            write!(stream, "GET {path} HTTP/1.1\r\nHost: lab\r\n\r\n")?;
            let mut response = Vec::new();
            // The pods' answers end in a newline after the empty line, and arrive in one piece.
            while !(response.ends_with(b"\n") && response.windows(4).any(|end| end == b"\r\n\r\n"))
                || response.ends_with(b"\r\n\r\n")
            {
                let len = stream.read(&mut bytes)?;
                if len == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                response.extend_from_slice(&bytes[..len]);
            }
            Ok(text(&response).lines().last().unwrap_or_default().to_owned())
        }
        Socket::Closed => Err(io::ErrorKind::NotConnected.into()),
    }
}

/// A time-out is no answer: the socket was not closed.
fn wait(socket: &mut Socket) -> io::Result<String> {
    let mut bytes = [0; 2048];
    let outcome = match socket {
        Socket::Tcp(stream) => {
            stream.set_read_timeout(Some(patience(AT_ONCE)))?;
            stream.read(&mut bytes)
        }
        Socket::Udp(socket) => {
            socket.set_read_timeout(Some(patience(AT_ONCE)))?;
            socket.recv(&mut bytes)
        }
        Socket::Closed => Err(io::ErrorKind::NotConnected.into()),
    };
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
        Err(error) => Ok(format!("{:?}", error.kind())),
        Ok(len) => Ok(format!("{len} bytes")),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end().to_owned()
}
