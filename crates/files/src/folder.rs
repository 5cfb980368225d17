//! Folders: written beside their name and renamed, listed, and cleaned of leftovers.

use crate::{Error, Result, TEMPORARY, parent};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// A folder that appears under its name only when it is complete.
///
/// Files go to [`NewFolder::path`]. [`NewFolder::commit`] syncs them and renames; dropped before that, nothing is left.
#[derive(Debug)]
pub struct NewFolder {
    temporary: PathBuf,
    target: PathBuf,
    done: bool,
}

impl NewFolder {
    /// Starts a folder that will be `target`.
    ///
    /// # Errors
    /// If the temporary folder beside it cannot be created.
    pub fn create(target: &Path) -> Result<NewFolder> {
        // Not `tempfile`: its folders are private to the user, and this one is renamed into place.
        let temporary = beside(target, "new");
        let _ = fs::remove_dir_all(&temporary);
        fs::create_dir(&temporary).map_err(|e| Error::new(target, e))?;
        Ok(NewFolder { temporary, target: target.to_path_buf(), done: false })
    }

    /// The temporary folder to write to.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Syncs every file and renames the folder to its target, which it replaces.
    ///
    /// # Errors
    /// If a sync or a rename fails; then the temporary folder is removed.
    pub fn commit(mut self) -> Result<()> {
        for (name, _) in sizes(&self.temporary)? {
            let path = self.temporary.join(name);
            // Windows syncs only files that are open for writing.
            let file = File::options().write(true).open(&path).map_err(|e| Error::new(&path, e))?;
            file.sync_all().map_err(|e| Error::new(&path, e))?;
        }
        let rename = || {
            sync(&self.temporary)?;
            let old = beside(&self.target, "old");
            if self.target.exists() {
                fs::rename(&self.target, &old)?;
            }
            fs::rename(&self.temporary, &self.target)?;
            sync(parent(&self.target))?;
            if old.exists() { fs::remove_dir_all(&old) } else { Ok(()) }
        };
        rename().map_err(|e| Error::new(&self.target, e))?;
        self.done = true;
        Ok(())
    }
}

impl NewFolder {
    /// Moves every file to the folder `into` instead, each under its own name, synced. What has the name there is replaced.
    ///
    /// # Errors
    /// If a sync or a rename fails; files that were moved before stay moved.
    pub fn move_into(self, into: &Path) -> Result<()> {
        for (name, _) in sizes(&self.temporary)? {
            let (path, target) = (self.temporary.join(&name), into.join(&name));
            let file = File::options().write(true).open(&path).and_then(|file| file.sync_all());
            file.and_then(|()| fs::rename(&path, &target)).map_err(|e| Error::new(&target, e))?;
        }
        sync(into).map_err(|e| Error::new(into, e))
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// A temporary name of this process beside `target`.
pub(crate) fn beside(target: &Path, kind: &str) -> PathBuf {
    let name = target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    target.with_file_name(format!("{TEMPORARY}{name}.{}.{kind}", std::process::id()))
}

/// Removes a folder and everything in it. Its name disappears at once: a process that is killed meanwhile leaves a
/// temporary name, and never a folder that lacks files.
///
/// # Errors
/// If it cannot be renamed or removed.
pub fn remove_folder(folder: &Path) -> Result<()> {
    let old = beside(folder, "old");
    let _ = fs::remove_dir_all(&old);
    fs::rename(folder, &old).and_then(|()| fs::remove_dir_all(&old)).map_err(|e| Error::new(folder, e))
}

/// Makes sure that files can be written to a folder, or, where it does not exist yet, to the nearest folder above it
/// that does. Nothing is left behind.
///
/// # Errors
/// If they cannot, or something on the way is a file.
pub fn can_write(folder: &Path) -> Result<()> {
    let absolute = std::path::absolute(folder).map_err(|e| Error::new(folder, e))?;
    let place = absolute.ancestors().find(|place| place.exists()).unwrap_or(&absolute);
    let probe = match place.is_dir() {
        true => tempfile::tempfile_in(place).map(drop),
        false => Err(io::ErrorKind::NotADirectory.into()),
    };
    probe.map_err(|e| Error::new(folder, e))
}

/// Syncs a folder. Only Unix can open one for that.
fn sync(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// Makes the name `path` durable by syncing its folder, where the file system can.
pub fn sync_folder(path: &Path) {
    let _ = sync(parent(path));
}

/// Names and sizes in bytes of the plain files of a folder, sorted by name.
///
/// # Errors
/// If the folder cannot be listed.
pub fn sizes(folder: &Path) -> Result<Vec<(String, u64)>> {
    let list = || -> io::Result<Vec<(String, u64)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if meta.is_file() {
                files.push((entry.file_name().to_string_lossy().into_owned(), meta.len()));
            }
        }
        files.sort();
        Ok(files)
    };
    list().map_err(|e| Error::new(folder, e))
}

/// Deletes what a killed process left under temporary names in `folder`. Failures are ignored: the names are only
/// clutter.
pub fn remove_leftovers(folder: &Path) {
    remove_named(folder, TEMPORARY);
}

/// Deletes what a killed process left of `target` under temporary names beside it ([`remove_leftovers`]).
pub fn remove_leftovers_of(target: &Path) {
    let name = target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    remove_named(parent(target), &format!("{TEMPORARY}{name}."));
}

fn remove_named(folder: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            let path = entry.path();
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}
