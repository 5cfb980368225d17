//! The identity of a source: the hashes of its files.

use crate::{Error, Result};
use std::fs::File;
use std::path::Path;

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

/// The hash of a file whose rows are not read.
pub(super) fn hash(path: &Path) -> Result<FileHash> {
    let io_error = |e| Error::io(path, e);
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).map_err(io_error)?).map_err(io_error)?;
    let blake3 = hasher.finalize().to_hex().to_string();
    Ok(FileHash { path: path.display().to_string(), blake3, bytes: hasher.count() })
}
