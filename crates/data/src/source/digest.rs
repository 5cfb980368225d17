//! A hash of the content of rows, independent of their storage: the division of columns into batches, and the
//! Arrow types of lists and strings, make no difference.
//!
//! Each column is hashed as a tree of streams: values, lengths and validity separately, so that batches can be
//! appended.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, GenericListArray, OffsetSizeTrait, RecordBatch};
use arrow_schema::{DataType, FieldRef};
use blake3::{Hash, Hasher};
use std::sync::Arc;

/// The hash of the rows so far.
#[derive(Default)]
pub(super) struct Digest {
    json: Hasher,
    columns: Vec<(String, Stream)>,
    rows: u64,
    /// Bytes of the columns whose hashes are in `json`.
    ended: u64,
}

/// The values of a column, or of a part of one.
#[derive(Default)]
struct Stream {
    values: Hasher,
    lengths: Hasher,
    validity: Hasher,
    children: Vec<Stream>,
}

impl Digest {
    pub fn json(&mut self, row: &[u8]) {
        self.rows += 1;
        self.json.update(row).update(b"\n");
    }

    pub fn columns(&mut self, batch: &RecordBatch) {
        self.rows += batch.num_rows() as u64;
        let fields = batch.schema_ref().fields();
        let same = |((name, _), field): (&(String, Stream), &FieldRef)| name == field.name();
        if self.columns.len() != fields.len() || !self.columns.iter().zip(fields).all(same) {
            self.end_columns();
            let names = fields.iter().map(|field| field.name().clone());
            self.columns = names.map(|name| (name, Stream::default())).collect();
        }
        for ((_, stream), column) in self.columns.iter_mut().zip(batch.columns()) {
            stream.add(column);
        }
    }

    /// The hash, and the number of bytes hashed.
    pub fn finish(mut self) -> (Hash, u64) {
        self.json.update(&self.rows.to_le_bytes());
        let bytes = self.json.count();
        self.end_columns();
        (self.json.finalize(), bytes + self.ended)
    }

    /// Ends the current columns, before batches with other columns or at the end.
    fn end_columns(&mut self) {
        for (name, stream) in std::mem::take(&mut self.columns) {
            self.json.update(name.as_bytes()).update(&[0]);
            self.ended += stream.finish(&mut self.json);
        }
    }
}

impl Stream {
    fn child(&mut self, i: usize) -> &mut Stream {
        while self.children.len() <= i {
            self.children.push(Stream::default());
        }
        &mut self.children[i]
    }

    fn add(&mut self, array: &dyn Array) {
        match array.nulls().filter(|nulls| nulls.null_count() > 0) {
            Some(nulls) => {
                let bits: Vec<u8> = nulls.iter().map(u8::from).collect();
                self.validity.update(&bits);
            }
            // Without nulls, the length comes from another stream; ones are hashed so that the division into
            // batches makes no difference.
            None => {
                const ONES: [u8; 4096] = [1; 4096];
                let mut left = array.len();
                while left > 0 {
                    let some = left.min(ONES.len());
                    self.validity.update(&ONES[..some]);
                    left -= some;
                }
            }
        }
        match array.data_type() {
            DataType::Null => {}
            DataType::Boolean => {
                let bits: Vec<u8> = array.as_boolean().values().iter().map(u8::from).collect();
                self.values.update(&bits);
            }
            DataType::Utf8 => self.texts(array, |i| array.as_string::<i32>().value(i).as_bytes()),
            DataType::LargeUtf8 => self.texts(array, |i| array.as_string::<i64>().value(i).as_bytes()),
            DataType::Utf8View => self.texts(array, |i| array.as_string_view().value(i).as_bytes()),
            DataType::Binary => self.texts(array, |i| array.as_binary::<i32>().value(i)),
            DataType::LargeBinary => self.texts(array, |i| array.as_binary::<i64>().value(i)),
            DataType::BinaryView => self.texts(array, |i| array.as_binary_view().value(i)),
            DataType::List(_) => self.list(array.as_list::<i32>()),
            DataType::LargeList(_) => self.list(array.as_list::<i64>()),
            DataType::FixedSizeList(..) => {
                let list = array.as_fixed_size_list();
                let length = list.value_length() as usize;
                self.lengths((0..array.len()).map(|_| length as u64));
                let from = if array.is_empty() { 0 } else { list.value_offset_at(0) };
                self.child(0).add(&list.values().slice(from, array.len() * length));
            }
            DataType::ListView(_) => self.each(array, |i| array.as_list_view::<i32>().value(i)),
            DataType::LargeListView(_) => self.each(array, |i| array.as_list_view::<i64>().value(i)),
            DataType::Map(..) => self.each(array, |i| Arc::new(array.as_map().value(i))),
            DataType::FixedSizeBinary(_) => self.texts(array, |i| array.as_fixed_size_binary().value(i)),
            DataType::Dictionary(..) => {
                let dictionary = array.as_any_dictionary();
                let keys = dictionary.normalized_keys();
                for (i, key) in keys.into_iter().enumerate() {
                    if array.is_valid(i) && key < dictionary.values().len() {
                        self.child(0).add(&dictionary.values().slice(key, 1));
                    }
                }
            }
            DataType::Struct(_) => {
                let columns = array.as_struct().columns();
                columns.iter().enumerate().for_each(|(i, column)| self.child(i).add(column));
            }
            kind => match kind.primitive_width() {
                Some(width) => {
                    let data = array.to_data();
                    let (from, to) = (data.offset() * width, (data.offset() + data.len()) * width);
                    self.values.update(data.buffers()[0].as_slice().get(from..to).unwrap_or_default());
                }
                // A row with such a value has no JSON form, so it fails.
                None => _ = self.values.update(kind.to_string().as_bytes()),
            },
        }
    }

    fn texts<'a>(&mut self, array: &dyn Array, text: impl Fn(usize) -> &'a [u8]) {
        for i in 0..array.len() {
            let text = if array.is_null(i) { &[] } else { text(i) };
            self.lengths.update(&(text.len() as u64).to_le_bytes());
            self.values.update(text);
        }
    }

    fn list<O: OffsetSizeTrait>(&mut self, list: &GenericListArray<O>) {
        let ends = list.value_offsets();
        self.lengths(ends.windows(2).map(|pair| (pair[1] - pair[0]).as_usize() as u64));
        let (from, to) = (ends[0].as_usize(), ends[list.len()].as_usize());
        self.child(0).add(&list.values().slice(from, to - from));
    }

    fn each(&mut self, array: &dyn Array, value: impl Fn(usize) -> ArrayRef) {
        for i in (0..array.len()).filter(|i| array.is_valid(*i)) {
            let value = value(i);
            self.lengths(std::iter::once(value.len() as u64));
            self.child(0).add(&value);
        }
    }

    fn lengths(&mut self, lengths: impl Iterator<Item = u64>) {
        let bytes: Vec<u8> = lengths.flat_map(u64::to_le_bytes).collect();
        self.lengths.update(&bytes);
    }

    /// Adds the streams to `whole`, and returns their number of bytes.
    fn finish(self, whole: &mut Hasher) -> u64 {
        let mut bytes = 0;
        for stream in [self.values, self.lengths, self.validity] {
            bytes += stream.count();
            whole.update(stream.finalize().as_bytes());
        }
        bytes += self.children.into_iter().map(|child| child.finish(whole)).sum::<u64>();
        bytes
    }
}
