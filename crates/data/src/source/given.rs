//! Rows that a program passes.

use super::digest::Digest;
use super::hash::FileHash;
use super::raw::Content;
use crate::Result;
use arrow_array::{Array as _, RecordBatch};
use std::path::Path;
use std::sync::Arc;

/// Some rows from a program.
#[derive(Clone, Debug)]
pub enum Part {
    /// A record batch with any columns that files of rows may have.
    Columns(RecordBatch),
    /// A JSON object for each row.
    Json(Vec<Vec<u8>>),
}

/// The parts, read row by row.
pub(super) struct Given {
    parts: Box<dyn Iterator<Item = Result<Part>> + Send>,
    digest: Digest,
    open: Open,
}

/// The rest of the current part.
enum Open {
    Nothing,
    /// A batch, the index of its next row, and the mean size of a row.
    Columns(Arc<RecordBatch>, usize, usize),
    Json(std::vec::IntoIter<Vec<u8>>),
}

impl Given {
    pub fn new(parts: Box<dyn Iterator<Item = Result<Part>> + Send>) -> Given {
        Given { parts, digest: Digest::default(), open: Open::Nothing }
    }

    /// The next row and its size in bytes.
    pub fn next(&mut self) -> Result<Option<(Content, usize)>> {
        loop {
            match &mut self.open {
                Open::Columns(batch, row, size) if *row < batch.num_rows() => {
                    *row += 1;
                    return Ok(Some((Content::Columns(batch.clone(), *row - 1), *size)));
                }
                Open::Json(rows) => {
                    if let Some(row) = rows.next() {
                        let size = row.len();
                        return Ok(Some((Content::Json(row), size)));
                    }
                }
                _ => {}
            }
            match self.parts.next().transpose()? {
                None => return Ok(None),
                Some(Part::Columns(batch)) => {
                    let bytes =
                        |column: &Arc<dyn arrow_array::Array>| column.to_data().get_slice_memory_size();
                    let bytes: usize = batch.columns().iter().filter_map(|column| bytes(column).ok()).sum();
                    self.digest.columns(&batch);
                    let size = bytes / batch.num_rows().max(1);
                    self.open = Open::Columns(Arc::new(batch), 0, size);
                }
                Some(Part::Json(rows)) => {
                    rows.iter().for_each(|row| self.digest.json(row));
                    self.open = Open::Json(rows.into_iter());
                }
            }
        }
    }

    pub fn finish(self, name: &Path) -> FileHash {
        let (blake3, bytes) = self.digest.finish();
        FileHash { path: name.display().to_string(), blake3: blake3.to_hex().to_string(), bytes }
    }
}
