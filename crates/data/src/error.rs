//! The error type of the crate.

use crate::RowId;
use std::path::{Path, PathBuf};

/// Under `on_bad_row = error`, the search for further bad rows stops after this many.
pub const BAD_ROWS_LISTED: usize = 20;

/// Errors between bytes and samples. Every variant has its file, and its row if there is one.
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
    /// A row cannot become a sample.
    #[error("{id}: {message}")]
    Row {
        /// The row's id.
        id: RowId,
        /// What is wrong, with the values concerned.
        message: String,
        /// What to do.
        help: String,
    },
    /// A tokenizer's files are missing, malformed or contradictory.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A source or an output is wrong as a whole (empty, not JSON, an unknown format).
    #[error("{}: {message}", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
        /// What to do.
        help: String,
    },
    /// Rows of a source failed and `on_bad_row` is `error`.
    #[error("{first}{}", also(first, others, *stopped))]
    BadRows {
        /// The first one in source order.
        first: Box<Error>,
        /// The others, in source order.
        others: Vec<Error>,
        /// True if there may be more: the search stops at [`BAD_ROWS_LISTED`].
        stopped: bool,
        /// What to do about them.
        help: String,
    },
    /// The operation was cancelled.
    #[error("{}: interrupted: {message}", path.display())]
    Interrupted {
        /// What was being written.
        path: PathBuf,
        /// What was kept of it, and how to continue.
        message: String,
    },
}

/// The other bad rows, one line per reason.
fn also(first: &Error, others: &[Error], stopped: bool) -> String {
    let mut reasons: Vec<(Vec<String>, &str)> = Vec::new();
    for error in others {
        let Error::Row { id, message, .. } = error else { continue };
        let reason = match first {
            Error::Row { message: same, .. } if message == same => "the same",
            _ => message.as_str(),
        };
        match reasons.iter_mut().find(|(_, known)| *known == reason) {
            Some((places, _)) => places.push(id.to_string()),
            None => reasons.push((vec![id.to_string()], reason)),
        }
    }
    let line = |(places, reason): &(Vec<String>, &str)| format!("\n  also {}: {reason}", places.join(", "));
    let mut text: String = reasons.iter().map(line).collect();
    if stopped {
        text.push_str("\n  and perhaps more: stopped looking here");
    }
    text
}

impl Error {
    /// A row that cannot become a sample.
    pub fn row(id: RowId, message: impl Into<String>, help: impl Into<String>) -> Error {
        Error::Row { id, message: message.into(), help: help.into() }
    }

    /// Bad rows that end the work on a batch, in their order; at least one.
    pub fn of_bad_rows(mut rows: Vec<Error>) -> Error {
        let stopped = rows.len() > BAD_ROWS_LISTED;
        rows.truncate(BAD_ROWS_LISTED);
        let first = rows.remove(0);
        Error::bad_rows(first, rows, stopped)
    }

    /// Bad rows that end a run; `stopped` if there may be more.
    pub(crate) fn bad_rows(first: Error, others: Vec<Error>, stopped: bool) -> Error {
        let skip = "leave bad rows out with on_bad_row=skip";
        let help = match first.help() {
            Some(help) if help.contains('\n') => format!("{help}\nor {skip}"),
            Some(help) => format!("{help}; or {skip}"),
            None => skip.to_string(),
        };
        Error::BadRows { first: Box::new(first), others, stopped, help }
    }

    /// An I/O error with its file.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Error {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// A copy; an error that does not concern a row becomes one with the same texts.
    pub(crate) fn restate(&self) -> Error {
        match self {
            Error::Row { id, message, help } => Error::row(id.clone(), message.clone(), help.clone()),
            other => Error::Source {
                path: PathBuf::new(),
                message: other.to_string(),
                help: other.help().unwrap_or_default().to_string(),
            },
        }
    }

    /// What to do about it, if known.
    pub fn help(&self) -> Option<&str> {
        match self {
            Error::Row { help, .. } | Error::Source { help, .. } => Some(help),
            Error::BadRows { help, .. } => Some(help),
            Error::Tokenizer { .. } => Some(
                "the model folder's tokenizer.json and tokenizer_config.json must be complete and belong together",
            ),
            _ => None,
        }
    }

    /// The tag printed in `error[..]`.
    pub fn tag(&self) -> &'static str {
        match self {
            Error::Io { .. } => "E-IO",
            Error::Row { .. } | Error::BadRows { .. } => "E-ROW",
            Error::Tokenizer { .. } => "E-TOKENIZER",
            Error::Source { .. } => "E-SOURCE",
            Error::Interrupted { .. } => "E-INTERRUPTED",
        }
    }
}

impl From<suasion_files::Error> for Error {
    fn from(error: suasion_files::Error) -> Error {
        Error::Io { path: error.path, source: error.source }
    }
}

/// The crate's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

pub(crate) fn source_error(path: &Path, message: &str, help: &str) -> Error {
    Error::Source { path: path.to_path_buf(), message: message.into(), help: help.into() }
}

pub(crate) fn names_error(path: &Path, message: &str) -> Error {
    source_error(path, &format!("the header line: {message}"), "the first line names the columns, in UTF-8")
}

pub(crate) fn empty(path: &Path) -> Error {
    source_error(path, "the file has no rows", "a source needs at least one row; was the export interrupted?")
}
