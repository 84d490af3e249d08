//! The output of objects: as a table for users, as JSON or YAML for programs.
//!
//! A [`Listing`] takes rows one at a time and never holds more than [`SAMPLE_ROWS`] of them. A table's columns are as wide as
//! the rows of that sample need; in a longer listing at least as wide as the names that are known in advance. JSON is an array
//! with one object per line, YAML a list. Only terminals get colour, and never if `NO_COLOR` is set.

use std::{
    env,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use clap::{
    ValueEnum,
    builder::styling::{AnsiColor, Style},
};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use serde::Serialize;

/// The number of rows that a table collects before it decides on the widths of its columns.
pub(crate) const SAMPLE_ROWS: usize = 512;

/// The number of spaces between two columns.
const GAP: usize = 3;

/// The form of output.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns.
    #[default]
    Table,
    /// A table with more columns.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// Whether standard output is a terminal, and colour is not disabled.
pub(crate) fn wants_colour() -> bool {
    io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// The meaning of a cell's colour.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Tone {
    #[default]
    Plain,
    Good,
    Attention,
    Bad,
    Faint,
}

impl Tone {
    fn style(self) -> Style {
        match self {
            Self::Plain => Style::new(),
            Self::Good => AnsiColor::Green.on_default(),
            Self::Attention => AnsiColor::Yellow.on_default(),
            Self::Bad => AnsiColor::Red.on_default(),
            Self::Faint => Style::new().dimmed(),
        }
    }
}

/// Text in a tone, if colour is enabled.
pub(crate) fn paint(text: &str, tone: Tone, colour: bool) -> String {
    let style = tone.style();
    if colour && tone != Tone::Plain { format!("{style}{text}{style:#}") } else { text.to_owned() }
}

/// One cell of a table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), tone: Tone::Plain }
    }

    pub(crate) fn toned(text: impl Into<String>, tone: Tone) -> Self {
        Self { text: text.into(), tone }
    }

    pub(crate) fn number(number: impl ToString) -> Self {
        Self::new(number.to_string())
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

/// A column of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Column {
    title: &'static str,
    /// Shown only by `-o wide`.
    wide: bool,
    /// Whether it contains numbers, which are aligned to the right.
    number: bool,
}

impl Column {
    pub(crate) const fn text(title: &'static str) -> Self {
        Self { title, wide: false, number: false }
    }

    pub(crate) const fn number(title: &'static str) -> Self {
        Self { title, wide: false, number: true }
    }

    pub(crate) const fn wide(self) -> Self {
        Self { wide: true, ..self }
    }
}

/// An object that a listing prints.
pub(crate) trait Row: Serialize {
    const COLUMNS: &'static [Column];
    /// One cell for each column.
    fn cells(&self) -> Vec<Cell>;
}

/// Prints rows.
pub(crate) struct Listing<W> {
    out: W,
    format: Format,
    colour: bool,
    columns: &'static [Column],
    /// The minimum widths in a listing longer than the sample.
    known_widths: Vec<usize>,
    sample: Vec<Vec<Cell>>,
    widths: Option<Vec<usize>>,
    rows: u64,
}

impl<W: Write> Listing<W> {
    /// A listing. Nothing is printed before the first row or the end.
    pub(crate) fn new<R: Row>(out: W, format: Format, colour: bool) -> Self {
        Self {
            out,
            format,
            colour,
            columns: R::COLUMNS,
            known_widths: Vec::new(),
            sample: Vec::new(),
            widths: None,
            rows: 0,
        }
    }

    /// Sets the widths of the first columns, known before any row.
    pub(crate) fn with_known_widths(mut self, widths: Vec<usize>) -> Self {
        self.known_widths = widths;
        self
    }

    /// Prints a row, at once or as soon as the widths of the columns are known.
    pub(crate) fn push<R: Row>(&mut self, row: &R) -> io::Result<()> {
        self.rows += 1;
        match self.format {
            Format::Table | Format::Wide => {
                let cells = self.shown(row.cells());
                let Some(widths) = self.widths.take() else { return self.wait(cells) };
                let written = self.write_cells(&cells, &widths);
                self.widths = Some(widths);
                written
            }
            Format::Json => {
                self.out.write_all(if self.rows == 1 { b"[\n" } else { b",\n" })?;
                serde_json::to_writer(&mut self.out, row).map_err(io::Error::from)
            }
            Format::Yaml => self.out.write_all(to_yaml(&[row])?.as_bytes()),
        }
    }

    /// Prints the collected rows and the titles: for rows that arrive one at a time.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if matches!(self.format, Format::Table | Format::Wide) && self.widths.is_none() {
            let known = std::mem::take(&mut self.known_widths);
            self.write_sample(&known)?;
        }
        self.out.flush()
    }

    /// Prints the collected rows and the end of the listing; returns the number of rows.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        match self.format {
            Format::Table | Format::Wide if self.widths.is_none() && self.rows > 0 => self.write_sample(&[])?,
            Format::Json | Format::Yaml if self.rows == 0 => self.out.write_all(b"[]\n")?,
            Format::Json => self.out.write_all(b"\n]\n")?,
            Format::Table | Format::Wide | Format::Yaml => {}
        }
        self.out.flush()?;
        Ok(self.rows)
    }

    fn wait(&mut self, cells: Vec<Cell>) -> io::Result<()> {
        self.sample.push(cells);
        if self.sample.len() < SAMPLE_ROWS {
            return Ok(());
        }
        let known = std::mem::take(&mut self.known_widths);
        self.write_sample(&known)
    }

    fn write_sample(&mut self, known_widths: &[usize]) -> io::Result<()> {
        let titles = self.shown(self.columns.iter().map(|column| Cell::toned(column.title, Tone::Faint)).collect());
        let mut widths: Vec<_> = titles.iter().map(Cell::width).collect();
        for cells in &self.sample {
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = (*width).max(cell.width());
            }
        }
        for (width, &known) in widths.iter_mut().zip(known_widths) {
            *width = (*width).max(known);
        }
        self.write_cells(&titles, &widths)?;
        for cells in std::mem::take(&mut self.sample) {
            self.write_cells(&cells, &widths)?;
        }
        self.widths = Some(widths);
        Ok(())
    }

    fn shown_columns(&self) -> impl Iterator<Item = (usize, &'static Column)> + use<W> {
        let wide = self.format == Format::Wide;
        self.columns.iter().enumerate().filter(move |(_, column)| wide || !column.wide)
    }

    /// The cells of the columns that this format shows.
    fn shown(&self, cells: Vec<Cell>) -> Vec<Cell> {
        let mut cells: Vec<_> = cells.into_iter().map(Some).collect();
        self.shown_columns().filter_map(|(index, _)| cells.get_mut(index).and_then(Option::take)).collect()
    }

    /// One line, without spaces at its end.
    fn write_cells(&mut self, cells: &[Cell], widths: &[usize]) -> io::Result<()> {
        let mut line = String::new();
        let mut blanks = 0;
        for ((cell, width), (_, column)) in cells.iter().zip(widths).zip(self.shown_columns()) {
            let free = width.saturating_sub(cell.width());
            let (before, after) = if column.number { (free, 0) } else { (0, free) };
            line.extend(std::iter::repeat_n(' ', blanks + before));
            line += &paint(&cell.text, cell.tone, self.colour);
            blanks = after + GAP;
        }
        line.push('\n');
        self.out.write_all(line.as_bytes())
    }
}

/// Prints a few rows.
pub(crate) fn list<R: Row>(out: impl Write, format: Format, colour: bool, rows: &[R]) -> io::Result<u64> {
    let mut listing = Listing::new::<R>(out, format, colour);
    for row in rows {
        listing.push(row)?;
    }
    listing.finish()
}

/// Prints one object as JSON or YAML. For table formats prints nothing and returns false.
pub(crate) fn object(out: &mut impl Write, format: Format, object: &impl Serialize) -> io::Result<bool> {
    match format {
        Format::Table | Format::Wide => return Ok(false),
        Format::Json => {
            serde_json::to_writer_pretty(&mut *out, object)?;
            out.write_all(b"\n")?;
        }
        Format::Yaml => out.write_all(to_yaml(object)?.as_bytes())?,
    }
    Ok(true)
}

fn to_yaml(value: &impl Serialize) -> io::Result<String> {
    serde_saphyr::to_string(value).map_err(io::Error::other)
}

/// Nothing is shown before this much time has passed.
const PATIENCE: Duration = Duration::from_secs(1);

/// The number of entries between two checks of the clock.
const STRIDE: u64 = 4096;

/// Counts entries. indicatif itself shows nothing without a terminal.
pub(crate) struct Progress {
    what: &'static str,
    started: Instant,
    done: u64,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// `what` is the activity, such as "reading sessions".
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, started: Instant::now(), done: 0, bar: None }
    }

    /// Counts one more entry.
    pub(crate) fn step(&mut self) {
        self.done += 1;
        if self.done.is_multiple_of(STRIDE) && self.started.elapsed() > PATIENCE {
            let what = self.what;
            let bar =
                self.bar.get_or_insert_with(|| ProgressBar::new_spinner().with_style(ProgressStyle::default_spinner()));
            bar.set_message(format!("{what}: {} in {:.0?}", HumanCount(self.done), self.started.elapsed()));
            bar.tick();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
