//! Files that are whole or not there.

use crate::{Error, Result};
use std::fs::{self, File};

use std::path::{Path, PathBuf};

/// Prefix of everything temporary that this crate makes in an output folder.
pub(crate) const TEMPORARY: &str = ".suasion-tmp-";

/// A name beside `path` that no other process uses. (`tempfile` would make it private to the user; what is renamed
/// into place should have the permissions that the user's umask gives.)
fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!("{TEMPORARY}{}-{name}", std::process::id()))
}

/// Writes a whole file or nothing.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    suasion_data::atomic::write_atomic(path, |file| file.write_all(bytes)).map_err(|error| match error {
        suasion_data::Error::Io { path, source } => Error::Io { path, source },
        other => Error::io(path, std::io::Error::other(other)),
    })
}

/// Makes a rename or a new name in the folder last. Only Unix lets a folder be opened and synced.
pub(crate) fn sync_dir(dir: &Path) -> std::io::Result<()> {
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// A folder that appears under its name when it is complete, and not at all otherwise.
pub(crate) struct NewDir {
    temporary: PathBuf,
    place: PathBuf,
    done: bool,
}

impl NewDir {
    /// Starts a folder that will stand at `place`.
    pub(crate) fn create(place: &Path) -> Result<NewDir> {
        let temporary = beside(place);
        let _ = fs::remove_dir_all(&temporary);
        fs::create_dir(&temporary).map_err(|source| Error::io(&temporary, source))?;
        Ok(NewDir { temporary, place: place.to_path_buf(), done: false })
    }

    /// Where to write meanwhile.
    pub(crate) fn path(&self) -> &Path {
        &self.temporary
    }

    /// The names and sizes of the files so far.
    pub(crate) fn sizes(&self) -> Result<Vec<(String, u64)>> {
        sizes(&self.temporary)
    }

    /// Syncs every file and moves the folder into place; what stood there before goes.
    pub(crate) fn commit(mut self) -> Result<()> {
        for (name, _) in self.sizes()? {
            let path = self.temporary.join(name);
            // Opened for writing because Windows syncs nothing else.
            let file = File::options().write(true).open(&path).map_err(|source| Error::io(&path, source))?;
            file.sync_all().map_err(|source| Error::io(&path, source))?;
        }
        let move_in = || {
            sync_dir(&self.temporary)?;
            let old = self.temporary.with_extension("old");
            if self.place.exists() {
                fs::rename(&self.place, &old)?;
            }
            fs::rename(&self.temporary, &self.place)?;
            sync_dir(self.place.parent().unwrap_or(Path::new(".")))?;
            if old.exists() { fs::remove_dir_all(&old) } else { Ok(()) }
        };
        move_in().map_err(|source| Error::io(&self.place, source))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for NewDir {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// The plain files of a folder with their sizes, by name.
pub(crate) fn sizes(dir: &Path) -> Result<Vec<(String, u64)>> {
    let list = || -> std::io::Result<Vec<(String, u64)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if meta.is_file() {
                files.push((entry.file_name().to_string_lossy().into_owned(), meta.len()));
            }
        }
        files.sort();
        Ok(files)
    };
    list().map_err(|source| Error::io(dir, source))
}

/// Removes what a killed run left half-written.
pub(crate) fn remove_leftovers(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            let path = entry.path();
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}
