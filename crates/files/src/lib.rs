//! Files and folders that appear under their names whole or not at all.
//!
//! Everything is written to a temporary name beside its target, synced, and renamed: [`AtomicFile`] for a stream of
//! bytes, [`write_at`] for a library that wants a path, [`NewFolder`] for a folder. A process that is killed leaves at
//! most temporary names, which start with [`TEMPORARY`] and which [`remove_leftovers`] deletes. [`Lock`] keeps a second
//! process away.
#![forbid(unsafe_code)]

mod atomic;
mod folder;
mod lock;

pub use atomic::{AtomicFile, Complete, Written, write_at, write_atomic, write_bytes};
pub use folder::{
    NewFolder, can_write, remove_folder, remove_leftovers, remove_leftovers_of, sizes, sync_folder,
};
pub use lock::{LOCK, Lock, LockError};

use std::io;
use std::path::{Component, Path, PathBuf};

/// Prefix of every temporary name that this crate makes.
pub const TEMPORARY: &str = ".suasion-tmp-";

/// An I/O error with the path that it concerns.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct Error {
    /// The file or folder, under its final name.
    pub path: PathBuf,
    /// The underlying I/O error.
    pub source: io::Error,
}

impl Error {
    fn new(path: &Path, source: io::Error) -> Error {
        // An error of tempfile ends with the temporary name, which is of no use to the user.
        let text = source.to_string();
        let source = match text.split_once(" at path \"") {
            Some((plain, _)) => io::Error::new(source.kind(), plain.to_string()),
            None => source,
        };
        Error { path: path.to_path_buf(), source }
    }
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// True for the name of a file in a folder: no path to another one, such as `../x`, `/x` or `a/b`.
pub fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let plain = matches!(parts.next(), Some(Component::Normal(part)) if part == name);
    // On other systems than the one that wrote it, these separate.
    plain && parts.next().is_none() && !name.contains(['\\', ':'])
}

/// The folder that holds `path`: `.` where the path is a plain name.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
