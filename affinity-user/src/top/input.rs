//! Maps keys to actions: a pure function of the key and of the mode.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

/// Keys and their actions, as lines of the help.
pub const HELP: &[(&str, &str)] = &[
    ("arrows, j k", "move; also PgUp PgDn Home End"),
    ("Enter, right", "open the service; from a pod, its clients"),
    ("Esc, left", "back; drop the filter"),
    ("Tab", "from pods to clients, and back"),
    ("/", "filter: names; or clients, pods, reasons"),
    ("s", "sort by the next column"),
    ("r", "reverse the order"),
    ("u", "unpin the selected client"),
    ("U", "unpin all clients of the service"),
    ("p, space", "pause or continue"),
    ("?", "this help"),
    ("q, Ctrl-C", "quit"),
];

/// The part of the screen that has the keyboard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// The lists.
    Lists,
    /// The filter, while it is being typed.
    Filter,
    /// A yes-or-no question.
    Question,
    /// The help.
    Help,
}

/// The action of a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Move the cursor by this many rows.
    Move(isize),
    /// Move it by this many pages.
    Page(isize),
    /// Move it to the first row.
    First,
    /// Move it to the last row.
    Last,
    /// Open the row under the cursor.
    Open,
    /// Go back.
    Back,
    /// Move the cursor to the other list.
    NextPane,
    /// Sort by the next column.
    Sort,
    /// Reverse the order.
    Reverse,
    /// Start to type a filter.
    Filter,
    /// Add to the filter.
    Type(char),
    /// Remove the last character from the filter.
    Erase,
    /// Keep the filter, and return the keyboard to the lists.
    Accept,
    /// Remove the filter.
    DropFilter,
    /// Ask whether to unpin the client.
    UnpinClient,
    /// Ask whether to unpin all clients of the service.
    UnpinService,
    /// Yes.
    Yes,
    /// No.
    No,
    /// Stop sampling, or continue.
    Pause,
    /// Show the help.
    Help,
    /// Close the help.
    CloseHelp,
    /// Quit.
    Quit,
}

/// Keys that move the cursor, in the lists and while a filter is typed.
const MOVES: &[(KeyCode, Action)] = &[
    (KeyCode::Up, Action::Move(-1)),
    (KeyCode::Down, Action::Move(1)),
    (KeyCode::PageUp, Action::Page(-1)),
    (KeyCode::PageDown, Action::Page(1)),
    (KeyCode::Home, Action::First),
    (KeyCode::End, Action::Last),
];

const IN_LISTS: &[(KeyCode, Action)] = &[
    (KeyCode::Char('k'), Action::Move(-1)),
    (KeyCode::Char('j'), Action::Move(1)),
    (KeyCode::Enter, Action::Open),
    (KeyCode::Right, Action::Open),
    (KeyCode::Esc, Action::Back),
    (KeyCode::Left, Action::Back),
    (KeyCode::Backspace, Action::Back),
    (KeyCode::Tab, Action::NextPane),
    (KeyCode::BackTab, Action::NextPane),
    (KeyCode::Char('/'), Action::Filter),
    (KeyCode::Char('s'), Action::Sort),
    (KeyCode::Char('r'), Action::Reverse),
    (KeyCode::Char('u'), Action::UnpinClient),
    (KeyCode::Char('U'), Action::UnpinService),
    (KeyCode::Char('p'), Action::Pause),
    (KeyCode::Char(' '), Action::Pause),
    (KeyCode::Char('?'), Action::Help),
    (KeyCode::F(1), Action::Help),
    (KeyCode::Char('q'), Action::Quit),
];

const IN_FILTER: &[(KeyCode, Action)] = &[
    (KeyCode::Backspace, Action::Erase),
    (KeyCode::Enter, Action::Accept),
    (KeyCode::Tab, Action::Accept),
    (KeyCode::Esc, Action::DropFilter),
];

/// The action of a key in a mode; `None` if it has none.
#[must_use]
pub fn action(mode: Mode, key: KeyEvent) -> Option<Action> {
    let one_of =
        |keys: &[(KeyCode, Action)]| keys.iter().find(|(code, _)| *code == key.code).map(|(_, action)| *action);
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return (key.code == KeyCode::Char('c')).then_some(Action::Quit);
    }
    match (mode, key.code) {
        (Mode::Lists, _) => one_of(MOVES).or_else(|| one_of(IN_LISTS)),
        (Mode::Filter, KeyCode::Char(typed)) => Some(Action::Type(typed)),
        (Mode::Filter, _) => one_of(MOVES).or_else(|| one_of(IN_FILTER)),
        (Mode::Question, KeyCode::Char('y' | 'Y')) => Some(Action::Yes),
        (Mode::Question, _) => Some(Action::No),
        (Mode::Help, KeyCode::Char('q')) => Some(Action::Quit),
        (Mode::Help, _) => Some(Action::CloseHelp),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(mode: Mode, code: KeyCode) -> Option<Action> {
        action(mode, KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn a_filter_takes_letters_that_are_keys_elsewhere() {
        for c in ['q', 'u', 's', '?', 'j'] {
            assert_eq!(press(Mode::Filter, KeyCode::Char(c)), Some(Action::Type(c)));
            assert_ne!(press(Mode::Lists, KeyCode::Char(c)), Some(Action::Type(c)));
        }
    }

    #[test]
    fn only_y_confirms() {
        assert_eq!(press(Mode::Question, KeyCode::Char('y')), Some(Action::Yes));
        for code in [KeyCode::Enter, KeyCode::Char('n'), KeyCode::Char(' '), KeyCode::Esc, KeyCode::Char('u')] {
            assert_eq!(press(Mode::Question, code), Some(Action::No));
        }
    }

    #[test]
    fn control_c_quits_from_anywhere() {
        for mode in [Mode::Lists, Mode::Filter, Mode::Question, Mode::Help] {
            let key = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
            assert_eq!(action(mode, key), Some(Action::Quit));
        }
    }
}
