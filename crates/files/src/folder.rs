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
    /// Where the temporary folder beside it cannot be created.
    pub fn create(target: &Path) -> Result<NewFolder> {
        // Not `tempfile`: its folders are private to the user, and this one is renamed into place.
        let name = target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let temporary = target.with_file_name(format!("{TEMPORARY}{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&temporary);
        fs::create_dir(&temporary).map_err(|e| Error::new(&temporary, e))?;
        Ok(NewFolder { temporary, target: target.to_path_buf(), done: false })
    }

    /// The temporary folder to write to.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Syncs every file and renames the folder to its target, which it replaces.
    ///
    /// # Errors
    /// Where a sync or a rename fails; then the temporary folder is removed.
    pub fn commit(mut self) -> Result<()> {
        for (name, _) in sizes(&self.temporary)? {
            let path = self.temporary.join(name);
            // Windows syncs only files that are open for writing.
            let file = File::options().write(true).open(&path).map_err(|e| Error::new(&path, e))?;
            file.sync_all().map_err(|e| Error::new(&path, e))?;
        }
        let rename = || {
            sync(&self.temporary)?;
            let old = self.temporary.with_extension("old");
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

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
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
/// Where the folder cannot be listed.
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
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            let path = entry.path();
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}
