//! `suasion.Preparer`: rows to prepared rows, batch by batch, on the calling thread.

use crate::arrow::{self, Stream};
use crate::error::{panicked, raised, wrong};
use crate::folder::{Model, choices};
use arrow_array::builder::{Int64Builder, StringBuilder};
use arrow_array::cast::AsArray;
use arrow_array::types::{
    Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use pyo3::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use suasion_cli::embed::Problem;
use suasion_data::prepared::Record;
use suasion_data::prepared::columnar::{Batches, Columns};
use suasion_data::source::{Content, RawRow};
use suasion_data::{Error, OnBadRow, Outcome, Pipeline, RowId, RowProcessor};

/// The name of a batch in messages.
const NAME: &str = "batch";

/// Turns batches of rows into batches of prepared rows.
#[pyclass(frozen, module = "suasion._suasion")]
pub struct Preparer {
    processor: RowProcessor,
    skips: bool,
    /// Without the column of row numbers, which a batch does not have.
    schema: SchemaRef,
    columns: Columns,
    /// The column that identifies rows, and whether it is text.
    id: Option<(String, bool)>,
}

#[pymethods]
impl Preparer {
    /// `id` names the column that identifies rows; it is kept, as text where `id_is_text`, else as int64.
    #[new]
    fn new(
        py: Python<'_>,
        model: &Model,
        keys: &str,
        with_text: bool,
        id: Option<String>,
        id_is_text: bool,
    ) -> PyResult<Preparer> {
        let made = || -> Result<Preparer, Problem> {
            let chosen = choices(keys, "prepare", "Preparer")?;
            if chosen.policy.packing {
                return Err(wrong(
                    "Preparer: packing=true: a batch does not know the rows of others",
                    "leave packing out here, and pack the prepared rows in a second pass with suasion prepare",
                ));
            }
            let skips = chosen.policy.on_bad_row == OnBadRow::Skip;
            let columns = Columns { text: with_text, ..Columns::of(&chosen.policy) };
            let mut fields: Vec<Arc<Field>> = columns.schema().fields().iter().cloned().collect();
            fields.retain(|field| field.name() != "row");
            if let Some(id) = &id {
                if fields.iter().any(|field| field.name() == id) {
                    let help = "rename the column of the source";
                    return Err(wrong(format!("Preparer: id={id:?} is the name of a prepared column"), help));
                }
                let kind = if id_is_text { DataType::Utf8 } else { DataType::Int64 };
                fields.insert(0, Arc::new(Field::new(id, kind, true)));
            }
            let pipeline = Pipeline { keep_text: with_text, ..Pipeline::new(model.0.clone(), chosen.policy) };
            Ok(Preparer {
                processor: pipeline.processor()?,
                skips,
                schema: Arc::new(Schema::new(fields)),
                columns,
                id: id.map(|id| (id, id_is_text)),
            })
        };
        made().map_err(|problem| raised(py, &problem))
    }

    /// Prepares a table or a record batch.
    fn prepare(&self, py: Python<'_>, batch: &Bound<'_, PyAny>) -> PyResult<Stream> {
        let batches = arrow::batches(batch)?;
        let made = py.detach(|| {
            catch_unwind(AssertUnwindSafe(|| self.all(batches)))
                .unwrap_or_else(|panic| Err(panicked(&*panic)))
        });
        let batches = made.map_err(|problem| raised(py, &problem))?;
        Ok(Stream { schema: self.schema.clone(), batches })
    }

    /// No rows, with the schema of prepared ones.
    fn empty(&self) -> Stream {
        Stream { schema: self.schema.clone(), batches: Vec::new() }
    }

    /// The schema as Spark writes it.
    #[getter]
    fn spark_schema(&self) -> String {
        let kind = |kind: &DataType| match kind {
            DataType::Int64 => "bigint",
            DataType::Int32 => "int",
            DataType::Float32 => "float",
            _ => "string",
        };
        let column = |field: &Arc<Field>| match field.data_type() {
            DataType::List(item) => format!("`{}` array<{}>", field.name(), kind(item.data_type())),
            other => format!("`{}` {}", field.name(), kind(other)),
        };
        self.schema.fields().iter().map(column).collect::<Vec<_>>().join(", ")
    }
}

impl Preparer {
    fn all(&self, batches: Vec<RecordBatch>) -> Result<Vec<RecordBatch>, Problem> {
        let name: Arc<Path> = Path::new(NAME).into();
        let mut made = Vec::new();
        let mut bad: Vec<Error> = Vec::new();
        let mut row = 0;
        for batch in batches {
            let ids = self.id.as_ref().map(|(id, is_text)| ids(&batch, id, *is_text)).transpose()?;
            let numbers = ids.as_ref().and_then(|ids| ids.as_primitive_opt::<Int64Type>().cloned());
            let batch = Arc::new(batch);
            let mut columns = Batches::new(self.columns);
            let mut kept = Vec::new();
            for i in 0..batch.num_rows() {
                // Messages name a row by its own number, where it has one.
                let number = numbers.as_ref().filter(|ids| ids.is_valid(i)).map(|ids| ids.value(i));
                let number = number.and_then(|id| u64::try_from(id).ok()).unwrap_or(row);
                row += 1;
                let id = RowId::new(name.clone(), number, None);
                let raw = RawRow { id, content: Ok(Content::Columns(batch.clone(), i)), size: 0 };
                match self.processor.raw_row(raw)? {
                    Outcome::Kept(sample) => {
                        if sample.sample.weights.is_some() && !self.columns.weights {
                            return Err(wrong(
                                format!(
                                    "{}: it has weights of its own, and the schema has no column for them",
                                    sample.sample.id
                                ),
                                "prepare these rows with suasion.prepare, or give prompt_loss_weight a value, which adds the column",
                            ));
                        }
                        columns.push(&Record::of(&sample.sample, sample.text.as_deref()), &name)?;
                        kept.push(i);
                    }
                    Outcome::Failed { error, .. } if !self.skips => bad.push(error),
                    _ => {}
                }
            }
            let (_, parts) = columns.finish(&name)?;
            let mut at = 0;
            for part in parts {
                let mut arrays: Vec<ArrayRef> = part.columns()[1..].to_vec();
                if let Some(ids) = &ids {
                    arrays.insert(0, chosen(ids, &kept[at..at + part.num_rows()]));
                }
                at += part.num_rows();
                let whole = RecordBatch::try_new(self.schema.clone(), arrays);
                made.push(whole.map_err(|error| wrong(error.to_string(), "this is a bug in suasion"))?);
            }
        }
        match bad.is_empty() {
            true => Ok(made),
            false => Err(Error::of_bad_rows(bad).into()),
        }
    }
}

/// The column that identifies rows, as int64 or text.
fn ids(batch: &RecordBatch, name: &str, is_text: bool) -> Result<ArrayRef, Problem> {
    let Some(column) = batch.column_by_name(name) else {
        let names: Vec<&str> =
            batch.schema_ref().fields().iter().map(|field| field.name().as_str()).collect();
        let message = format!(
            "{NAME}: there is no column {name:?}, which identifies rows; there are {}",
            names.join(", ")
        );
        return Err(wrong(message, "name a column of the source with id=.., or leave id out"));
    };
    macro_rules! integers {
        ($type:ty) => {{
            let column = column.as_primitive::<$type>();
            let mut ids = Int64Builder::with_capacity(column.len());
            for id in column.iter() {
                ids.append_option(id.and_then(|id| i64::try_from(id).ok()));
            }
            Arc::new(ids.finish()) as ArrayRef
        }};
    }
    fn texts<'a>(column: impl Iterator<Item = Option<&'a str>>) -> ArrayRef {
        let mut ids = StringBuilder::new();
        column.for_each(|id| ids.append_option(id));
        Arc::new(ids.finish())
    }
    Ok(match (column.data_type(), is_text) {
        (DataType::Int8, false) => integers!(Int8Type),
        (DataType::Int16, false) => integers!(Int16Type),
        (DataType::Int32, false) => integers!(Int32Type),
        (DataType::Int64, false) => column.clone(),
        (DataType::UInt8, false) => integers!(UInt8Type),
        (DataType::UInt16, false) => integers!(UInt16Type),
        (DataType::UInt32, false) => integers!(UInt32Type),
        (DataType::UInt64, false) => integers!(UInt64Type),
        (DataType::Utf8, true) => column.clone(),
        (DataType::LargeUtf8, true) => texts(column.as_string::<i64>().iter()),
        (DataType::Utf8View, true) => texts(column.as_string_view().iter()),
        (other, _) => {
            let wanted = if is_text { "text" } else { "integers" };
            let message =
                format!("{NAME}: the column {name:?} is {other}, and rows are identified by {wanted}");
            return Err(wrong(message, "give id_type=\"string\" for text, id_type=\"int64\" for integers"));
        }
    })
}

/// The ids of the rows that were kept.
fn chosen(ids: &ArrayRef, kept: &[usize]) -> ArrayRef {
    if kept.len() == ids.len() {
        return ids.clone();
    }
    match ids.as_string_opt::<i32>() {
        Some(texts) => {
            let mut chosen = StringBuilder::new();
            kept.iter().for_each(|&i| chosen.append_option(texts.is_valid(i).then(|| texts.value(i))));
            Arc::new(chosen.finish())
        }
        None => {
            let numbers = ids.as_primitive::<Int64Type>();
            let mut chosen = Int64Builder::with_capacity(kept.len());
            kept.iter().for_each(|&i| chosen.append_option(numbers.is_valid(i).then(|| numbers.value(i))));
            Arc::new(chosen.finish())
        }
    }
}
