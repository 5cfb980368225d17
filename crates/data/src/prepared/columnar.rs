//! Prepared data in columns: Parquet files, and the Arrow streams of a folder for `datasets.load_from_disk`.
//!
//! | column | type | |
//! |---|---|---|
//! | `row`, or `rows` in packs | int64, list of int64 | |
//! | `seq_lengths`, `position_ids` | list of int32 | packs |
//! | `prefix_ranges` | list of `[start, end]`, int32 | packs with shared prompts |
//! | `input_ids` | list of int32 | |
//! | `labels` | list of int64 | |
//! | `origins` | string | a letter per token |
//! | `weights` | list of float32, null if all are 0 or 1 | optional |
//! | `text` | string | optional |
//!
//! The types are those that `datasets.map` and TRL's `pack_dataset` give to these names, so that prepared data can
//! be concatenated with theirs, which int32 labels could not. As in theirs, the schema carries the features
//! (`huggingface`).

use super::record::{Record, Rows};
use crate::{Error, Policy, Result};
use arrow_array::builder::{ArrayBuilder, Int64Builder, ListBuilder, PrimitiveBuilder, StringBuilder};
use arrow_array::types::{ArrowPrimitiveType, Float32Type, Int32Type, Int64Type};
use arrow_array::{ArrayRef, RecordBatch, new_null_array};
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

/// Numbers of rows and tokens at which a batch is passed to the writer, whichever is reached first.
const BATCH_ROWS: usize = 1024;
const BATCH_TOKENS: usize = 1 << 18;

/// A row group of Parquet ends at this many rows or encoded bytes. The writer holds one in memory.
const GROUP_ROWS: usize = 8192;
const GROUP_BYTES: usize = 32 << 20;

/// The optional columns of prepared data. They are fixed before the first row is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// The rows are packs.
    pub packed: bool,
    /// The prefix of each segment, for packs with shared prompts.
    pub prefix_ranges: bool,
    /// Loss weights, if some may differ from 0 and 1.
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
    /// The columns that a policy's rows need. Rows can also have their own weights.
    pub fn of(policy: &Policy) -> Columns {
        let weighs = |weight: f32| weight != 0.0 && weight != 1.0;
        let weights = weighs(policy.prompt_loss_weight) || policy.loss_weights.values().any(|w| weighs(*w));
        Columns { packed: policy.packing, prefix_ranges: policy.share_prefix, weights, text: false }
    }

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

/// Everything is nullable and items are called "item", as in files that `datasets` writes, so that it does not cast.
fn list_of(item: DataType) -> DataType {
    DataType::List(Arc::new(Field::new("item", item, true)))
}

type Lists<T> = ListBuilder<PrimitiveBuilder<T>>;

fn push<T: ArrowPrimitiveType>(lists: &mut Lists<T>, values: impl IntoIterator<Item = T::Native>) {
    values.into_iter().for_each(|value| lists.values().append_value(value));
    lists.append(true);
}

/// The rows that were not passed to the writer yet.
struct Batch {
    columns: Columns,
    schema: SchemaRef,
    count: usize,
    row: Int64Builder,
    rows: Lists<Int64Type>,
    seq_lengths: Lists<Int32Type>,
    position_ids: Lists<Int32Type>,
    prefix_ranges: ListBuilder<Lists<Int32Type>>,
    input_ids: Lists<Int32Type>,
    labels: Lists<Int64Type>,
    origins: StringBuilder,
    weights: Lists<Float32Type>,
    text: StringBuilder,
}

impl Batch {
    fn new(columns: Columns) -> Batch {
        Batch {
            columns,
            schema: columns.schema(),
            count: 0,
            row: Default::default(),
            rows: Default::default(),
            seq_lengths: Default::default(),
            position_ids: Default::default(),
            prefix_ranges: Default::default(),
            input_ids: Default::default(),
            labels: Default::default(),
            origins: Default::default(),
            weights: Default::default(),
            text: Default::default(),
        }
    }

    /// Far below the 2^31 values that a list column may have; also limits text that is much longer than its tokens.
    fn is_full(&self) -> bool {
        self.count >= BATCH_ROWS
            || self.input_ids.values_ref().len() >= BATCH_TOKENS
            || self.text.values_slice().len() >= 8 * BATCH_TOKENS
    }

    /// Adds a record. The error says why it does not fit the columns.
    fn push(&mut self, record: &Record<'_>) -> Result<(), String> {
        let Columns { packed, prefix_ranges, weights, text } = self.columns;
        if record.weights.is_some() && !weights {
            return Err("has weights, and the data was started without a column for them".into());
        }
        match (&record.rows, packed) {
            (Rows::One(_), true) => return Err("is a single row among packs".into()),
            (Rows::Pack(_), false) => return Err("is a pack among single rows".into()),
            (Rows::Pack(pack), true) if pack.prefix_ranges.is_some() && !prefix_ranges => {
                return Err("has prefix ranges, and the data was started without a column for them".into());
            }
            _ => {}
        }
        if let Some(id) = record.input_ids.iter().find(|&&id| i32::try_from(id).is_err()) {
            return Err(format!("has the token id {id}; ids are 32-bit integers with a sign"));
        }
        self.count += 1;
        match &record.rows {
            Rows::One(row) => self.row.append_value(*row as i64),
            Rows::Pack(pack) => {
                push(&mut self.rows, pack.rows.iter().map(|&row| row as i64));
                push(&mut self.seq_lengths, pack.seq_lengths.iter().map(|&n| n as i32));
                push(&mut self.position_ids, pack.position_ids.iter().map(|&p| p as i32));
                for range in pack.prefix_ranges.iter().flatten() {
                    push(self.prefix_ranges.values(), [range.start as i32, range.end as i32]);
                }
                self.prefix_ranges.append(pack.prefix_ranges.is_some());
            }
        }
        push(&mut self.input_ids, record.input_ids.iter().map(|&id| id as i32));
        push(&mut self.labels, record.labels.iter().map(|&label| i64::from(label)));
        self.origins.append_value(record.origins.iter().map(|origin| origin.letter()).collect::<String>());
        match record.weights {
            Some(weights) => push(&mut self.weights, weights.iter().copied()),
            None => self.weights.append_null(),
        }
        self.text.append_option(record.text.filter(|_| text));
        Ok(())
    }

    /// The rows so far, as a batch; empties this one.
    fn take(&mut self) -> Result<RecordBatch, ArrowError> {
        self.count = 0;
        let packs: [ArrayRef; 4] = [
            Arc::new(self.rows.finish()),
            Arc::new(self.seq_lengths.finish()),
            Arc::new(self.position_ids.finish()),
            Arc::new(self.prefix_ranges.finish()),
        ];
        let row: ArrayRef = Arc::new(self.row.finish());
        let tokens: [ArrayRef; 3] = [
            Arc::new(self.input_ids.finish()),
            Arc::new(self.labels.finish()),
            Arc::new(self.origins.finish()),
        ];
        let (weights, text): (ArrayRef, ArrayRef) =
            (Arc::new(self.weights.finish()), Arc::new(self.text.finish()));
        let mut arrays = Vec::new();
        match self.columns {
            Columns { packed: false, .. } => arrays.push(row),
            Columns { prefix_ranges: false, .. } => arrays.extend_from_slice(&packs[..3]),
            _ => arrays.extend(packs),
        }
        arrays.extend(tokens);
        arrays.extend(self.columns.weights.then_some(weights));
        arrays.extend(self.columns.text.then_some(text));
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

/// Records in record batches.
pub struct Batches {
    batch: Batch,
    done: Vec<RecordBatch>,
}

impl Batches {
    /// No records yet. A column of weights is added if a record has weights.
    pub fn new(columns: Columns) -> Batches {
        Batches { batch: Batch::new(columns), done: Vec::new() }
    }

    /// Adds a record.
    ///
    /// # Errors
    /// [`Error::Source`] if the record does not fit the columns; `name` is that of the data.
    pub fn push(&mut self, record: &Record<'_>, name: &Path) -> Result<()> {
        if record.weights.is_some() && !self.batch.columns.weights {
            self.end_batch(name)?;
            self.batch = Batch::new(Columns { weights: true, ..self.batch.columns });
        }
        self.batch.push(record).map_err(|message| no_place(name, record, &message))?;
        if self.batch.is_full() { self.end_batch(name) } else { Ok(()) }
    }

    fn end_batch(&mut self, name: &Path) -> Result<()> {
        if self.batch.count > 0 {
            self.done.push(self.batch.take().map_err(|e| Error::io(name, arrow_io(e)))?);
        }
        Ok(())
    }

    /// The batches, all with the returned schema.
    ///
    /// # Errors
    /// As [`Batches::push`].
    pub fn finish(mut self, name: &Path) -> Result<(SchemaRef, Vec<RecordBatch>)> {
        self.end_batch(name)?;
        let schema = self.batch.schema;
        let whole = |batch: RecordBatch| {
            if batch.schema() == schema {
                return Ok(batch);
            }
            // A batch from before the first weight.
            let rows = batch.num_rows();
            let column = |field: &Arc<Field>| match batch.column_by_name(field.name()) {
                Some(column) => column.clone(),
                None => new_null_array(field.data_type(), rows),
            };
            let columns = schema.fields().iter().map(column).collect();
            RecordBatch::try_new(schema.clone(), columns).map_err(|e| Error::io(name, arrow_io(e)))
        };
        let batches = self.done.into_iter().map(whole).collect::<Result<_>>()?;
        Ok((schema, batches))
    }
}

/// A file of columns that is being written. Equal records give equal bytes.
pub struct ColumnSink<W: Write + Send> {
    path: PathBuf,
    batch: Batch,
    writer: Writer<W>,
}

enum Writer<W: Write + Send> {
    Parquet(ArrowWriter<W>),
    Stream(StreamWriter<W>),
}

impl<W: Write + Send> ColumnSink<W> {
    /// Starts a Parquet file on `out`; `path` is its name in errors.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written to.
    pub fn parquet(path: impl AsRef<Path>, out: W, columns: Columns) -> Result<ColumnSink<W>> {
        // On one core of an EPYC: 35 M tokens/s at 2.8 bytes per token. With dictionaries it is 6 M/s and the file
        // is no smaller; zstd at level 3 is 40% slower and the file no smaller. Statistics of token lists are
        // useless.
        let properties = WriterProperties::builder()
            .set_created_by(concat!("suasion version ", env!("CARGO_PKG_VERSION")).into())
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_statistics_enabled(EnabledStatistics::None)
            .set_dictionary_enabled(false)
            .set_max_row_group_row_count(Some(GROUP_ROWS))
            .set_max_row_group_bytes(Some(GROUP_BYTES))
            .build();
        let writer = ArrowWriter::try_new(out, columns.schema(), Some(properties)).map_err(parquet_io);
        ColumnSink::new(path, writer.map(Writer::Parquet), columns)
    }

    /// Starts an Arrow IPC stream on `out`, the format of the `.arrow` files of `datasets`, which maps them into
    /// memory.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written to.
    pub fn arrow(path: impl AsRef<Path>, out: W, columns: Columns) -> Result<ColumnSink<W>> {
        let writer = StreamWriter::try_new(out, &columns.schema()).map_err(arrow_io);
        ColumnSink::new(path, writer.map(Writer::Stream), columns)
    }

    fn new(path: impl AsRef<Path>, writer: io::Result<Writer<W>>, columns: Columns) -> Result<ColumnSink<W>> {
        let path = path.as_ref().to_path_buf();
        let writer = writer.map_err(|e| Error::io(&path, e))?;
        Ok(ColumnSink { path, batch: Batch::new(columns), writer })
    }

    /// Writes a record.
    ///
    /// # Errors
    /// [`Error::Io`], including a full disk; [`Error::Source`] if the record does not fit the columns.
    pub fn write(&mut self, record: &Record<'_>) -> Result<()> {
        self.batch.push(record).map_err(|message| no_place(&self.path, record, &message))?;
        if self.batch.is_full() { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let batch = self.batch.take().map_err(arrow_io);
        let written = batch.and_then(|batch| match &mut self.writer {
            Writer::Parquet(writer) => writer.write(&batch).map_err(parquet_io),
            Writer::Stream(writer) => writer.write(&batch).map_err(arrow_io),
        });
        written.map_err(|e| Error::io(&self.path, e))
    }

    /// Writes the remaining records and the end of the file, and returns `out`.
    ///
    /// # Errors
    /// [`Error::Io`], including a full disk.
    pub fn finish(mut self) -> Result<W> {
        if self.batch.count > 0 {
            self.flush()?;
        }
        let out = match self.writer {
            Writer::Parquet(writer) => writer.into_inner().map_err(parquet_io),
            Writer::Stream(writer) => writer.into_inner().map_err(arrow_io),
        };
        out.map_err(|e| Error::io(&self.path, e))
    }
}

/// The underlying I/O error of a writer.
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
