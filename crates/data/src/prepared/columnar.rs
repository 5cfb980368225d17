//! Prepared data in columns: a Parquet file, or an Arrow stream of a folder for `datasets.load_from_disk`.
//!
//! | column | type | |
//! |---|---|---|
//! | `row`, or `rows` in packs | int64, list of int64 | |
//! | `seq_lengths`, `position_ids` | list of int32 | packs |
//! | `prefix_ranges` | list of `[start, end]`, int32 | packs with shared prompts |
//! | `input_ids` | list of int32 | |
//! | `labels` | list of int64 | |
//! | `origins` | string | a letter per token |
//! | `weights` | list of float32, null where all are 0 or 1 | where asked for |
//! | `text` | string | where asked for |
//!
//! The types are those that `datasets.map` and TRL's `pack_dataset` give these names, so that prepared data can be
//! concatenated with theirs: int32 labels could not. The schema carries the features (`huggingface`), as theirs.

use super::record::{Record, Rows};
use crate::{Error, Result};
use arrow_array::types::{ArrowPrimitiveType, Float32Type, Int32Type, Int64Type};
use arrow_array::{ArrayRef, Int64Array, ListArray, PrimitiveArray, RecordBatch, StringArray};
use arrow_buffer::{Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use serde_json::{Map, Value, json};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Rows and tokens at which a batch is handed to the writer: whichever comes first.
const BATCH_ROWS: usize = 1024;
const BATCH_TOKENS: usize = 1 << 18;

/// A row group of Parquet ends at this many rows or encoded bytes. The writer holds one in memory.
const GROUP_ROWS: usize = 8192;
const GROUP_BYTES: usize = 32 << 20;

/// Which columns prepared data has. They are fixed before the first row is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// Packs of rows, not single rows.
    pub packed: bool,
    /// For packs with shared prompts: who sees what of them.
    pub prefix_ranges: bool,
    /// Loss weights per token: where the policy or the rows may give others than 0 and 1.
    pub weights: bool,
    /// The rendered text.
    pub text: bool,
}

/// The type of a column.
#[derive(Clone, Copy)]
enum Kind {
    Int64,
    String,
    List(&'static str, fn() -> DataType),
    Ranges,
}

impl Columns {
    fn list(&self) -> Vec<(&'static str, Kind)> {
        let int32 = Kind::List("int32", || DataType::Int32);
        let int64 = Kind::List("int64", || DataType::Int64);
        let mut columns = Vec::new();
        if self.packed {
            columns.extend([("rows", int64), ("seq_lengths", int32), ("position_ids", int32)]);
            if self.prefix_ranges {
                columns.push(("prefix_ranges", Kind::Ranges));
            }
        } else {
            columns.push(("row", Kind::Int64));
        }
        columns.extend([("input_ids", int32), ("labels", int64), ("origins", Kind::String)]);
        if self.weights {
            columns.push(("weights", Kind::List("float32", || DataType::Float32)));
        }
        if self.text {
            columns.push(("text", Kind::String));
        }
        columns
    }

    /// The features, as `datasets` writes them in JSON. Lists are called `Sequence`, the name that all of its
    /// versions read; since version 4 it reads them as `List`.
    pub fn features(&self) -> Value {
        let value = |dtype: &str| json!({"dtype": dtype, "_type": "Value"});
        let list = |feature: Value| json!({"feature": feature, "length": -1, "_type": "Sequence"});
        let mut features = Map::new();
        for (name, kind) in self.list() {
            let feature = match kind {
                Kind::Int64 => value("int64"),
                Kind::String => value("string"),
                Kind::List(dtype, _) => list(value(dtype)),
                Kind::Ranges => list(list(value("int32"))),
            };
            features.insert(name.into(), feature);
        }
        Value::Object(features)
    }

    /// The schema, with the features under `huggingface`.
    pub fn schema(&self) -> SchemaRef {
        let fields = self.list().into_iter().map(|(name, kind)| {
            let data_type = match kind {
                Kind::Int64 => DataType::Int64,
                Kind::String => DataType::Utf8,
                Kind::List(_, item) => list_of(item()),
                Kind::Ranges => list_of(list_of(DataType::Int32)),
            };
            Field::new(name, data_type, true)
        });
        let info = json!({"info": {"features": self.features()}}).to_string();
        let schema = Schema::new(fields.collect::<Vec<_>>());
        Arc::new(schema.with_metadata([("huggingface".to_string(), info)]))
    }
}

/// Everything is nullable and the items are called "item", as in what `datasets` writes itself: so it has nothing
/// to cast.
fn list_of(item: DataType) -> DataType {
    DataType::List(Arc::new(Field::new("item", item, true)))
}

/// A list column in the making.
struct Lists<T: ArrowPrimitiveType> {
    ends: Vec<i32>,
    values: Vec<T::Native>,
    valid: Vec<bool>,
}

impl<T: ArrowPrimitiveType> Lists<T> {
    fn new() -> Lists<T> {
        Lists { ends: vec![0], values: Vec::new(), valid: Vec::new() }
    }

    fn push(&mut self, values: impl IntoIterator<Item = T::Native>) {
        self.values.extend(values);
        self.end(true);
    }

    fn push_null(&mut self) {
        self.end(false);
    }

    fn end(&mut self, valid: bool) {
        // A batch ends far below i32::MAX values; see `Batch::is_full`.
        self.ends.push(self.values.len() as i32);
        self.valid.push(valid);
    }

    fn take(&mut self) -> Result<ListArray, ArrowError> {
        let values = PrimitiveArray::<T>::new(ScalarBuffer::from(std::mem::take(&mut self.values)), None);
        list_array(Arc::new(values), std::mem::replace(&mut self.ends, vec![0]), &mut self.valid)
    }
}

fn list_array(values: ArrayRef, ends: Vec<i32>, valid: &mut Vec<bool>) -> Result<ListArray, ArrowError> {
    let valid = std::mem::take(valid);
    let nulls = valid.contains(&false).then(|| NullBuffer::from(valid));
    let item = Arc::new(Field::new("item", values.data_type().clone(), true));
    ListArray::try_new(item, OffsetBuffer::new(ScalarBuffer::from(ends)), values, nulls)
}

/// A string column in the making.
#[derive(Default)]
struct Strings {
    ends: Vec<i32>,
    bytes: Vec<u8>,
    valid: Vec<bool>,
}

impl Strings {
    fn push(&mut self, bytes: impl IntoIterator<Item = u8>) {
        self.bytes.extend(bytes);
        self.end(true);
    }

    fn push_text(&mut self, text: Option<&str>) {
        self.bytes.extend_from_slice(text.unwrap_or_default().as_bytes());
        self.end(text.is_some());
    }

    fn end(&mut self, valid: bool) {
        self.ends.push(self.bytes.len() as i32);
        self.valid.push(valid);
    }

    fn take(&mut self) -> Result<ArrayRef, ArrowError> {
        let Strings { mut ends, bytes, valid } = std::mem::take(self);
        ends.insert(0, 0);
        let nulls = valid.contains(&false).then(|| NullBuffer::from(valid));
        let offsets = OffsetBuffer::new(ScalarBuffer::from(ends));
        Ok(Arc::new(StringArray::try_new(offsets, Buffer::from_vec(bytes), nulls)?))
    }
}

/// The rows that were not handed to the writer yet.
struct Batch {
    columns: Columns,
    schema: SchemaRef,
    count: usize,
    row: Vec<i64>,
    rows: Lists<Int64Type>,
    seq_lengths: Lists<Int32Type>,
    position_ids: Lists<Int32Type>,
    ranges: Lists<Int32Type>,
    /// Where the ranges of each pack end, in ranges.
    ranges_ends: Vec<i32>,
    ranges_valid: Vec<bool>,
    input_ids: Lists<Int32Type>,
    labels: Lists<Int64Type>,
    origins: Strings,
    weights: Lists<Float32Type>,
    text: Strings,
}

impl Batch {
    fn new(columns: Columns) -> Batch {
        Batch {
            columns,
            schema: columns.schema(),
            count: 0,
            row: Vec::new(),
            rows: Lists::new(),
            seq_lengths: Lists::new(),
            position_ids: Lists::new(),
            ranges: Lists::new(),
            ranges_ends: vec![0],
            ranges_valid: Vec::new(),
            input_ids: Lists::new(),
            labels: Lists::new(),
            origins: Strings::default(),
            weights: Lists::new(),
            text: Strings::default(),
        }
    }

    fn is_full(&self) -> bool {
        // Text that is much longer than its tokens is bounded too.
        self.count >= BATCH_ROWS
            || self.input_ids.values.len() >= BATCH_TOKENS
            || self.text.bytes.len() >= 8 * BATCH_TOKENS
    }

    /// Bytes that a batch takes in an Arrow file, up to its frame.
    fn bytes(&self) -> usize {
        let lists = self.seq_lengths.values.len()
            + self.position_ids.values.len()
            + self.input_ids.values.len()
            + self.weights.values.len();
        let wide = self.labels.values.len() + self.rows.values.len();
        4 * lists + 8 * wide + self.origins.bytes.len() + self.text.bytes.len() + 40 * self.count
    }

    /// Adds a record; the message says why it has no place here.
    fn push(&mut self, record: &Record<'_>) -> Result<(), String> {
        if record.weights.is_some() && !self.columns.weights {
            return Err("has weights, and the data was started without a column for them".into());
        }
        match (&record.rows, self.columns.packed) {
            (Rows::One(_), true) => return Err("is a single row among packs".into()),
            (Rows::Pack(_), false) => return Err("is a pack among single rows".into()),
            (Rows::Pack(pack), true) if pack.prefix_ranges.is_some() && !self.columns.prefix_ranges => {
                return Err("has prefix ranges, and the data was started without a column for them".into());
            }
            _ => {}
        }
        if let Some(id) = record.input_ids.iter().find(|&&id| i32::try_from(id).is_err()) {
            return Err(format!("has the token id {id}; ids are 32-bit integers with a sign"));
        }
        self.count += 1;
        match &record.rows {
            Rows::One(row) => self.row.push(*row as i64),
            Rows::Pack(pack) => {
                self.rows.push(pack.rows.iter().map(|&row| row as i64));
                self.seq_lengths.push(pack.seq_lengths.iter().map(|&n| n as i32));
                self.position_ids.push(pack.position_ids.iter().map(|&p| p as i32));
                for range in pack.prefix_ranges.iter().flatten() {
                    self.ranges.push([range.start as i32, range.end as i32]);
                }
                self.ranges_ends.push(self.ranges.ends.len() as i32 - 1);
                self.ranges_valid.push(pack.prefix_ranges.is_some());
            }
        }
        self.input_ids.push(record.input_ids.iter().map(|&id| id as i32));
        self.labels.push(record.labels.iter().map(|&label| i64::from(label)));
        self.origins.push(record.origins.iter().map(|origin| origin.letter() as u8));
        match record.weights {
            Some(weights) => self.weights.push(weights.iter().copied()),
            None => self.weights.push_null(),
        }
        if self.columns.text {
            self.text.push_text(record.text);
        }
        Ok(())
    }

    /// The rows so far, as a batch; empties this one.
    fn take(&mut self) -> Result<RecordBatch, ArrowError> {
        let mut arrays: Vec<ArrayRef> = Vec::new();
        if self.columns.packed {
            arrays.push(Arc::new(self.rows.take()?));
            arrays.push(Arc::new(self.seq_lengths.take()?));
            arrays.push(Arc::new(self.position_ids.take()?));
            if self.columns.prefix_ranges {
                let ranges = Arc::new(self.ranges.take()?);
                let ends = std::mem::replace(&mut self.ranges_ends, vec![0]);
                arrays.push(Arc::new(list_array(ranges, ends, &mut self.ranges_valid)?));
            }
        } else {
            arrays.push(Arc::new(Int64Array::from(std::mem::take(&mut self.row))));
        }
        arrays.push(Arc::new(self.input_ids.take()?));
        arrays.push(Arc::new(self.labels.take()?));
        arrays.push(self.origins.take()?);
        let weights = self.weights.take()?;
        if self.columns.weights {
            arrays.push(Arc::new(weights));
        }
        if self.columns.text {
            arrays.push(self.text.take()?);
        }
        self.ranges_ends = vec![0];
        self.ranges_valid.clear();
        self.count = 0;
        RecordBatch::try_new(self.schema.clone(), arrays)
    }
}

fn no_place(path: &Path, record: &Record<'_>, message: &str) -> Error {
    let row = match &record.rows {
        Rows::One(row) => Some(*row),
        Rows::Pack(pack) => pack.rows.first().copied(),
    };
    Error::Source {
        path: path.to_path_buf(),
        message: format!("row {} {message}", row.unwrap_or_default()),
        help: "write .jsonl, whose lines need not be alike".into(),
    }
}

/// A Parquet file in the making. The same records make the same bytes.
pub struct ParquetSink<W: Write + Send> {
    path: PathBuf,
    batch: Batch,
    writer: ArrowWriter<W>,
}

impl<W: Write + Send> ParquetSink<W> {
    /// Starts a file on `out`; `path` is its name in errors.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be written to.
    pub fn new(path: impl AsRef<Path>, out: W, columns: Columns) -> Result<ParquetSink<W>> {
        let path = path.as_ref().to_path_buf();
        let batch = Batch::new(columns);
        // On one core of an EPYC: 35 M tokens/s at 2.8 bytes a token. Dictionaries make it 6 M/s and the
        // file no smaller; zstd at 3 is slower by 40% and no smaller. Statistics of token lists help nobody.
        let properties = WriterProperties::builder()
            .set_created_by(concat!("suasion version ", env!("CARGO_PKG_VERSION")).into())
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_statistics_enabled(EnabledStatistics::None)
            .set_dictionary_enabled(false)
            .set_max_row_group_row_count(Some(GROUP_ROWS))
            .set_max_row_group_bytes(Some(GROUP_BYTES))
            .build();
        let writer = ArrowWriter::try_new(out, batch.schema.clone(), Some(properties));
        let writer = writer.map_err(|e| Error::io(&path, parquet_io(e)))?;
        Ok(ParquetSink { path, batch, writer })
    }

    /// Writes a record.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them; [`Error::Source`] where the record has what the columns have not.
    pub fn write(&mut self, record: &Record<'_>) -> Result<()> {
        self.batch.push(record).map_err(|message| no_place(&self.path, record, &message))?;
        if self.batch.is_full() { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let written = self.batch.take().map_err(ParquetError::from).and_then(|b| self.writer.write(&b));
        written.map_err(|e| Error::io(&self.path, parquet_io(e)))
    }

    /// Writes what is left and the footer, and gives `out` back.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn finish(mut self) -> Result<W> {
        if self.batch.count > 0 {
            self.flush()?;
        }
        self.writer.into_inner().map_err(|e| Error::io(&self.path, parquet_io(e)))
    }
}

/// The system's error inside of a writer's.
fn parquet_io(error: ParquetError) -> io::Error {
    match error {
        ParquetError::External(inner) => match inner.downcast::<io::Error>() {
            Ok(io) => *io,
            Err(other) => io::Error::other(other.to_string()),
        },
        other => io::Error::other(other.to_string()),
    }
}

fn arrow_io(error: ArrowError) -> io::Error {
    match error {
        ArrowError::IoError(_, io) => io,
        other => io::Error::other(other.to_string()),
    }
}

/// An Arrow IPC stream in the making: the format of the `.arrow` files of `datasets`, which maps them into memory.
pub struct ArrowStreamSink<W: Write + Send> {
    path: PathBuf,
    batch: Batch,
    writer: StreamWriter<W>,
    /// Bytes handed to the writer, up to frames.
    written: usize,
}

impl<W: Write + Send> ArrowStreamSink<W> {
    /// Starts a stream on `out`; `path` is its name in errors.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be written to.
    pub fn new(path: impl AsRef<Path>, out: W, columns: Columns) -> Result<ArrowStreamSink<W>> {
        let path = path.as_ref().to_path_buf();
        let batch = Batch::new(columns);
        let writer = StreamWriter::try_new(out, &batch.schema).map_err(|e| Error::io(&path, arrow_io(e)))?;
        Ok(ArrowStreamSink { path, batch, writer, written: 0 })
    }

    /// Writes a record.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them; [`Error::Source`] where the record has what the columns have not.
    pub fn write(&mut self, record: &Record<'_>) -> Result<()> {
        self.batch.push(record).map_err(|message| no_place(&self.path, record, &message))?;
        if self.batch.is_full() { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        self.written += self.batch.bytes();
        let written = self.batch.take().and_then(|batch| self.writer.write(&batch));
        written.map_err(|e| Error::io(&self.path, arrow_io(e)))
    }

    /// Writes what is left and the end mark, and gives `out` back.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn finish(mut self) -> Result<W> {
        if self.batch.count > 0 {
            self.flush()?;
        }
        self.writer.into_inner().map_err(|e| Error::io(&self.path, arrow_io(e)))
    }
}
