//! Reads a Parquet file: several threads decode columns, and batches contain the rows in file order.
//!
//! Decompression and the assembly of lists take longer than all the work of `verify` on a prepared row. Columns
//! are independent of each other, so each thread decodes some of them, in batches of the same rows.

use super::arrow_json::never_fails;
use super::lists::lists;
use crate::guard::{guard, start_thread};
use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{Field, Schema};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, mpsc};

/// Maximum number of rows in a batch.
const BATCH_ROWS: usize = 512;

/// Target size of a batch in bytes; a single row may exceed it.
pub(super) const BATCH_BYTES: usize = 4 << 20;

/// A column with a higher compression ratio may hold one huge value that many rows share.
const SHRUNK: i64 = 500;

/// Number of batches that a thread decodes ahead.
const AHEAD: usize = 2;

/// Selects columns of a Parquet file: from the names of all columns, in order, a flag for each.
pub type Projection = Arc<dyn Fn(&[&str]) -> Vec<bool> + Send + Sync>;

/// A Parquet file, read once from start to end.
pub(super) struct Parquet {
    path: Arc<Path>,
    metadata: ArrowReaderMetadata,
    /// The columns to read, by their index in the file's schema.
    columns: Vec<usize>,
    /// Started by the first batch.
    decoding: Option<Decoding>,
    /// Rows read so far.
    pub done: u64,
}

/// The running decoders of a file.
struct Decoding {
    decoder: Decoder,
    /// For each column to read, its index in the output of the decoders.
    places: Vec<usize>,
    schema: Arc<Schema>,
}

/// The next batch of some columns, `None` after the last.
type Decoder = Box<dyn FnMut() -> Result<Option<Vec<ArrayRef>>, String> + Send>;

impl Parquet {
    pub fn open(path: &Arc<Path>, file: &File, size: u64) -> Result<Parquet, String> {
        let metadata = guard(|| ArrowReaderMetadata::load(file, ArrowReaderOptions::default()))?;
        check_columns(metadata.metadata(), size)?;
        let columns = (0..metadata.schema().fields().len()).collect();
        let parquet = Parquet { path: path.clone(), metadata, columns, decoding: None, done: 0 };
        // Reports unsupported schemas early.
        parquet.reader(&parquet.columns)?;
        Ok(parquet)
    }

    /// Restricts the reader to the selected columns, unless rows were read already.
    pub fn project(&mut self, projection: &Projection) {
        if self.decoding.is_none() {
            let fields = self.metadata.schema().fields();
            let names: Vec<&str> = fields.iter().map(|field| field.name().as_str()).collect();
            let wanted = projection(&names);
            // Columns with values that have no JSON form are read too, so that their rows fail as they would
            // without a projection; and at least one column, for the number of rows.
            let first = self.columns.first().copied();
            self.columns.retain(|&i| wanted[i] || !never_fails(&fields[i]));
            if self.columns.is_empty() {
                self.columns.extend(first);
            }
        }
    }

    pub fn rows(&self) -> u64 {
        u64::try_from(self.metadata.metadata().file_metadata().num_rows()).unwrap_or(0)
    }

    pub fn next(&mut self) -> Result<Option<RecordBatch>, String> {
        if self.decoding.is_none() {
            self.decoding = Some(self.decode(rayon::current_num_threads())?);
        }
        let batch = match &mut self.decoding {
            Some(decoding) => decoding.next()?,
            None => None,
        };
        self.done += batch.as_ref().map_or(0, |b| b.num_rows() as u64);
        let (done, rows) = (self.done, self.rows());
        if batch.is_none() && done != rows {
            return Err(format!("it has {done} rows and says {}", rows.max(1)));
        }
        Ok(batch)
    }

    /// Starts decoding the columns on up to `threads` threads.
    fn decode(&self, threads: usize) -> Result<Decoding, String> {
        let (mut decoders, mut order) = (Vec::new(), Vec::with_capacity(self.columns.len()));
        let groups = self.share(threads);
        for group in &groups {
            let decoder = self.decoder(group, &mut order)?;
            decoders.push(match groups.len() {
                1 => decoder,
                _ => match ahead(decoder) {
                    Ok(decoder) => decoder,
                    // If no thread can be started, this one decodes.
                    Err(_) => return self.decode(1),
                },
            });
        }
        let place = |column| order.iter().position(|other| other == column);
        let places = self.columns.iter().filter_map(place).collect();
        let schema = self.metadata.schema().project(&self.columns).map_err(|e| e.to_string())?;
        Ok(Decoding { decoder: together(decoders), places, schema: Arc::new(schema) })
    }

    /// A decoder of some columns, which appends their order to `order`: lists of integers, then all others.
    fn decoder(&self, columns: &[usize], order: &mut Vec<usize>) -> Result<Decoder, String> {
        let (mut decoders, mut others) = (Vec::<Decoder>::new(), Vec::new());
        let metadata = self.metadata.metadata();
        let rows = batch_rows(metadata);
        for &column in columns {
            let Some(mut lists) =
                lists(self.open_again()?, metadata, column, self.metadata.schema().field(column))
            else {
                others.push(column);
                continue;
            };
            decoders.push(Box::new(move || {
                let next = guard(|| lists(rows))?;
                Ok((!next.is_empty()).then(|| vec![next]))
            }));
            order.push(column);
        }
        if !others.is_empty() {
            let mut reader = self.reader(&others)?;
            decoders.push(Box::new(move || {
                let next = guard(|| reader.next().transpose())?;
                Ok(next.map(|batch| batch.columns().to_vec()))
            }));
            order.extend(others);
        }
        Ok(together(decoders))
    }

    /// The columns in groups of similar size, one for each thread; each group in file order.
    fn share(&self, threads: usize) -> Vec<Vec<usize>> {
        let mut sizes = vec![0i64; self.metadata.schema().fields().len()];
        let parquet = self.metadata.parquet_schema();
        for group in self.metadata.metadata().row_groups() {
            for (leaf, column) in group.columns().iter().enumerate() {
                let size = &mut sizes[parquet.get_column_root_idx(leaf)];
                *size = size.saturating_add(column.uncompressed_size());
            }
        }
        let mut largest_first = self.columns.clone();
        largest_first.sort_by_key(|&column| std::cmp::Reverse(sizes[column]));
        let mut groups = vec![(0i64, Vec::new()); threads.min(self.columns.len()).max(1)];
        for column in largest_first {
            if let Some((size, group)) = groups.iter_mut().min_by_key(|(size, _)| *size) {
                *size = size.saturating_add(sizes[column].max(1));
                group.push(column);
            }
        }
        let mut groups: Vec<Vec<usize>> = groups.into_iter().map(|(_, group)| group).collect();
        groups.iter_mut().for_each(|group| group.sort_unstable());
        groups
    }

    /// The general reader of some columns.
    fn reader(&self, columns: &[usize]) -> Result<ParquetRecordBatchReader, String> {
        let mask = ProjectionMask::roots(self.metadata.parquet_schema(), columns.iter().copied());
        let metadata = self.metadata.clone();
        let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(self.open_again()?, metadata);
        let batch = batch_rows(self.metadata.metadata());
        guard(|| builder.with_batch_size(batch).with_projection(mask).build())
    }

    /// Opens the file again for another decoder: clones of an open file share one position.
    fn open_again(&self) -> Result<File, String> {
        File::open(&self.path).map_err(|e| e.to_string())
    }
}

impl Decoding {
    fn next(&mut self) -> Result<Option<RecordBatch>, String> {
        let Some(columns) = (self.decoder)()? else { return Ok(None) };
        let columns: Vec<ArrayRef> = self.places.iter().map(|&place| columns[place].clone()).collect();
        // Lists may have narrower numbers than the file declares.
        let kind = |(field, column): (&Arc<Field>, &ArrayRef)| match field.data_type() == column.data_type() {
            true => field.clone(),
            false => Arc::new(field.as_ref().clone().with_data_type(column.data_type().clone())),
        };
        let fields: Vec<Arc<Field>> = self.schema.fields().iter().zip(&columns).map(kind).collect();
        let schema = Schema::new_with_metadata(fields, self.schema.metadata().clone());
        RecordBatch::try_new(Arc::new(schema), columns).map(Some).map_err(|e| e.to_string())
    }
}

/// Joins the columns of several decoders.
fn together(mut decoders: Vec<Decoder>) -> Decoder {
    Box::new(move || {
        // If several decoders fail, the error of the first decoder is reported.
        let parts: Vec<_> = decoders.iter_mut().map(|next| next()).collect::<Result<_, _>>()?;
        match parts.iter().flatten().count() {
            0 => Ok(None),
            n if n == parts.len() => Ok(Some(parts.into_iter().flatten().flatten().collect())),
            _ => Err("its columns have different numbers of rows".into()),
        }
    })
}

/// Runs a decoder on its own thread. The thread ends after the last batch, after an error, or when the file is
/// dropped.
fn ahead(mut next: Decoder) -> io::Result<Decoder> {
    let (sender, receiver) = mpsc::sync_channel(AHEAD);
    start_thread(move || {
        loop {
            let batch = next();
            let last = !matches!(batch, Ok(Some(_)));
            if sender.send(batch).is_err() || last {
                return;
            }
        }
    })?;
    Ok(Box::new(move || receiver.recv().unwrap_or(Ok(None))))
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

/// Rows per batch that stay below the size of a batch, by the largest mean row size of a row group.
fn batch_rows(metadata: &ParquetMetaData) -> usize {
    let groups = metadata.row_groups().iter().filter(|group| group.num_rows() > 0);
    let mean = |group: &RowGroupMetaData| group.total_byte_size().max(0) / group.num_rows();
    let shared = |group: &RowGroupMetaData| {
        let sizes =
            group.columns().iter().map(|column| (column.uncompressed_size(), column.compressed_size()));
        let shrunk = sizes.filter(|(large, small)| *large > 1 << 24 && large / SHRUNK > *small);
        shrunk.map(|(large, _)| large).max().unwrap_or(0)
    };
    let largest = groups.map(|group| mean(group).max(shared(group))).max();
    rows_of(usize::try_from(largest.unwrap_or(0)).unwrap_or(usize::MAX))
}

/// The number of rows of this size in a batch.
pub(super) fn rows_of(row_bytes: usize) -> usize {
    (BATCH_BYTES / row_bytes.max(1)).clamp(1, BATCH_ROWS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::types::Int32Type;
    use arrow_array::{Int64Array, ListArray, StringArray};
    use parquet::arrow::ArrowWriter;

    #[test]
    fn any_number_of_threads_reads_the_same_batches() {
        let folder = tempfile::tempdir().unwrap();
        let path: Arc<Path> = folder.path().join("rows.parquet").into();
        let numbers =
            |step: i64| Arc::new(Int64Array::from_iter((0..2000).map(|i| Some(i * step)))) as ArrayRef;
        let text = Arc::new(StringArray::from_iter_values((0..2000).map(|i| "x".repeat(i % 7)))) as ArrayRef;
        let lists = (0..2000).map(|i| Some((0..i % 5).map(Some)));
        let lists = Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(lists)) as ArrayRef;
        let columns = [("a", numbers(1)), ("b", text), ("c", lists), ("d", numbers(5))];
        let written = RecordBatch::try_from_iter(columns).unwrap();
        let file = File::create(&path).unwrap();
        let mut writer = ArrowWriter::try_new(file, written.schema(), None).unwrap();
        writer.write(&written).unwrap();
        writer.close().unwrap();
        let file = File::open(&path).unwrap();
        let size = file.metadata().unwrap().len();
        for kept in [[0, 1, 2, 3].as_slice(), &[1, 3]] {
            let expected = written.project(kept).unwrap();
            for threads in [1, 2, 3, 9] {
                let mut parquet = Parquet::open(&path, &file, size).unwrap();
                parquet.columns.retain(|column| kept.contains(column));
                parquet.decoding = Some(parquet.decode(threads).unwrap());
                assert_eq!(parquet.share(threads).len(), threads.min(kept.len()));
                let mut from = 0;
                while let Some(batch) = parquet.next().unwrap() {
                    assert_eq!(batch, expected.slice(from, batch.num_rows()), "{threads} threads");
                    from += batch.num_rows();
                }
                assert_eq!(from, 2000);
            }
        }
    }
}
