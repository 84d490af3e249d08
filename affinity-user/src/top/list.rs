//! Rows with an order, a filter and a cursor that stays on its row while other rows come, go and move.

use std::{cmp::Ordering, fmt::Debug};

/// A row of a list.
pub trait Row {
    /// The key by which the cursor follows its row.
    type Key: Copy + PartialEq + Debug;
    /// The sort orders of rows.
    type Order: Copy + PartialEq + Debug + 'static;
    /// All orders, in the sequence of the sort key.
    const ORDERS: &'static [Self::Order];

    /// Its identity.
    fn key(&self) -> Self::Key;
    /// Whether it matches a filter, in lower case.
    fn matches(&self, filter: &str) -> bool;
    /// Compares two rows. The order is total, so that rows with equal numbers do not swap places.
    fn compare(&self, other: &Self, order: Self::Order) -> Ordering;
}

/// Rows, and the subset of them that is shown.
#[derive(Clone, Debug)]
pub struct List<R: Row> {
    rows: Vec<R>,
    order: R::Order,
    reversed: bool,
    filter: String,
    /// The key of the row under the cursor.
    selected: Option<R::Key>,
    /// The position of the row under the cursor. If that row was removed, of the row that took its place.
    position: usize,
    shown: Vec<usize>,
}

impl<R: Row> Default for List<R> {
    fn default() -> Self {
        Self {
            rows: Vec::new(),
            order: R::ORDERS[0],
            reversed: false,
            filter: String::new(),
            selected: None,
            position: 0,
            shown: Vec::new(),
        }
    }
}

impl<R: Row> List<R> {
    /// Replaces all rows.
    pub fn set_rows(&mut self, rows: Vec<R>) {
        self.rows = rows;
        self.arrange();
    }

    /// Shows the rows that match, ignoring case.
    pub fn set_filter(&mut self, filter: &str) {
        self.filter = filter.to_lowercase();
        self.arrange();
    }

    /// Switches to the next order.
    pub fn next_order(&mut self) {
        let at = R::ORDERS.iter().position(|&order| order == self.order).unwrap_or(0);
        self.order = R::ORDERS[(at + 1) % R::ORDERS.len()];
        self.reversed = false;
        self.arrange();
    }

    /// Reverses the order.
    pub fn reverse(&mut self) {
        self.reversed = !self.reversed;
        self.arrange();
    }

    /// The order of the rows, and whether it is reversed.
    pub fn order(&self) -> (R::Order, bool) {
        (self.order, self.reversed)
    }

    /// The filter, in lower case.
    pub fn filter(&self) -> &str {
        &self.filter
    }

    /// Moves the cursor by this many rows, as far as possible.
    pub fn move_by(&mut self, rows: isize) {
        self.move_to(self.position.saturating_add_signed(rows));
    }

    /// Moves the cursor to a row, or to the last one.
    pub fn move_to(&mut self, position: usize) {
        self.position = position.min(self.shown.len().saturating_sub(1));
        self.selected = self.selected().map(Row::key);
    }

    /// The rows that are shown, in order.
    pub fn shown(&self) -> impl ExactSizeIterator<Item = &R> {
        self.shown.iter().map(|&index| &self.rows[index])
    }

    /// All rows, without the filter.
    pub fn all(&self) -> &[R] {
        &self.rows
    }

    /// The position of the cursor among the shown rows.
    pub fn position(&self) -> usize {
        self.position
    }

    /// The row under the cursor.
    pub fn selected(&self) -> Option<&R> {
        self.shown.get(self.position).map(|&index| &self.rows[index])
    }

    fn arrange(&mut self) {
        let (rows, order) = (&self.rows, self.order);
        let mut shown: Vec<usize> = (0..rows.len()).filter(|&index| rows[index].matches(&self.filter)).collect();
        shown.sort_by(|&one, &other| rows[one].compare(&rows[other], order));
        if self.reversed {
            shown.reverse();
        }
        self.shown = shown;
        let kept = self.selected.and_then(|key| self.shown.iter().position(|&index| self.rows[index].key() == key));
        self.move_to(kept.unwrap_or(self.position));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug)]
    struct Word(&'static str);

    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum By {
        Letters,
        Length,
    }

    impl Row for Word {
        type Key = &'static str;
        type Order = By;
        const ORDERS: &'static [By] = &[By::Letters, By::Length];

        fn key(&self) -> &'static str {
            self.0
        }

        fn matches(&self, filter: &str) -> bool {
            self.0.to_lowercase().contains(filter)
        }

        fn compare(&self, other: &Self, order: By) -> Ordering {
            match order {
                By::Letters => self.0.cmp(other.0),
                By::Length => self.0.len().cmp(&other.0.len()).then(self.0.cmp(other.0)),
            }
        }
    }

    fn list(words: &[&'static str]) -> List<Word> {
        let mut list = List::default();
        list.set_rows(words.iter().copied().map(Word).collect());
        list
    }

    fn shown(list: &List<Word>) -> Vec<&'static str> {
        list.shown().map(|word| word.0).collect()
    }

    #[test]
    fn the_cursor_stays_on_its_row() {
        let mut list = list(&["pear", "fig", "Apple"]);
        list.move_to(1);
        assert_eq!(list.selected().unwrap().0, "fig");
        list.next_order();
        assert_eq!((shown(&list), list.position()), (vec!["fig", "pear", "Apple"], 0));
        list.reverse();
        assert_eq!((shown(&list), list.position()), (vec!["Apple", "pear", "fig"], 2));
        list.set_rows(["a", "kiwi", "fig"].into_iter().map(Word).collect());
        assert_eq!((shown(&list), list.position()), (vec!["kiwi", "fig", "a"], 1));
    }

    #[test]
    fn the_cursor_takes_the_next_row_when_its_row_is_removed() {
        let mut list = list(&["a", "b", "c"]);
        list.move_to(1);
        list.set_rows(["a", "c"].into_iter().map(Word).collect());
        assert_eq!(list.selected().unwrap().0, "c");
        list.set_rows(vec![Word("a")]);
        assert_eq!(list.selected().unwrap().0, "a");
        list.set_rows(Vec::new());
        assert!(list.selected().is_none());
        list.move_by(5);
        list.set_rows(vec![Word("z")]);
        assert_eq!(list.selected().unwrap().0, "z");
    }

    #[test]
    fn a_filter_knows_no_case_and_can_be_taken_back() {
        let mut list = list(&["pear", "fig", "Apple"]);
        list.set_filter("AP");
        assert_eq!(shown(&list), ["Apple"]);
        list.set_filter("x");
        assert!(list.selected().is_none());
        list.set_filter("");
        assert_eq!(shown(&list), ["Apple", "fig", "pear"]);
    }

    #[test]
    fn the_cursor_stays_within_the_list() {
        let mut list = list(&["a", "b", "c"]);
        list.move_by(10);
        assert_eq!(list.position(), 2);
        list.move_by(-10);
        assert_eq!(list.position(), 0);
        assert_eq!(list.all().len(), 3);
    }
}
