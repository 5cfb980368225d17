//! The error type of the crate.

use std::path::{Path, PathBuf};

/// An error between opening a model folder and taking a training step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The underlying I/O error.
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
    /// An architecture whose sizes contradict each other.
    #[error("{message}")]
    Architecture {
        /// What is wrong, with the sizes.
        message: String,
    },
    /// A parameter that the model does not have, or a choice of trained parameters that does not fit the model.
    #[error("{message}")]
    Parameter {
        /// What is wrong, with the parameter's name.
        message: String,
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
    /// The system does not have enough memory.
    #[error("{bytes} bytes of memory are needed, more than there are")]
    Memory {
        /// The size of the request.
        bytes: u64,
    },
    /// A batch that does not fit the model.
    #[error("{message}")]
    Batch {
        /// What is wrong, with both sizes.
        message: String,
    },
    /// Operands that an operation of a backend does not accept: a bug of the caller, rejected before memory is touched.
    #[error("{operation}: {message}")]
    Operands {
        /// The operation.
        operation: &'static str,
        /// What is wrong, with the sizes.
        message: String,
    },
    /// A card is missing, or an operation on it failed.
    #[error("{message}")]
    Device {
        /// What is wrong.
        message: String,
        /// What to do.
        help: String,
    },
    /// A card does not have enough memory.
    #[error(
        "{bytes} bytes of the memory of {device} are needed, and {free} of its {total} are free{}",
        if bytes <= total { ": other processes use the rest" } else { "" }
    )]
    DeviceMemory {
        /// The size of the request.
        bytes: u64,
        /// Bytes that are free.
        free: u64,
        /// Bytes of the card.
        total: u64,
        /// The card's name.
        device: String,
    },
    /// A sum over the ranks of a run failed.
    #[error("{message}")]
    Collective {
        /// What is wrong, with the rank.
        message: String,
    },
}

impl Error {
    /// The tag printed in `error[..]`.
    pub fn tag(&self) -> &'static str {
        match self {
            Error::Io { .. } => "E-IO",
            Error::Config { .. } | Error::Architecture { .. } | Error::Parameter { .. } => "E-MODEL",
            Error::Weights { .. } => "E-WEIGHTS",
            Error::Memory { .. } | Error::DeviceMemory { .. } => "E-MEMORY",
            Error::Device { .. } => "E-DEVICE",
            Error::Batch { .. } => "E-BATCH",
            Error::Operands { .. } => "E-INTERNAL",
            Error::Collective { .. } => "E-RANK",
        }
    }

    /// What to do about it, if known.
    pub fn help(&self) -> Option<&str> {
        match self {
            Error::Config { help, .. } | Error::Weights { help, .. } => Some(help),
            Error::Device { help, .. } => Some(help).filter(|help| !help.is_empty()).map(String::as_str),
            Error::DeviceMemory { bytes, total, .. } if bytes <= total => Some(
                "`nvidia-smi` lists the processes that use the card; end them, or take another card (device=cuda:1)",
            ),
            Error::DeviceMemory { .. } => Some(
                "a smaller batch or max_length needs less, and so do gradient_checkpointing=true and use_peft=true; \
                 device=cpu uses the machine's memory",
            ),
            Error::Memory { .. } => Some(
                "a smaller model, batch or max_length needs less, and so does gradient_checkpointing=true",
            ),
            Error::Batch { .. } => Some("use fewer rows per batch, or shorter ones (max_length)"),
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

/// Result with the crate's error type.
pub type Result<T, E = Error> = std::result::Result<T, E>;
