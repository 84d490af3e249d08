//! ARCHITECTURE.md names the test that shows each behaviour. This checks that these tests exist, by a search in the source: a
//! list from the test binaries would have to build all of them first.

use anyhow::{Context as _, Result, ensure};

use super::files::File;

/// The document.
const DOCUMENT: &str = "ARCHITECTURE.md";
/// The section with tables that name tests, to the end of the document.
const SECTION: &str = "## What holds, and what shows it";

/// Fails if a name in the last column of a table is neither a function, nor a file or directory that could contain one.
pub(super) fn check(files: &[File]) -> Result<()> {
    let texts = files.iter().filter_map(|file| Some((file.path.as_str(), str::from_utf8(&file.content).ok()?)));
    let document = texts.clone().find(|(path, _)| *path == DOCUMENT).context(DOCUMENT)?.1;
    let section = document.split_once(SECTION).with_context(|| format!("{DOCUMENT} has no section {SECTION:?}"))?.1;
    let sources: Vec<_> = texts.filter(|(path, _)| path.ends_with(".rs")).collect();
    let named: Vec<&str> = section.lines().flat_map(names).collect();
    let unknown: Vec<&str> = named.iter().copied().filter(|name| !is_known(name, &sources)).collect();
    ensure!(
        !named.is_empty() && unknown.is_empty(),
        "{DOCUMENT} names {} tests; there are none called: {}",
        named.len(),
        unknown.join(", ")
    );
    println!("{} names in {DOCUMENT} match tests", named.len());
    Ok(())
}

/// The names in the last cell of a table's row; for a path, its last part.
fn names(line: &str) -> impl Iterator<Item = &str> {
    let row = line.strip_suffix(" |").filter(|row| row.starts_with("| "));
    let cell = row.and_then(|row| row.rsplit_once(" | ")).map_or("", |(_, cell)| cell);
    let quoted = cell.split('`').skip(1).step_by(2);
    quoted.filter(|name| !name.starts_with('-')).map(|name| name.rsplit(['/', ':']).next().unwrap_or(name))
}

/// Whether there is a function, file or directory with this name; `*` stands for the rest of a function's name.
fn is_known(name: &str, sources: &[(&str, &str)]) -> bool {
    let function = name.strip_suffix('*').map_or_else(|| format!("fn {name}("), |start| format!("fn {start}"));
    sources.iter().any(|(path, text)| path.split(['/', '.']).any(|part| part == name) || text.contains(&function))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_last_cell() {
        let row = "| `a` is | b | `lab`: `one`, `two_*`; `tests/fuzz`, `top::tests`, with `--ignored` |";
        assert_eq!(names(row).collect::<Vec<_>>(), ["lab", "one", "two_*", "fuzz", "tests"]);
        assert_eq!(names("`lab` is no table").count(), 0);
    }

    #[test]
    fn a_name_is_that_of_a_function_a_file_or_a_directory() {
        let sources = [("tests/tests/lab.rs", "fn one() {}\nfn two_ways() {}"), ("tests/fuzz/src/lib.rs", "")];
        for name in ["tests", "lab", "fuzz", "one", "two_*", "two_ways"] {
            assert!(is_known(name, &sources), "{name}");
        }
        for name in ["la", "on", "two", "three_*", "ways", "tests.rs"] {
            assert!(!is_known(name, &sources), "{name}");
        }
    }
}
