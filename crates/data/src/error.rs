//! The crate's one error type.

use crate::RowId;
use std::path::{Path, PathBuf};

/// What can go wrong between bytes and samples. Every variant names its file, and the row where there is one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// A row cannot become a sample.
    #[error("{id}: {message}")]
    Row {
        /// Which row.
        id: RowId,
        /// What is wrong, with the values.
        message: String,
        /// What to do.
        help: String,
    },
    /// The tokenizer's files are missing, broken or contradict each other.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A source or prepared file whose structure is wrong as a whole (empty, not JSON, unknown format).
    #[error("{}: {message}", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
        /// What to do.
        help: String,
    },
}

impl Error {
    /// An I/O error with its file.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Error {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// What to do about it, where that is known.
    pub fn help(&self) -> Option<&str> {
        match self {
            Error::Row { help, .. } | Error::Source { help, .. } => Some(help),
            _ => None,
        }
    }

    /// The tag printed in `error[..]`.
    pub fn tag(&self) -> &'static str {
        match self {
            Error::Io { .. } => "E-IO",
            Error::Row { .. } => "E-ROW",
            Error::Tokenizer { .. } => "E-TOKENIZER",
            Error::Source { .. } => "E-SOURCE",
        }
    }
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
