//! Rows as they are stored, before parsing.

use super::record::Header;
use crate::{Result, RowId};
use arrow_array::RecordBatch;
use std::sync::Arc;

/// The longest accepted row, in bytes. Byte offsets within a row are `u32`.
pub const MAX_ROW_BYTES: usize = 1 << 30;

/// The longest accepted text of a row, in bytes. Tokens, their byte ranges and origins take some 30 bytes per byte
/// of text.
pub const MAX_TEXT_BYTES: usize = 16 << 20;

/// A row as it is stored in the source, not yet parsed.
#[derive(Clone, Debug)]
pub struct RawRow {
    /// Its position in the source.
    pub id: RowId,
    /// Its content, or why the row could not be separated from the rows around it.
    pub content: Result<Content, String>,
    /// Approximate size in memory, in bytes.
    pub size: usize,
}

/// The content of an unparsed row.
#[derive(Clone, Debug)]
pub enum Content {
    /// JSON text, without the line end.
    Json(Vec<u8>),
    /// A record of a delimited file, with the header of the file.
    Record(Arc<Header>, Vec<u8>),
    /// A record batch and the index of the row in it.
    Columns(Arc<RecordBatch>, usize),
}

/// The message for a row longer than [`MAX_ROW_BYTES`].
pub(super) fn too_long(bytes: usize) -> String {
    format!("the row has {bytes} bytes; the limit is {MAX_ROW_BYTES}")
}
