//! The crates that are linked into the binary, and the texts of their licences, which a copy of the binary has to include.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    run::{cargo, output},
    setup::PACKAGE_TARGET,
};

/// How the names of files with licences and copyright notices begin.
const TEXTS: [&str; 6] = ["copying", "copyright", "licence", "license", "notice", "unlicense"];

/// One line for each crate: name, version, licence. Then every text, once, after the names of the crates that have it.
pub(super) fn render() -> Result<String> {
    let directories = directories()?;
    let mut list = String::new();
    let mut crates_by_text = BTreeMap::<String, Vec<String>>::new();
    for (package, licence) in crates()? {
        list += &format!("{package}\t{licence}\n");
        let directory = directories.get(&package).with_context(|| format!("{package}: cargo names no directory"))?;
        let texts = texts(directory).with_context(|| directory.display().to_string())?;
        // The package has the text of this one as LICENSE-APACHE.
        ensure!(!texts.is_empty() || licence.contains("Apache-2.0"), "{package}: no text of its licence, {licence}");
        for text in texts {
            crates_by_text.entry(text).or_default().push(package.clone());
        }
    }
    let mut texts: Vec<_> = crates_by_text.into_iter().map(|(text, crates)| (crates.join(", "), text)).collect();
    texts.sort();
    Ok(texts.into_iter().fold(list, |all, (crates, text)| all + &format!("\n==== {crates}\n\n{text}\n")))
}

/// The crates, as `name vX.Y.Z`, and the expressions of their licences.
fn crates() -> Result<BTreeSet<(String, String)>> {
    let tree = output(
        cargo(["tree", "--package", "affinity-user", "--edges", "normal", "--prefix", "none", "--locked"]).args([
            "--target",
            PACKAGE_TARGET,
            "--format",
            "{p}\t{l}",
        ]),
    )?;
    let mut crates = BTreeSet::new();
    for line in tree.lines() {
        let (package, licence) = line.split_once('\t').with_context(|| line.to_owned())?;
        // Crates of the workspace are listed with their path.
        if !package.contains(" (/") {
            let name: Vec<_> = package.split(' ').take(2).collect();
            crates.insert((name.join(" "), licence.trim_end_matches(" (*)").to_owned()));
        }
    }
    ensure!(!crates.is_empty(), "cargo lists no crate");
    Ok(crates)
}

/// Where cargo has unpacked each crate.
fn directories() -> Result<BTreeMap<String, PathBuf>> {
    let metadata: Value =
        serde_json::from_str(&output(&mut cargo(["metadata", "--format-version", "1", "--locked"]))?)?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let directory = |package: &Value| {
        let manifest = Path::new(package["manifest_path"].as_str()?);
        let name = format!("{} v{}", package["name"].as_str()?, package["version"].as_str()?);
        Some((name, manifest.parent()?.to_owned()))
    };
    Ok(packages.iter().filter_map(directory).collect())
}

/// The texts in a directory.
fn texts(directory: &Path) -> Result<BTreeSet<String>> {
    let mut texts = BTreeSet::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().to_lowercase();
        if entry.path().is_file() && TEXTS.iter().any(|start| name.starts_with(start)) {
            texts.insert(String::from_utf8_lossy(&fs::read(entry.path())?).trim().to_owned());
        }
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::root;

    #[test]
    fn licences_are_found_by_their_names() {
        let texts = texts(&root()).expect("the repository");
        assert_eq!(texts.len(), 2, "LICENSE-APACHE and LICENSE-MIT");
        assert!(texts.iter().any(|text| text.contains("Permission is hereby granted")));
    }
}
