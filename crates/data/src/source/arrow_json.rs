//! Rows of record batches as JSON objects, so that later stages get the same rows from every format.

use super::lenient;
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
use arrow_schema::{DataType, Field, TimeUnit};
use serde_json::{Map, Number, Value};

/// Columns of media in multimodal rows.
pub(crate) const MEDIA: [&str; 6] = ["images", "image", "videos", "video", "audios", "audio"];

/// One row as the JSON object that `datasets` would write to JSON Lines.
///
/// Fields have the order of the columns. Nulls of columns are kept; nulls inside structs are dropped, since
/// `datasets` gives a struct the same fields in all rows. Columns declared as JSON (`arrow.json`) are parsed.
/// Times are milliseconds since 1970. NaN in a column, which pandas writes for a missing value, is null. Columns
/// of bytes that are not text are left out; those with a name of images, audio or video become `true`.
///
/// # Errors
/// A message that names the column, if its type has no JSON form.
pub fn fields(batch: &RecordBatch, row: usize) -> Result<Map<String, Value>, String> {
    let mut fields = Map::with_capacity(batch.num_columns());
    for (field, column) in batch.schema_ref().fields().iter().zip(batch.columns()) {
        match value(field, column, row) {
            Ok(value) => {
                let missing = lenient::number(&value) == Some("NaN");
                fields.insert(field.name().clone(), if missing { Value::Null } else { value });
            }
            // No format reads media, but later stages must know that the row has some.
            Err(_) if MEDIA.contains(&field.name().as_str()) => {
                fields.insert(field.name().clone(), Value::Bool(true));
            }
            Err(_) if holds_bytes(field.data_type()) => {}
            Err(e) => return Err(format!("column {:?}: {e}", field.name())),
        }
    }
    Ok(fields)
}

/// True for types that contain bytes, which need not be text.
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

/// True if [`fields`] converts or leaves out every possible value of the column.
pub(crate) fn never_fails(field: &Field) -> bool {
    match field.data_type() {
        DataType::Null
        | DataType::Boolean
        | DataType::Timestamp(..)
        | DataType::Date32
        | DataType::Date64 => true,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => !is_json(field),
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            never_fails(item)
        }
        kind => kind.is_numeric() && !kind.is_decimal() || holds_bytes(kind),
    }
}

/// True if [`fields`] fails on this column's value.
pub(crate) fn fails(field: &Field, column: &dyn Array, row: usize) -> bool {
    !never_fails(field) && value(field, column, row).is_err() && !holds_bytes(field.data_type())
}

/// True for columns of strings that are declared as JSON (`datasets.Json`).
pub(crate) fn is_json(field: &Field) -> bool {
    field.extension_type_name() == Some("arrow.json")
}

/// The column names, in order.
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
        DataType::Float16 => float(primitive!(Float16Type).to_f64()),
        DataType::Float32 => float(f64::from(primitive!(Float32Type))),
        DataType::Float64 => float(primitive!(Float64Type)),
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
            value(field, dictionary.values(), key.ok_or("a key that is not in its dictionary")?)?
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

fn float(value: f64) -> Value {
    Number::from_f64(value).map_or_else(|| lenient::not_finite(value), Value::Number)
}

fn text(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|e| {
        let at = e.valid_up_to();
        format!("its bytes are not UTF-8 text (byte {at} is 0x{:02x}); leave the column out", bytes[at])
    })
}

/// A string, parsed if the column is declared as JSON.
fn string(field: &Field, text: &str) -> Result<Value, String> {
    if is_json(field) {
        return lenient::parse(text).map_err(|(_, e)| format!("it is declared as JSON but is not JSON: {e}"));
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
    // Lists of tokens, labels and masks are common: match on the type once per list, not once per item.
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

/// A struct without its nulls. `datasets` gives every message, call and argument the fields of all others, null if
/// one had no such field; a template would render the nulls and the model would learn to write them. TRL drops
/// them too (`remove_none_values`). The bitmap does not show all nulls: columns of type null and dictionaries have
/// nulls without one.
fn object(array: &StructArray, row: usize) -> Result<Map<String, Value>, String> {
    let mut object = Map::with_capacity(array.num_columns());
    for (field, column) in array.fields().iter().zip(array.columns()) {
        let value = value(field, column, row).map_err(|e| format!("field {:?}: {e}", field.name()))?;
        if !value.is_null() {
            object.insert(field.name().clone(), value);
        }
    }
    Ok(object)
}

/// One map, from its entries: a struct of two columns, keys and values.
fn map(entries: &StructArray) -> Result<Value, String> {
    let mut object = Map::with_capacity(entries.len());
    let (key_field, value_field) = (&entries.fields()[0], &entries.fields()[1]);
    for i in 0..entries.len() {
        let Value::String(key) = value(key_field, entries.column(0), i)? else {
            return Err("the keys of its map are not strings; leave the column out or cast it".into());
        };
        let value = value(value_field, entries.column(1), i).map_err(|e| format!("key {key:?}: {e}"))?;
        object.insert(key, value);
    }
    Ok(Value::Object(object))
}

/// A count of units of `1 / per_second` seconds in milliseconds, rounded down as pandas does.
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
