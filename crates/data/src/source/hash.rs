//! What a source was: the hash of its files.

use crate::{Error, Result};
use std::fs::File;
use std::path::Path;

/// What a whole source was: part of the fingerprint of everything made from it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceHash {
    /// The source as the user named it.
    pub path: String,
    /// For one file, blake3 of its bytes (as stored: compressed files are hashed compressed), in hex. For several,
    /// blake3 of their hashes, each with a line end, in order.
    pub blake3: String,
    /// The length of all files together, in bytes.
    pub bytes: u64,
    /// The files, where there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileHash>,
}

/// One file of a source.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FileHash {
    /// The file.
    pub path: String,
    /// blake3 of its bytes as stored, in hex.
    pub blake3: String,
    /// Its length in bytes.
    pub bytes: u64,
}

/// The hash of a file that is not read otherwise.
pub(super) fn hash(path: &Path) -> Result<FileHash> {
    let io_error = |e| Error::io(path, e);
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).map_err(io_error)?).map_err(io_error)?;
    let blake3 = hasher.finalize().to_hex().to_string();
    Ok(FileHash { path: path.display().to_string(), blake3, bytes: hasher.count() })
}
