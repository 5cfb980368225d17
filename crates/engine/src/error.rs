//! The crate's one error type.

use std::path::{Path, PathBuf};

/// What can go wrong between a model folder and a training step.
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
    /// `config.json` is broken, or describes something that this engine does not compute.
    #[error("{}: {message}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
        /// What to do.
        help: String,
    },
    /// A weight file is broken, or does not fit `config.json`.
    #[error("{}: {message}", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the tensor's name.
        message: String,
        /// What to do.
        help: String,
    },
    /// The system has not as much memory as was asked for.
    #[error("{bytes} bytes of memory are needed, more than there are")]
    Memory {
        /// What is needed at once.
        bytes: u64,
    },
    /// A batch that the model cannot take.
    #[error("{message}")]
    Batch {
        /// What is wrong, with both sizes.
        message: String,
    },
}

impl Error {
    /// The tag printed in `error[..]`.
    pub fn tag(&self) -> &'static str {
        match self {
            Error::Io { .. } => "E-IO",
            Error::Config { .. } => "E-MODEL",
            Error::Weights { .. } => "E-WEIGHTS",
            Error::Memory { .. } => "E-MEMORY",
            Error::Batch { .. } => "E-BATCH",
        }
    }

    /// What to do about it, where that is known.
    pub fn help(&self) -> Option<&str> {
        match self {
            Error::Config { help, .. } | Error::Weights { help, .. } => Some(help),
            Error::Memory { .. } => {
                Some("a smaller model, batch or max_length needs less, and gradient_checkpointing=true, too")
            }
            _ => None,
        }
    }

    pub(crate) fn io(path: impl AsRef<Path>, source: std::io::Error) -> Error {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }
}

impl From<suasion_files::Error> for Error {
    fn from(error: suasion_files::Error) -> Error {
        Error::Io { path: error.path, source: error.source }
    }
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
