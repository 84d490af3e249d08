//! Scenes for tests: the same scenario runs for every hook that can translate, and for every family and protocol.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use anyhow::{Context, Result};

use crate::lab::{Agent, Family, Lab, Options, Protocol, Service, WIRE};

/// The hook that translates the packets of external clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// XDP in the driver.
    XdpNative,
    /// TC ingress.
    Tc,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::XdpNative, Self::Tc];

    /// The arguments of `affinity run` and `attach` for it, on the wire.
    pub fn args(self) -> [&'static str; 4] {
        let xdp = match self {
            Self::XdpNative => "native",
            Self::Tc => "off",
        };
        ["--device", WIRE, "--xdp", xdp]
    }
}

/// Makes tests of scenarios: functions that take a [`Hook`] and return a result. Each becomes a separate test for each hook.
#[macro_export]
macro_rules! on_every_hook {
    ($($story:ident),* $(,)?) => {
        mod xdp_native { $(#[test] fn $story() -> anyhow::Result<()> { super::$story($crate::story::Hook::XdpNative) })* }
        mod tc { $(#[test] fn $story() -> anyhow::Result<()> { super::$story($crate::story::Hook::Tc) })* }
    };
}

/// One way for clients to reach a service.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// IPv4 or IPv6.
    pub family: Family,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The frontend.
    pub to: SocketAddr,
}

impl Route {
    /// The four routes to a [`web`] service.
    pub fn all_to(service: &Service) -> [Self; 4] {
        let route = |family, protocol| {
            let port = if protocol == Protocol::Tcp { "http" } else { "dns" };
            Self { family, protocol, to: service.frontend(family, port) }
        };
        [
            route(Family::V4, Protocol::Tcp),
            route(Family::V4, Protocol::Udp),
            route(Family::V6, Protocol::Tcp),
            route(Family::V6, Protocol::Udp),
        ]
    }

    /// The address of the client with this number. Routes of one family have separate clients for each protocol, because the
    /// protocols of a service share their pins.
    pub fn client(&self, number: u32) -> IpAddr {
        self.family.client(number + self.first_client())
    }

    /// The pods that answer a client that connects this many times, one connection after another.
    ///
    /// # Errors
    /// When a connection gets no answer.
    pub fn dial(&self, lab: &Lab, client: u32, times: usize) -> Result<Vec<String>> {
        let from = self.client(client);
        (0..times)
            .map(|_| lab.client().ask(self.protocol, from, self.to).with_context(|| format!("{from} by {self:?}")))
            .collect()
    }

    /// The pod that answers each of these clients.
    ///
    /// # Errors
    /// When a client gets no answer.
    pub fn dial_all(&self, lab: &Lab, clients: Range<u32>) -> Result<Vec<String>> {
        let first = self.first_client();
        let clients = clients.start + first..clients.end + first;
        lab.client().ask_all(self.protocol, clients, self.to).with_context(|| format!("by {self:?}"))
    }

    fn first_client(&self) -> u32 {
        match self.protocol {
            Protocol::Tcp => 0,
            Protocol::Udp => 1 << 16,
        }
    }
}

/// A service on three pods with two TCP ports and a UDP port, without affinity.
pub fn web() -> Service {
    Service::new("web", 10).tcp("http", 80, 8080).tcp("https", 443, 8443).udp("dns", 53, 5353).on(0..3)
}

/// Runs a scenario in a lab of three pods with the agent and these services.
///
/// # Errors
/// The scenario's error, with the agent's output.
pub fn tell(hook: Hook, services: &[&Service], story: impl FnOnce(&mut Lab, &mut Agent) -> Result<()>) -> Result<()> {
    tell_in(&Options::default(), &hook.args(), services, story)
}

/// The same in another lab, or with other arguments for the agent.
///
/// # Errors
/// As [`tell`].
pub fn tell_in(
    options: &Options,
    args: &[&str],
    services: &[&Service],
    story: impl FnOnce(&mut Lab, &mut Agent) -> Result<()>,
) -> Result<()> {
    let mut lab = Lab::up(options)?;
    services.iter().try_for_each(|service| lab.publish(service))?;
    let mut agent = lab.agent(args)?;
    let told = services
        .iter()
        .try_for_each(|service| lab.publish_and_settle(service))
        .and_then(|()| story(&mut lab, &mut agent));
    told.with_context(|| {
        let counters = lab.affinity(&["get", "counters"]).unwrap_or_else(|error| format!("{error:#}"));
        format!("the agent's log:\n{}\n{counters}", agent.log().join("\n"))
    })
}

/// Writes a line for the person who runs the tests: a figure, or why there is nothing to compare with. It is shown even if the
/// test passes and the harness hides its output.
pub fn report(line: &str) {
    // If it cannot be written, that is no reason to fail.
    let _ = writeln!(io::stderr(), "{line}");
}
