//! Parquet and Arrow files, read in batches of bounded size, in the order of the file.
//!
//! | first bytes | format |
//! |---|---|
//! | `PAR1` | Parquet |
//! | `ARROW1` | an Arrow IPC file, read as the stream that it contains |
//! | `ff ff ff ff` | an Arrow IPC stream; the `.arrow` files of `datasets` are streams |
//!
//! The readers of the `parquet` and `arrow` crates validate their input, and the known causes of panics in them are
//! checked before they run. Still 5 of 36 000 files with flipped bits made one panic, so they run under [`guard`].

use super::arrow_json::never_fails;
use super::arrow_stream::{Messages, broken, footer};
use super::hash::FileHash;
use super::sniff::{Kind, kind};
use super::source_error;
use crate::guard::guard;
use crate::{Error, Result};
use arrow_array::RecordBatch;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Maximum number of rows in a batch.
const BATCH_ROWS: usize = 512;

/// Target size of a batch in bytes; a single row may exceed it.
const BATCH_BYTES: usize = 4 << 20;

/// A Parquet or Arrow file, read once from start to end.
pub struct ColumnarFile {
    path: Arc<Path>,
    kind: Kind,
    size: u64,
    read: Arc<AtomicU64>,
    reader: Reader,
    /// The last batch read from the file, and how many of its rows were returned.
    pending: Option<(RecordBatch, usize)>,
}

enum Reader {
    Parquet(Box<Parquet>),
    Arrow(Box<Messages>),
}

/// Selects columns of a Parquet file: from the names of all columns, in order, a flag for each.
pub type Projection = Arc<dyn Fn(&[&str]) -> Vec<bool> + Send + Sync>;

struct Parquet {
    file: File,
    metadata: ArrowReaderMetadata,
    reader: ParquetRecordBatchReader,
    /// Rows read so far.
    done: u64,
}

impl Parquet {
    fn open(file: File, size: u64) -> Result<Parquet, String> {
        let metadata = guard(|| ArrowReaderMetadata::load(&file, ArrowReaderOptions::default()))?;
        check_columns(metadata.metadata(), size)?;
        let reader = Parquet::reader(&file, &metadata, ProjectionMask::all())?;
        Ok(Parquet { file, metadata, reader, done: 0 })
    }

    fn reader(
        file: &File,
        metadata: &ArrowReaderMetadata,
        mask: ProjectionMask,
    ) -> Result<ParquetRecordBatchReader, String> {
        let file = file.try_clone().map_err(|e| e.to_string())?;
        let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata.clone());
        let batch = batch_rows(metadata.metadata());
        guard(|| builder.with_batch_size(batch).with_projection(mask).build())
    }

    /// Restricts the reader to the selected columns, unless rows were read already.
    fn project(&mut self, projection: &Projection) -> Result<(), String> {
        let fields = self.metadata.schema().fields();
        let names: Vec<&str> = fields.iter().map(|field| field.name().as_str()).collect();
        let wanted = projection(&names);
        // Columns with values that have no JSON form are read too, so that their rows fail as they would
        // without a projection.
        let kept = (0..fields.len()).filter(|&i| wanted[i] || !never_fails(&fields[i]));
        if self.done == 0 {
            let mask = ProjectionMask::roots(self.metadata.parquet_schema(), kept);
            self.reader = Parquet::reader(&self.file, &self.metadata, mask)?;
        }
        Ok(())
    }

    fn rows(&self) -> u64 {
        u64::try_from(self.metadata.metadata().file_metadata().num_rows()).unwrap_or(0)
    }

    fn next(&mut self) -> Result<Option<RecordBatch>, String> {
        let batch = guard(|| self.reader.next().transpose())?;
        self.done += batch.as_ref().map_or(0, |b| b.num_rows() as u64);
        let (done, rows) = (self.done, self.rows());
        if batch.is_none() && done != rows {
            return Err(format!("it has {done} rows and says {}", rows.max(1)));
        }
        Ok(batch)
    }
}

impl ColumnarFile {
    /// Opens a file whose format [`kind`] recognises.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Source`] if it has another format, is truncated, or its
    /// schema is malformed.
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
        let reader = if kind == Kind::Parquet {
            let parquet = Parquet::open(file, size).map_err(|message| broken(&path, kind, &message))?;
            Reader::Parquet(Box::new(parquet))
        } else {
            let end = if kind == Kind::ArrowFile {
                footer(&mut file, size).map_err(|b| b.name(&path, kind))?
            } else {
                size
            };
            let mut messages = Messages::new(file, end, read.clone());
            messages.start(kind).map_err(|b| b.name(&path, kind))?;
            Reader::Arrow(Box::new(messages))
        };
        Ok(ColumnarFile { path, kind, size, read, reader, pending: None })
    }

    /// Reads only the selected columns of a Parquet file from which no row was read yet. Columns that can
    /// hold values without a JSON form ([`super::fields`]) are always read. Arrow files are not affected: a
    /// message holds all columns of its batch.
    ///
    /// # Errors
    /// [`Error::Source`] if the file is malformed.
    pub fn project(&mut self, projection: &Projection) -> Result<()> {
        match &mut self.reader {
            Reader::Parquet(parquet) => {
                parquet.project(projection).map_err(|message| broken(&self.path, self.kind, &message))
            }
            Reader::Arrow(_) => Ok(()),
        }
    }

    /// The path, as given.
    pub fn path(&self) -> &Arc<Path> {
        &self.path
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The number of bytes read so far, for progress displays. For Parquet, whose columns are read side by
    /// side: the size of the file times the fraction of rows read.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        self.read.clone()
    }

    /// The next 1 to 512 rows, or `None` at the end.
    ///
    /// # Errors
    /// [`Error::Io`] if reading fails; [`Error::Source`] if the file is truncated or malformed. Nothing can
    /// be read after an error.
    pub fn next_batch(&mut self) -> Result<Option<Arc<RecordBatch>>> {
        loop {
            if let Some((batch, from)) = self.pending.take() {
                // Slices share the memory of the batch.
                let rows = (batch.num_rows() - from).min(rows_within(&batch));
                let part = batch.slice(from, rows);
                if from + rows < batch.num_rows() {
                    self.pending = Some((batch, from + rows));
                }
                return Ok(Some(Arc::new(part)));
            }
            let batch = match &mut self.reader {
                Reader::Parquet(parquet) => {
                    let batch = parquet.next().map_err(|message| broken(&self.path, self.kind, &message))?;
                    let total = parquet.rows().max(1);
                    let read =
                        u128::from(self.size) * u128::from(parquet.done.min(total)) / u128::from(total);
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

    /// Reads the remaining bytes and returns the hash of the whole file.
    ///
    /// Arrow files are hashed while they are read. Parquet files are not read in order, so they are hashed
    /// here in a separate pass (4 GB/s from the page cache).
    ///
    /// # Errors
    /// [`Error::Io`] if reading fails.
    pub fn finish(self) -> Result<FileHash> {
        let io_error = |e| Error::io(&*self.path, e);
        let (hash, bytes) = match self.reader {
            Reader::Parquet(_) => {
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

/// Checks the offsets of the column chunks against the size of the file: the reader panics on negative ones.
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

/// A column that was compressed by more than this may hold a huge value that many rows share.
const SHRUNK: i64 = 500;

/// Rows per batch that stay below [`BATCH_BYTES`], by the largest mean row size of a row group.
fn batch_rows(metadata: &ParquetMetaData) -> usize {
    let groups = metadata.row_groups().iter().filter(|group| group.num_rows() > 0);
    let mean = |group: &RowGroupMetaData| group.total_byte_size().max(0) / group.num_rows();
    let shared = |group: &RowGroupMetaData| {
        let shrunk = group.columns().iter().filter(|column| {
            column.uncompressed_size() / SHRUNK > column.compressed_size()
                && column.uncompressed_size() > 1 << 24
        });
        shrunk.map(|column| column.uncompressed_size()).max().unwrap_or(0)
    };
    let largest = groups.map(|group| mean(group).max(shared(group))).max();
    rows_of(usize::try_from(largest.unwrap_or(0)).unwrap_or(usize::MAX))
}

/// As [`batch_rows`], for a batch in memory.
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

/// The rows of a columnar file, one by one.
pub(super) struct Columns {
    pub file: ColumnarFile,
    /// The current batch, the index of its next row, and the mean size of a row in bytes.
    batch: Option<(Arc<RecordBatch>, usize, usize)>,
    /// Bytes of this file that are counted in `bytes_read` already.
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
