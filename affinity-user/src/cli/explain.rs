//! `affinity explain`: what the next packet would meet, from the kernel's tables or from YAML alone.

use std::{
    collections::BTreeMap,
    io::{self, BufWriter, Write},
    net::{IpAddr, SocketAddr},
};

use affinity_common::{
    abi::{Address, Direction, FlowKey, V4, V6, netns_client},
    model::Model,
    parse::{TCP, UDP},
    tables::FamilyTables,
};
use clap::Args;

use super::{
    Global,
    client::ClientArg,
    error::Error,
    node::NodeArgs,
    output::{Format, Tone, object, paint, wants_colour},
    reading::Reading,
    source::{self, ClusterArgs, SourceName},
};
use crate::{
    store::kernel::{Family, KernelStore, filter_word},
    view::{
        Catalog, Endpoint, Explanation, FrontendTables, Question, Situation, explain, ip, pool_backends, session_keys,
    },
};

/// Options of `affinity explain`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct ExplainArgs {
    /// The client; with a port, that connection of the client. By name, a socket of the node itself (`node`) or of a pod on
    /// it
    #[arg(long, value_name = "IP[:PORT]|NAME", value_parser = parse_from)]
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

#[derive(Clone, PartialEq, Eq, Debug)]
enum From {
    Address(IpAddr, Option<u16>),
    /// A network namespace of this machine, whose sockets are translated.
    Named(ClientArg),
}

fn parse_from(text: &str) -> Result<From, String> {
    if let Ok(address) = text.trim_start_matches('[').trim_end_matches(']').parse() {
        return Ok(From::Address(address, None));
    }
    if let Ok(socket) = text.parse::<SocketAddr>() {
        return Ok(From::Address(socket.ip(), Some(socket.port())));
    }
    match text.parse() {
        Ok(named @ ClientArg::Named(_)) => Ok(From::Named(named)),
        _ => Err("expected IP, IP:PORT, [IPv6]:PORT, `node`, the name of a pod, or netns:COOKIE".to_owned()),
    }
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
        match &self.source {
            Some(source) => {
                let source = self.cluster.source(source, global)?;
                let catalog = source::catalog(&source::read(&source, self.node.told(global)?)?)?;
                let question = self.questions(&catalog)?.remove(0);
                match question.from {
                    IpAddr::V4(_) => self.print(&explain(&catalog, &question, &of_source::<V4>(&catalog, &question))),
                    IpAddr::V6(_) => self.print(&explain(&catalog, &question, &of_source::<V6>(&catalog, &question))),
                }
            }
            None => {
                let reading = Reading::open(&global.pin_dir)?;
                let questions = self.questions(&reading.catalog)?;
                match questions[0].from {
                    IpAddr::V4(_) => self.of_kernel::<V4>(&reading, &questions),
                    IpAddr::V6(_) => self.of_kernel::<V6>(&reading, &questions),
                }
            }
        }
    }

    /// What is asked: more than one thing where several namespaces have the client's name; never nothing.
    fn questions(&self, catalog: &Catalog) -> Result<Vec<Question>, Error> {
        let To { endpoint, protocol } = self.to;
        let question = |from, from_port| Question { from, from_port, to: endpoint, protocol };
        match &self.from {
            From::Address(address, port) => {
                let question = question(*address, *port);
                if !question.is_socket() && address.is_ipv4() != endpoint.address.is_ipv4() {
                    return Err(Error::Usage("--from and --to must both be IPv4, or both IPv6".to_owned()));
                }
                Ok(vec![question])
            }
            From::Named(name) => {
                let family = if endpoint.address.is_ipv4() { 4 } else { 6 };
                let key = |cookie| question(ip(netns_client(cookie, family)), None);
                Ok(name.cookies(catalog)?.into_iter().map(key).collect())
            }
        }
    }

    fn of_kernel<A: Family + FrontendTables>(&self, reading: &Reading, questions: &[Question]) -> Result<(), Error>
    where
        Model: FamilyTables<A>,
    {
        let Reading { store, catalog } = reading;
        let mut asked = Vec::new();
        for question in questions {
            asked.push((question, of_kernel::<A>(store, catalog, question)?));
        }
        // Of several namespaces with one name, the one that has a pin.
        let pinned = asked.iter().find(|(_, situation)| !situation.sessions.is_empty());
        match pinned.or(asked.first()) {
            Some((question, situation)) => self.print(&explain(catalog, question, situation)),
            None => Ok(()),
        }
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
    let (word, bit) = filter_word(Direction::Forward, question.filter_bit());
    let backends = pool_backends::<A>(catalog, question).into_iter().filter(|&index| index < store.loads.len());
    let flow = if question.from_port.is_some() { tables.flows.get(&key)? } else { None };
    let outward = flow.map(|flow| FlowKey::translated(&flow.edit, question.protocol, Direction::Outward));
    Ok(Situation {
        in_filter: store.filter.load_u64(word) & bit != 0,
        sessions,
        flow,
        is_masqueraded: outward.map(|outward| tables.flows.get(&outward)).transpose()?.flatten().is_some(),
        loads: backends.map(|index| (index, store.loads.load_u64(index))).collect(),
    })
}

/// A dataplane that no packet has met yet.
fn of_source<A: Address + FrontendTables>(catalog: &Catalog, question: &Question) -> Situation<A> {
    Situation {
        in_filter: question.is_frontend::<A>(catalog),
        sessions: BTreeMap::new(),
        flow: None,
        is_masqueraded: false,
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
        let address = |text: &str, port| Ok(From::Address(text.parse().unwrap(), port));
        assert_eq!(parse_from("192.0.2.1"), address("192.0.2.1", None));
        assert_eq!(parse_from("192.0.2.1:80"), address("192.0.2.1", Some(80)));
        assert_eq!(parse_from("2001:db8::1"), address("2001:db8::1", None));
        assert_eq!(parse_from("[2001:db8::1]:80"), address("2001:db8::1", Some(80)));
        for text in ["node", "web-0", "default/web-0", "netns:77"] {
            assert_eq!(parse_from(text), Ok(From::Named(text.parse().unwrap())));
        }
        assert!(parse_from("Web").is_err() && parse_from("192.0.2.1:").is_err() && parse_from("192.0.2.0/24").is_err());
        let to = |text: &str| parse_to(text).map(|to| (to.endpoint.to_string(), to.protocol));
        assert_eq!(to("10.96.0.10:80"), Ok(("10.96.0.10:80".to_owned(), 6)));
        assert_eq!(to("10.96.0.10:53/udp"), Ok(("10.96.0.10:53".to_owned(), 17)));
        assert_eq!(to("[2001:db8::1]:53/UDP"), Ok(("[2001:db8::1]:53".to_owned(), 17)));
        assert!(to("10.96.0.10").is_err() && to("10.96.0.10:80/icmp").is_err());
    }
}
