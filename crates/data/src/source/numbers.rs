//! The numbers of a Parquet column, and which values are null.

use arrow_array::{ArrayRef, Int32Array, Int64Array};
use arrow_buffer::NullBuffer;
use std::sync::Arc;

/// A flag for each value; empty as long as none is null.
#[derive(Default)]
pub(super) struct Present(Vec<bool>);

impl Present {
    /// Records that the value with this index is null, and that earlier unrecorded ones are not.
    pub fn null(&mut self, index: usize) {
        self.0.resize(index, true);
        self.0.push(false);
    }

    pub fn nulls(mut self, n: usize) -> Option<NullBuffer> {
        (!self.0.is_empty()).then(|| {
            self.0.resize(n, true);
            NullBuffer::from(self.0)
        })
    }
}

/// Numbers, stored in 32 bits as long as all of them fit.
pub(super) enum Numbers {
    Narrow(Vec<i32>),
    Wide(Vec<i64>),
}

impl Default for Numbers {
    fn default() -> Numbers {
        Numbers::with_capacity(0)
    }
}

impl Numbers {
    pub fn with_capacity(n: usize) -> Numbers {
        Numbers::Narrow(Vec::with_capacity(n))
    }

    pub fn len(&self) -> usize {
        match self {
            Numbers::Narrow(numbers) => numbers.len(),
            Numbers::Wide(numbers) => numbers.len(),
        }
    }

    pub fn get(&self, i: usize) -> Option<i64> {
        match self {
            Numbers::Narrow(numbers) => numbers.get(i).copied().map(i64::from),
            Numbers::Wide(numbers) => numbers.get(i).copied(),
        }
    }

    /// Adds a number `count` times.
    pub fn add(&mut self, number: i64, count: usize) {
        match (&mut *self, i32::try_from(number)) {
            (Numbers::Narrow(numbers), Ok(number)) => numbers.resize(numbers.len() + count, number),
            (Numbers::Wide(numbers), _) => numbers.resize(numbers.len() + count, number),
            (Numbers::Narrow(_), Err(_)) => {
                self.widen();
                self.add(number, count);
            }
        }
    }

    /// Adds stored numbers of `bytes` bytes each.
    pub fn extend(&mut self, stored: &[u8], bytes: usize) {
        let small = || stored.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes));
        let large = || stored.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes));
        match self {
            Numbers::Narrow(numbers) if bytes == 4 => numbers.extend(small()),
            Numbers::Wide(numbers) if bytes == 4 => numbers.extend(small().map(i64::from)),
            Numbers::Wide(numbers) => numbers.extend(large()),
            Numbers::Narrow(numbers) => {
                // Shifted up by 2^31, a number that fits has no high bits. The branch-free loop is vectorised.
                let high = |number: i64| number.wrapping_sub(i64::from(i32::MIN)) as u64 >> 32;
                if large().fold(0, |bits, number| bits | high(number)) == 0 {
                    numbers.extend(large().map(|number| number as i32));
                } else {
                    self.widen();
                    self.extend(stored, bytes);
                }
            }
        }
    }

    /// The array of these numbers.
    pub fn array(self, nulls: Option<NullBuffer>) -> ArrayRef {
        match self {
            Numbers::Narrow(numbers) => Arc::new(Int32Array::new(numbers.into(), nulls)),
            Numbers::Wide(numbers) => Arc::new(Int64Array::new(numbers.into(), nulls)),
        }
    }

    fn widen(&mut self) {
        if let Numbers::Narrow(numbers) = self {
            *self = Numbers::Wide(numbers.iter().map(|&number| i64::from(number)).collect());
        }
    }
}
