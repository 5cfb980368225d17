//! Columns of integer lists in a Parquet file: token ids and labels, which make up most of a prepared file.
//!
//! The general reader assembles nested columns of any kind, one value at a time. Here a column has one level of
//! lists: a list begins where the repetition level is 0, and if all values are present, as usual, they are copied
//! in bulk. Levels are explained at <https://parquet.apache.org/docs/file-format/nestedencoding/>.

use super::hybrid::Hybrid;
use super::numbers::{Numbers, Present};
use arrow_array::{Array, ArrayRef, GenericListArray, OffsetSizeTrait};
use arrow_buffer::{Buffer, OffsetBuffer};
use arrow_schema::{DataType, Field, FieldRef};
use memchr::memchr_iter;
use parquet::basic::{Encoding, Type};
use parquet::column::page::{Page, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::ParquetMetaData;
use parquet::file::serialized_reader::SerializedPageReader;
use std::fs::File;
use std::sync::Arc;

/// Reads the next lists of a column: as many as requested, fewer at the end.
pub(super) type Lists = Box<dyn FnMut(usize) -> Result<ArrayRef> + Send>;

/// Number of levels that are decoded at a time.
const BLOCK: usize = 1 << 12;

/// A reader of the column with an index, of an Arrow type; `None` if it has another structure or encoding. 64-bit
/// numbers are returned as 32-bit numbers in batches in which all fit, as labels do.
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
    let bytes = match (item.data_type(), schema.column(leaf).physical_type()) {
        (DataType::Int32, Type::INT32) => 4,
        (DataType::Int64, Type::INT64) => 8,
        _ => return None,
    };
    let held = u8::from(field.is_nullable()) + 1;
    let whole = held + u8::from(item.is_nullable());
    let known = |encoding| {
        matches!(encoding, Encoding::PLAIN | Encoding::RLE)
            || matches!(encoding, Encoding::PLAIN_DICTIONARY | Encoding::RLE_DICTIONARY)
    };
    if schema.column(leaf).max_rep_level() != 1
        || schema.column(leaf).max_def_level() != i16::from(whole)
        || !metadata.row_groups().iter().all(|group| group.column(leaf).encodings().all(known))
    {
        return None;
    }
    let (file, metadata, item) = (Arc::new(file), metadata.clone(), item.clone());
    let column = Column { file, metadata, leaf, item, bytes, nullable: field.is_nullable(), held, whole };
    Some(match field.data_type() {
        DataType::List(_) => column.read::<i32>(),
        _ => column.read::<i64>(),
    })
}

/// A column of a file.
struct Column {
    file: Arc<File>,
    metadata: Arc<ParquetMetaData>,
    /// The index of its only leaf.
    leaf: usize,
    /// The field of the items.
    item: FieldRef,
    /// The stored size of a number.
    bytes: usize,
    /// True if a list may be null.
    nullable: bool,
    /// The lowest definition level of an item; the level below it is an empty list.
    held: u8,
    /// The definition level of an item that is not null.
    whole: u8,
}

impl Column {
    fn read<O: OffsetSizeTrait>(self) -> Lists {
        let mut levels = Levels::new(self);
        let mut expected = 0;
        Box::new(move |rows| {
            let mut batch = Batch { numbers: Numbers::with_capacity(expected), ..Batch::default() };
            while levels.fill()? && levels.take(rows, &mut batch)? {}
            // Batches of as many rows vary little in size.
            expected = batch.numbers.len() / 8 * 9;
            batch.array::<O>(&levels.column.item)
        })
    }

    /// The pages of a row group.
    fn pages(&self, group: usize) -> Result<SerializedPageReader<File>> {
        let group = self.metadata.row_group(group);
        let rows = usize::try_from(group.num_rows()).map_err(|_| fault("negative rows"))?;
        SerializedPageReader::new(self.file.clone(), group.column(self.leaf), rows, None)
    }
}

/// The lists read for a batch.
#[derive(Default)]
struct Batch {
    /// The start of each list.
    starts: Vec<usize>,
    lists: Present,
    numbers: Numbers,
    items: Present,
}

impl Batch {
    fn array<O: OffsetSizeTrait>(self, item: &Field) -> Result<ArrayRef> {
        let Batch { mut starts, lists, numbers, items } = self;
        let (rows, n) = (starts.len(), numbers.len());
        starts.push(n);
        let offsets: Option<Vec<O>> = starts.into_iter().map(O::from_usize).collect();
        let offsets = offsets.ok_or_else(|| fault("a list is too long for its type"))?;
        let items = numbers.array(items.nulls(n));
        let item = Arc::new(item.clone().with_data_type(items.data_type().clone()));
        let lists =
            GenericListArray::try_new(item, OffsetBuffer::new(offsets.into()), items, lists.nulls(rows))?;
        Ok(Arc::new(lists))
    }
}

/// The levels and values of a column, across pages.
struct Levels {
    column: Column,
    /// The next row group, and the pages of the one before it.
    group: usize,
    pages: Option<SerializedPageReader<File>>,
    dictionary: Numbers,
    /// The rest of the current page.
    page: Option<Data>,
    /// True before the first level of a row group.
    first: bool,
    /// A block of levels, the number taken from it, and the starts of lists that were not taken.
    repetitions: Vec<u8>,
    definitions: Vec<u8>,
    taken: usize,
    starts: std::vec::IntoIter<usize>,
}

/// A page of data.
struct Data {
    /// Number of levels that are not yet decoded.
    left: usize,
    repetitions: Hybrid,
    definitions: Hybrid,
    values: Values,
}

enum Values {
    /// Consecutive numbers, and the offset of the next.
    Plain(Buffer, usize),
    /// Indices in the dictionary.
    Indexes(Hybrid),
}

impl Levels {
    fn new(column: Column) -> Levels {
        Levels {
            column,
            group: 0,
            pages: None,
            dictionary: Numbers::default(),
            page: None,
            first: true,
            repetitions: Vec::new(),
            definitions: Vec::new(),
            taken: 0,
            starts: Vec::new().into_iter(),
        }
    }

    /// Decodes the next block, if all of this one was taken; false at the end of the file.
    fn fill(&mut self) -> Result<bool> {
        if self.taken < self.definitions.len() {
            return Ok(true);
        }
        while self.page.as_ref().is_none_or(|page| page.left == 0) {
            if !self.turn()? {
                return Ok(false);
            }
        }
        let Some(page) = &mut self.page else { return Ok(false) };
        let n = page.left.min(BLOCK);
        page.left -= n;
        self.taken = 0;
        for (levels, from) in
            [(&mut self.repetitions, &mut page.repetitions), (&mut self.definitions, &mut page.definitions)]
        {
            levels.clear();
            from.take(n, |level, count| levels.resize(levels.len() + count, level as u8))?;
        }
        if std::mem::take(&mut self.first) && self.repetitions[0] != 0 {
            return Err(fault("a row group begins within a list"));
        }
        self.starts = memchr_iter(0, &self.repetitions).collect::<Vec<_>>().into_iter();
        Ok(true)
    }

    /// Moves to the next page; false at the end of the file.
    fn turn(&mut self) -> Result<bool> {
        let Some(pages) = &mut self.pages else {
            if self.group == self.column.metadata.num_row_groups() {
                return Ok(false);
            }
            self.pages = Some(self.column.pages(self.group)?);
            self.group += 1;
            self.first = true;
            self.dictionary = Numbers::default();
            return Ok(true);
        };
        match pages.get_next_page()? {
            None => self.pages = None,
            Some(Page::DictionaryPage { buf, .. }) => self.dictionary.extend(&buf, self.column.bytes),
            Some(page) => self.page = Some(Data::of(&page, self.column.whole)?),
        }
        Ok(true)
    }

    /// Moves lists of this block into a batch, until it has `rows` of them. True if the last of them may continue
    /// in the next block.
    fn take(&mut self, rows: usize, batch: &mut Batch) -> Result<bool> {
        let begun = self.starts.len().min(rows - batch.starts.len());
        let range = self.taken..self.starts.as_slice().get(begun).copied().unwrap_or(self.definitions.len());
        let Some(page) = self.page.as_mut().filter(|_| !range.is_empty()) else { return Ok(false) };
        let definitions = &self.definitions[range.clone()];
        let whole = |level: &&u8| **level == self.column.whole;
        let there = definitions.iter().filter(whole).count();
        let starts = self.starts.by_ref().take(begun);
        let mut take = |out: &mut Numbers| page.values.take(there, self.column.bytes, &self.dictionary, out);
        if there == definitions.len() {
            batch.starts.extend(starts.map(|start| batch.numbers.len() + start - range.start));
            take(&mut batch.numbers)?;
        } else {
            let mut numbers = Numbers::with_capacity(there);
            take(&mut numbers)?;
            let mut numbers = (0..there).filter_map(|i| numbers.get(i));
            let mut starts = starts.peekable();
            for (i, level) in range.clone().zip(definitions) {
                if starts.next_if_eq(&i).is_some() {
                    if *level < u8::from(self.column.nullable) {
                        batch.lists.null(batch.starts.len());
                    }
                    batch.starts.push(batch.numbers.len());
                }
                if *level == self.column.whole {
                    batch.numbers.add(numbers.next().unwrap_or_default(), 1);
                } else if *level >= self.column.held {
                    batch.items.null(batch.numbers.len());
                    batch.numbers.add(0, 1);
                }
            }
        }
        self.taken = range.end;
        Ok(self.taken == self.definitions.len())
    }
}

impl Data {
    /// Opens a data page; definition levels are at most `whole`.
    fn of(page: &Page, whole: u8) -> Result<Data> {
        let buffer = Buffer::from(page.buffer().clone());
        let (repetitions, definitions, at) = match page {
            Page::DataPageV2 { rep_levels_byte_len, def_levels_byte_len, .. } => {
                let end = *rep_levels_byte_len as usize;
                let last = end + *def_levels_byte_len as usize;
                (0..end, end..last, last)
            }
            Page::DataPage {
                def_level_encoding: Encoding::RLE, rep_level_encoding: Encoding::RLE, ..
            } => {
                // The levels are preceded by their length in bytes.
                let levels = |at: usize| {
                    let bytes = buffer.get(at..)?.first_chunk()?;
                    Some(at + 4..at + 4 + u32::from_le_bytes(*bytes) as usize)
                };
                let repetitions = levels(0).ok_or_else(ends)?;
                let definitions = levels(repetitions.end).ok_or_else(ends)?;
                let at = definitions.end;
                (repetitions, definitions, at)
            }
            _ => return Err(fault("a page has levels of another encoding")),
        };
        let part = |range: std::ops::Range<usize>| match buffer.get(range.clone()) {
            Some(_) => Ok(buffer.slice_with_length(range.start, range.len())),
            None => Err(ends()),
        };
        let values = part(at..buffer.len().max(at))?;
        let values = match page.encoding() {
            Encoding::PLAIN => Values::Plain(values, 0),
            Encoding::PLAIN_DICTIONARY | Encoding::RLE_DICTIONARY => {
                let width = *values.first().ok_or_else(ends)?;
                Values::Indexes(Hybrid::new(values.slice(1), u32::from(width))?)
            }
            _ => return Err(fault("a page has values of another encoding")),
        };
        Ok(Data {
            left: page.num_values() as usize,
            repetitions: Hybrid::new(part(repetitions)?, 1)?,
            definitions: Hybrid::new(part(definitions)?, u8::BITS - whole.leading_zeros())?,
            values,
        })
    }
}

impl Values {
    /// Adds the next `n` numbers, which are stored in `bytes` bytes each.
    fn take(&mut self, n: usize, bytes: usize, dictionary: &Numbers, out: &mut Numbers) -> Result<()> {
        match self {
            Values::Plain(stored, at) => {
                let range = *at..*at + n * bytes;
                *at = range.end;
                out.extend(stored.get(range).ok_or_else(ends)?, bytes);
                Ok(())
            }
            Values::Indexes(indexes) => {
                let mut known = true;
                indexes.take(n, |index, count| match dictionary.get(index as usize) {
                    Some(number) => out.add(number, count),
                    None => known = false,
                })?;
                known.then_some(()).ok_or_else(|| fault("a value is not in its dictionary"))
            }
        }
    }
}

fn fault(what: &str) -> ParquetError {
    ParquetError::General(what.into())
}

fn ends() -> ParquetError {
    fault("a page ends early")
}

#[cfg(test)]
mod tests {
    use super::super::arrow_json::fields;
    use super::*;
    use arrow_array::builder::{GenericListBuilder, PrimitiveBuilder};
    use arrow_array::types::{ArrowPrimitiveType, Int32Type, Int64Type};
    use arrow_array::{Array, RecordBatch};
    use arrow_schema::Schema;
    use parquet::arrow::ArrowWriter;
    use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};
    use parquet::basic::Compression;
    use parquet::file::properties::{WriterProperties, WriterVersion};
    use twox_hash::XxHash3_64;

    /// A deterministic random generator.
    struct Random(u64);

    impl Random {
        fn below(&mut self, end: usize) -> usize {
            self.0 += 1;
            XxHash3_64::oneshot(&self.0.to_le_bytes()) as usize % end
        }
    }

    /// A column of 300 lists; one in `null` lists and items is null, none if it is 0.
    fn column<A: ArrowPrimitiveType, O: OffsetSizeTrait>(
        random: &mut Random,
        null: usize,
    ) -> (Field, ArrayRef)
    where
        A::Native: TryFrom<i64>,
    {
        let item = Field::new("item", A::DATA_TYPE, null > 0 || random.below(2) == 0);
        let mut lists = GenericListBuilder::<O, _>::new(PrimitiveBuilder::<A>::new()).with_field(item);
        let longest = [2, 9, 40, 300][random.below(4)];
        let large = A::DATA_TYPE == DataType::Int64 && random.below(2) == 0;
        let is_null = |random: &mut Random| null > 0 && random.below(null) == 0;
        for _ in 0..300 {
            if is_null(random) {
                lists.append_null();
                continue;
            }
            for _ in 0..random.below(longest) {
                // Usually 32 bits, sometimes more.
                let bits = if large && random.below(500) == 0 { 20 } else { 0 };
                let value = A::Native::try_from((random.below(1 << 30) as i64) << bits).ok();
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
        let (mut random, mut columns, mut narrowed, mut wide) = (Random(0), 0, 0, 0);
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
            // Without a dictionary, version 2 packs differences, which are left to the general reader.
            let Some(mut next) = lists(file, metadata.metadata(), 0, metadata.schema().field(0)) else {
                continue;
            };
            columns += 1;
            for expected in batches {
                let read = next(batch).unwrap();
                let narrow = read.data_type() != expected.column(0).data_type();
                narrowed += usize::from(narrow);
                wide += usize::from(i % 2 == 1 && !narrow);
                if !narrow {
                    assert_eq!(&read, expected.column(0), "column {i}");
                }
                let field = field.clone().with_data_type(read.data_type().clone());
                let read = RecordBatch::try_new(Arc::new(Schema::new(vec![field])), vec![read]).unwrap();
                for row in 0..expected.num_rows() {
                    assert_eq!(fields(&read, row), fields(&expected, row), "column {i}");
                }
            }
            assert!(next(batch).unwrap().is_empty());
        }
        assert!(columns > 60 && narrowed > 20 && wide > 20, "{columns} {narrowed} {wide}");
    }
}
