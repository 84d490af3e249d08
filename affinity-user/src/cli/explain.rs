//! `affinity explain`: what the next packet would meet, from the kernel's tables or from YAML alone.

use std::{
    collections::BTreeMap,
    io::{self, BufWriter, Write},
    net::{IpAddr, SocketAddr},
    path::Path,
};

use affinity_common::{
    abi::{Address, Direction, V4, V6, filter_bit},
    model::Model,
    parse::{TCP, UDP},
    tables::FamilyTables,
};
use clap::Args;

use super::{
    Global,
    error::Error,
    node::NodeArgs,
    output::{Format, Tone, object, paint, wants_colour},
    reading::Reading,
    source::{self, ClusterArgs, SourceName},
};
use crate::{
    store::kernel::{Family, KernelStore, filter_word},
    view::{Catalog, Endpoint, Explanation, FrontendTables, Question, Situation, explain, pool_backends, session_keys},
};

/// Options of `affinity explain`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct ExplainArgs {
    /// The client; with a port, that connection of the client
    #[arg(long, value_name = "IP[:PORT]", value_parser = parse_from)]
    from: From,
    /// What it dials; TCP, unless `/udp` follows
    #[arg(long, value_name = "IP:PORT[/udp]", value_parser = parse_to)]
    to: To,
    /// Ask this YAML, or the API of a cluster, instead of the kernel: needs no root, and knows no pins
    #[arg(long, value_name = "PATH|kubernetes")]
    source: Option<SourceName>,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    node: NodeArgs,
    /// The form of output
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct From {
    address: IpAddr,
    port: Option<u16>,
}

fn parse_from(text: &str) -> Result<From, String> {
    if let Ok(address) = text.trim_start_matches('[').trim_end_matches(']').parse() {
        return Ok(From { address, port: None });
    }
    let socket: SocketAddr = text.parse().map_err(|_| "expected IP, IP:PORT or [IPv6]:PORT".to_owned())?;
    Ok(From { address: socket.ip(), port: Some(socket.port()) })
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct To {
    endpoint: Endpoint,
    protocol: u8,
}

fn parse_to(text: &str) -> Result<To, String> {
    let (socket, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "tcp" => TCP,
        "udp" => UDP,
        other => return Err(format!("`/{other}`: expected /tcp or /udp")),
    };
    let socket: SocketAddr = socket.parse().map_err(|_| "expected IP:PORT or [IPv6]:PORT".to_owned())?;
    Ok(To { endpoint: Endpoint { address: socket.ip(), port: socket.port() }, protocol })
}

impl ExplainArgs {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Error> {
        if self.from.address.is_ipv4() != self.to.endpoint.address.is_ipv4() {
            return Err(Error::Usage("--from and --to must both be IPv4, or both IPv6".to_owned()));
        }
        let question = Question {
            from: self.from.address,
            from_port: self.from.port,
            to: self.to.endpoint,
            protocol: self.to.protocol,
        };
        match (&self.source, question.from) {
            (Some(source), from) => {
                let source = self.cluster.source(source, global)?;
                let catalog = source::catalog(&source::read(&source, self.node.told(global)?)?)?;
                match from {
                    IpAddr::V4(_) => self.print(&explain(&catalog, &question, &of_source::<V4>(&catalog, &question))),
                    IpAddr::V6(_) => self.print(&explain(&catalog, &question, &of_source::<V6>(&catalog, &question))),
                }
            }
            (None, IpAddr::V4(_)) => self.of_kernel::<V4>(&global.pin_dir, &question),
            (None, IpAddr::V6(_)) => self.of_kernel::<V6>(&global.pin_dir, &question),
        }
    }

    fn of_kernel<A: Family + FrontendTables>(&self, pin_dir: &Path, question: &Question) -> Result<(), Error>
    where
        Model: FamilyTables<A>,
    {
        let Reading { store, catalog } = Reading::open(pin_dir)?;
        self.print(&explain(&catalog, question, &of_kernel::<A>(&store, &catalog, question)?))
    }

    fn print(&self, answer: &Explanation<'_>) -> Result<(), Error> {
        let mut out = BufWriter::new(io::stdout().lock());
        if !object(&mut out, self.output, answer)? {
            print_steps(&mut out, answer, wants_colour())?;
        }
        Ok(out.flush()?)
    }
}

/// Copies of what the packet would meet in the kernel.
fn of_kernel<A: Family + FrontendTables>(
    store: &KernelStore,
    catalog: &Catalog,
    question: &Question,
) -> Result<Situation<A>, Error> {
    let tables = store.family::<A>();
    let mut sessions = BTreeMap::new();
    for key in session_keys::<A>(catalog, question) {
        if let Some(session) = tables.sessions.get(&key)? {
            sessions.insert(key, session);
        }
    }
    let key = question.key::<A>();
    let (word, bit) = filter_word(Direction::Forward, filter_bit(key.daddr, key.dport, key.protocol));
    let backends = pool_backends::<A>(catalog, question).into_iter().filter(|&index| index < store.loads.len());
    Ok(Situation {
        in_filter: store.filter.load_u64(word) & bit != 0,
        sessions,
        flow: if question.from_port.is_some() { tables.flows.get(&key)? } else { None },
        loads: backends.map(|index| (index, store.loads.load_u64(index))).collect(),
    })
}

/// A dataplane that no packet has met yet.
fn of_source<A: Address + FrontendTables>(catalog: &Catalog, question: &Question) -> Situation<A> {
    Situation {
        in_filter: question.is_frontend::<A>(catalog),
        sessions: BTreeMap::new(),
        flow: None,
        loads: BTreeMap::new(),
    }
}

fn print_steps(out: &mut impl Write, answer: &Explanation<'_>, colour: bool) -> io::Result<()> {
    let width = answer.steps.iter().map(|step| step.step.len()).max().unwrap_or(0);
    for step in &answer.steps {
        let tone = match (step.step, answer.verdict) {
            ("verdict", "forward") => Tone::Good,
            ("verdict", "pass") => Tone::Plain,
            ("verdict", _) => Tone::Bad,
            _ => Tone::Plain,
        };
        let name = paint(&format!("{:width$}", step.step), Tone::Faint, colour);
        writeln!(out, "{name}   {}", paint(&step.finds, tone, colour))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_with_and_without_ports() {
        let from = |text: &str| parse_from(text).map(|from| (from.address.to_string(), from.port));
        assert_eq!(from("192.0.2.1"), Ok(("192.0.2.1".to_owned(), None)));
        assert_eq!(from("192.0.2.1:80"), Ok(("192.0.2.1".to_owned(), Some(80))));
        assert_eq!(from("2001:db8::1"), Ok(("2001:db8::1".to_owned(), None)));
        assert_eq!(from("[2001:db8::1]:80"), Ok(("2001:db8::1".to_owned(), Some(80))));
        assert!(from("web").is_err() && from("192.0.2.1:").is_err());
        let to = |text: &str| parse_to(text).map(|to| (to.endpoint.to_string(), to.protocol));
        assert_eq!(to("10.96.0.10:80"), Ok(("10.96.0.10:80".to_owned(), 6)));
        assert_eq!(to("10.96.0.10:53/udp"), Ok(("10.96.0.10:53".to_owned(), 17)));
        assert_eq!(to("[2001:db8::1]:53/UDP"), Ok(("[2001:db8::1]:53".to_owned(), 17)));
        assert!(to("10.96.0.10").is_err() && to("10.96.0.10:80/icmp").is_err());
    }
}
