//! Overlays on the lists: the help, and questions.

use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::{Modifier, Style},
    widgets::{Block, Clear, Padding, Paragraph, Widget},
};

use super::super::{
    input::HELP,
    rows::{HOT_DEVIATIONS, HOT_FACTOR},
    state::Overlay,
    unpin::Target,
};
use super::text::wrap;

/// The width of the keys in the help.
const KEYS_WIDTH: usize = 14;

pub(super) fn draw(overlay: &Overlay, area: Rect, buffer: &mut Buffer) {
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
         draw. PINNED are new pins, MOVED are pins whose pod could not be used."
    );
    keys.chain([String::new()]).chain(wrap(&words, width, 0)).collect()
}

fn question(target: &Target, width: usize) -> Vec<String> {
    let (what, whose) = match target {
        Target::Client { client, service, .. } => (format!("Unpin {client} from its pod of {service}?"), "Its"),
        Target::Service { service, group: None, .. } => (format!("Unpin all clients of {service}?"), "Their"),
        Target::Service { service, group: Some(group), .. } => {
            (format!("Unpin all clients of {service}, and of all services in the group {group}?"), "Their")
        }
    };
    let mut lines = wrap(&format!("{what} {whose} next connection selects again; open connections stay."), width, 0);
    lines.extend([String::new(), "y  yes    any other key  no".to_owned()]);
    lines
}
