//! Columns of lists of integers in a Parquet file: token ids and labels, which are nearly all of a prepared file.
//!
//! The general reader assembles nested columns of any kind, a value at a time. Here a column has one level of lists: where
//! all values are present, which is usual, its lists begin where the repetition level is 0. Levels are explained at
//! <https://parquet.apache.org/docs/file-format/nestedencoding/>.

use arrow_array::types::{ArrowPrimitiveType, Int32Type, Int64Type};
use arrow_array::{ArrayRef, GenericListArray, OffsetSizeTrait, PrimitiveArray};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, FieldRef};
use parquet::column::reader::{ColumnReaderImpl, get_column_reader, get_typed_column_reader};
use parquet::data_type as stored;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::ParquetMetaData;
use parquet::file::serialized_reader::SerializedPageReader;
use std::fs::File;
use std::sync::Arc;

/// Reads the next lists of a column: as many as asked for, fewer at the end.
pub(super) type Lists = Box<dyn FnMut(usize) -> Result<ArrayRef> + Send>;

/// Reads the column with an index, of an Arrow type; `None` where it has another form.
pub(super) fn lists(
    file: File,
    metadata: &Arc<ParquetMetaData>,
    column: usize,
    field: &Field,
) -> Option<Lists> {
    let schema = metadata.file_metadata().schema_descr();
    let mut leaves = (0..schema.num_columns()).filter(|&leaf| schema.get_column_root_idx(leaf) == column);
    let (Some(leaf), None) = (leaves.next(), leaves.next()) else { return None };
    let (DataType::List(item) | DataType::LargeList(item)) = field.data_type() else { return None };
    let large = matches!(field.data_type(), DataType::LargeList(_));
    // The levels of a list that may be null, its repetition, and values that may be null.
    let levels = i16::from(field.is_nullable()) + 1 + i16::from(item.is_nullable());
    let stored = schema.column(leaf);
    if stored.max_rep_level() != 1 || stored.max_def_level() != levels {
        return None;
    }
    let place = Place { file: Arc::new(file), metadata: metadata.clone(), leaf, item: item.clone() };
    let nullable = field.is_nullable();
    Some(match (item.data_type(), stored.physical_type(), large) {
        (DataType::Int32, parquet::basic::Type::INT32, false) => {
            place.read::<stored::Int32Type, Int32Type, i32>(nullable)
        }
        (DataType::Int32, parquet::basic::Type::INT32, true) => {
            place.read::<stored::Int32Type, Int32Type, i64>(nullable)
        }
        (DataType::Int64, parquet::basic::Type::INT64, false) => {
            place.read::<stored::Int64Type, Int64Type, i32>(nullable)
        }
        (DataType::Int64, parquet::basic::Type::INT64, true) => {
            place.read::<stored::Int64Type, Int64Type, i64>(nullable)
        }
        _ => return None,
    })
}

/// Where a column is.
struct Place {
    file: Arc<File>,
    metadata: Arc<ParquetMetaData>,
    /// The index of its only leaf.
    leaf: usize,
    /// The field of the items.
    item: FieldRef,
}

impl Place {
    fn read<S, A, O>(self, nullable: bool) -> Lists
    where
        S: stored::DataType<T = A::Native>,
        A: ArrowPrimitiveType,
        O: OffsetSizeTrait,
    {
        let (mut group, mut column) = (0, None::<ColumnReaderImpl<S>>);
        let (mut definitions, mut repetitions) = (Vec::new(), Vec::new());
        let mut expected = 0;
        Box::new(move |rows| {
            definitions.clear();
            repetitions.clear();
            let (mut values, mut read) = (Vec::with_capacity(expected), 0);
            while read < rows && group < self.metadata.num_row_groups() {
                let open = match &mut column {
                    Some(open) => open,
                    None => column.insert(self.open::<S>(group)?),
                };
                let levels = (Some(&mut definitions), Some(&mut repetitions));
                let (more, ..) = open.read_records(rows - read, levels.0, levels.1, &mut values)?;
                read += more;
                if read < rows {
                    (group, column) = (group + 1, None);
                }
            }
            expected = values.len();
            let levels = Levels { definitions: &definitions, repetitions: &repetitions };
            levels.assemble::<A, O>(values, &self.item, nullable)
        })
    }

    fn open<S: stored::DataType>(&self, group: usize) -> Result<ColumnReaderImpl<S>> {
        let group = self.metadata.row_group(group);
        let rows =
            usize::try_from(group.num_rows()).map_err(|_| ParquetError::General("negative rows".into()))?;
        let column = group.column(self.leaf);
        let pages = SerializedPageReader::new(self.file.clone(), column, rows, None)?;
        Ok(get_typed_column_reader(get_column_reader(column.column_descr_ptr(), Box::new(pages))))
    }
}

/// The levels of some rows.
struct Levels<'a> {
    definitions: &'a [i16],
    repetitions: &'a [i16],
}

impl Levels<'_> {
    fn assemble<A: ArrowPrimitiveType, O: OffsetSizeTrait>(
        &self,
        values: Vec<A::Native>,
        item: &FieldRef,
        nullable: bool,
    ) -> Result<ArrayRef> {
        if self.repetitions.first().is_some_and(|level| *level != 0) {
            return Err(ParquetError::General("a row group begins within a list".into()));
        }
        // A definition level from `held` on is an item of a list; the one below is an empty list.
        let held = i16::from(nullable) + 1;
        let whole = held + i16::from(item.is_nullable());
        let mut offsets: Vec<usize> = Vec::with_capacity(self.repetitions.len() / 16 + 1);
        let (values, valid) = if self.definitions.iter().fold(true, |all, level| all & (*level == whole)) {
            let starts = self.repetitions.iter().enumerate().filter(|(_, level)| **level == 0);
            offsets.extend(starts.map(|(i, _)| i));
            offsets.push(values.len());
            (PrimitiveArray::<A>::new(values.into(), None), None)
        } else {
            let (mut items, mut valid) = (Vec::with_capacity(self.definitions.len()), Vec::new());
            let mut values = values.into_iter();
            for (definition, repetition) in self.definitions.iter().zip(self.repetitions) {
                if *repetition == 0 {
                    offsets.push(items.len());
                    valid.push(*definition >= i16::from(nullable));
                }
                if *definition >= held {
                    items.push(if *definition == whole { values.next() } else { None });
                }
            }
            offsets.push(items.len());
            (PrimitiveArray::<A>::from_iter(items), Some(NullBuffer::from(valid)))
        };
        let offsets: Option<Vec<O>> = offsets.into_iter().map(O::from_usize).collect();
        let offsets =
            offsets.ok_or_else(|| ParquetError::General("a list is too long for its type".into()))?;
        let valid = valid.filter(|_| nullable);
        let lists = GenericListArray::try_new(
            item.clone(),
            OffsetBuffer::new(offsets.into()),
            Arc::new(values),
            valid,
        )?;
        Ok(Arc::new(lists))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::builder::{GenericListBuilder, PrimitiveBuilder};
    use arrow_array::{Array, RecordBatch};
    use arrow_schema::Schema;
    use parquet::arrow::ArrowWriter;
    use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};
    use parquet::basic::Compression;
    use parquet::file::properties::{WriterProperties, WriterVersion};
    use twox_hash::XxHash3_64;

    /// Numbers that are the same in every run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, end: usize) -> usize {
            self.0 += 1;
            XxHash3_64::oneshot(&self.0.to_le_bytes()) as usize % end
        }
    }

    /// A column of 300 lists; one in `null` of lists and of items is null, none where it is 0.
    fn column<A: ArrowPrimitiveType, O: OffsetSizeTrait>(
        random: &mut Random,
        null: usize,
    ) -> (Field, ArrayRef)
    where
        A::Native: TryFrom<i32>,
    {
        let item = Field::new("item", A::DATA_TYPE, null > 0 || random.below(2) == 0);
        let mut lists = GenericListBuilder::<O, _>::new(PrimitiveBuilder::<A>::new()).with_field(item);
        let longest = [2, 9, 40, 300][random.below(4)];
        let is_null = |random: &mut Random| null > 0 && random.below(null) == 0;
        for _ in 0..300 {
            if is_null(random) {
                lists.append_null();
                continue;
            }
            for _ in 0..random.below(longest) {
                let value = A::Native::try_from(random.below(1 << 30) as i32).ok();
                lists.values().append_option(value.filter(|_| !is_null(random)));
            }
            lists.append(true);
        }
        let lists = lists.finish();
        let nullable = null > 0 || random.below(2) == 0;
        (Field::new("ids", lists.data_type().clone(), nullable), Arc::new(lists))
    }

    #[test]
    fn lists_are_those_of_the_general_reader() {
        let mut random = Random(0);
        for i in 0..120 {
            let null = [0, 0, 4][i % 3];
            let (field, written) = match i % 4 {
                0 => column::<Int32Type, i32>(&mut random, null),
                1 => column::<Int64Type, i32>(&mut random, null),
                2 => column::<Int32Type, i64>(&mut random, null),
                _ => column::<Int64Type, i64>(&mut random, null),
            };
            let properties = WriterProperties::builder()
                .set_writer_version([WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0][random.below(2)])
                .set_compression([Compression::SNAPPY, Compression::UNCOMPRESSED][random.below(2)])
                .set_dictionary_enabled(random.below(2) == 0)
                .set_data_page_row_count_limit(1 + random.below(99))
                .set_write_batch_size(1 + random.below(64))
                .set_max_row_group_row_count(Some(50 + random.below(300)));
            let mut file = tempfile::tempfile().unwrap();
            let schema = Arc::new(Schema::new(vec![field.clone()]));
            let rows = RecordBatch::try_new(schema.clone(), vec![written]).unwrap();
            let mut writer = ArrowWriter::try_new(&mut file, schema, Some(properties.build())).unwrap();
            writer.write(&rows).unwrap();
            writer.close().unwrap();
            let metadata = ArrowReaderMetadata::load(&file, Default::default()).unwrap();
            let batch = 1 + random.below(150);
            let general = ParquetRecordBatchReaderBuilder::try_new(file.try_clone().unwrap()).unwrap();
            let batches: Vec<RecordBatch> =
                general.with_batch_size(batch).build().unwrap().collect::<Result<_, _>>().unwrap();
            let mut next = lists(file, metadata.metadata(), 0, metadata.schema().field(0)).unwrap();
            for expected in batches {
                assert_eq!(&next(batch).unwrap(), expected.column(0), "column {i}");
            }
            assert!(next(batch).unwrap().is_empty());
        }
    }
}
