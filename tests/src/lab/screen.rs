//! How a terminal displays the bytes that a command writes: text in cells, and the few control sequences that `affinity` uses.
//! Colours are ignored; an unknown sequence panics, so that no test checks a screen that real terminals would not show.

/// Two screens of cells, one of them visible.
#[derive(Debug)]
pub(super) struct Screen {
    columns: usize,
    rows: usize,
    cells: Vec<Vec<char>>,
    /// The contents of the main screen while the alternate one is visible.
    main: Option<Vec<Vec<char>>>,
    row: usize,
    column: usize,
    cursor_is_shown: bool,
    /// Bytes of a character or a sequence that is not complete.
    pending: Vec<u8>,
}

impl Screen {
    pub(super) fn new(columns: u16, rows: u16) -> Self {
        let (columns, rows) = (usize::from(columns), usize::from(rows));
        let cells = blank(columns, rows);
        Self { columns, rows, cells, main: None, row: 0, column: 0, cursor_is_shown: true, pending: Vec::new() }
    }

    pub(super) fn resize(&mut self, columns: u16, rows: u16) {
        (self.columns, self.rows) = (usize::from(columns), usize::from(rows));
        self.cells = blank(self.columns, self.rows);
    }

    pub(super) fn text(&self) -> String {
        let lines: Vec<_> = self.cells.iter().map(|row| row.iter().collect::<String>().trim_end().to_owned()).collect();
        lines.join("\n")
    }

    pub(super) fn cursor_is_shown(&self) -> bool {
        self.cursor_is_shown
    }

    pub(super) fn is_alternate(&self) -> bool {
        self.main.is_some()
    }

    pub(super) fn write(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
        while let Some(length) = self.next() {
            self.pending.drain(..length);
        }
    }

    /// Handles one character or sequence; returns its length, or none while it is incomplete.
    fn next(&mut self) -> Option<usize> {
        match *self.pending.first()? {
            b'\r' => self.column = 0,
            b'\n' => self.new_line(),
            0x1b => return self.escape(),
            0x07 => {}
            _ => {
                let length = (1..=4).find(|&length| {
                    self.pending.get(..length).is_some_and(|bytes| std::str::from_utf8(bytes).is_ok())
                })?;
                let character = std::str::from_utf8(&self.pending[..length]).ok()?.chars().next()?;
                self.put(character);
                return Some(length);
            }
        }
        Some(1)
    }

    fn put(&mut self, character: char) {
        if self.column == self.columns {
            self.column = 0;
            self.new_line();
        }
        if let Some(cell) = self.cells.get_mut(self.row).and_then(|row| row.get_mut(self.column)) {
            *cell = character;
        }
        self.column += 1;
    }

    fn new_line(&mut self) {
        if self.row + 1 < self.rows {
            self.row += 1;
        } else {
            self.cells.remove(0);
            self.cells.push(vec![' '; self.columns]);
        }
    }

    /// `ESC [ parameters letter`.
    fn escape(&mut self) -> Option<usize> {
        assert!(*self.pending.get(1)? == b'[', "a sequence that is not known: {:?}", self.pending);
        let end = 2 + self.pending[2..].iter().position(|byte| (0x40..=0x7e).contains(byte))?;
        let parameters = String::from_utf8_lossy(&self.pending[2..end]).into_owned();
        self.control(&parameters, self.pending[end]);
        Some(end + 1)
    }

    fn control(&mut self, parameters: &str, letter: u8) {
        let numbers: Vec<usize> = parameters.split(';').map(|number| number.parse().unwrap_or(0)).collect();
        let first = numbers[0].max(1);
        match (letter, parameters) {
            (b'm', _) => {}
            (b'H', _) => {
                let column = numbers.get(1).copied().unwrap_or(1).max(1);
                (self.row, self.column) = (first.min(self.rows) - 1, column.min(self.columns) - 1);
            }
            (b'A', _) => self.row = self.row.saturating_sub(first),
            (b'B', _) => self.row = (self.row + first).min(self.rows - 1),
            (b'G', _) => self.column = first.min(self.columns) - 1,
            (b'J', "2") => self.cells = blank(self.columns, self.rows),
            // Clears the scrollback, which is not kept here.
            (b'J', "3") => {}
            (b'J', "" | "0") => {
                self.clear_line_from(self.column);
                self.cells.iter_mut().skip(self.row + 1).for_each(|row| row.fill(' '));
            }
            (b'K', "" | "0") => self.clear_line_from(self.column),
            (b'K', "2") => self.clear_line_from(0),
            (b'h', "?25") => self.cursor_is_shown = true,
            (b'l', "?25") => self.cursor_is_shown = false,
            (b'h', "?1049") => self.main = Some(std::mem::replace(&mut self.cells, blank(self.columns, self.rows))),
            (b'l', "?1049") => {
                if let Some(main) = self.main.take() {
                    self.cells = main;
                }
            }
            _ => panic!("a sequence that is not known: ESC [ {parameters} {}", char::from(letter)),
        }
    }

    fn clear_line_from(&mut self, column: usize) {
        let cells = &mut self.cells[self.row];
        let column = column.min(cells.len());
        cells[column..].fill(' ');
    }
}

fn blank(columns: usize, rows: usize) -> Vec<Vec<char>> {
    vec![vec![' '; columns]; rows]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_goes_where_the_cursor_is() {
        let mut screen = Screen::new(6, 3);
        screen.write(b"ab\r\ncd\x1b[3;2Hx\x1b[1;1H\x1b[31mZ\x1b[0m");
        assert_eq!(screen.text(), "Zb\ncd\n x");
        screen.write(b"\x1b[2;1H\x1b[K\x1b[2J");
        assert_eq!(screen.text(), "\n\n");
    }

    #[test]
    fn characters_and_sequences_may_come_in_parts() {
        let mut screen = Screen::new(4, 1);
        "é".bytes().for_each(|byte| screen.write(&[byte]));
        b"\x1b[1;3Hx".iter().for_each(|byte| screen.write(&[*byte]));
        assert_eq!(screen.text(), "é x");
    }

    #[test]
    fn the_main_screen_comes_back() {
        let mut screen = Screen::new(4, 1);
        screen.write(b"$ go\x1b[?1049h\x1b[?25l\x1b[1;1Htop");
        assert!(screen.is_alternate() && !screen.cursor_is_shown());
        screen.write(b"\x1b[?1049l\x1b[?25h");
        assert_eq!((screen.text().as_str(), screen.is_alternate(), screen.cursor_is_shown()), ("$ go", false, true));
    }

    #[test]
    fn long_output_scrolls() {
        let mut screen = Screen::new(3, 2);
        screen.write(b"abcd\r\nef\r\ng");
        assert_eq!(screen.text(), "ef\ng");
    }
}
