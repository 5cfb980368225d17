//! A lock on a folder that dies with its process.

use crate::{Error, Result};
use std::fs::{File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

/// Name of the lock file of a folder.
pub const LOCK: &str = ".suasion-lock";

/// The lock of an output: one process at a time holds it.
///
/// It is a lock of the operating system on a file, so it ends with its process, however that ends. The file holds the
/// number of the process and is removed with the lock.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    // Closing the file ends the lock.
    _file: File,
}

/// Why an output cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has the lock.
    #[error("{}: in use by {}", output.display(), process.map_or("another process".into(), |id| format!("process {id}")))]
    Held {
        /// The output.
        output: PathBuf,
        /// The process, where it could be read.
        process: Option<u32>,
    },
    /// The file of the lock cannot be created or locked.
    #[error(transparent)]
    File(#[from] Error),
}

impl Lock {
    /// Locks an existing folder.
    ///
    /// # Errors
    /// [`LockError::Held`] where another process has the lock.
    pub fn folder(folder: &Path) -> Result<Lock, LockError> {
        Lock::take(folder.join(LOCK), folder)
    }

    /// Locks the name `output`, which need not exist, in its folder, which must.
    ///
    /// # Errors
    /// As [`Lock::folder`].
    pub fn name(output: &Path) -> Result<Lock, LockError> {
        let name = output.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        // Without the output's extension: it is not a file of rows.
        Lock::take(output.with_file_name(format!("{LOCK}-{name}.lock")), output)
    }

    fn take(path: PathBuf, output: &Path) -> Result<Lock, LockError> {
        let failed = |source| Error { path: output.to_path_buf(), source };
        loop {
            let mut file = File::options()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)
                .map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut text = String::new();
                    let _ = file.read_to_string(&mut text);
                    return Err(LockError::Held {
                        output: output.to_path_buf(),
                        process: text.trim().parse().ok(),
                    });
                }
                // Some network file systems have no locks; there is none to wait for either.
                Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
                Err(TryLockError::Error(error)) => return Err(failed(error).into()),
            }
            // The process that had the lock may have removed its file between our opening and our locking it.
            if !is_at(&file, &path) {
                continue;
            }
            let written = file.set_len(0).and_then(|()| file.rewind());
            written.and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
            return Ok(Lock { path, _file: file });
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the lock ends: afterwards the file may be another process's.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// True if `file` is what `path` names.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
    file.metadata().map(place).ok().is_some_and(|held| path.metadata().map(place).ok() == Some(held))
}

/// Elsewhere a file that is open cannot be removed.
#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_once_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::folder(dir.path()).unwrap();
        let Err(LockError::Held { process, .. }) = Lock::folder(dir.path()) else { panic!("held twice") };
        assert_eq!(process, Some(std::process::id()));
        // A name in the folder is another lock.
        let name = Lock::name(&dir.path().join("x.jsonl")).unwrap();
        assert!(Lock::name(&dir.path().join("x.jsonl")).is_err());
        drop((lock, name));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        // A file that a killed process left is not a lock.
        std::fs::write(dir.path().join(LOCK), "1\n").unwrap();
        Lock::folder(dir.path()).unwrap();
    }
}
