//! ARCHITECTURE.md names the test that shows each behaviour. This checks that these tests exist.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, Result, bail};

use super::code::{code_only, functions};
use crate::run::{command, output, root};

/// The document.
const DOCUMENT: &str = "ARCHITECTURE.md";
/// The section with tables that name tests, to the end of the document.
const SECTION: &str = "## What holds, and what shows it";

/// Fails if a name in the last column of a table is neither a function, nor a file or directory that could contain one.
pub(super) fn check() -> Result<()> {
    let text = fs::read_to_string(root().join(DOCUMENT)).context(DOCUMENT)?;
    let section = text.split_once(SECTION).with_context(|| format!("{DOCUMENT} has no section {SECTION:?}"))?.1;
    let named: Vec<&str> = section.lines().flat_map(names).collect();
    let known = known()?;
    let is_known = |name: &str| match name.strip_suffix('*') {
        Some(start) => known.iter().any(|known| known.starts_with(start)),
        None => known.contains(name),
    };
    let unknown: Vec<&str> = named.iter().copied().filter(|name| !is_known(name)).collect();
    if named.is_empty() || !unknown.is_empty() {
        bail!("{DOCUMENT} names {} tests; there are none called: {}", named.len(), unknown.join(", "));
    }
    println!("{} names of tests in {DOCUMENT} stand for something", named.len());
    Ok(())
}

/// The names in the last cell of a table's row; for a path, its last part.
fn names(line: &str) -> impl Iterator<Item = &str> {
    let row = line.strip_suffix(" |").filter(|row| row.starts_with("| "));
    let cell = row.and_then(|row| row.rsplit_once(" | ")).map_or("", |(_, cell)| cell);
    let quoted = cell.split('`').skip(1).step_by(2);
    quoted.filter(|name| !name.starts_with('-')).map(|name| name.rsplit(['/', ':']).next().unwrap_or(name))
}

/// The names of all functions, and of all files and directories of Rust code.
fn known() -> Result<BTreeSet<String>> {
    let files =
        output(command("git").args(["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others"]).args([
            "--exclude-standard",
            "--",
            "*.rs",
        ]))?;
    let mut known = BTreeSet::new();
    for name in files.split_terminator('\0') {
        known.extend(Path::new(name).with_extension("").iter().map(|part| part.to_string_lossy().into_owned()));
        // A file may have been removed without a commit.
        let Ok(text) = fs::read_to_string(root().join(name)) else { continue };
        known.extend(functions(&code_only(&text)).into_iter().map(|function| function.name.to_owned()));
    }
    Ok(known)
}

#[cfg(test)]
mod tests {
    use super::names;

    #[test]
    fn names_are_those_of_the_last_cell() {
        let row = "| `a` is | b | `lab`: `one`, `two_*`; `tests/fuzz`, `top::tests`, with `--ignored` |";
        assert_eq!(names(row).collect::<Vec<_>>(), ["lab", "one", "two_*", "fuzz", "tests"]);
        assert_eq!(names("`lab` is no table").count(), 0);
    }
}
