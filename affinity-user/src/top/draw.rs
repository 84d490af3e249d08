//! Draws a state into cells. Pure functions, used for the terminal, for `--once`, and for the tests.

mod service;
mod services;
mod table;
mod text;

use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::{Color, Modifier, Style},
    widgets::{Block, Clear, Padding, Paragraph, Widget},
};

use super::{
    input::{HELP, Mode},
    rows::{HOT_DEVIATIONS, HOT_FACTOR},
    sample::EventSample,
    state::{Overlay, Pane, Screen, State},
    unpin::Target,
};
use crate::view::short_duration;
use text::{cut, number_of, rate, wrap};

/// A terminal smaller than this shows only a message about its size.
const LEAST: (u16, u16) = (24, 6);
/// From this height on, events are shown.
const EVENTS_FROM: u16 = 16;
/// The maximum height of the events, including their title.
const EVENTS_MOST: u16 = 11;

/// The width of the keys in the help.
const KEYS_WIDTH: usize = 14;

/// The positions of the parts of the screen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Areas {
    header: Rect,
    main: Rect,
    events: Rect,
    footer: Rect,
}

impl Areas {
    fn new(state: &State, area: Rect) -> Self {
        let footer_height = u16::from(state.interactive);
        let room = area.height.saturating_sub(1 + footer_height);
        let events_height = match area.height {
            _ if !state.interactive => EVENTS_MOST,
            0..EVENTS_FROM => 0,
            height => (height / 4).min(EVENTS_MOST),
        };
        let header = Rect { height: 1, ..area };
        let main = Rect { y: header.bottom(), height: room - events_height, ..area };
        let events = Rect { y: main.bottom(), height: events_height, ..area };
        let footer = Rect { y: events.bottom(), height: footer_height, ..area };
        Self { header, main, events, footer }
    }
}

/// Draws the whole screen.
pub fn draw(state: &State, area: Rect, buffer: &mut Buffer) {
    if area.width < LEAST.0 || area.height < LEAST.1 {
        buffer.set_stringn(area.x, area.y, "the terminal is too small", usize::from(area.width), Style::new());
        return;
    }
    let areas = Areas::new(state, area);
    header(state, areas.header, buffer);
    match state.screen {
        Screen::Services => services::draw(state, areas.main, buffer),
        Screen::Service { .. } => service::draw(state, areas.main, buffer),
    }
    events(state, areas.events, buffer);
    footer(state, areas.footer, buffer);
    if let Some(overlay) = &state.overlay {
        draw_overlay(overlay, area, buffer);
    }
}

/// The number of rows in a page of the list with the cursor.
#[must_use]
pub fn page(state: &State, area: Rect) -> usize {
    let main = Areas::new(state, area).main;
    let (list, without) = match state.screen {
        Screen::Services => (main, 1),
        Screen::Service { pane, .. } => {
            let areas = service::Areas::new(state, pane, main);
            (if pane == Pane::Pods { areas.pods } else { areas.clients }, 2)
        }
    };
    usize::from(list.height).saturating_sub(without)
}

/// The buffer as lines, without trailing blanks.
#[must_use]
pub fn to_text(buffer: &Buffer) -> String {
    let width = usize::from(buffer.area.width).max(1);
    let lines = buffer.content().chunks(width).map(|cells| {
        let line: String = cells.iter().map(ratatui::buffer::Cell::symbol).collect();
        line.trim_end().to_owned() + "\n"
    });
    lines.collect()
}

fn header(state: &State, area: Rect, buffer: &mut Buffer) {
    let sample = &state.sample;
    let pins: u64 = sample.backends.values().map(|backend| backend.pins).sum();
    let rates = state.total_rates();
    let left = match (state.screen, state.service()) {
        (Screen::Service { .. }, Some(service)) => format!("affinity top > {}", service.name),
        _ => format!(
            "affinity top  {}  {}  {}  {} connections/s",
            number_of(sample.services.len() as u64, "service"),
            number_of(sample.pods, "pod"),
            number_of(pins, "pin"),
            rate(rates.map(|rates| rates.accepted)),
        ),
    };
    let right = match &sample.source {
        _ if state.paused => "paused".to_owned(),
        Some(source) => source.clone(),
        None => pace(state),
    };
    let width = usize::from(area.width);
    let room = width.saturating_sub(right.chars().count() + 1);
    let style = Style::new().add_modifier(Modifier::BOLD);
    buffer.set_stringn(area.x, area.y, cut(&left, room), room, style);
    let attention = state.paused || sample.source.is_some();
    let style = if attention { Style::new().fg(Color::Yellow) } else { Style::new().add_modifier(Modifier::DIM) };
    buffer.set_stringn(area.x + room as u16 + 1, area.y, &right, right.len(), style);
}

/// How often it samples: the interval, or longer if sampling takes long.
fn pace(state: &State) -> String {
    let wanted_s = state.interval.as_secs_f64();
    match state.sampled_every_s() {
        Some(every_s) if every_s > 2.0 * wanted_s && every_s > 1.0 => format!("every {every_s:.0}s: reading is slow"),
        _ => format!("every {wanted_s}s"),
    }
}

/// Draws a title over a line; returns the area below it.
fn rule(area: Rect, buffer: &mut Buffer, title: &str, strong: bool) -> Rect {
    if area.height == 0 {
        return area;
    }
    let width = usize::from(area.width);
    let dim = Style::new().add_modifier(Modifier::DIM);
    buffer.set_stringn(area.x, area.y, "─".repeat(width), width, dim);
    let style = if strong { Style::new().add_modifier(Modifier::BOLD) } else { Style::new() };
    let title = format!(" {} ", cut(title, width.saturating_sub(6)));
    buffer.set_stringn(area.x + 2, area.y, title, width.saturating_sub(2), style);
    Rect { y: area.y + 1, height: area.height - 1, ..area }
}

/// Draws the newest events; on a service's screen only its own.
fn events(state: &State, area: Rect, buffer: &mut Buffer) {
    let area = rule(area, buffer, "events", false);
    let service = match state.screen {
        Screen::Services => None,
        Screen::Service { id, .. } => Some(id),
    };
    let wanted = |event: &&EventSample| service.is_none() || event.service.is_none() || event.service == service;
    for (y, event) in (area.y..area.bottom()).zip(state.sample.events.iter().filter(wanted)) {
        let width = usize::from(area.width).saturating_sub(2);
        let line = format!("{:>6} ago  {}", short_duration(event.age_s), event.line);
        buffer.set_stringn(area.x + 2, y, cut(&line, width), width, Style::new());
    }
}

fn footer(state: &State, area: Rect, buffer: &mut Buffer) {
    if area.height == 0 {
        return;
    }
    let width = usize::from(area.width);
    let (text, style) = match (&state.message, state.mode()) {
        (_, Mode::Filter) => (format!("/{}▁   Enter keeps the filter, Esc clears it", state.filter()), Style::new()),
        (Some(message), _) if message.bad => (message.text.clone(), Style::new().fg(Color::Red)),
        (Some(message), _) => (message.text.clone(), Style::new().fg(Color::Green)),
        (None, _) => (hints(state), Style::new().add_modifier(Modifier::DIM)),
    };
    buffer.set_stringn(area.x, area.y, cut(&text, width), width, style);
}

fn hints(state: &State) -> String {
    let filter = if state.filter().is_empty() { String::new() } else { format!("filter /{}  ", state.filter()) };
    let keys = match state.screen {
        Screen::Services => "? help  q quit  Enter open  / filter  s sort  r reverse  U unpin  p pause",
        Screen::Service { .. } => "? help  q quit  Esc back  Tab pods/clients  / filter  s sort  u U unpin  p pause",
    };
    format!("{filter}{keys}")
}

/// The height at which a screen without keys shows everything.
#[must_use]
pub fn full_height(state: &State) -> u16 {
    let list = |rows: usize| u16::try_from(rows + 2).unwrap_or(u16::MAX).max(service::LEAST);
    let main = match state.screen {
        Screen::Services => list(state.services.shown().len()),
        Screen::Service { .. } => {
            let lists = list(state.pods.shown().len()).saturating_add(list(state.clients.shown().len()));
            lists.saturating_add(service::FACTS)
        }
    };
    main.saturating_add(1 + EVENTS_MOST)
}

/// Draws the help or a question, on top of the lists.
fn draw_overlay(overlay: &Overlay, area: Rect, buffer: &mut Buffer) {
    /// A wider box would not be easier to read.
    const WIDTH: u16 = 76;
    let width = area.width.saturating_sub(2).min(WIDTH);
    let inside = usize::from(width.saturating_sub(4));
    let (title, lines) = match overlay {
        Overlay::Help => (" help ", help(inside)),
        Overlay::Question(target) => (" unpin ", question(target, inside)),
    };
    let height = u16::try_from(lines.len() + 2).unwrap_or(u16::MAX).min(area.height);
    let (x, y) = (area.x + (area.width - width) / 2, area.y + (area.height - height) / 2);
    let frame = Rect { x, y, width, height };
    let block = Block::bordered().title(title).title_style(Style::new().add_modifier(Modifier::BOLD));
    let text = block.padding(Padding::horizontal(1));
    Clear.render(frame, buffer);
    Paragraph::new(lines.join("\n")).block(text).render(frame, buffer);
}

fn help(width: usize) -> Vec<String> {
    let keys = HELP.iter().flat_map(|(keys, what)| wrap(&format!("{keys:<KEYS_WIDTH$}{what}"), width, KEYS_WIDTH));
    let words = format!(
        "PINS are live pins by pod; a pod counts in each of its services. A HOT SPOT has more than {HOT_FACTOR} times the \
         mean of its service's ready pods, and exceeds it by more than {HOT_DEVIATIONS} standard deviations of a fair \
         draw. PINNED are new pins, MOVED are pins that had to change pods."
    );
    keys.chain([String::new()]).chain(wrap(&words, width, 0)).collect()
}

fn question(target: &Target, width: usize) -> Vec<String> {
    let (what, pronoun) = match target {
        Target::Client { client, service, .. } => (format!("Unpin {client} from its pod of {service}?"), "Its"),
        Target::Service { service, group: None, .. } => (format!("Unpin all clients of {service}?"), "Their"),
        Target::Service { service, group: Some(group), .. } => {
            (format!("Unpin all clients of {service}, and of all services in the group {group}?"), "Their")
        }
    };
    let mut lines = wrap(&format!("{what} {pronoun} next connection selects again; open connections stay."), width, 0);
    lines.extend([String::new(), "y  yes    any other key  no".to_owned()]);
    lines
}
