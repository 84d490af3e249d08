//! An explanation in words, step by step.

use std::fmt::Write;

use affinity_common::{
    abi::{AFFINITY, Flow, Reason, Selection},
    headers::{SCTP, TCP, UDP},
    model::Model,
    tables::FamilyTables,
};

use super::{Candidate, Case, Step, destination};
use crate::view::{
    ClientRef, Endpoint, FlowView, FrontendTables, Question, SessionView, service::policy_text, short_duration,
};

/// The texts of reasons begin with the packet's verdict.
fn without_verdict(text: &str) -> &str {
    text.split_once(": ").map_or(text, |(_, cause)| cause)
}

/// The text if a socket asks for a frontend with source ranges.
const LEFT_TO_PACKETS: &str = "the service has source ranges, and a socket has no source address yet. Its packets \
                               are checked where they enter a device.";

/// The address that the pod sees, if it is not the client's.
fn source_text(candidates: &[Candidate<'_>]) -> &'static str {
    match candidates.iter().filter(|candidate| candidate.masquerade).count() {
        0 => "",
        all if all == candidates.len() => {
            " The source becomes an address of the node where the packet leaves for the pod."
        }
        _ => " The source becomes an address of the node if the chosen pod is the client itself.",
    }
}

impl<A: FrontendTables> Case<'_, '_, A>
where
    Model: FamilyTables<A>,
{
    /// `decided` is the decision without shadow mode; `reason` is the one that is counted for the packet.
    pub(super) fn steps(
        &self,
        decided: (&str, Reason),
        reason: Reason,
        flow: Option<&Flow<A>>,
        candidates: &[Candidate<'_>],
    ) -> Vec<Step> {
        let mut steps = vec![Step { step: "packet", finds: self.packet_text() }];
        let mut step = |step, finds| steps.push(Step { step, finds });
        if !self.situation.in_filter {
            step("filter", "no match: no frontend has this address and port".to_owned());
        } else {
            step("filter", "match: a frontend may have this address and port".to_owned());
            if let Some(found) = self.flow_text() {
                step("flow", found);
            }
            step("frontend", self.frontend_text());
            if self.frontend.is_some_and(|frontend| frontend.slot_count > 0)
                && !matches!(
                    decided.1,
                    Reason::Established | Reason::Shadow | Reason::NotInRanges | Reason::PortsExhausted
                )
            {
                step("session", self.session_text(decided.1));
                step("selection", self.selection_text(decided.1, candidates));
            }
        }
        let text =
            |verdict, reason: Reason| format!("{verdict} ({}): {}", reason.name(), without_verdict(reason.text()));
        let mut finds = text(decided.0, decided.1);
        if reason != decided.1 {
            finds = format!("{} Otherwise: {finds}", text("pass", reason));
        }
        if let Some(flow) = flow {
            let _ = match candidates.len() {
                1 => write!(finds, " The destination becomes {}.", destination(flow)),
                _ => write!(finds, " The destination becomes the address and port of one candidate."),
            };
            finds += source_text(candidates);
        } else if self.is_left_to_packets() {
            finds = format!("pass ({}): {LEFT_TO_PACKETS}", reason.name());
        }
        step("verdict", finds);
        steps
    }

    fn packet_text(&self) -> String {
        let Question { from, from_port, to, protocol } = self.question;
        if self.question.is_socket() {
            let what = if *protocol == TCP { "TCP" } else { "UDP" };
            return format!("{what} socket of {} that connects to {to}", self.client());
        }
        let what = match *protocol {
            UDP => "UDP datagram",
            SCTP if self.is_in_connection() => "SCTP packet",
            SCTP => "SCTP INIT",
            _ if self.is_in_connection() => "TCP packet",
            _ => "TCP SYN",
        };
        match from_port {
            Some(port) => format!("{what} from {} to {to}", Endpoint { address: *from, port: *port }),
            None => format!("{what} from {from}, new source port, to {to}"),
        }
    }

    fn client(&self) -> ClientRef<'_> {
        self.catalog.client(self.question.from, self.frontend.map_or(0, |frontend| frontend.service))
    }

    /// `None` if the question has no port.
    fn flow_text(&self) -> Option<String> {
        self.question.from_port?;
        let Some(flow) = &self.situation.flow else { return Some("none: this packet opens a connection".to_owned()) };
        let view = FlowView::new(self.catalog, &self.question.key(), flow)?;
        let age = short_duration(view.created.age.as_secs());
        Some(format!("a connection to {} ({}), {} for {age}", view.backend, view.translated, view.state.name()))
    }

    fn frontend_text(&self) -> String {
        let Some(frontend) = &self.frontend else { return "none has this address, port and protocol".to_owned() };
        let ready = self.catalog.members(frontend.pool).filter(|&(_, ready)| ready).count();
        let all = self.catalog.members(frontend.pool).count();
        let service = self.catalog.service_name(frontend.service);
        let affinity = if frontend.flags & AFFINITY != 0 { "ClientIP" } else { "no" };
        format!("{service}: {ready} of {all} pods ready, {affinity} affinity, {}", policy_text(frontend))
    }

    fn session_text(&self, reason: Reason) -> String {
        let Some(frontend) = &self.frontend else { return String::new() };
        if frontend.flags & AFFINITY == 0 {
            return "not used: the service has no affinity".to_owned();
        }
        let mut text = String::new();
        for (key, session) in &self.situation.sessions {
            let view = SessionView::new(self.catalog, key, session);
            let left = match view.expires_in_seconds {
                None => "never expires".to_owned(),
                Some(0) => "expired".to_owned(),
                Some(seconds) => format!("expires in {}", short_duration(seconds)),
            };
            let scope = self.catalog.scope_name(key.scope);
            let age = short_duration(view.created.age.as_secs());
            let _ = write!(text, "{} is pinned to {} in {scope} for {age}, {left}; ", view.client, view.backend);
        }
        #[expect(clippy::wildcard_enum_match_arm, reason = "only these reasons say something about pins")]
        let so = match reason {
            Reason::Pinned => "this pin is used",
            Reason::Created if self.situation.sessions.is_empty() => {
                return format!("{} has no pin: it will be pinned", self.client());
            }
            Reason::Created => "but that pod is not an endpoint of this frontend: the frontend gets its own pin",
            Reason::Expired => "so a pod is selected again",
            Reason::BackendGone => "but that pod is gone",
            Reason::NotReady => "but that pod takes no new connections",
            Reason::NotMember => "but that pod has left the service",
            _ => "not used",
        };
        text + so
    }

    fn selection_text(&self, reason: Reason, candidates: &[Candidate<'_>]) -> String {
        let Some(frontend) = &self.frontend else { return String::new() };
        let texts: Vec<_> = candidates
            .iter()
            .map(|candidate| match candidates.len() {
                1 => candidate.text(),
                _ => format!("{} {:.1} %", candidate.text(), candidate.probability * 100.0),
            })
            .collect();
        let how = match (reason, Selection::from_byte(frontend.select)) {
            (Reason::Pinned, _) => "none: pinned to",
            (_, Selection::Consistent) => "consistent: every node selects",
            (Reason::Created | Reason::Selected, Selection::Random) => "random:",
            (Reason::Created | Reason::Selected, Selection::Least) => "least (the less loaded of two random pods):",
            // The pin contains the next draw, so that two processors agree.
            (_, Selection::Random) => "random, with the random number stored in the pin:",
            (_, Selection::Least) => "least, with the random number stored in the pin:",
        };
        format!("{how} {}", texts.join(", "))
    }
}
