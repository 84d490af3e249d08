//! The canonical text of every map: one line for each entry, `map key -> value`, sorted, with names instead of ids.
//!
//! Tests from YAML to maps compare this text. So what depends on history or on the clock is included only on request: times,
//! generations, and the positions of slot extents.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use affinity_common::{
    abi::{
        AFFINITY, Address, BACKEND_LINGERING, BACKEND_LOCAL, BACKEND_TERMINATING, BackendRef, COEXIST, DEVICE_POD,
        DEVICE_REDIRECT_TC, DEVICE_REDIRECT_XDP, DEVICE_UPPER, DROP_IF_NO_LOCAL, Event, FILTER_BITS, Flow, FlowKey,
        Foreign, FragmentKey, Frontend, MASQUERADE, MEMBER_READY, MemberKey, NODE, NameKind, Node, PODS, Port, RANGES,
        REASONS, RangeKey, SHADOW, SHARED, SPLIT_SCOPE, Session, SessionKey, Socket, SocketKey, USAGES, UsageOf, V4,
        V6,
    },
    names,
};

use crate::attach::Note;

use super::{
    Catalog, Endpoint, EventView, FlowState, Moment, SessionView, address::from_mapped, catalog::CatalogFrontend,
    protocol_name, service::policy_text, short_duration,
};

/// What a dump shows in addition to what never changes by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DumpOptions {
    /// Ages of sessions, flows and events.
    pub times: bool,
    /// Every slot, instead of only the share of each backend.
    pub slots: bool,
}

/// Writes maps as lines.
#[derive(Clone, Copy, Debug)]
pub struct Dump<'a> {
    catalog: &'a Catalog,
    options: DumpOptions,
}

impl<'a> Dump<'a> {
    /// A dump with names from `catalog`.
    #[must_use]
    pub fn new(catalog: &'a Catalog, options: DumpOptions) -> Self {
        Self { catalog, options }
    }

    /// A map that the catalog holds; `None` for any other.
    #[must_use]
    pub fn small(&self, map: &str) -> Option<Vec<String>> {
        Some(match map {
            names::FRONTENDS_V4 => self.frontends(map, true),
            names::FRONTENDS_V6 => self.frontends(map, false),
            names::RANGES_V4 => self.ranges(map, &self.catalog.observed.ranges_v4),
            names::RANGES_V6 => self.ranges(map, &self.catalog.observed.ranges_v6),
            names::NODE => self.node(),
            names::SLOTS => self.slots(),
            names::MEMBERS => self.members(),
            names::BACKENDS => self.backends(),
            names::USAGE => self.usage(),
            names::NAMES => self.names(),
            _ => return None,
        })
    }

    fn frontends(&self, map: &str, ipv4: bool) -> Vec<String> {
        let ours = self.catalog.frontends.iter().filter(|frontend| frontend.endpoint.address.is_ipv4() == ipv4);
        let side = |external| if external { " external" } else { "" };
        let line = |frontend: &CatalogFrontend| {
            let (frontend, side, record) = (frontend.text(), side(frontend.external), self.frontend(&frontend.record));
            format!("{map} {frontend}{side} -> {record}")
        };
        ours.map(line).collect()
    }

    fn ranges<A: Address>(&self, map: &str, ranges: &BTreeSet<RangeKey<A>>) -> Vec<String> {
        let line = |key: &RangeKey<A>| {
            let scope = match key.scope {
                PODS => "pods".into(),
                NODE => "node".into(),
                service => self.catalog.service_name(service),
            };
            let address = from_mapped(key.address.to_mapped());
            format!("{map} {scope} {address}/{} -> 1", key.prefix_len.saturating_sub(u32::BITS))
        };
        ranges.iter().map(line).collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn node(&self) -> Vec<String> {
        let Node { address_v6, address_v4, port_first, port_count } = self.catalog.observed.node;
        if port_count == 0 {
            return Vec::new();
        }
        let address = |mapped| Some(from_mapped(mapped)).filter(|address| !address.is_unspecified());
        let text = |address: Option<IpAddr>| address.map_or("none".to_owned(), |address| address.to_string());
        let last = u32::from(port_first.get()) + u32::from(port_count) - 1;
        let (v4, v6) = (text(address(address_v4.to_mapped())), text(address(address_v6.to_mapped())));
        vec![format!("{} masquerade -> v4={v4} v6={v6} ports={}-{last}", names::NODE, port_first.get())]
    }

    fn frontend(&self, record: &Frontend) -> String {
        let mut text = format!(
            "service={} pool={} slots={}",
            self.catalog.service_name(record.service),
            self.catalog.pool_name(record.pool),
            record.slot_count
        );
        let flags = [
            (COEXIST, " coexist"),
            (SHADOW, " shadow"),
            (SPLIT_SCOPE, " split-scope"),
            (MASQUERADE, " masquerade"),
            (RANGES, " ranges"),
            (DROP_IF_NO_LOCAL, " drop-if-no-local"),
        ];
        for (flag, name) in flags {
            text += if record.flags & flag == 0 { "" } else { name };
        }
        if record.flags & AFFINITY == 0 {
            return format!("{text} affinity=none {}", policy_text(record));
        }
        text += &format!(" affinity={} {}", self.catalog.scope_name(record.group), policy_text(record));
        text += &format!(" prefix={}", record.prefix);
        if record.flags & SHARED != 0 {
            text += &format!(" own={}", self.catalog.scope_name(record.own));
        }
        text
    }

    /// Slots by pool, because an extent's position has no meaning.
    fn slots(&self) -> Vec<String> {
        let mut lines = BTreeMap::new();
        for frontend in &self.catalog.frontends {
            let record = &frontend.record;
            // A pool without slots may name an extent of another pool.
            let extent = self.catalog.observed.slots.get(&record.slot_first).filter(|_| record.slot_count > 0);
            let Some(backends) = extent else { continue };
            let names = backends.iter().map(|&index| self.catalog.backend_now(index).full_name());
            let text = if self.options.slots { names.collect::<Vec<_>>().join(" ") } else { shares(names) };
            lines.insert(self.catalog.pool_name(record.pool), format!("{} slots: {text}", backends.len()));
        }
        lines.into_iter().map(|(pool, text)| format!("{} {pool} -> {text}", names::SLOTS)).collect()
    }

    fn members(&self) -> Vec<String> {
        let pools = self.catalog.pools();
        let lines: BTreeSet<_> = self
            .catalog
            .observed
            .members
            .iter()
            .map(|(key, member)| {
                let MemberKey { pool, backend } = *key;
                let scope = if pools.contains_key(&pool) || !self.is_scope(pool) {
                    self.catalog.pool_name(pool)
                } else {
                    self.catalog.scope_name(pool)
                };
                let state = if member.state == MEMBER_READY { "ready" } else { "draining" };
                let current = self.catalog.observed.backends.get(&backend).map(|backend| backend.generation);
                let stale = if current == Some(member.generation) { "" } else { " stale" };
                let backend =
                    self.catalog.backend(BackendRef { index: backend, generation: member.generation }).full_name();
                format!("{} {scope} {backend} -> port={} state={state}{stale}", names::MEMBERS, member.port.get())
            })
            .collect();
        lines.into_iter().collect()
    }

    fn is_scope(&self, id: u32) -> bool {
        self.catalog.frontends.iter().any(|frontend| frontend.record.group == id)
    }

    /// The backends in use.
    fn backends(&self) -> Vec<String> {
        let in_use = self.catalog.observed.backends.iter().filter(|(_, record)| record.generation % 2 == 1);
        let lines: BTreeMap<_, _> = in_use
            .map(|(&index, record)| {
                let backend = self.catalog.backend(BackendRef { index, generation: record.generation });
                let address = backend.address.map_or_else(|| "(none)".to_owned(), |address| address.to_string());
                let local = if record.flags & BACKEND_LOCAL == 0 { "" } else { " local" };
                let lingering = if record.flags & BACKEND_LINGERING == 0 { "" } else { " lingering" };
                let terminating = if record.flags & BACKEND_TERMINATING == 0 { "" } else { " terminating" };
                let name = backend.full_name();
                let line = format!("{} {address} -> name={name}{local}{lingering}{terminating}", names::BACKENDS);
                ((backend.address, index), line)
            })
            .collect();
        lines.into_values().collect()
    }

    fn usage(&self) -> Vec<String> {
        let zero = affinity_common::abi::Usage::default();
        let lines: BTreeSet<_> = self
            .catalog
            .observed
            .usage
            .iter()
            .map(|key| {
                let name = match key.of {
                    of if of == UsageOf::Service as u32 => format!("service {}", self.catalog.service_name(key.id)),
                    of if of == UsageOf::Backend as u32 => {
                        format!("backend {}", self.catalog.backend_now(key.id).full_name())
                    }
                    of => format!("{of} #{}", key.id),
                };
                let usage = self.catalog.usage.get(key).unwrap_or(&zero);
                let counts = USAGES.iter().zip(usage.counts).filter(|&(_, count)| count > 0);
                let counts: Vec<_> = counts.map(|(reason, count)| format!("{}={count}", reason.name())).collect();
                let counts = if counts.is_empty() { "none".to_owned() } else { counts.join(" ") };
                format!("{} {name} -> {counts}", names::USAGE)
            })
            .collect();
        lines.into_iter().collect()
    }

    fn names(&self) -> Vec<String> {
        let line = |kind: u32, id: u32, name: &str| format!("{} {} {id} -> {name}", names::NAMES, name_kind(kind));
        self.catalog.observed.names.iter().map(|(key, name)| line(key.kind, key.id, name)).collect()
    }

    /// How full each part of the filter is.
    #[must_use]
    pub fn filter(&self, words: &[u64]) -> Vec<String> {
        let parts = words.chunks((FILTER_BITS / u64::BITS) as usize);
        let bits = |words: &[u64]| words.iter().map(|word| word.count_ones()).sum::<u32>();
        let line = |(name, words)| format!("{} {name} -> {} of {FILTER_BITS} bits", names::FILTER, bits(words));
        ["frontends", "members", "masqueraded", "returning"].into_iter().zip(parts).map(line).collect()
    }

    /// Backends with live sessions; `loads` is the map, by backend index.
    #[must_use]
    pub fn loads(&self, loads: &[u64]) -> Vec<String> {
        let loaded = (0u32..).zip(loads).filter(|&(_, &load)| load != 0);
        let lines: BTreeSet<_> = loaded
            .map(|(index, load)| format!("{} {} -> {load}", names::LOADS, self.catalog.backend_now(index).full_name()))
            .collect();
        lines.into_iter().collect()
    }

    /// Sessions of one family, by scope and client.
    #[must_use]
    pub fn sessions<A: Address>(&self, entries: impl IntoIterator<Item = (SessionKey<A>, Session)>) -> Vec<String> {
        let map = if A::BITS == V4::BITS { names::SESSIONS_V4 } else { names::SESSIONS_V6 };
        let lines: BTreeMap<_, _> = entries
            .into_iter()
            .map(|(key, session)| {
                let view = SessionView::new(self.catalog, &key, &session);
                let scope = self.catalog.scope_name(key.scope);
                let mut line = format!(
                    "{map} {scope} {} -> {} service={} reason={} uses={}",
                    view.client,
                    view.backend.full_name(),
                    view.service,
                    view.reason,
                    view.uses
                );
                if let Some(connections) = view.connections {
                    line += &format!(" connections={connections}");
                }
                if self.options.times {
                    let left = view.expires_in_seconds.map_or_else(|| "never".to_owned(), short_duration);
                    let (age, idle) = (view.created.age.as_secs(), view.last_used.age.as_secs());
                    line += &format!(" age={} idle={} expires={left}", short_duration(age), short_duration(idle));
                }
                ((scope, view.client, key), line)
            })
            .collect();
        lines.into_values().collect()
    }

    /// Flows of one family in all directions, by protocol, source and destination.
    #[must_use]
    pub fn flows<A: Address>(&self, entries: impl IntoIterator<Item = (FlowKey<A>, Flow<A>)>) -> Vec<String> {
        let map = if A::BITS == V4::BITS { names::FLOWS_V4 } else { names::FLOWS_V6 };
        let lines: BTreeMap<_, _> = entries
            .into_iter()
            .map(|(key, flow)| {
                let edit = &flow.edit;
                let mut line = format!(
                    "{map} {} -> {} > {} backend={} service={} state={}",
                    flow_text(&key),
                    Endpoint::new(edit.saddr, edit.sport),
                    Endpoint::new(edit.daddr, edit.dport),
                    self.catalog.backend(flow.backend).full_name(),
                    self.catalog.service_of_pool(flow.pool),
                    FlowState::new(key.protocol, flow.state).name()
                );
                if self.options.times {
                    let moment = |time_ns| short_duration(self.catalog.clock.moment(time_ns).age.as_secs());
                    line += &format!(" age={} idle={}", moment(flow.created_ns), moment(flow.last_used_ns));
                }
                ((key.direction, key.protocol, key), line)
            })
            .collect();
        lines.into_values().collect()
    }

    /// Connections of one family to no frontend, by protocol, source and destination of their replies.
    #[must_use]
    pub fn foreign<A: Address>(&self, entries: impl IntoIterator<Item = (FlowKey<A>, Foreign)>) -> Vec<String> {
        let map = if A::BITS == V4::BITS { names::FOREIGN_V4 } else { names::FOREIGN_V6 };
        let lines: BTreeMap<_, _> = entries
            .into_iter()
            .map(|(key, foreign)| {
                let state = FlowState::of_foreign(key.protocol, foreign.state).name();
                let mut line = format!("{map} {} -> state={state}", flow_text(&key));
                if self.options.times {
                    let idle = self.catalog.clock.moment(foreign.last_sent_ns).age.as_secs();
                    line += &format!(" idle={}", short_duration(idle));
                }
                ((key.direction, key.protocol, key), line)
            })
            .collect();
        lines.into_values().collect()
    }

    /// Fragmented packets of one family, by source and destination: the flow that later fragments follow.
    #[must_use]
    pub fn fragments<A: Address>(
        &self,
        entries: impl IntoIterator<Item = (FragmentKey<A>, FlowKey<A>)>,
    ) -> Vec<String> {
        let is_v4 = A::BITS == V4::BITS;
        let map = if is_v4 { names::FRAGMENTS_V4 } else { names::FRAGMENTS_V6 };
        let lines: BTreeMap<_, _> = entries
            .into_iter()
            .map(|(key, flow)| {
                let way = if key.is_leaving == 0 { "entering" } else { "leaving" };
                let [saddr, daddr] = [key.saddr, key.daddr].map(|address| from_mapped(address.to_mapped()));
                let id = if is_v4 { &key.id[..2] } else { &key.id };
                let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
                let line = format!("{map} {way} {saddr} > {daddr} id={id} -> {}", flow_text(&flow));
                ((key.is_leaving, key), line)
            })
            .collect();
        lines.into_values().collect()
    }

    /// Backends with connections that use source ports of the node; `cursors` is the map, by backend index.
    #[must_use]
    pub fn snat_port_cursor(&self, cursors: impl IntoIterator<Item = (u32, u64)>) -> Vec<String> {
        let counted = cursors.into_iter().filter(|&(_, ports)| ports != 0);
        let lines: BTreeSet<_> = counted
            .map(|(index, ports)| {
                format!("{} {} -> {ports} ports", names::SNAT_PORT_CURSOR, self.catalog.backend_now(index).full_name())
            })
            .collect();
        lines.into_iter().collect()
    }

    /// The flags of attached devices. `devices` is the map, by ifindex; `name` gives a device's name. `-`: nothing is
    /// redirected to the device.
    #[must_use]
    pub fn devices(
        &self,
        devices: impl IntoIterator<Item = (u32, u32)>,
        name: impl Fn(u32) -> Option<String>,
    ) -> Vec<String> {
        const FLAGS: [(u32, &str); 4] = [
            (DEVICE_REDIRECT_XDP, " xdp"),
            (DEVICE_REDIRECT_TC, " tc"),
            (DEVICE_POD, " pod"),
            (DEVICE_UPPER, " upper"),
        ];

        let line = |(ifindex, bits): (u32, u32)| {
            let device = name(ifindex).unwrap_or_else(|| ifindex.to_string());
            let flags: String = FLAGS.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, flag)| *flag).collect();
            let flags = if flags.is_empty() { " -" } else { &flags };
            let note = Note::from_bits(bits).map_or(String::new(), |note| format!(" ({note})"));
            format!("{} {device} ->{flags}{note}", names::DEVICES)
        };
        devices.into_iter().map(line).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Sockets, by role, protocol and cookie.
    #[must_use]
    pub fn sockets(&self, entries: impl IntoIterator<Item = (SocketKey, Socket)>) -> Vec<String> {
        let endpoint = |address: V6, port: Port| Endpoint { address: from_mapped(address.0), port: port.get() };
        let lines: BTreeMap<_, _> = entries
            .into_iter()
            .map(|(key, socket)| {
                let role = match key.role {
                    0 => "connected",
                    1 => "sending",
                    _ => "receiving",
                };
                let mut line = format!(
                    "{} {role} {} {} {} -> {} backend={} service={}",
                    names::SOCKETS,
                    self.catalog.client(from_mapped(socket.client.0), socket.service),
                    protocol_name(key.protocol),
                    endpoint(socket.frontend, socket.frontend_port),
                    endpoint(socket.peer, socket.peer_port),
                    self.catalog.backend(socket.backend).full_name(),
                    self.catalog.service_name(socket.service),
                );
                if self.options.times {
                    let moment = |time_ns| short_duration(self.catalog.clock.moment(time_ns).age.as_secs());
                    line += &format!(" age={} idle={}", moment(socket.created_ns), moment(socket.last_used_ns));
                }
                ((key.role, key.protocol, key), line)
            })
            .collect();
        lines.into_values().collect()
    }

    /// Reasons that occurred; `packets` is the map, summed over CPUs.
    #[must_use]
    pub fn counters(&self, packets: &[u64]) -> Vec<String> {
        let counted = REASONS.iter().zip(packets).filter(|&(_, &packets)| packets > 0);
        counted.map(|(reason, packets)| format!("{} {} -> {packets}", names::COUNTERS, reason.name())).collect()
    }

    /// Conditions of services that the agent has found.
    #[must_use]
    pub fn service_conditions(&self) -> Vec<String> {
        let services = self.catalog.services().into_iter().filter(|(_, id)| self.catalog.clients_are_nodes(*id));
        services.map(|(name, _)| format!("{} {name} -> clients-are-nodes", names::SERVICE_CONDITIONS)).collect()
    }

    /// The age of the source's data; only with times.
    #[must_use]
    pub fn status(&self) -> Vec<String> {
        let Some(status) = self.catalog.status().filter(|_| self.options.times) else { return Vec::new() };
        let age = |moment: &Moment| short_duration(moment.age.as_secs());
        let as_of = status.as_of.as_ref().map_or_else(|| "never".to_owned(), age);
        let (source, started) = (status.source, age(&status.agent_started));
        vec![format!("{} -> source={source} age={as_of} agent-age={started}", names::STATUS)]
    }

    /// The events in the ring, oldest first.
    #[must_use]
    pub fn events(&self, events: &[Event]) -> Vec<String> {
        let views = events.iter().filter_map(|event| EventView::new(self.catalog, event));
        views
            .map(|view| {
                let time = if self.options.times {
                    format!(" age={}", short_duration(view.time.age.as_secs()))
                } else {
                    String::new()
                };
                format!("{} {}{time}", names::EVENTS, view.line())
            })
            .collect()
    }
}

/// The packets of a flow in one direction.
fn flow_text<A: Address>(key: &FlowKey<A>) -> String {
    let direction = ["dnat", "rev-dnat", "snat", "rev-snat"][usize::from(key.direction & 3)];
    let (from, to) = (Endpoint::new(key.saddr, key.sport), Endpoint::new(key.daddr, key.dport));
    format!("{direction} {} {from} > {to}", protocol_name(key.protocol))
}

/// `name x count`, in the order of names.
fn shares(backends: impl Iterator<Item = String>) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for backend in backends {
        *counts.entry(backend).or_default() += 1;
    }
    let texts: Vec<_> = counts.iter().map(|(backend, count)| format!("{backend} x{count}")).collect();
    texts.join(" ")
}

fn name_kind(kind: u32) -> &'static str {
    const KINDS: [(NameKind, &str); 4] = [
        (NameKind::Service, "service"),
        (NameKind::Pool, "pool"),
        (NameKind::Group, "group"),
        (NameKind::Backend, "backend"),
    ];
    KINDS.iter().find(|&&(known, _)| known as u32 == kind).map_or("?", |&(_, name)| name)
}

#[cfg(test)]
mod tests {
    use affinity_common::abi::FILTER_WORDS;

    use super::*;
    use crate::view::fixture;

    fn dump(options: DumpOptions) -> String {
        let catalog = fixture::catalog();
        let dump = Dump::new(&catalog, options);
        let (key, flow) = fixture::flow();
        let mut lines = Vec::new();
        for map in names::MAPS {
            lines.extend(dump.small(map).unwrap_or_default());
        }
        let mut filter = vec![0; FILTER_WORDS as usize];
        (filter[0], filter[(FILTER_BITS / u64::BITS) as usize]) = (0b1011, 1 << 63);
        lines.extend(dump.filter(&filter));
        lines.extend(dump.loads(&[0, 3, 0, 9]));
        lines.extend(dump.sessions(fixture::sessions_v4()));
        lines.extend(dump.sessions::<V6>(fixture::sessions_v6()));
        lines.extend(dump.flows([(key.opposite(&flow.edit), flow), (key, flow)]));
        let fragment = FragmentKey {
            saddr: key.saddr,
            daddr: key.daddr,
            id: [0x1a, 0x2b, 0, 0],
            protocol: 6,
            is_leaving: 0,
            pad: [0; 2],
        };
        lines.extend(dump.fragments([(fragment, key)]));
        lines.extend(dump.snat_port_cursor([(1, 7), (2, 0), (3, 65)]));
        let name = |ifindex| (ifindex != 9).then(|| format!("eth{ifindex}"));
        lines.extend(dump.devices(
            [
                (4, DEVICE_REDIRECT_TC | DEVICE_POD),
                (2, DEVICE_REDIRECT_XDP | DEVICE_REDIRECT_TC),
                (9, DEVICE_REDIRECT_TC | Note::Mtu.to_bits()),
                (3, 0),
            ],
            name,
        ));
        lines.extend(dump.counters(&[0, 2, 0, 0, 0, 70]));
        lines.extend(dump.events(&fixture::events()));
        lines.join("\n")
    }

    #[test]
    fn every_map_in_canonical_text() {
        insta::assert_snapshot!(dump(DumpOptions::default()), @r"
        frontends_v4 10.96.0.10:80/TCP -> service=default/web pool=default/web:http/TCP/v4 slots=2 affinity=default/web timer=connection timeout=10800s select=random prefix=32
        frontends_v4 10.96.0.10:443/TCP -> service=default/web pool=default/web:https/TCP/v4 slots=2 affinity=default/web timer=connection timeout=10800s select=random prefix=32
        frontends_v4 10.96.0.53:53/UDP -> service=kube-system/dns pool=kube-system/dns:dns/UDP/v4 slots=0 affinity=kube-system/infra(group) timer=alive timeout=unlimited select=consistent prefix=24
        frontends_v6 [2001:db8::53]:53/UDP -> service=kube-system/dns pool=kube-system/dns:dns/UDP/v6 slots=0 split-scope affinity=kube-system/infra(group) timer=alive timeout=unlimited select=consistent prefix=64
        frontends_v6 [2001:db8::53]:53/UDP external -> service=kube-system/dns pool=kube-system/dns:dns/UDP/v6 slots=0 masquerade ranges drop-if-no-local affinity=kube-system/infra(group) timer=alive timeout=unlimited select=consistent prefix=64
        ranges_v4 pods 10.244.0.0/16 -> 1
        ranges_v6 kube-system/dns 2001:db8::/32 -> 1
        node masquerade -> v4=192.0.2.1 v6=none ports=1024-29999
        slots default/web:http/TCP/v4 -> 2 slots: default/web-0 x1 default/web-1 x1
        slots default/web:https/TCP/v4 -> 2 slots: default/web-0 x2
        members default/web:http/TCP/v4 default/web-0 -> port=8080 state=ready
        members default/web:http/TCP/v4 default/web-1 -> port=8080 state=ready
        members default/web:https/TCP/v4 default/web-0 -> port=8443 state=ready
        members default/web:https/TCP/v4 default/web-1 -> port=8443 state=draining
        members kube-system/dns:dns/UDP/v4 10.244.0.3 -> port=5353 state=draining
        members kube-system/infra(group) 10.244.0.3 -> port=0 state=draining
        backends 10.244.0.1 -> name=default/web-0 local
        backends 10.244.0.2 -> name=default/web-1
        backends 10.244.0.3 -> name=10.244.0.3
        names service 1 -> default/web
        names service 2 -> kube-system/dns
        names pool 1 -> default/web:http/TCP/v4
        names pool 2 -> default/web:https/TCP/v4
        names pool 3 -> kube-system/dns:dns/UDP/v4
        names pool 4 -> kube-system/dns:dns/UDP/v6
        names group 9 -> kube-system/infra
        names backend 1 -> default/web-0
        names backend 2 -> default/web-1
        names backend 4 -> default/web-9
        filter frontends -> 3 of 524288 bits
        filter members -> 1 of 524288 bits
        filter masqueraded -> 0 of 524288 bits
        filter returning -> 0 of 524288 bits
        loads 10.244.0.3 -> 9
        loads default/web-0 -> 3
        sessions_v4 #77 203.0.113.9 -> default/web-1 service=#77 reason=created uses=3
        sessions_v4 default/web 192.0.2.1 -> default/web-0 service=default/web reason=created uses=3
        sessions_v4 default/web 192.0.2.20 -> default/web-1 service=default/web reason=backend-gone uses=3
        sessions_v4 default/web 198.51.100.7 -> default/web-9 service=default/web reason=created uses=3
        sessions_v4 default/web 198.51.100.8 -> (gone) service=default/web reason=created uses=3
        sessions_v4 kube-system/infra(group) 203.0.113.0/24 -> 10.244.0.3 service=kube-system/dns reason=created uses=3 connections=2
        sessions_v6 kube-system/infra(group) 2001:db8::/64 -> 10.244.0.3 service=kube-system/dns reason=operator uses=3 connections=0
        flows_v4 dnat TCP 192.0.2.1:40000 > 10.96.0.10:80 -> 192.0.2.1:40000 > 10.244.0.1:8080 backend=default/web-0 service=default/web state=closing
        flows_v4 rev-dnat TCP 10.244.0.1:8080 > 192.0.2.1:40000 -> 192.0.2.1:40000 > 10.244.0.1:8080 backend=default/web-0 service=default/web state=closing
        fragments_v4 entering 192.0.2.1 > 10.96.0.10 id=1a2b -> dnat TCP 192.0.2.1:40000 > 10.96.0.10:80
        snat_port_cursor 10.244.0.3 -> 65 ports
        snat_port_cursor default/web-0 -> 7 ports
        devices 9 -> tc (no XDP: the MTU is too large for the driver)
        devices eth2 -> xdp tc
        devices eth3 -> -
        devices eth4 -> tc pod
        counters truncated -> 2
        counters not-frontend -> 70
        events created default/web 192.0.2.1 -> default/web-0
        events moved default/web 192.0.2.1 -> default/web-9 > default/web-1 reason=backend-gone
        events expired default/web 192.0.2.1 -> default/web-1 > default/web-0
        events unpinned default/web 192.0.2.1 -> default/web-0 > (none) reason=operator
        events pinned default/web 192.0.2.1 -> default/web-1 reason=operator
        events evicted -> 42 pins reason=table-full
        ");
    }

    #[test]
    fn times_and_slots_are_printed_on_request() {
        let plain = dump(DumpOptions::default());
        let detailed = dump(DumpOptions { times: true, slots: true });
        let lines: Vec<_> = detailed.lines().filter(|line| !plain.lines().any(|plain| plain == *line)).collect();
        insta::assert_snapshot!(lines.join("\n"), @r"
        slots default/web:http/TCP/v4 -> 2 slots: default/web-0 default/web-1
        slots default/web:https/TCP/v4 -> 2 slots: default/web-0 default/web-0
        sessions_v4 #77 203.0.113.9 -> default/web-1 service=#77 reason=created uses=3 age=2h46m idle=2h46m expires=0s
        sessions_v4 default/web 192.0.2.1 -> default/web-0 service=default/web reason=created uses=3 age=16m40s idle=10s expires=2h59m
        sessions_v4 default/web 192.0.2.20 -> default/web-1 service=default/web reason=backend-gone uses=3 age=45s idle=45s expires=2h59m
        sessions_v4 default/web 198.51.100.7 -> default/web-9 service=default/web reason=created uses=3 age=2h45m idle=2h44m expires=15m50s
        sessions_v4 default/web 198.51.100.8 -> (gone) service=default/web reason=created uses=3 age=16m40s idle=16m39s expires=2h43m
        sessions_v4 kube-system/infra(group) 203.0.113.0/24 -> 10.244.0.3 service=kube-system/dns reason=created uses=3 connections=2 age=16m40s idle=10s expires=never
        sessions_v6 kube-system/infra(group) 2001:db8::/64 -> 10.244.0.3 service=kube-system/dns reason=operator uses=3 connections=0 age=16m40s idle=10m expires=never
        flows_v4 dnat TCP 192.0.2.1:40000 > 10.96.0.10:80 -> 192.0.2.1:40000 > 10.244.0.1:8080 backend=default/web-0 service=default/web state=closing age=16m40s idle=1s
        flows_v4 rev-dnat TCP 10.244.0.1:8080 > 192.0.2.1:40000 -> 192.0.2.1:40000 > 10.244.0.1:8080 backend=default/web-0 service=default/web state=closing age=16m40s idle=1s
        events created default/web 192.0.2.1 -> default/web-0 age=16m40s
        events moved default/web 192.0.2.1 -> default/web-9 > default/web-1 reason=backend-gone age=15m
        events expired default/web 192.0.2.1 -> default/web-1 > default/web-0 age=13m20s
        events unpinned default/web 192.0.2.1 -> default/web-0 > (none) reason=operator age=11m40s
        events pinned default/web 192.0.2.1 -> default/web-1 reason=operator age=10m
        events evicted -> 42 pins reason=table-full age=50s
        ");
    }
}
