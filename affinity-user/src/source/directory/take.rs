//! Reads a file's text, unless it is being written.
//!
//! Programs truncate a file before they write it, and writing takes time: `kubectl get ... > all.yaml`. So a file is read only
//! if it is not open for writing. The file system reports that ([`is_open_for_writing`]); if it cannot, notifications decide
//! ([`Writing`]).

use std::{
    collections::BTreeSet,
    fs::{self, File, Metadata},
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use notify::{
    Event, EventKind,
    event::{AccessKind, AccessMode, CreateKind, ModifyKind},
};

use crate::sys::is_open_for_writing;

/// The result of reading a file.
pub(super) enum Taken {
    /// Its text, as its last writer left it.
    Text(String),
    /// Not read: it is being written.
    BeingWritten,
}

/// Reads a file's text.
///
/// # Errors
/// If it cannot be read, or is not UTF-8.
pub(super) fn take(file: &Path, writing: &Writing) -> io::Result<Taken> {
    let mut opened = File::open(file)?;
    let before = opened.metadata()?;
    if !before.is_file() {
        return io::read_to_string(opened).map(Taken::Text);
    }
    if is_open_for_writing(opened.as_fd()).unwrap_or_else(|| writing.holds(file)) {
        return Ok(Taken::BeingWritten);
    }
    let text = io::read_to_string(&mut opened);
    // A writer may have started in the meantime, and its incomplete text need not be UTF-8.
    if identity(&before) != identity(&opened.metadata()?) {
        return Ok(Taken::BeingWritten);
    }
    text.map(Taken::Text)
}

/// Whether a file that was being written may be read now.
pub(super) fn is_closed(file: &Path, writing: &Writing) -> bool {
    // A file that cannot be opened has changed too.
    File::open(file).map_or(true, |opened| !is_open_for_writing(opened.as_fd()).unwrap_or_else(|| writing.holds(file)))
}

/// The identity of a file's content: device, inode, size, and when it and its inode changed.
pub(super) fn identity(metadata: &Metadata) -> [i64; 7] {
    let (device, inode) = (metadata.dev().cast_signed(), metadata.ino().cast_signed());
    let size = metadata.size().cast_signed();
    [device, inode, size, metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()]
}

/// The files that are being written according to notifications: changed, and not closed since. Paths are canonical.
#[derive(Debug, Default)]
pub(super) struct Writing(BTreeSet<PathBuf>);

impl Writing {
    /// Processes a notification.
    pub(super) fn note(&mut self, event: &Event) {
        if event.need_rescan() {
            // Notifications were lost, perhaps one for a closed file: no file may wait for it forever.
            self.0.clear();
        }
        for path in &event.paths {
            match event.kind {
                EventKind::Modify(ModifyKind::Data(_)) => _ = self.0.insert(path.clone()),
                // Its first content follows. A link has its content already, or its target is not a file of this directory.
                EventKind::Create(CreateKind::File) if is_empty_file(path) => _ = self.0.insert(path.clone()),
                EventKind::Access(AccessKind::Close(AccessMode::Write))
                | EventKind::Modify(ModifyKind::Name(_))
                | EventKind::Remove(_) => _ = self.0.remove(path),
                EventKind::Any
                | EventKind::Access(_)
                | EventKind::Create(_)
                | EventKind::Modify(_)
                | EventKind::Other => {}
            }
        }
    }

    fn holds(&self, file: &Path) -> bool {
        !self.0.is_empty() && fs::canonicalize(file).is_ok_and(|file| self.0.contains(&file))
    }
}

fn is_empty_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == 0)
}

#[cfg(test)]
mod tests {
    use notify::event::{DataChange, Flag, RenameMode};

    use super::*;

    #[test]
    fn a_file_is_being_written_from_its_first_change_until_it_is_closed() {
        let file = std::env::temp_dir().join(format!("affinity-writing-{}", std::process::id()));
        let content = EventKind::Modify(ModifyKind::Data(DataChange::Any));
        let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
        let moved = EventKind::Modify(ModifyKind::Name(RenameMode::To));
        let event = |kind| Event::new(kind).add_path(fs::canonicalize(&file).expect("it is there"));
        fs::write(&file, "").expect("written");
        for end in [closed, moved] {
            for begin in [EventKind::Create(CreateKind::File), content] {
                let mut writing = Writing::default();
                writing.note(&event(begin));
                assert!(writing.holds(&file), "after {begin:?}");
                writing.note(&event(EventKind::Access(AccessKind::Open(AccessMode::Any))));
                assert!(writing.holds(&file), "after {begin:?}, and while it is read");
                writing.note(&event(end));
                assert!(!writing.holds(&file), "after {begin:?} and {end:?}");
            }
        }
        let mut writing = Writing::default();
        writing.note(&event(content));
        writing.note(&Event::new(EventKind::Other).set_flag(Flag::Rescan));
        assert!(!writing.holds(&file));
        fs::write(&file, "linked with its content").expect("written");
        writing.note(&event(EventKind::Create(CreateKind::File)));
        assert!(!writing.holds(&file));
        fs::remove_file(&file).expect("removed");
    }
}
