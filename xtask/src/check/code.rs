//! Just enough of Rust's grammar to look at code without its comments and literals.

/// The source with every character of a comment, string or character literal replaced by a space. Line numbers do not change.
pub(super) fn code_only(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let opaque = opaque_length(rest, code.chars().next_back());
        if opaque == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            let (skipped, after) = rest.split_at(opaque);
            code.extend(skipped.chars().map(|c| if c == '\n' { c } else { ' ' }));
            rest = after;
        }
    }
    code
}

/// The words (identifiers, keywords, numbers) of a text, each with its offset in bytes.
pub(super) fn words(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.split(|c| !is_word(c))
        .filter(|word| !word.is_empty())
        .map(|word| (word.as_ptr().addr() - text.as_ptr().addr(), word))
}

/// The line, counted from 1, of an offset in bytes.
pub(super) fn line_at(text: &str, offset: usize) -> usize {
    1 + text[..offset].matches('\n').count()
}

/// A function with a body.
pub(super) struct Function<'a> {
    pub(super) name: &'a str,
    /// Where it starts, counted from 1.
    pub(super) line: usize,
    /// From `fn` to the closing brace.
    pub(super) lines: usize,
}

/// Every function with a body in code that [`code_only`] returned.
pub(super) fn functions(code: &str) -> Vec<Function<'_>> {
    let starts = words(code).filter(|(_, word)| *word == "fn");
    let functions = starts.filter_map(|(start, _)| {
        let signature = code[start + "fn".len()..].trim_start();
        let name = signature.split(|c| !is_word(c)).next().filter(|name| !name.is_empty())?;
        let end = body_end(&code[start..])?;
        let lines = 1 + code[start..start + end].matches('\n').count();
        Some(Function { name, line: line_at(code, start), lines })
    });
    functions.collect()
}

/// The offset of the brace that closes the body of the function that starts here, if it has one.
fn body_end(code: &str) -> Option<usize> {
    let mut brackets = 0_usize;
    let mut braces = 0_usize;
    for (offset, c) in code.char_indices() {
        match c {
            '(' | '[' => brackets += 1,
            ')' | ']' => brackets = brackets.checked_sub(1)?,
            '{' => braces += 1,
            '}' if braces == 1 => return Some(offset),
            '}' => braces = braces.checked_sub(1)?,
            ';' if brackets == 0 && braces == 0 => return None,
            _ => {}
        }
    }
    None
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// How many bytes at the start of `rest` belong to one comment or literal.
fn opaque_length(rest: &str, before: Option<char>) -> usize {
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return block_comment_length(rest);
    }
    if rest.starts_with('"') {
        return quoted_length(rest, '"');
    }
    if rest.starts_with('\'') {
        return character_length(rest);
    }
    if before.is_some_and(is_word) { 0 } else { raw_string_length(rest) }
}

fn block_comment_length(rest: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    loop {
        let Some(next) = rest[at..].find(['/', '*']) else { return rest.len() };
        at += next;
        match &rest.as_bytes()[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] if depth == 1 => return at + 2,
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
}

fn quoted_length(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (offset, c) in rest.char_indices().skip(1) {
        if escaped {
            escaped = false;
        } else if c == quote {
            return offset + quote.len_utf8();
        } else {
            escaped = c == '\\';
        }
    }
    rest.len()
}

/// Zero for a lifetime or a label.
fn character_length(rest: &str) -> usize {
    let mut after_quote = rest.chars().skip(1);
    let is_literal = after_quote.next() == Some('\\') || after_quote.next() == Some('\'');
    if is_literal { quoted_length(rest, '\'') } else { 0 }
}

/// The length of `r"…"`, `br#"…"#` and similar literals; zero for anything else.
fn raw_string_length(rest: &str) -> usize {
    let prefix = ["r", "br", "cr"].into_iter().find(|prefix| rest.starts_with(prefix));
    let Some(after_prefix) = prefix.map(|prefix| &rest[prefix.len()..]) else { return 0 };
    let hashes = after_prefix.bytes().take_while(|byte| *byte == b'#').count();
    let Some(content) = after_prefix[hashes..].strip_prefix('"') else { return 0 };
    let end = format!("\"{}", "#".repeat(hashes));
    content.find(&end).map_or(rest.len(), |found| rest.len() - content.len() + found + end.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_become_spaces() {
        for (source, code) in [
            ("a // b\nc", "a     \nc"),
            ("a /* b /* c */ d\n */ e", "a               \n    e"),
            (r#"a("b\"c", d)"#, "a(      , d)"),
            (r##"a(r#"b"c"#, d)"##, "a(        , d)"),
            ("br\"\\\" d", "      d"),
            ("['\\'', '\"', 'x'] 'a: loop", "[    ,    ,    ] 'a: loop"),
            ("r#fn for\"x\"", "r#fn for   "),
        ] {
            assert_eq!(code_only(source), code, "{source}");
        }
    }

    #[test]
    fn functions_are_found_with_their_lengths() {
        let code = "trait T {\n    fn a(&self) -> [u8; 4];\n    fn b(f: fn(u8)) -> [u8; 2] {\n        {}\n    }\n}\nfn c() {}\n";
        let found: Vec<_> = functions(code).iter().map(|f| (f.name, f.line, f.lines)).collect();
        assert_eq!(found, [("b", 3, 3), ("c", 7, 1)]);
    }

    #[test]
    fn words_are_whole() {
        let text = "unsafe_code unsafe{x}";
        let found: Vec<_> = words(text).collect();
        assert_eq!(found, [(0, "unsafe_code"), (12, "unsafe"), (19, "x")]);
        assert_eq!(line_at("a\nb", 2), 2);
    }
}
