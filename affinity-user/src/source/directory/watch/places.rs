//! The places at which a change may change the content of a path: the directory itself, and every name on the way to a file,
//! including links.

use std::{
    collections::{BTreeSet, VecDeque},
    ffi::OsString,
    fs,
    path::{self, Path, PathBuf},
};

/// The maximum number of links on the way to a file, as in the kernel (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

/// Directories and names. All paths are canonical except for their last component.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The directory with the files that count.
    whole: Option<PathBuf>,
    /// Links on the way to a file, files, and the path itself.
    names: BTreeSet<PathBuf>,
}

impl Places {
    /// The places for a path that contains these files.
    pub(super) fn of(path: &Path, files: &[PathBuf]) -> Self {
        let mut names = BTreeSet::new();
        let target = trace(path, &mut names);
        let whole = target.filter(|target| target.is_dir());
        for file in files.iter().filter(|file| file.is_symlink()) {
            trace(file, &mut names);
        }
        Self { whole, names }
    }

    /// The directories to watch.
    pub(super) fn directories(&self) -> BTreeSet<PathBuf> {
        let parents = self.names.iter().filter_map(|name| name.parent()).map(Path::to_owned);
        parents.chain(self.whole.clone()).collect()
    }

    /// Whether a notification about this path may mean a change of the content.
    pub(super) fn concerns(&self, path: &Path) -> bool {
        let is_within = self.whole.is_some() && path.parent() == self.whole.as_deref();
        // A watched directory itself was removed or moved away.
        is_within || self.names.contains(path) || self.names.iter().any(|name| name.parent() == Some(path))
    }
}

/// Follows a path to its end, and adds every link on the way and the end to `names`. Returns the end; `None` if links form a
/// loop, or if there is no working directory.
fn trace(path: &Path, names: &mut BTreeSet<PathBuf>) -> Option<PathBuf> {
    let mut at = PathBuf::from("/");
    let mut rest: VecDeque<OsString> = components(&path::absolute(path).ok()?);
    let mut links = 0;
    while let Some(component) = rest.pop_front() {
        match component.as_encoded_bytes() {
            b"/" => at = PathBuf::from("/"),
            b"." => {}
            b".." => _ = at.pop(),
            _ => {
                at.push(component);
                if let Ok(target) = fs::read_link(&at) {
                    links += 1;
                    if links > MAX_LINKS {
                        return None;
                    }
                    names.insert(at.clone());
                    at.pop();
                    for part in components(&target).into_iter().rev() {
                        rest.push_front(part);
                    }
                }
            }
        }
    }
    names.insert(at.clone());
    Some(at)
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components().map(|component| component.as_os_str().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn every_link_on_the_way_is_watched_where_it_lies() {
        let root = std::env::temp_dir().join(format!("affinity-places-{}", std::process::id()));
        let root = fs::create_dir(&root).and_then(|()| fs::canonicalize(&root)).expect("a new directory");
        for directory in ["watched", "versions/1"] {
            fs::create_dir_all(root.join(directory)).expect("a directory");
        }
        fs::write(root.join("versions/1/x.yaml"), "").expect("written");
        symlink("1", root.join("versions/now")).expect("a link");
        symlink(root.join("versions"), root.join("mount")).expect("a link");
        symlink("../mount/now/x.yaml", root.join("watched/x.yaml")).expect("a link");
        symlink("circle", root.join("circle")).expect("a link");

        let places = Places::of(&root.join("watched"), &[root.join("watched/x.yaml")]);
        let expected = ["", "versions", "versions/1", "watched"].map(|name| root.join(name).components().collect());
        assert_eq!(places.directories(), expected.into());
        let concerns = |name: &str| places.concerns(&root.join(name));
        for name in ["watched", "watched/new.yaml", "watched/x.yaml", "mount", "versions/now", "versions/1/x.yaml"] {
            assert!(concerns(name), "{name}");
        }
        for name in ["elsewhere", "versions/2", "versions/1/y.yaml"] {
            assert!(!concerns(name), "{name}");
        }
        assert!(Places::of(&root.join("circle"), &[]).whole.is_none());
        fs::remove_dir_all(&root).expect("removed");
    }
}
