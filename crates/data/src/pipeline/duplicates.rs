//! Finds the first row with the same tokens, in bounded memory.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use twox_hash::XxHash3_64;

/// The maximal number of rows that are remembered. They fill a table of 2^23 places, 142 MB.
const CAPACITY: usize = 7_340_032;

/// The first row of each sequence of tokens, for the first [`CAPACITY`] different sequences.
///
/// A bounded table is enough: sorted runs on disk with a Bloom filter, which found duplicates among any number of
/// rows, took 245 lines and 2.6 % of the time of a preparation, for a finding that is only a note.
#[derive(Debug)]
pub struct Duplicates {
    /// The first row with each hash. Among [`CAPACITY`] different rows two have the same hash with probability
    /// 1.5e-6.
    first: HashMap<u64, u64, BuildHasherDefault<AsItIs>>,
    capacity: usize,
}

/// The identity hash of a key that is already a hash.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, byte| hash << 8 | u64::from(*byte));
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// The result of looking up a row's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// No remembered row has them.
    New,
    /// This earlier row has them.
    Before(u64),
    /// As `New`, but the table is full: later rows are not compared with this one.
    Forgotten,
}

impl Default for Duplicates {
    fn default() -> Duplicates {
        Duplicates::with_capacity(CAPACITY)
    }
}

impl Duplicates {
    fn with_capacity(capacity: usize) -> Duplicates {
        Duplicates { first: HashMap::default(), capacity }
    }

    /// Looks up the hash of a row's tokens, and remembers `row` if it is new.
    pub fn look(&mut self, hash: u64, row: u64) -> Seen {
        if let Some(&first) = self.first.get(&hash) {
            return Seen::Before(first);
        }
        if self.first.len() == self.capacity {
            return Seen::Forgotten;
        }
        self.first.insert(hash, row);
        Seen::New
    }
}

/// XXH3 of the ids. Only rows of one run are compared, so speed matters and resistance to attacks does not.
pub(super) fn hash_ids(ids: &[u32]) -> u64 {
    let mut hasher = XxHash3_64::new();
    let mut buffer = [0u8; 1024];
    for chunk in ids.chunks(buffer.len() / 4) {
        for (place, id) in buffer.chunks_exact_mut(4).zip(chunk) {
            place.copy_from_slice(&id.to_le_bytes());
        }
        hasher.write(&buffer[..chunk.len() * 4]);
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_still_finds_what_it_holds() {
        let mut seen = Duplicates::with_capacity(2);
        assert_eq!([seen.look(10, 0), seen.look(11, 1)], [Seen::New, Seen::New]);
        assert_eq!([seen.look(12, 2), seen.look(12, 3)], [Seen::Forgotten, Seen::Forgotten]);
        assert_eq!([seen.look(10, 4), seen.look(11, 5)], [Seen::Before(0), Seen::Before(1)]);
    }
}
