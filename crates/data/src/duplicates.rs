//! Which row was the first with these tokens: exact, in the order of the rows, in bounded memory.
//!
//! The hashes of the latest rows are in a table. When it is full they go to an unnamed temporary file as a sorted
//! run, and a Bloom filter remembers that they were there. So a row that is new costs one look into the table and
//! a few into the filter; only a row that the filter knows is searched for in the runs.

use crate::{Error, Result};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};

/// Hashes in the table, at most: 2^20 places of 33 bytes are some 35 MB.
const TABLE: usize = 900_000;

/// Bits of the Bloom filter: 64 MB, from the first run on. At a hundred million rows half of them are set, and 8 % of
/// new rows are searched for in vain.
const FILTER_BITS: u64 = 1 << 29;

/// Places of the filter that each hash sets.
const PROBES: u32 = 4;

/// Bytes of an entry of a run: hash and row, big-endian, so that bytes sort as hashes do.
const ENTRY: usize = 24;

/// Every hash seen, with the first row that had it.
#[derive(Debug)]
pub struct Duplicates {
    table: HashMap<u128, u64>,
    capacity: usize,
    filter: Vec<u64>,
    runs: Vec<Run>,
}

/// Sorted entries on disk.
#[derive(Debug)]
struct Run {
    file: File,
    entries: u64,
}

impl Default for Duplicates {
    fn default() -> Duplicates {
        Duplicates::with_capacity(TABLE)
    }
}

impl Duplicates {
    fn with_capacity(capacity: usize) -> Duplicates {
        Duplicates { table: HashMap::new(), capacity, filter: Vec::new(), runs: Vec::new() }
    }

    /// The first row that had this hash, or `None` where `row` is the first; it is remembered then.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder for temporary files is full or cannot be used.
    pub fn first(&mut self, hash: u128, row: u64) -> Result<Option<u64>> {
        if let Some(&first) = self.table.get(&hash) {
            return Ok(Some(first));
        }
        let io_error = |e| Error::io(std::env::temp_dir(), e);
        if !self.runs.is_empty() && self.places(hash).all(|(word, bit)| self.filter[word] & bit != 0) {
            for run in &mut self.runs {
                if let Some(first) = run.find(hash).map_err(io_error)? {
                    return Ok(Some(first));
                }
            }
        }
        if self.table.len() == self.capacity {
            self.spill().map_err(io_error)?;
        }
        self.table.insert(hash, row);
        Ok(None)
    }

    /// The filter's words and bits of a hash. The hash is a cryptographic one: its parts are as good as new hashes.
    fn places(&self, hash: u128) -> impl Iterator<Item = (usize, u64)> + use<> {
        (0..PROBES).map(move |probe| {
            let place = (hash >> (32 * probe)) as u64 % FILTER_BITS;
            ((place / 64) as usize, 1 << (place % 64))
        })
    }

    /// Writes the table to a run and empties it.
    fn spill(&mut self) -> io::Result<()> {
        if self.filter.is_empty() {
            self.filter = vec![0; (FILTER_BITS / 64) as usize];
        }
        let mut entries: Vec<(u128, u64)> = self.table.drain().collect();
        entries.sort_unstable();
        let mut file = BufWriter::new(tempfile::tempfile()?);
        for &(hash, row) in &entries {
            for (word, bit) in self.places(hash) {
                self.filter[word] |= bit;
            }
            file.write_all(&hash.to_be_bytes())?;
            file.write_all(&row.to_be_bytes())?;
        }
        let file = file.into_inner().map_err(|e| e.into_error())?;
        self.runs.push(Run { file, entries: entries.len() as u64 });
        Ok(())
    }
}

impl Run {
    /// The row of a hash. The hashes are evenly spread, so the place of one is guessed from its value; a window
    /// around the guess holds it nearly always.
    fn find(&mut self, hash: u128) -> io::Result<Option<u64>> {
        let (mut low, mut high) = (0, self.entries);
        // The standard deviation of a rank among n even draws is at most √n/2: two of them to each side.
        let spread = self.entries.isqrt() + 8;
        let guess = ((hash >> 64) as u64 as f64 / 2f64.powi(64) * self.entries as f64) as u64;
        let mut window = guess.saturating_sub(spread)..(guess + spread).min(self.entries);
        while low < high {
            let entries = self.read(window.clone())?;
            let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return Ok(None) };
            if hash < first.0 {
                high = window.start;
            } else if hash > last.0 {
                low = window.end;
            } else {
                return Ok(entries.binary_search_by_key(&hash, |e| e.0).ok().map(|at| entries[at].1));
            }
            let middle = low + (high - low) / 2;
            window = middle.saturating_sub(spread).max(low)..(middle + spread).min(high);
        }
        Ok(None)
    }

    fn read(&mut self, range: std::ops::Range<u64>) -> io::Result<Vec<(u128, u64)>> {
        self.file.seek(SeekFrom::Start(range.start * ENTRY as u64))?;
        let mut reader = BufReader::new(&self.file).take((range.end - range.start) * ENTRY as u64);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes)?;
        let entry = |bytes: &[u8]| {
            let (mut hash, mut row) = ([0; 16], [0; 8]);
            hash.copy_from_slice(&bytes[..16]);
            row.copy_from_slice(&bytes[16..]);
            (u128::from_be_bytes(hash), u64::from_be_bytes(row))
        };
        Ok(bytes.chunks_exact(ENTRY).map(entry).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With a table of eight and runs on disk, the answers are those of one unbounded map.
    #[test]
    fn runs_answer_as_a_map_does() {
        let (mut bounded, mut map) = (Duplicates::with_capacity(8), HashMap::new());
        let mut found = 0;
        for row in 0..3000u64 {
            // A third of the rows repeat an earlier one, near or far.
            let key = if row % 3 == 2 { row * 7919 % row } else { row };
            let hash =
                u128::from_le_bytes(blake3::hash(&key.to_le_bytes()).as_bytes()[..16].try_into().unwrap());
            let expected = map.get(&hash).copied();
            map.entry(hash).or_insert(row);
            assert_eq!(bounded.first(hash, row).unwrap(), expected, "row {row}");
            found += usize::from(expected.is_some());
        }
        assert!(found > 500 && bounded.runs.len() > 100, "{found} {}", bounded.runs.len());
        assert!(bounded.table.len() <= 8);
    }

    /// Hashes at the very ends, and so lopsided that every guess is wrong.
    #[test]
    fn a_run_finds_what_is_far_from_its_guess() {
        let mut bounded = Duplicates::with_capacity(1000);
        let hash = |i: u64| if i == 999 { u128::MAX } else { u128::from(i) };
        for i in 0..1000 {
            assert_eq!(bounded.first(hash(i), i).unwrap(), None);
        }
        assert_eq!(bounded.first(1 << 77, 1000).unwrap(), None, "spills");
        assert_eq!(bounded.runs.len(), 1);
        for i in 0..1000 {
            assert_eq!(bounded.first(hash(i), 2000).unwrap(), Some(i));
        }
        assert_eq!(bounded.runs[0].find(5000).unwrap(), None);
    }
}
