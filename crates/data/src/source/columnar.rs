//! Rows of Parquet and Arrow files, and of folders that `datasets.save_to_disk` wrote.
//!
//! Rows come in batches of bounded size, in the order of the file. [`fields`] turns one into the JSON object that
//! the same row would be in JSON Lines, so that everything after this room is the same for all formats.
//!
//! | first bytes | taken as |
//! |---|---|
//! | `PAR1` | Parquet |
//! | `ARROW1` | an Arrow IPC file: read as the stream that it holds, from front to back |
//! | `ff ff ff ff` | an Arrow IPC stream; the `.arrow` files of `datasets` are streams |

use super::arrow_stream::{Messages, broken, footer, guard};
use super::hash::FileHash;
use super::sniff::{Kind, kind};
use super::source_error;
use crate::{Error, Result};
use arrow_array::RecordBatch;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::metadata::ParquetMetaData;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most rows in a batch.
const BATCH_ROWS: usize = 512;

/// The bytes that a batch is meant to stay under; a single row may be larger.
const BATCH_BYTES: usize = 4 << 20;

/// A Parquet or Arrow file, read once from front to back.
pub struct ColumnarFile {
    path: Arc<Path>,
    kind: Kind,
    size: u64,
    rows: Option<u64>,
    read: Arc<AtomicU64>,
    reader: Reader,
    /// A batch of the file's own making and how many of its rows were handed out.
    pending: Option<(RecordBatch, usize)>,
}

enum Reader {
    Parquet { reader: ParquetRecordBatchReader, done: u64 },
    Arrow(Box<Messages>),
}

impl ColumnarFile {
    /// Opens a file whose format [`kind`] knows.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read; [`Error::Source`] where it is of another format, was cut, or is
    /// broken where its columns are described.
    pub fn open(path: impl AsRef<Path>) -> Result<ColumnarFile> {
        let path: Arc<Path> = Arc::from(path.as_ref());
        let io_error = |e| Error::io(&*path, e);
        let mut file = File::open(&path).map_err(io_error)?;
        let size = file.metadata().map_err(io_error)?.len();
        let mut head = Vec::new();
        file.by_ref().take(8).read_to_end(&mut head).map_err(io_error)?;
        file.rewind().map_err(io_error)?;
        let Some(kind) = kind(&head) else {
            return Err(source_error(
                &path,
                "is neither Parquet nor Arrow",
                "name a .parquet or .arrow file, or JSON Lines",
            ));
        };
        let read = Arc::new(AtomicU64::new(0));
        let (reader, rows) = if kind == Kind::Parquet {
            let builder = guard(|| ParquetRecordBatchReaderBuilder::try_new(file))
                .map_err(|message| broken(&path, kind, &message))?;
            check_columns(builder.metadata(), size).map_err(|message| broken(&path, kind, &message))?;
            let rows = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
            let batch = batch_rows(builder.metadata());
            let reader = guard(|| builder.with_batch_size(batch).build())
                .map_err(|message| broken(&path, kind, &message))?;
            (Reader::Parquet { reader, done: 0 }, Some(rows))
        } else {
            let end = if kind == Kind::ArrowFile {
                footer(&mut file, size).map_err(|b| b.name(&path, kind))?
            } else {
                size
            };
            let mut messages = Messages::new(file, end, read.clone());
            messages.start(kind).map_err(|b| b.name(&path, kind))?;
            (Reader::Arrow(Box::new(messages)), None)
        };
        Ok(ColumnarFile { path, kind, size, rows, read, reader, pending: None })
    }

    /// The file as the user named it.
    pub fn path(&self) -> &Arc<Path> {
        &self.path
    }

    /// The file's length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A counter of the bytes read so far, for progress. For Parquet, whose columns are read side by side, it is
    /// the file's length in the proportion of the rows read.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        self.read.clone()
    }

    /// The next rows, at least one and at most 512 of them, or `None` at the end.
    ///
    /// # Errors
    /// [`Error::Io`] where reading fails; [`Error::Source`] where the file was cut or is broken. Nothing can be
    /// read after that.
    pub fn next_batch(&mut self) -> Result<Option<Arc<RecordBatch>>> {
        loop {
            if let Some((batch, from)) = self.pending.take() {
                // The slices share the batch's memory.
                let rows = (batch.num_rows() - from).min(rows_within(&batch));
                let part = batch.slice(from, rows);
                if from + rows < batch.num_rows() {
                    self.pending = Some((batch, from + rows));
                }
                return Ok(Some(Arc::new(part)));
            }
            let batch = match &mut self.reader {
                Reader::Parquet { reader, done } => {
                    let batch = guard(|| reader.next().transpose())
                        .map_err(|message| broken(&self.path, self.kind, &message))?;
                    *done += batch.as_ref().map_or(0, |b| b.num_rows() as u64);
                    let total = self.rows.unwrap_or(0).max(1);
                    if batch.is_none() && *done != self.rows.unwrap_or(*done) {
                        let message = format!("it has {done} rows and says {total}");
                        return Err(broken(&self.path, self.kind, &message));
                    }
                    let read = self.size as u128 * u128::from((*done).min(total)) / u128::from(total);
                    self.read.store(read as u64, Ordering::Relaxed);
                    batch
                }
                Reader::Arrow(messages) => messages.next().map_err(|b| b.name(&self.path, self.kind))?,
            };
            match batch {
                None => return Ok(None),
                Some(batch) if batch.num_rows() == 0 => {}
                Some(batch) => self.pending = Some((batch, 0)),
            }
        }
    }

    /// Reads what is left and returns the hash of the whole file.
    ///
    /// Arrow files are hashed as they are read. Parquet is read by its columns, so it is hashed here, in a pass
    /// of its own (4 GB/s from the page cache).
    ///
    /// # Errors
    /// [`Error::Io`] where reading fails.
    pub fn finish(self) -> Result<FileHash> {
        let io_error = |e| Error::io(&*self.path, e);
        let (hash, bytes) = match self.reader {
            Reader::Parquet { .. } => {
                let mut hasher = blake3::Hasher::new();
                let file = File::open(&self.path).map_err(io_error)?;
                hasher.update_reader(file).map_err(io_error)?;
                (hasher.finalize(), hasher.count())
            }
            Reader::Arrow(mut messages) => {
                messages.drain().map_err(io_error)?;
                (messages.hasher.finalize(), messages.hasher.count())
            }
        };
        self.read.store(bytes, Ordering::Relaxed);
        let path = self.path.display().to_string();
        Ok(FileHash { path, blake3: hash.to_hex().to_string(), bytes })
    }
}

/// Holds the places of the columns' pages against the file's length: the reader panics where they are negative.
fn check_columns(metadata: &ParquetMetaData, size: u64) -> Result<(), String> {
    for column in metadata.row_groups().iter().flat_map(|group| group.columns()) {
        let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
        let end = start.checked_add(column.compressed_size());
        if start < 0 || column.compressed_size() < 0 || end.is_none_or(|end| end as u64 > size) {
            return Err(format!("the column {:?} lies outside of it", column.column_path().string()));
        }
    }
    Ok(())
}

/// Rows of a batch that stay under [`BATCH_BYTES`], by the largest mean among the file's row groups.
fn batch_rows(metadata: &ParquetMetaData) -> usize {
    let largest = metadata
        .row_groups()
        .iter()
        .filter(|group| group.num_rows() > 0)
        .map(|group| group.total_byte_size().max(0) / group.num_rows())
        .max();
    rows_of(usize::try_from(largest.unwrap_or(0)).unwrap_or(usize::MAX))
}

/// The same for a batch in memory.
fn rows_within(batch: &RecordBatch) -> usize {
    if batch.num_rows() <= 1 {
        return 1;
    }
    let bytes: usize =
        batch.columns().iter().map(|c| c.to_data().get_slice_memory_size().unwrap_or(BATCH_BYTES)).sum();
    rows_of(bytes / batch.num_rows())
}

fn rows_of(row_bytes: usize) -> usize {
    (BATCH_BYTES / row_bytes.max(1)).clamp(1, BATCH_ROWS)
}

/// A row per row of a columnar file.
pub(super) struct Columns {
    pub file: ColumnarFile,
    /// Rows being handed out, the next of them, and the mean size of one in bytes.
    batch: Option<(Arc<RecordBatch>, usize, usize)>,
    /// Bytes of this file that the source's counter has.
    counted: u64,
    bytes_read: Arc<AtomicU64>,
}

impl Columns {
    pub fn new(file: ColumnarFile, bytes_read: Arc<AtomicU64>) -> Columns {
        Columns { file, batch: None, counted: 0, bytes_read }
    }

    pub fn next(&mut self) -> Result<Option<(Arc<RecordBatch>, usize, usize)>> {
        loop {
            if let Some((batch, next, size)) = &mut self.batch
                && *next < batch.num_rows()
            {
                *next += 1;
                return Ok(Some((batch.clone(), *next - 1, *size)));
            }
            let batch = self.file.next_batch()?;
            let read = self.file.bytes_read().load(Ordering::Relaxed);
            self.bytes_read.fetch_add(read.saturating_sub(self.counted), Ordering::Relaxed);
            self.counted = read;
            let Some(batch) = batch else { return Ok(None) };
            let bytes = |column: &Arc<dyn arrow_array::Array>| column.to_data().get_slice_memory_size();
            let bytes: usize = batch.columns().iter().filter_map(|column| bytes(column).ok()).sum();
            let size = bytes / batch.num_rows().max(1);
            self.batch = Some((batch, 0, size));
        }
    }
}
