//! `affinity explain`: the outcome for the next packet, from the kernel's tables or from YAML only.

use std::{
    collections::BTreeMap,
    io::{self, BufWriter, Write},
    net::{IpAddr, SocketAddr},
};

use affinity_common::{
    abi::{V4, V6, netns_client},
    headers::{SCTP, TCP, UDP},
    model::Model,
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
    attach::{self, Device, cgroup},
    netns::Namespace,
    pins::PinDir,
    store::kernel::Family,
    view::{
        Catalog, Client, Endpoint, Explanation, FrontendTables, KnownNamespace, NODE, Question, Situation, Step,
        explain, ip,
    },
};

/// The cookie of this node's network namespace, if only a source is asked.
const NODE_OF_SOURCE: u64 = 1;

/// Options of `affinity explain`.
#[derive(Args, Clone, PartialEq, Eq, Debug)]
pub(crate) struct ExplainArgs {
    /// The client. With a port: this connection of the client. By name: a socket of the node itself (`node`), of a pod on
    /// it, or of a network namespace (`netns:COOKIE`). Without --source, an address of this node means the node itself.
    /// With --source, `node` is the only known name
    #[arg(long, value_name = "IP[:PORT]|NAME", value_parser = parse_from)]
    from: From,
    /// The destination: TCP, unless `/udp` or `/sctp` follows. May be repeated; answers are in the same order
    #[arg(long, value_name = "IP:PORT[/udp|/sctp]", value_parser = parse_to, required = true)]
    to: Vec<To>,
    /// Use this YAML, or a cluster's API, instead of the kernel's maps: needs no root and knows no pins
    #[arg(long, value_name = "PATH|kubernetes")]
    source: Option<SourceName>,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    node: NodeArgs,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum From {
    Address(IpAddr, Option<u16>),
    /// A network namespace of this machine with translated sockets.
    Named(ClientArg),
}

fn parse_from(text: &str) -> Result<From, String> {
    if let Ok(address) = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        return Ok(From::Address(address.to_canonical(), None));
    }
    if let Ok(socket) = text.parse::<SocketAddr>() {
        return Ok(From::Address(socket.ip().to_canonical(), Some(socket.port())));
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
        "sctp" => SCTP,
        other => return Err(format!("`/{other}`: expected /tcp, /udp or /sctp")),
    };
    let socket: SocketAddr = socket.parse().map_err(|_| "expected IP:PORT or [IPv6]:PORT".to_owned())?;
    Ok(To { endpoint: Endpoint { address: socket.ip().to_canonical(), port: socket.port() }, protocol })
}

/// Devices that clients' packets may enter through, but that have no programs.
fn unserved() -> Result<Vec<Step>, Error> {
    let (devices, network) = attach::survey()?;
    let step = |device: &&Device| Step { step: "device", finds: attach::unserved_text(&device.name) };
    Ok(attach::unserved(&devices, &network).iter().map(step).collect())
}

/// The data that answers are based on.
enum Dataplane {
    Kernel(Box<Reading>),
    /// The dataplane that a source would create, which has seen no packet yet.
    Source(Box<Catalog>),
}

impl Dataplane {
    fn catalog(&self) -> &Catalog {
        match self {
            Self::Kernel(reading) => &reading.catalog,
            Self::Source(catalog) => catalog,
        }
    }

    fn situation<A: Family + FrontendTables>(&self, question: &Question) -> Result<Situation<A>, Error> {
        match self {
            Self::Kernel(reading) => Ok(Situation::of_kernel(&reading.store, &reading.catalog, question)?),
            Self::Source(catalog) => Ok(Situation::untouched(catalog, question)),
        }
    }

    /// Whether the client's sockets have a pin for these destinations.
    fn has_pin(&self, sockets: &From, to: &[To]) -> Result<bool, Error> {
        for to in to {
            for question in sockets.questions(to, self.catalog())? {
                if !self.situation::<V6>(&question)?.sessions.is_empty() {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// The answer to the same question about each of these clients: if several namespaces have one name, about the one that has
    /// a pin.
    fn explain<A: Family + FrontendTables>(&self, questions: &[Question]) -> Result<Option<Explanation<'_>>, Error>
    where
        Model: FamilyTables<A>,
    {
        let mut asked = Vec::new();
        for question in questions {
            asked.push((question, self.situation::<A>(question)?));
        }
        let pinned = asked.iter().find(|(_, situation)| !situation.sessions.is_empty());
        Ok(pinned.or(asked.first()).map(|(question, situation)| explain(self.catalog(), question, situation)))
    }
}

impl ExplainArgs {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Error> {
        let dataplane = match &self.source {
            Some(source) => {
                let source = self.cluster.source(source, global)?;
                let catalog = source::catalog(&source::read(&source, self.node.facts_without_node(global)?)?)?;
                let node = KnownNamespace { name: Some(NODE.to_owned()), addresses: Vec::new() };
                Dataplane::Source(Box::new(catalog.with_namespaces(BTreeMap::from([(NODE_OF_SOURCE, node)]))))
            }
            None => Dataplane::Kernel(Box::new(Reading::open(&global.pin_dir)?)),
        };
        let from = match &self.from {
            From::Address(address, _) if self.source.is_none() && is_of_this_node(*address)? => From::node(),
            From::Address(..) | From::Named(_) => self.from.clone(),
        };
        if from.is_socket() && self.source.is_none() {
            ensure_sockets(global)?;
        }
        let from = match from {
            From::Address(address, _) if self.source.is_none() && are_sockets_translated(global)? => {
                match From::sockets_at(address, dataplane.catalog(), &self.to)? {
                    Some(sockets) if are_all_translated(global)? || dataplane.has_pin(&sockets, &self.to)? => sockets,
                    Some(_) | None => from,
                }
            }
            From::Address(..) | From::Named(_) => from,
        };
        let mut answers = Vec::new();
        for to in &self.to {
            let questions = from.questions(to, dataplane.catalog())?;
            let is_ipv4 = questions.first().is_some_and(|question| question.from.is_ipv4());
            let answer =
                if is_ipv4 { dataplane.explain::<V4>(&questions) } else { dataplane.explain::<V6>(&questions) };
            answers.extend(answer?);
        }
        if self.source.is_none() && !from.is_socket() {
            for device in unserved()? {
                answers.iter_mut().for_each(|answer| answer.steps.push(device.clone()));
            }
        }
        self.print(&answers)
    }

    /// Prints one answer as an object, several as a list.
    fn print(&self, answers: &[Explanation<'_>]) -> Result<(), Error> {
        let mut out = BufWriter::new(io::stdout().lock());
        let is_printed = match answers {
            [answer] => object(&mut out, self.output, answer)?,
            answers => object(&mut out, self.output, &answers)?,
        };
        if !is_printed {
            for (number, answer) in answers.iter().enumerate() {
                out.write_all(if number == 0 { b"" } else { b"\n" })?;
                print_steps(&mut out, answer, wants_colour())?;
            }
        }
        Ok(out.flush()?)
    }
}

impl From {
    /// The node's own processes.
    fn node() -> Self {
        Self::Named(ClientArg::Named(NODE.to_owned()))
    }

    /// The sockets of a pod of this machine that has the address; `None` if no pod has it. If sockets are translated, the pod's
    /// packets are not addressed to frontends, except those of protocols without socket translation.
    fn sockets_at(address: IpAddr, catalog: &Catalog, to: &[To]) -> Result<Option<Self>, Error> {
        let sockets = ClientArg::Network(Client::new(address, u8::MAX));
        let has_sockets = to.iter().all(|to| to.protocol != SCTP) && !sockets.cookies(catalog)?.is_empty();
        Ok(has_sockets.then_some(Self::Named(sockets)))
    }

    fn is_socket(&self) -> bool {
        match self {
            Self::Address(address, _) => Client::new(*address, u8::MAX).netns().is_some(),
            Self::Named(_) => true,
        }
    }

    /// The questions: several if several namespaces have the client's name; never none.
    fn questions(&self, to: &To, catalog: &Catalog) -> Result<Vec<Question>, Error> {
        let To { endpoint, protocol } = *to;
        let question = |from, from_port| Question { from, from_port, to: endpoint, protocol };
        let questions = match self {
            Self::Address(address, port) => vec![question(*address, *port)],
            Self::Named(name) => {
                let family = if endpoint.address.is_ipv4() { 4 } else { 6 };
                let key = |cookie| question(ip(netns_client(cookie, family)), None);
                name.cookies(catalog)?.into_iter().map(key).collect()
            }
        };
        for question in &questions {
            if question.is_socket() && protocol == SCTP {
                return Err(Error::Usage(
                    "SCTP sockets are not translated at connect(): give the client's address as --from".to_owned(),
                ));
            }
            if !question.is_socket() && question.from.is_ipv4() != endpoint.address.is_ipv4() {
                return Err(Error::Usage("--from and --to must both be IPv4, or both IPv6".to_owned()));
            }
        }
        Ok(questions)
    }
}

/// Whether packets from an address come from this node's own sockets, and enter no device.
fn is_of_this_node(address: IpAddr) -> Result<bool, Error> {
    let own = Namespace::own().and_then(|own| own.addresses());
    let own = own.map_err(|error| Error::Failed(format!("cannot read the addresses of this node: {error}")))?;
    Ok(address.is_loopback() || own.contains(&address))
}

/// Whether the sockets of all processes are translated, not only those below one cgroup.
fn are_all_translated(global: &Global) -> Result<bool, Error> {
    let attachments = cgroup::attachments(&PinDir::new(&global.pin_dir))?;
    Ok(attachments.iter().any(|attachment| attachment.cgroup == cgroup::ROOT))
}

/// Whether the sockets of any processes are translated.
fn are_sockets_translated(global: &Global) -> Result<bool, Error> {
    Ok(!cgroup::attachments(&PinDir::new(&global.pin_dir))?.is_empty())
}

/// Fails if no process has translated sockets.
fn ensure_sockets(global: &Global) -> Result<(), Error> {
    if !are_sockets_translated(global)? {
        let why = "sockets are not translated here (--socket off), and packets of the node's own processes enter by no \
                   device. For a pod, give its address as --from";
        return Err(Error::Failed(why.to_owned()));
    }
    Ok(())
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
        assert_eq!(parse_from("::ffff:192.0.2.1"), address("192.0.2.1", None));
        assert_eq!(parse_from("[::ffff:192.0.2.1]:80"), address("192.0.2.1", Some(80)));
        for text in ["node", "web-0", "default/web-0", "netns:77"] {
            assert_eq!(parse_from(text), Ok(From::Named(text.parse().unwrap())));
        }
        assert!(parse_from("Web").is_err() && parse_from("192.0.2.1:").is_err() && parse_from("192.0.2.0/24").is_err());
        let to = |text: &str| parse_to(text).map(|to| (to.endpoint.to_string(), to.protocol));
        assert_eq!(to("10.96.0.10:80"), Ok(("10.96.0.10:80".to_owned(), 6)));
        assert_eq!(to("10.96.0.10:53/udp"), Ok(("10.96.0.10:53".to_owned(), 17)));
        assert_eq!(to("[2001:db8::1]:53/UDP"), Ok(("[2001:db8::1]:53".to_owned(), 17)));
        assert_eq!(to("[::ffff:10.96.0.10]:80"), Ok(("10.96.0.10:80".to_owned(), 6)));
        assert!(to("10.96.0.10").is_err() && to("10.96.0.10:80/icmp").is_err());
    }
}
