//! The screen of all services.

use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::{Color, Modifier, Style},
};

use super::{
    super::{
        rows::{ServiceOrder, ServiceRow},
        state::State,
    },
    table::{Cell, Column, Kind, Table},
    text::{count, rate},
};

const COLUMNS: &[Column<ServiceOrder>] = &[
    Column { title: "SERVICE", kind: Kind::Name, rank: 0, order: Some(ServiceOrder::Name) },
    Column { title: "READY", kind: Kind::Number, rank: 3, order: None },
    Column { title: "PINS", kind: Kind::Number, rank: 0, order: Some(ServiceOrder::Pins) },
    Column { title: "CONN/S", kind: Kind::Number, rank: 1, order: Some(ServiceOrder::Connections) },
    Column { title: "PINNED/S", kind: Kind::Number, rank: 6, order: None },
    Column { title: "MOVED/S", kind: Kind::Number, rank: 5, order: Some(ServiceOrder::Moved) },
    Column { title: "REFUSED/S", kind: Kind::Number, rank: 4, order: None },
    Column { title: "HOT SPOT", kind: Kind::Name, rank: 2, order: Some(ServiceOrder::Hot) },
];

pub(super) fn draw(state: &State, area: Rect, buffer: &mut Buffer) {
    let services = &state.services;
    let table = Table {
        columns: COLUMNS,
        order: services.order(),
        cursor: state.interactive.then(|| services.position()),
        position: services.position(),
    };
    table.draw(area, buffer, services.shown(), cells);
    if services.shown().len() == 0 && area.height > 1 {
        let text = match services.all() {
            [] => "no services".to_owned(),
            _ => format!("no service matches `{}`", services.filter()),
        };
        buffer.set_stringn(area.x + 2, area.y + 1, text, usize::from(area.width).saturating_sub(2), Style::new());
    }
}

fn cells(row: &ServiceRow) -> Vec<Cell> {
    let (ready, all) = (row.ready, row.ready + row.draining);
    let ready_style = match ready {
        0 => Style::new().fg(Color::Red),
        _ if row.draining > 0 => Style::new().fg(Color::Yellow),
        _ => Style::new(),
    };
    let per_second = |pick: fn(&super::super::rows::Rates) -> f64| row.rates.as_ref().map(pick);
    let bad = |value: Option<f64>, color: Color| {
        let style = if value.is_some_and(|value| value > 0.0) { Style::new().fg(color) } else { Style::new() };
        Cell::new(rate(value)).style(style)
    };
    let hot = row.hot.as_ref().map_or_else(String::new, |(pod, factor)| format!("{pod} {factor:.1}x"));
    vec![
        Cell::new(&row.name),
        Cell::new(format!("{ready}/{all}")).style(ready_style),
        Cell::new(row.pins.map_or_else(|| "-".to_owned(), count)),
        Cell::new(rate(per_second(|rates| rates.accepted))),
        Cell::new(rate(per_second(|rates| rates.pinned))),
        bad(per_second(|rates| rates.moved), Color::Yellow),
        bad(per_second(|rates| rates.refused), Color::Red),
        Cell::new(hot).style(Style::new().fg(Color::Red).add_modifier(Modifier::BOLD)),
    ]
}
