//! A row as it stands in its source.

use super::record::Header;
use crate::{Result, RowId};
use arrow_array::RecordBatch;
use std::sync::Arc;

/// The longest row that is read, in bytes. Byte offsets inside a row are `u32`.
pub const MAX_ROW_BYTES: usize = 1 << 30;

/// A row as it stands in the source, not yet parsed.
#[derive(Clone, Debug)]
pub struct RawRow {
    /// Where it stands.
    pub id: RowId,
    /// What stands there; or why it could not be cut out.
    pub content: Result<Content, String>,
    /// About how much memory it holds, in bytes.
    pub size: usize,
}

/// What a row is before it is parsed.
#[derive(Clone, Debug)]
pub enum Content {
    /// A JSON value, without the line end.
    Json(Vec<u8>),
    /// A record of a delimited file, and the names of its cells.
    Record(Arc<Header>, Vec<u8>),
    /// A row of a batch of columns, by its index in it.
    Columns(Arc<RecordBatch>, usize),
}

/// The reason why a row is not read.
pub(super) fn too_long(bytes: usize) -> String {
    format!("the row has {bytes} bytes; the limit is {MAX_ROW_BYTES}")
}
