//! Parquet and Arrow files, read in batches of bounded size, in the order of the file.
//!
//! | first bytes | format |
//! |---|---|
//! | `PAR1` | Parquet |
//! | `ARROW1` | an Arrow IPC file, read as the stream that it contains |
//! | `ff ff ff ff` | an Arrow IPC stream; the `.arrow` files of `datasets` are streams |
//!
//! The readers of the `parquet` and `arrow` crates validate their input, and the known causes of panics in them
//! are checked before they run. Still, 5 of 36,000 files with flipped bits caused a panic, so the readers run
//! under [`guard`](crate::guard::guard).

use super::arrow_stream::{Messages, broken, footer};
use super::hash::{FileHash, Hashing, hash};
use super::parquet::{BATCH_BYTES, Parquet, Projection, rows_of};
use super::sniff::{Kind, kind};
use super::source_error;
use crate::{Error, Result};
use arrow_array::RecordBatch;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A Parquet or Arrow file, read once from start to end.
pub struct ColumnarFile {
    path: Arc<Path>,
    kind: Kind,
    size: u64,
    read: Arc<AtomicU64>,
    reader: Reader,
    /// The last batch read from the file, and how many of its rows were returned.
    pending: Option<(RecordBatch, usize)>,
    /// The hash of a Parquet file, from its first batch on.
    hashing: Option<Hashing>,
}

enum Reader {
    Parquet(Box<Parquet>),
    Arrow(Box<Messages>),
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
            let parquet =
                Parquet::open(&path, &file, size).map_err(|message| broken(&path, kind, &message))?;
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
        Ok(ColumnarFile { path, kind, size, read, reader, pending: None, hashing: None })
    }

    /// Reads only the selected columns of a Parquet file from which no row was read yet. Columns that can
    /// hold values without a JSON form ([`super::fields`]) are always read. Arrow files are not affected: a
    /// message holds all columns of its batch.
    pub fn project(&mut self, projection: &Projection) {
        if let Reader::Parquet(parquet) = &mut self.reader {
            parquet.project(projection);
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
                    if parquet.done == 0 && self.hashing.is_none() {
                        // Without another thread the file is hashed at its end.
                        self.hashing = Hashing::start(self.path.clone()).ok();
                    }
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
    /// Arrow files are hashed while they are read. Parquet files are not read in order: another thread has hashed them
    /// meanwhile.
    ///
    /// # Errors
    /// [`Error::Io`] if reading fails.
    pub fn finish(self) -> Result<FileHash> {
        let io_error = |e| Error::io(&*self.path, e);
        let hash = match self.reader {
            Reader::Parquet(_) => match self.hashing {
                Some(hashing) => hashing.finish()?,
                None => hash(&self.path)?,
            },
            Reader::Arrow(mut messages) => {
                messages.drain().map_err(io_error)?;
                let blake3 = messages.hasher.finalize().to_hex().to_string();
                FileHash { path: self.path.display().to_string(), blake3, bytes: messages.hasher.count() }
            }
        };
        self.read.store(hash.bytes, Ordering::Relaxed);
        Ok(hash)
    }
}

/// The number of rows of a batch that stay below [`BATCH_BYTES`].
fn rows_within(batch: &RecordBatch) -> usize {
    if batch.num_rows() <= 1 {
        return 1;
    }
    let bytes: usize =
        batch.columns().iter().map(|c| c.to_data().get_slice_memory_size().unwrap_or(BATCH_BYTES)).sum();
    rows_of(bytes / batch.num_rows())
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
