//! The screen of one service: its pods as bars, and its clients.

use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::{Color, Modifier, Style},
};

use super::{
    super::{
        clients::{ClientOrder, ClientRow, LIMIT},
        rows::{PodOrder, PodRow},
        state::{Pane, Screen, State},
    },
    rule,
    table::{Cell, Column, Kind, Table},
    text::{count, number_of, rate},
};
use crate::view::short_duration;

const POD_COLUMNS: &[Column<PodOrder>] = &[
    Column { title: "POD", kind: Kind::Name, rank: 0, order: Some(PodOrder::Name) },
    Column { title: "ADDRESS", kind: Kind::Text, rank: 5, order: None },
    Column { title: "STATE", kind: Kind::Text, rank: 4, order: None },
    Column { title: "CONN/S", kind: Kind::Number, rank: 3, order: Some(PodOrder::Connections) },
    Column { title: "PINS", kind: Kind::Number, rank: 0, order: Some(PodOrder::Pins) },
    Column { title: "", kind: Kind::Bar, rank: 1, order: None },
    Column { title: "HOT SPOT", kind: Kind::Text, rank: 2, order: None },
];

const CLIENT_COLUMNS: &[Column<ClientOrder>] = &[
    Column { title: "CLIENT", kind: Kind::Name, rank: 0, order: Some(ClientOrder::Client) },
    Column { title: "POD", kind: Kind::Name, rank: 0, order: Some(ClientOrder::Pod) },
    Column { title: "AGE", kind: Kind::Text, rank: 2, order: Some(ClientOrder::Age) },
    Column { title: "IDLE", kind: Kind::Text, rank: 1, order: Some(ClientOrder::Idle) },
    Column { title: "EXPIRES", kind: Kind::Text, rank: 3, order: Some(ClientOrder::Expires) },
    Column { title: "REASON", kind: Kind::Text, rank: 4, order: None },
];

/// The number of lines about the service itself.
pub(super) const FACTS: u16 = 2;
/// The minimum height of a list: a title, column titles and three rows.
pub(super) const LEAST: u16 = 5;

/// The positions of the two lists. If there is space for only one, it is the one with the cursor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Areas {
    pub(super) facts: Rect,
    pub(super) pods: Rect,
    pub(super) clients: Rect,
}

impl Areas {
    pub(super) fn new(state: &State, pane: Pane, area: Rect) -> Self {
        let facts = Rect { height: if area.height >= 2 * LEAST { FACTS } else { 0 }, ..area };
        let lists = Rect { y: facts.bottom(), height: area.height - facts.height, ..area };
        if lists.height < 2 * LEAST {
            let none = Rect { height: 0, ..lists };
            let (pods, clients) = if pane == Pane::Pods { (lists, none) } else { (none, lists) };
            return Self { facts, pods, clients };
        }
        let wanted = u16::try_from(state.pods.all().len()).unwrap_or(u16::MAX).saturating_add(2);
        let most = if state.interactive { lists.height / 2 } else { lists.height };
        let pods = Rect { height: wanted.clamp(LEAST, most), ..lists };
        Self { facts, pods, clients: Rect { y: pods.bottom(), height: lists.height - pods.height, ..lists } }
    }
}

pub(super) fn draw(state: &State, area: Rect, buffer: &mut Buffer) {
    let Screen::Service { pane, .. } = state.screen else { return };
    let areas = Areas::new(state, pane, area);
    facts(state, areas.facts, buffer);
    let pods = rule(areas.pods, buffer, &pods_title(state), pane == Pane::Pods && state.interactive);
    draw_pods(state, pods, buffer, pane == Pane::Pods && state.interactive);
    let clients = rule(areas.clients, buffer, &clients_title(state), pane == Pane::Clients && state.interactive);
    draw_clients(state, clients, buffer, pane == Pane::Clients && state.interactive);
}

/// Draws the facts and rates of the service.
fn facts(state: &State, area: Rect, buffer: &mut Buffer) {
    let (Some(service), Some(row)) = (state.service(), state.service_row()) else { return };
    let group = service.group.as_ref().map_or_else(String::new, |group| format!("  group {group}"));
    let per_second = |pick: fn(&super::super::rows::Rates) -> f64| rate(row.rates.as_ref().map(pick));
    let lines = [
        format!("{}{group}  {}", service.policy, service.frontends.join(" ")),
        format!(
            "{} connections/s  {} pinned/s  {} moved/s  {} refused/s",
            per_second(|rates| rates.accepted),
            per_second(|rates| rates.pinned),
            per_second(|rates| rates.moved),
            per_second(|rates| rates.refused),
        ),
    ];
    for (y, line) in (area.y..area.bottom()).zip(lines) {
        let width = usize::from(area.width).saturating_sub(2);
        buffer.set_stringn(area.x + 2, y, super::text::cut(&line, width), width, Style::new());
    }
}

fn pods_title(state: &State) -> String {
    let Some(row) = state.service_row() else { return String::new() };
    let mut title = number_of(u64::from(row.ready + row.draining), "pod");
    if row.draining > 0 {
        title += &format!(", {} draining", row.draining);
    }
    if let Some(mean) = state.mean() {
        title += &format!(", {:.0} pins each on average", mean);
    }
    title
}

fn clients_title(state: &State) -> String {
    if state.service().is_some_and(|service| !service.affinity) {
        return "no clients: the service has no affinity".to_owned();
    }
    let Some(found) = &state.found else { return "clients".to_owned() };
    let mut title = number_of(found.matching, "client");
    let filter = state.clients.filter();
    if !filter.is_empty() {
        title += &format!(" like `{filter}`");
    }
    if found.matching > LIMIT as u64 {
        title += &format!(", only {LIMIT} are listed: use / to filter");
    }
    if !found.complete {
        title += &format!(", {} sessions read so far", count(found.read));
    }
    title
}

fn draw_pods(state: &State, area: Rect, buffer: &mut Buffer, has_cursor: bool) {
    let pods = &state.pods;
    let table = Table {
        columns: POD_COLUMNS,
        order: pods.order(),
        cursor: has_cursor.then(|| pods.position()),
        position: pods.position(),
    };
    let most = pods.all().iter().map(|pod| pod.pins).max().unwrap_or(0).max(1);
    table.draw(area, buffer, pods.shown(), |pod| pod_cells(pod, most));
}

fn pod_cells(pod: &PodRow, most: u64) -> Vec<Cell> {
    let color = match (pod.hot, pod.ready) {
        (Some(_), _) => Color::Red,
        (None, true) => Color::Green,
        (None, false) => Color::Yellow,
    };
    let hot = pod.hot.map_or_else(String::new, |factor| format!("{factor:.1}x the mean"));
    vec![
        Cell::new(&pod.name),
        Cell::new(&pod.address),
        Cell::new(if pod.ready { "ready" } else { "draining" }).style(Style::new().fg(color)),
        Cell::new(rate(pod.accepted)),
        Cell::new(count(pod.pins)),
        Cell::bar(pod.pins as f64 / most as f64).style(Style::new().fg(color)),
        Cell::new(hot).style(Style::new().fg(Color::Red).add_modifier(Modifier::BOLD)),
    ]
}

fn draw_clients(state: &State, area: Rect, buffer: &mut Buffer, has_cursor: bool) {
    let clients = &state.clients;
    let table = Table {
        columns: CLIENT_COLUMNS,
        order: clients.order(),
        cursor: has_cursor.then(|| clients.position()),
        position: clients.position(),
    };
    table.draw(area, buffer, clients.shown(), |client| client_cells(client, state.sample.at_ns));
}

fn client_cells(client: &ClientRow, now_ns: u64) -> Vec<Cell> {
    let since = |time_ns: u64| short_duration(now_ns.saturating_sub(time_ns) / 1_000_000_000);
    let expires = match client.expires_in_s {
        None => Cell::new("never"),
        Some(0) => Cell::new("expired").style(Style::new().add_modifier(Modifier::DIM)),
        Some(seconds) => Cell::new(short_duration(seconds)),
    };
    vec![
        Cell::new(client.client_text()),
        Cell::new(&client.pod),
        Cell::new(since(client.created_ns)),
        Cell::new(since(client.last_used_ns)),
        expires,
        Cell::new(client.reason),
    ]
}
