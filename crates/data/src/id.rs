//! The position of a row in its source.

use std::{fmt, path::Path, sync::Arc};

/// The position of a row in its source. It is part of every error and finding about the row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RowId {
    /// The source file.
    pub file: Arc<Path>,
    /// The 0-based index of the row in the source, over all of its files.
    pub row: u64,
    /// The 1-based line of the file on which the row starts, for formats that have lines.
    pub line: Option<u64>,
    /// The 0-based index of the row in its file.
    pub in_file: u64,
}

impl RowId {
    /// A row of a source that is a single file.
    pub fn new(file: impl Into<Arc<Path>>, row: u64, line: Option<u64>) -> RowId {
        RowId { file: file.into(), row, line, in_file: row }
    }
}

impl fmt::Display for RowId {
    /// `data.jsonl:482` if lines exist (1-based), else `data.json: row 481` (0-based).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}", self.file.display()),
            None => write!(f, "{}: row {}", self.file.display(), self.in_file),
        }
    }
}
