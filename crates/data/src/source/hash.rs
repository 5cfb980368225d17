//! The identity of a source: the hashes of its files.

use crate::guard::start_thread;
use crate::{Error, Result};
use std::fs::File;
use std::io::{self, Read};
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

/// Identifies the content of a source. It is part of the fingerprint of all outputs made from it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceHash {
    /// The path as the user gave it.
    pub path: String,
    /// BLAKE3 in hex. For one file: of its bytes as stored (compressed files are hashed compressed). For
    /// several files: of their hashes in order, each followed by a line end.
    pub blake3: String,
    /// Total size of all files, in bytes.
    pub bytes: u64,
    /// The files, if there are several; else empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileHash>,
}

/// One file of a source.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FileHash {
    /// Its path.
    pub path: String,
    /// BLAKE3 of its bytes as stored, in hex.
    pub blake3: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// The hash of a file whose rows are not read in order, or not at all.
pub(super) fn hash(path: &Path) -> Result<FileHash> {
    hash_of(path, File::open(path).map_err(|e| Error::io(path, e))?)
}

fn hash_of(path: &Path, bytes: impl Read) -> Result<FileHash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(bytes).map_err(|e| Error::io(path, e))?;
    let blake3 = hasher.finalize().to_hex().to_string();
    Ok(FileHash { path: path.display().to_string(), blake3, bytes: hasher.count() })
}

/// A [`hash`] that a thread computes. The thread stops early if this is dropped.
pub(super) struct Hashing {
    thread: JoinHandle<Result<FileHash>>,
    _wanted: Arc<()>,
}

/// A file that ends once its hash is not wanted any more.
struct WhileWanted(File, Weak<()>);

impl Hashing {
    /// # Errors
    /// If the file cannot be opened or the system refuses a thread.
    pub fn start(path: Arc<Path>) -> io::Result<Hashing> {
        let wanted = Arc::new(());
        let file = WhileWanted(File::open(&path)?, Arc::downgrade(&wanted));
        let thread = start_thread(move || hash_of(&path, file))?;
        Ok(Hashing { thread, _wanted: wanted })
    }

    pub fn finish(self) -> Result<FileHash> {
        self.thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    }
}

impl Read for WhileWanted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.1.strong_count() == 0 { Ok(0) } else { self.0.read(buffer) }
    }
}
