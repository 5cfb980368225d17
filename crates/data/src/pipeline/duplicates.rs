//! Which row was the first with these tokens: exact, in the order of the rows, in bounded memory.
//!
//! The hashes of the latest rows are in a table. When it is full they go to an unnamed temporary file as a sorted
//! run, and a Bloom filter remembers that they were there. So a row that is new costs one look into the table and
//! a few into the filter; only a row that the filter knows is searched for in the runs.
//!
//! Eight runs of one level are merged into one of the next. So a billion rows are in at most 28 files, and each was
//! written at most four times.

use crate::{Error, Result};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::Range;

/// Hashes in the table, at most: 2^20 places of 33 bytes are some 35 MB.
const TABLE: usize = 900_000;

/// Bits of the Bloom filter: 64 MB, from the first run on. At a hundred million rows half of them are set, and 8 % of
/// new rows are searched for in vain.
const FILTER_BITS: u64 = 1 << 29;

/// Places of the filter that each hash sets.
const PROBES: u32 = 4;

/// Bytes of an entry of a run: hash and row, big-endian, so that bytes sort as hashes do.
const ENTRY: usize = 24;

/// Runs of one level that become one of the next.
const FANOUT: usize = 8;

/// Entries that are read at once: 4 KB.
const BLOCK: u64 = 170;

/// Blocks of a run whose place is guessed; bisection follows. Hashes are evenly spread: in runs of 7.2 million entries a
/// search took 1.9 blocks.
const GUESSES: u32 = 6;

/// Every hash seen, with the first row that had it.
#[derive(Debug)]
pub struct Duplicates {
    table: HashMap<u128, u64>,
    capacity: usize,
    filter: Vec<u64>,
    /// Runs on disk by how often they were merged; fewer than [`FANOUT`] each.
    levels: Vec<Vec<Run>>,
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
        Duplicates { table: HashMap::new(), capacity, filter: Vec::new(), levels: Vec::new() }
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
        if !self.levels.is_empty() && self.places(hash).all(|(word, bit)| self.filter[word] & bit != 0) {
            for run in self.levels.iter_mut().flatten() {
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
        let mut run = Run { file: file.into_inner()?, entries: entries.len() as u64 };
        for level in 0.. {
            if level == self.levels.len() {
                self.levels.push(Vec::new());
            }
            let runs = &mut self.levels[level];
            runs.push(run);
            if runs.len() < FANOUT {
                break;
            }
            run = Run::merged(runs)?;
            runs.clear();
        }
        Ok(())
    }
}

impl Run {
    /// One run of the entries of several. No hash is in two of them.
    fn merged(runs: &mut [Run]) -> io::Result<Run> {
        let mut merged = BufWriter::new(tempfile::tempfile()?);
        let entries = runs.iter().map(|run| run.entries).sum();
        let mut readers = Vec::with_capacity(runs.len());
        let mut heads = BinaryHeap::with_capacity(runs.len());
        for (at, run) in runs.iter_mut().enumerate() {
            run.file.rewind()?;
            let mut reader = BufReader::new(&run.file).take(run.entries * ENTRY as u64);
            heads.extend(next(&mut reader)?.map(|entry| Reverse((entry, at))));
            readers.push(reader);
        }
        while let Some(Reverse((entry, at))) = heads.pop() {
            merged.write_all(&entry)?;
            heads.extend(next(&mut readers[at])?.map(|entry| Reverse((entry, at))));
        }
        Ok(Run { file: merged.into_inner()?, entries })
    }

    /// The row of a hash. Where it stands is guessed from the hashes around it, of which each block tells two: the
    /// distance that is left shrinks to about its square root each time.
    fn find(&mut self, hash: u128) -> io::Result<Option<u64>> {
        // It is among the entries from `low` to `high`, whose hashes are between these.
        let (mut low, mut high) = (0, self.entries);
        let (mut least, mut greatest) = (0, u128::MAX);
        let mut guesses = 0;
        while low < high {
            let share =
                if guesses < GUESSES { (hash - least) as f64 / (greatest - least) as f64 } else { 0.5 };
            guesses += 1;
            let guess = low + (share * (high - low) as f64) as u64;
            let start = guess.saturating_sub(BLOCK / 2).min(high.saturating_sub(BLOCK)).max(low);
            let end = (start + BLOCK).min(high);
            let entries = self.read(start..end)?;
            let (first, last) = (entries[0].0, entries[entries.len() - 1].0);
            if hash < first {
                (high, greatest) = (start, first);
            } else if hash > last {
                (low, least) = (end, last);
            } else {
                return Ok(entries.binary_search_by_key(&hash, |e| e.0).ok().map(|at| entries[at].1));
            }
        }
        Ok(None)
    }

    /// Entries in a range, which is not empty.
    fn read(&mut self, range: Range<u64>) -> io::Result<Vec<(u128, u64)>> {
        self.file.seek(SeekFrom::Start(range.start * ENTRY as u64))?;
        let mut bytes = vec![0; (range.end - range.start) as usize * ENTRY];
        self.file.read_exact(&mut bytes)?;
        let entry = |bytes: &[u8]| {
            let (mut hash, mut row) = ([0; 16], [0; 8]);
            hash.copy_from_slice(&bytes[..16]);
            row.copy_from_slice(&bytes[16..]);
            (u128::from_be_bytes(hash), u64::from_be_bytes(row))
        };
        Ok(bytes.chunks_exact(ENTRY).map(entry).collect())
    }
}

/// The next entry of a run that is read from front to back.
fn next(reader: &mut io::Take<BufReader<&File>>) -> io::Result<Option<[u8; ENTRY]>> {
    if reader.limit() == 0 {
        return Ok(None);
    }
    let mut entry = [0; ENTRY];
    reader.read_exact(&mut entry)?;
    Ok(Some(entry))
}

/// 128 bits of BLAKE3 over the ids: no two different rows collide by accident.
pub(crate) fn hash_ids(ids: &[u32]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = [0u8; 4096];
    for chunk in ids.chunks(buffer.len() / 4) {
        for (place, id) in buffer.chunks_exact_mut(4).zip(chunk) {
            place.copy_from_slice(&id.to_le_bytes());
        }
        hasher.update(&buffer[..chunk.len() * 4]);
    }
    let mut short = [0u8; 16];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    u128::from_le_bytes(short)
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
        assert!(found > 500, "{found}");
        let runs: Vec<usize> = bounded.levels.iter().map(Vec::len).collect();
        assert!(runs.len() == 3 && runs.iter().all(|&runs| runs < FANOUT), "{runs:?}");
        let entries: u64 = bounded.levels.iter().flatten().map(|run| run.entries).sum();
        assert_eq!(entries as usize + bounded.table.len(), map.len());
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
        assert_eq!(bounded.levels.len(), 1);
        for i in 0..1000 {
            assert_eq!(bounded.first(hash(i), 2000).unwrap(), Some(i));
        }
        assert_eq!(bounded.levels[0][0].find(5000).unwrap(), None);
    }
}
