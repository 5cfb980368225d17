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

use super::{FileHash, source_error};
use crate::{Error, Result};
use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowPrimitiveType, Date32Type, Date64Type, Decimal32Type, Decimal64Type, Decimal128Type, Decimal256Type,
    DurationMicrosecondType, DurationMillisecondType, DurationNanosecondType, DurationSecondType,
    Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, Time32MillisecondType,
    Time32SecondType, Time64MicrosecondType, Time64NanosecondType, TimestampMicrosecondType,
    TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType, UInt8Type, UInt16Type,
    UInt32Type, UInt64Type,
};
use arrow_array::{Array, RecordBatch, StructArray};
use arrow_buffer::Buffer;
use arrow_ipc::reader::StreamDecoder;
use arrow_schema::{DataType, Field, TimeUnit};
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::metadata::ParquetMetaData;
use serde_json::{Map, Number, Value};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most rows in a batch.
const BATCH_ROWS: usize = 512;

/// The bytes that a batch is meant to stay under; a single row may be larger.
const BATCH_BYTES: usize = 4 << 20;

/// The longest buffer that is decompressed, in bytes: its stated length is the file's word, and an allocation of
/// that size is made on it. A column of more than this in one batch has offsets that overflow anyway.
const MAX_BUFFER: i64 = 1 << 31;

/// What every message of an Arrow stream starts with.
const CONTINUATION: [u8; 4] = [0xff; 4];

/// A format whose rows lie in columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Parquet.
    Parquet,
    /// The Arrow IPC file format (Feather 2).
    ArrowFile,
    /// The Arrow IPC stream format.
    ArrowStream,
}

/// The format of a file from its first bytes (8 are enough), or `None` where it is no columnar one.
pub fn kind(head: &[u8]) -> Option<Kind> {
    if head.starts_with(b"PAR1") {
        Some(Kind::Parquet)
    } else if head.starts_with(b"ARROW1") {
        Some(Kind::ArrowFile)
    } else if head.starts_with(&CONTINUATION) {
        Some(Kind::ArrowStream)
    } else {
        None
    }
}

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

/// Runs a reader of the Arrow project. Both check what they read, and what they are known to panic at is checked
/// here before. Of 36 000 files with flipped bits 5 still reached a panic in them: that is one more broken file,
/// and not the end of the program.
fn guard<T, E: std::fmt::Display>(read: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("the reader found it broken".into()),
    }
}

fn broken(path: &Path, kind: Kind, message: &str) -> Error {
    let name = match kind {
        Kind::Parquet => "Parquet file",
        Kind::ArrowFile | Kind::ArrowStream => "Arrow file",
    };
    source_error(
        path,
        &format!("the {name} is cut or broken: {message}"),
        "was the download or export interrupted? fetch or write the file again",
    )
}

/// Why the messages of an Arrow file cannot be read.
enum Broken {
    Io(io::Error),
    Content(String),
}

impl Broken {
    fn name(self, path: &Path, kind: Kind) -> Error {
        match self {
            Broken::Io(e) => Error::io(path, e),
            Broken::Content(message) => broken(path, kind, &message),
        }
    }

    fn cut() -> Broken {
        Broken::Content("it ends inside a message".into())
    }
}

/// Where the stream in an Arrow IPC file ends: `.. stream, footer, i32 length of the footer, "ARROW1"`.
fn footer(file: &mut File, size: u64) -> Result<u64, Broken> {
    let mut tail = [0; 10];
    if size < 8 + 10 {
        return Err(Broken::Content("it has no footer".into()));
    }
    file.seek(SeekFrom::End(-10)).map_err(Broken::Io)?;
    file.read_exact(&mut tail).map_err(Broken::Io)?;
    file.rewind().map_err(Broken::Io)?;
    let length = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    match size.checked_sub(10 + length) {
        Some(end) if &tail[4..] == b"ARROW1" && end >= 8 => Ok(end),
        _ => Err(Broken::Content("it has no footer".into())),
    }
}

/// The messages of an Arrow stream, one at a time.
///
/// The messages are framed here and only decoded by arrow-ipc: so no length that the file states is allocated
/// before it was held against the bytes that are there.
struct Messages {
    file: BufReader<File>,
    hasher: blake3::Hasher,
    read: Arc<AtomicU64>,
    /// Bytes read, and where the stream ends at the latest.
    at: u64,
    end: u64,
    file_kind: bool,
    decoder: StreamDecoder,
    /// What the decoder has not taken yet.
    buffer: Buffer,
    done: bool,
}

impl Messages {
    fn new(file: File, end: u64, read: Arc<AtomicU64>) -> Messages {
        Messages {
            file: BufReader::with_capacity(1 << 16, file),
            hasher: blake3::Hasher::new(),
            read,
            at: 0,
            end,
            file_kind: false,
            decoder: StreamDecoder::new(),
            buffer: Buffer::default(),
            done: false,
        }
    }

    /// Passes the magic of the file format and reads the columns' description.
    fn start(&mut self, kind: Kind) -> Result<(), Broken> {
        self.file_kind = kind == Kind::ArrowFile;
        if self.file_kind {
            // "ARROW1", padded.
            self.take(8, &mut Vec::new())?;
        }
        let mut message = Vec::new();
        if !self.message(&mut message)? {
            return Err(Broken::Content("it describes no columns".into()));
        }
        self.buffer = Buffer::from_vec(message);
        self.decode().map(|_| ())
    }

    /// The next batch.
    fn next(&mut self) -> Result<Option<RecordBatch>, Broken> {
        loop {
            // A message without a body is decoded when the next one arrives, which then stays in the buffer.
            if !self.buffer.is_empty() {
                if let Some(batch) = self.decode()? {
                    return Ok(Some(batch));
                }
                continue;
            }
            if self.done {
                return Ok(None);
            }
            let mut message = Vec::new();
            if !self.message(&mut message)? {
                self.done = true;
                message = [CONTINUATION, [0; 4]].concat();
            }
            self.buffer = Buffer::from_vec(message);
        }
    }

    fn decode(&mut self) -> Result<Option<RecordBatch>, Broken> {
        let decoded = guard(|| self.decoder.decode(&mut self.buffer));
        if decoded.is_err() {
            self.done = true;
            self.buffer = Buffer::default();
        }
        decoded.map_err(Broken::Content)
    }

    /// Appends the whole next message to `out`; false at the end of the stream.
    fn message(&mut self, out: &mut Vec<u8>) -> Result<bool, Broken> {
        if self.file_kind && self.at == self.end {
            return Ok(false);
        }
        if self.at == self.end {
            return Err(Broken::Content("it has no end mark".into()));
        }
        self.take(8, out)?;
        if out[..4] != CONTINUATION {
            return Err(Broken::Content("a message does not start with ff ff ff ff".into()));
        }
        let length = u32::from_le_bytes([out[4], out[5], out[6], out[7]]);
        if length == 0 {
            return Ok(false);
        }
        self.take(u64::from(length), out)?;
        let body = {
            let message =
                arrow_ipc::root_as_message(&out[8..]).map_err(|e| Broken::Content(e.to_string()))?;
            u64::try_from(message.bodyLength()).map_err(|_| Broken::cut())?
        };
        let start = out.len();
        self.take(body, out)?;
        let (head, body) = out.split_at(start);
        let message = arrow_ipc::root_as_message(&head[8..]).map_err(|e| Broken::Content(e.to_string()))?;
        let dictionary = message.header_as_dictionary_batch().and_then(|d| d.data());
        match message.header_as_record_batch().or(dictionary) {
            Some(batch) => check_buffers(&batch, body).map(|()| true),
            None => Ok(true),
        }
    }

    /// Appends the next `n` bytes to `out`.
    fn take(&mut self, n: u64, out: &mut Vec<u8>) -> Result<(), Broken> {
        if n > self.end - self.at {
            return Err(Broken::cut());
        }
        let from = out.len();
        // The file may have shrunk since its length was asked: `take` grows with what arrives.
        out.reserve(n as usize);
        let got = self.file.by_ref().take(n).read_to_end(out).map_err(Broken::Io)?;
        self.hasher.update(&out[from..]);
        self.at += got as u64;
        self.read.fetch_add(got as u64, Ordering::Relaxed);
        if got as u64 == n { Ok(()) } else { Err(Broken::cut()) }
    }

    /// Hashes what is left of the file.
    fn drain(&mut self) -> io::Result<()> {
        self.hasher.update_reader(&mut self.file).map(|_| ())
    }
}

/// Holds what a batch says of its buffers against its body: their places (arrow-ipc panics where they lie outside),
/// and the lengths that compressed ones state in their first 8 bytes.
fn check_buffers(batch: &arrow_ipc::RecordBatch<'_>, body: &[u8]) -> Result<(), Broken> {
    let compressed = batch.compression().is_some();
    for buffer in batch.buffers().into_iter().flatten() {
        let place = usize::try_from(buffer.offset()).ok().zip(usize::try_from(buffer.length()).ok());
        // The format wants multiples of 8.
        let bytes = place.filter(|(at, _)| at % 8 == 0).and_then(|(at, n)| body.get(at..at.checked_add(n)?));
        let Some(bytes) = bytes else {
            return Err(Broken::Content("a buffer lies outside of its message".into()));
        };
        let stated = bytes.first_chunk().map_or(0, |first| i64::from_le_bytes(*first));
        if compressed && stated > MAX_BUFFER {
            return Err(Broken::Content(format!("a buffer states a length of {stated} bytes")));
        }
    }
    Ok(())
}

/// One row as the JSON object that it would be in JSON Lines, as `datasets` writes it: fields in the order of the
/// columns, nulls where the columns have nulls (not in structs, whose fields `datasets` makes the same in all
/// rows), columns of JSON (`arrow.json`) as what they say, times since 1970 in milliseconds, NaN as null. A column
/// of bytes that are no text (an image beside a conversation) is nothing that a format reads, and is left out.
///
/// # Errors
/// A message that names the column: an infinite number, a type that JSON has not.
pub fn fields(batch: &RecordBatch, row: usize) -> Result<Map<String, Value>, String> {
    let mut fields = Map::with_capacity(batch.num_columns());
    for (field, column) in batch.schema_ref().fields().iter().zip(batch.columns()) {
        match value(field, column, row) {
            Ok(value) => {
                fields.insert(field.name().clone(), value);
            }
            Err(_) if holds_bytes(field.data_type()) => {}
            Err(e) => return Err(format!("column {:?}: {e}", field.name())),
        }
    }
    Ok(fields)
}

/// True for a type with bytes in it that need not be text.
fn holds_bytes(kind: &DataType) -> bool {
    match kind {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => {
            true
        }
        DataType::Struct(fields) => fields.iter().any(|field| holds_bytes(field.data_type())),
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            holds_bytes(item.data_type())
        }
        _ => false,
    }
}

/// The names of the columns, in order.
pub fn column_names(batch: &RecordBatch) -> impl Iterator<Item = &str> {
    batch.schema_ref().fields().iter().map(|f| f.name().as_str())
}

fn value(field: &Field, array: &dyn Array, row: usize) -> Result<Value, String> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    macro_rules! primitive {
        ($type:ty) => {
            array.as_primitive::<$type>().value(row)
        };
    }
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Int8 => primitive!(Int8Type).into(),
        DataType::Int16 => primitive!(Int16Type).into(),
        DataType::Int32 => primitive!(Int32Type).into(),
        DataType::Int64 => primitive!(Int64Type).into(),
        DataType::UInt8 => primitive!(UInt8Type).into(),
        DataType::UInt16 => primitive!(UInt16Type).into(),
        DataType::UInt32 => primitive!(UInt32Type).into(),
        DataType::UInt64 => primitive!(UInt64Type).into(),
        DataType::Float16 => float(primitive!(Float16Type).to_f64())?,
        DataType::Float32 => float(f64::from(primitive!(Float32Type)))?,
        DataType::Float64 => float(primitive!(Float64Type))?,
        DataType::Utf8 => string(field, array.as_string::<i32>().value(row))?,
        DataType::LargeUtf8 => string(field, array.as_string::<i64>().value(row))?,
        DataType::Utf8View => string(field, array.as_string_view().value(row))?,
        DataType::Binary => string(field, text(array.as_binary::<i32>().value(row))?)?,
        DataType::LargeBinary => string(field, text(array.as_binary::<i64>().value(row))?)?,
        DataType::BinaryView => string(field, text(array.as_binary_view().value(row))?)?,
        DataType::FixedSizeBinary(_) => string(field, text(array.as_fixed_size_binary().value(row))?)?,
        DataType::List(item) => list(item, &array.as_list::<i32>().value(row))?,
        DataType::LargeList(item) => list(item, &array.as_list::<i64>().value(row))?,
        DataType::FixedSizeList(item, _) => list(item, &array.as_fixed_size_list().value(row))?,
        DataType::ListView(item) => list(item, &array.as_list_view::<i32>().value(row))?,
        DataType::LargeListView(item) => list(item, &array.as_list_view::<i64>().value(row))?,
        DataType::Struct(_) => Value::Object(object(array.as_struct(), row)?),
        DataType::Map(..) => map(&array.as_map().value(row))?,
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            let key = value(field, dictionary.keys(), row)?.as_u64().unwrap_or(u64::MAX);
            let key = usize::try_from(key).ok().filter(|key| *key < dictionary.values().len());
            value(field, dictionary.values(), key.ok_or("a key that its dictionary has not")?)?
        }
        DataType::Timestamp(unit, _) => milliseconds(match unit {
            TimeUnit::Second => (primitive!(TimestampSecondType), 1),
            TimeUnit::Millisecond => (primitive!(TimestampMillisecondType), 1_000),
            TimeUnit::Microsecond => (primitive!(TimestampMicrosecondType), 1_000_000),
            TimeUnit::Nanosecond => (primitive!(TimestampNanosecondType), 1_000_000_000),
        }),
        DataType::Duration(unit) => milliseconds(match unit {
            TimeUnit::Second => (primitive!(DurationSecondType), 1),
            TimeUnit::Millisecond => (primitive!(DurationMillisecondType), 1_000),
            TimeUnit::Microsecond => (primitive!(DurationMicrosecondType), 1_000_000),
            TimeUnit::Nanosecond => (primitive!(DurationNanosecondType), 1_000_000_000),
        }),
        DataType::Date32 => milliseconds((i64::from(primitive!(Date32Type)) * 86_400, 1)),
        DataType::Date64 => milliseconds((primitive!(Date64Type), 1_000)),
        DataType::Time32(TimeUnit::Second) => clock(i64::from(primitive!(Time32SecondType)), 1),
        DataType::Time32(_) => clock(i64::from(primitive!(Time32MillisecondType)), 1_000),
        DataType::Time64(TimeUnit::Microsecond) => clock(primitive!(Time64MicrosecondType), 1_000_000),
        DataType::Time64(_) => clock(primitive!(Time64NanosecondType), 1_000_000_000),
        DataType::Decimal32(..) => array.as_primitive::<Decimal32Type>().value_as_string(row).into(),
        DataType::Decimal64(..) => array.as_primitive::<Decimal64Type>().value_as_string(row).into(),
        DataType::Decimal128(..) => array.as_primitive::<Decimal128Type>().value_as_string(row).into(),
        DataType::Decimal256(..) => array.as_primitive::<Decimal256Type>().value_as_string(row).into(),
        other @ (DataType::Interval(_) | DataType::Union(..) | DataType::RunEndEncoded(..)) => {
            return Err(format!("its type {other} has no JSON form; leave the column out or cast it"));
        }
    })
}

/// pandas, and `datasets` with it, writes what is missing among numbers as NaN.
fn float(value: f64) -> Result<Value, String> {
    if value.is_infinite() {
        return Err(format!("{value} is no finite number"));
    }
    Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
}

fn text(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|e| {
        let at = e.valid_up_to();
        format!("its bytes are not UTF-8 text (byte {at} is 0x{:02x}); leave the column out", bytes[at])
    })
}

/// A string, or what it says where the column is declared as JSON (`datasets.Json`).
fn string(field: &Field, text: &str) -> Result<Value, String> {
    if field.extension_type_name() == Some("arrow.json") {
        return serde_json::from_str(text).map_err(|e| format!("it is declared as JSON, and is not: {e}"));
    }
    Ok(text.into())
}

fn list(item: &Field, items: &dyn Array) -> Result<Value, String> {
    fn numbers<T: ArrowPrimitiveType>(items: &dyn Array) -> Vec<Value>
    where
        Value: From<T::Native>,
    {
        items.as_primitive::<T>().values().iter().map(|&v| v.into()).collect()
    }
    // Lists of tokens, labels and masks: the type is looked at once a list, not once an item.
    let values = match items.data_type() {
        _ if items.null_count() > 0 => None,
        DataType::Int8 => Some(numbers::<Int8Type>(items)),
        DataType::Int16 => Some(numbers::<Int16Type>(items)),
        DataType::Int32 => Some(numbers::<Int32Type>(items)),
        DataType::Int64 => Some(numbers::<Int64Type>(items)),
        DataType::UInt8 => Some(numbers::<UInt8Type>(items)),
        DataType::UInt16 => Some(numbers::<UInt16Type>(items)),
        DataType::UInt32 => Some(numbers::<UInt32Type>(items)),
        DataType::Boolean => Some(items.as_boolean().values().iter().map(Value::from).collect()),
        _ => None,
    };
    match values {
        Some(values) => Ok(Value::Array(values)),
        None => {
            let each = (0..items.len()).map(|i| value(item, items, i).map_err(|e| format!("item {i}: {e}")));
            each.collect::<Result<_, _>>().map(Value::Array)
        }
    }
}

/// A struct without its nulls. `datasets` gives every message, call and argument the fields of all the others, null where
/// there was none; a template would render them, and the model learn to write them. TRL drops them, too
/// (`remove_none_values`).
fn object(array: &StructArray, row: usize) -> Result<Map<String, Value>, String> {
    let mut object = Map::with_capacity(array.num_columns());
    for (field, column) in array.fields().iter().zip(array.columns()).filter(|(_, c)| c.is_valid(row)) {
        let value = value(field, column, row).map_err(|e| format!("field {:?}: {e}", field.name()))?;
        object.insert(field.name().clone(), value);
    }
    Ok(object)
}

/// The entries of one map: a struct of two columns, keys and values.
fn map(entries: &StructArray) -> Result<Value, String> {
    let mut object = Map::with_capacity(entries.len());
    let (key_field, value_field) = (&entries.fields()[0], &entries.fields()[1]);
    for i in 0..entries.len() {
        let Value::String(key) = value(key_field, entries.column(0), i)? else {
            return Err("the keys of its map are no strings; leave the column out or cast it".into());
        };
        let value = value(value_field, entries.column(1), i).map_err(|e| format!("key {key:?}: {e}"))?;
        object.insert(key, value);
    }
    Ok(Value::Object(object))
}

/// A count of `1 / per_second` seconds, in milliseconds, rounded down as pandas does.
fn milliseconds((count, per_second): (i64, i64)) -> Value {
    let value = (i128::from(count) * 1_000).div_euclid(i128::from(per_second));
    i64::try_from(value).map_or(Value::Null, Value::from)
}

/// A time of day as Python prints it: `01:02:03`, `01:02:03.000004`.
fn clock(count: i64, per_second: i64) -> Value {
    let (seconds, rest) = (count.div_euclid(per_second), count.rem_euclid(per_second));
    let micros = i128::from(rest) * 1_000_000 / i128::from(per_second);
    let mut text = format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
    if micros > 0 {
        text.push_str(&format!(".{micros:06}"));
    }
    text.into()
}

/// What a folder of `datasets.save_to_disk` holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Saved {
    /// A `Dataset`: its Arrow files, in order.
    Files(Vec<PathBuf>),
    /// A `DatasetDict`: the names of its splits, each a `Dataset` in the folder of its name.
    Splits(Vec<String>),
}

/// Looks into a folder; `None` where `datasets.save_to_disk` did not write it.
///
/// # Errors
/// [`Error::Io`]; [`Error::Source`] where its `state.json` or `dataset_dict.json` is broken, names files outside
/// of the folder or that are not there, or has rows selected by indices that lie in another file.
pub fn saved_dataset(folder: impl AsRef<Path>) -> Result<Option<Saved>> {
    let folder = folder.as_ref();
    let help = "save the dataset again with datasets' save_to_disk";
    if let Some((path, dict)) = json_file(folder.join("dataset_dict.json"))? {
        let splits = dict.get("splits").and_then(Value::as_array);
        let names = splits.and_then(|s| s.iter().map(|s| s.as_str().map(str::to_string)).collect());
        let names: Vec<String> =
            names.ok_or_else(|| source_error(&path, "has no list of \"splits\"", help))?;
        if let Some(bad) = names.iter().find(|name| !is_plain(name)) {
            return Err(source_error(&path, &format!("{bad:?} is no name of a split"), help));
        }
        return Ok(Some(Saved::Splits(names)));
    }
    let Some((path, state)) = json_file(folder.join("state.json"))? else { return Ok(None) };
    let Some(listed) = state.get("_data_files").and_then(Value::as_array) else { return Ok(None) };
    let indices = state.as_object().into_iter().flatten().find(|(key, value)| {
        key.starts_with("_indices") && !value.is_null() && value.as_array().is_none_or(|a| !a.is_empty())
    });
    if let Some((key, _)) = indices {
        return Err(source_error(
            &path,
            &format!("its rows are selected by indices in another file ({key:?})"),
            "load it, call flatten_indices(), and save it again",
        ));
    }
    let mut files = Vec::with_capacity(listed.len());
    for entry in listed {
        let name = entry.get("filename").and_then(Value::as_str).filter(|name| is_plain(name));
        let Some(name) = name else {
            return Err(source_error(&path, &format!("{entry} is no file of this folder"), help));
        };
        let file = folder.join(name);
        if !file.is_file() {
            return Err(source_error(&path, &format!("the file {name:?} is not there"), help));
        }
        files.push(file);
    }
    if files.is_empty() {
        return Err(source_error(&path, "the dataset has no files", help));
    }
    Ok(Some(Saved::Files(files)))
}

/// True for the name of something in a folder, and not of something elsewhere.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!(parts.next(), Some(std::path::Component::Normal(_))) && parts.next().is_none()
}

/// The JSON in a small file; `None` where there is no such file.
fn json_file(path: PathBuf) -> Result<Option<(PathBuf, Value)>> {
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(Error::io(path, e)),
    };
    match serde_json::from_slice(&bytes) {
        Ok(value) => Ok(Some((path, value))),
        Err(e) => {
            let message = format!("is not JSON: {e}");
            Err(source_error(&path, &message, "save the dataset again with datasets' save_to_disk"))
        }
    }
}
