//! Formats numbers and names for small widths.

/// A count: exact up to five digits.
pub(super) fn count(count: u64) -> String {
    match count {
        0..100_000 => count.to_string(),
        100_000..1_000_000 => format!("{}k", count / 1_000),
        1_000_000..100_000_000 => format!("{:.1}M", count as f64 / 1e6),
        _ => format!("{}M", count / 1_000_000),
    }
}

/// A number per second, with one decimal digit for small numbers.
pub(super) fn rate(rate: Option<f64>) -> String {
    match rate {
        None => "-".to_owned(),
        Some(0.0) => "0".to_owned(),
        Some(rate) if rate < 99.95 => format!("{rate:.1}"),
        Some(rate) => count(rate.round() as u64),
    }
}

/// `3 services`, `1 service`.
pub(super) fn number_of(number: u64, what: &str) -> String {
    format!("{} {what}{}", count(number), if number == 1 { "" } else { "s" })
}

/// Shortens a name to `width` characters: the middle is left out, because names usually differ at their ends.
pub(super) fn fit(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let Some(kept) = width.checked_sub(1) else { return String::new() };
    let (head, tail) = (kept.div_ceil(2), kept / 2);
    text.chars().take(head).chain(['…']).chain(text.chars().skip(length - tail)).collect()
}

/// Shortens a sentence to `width` characters.
pub(super) fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).take(width).collect()
}

/// Lines of at most `width` characters, broken between words; all except the first are indented by `indent` blanks.
pub(super) fn wrap(text: &str, width: usize, indent: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in text.split(' ') {
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line = format!("{line} {word}");
        } else {
            lines.push(std::mem::replace(&mut line, " ".repeat(indent) + word));
        }
    }
    lines.push(line);
    lines
}

/// A bar of `share` (0 to 1) in `width` cells, with a resolution of an eighth of a cell. Every share above zero is visible.
pub(super) fn bar(share: f64, width: usize) -> String {
    const PARTS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    let eighths = (share.clamp(0.0, 1.0) * (width * 8) as f64).round() as usize;
    let eighths = if share > 0.0 { eighths.max(1) } else { 0 };
    let mut bar = "█".repeat(eighths / 8);
    if !eighths.is_multiple_of(8) {
        bar.push(PARTS[eighths % 8]);
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_abbreviated() {
        let counts = [0, 99_999, 100_000, 999_999, 1_250_000, 99_999_999, 250_000_000];
        assert_eq!(counts.map(count), ["0", "99999", "100k", "999k", "1.2M", "100.0M", "250M"]);
        let rates = [0.0, 0.04, 1.0, 99.94, 99.96, 123_456.7].map(|it| rate(Some(it)));
        assert_eq!(rates, ["0", "0.0", "1.0", "99.9", "100", "123k"]);
        assert_eq!((number_of(1, "pod"), number_of(0, "pod")), ("1 pod".to_owned(), "0 pods".to_owned()));
    }

    #[test]
    fn names_keep_both_ends() {
        assert_eq!(fit("web-6d4cf56db6-x7k2p", 12), "web-6d…x7k2p");
        assert_eq!(["web", "ab", "a", ""].map(|name| fit(name, 2)), ["w…", "ab", "a", ""]);
        assert_eq!((fit("web", 1), fit("web", 0)), ("…".to_owned(), String::new()));
        assert_eq!((cut("a sentence", 6), cut("short", 6)), ("a sen…".to_owned(), "short".to_owned()));
    }

    #[test]
    fn sentences_break_between_words() {
        assert_eq!(wrap("one two three", 7, 2), ["one two", "  three"]);
        assert_eq!(wrap("keys    what they do", 14, 8), ["keys    what", "        they", "        do"]);
        assert_eq!((wrap("", 5, 0), wrap("unbreakable", 5, 0)), (vec![String::new()], vec!["unbreakable".to_owned()]));
    }

    #[test]
    fn bars_are_as_long_as_their_share() {
        assert_eq!(bar(1.0, 4), "████");
        assert_eq!(bar(0.5, 3), "█▌");
        assert_eq!((bar(0.0, 4), bar(0.001, 4)), (String::new(), "▏".to_owned()));
        assert_eq!(bar(7.0, 2), "██");
    }
}
