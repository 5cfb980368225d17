//! Reads a tokenised row from Arrow arrays.

use super::fields::{Attention, Fields, Key, Seen, origins, weight};
use crate::source::{fails, is_json};
use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowPrimitiveType, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type,
    UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, RecordBatch};
use arrow_buffer::NullBuffer;
use arrow_schema::{DataType, Field};
use std::ops::Range;

/// The fields of a row; `None` if it is not well-formed or a column has an unusual type.
pub fn read(batch: &RecordBatch, row: usize) -> Option<Fields> {
    let (mut fields, mut seen) = (Fields::default(), Seen::default());
    for (field, column) in batch.schema_ref().fields().iter().zip(batch.columns()) {
        let Some(key) = Key::of(field.name()) else {
            // The general reader converts every column and would fail.
            if fails(field, column, row) {
                return None;
            }
            continue;
        };
        seen.note(key)?;
        if column.is_null(row) {
            continue;
        }
        let items = || list(column, row);
        match key {
            Key::InputIds => fields.input_ids = Some(integers(&items()?)?),
            Key::Labels => fields.labels = Some(integers(&items()?)?),
            Key::CompletionMask => fields.completion_mask = Some(mask(&items()?)?),
            Key::AssistantMasks => fields.assistant_masks = Some(mask(&items()?)?),
            Key::AttentionMask => fields.attention_mask = Some(attention(&items()?)?),
            Key::Rows => fields.rows = Some(integers(&items()?)?),
            Key::SeqLengths => fields.seq_lengths = Some(integers(&items()?)?),
            Key::PositionIds => fields.position_ids = Some(integers(&items()?)?),
            Key::PrefixRanges => fields.prefix_ranges = Some(ranges(&items()?)?),
            Key::Weights => fields.weights = Some(weights(&items()?)?),
            Key::Origins => fields.origins = Some(origins(string(field, column, row)?)?),
            Key::Text => fields.text = Some(string(field, column, row)?.to_string()),
            Key::Unknown => return None,
        }
    }
    Some(fields)
}

/// The items of a list, as a range of an array.
struct Items<'a> {
    array: &'a dyn Array,
    range: Range<usize>,
}

/// The list of a row; `None` if it has nulls or is not a list.
fn list(column: &dyn Array, row: usize) -> Option<Items<'_>> {
    let (array, range): (&dyn Array, Range<usize>) = match column.data_type() {
        DataType::List(_) => {
            let list = column.as_list::<i32>();
            let ends = list.value_offsets();
            (list.values(), usize::try_from(ends[row]).ok()?..usize::try_from(ends[row + 1]).ok()?)
        }
        DataType::LargeList(_) => {
            let list = column.as_list::<i64>();
            let ends = list.value_offsets();
            (list.values(), usize::try_from(ends[row]).ok()?..usize::try_from(ends[row + 1]).ok()?)
        }
        DataType::FixedSizeList(..) => {
            let list = column.as_fixed_size_list();
            let start = list.value_offset_at(row);
            (list.values(), start..start + usize::try_from(list.value_length()).ok()?)
        }
        _ => return None,
    };
    let null = |nulls: &NullBuffer| range.clone().any(|i| nulls.is_null(i));
    (!array.nulls().is_some_and(null)).then_some(Items { array, range })
}

/// Integers of any width; `None` if one is out of the range of `T`.
fn integers<T>(items: &Items<'_>) -> Option<Vec<T>>
where
    T: Default
        + TryFrom<i8>
        + TryFrom<i16>
        + TryFrom<i32>
        + TryFrom<i64>
        + TryFrom<u8>
        + TryFrom<u16>
        + TryFrom<u32>
        + TryFrom<u64>,
{
    fn cast<A: ArrowPrimitiveType, T: Default + TryFrom<A::Native>>(items: &Items<'_>) -> Option<Vec<T>> {
        let values = &items.array.as_primitive::<A>().values()[items.range.clone()];
        // Two branch-free loops, so that the compiler vectorises both.
        let fit = values.iter().fold(true, |fit, &value| fit & T::try_from(value).is_ok());
        fit.then(|| values.iter().map(|&value| T::try_from(value).unwrap_or_default()).collect())
    }
    match items.array.data_type() {
        DataType::Int8 => cast::<Int8Type, T>(items),
        DataType::Int16 => cast::<Int16Type, T>(items),
        DataType::Int32 => cast::<Int32Type, T>(items),
        DataType::Int64 => cast::<Int64Type, T>(items),
        DataType::UInt8 => cast::<UInt8Type, T>(items),
        DataType::UInt16 => cast::<UInt16Type, T>(items),
        DataType::UInt32 => cast::<UInt32Type, T>(items),
        DataType::UInt64 => cast::<UInt64Type, T>(items),
        _ => None,
    }
}

/// Booleans, or integers that are 0 or 1.
fn mask(items: &Items<'_>) -> Option<Vec<bool>> {
    if items.array.data_type() == &DataType::Boolean {
        let values = items.array.as_boolean().values();
        return Some(items.range.clone().map(|i| values.value(i)).collect());
    }
    let bits: Vec<u8> = integers(items)?;
    bits.iter().all(|&bit| bit <= 1).then(|| bits.iter().map(|&bit| bit == 1).collect())
}

fn attention(items: &Items<'_>) -> Option<Attention> {
    if let Some(mask) = mask(items) {
        return Some(Attention::Mask(mask));
    }
    integers(items).map(Attention::Numbers)
}

fn ranges(items: &Items<'_>) -> Option<Vec<Range<u32>>> {
    let range = |row| match integers::<u32>(&list(items.array, row)?)?.as_slice() {
        [start, end] => Some(*start..*end),
        _ => None,
    };
    items.range.clone().map(range).collect()
}

fn weights(items: &Items<'_>) -> Option<Vec<f32>> {
    fn cast<A: ArrowPrimitiveType>(items: &Items<'_>) -> Option<Vec<f32>>
    where
        f64: From<A::Native>,
    {
        let values = &items.array.as_primitive::<A>().values()[items.range.clone()];
        values.iter().map(|&value| weight(value.into())).collect()
    }
    match items.array.data_type() {
        DataType::Float16 => cast::<Float16Type>(items),
        DataType::Float32 => cast::<Float32Type>(items),
        DataType::Float64 => cast::<Float64Type>(items),
        _ => None,
    }
}

/// A string; `None` if it is declared as JSON or of another type.
fn string<'a>(field: &Field, column: &'a dyn Array, row: usize) -> Option<&'a str> {
    if is_json(field) {
        return None;
    }
    match column.data_type() {
        DataType::Utf8 => Some(column.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => Some(column.as_string::<i64>().value(row)),
        DataType::Utf8View => Some(column.as_string_view().value(row)),
        _ => None,
    }
}
