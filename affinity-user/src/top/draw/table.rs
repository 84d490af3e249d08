//! Tables that fit the width: names are shortened first, then less important columns are left out. Rows are shown in pages.

use ratatui::{
    buffer::Buffer,
    layout::Rect,
    style::{Modifier, Style},
};

use super::text::{bar, cut, fit};

/// The space before each row, for the cursor.
const GUTTER: usize = 2;
/// The space between two columns.
const GAP: usize = 2;
/// The width that names keep before columns are left out.
const NAME_WIDTH: usize = 14;
/// The length of bars.
const BAR_WIDTH: std::ops::RangeInclusive<usize> = 8..=40;

/// The content of a column.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Text, shortened if there is not enough space for all columns.
    Name,
    /// Text.
    Text,
    /// Numbers, aligned to the right.
    Number,
    /// Bars, which get the remaining space.
    Bar,
}

/// A column.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Column<O: 'static> {
    pub(super) title: &'static str,
    pub(super) kind: Kind,
    /// If there is not enough space, the column with the highest rank is left out first; rank zero always stays.
    pub(super) rank: u8,
    /// The order of rows that are sorted by this column.
    pub(super) order: Option<O>,
}

/// A row's content in a column.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Cell {
    text: String,
    /// The share of a bar, from 0 to 1.
    share: f64,
    style: Style,
}

impl Cell {
    pub(super) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), share: 0.0, style: Style::new() }
    }

    pub(super) fn bar(share: f64) -> Self {
        Self { share, ..Self::new("") }
    }

    pub(super) fn style(self, style: Style) -> Self {
        Self { style, ..self }
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

/// A table to draw.
pub(super) struct Table<'t, O: 'static> {
    pub(super) columns: &'t [Column<O>],
    /// The order of the rows, and whether it is reversed.
    pub(super) order: (O, bool),
    /// The row with the cursor; `None`: the cursor is in another list.
    pub(super) cursor: Option<usize>,
    /// The row that must be visible.
    pub(super) position: usize,
}

impl<O: PartialEq> Table<'_, O> {
    /// Draws the titles, and the page that contains the position.
    pub(super) fn draw<R>(
        &self,
        area: Rect,
        buffer: &mut Buffer,
        rows: impl ExactSizeIterator<Item = R>,
        cells: impl Fn(R) -> Vec<Cell>,
    ) {
        let page = usize::from(area.height).saturating_sub(1);
        if page == 0 {
            return;
        }
        let first = self.position / page * page;
        let rows: Vec<Vec<Cell>> = rows.skip(first).take(page).map(cells).collect();
        let titles: Vec<Cell> = self.columns.iter().map(|column| self.title(column)).collect();
        let widths = self.widths(usize::from(area.width), &titles, &rows);
        let style = Style::new().add_modifier(Modifier::DIM);
        self.line(area, buffer, &titles, &widths, style);
        for (y, cells) in (area.y + 1..).zip(&rows) {
            let row = Rect { y, height: 1, ..area };
            let has_cursor = self.cursor == Some(first + usize::from(y - area.y - 1));
            let style = if has_cursor { Style::new().add_modifier(Modifier::BOLD) } else { Style::new() };
            self.line(row, buffer, cells, &widths, style);
            if has_cursor {
                buffer.set_string(row.x, row.y, "▸", style);
            }
        }
    }

    fn title(&self, column: &Column<O>) -> Cell {
        let (order, reversed) = &self.order;
        let mark = match column.order.as_ref() == Some(order) {
            true if *reversed => "▴",
            true => "▾",
            false => "",
        };
        Cell::new(format!("{}{mark}", column.title))
    }

    /// The width of each column; `None` if the column is left out.
    fn widths(&self, room: usize, titles: &[Cell], rows: &[Vec<Cell>]) -> Vec<Option<usize>> {
        let needed = |index: usize| {
            let cells = rows.iter().filter_map(|cells| cells.get(index));
            cells.chain(titles.get(index)).map(Cell::width).max().unwrap_or(0)
        };
        let mut widths: Vec<Option<usize>> = (0..self.columns.len())
            .map(|index| match self.columns[index].kind {
                Kind::Name => Some(needed(index).min(NAME_WIDTH)),
                Kind::Text | Kind::Number => Some(needed(index)),
                Kind::Bar => Some(*BAR_WIDTH.start()),
            })
            .collect();
        let total = |widths: &[Option<usize>]| {
            let shown = widths.iter().flatten();
            GUTTER + shown.clone().sum::<usize>() + GAP * shown.count().saturating_sub(1)
        };
        while total(&widths) > room {
            let shown = (0..widths.len()).filter(|&index| widths[index].is_some() && self.columns[index].rank > 0);
            let Some(least) = shown.max_by_key(|&index| self.columns[index].rank) else { break };
            widths[least] = None;
        }
        let most = |index: usize| match self.columns[index].kind {
            Kind::Name | Kind::Text | Kind::Number => needed(index),
            Kind::Bar => *BAR_WIDTH.end(),
        };
        let mut left = room.saturating_sub(total(&widths));
        for (index, width) in widths.iter_mut().enumerate() {
            if let Some(width) = width {
                let more = most(index).saturating_sub(*width).min(left);
                (*width, left) = (*width + more, left - more);
            }
        }
        widths
    }

    fn line(&self, area: Rect, buffer: &mut Buffer, cells: &[Cell], widths: &[Option<usize>], style: Style) {
        let mut x = usize::from(area.x) + GUTTER;
        let end = usize::from(area.right());
        for ((cell, column), width) in cells.iter().zip(self.columns).zip(widths) {
            let Some(width) = *width else { continue };
            let width = width.min(end.saturating_sub(x));
            let text = match column.kind {
                Kind::Bar if cell.text.is_empty() => bar(cell.share, width),
                Kind::Name => fit(&cell.text, width),
                Kind::Text | Kind::Bar => cut(&cell.text, width),
                Kind::Number => format!("{:>width$}", cut(&cell.text, width)),
            };
            buffer.set_stringn(x as u16, area.y, text, width, cell.style.patch(style));
            x += width + GAP;
            if x >= end {
                break;
            }
        }
    }
}
