//! Any number of findings, each with its location, in little memory.

use crate::pipeline::Outcome;
use crate::{Code, Error, Finding, Level, Result, RowId};
use serde::ser::{Error as _, SerializeSeq};
use serde::{Deserialize, Serialize, Serializer};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Seek, Write};
use std::ops::Range;
use tempfile::SpooledTempFile;

/// The maximal size of findings kept in memory, in bytes; more are written to an unnamed temporary file.
const IN_MEMORY: usize = 8 << 20;

/// A finding with its location.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Located {
    /// What was found.
    pub finding: Finding,
    /// The tokens that it concerns, which a finding's own JSON omits.
    pub tokens: Option<Range<u32>>,
    /// The row's file.
    pub file: String,
    /// The line in the file, from 1, if it has lines.
    pub line: Option<u64>,
    /// The row's number in the file, from 0.
    pub in_file: u64,
    /// A hash of the row's content, independent of its position in the file.
    pub content: u64,
}

/// Findings in order. As JSON they are a list of findings without their locations.
#[derive(Debug)]
pub struct Findings {
    file: RefCell<SpooledTempFile>,
    counts: BTreeMap<(Level, Code), u64>,
    limit: Option<u64>,
}

/// The number of listed findings for each code at each level.
pub type Quotas = BTreeMap<(Level, Code), u64>;

impl Default for Findings {
    fn default() -> Findings {
        Findings::limited(None)
    }
}

impl Findings {
    /// An empty list of findings, at most `limit` of which will be listed: errors before warnings before notes,
    /// each code at least once if the limit allows.
    pub fn limited(limit: Option<u64>) -> Findings {
        let file = RefCell::new(SpooledTempFile::new(IN_MEMORY));
        Findings { file, counts: BTreeMap::new(), limit }
    }

    /// Adds a finding about a row. `content` is a hash of the row's content.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder for temporary files is full or cannot be used.
    pub fn push(&mut self, id: &RowId, content: u64, finding: &Finding) -> Result<()> {
        *self.counts.entry((finding.level, finding.code)).or_default() += 1;
        let located = Located {
            finding: finding.clone(),
            tokens: finding.tokens.clone(),
            file: id.file.to_string_lossy().into_owned(),
            line: id.line,
            in_file: id.in_file,
            content,
        };
        let file = self.file.get_mut();
        // One write per finding: the file is not buffered.
        let line = serde_json::to_vec(&located).map_err(io::Error::from);
        let written = line.and_then(|mut line| {
            line.push(b'\n');
            file.write_all(&line)
        });
        written.map_err(|e| Error::io(std::env::temp_dir(), e))
    }

    /// Adds the findings of a row.
    ///
    /// # Errors
    /// As [`Findings::push`].
    pub fn add(&mut self, outcome: &Outcome) -> Result<()> {
        let found = outcome.findings();
        if found.is_empty() {
            return Ok(());
        }
        let content = content(outcome);
        found.iter().try_for_each(|finding| self.push(outcome.id(), content, finding))
    }

    /// Number of findings.
    pub fn len(&self) -> u64 {
        self.counts.values().sum()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// The number of listed findings per code, if a format lists at most `all` in total, and at most `each` per level.
    pub fn quotas(&self, all: Option<u64>, each: Option<u64>) -> Quotas {
        let mut left = self.limit.unwrap_or(u64::MAX).min(all.unwrap_or(u64::MAX));
        let mut quotas = Quotas::new();
        for level in [Level::Error, Level::Warning, Level::Note] {
            let mut codes: Vec<((Level, Code), u64)> =
                self.counts.iter().filter(|((own, _), _)| *own == level).map(|(key, n)| (*key, *n)).collect();
            let mut room = left.min(each.unwrap_or(u64::MAX));
            // The rare codes first: the others share the rest.
            codes.sort_by_key(|(key, n)| (*n, *key));
            for at in 0..codes.len() {
                let (key, n) = codes[at];
                let share = room.div_ceil((codes.len() - at) as u64).min(n);
                quotas.insert(key, share);
                (room, left) = (room - share, left - share);
            }
        }
        quotas
    }

    /// Calls `each` with the first findings of each code, as many as its quota says, in their order.
    ///
    /// # Errors
    /// Those of `each`, and if the temporary file cannot be read.
    pub fn each(
        &self,
        mut quotas: Quotas,
        mut each: impl FnMut(Located) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut file = self.file.borrow_mut();
        file.rewind()?;
        let mut left: u64 = quotas.values().sum();
        for line in BufReader::new(&mut *file).lines() {
            if left == 0 {
                break;
            }
            let located: Located = serde_json::from_str(&line?)?;
            let quota = quotas.entry((located.finding.level, located.finding.code)).or_default();
            if *quota > 0 {
                (*quota, left) = (*quota - 1, left - 1);
                each(located)?;
            }
        }
        Ok(())
    }
}

/// A hash of a row's content, for [`Findings::push`]: that of its ids, or of its findings if it has none.
pub fn content(outcome: &Outcome) -> u64 {
    let mut hash = blake3::Hasher::new();
    match outcome {
        Outcome::Kept(kept) => {
            let bytes: Vec<u8> = kept.sample.input_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            hash.update(&bytes);
        }
        _ => outcome.findings().iter().for_each(|finding| _ = hash.update(finding.message.as_bytes())),
    }
    hash.finalize().as_bytes().iter().take(8).fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

impl Serialize for Findings {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(None)?;
        let written = self.each(self.quotas(None, None), |located| {
            list.serialize_element(&located.finding).map_err(|error| io::Error::other(error.to_string()))
        });
        written.map_err(S::Error::custom)?;
        list.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn findings(limit: Option<u64>, counts: &[(Code, u64)]) -> Findings {
        let mut all = Findings::limited(limit);
        let mut row = 0;
        for (code, n) in counts {
            for _ in 0..*n {
                all.push(&RowId::new(Path::new("x"), row, None), 0, &Finding::new(row, *code, "m")).unwrap();
                row += 1;
            }
        }
        all
    }

    fn listed(all: &Findings, quotas: Quotas) -> Vec<u64> {
        let mut rows = Vec::new();
        all.each(quotas, |located| {
            rows.push(located.finding.row);
            Ok(())
        })
        .unwrap();
        rows
    }

    #[test]
    fn errors_come_first_and_each_code_once() {
        let all = findings(None, &[(Code::D001, 5), (Code::M008, 90), (Code::M002, 1), (Code::T001, 2)]);
        assert_eq!(all.len(), 98);
        assert_eq!(listed(&all, all.quotas(None, None)).len(), 98);
        // Out of 10: the one M002 and nine M008.
        let rows = listed(&all, all.quotas(Some(10), None));
        assert_eq!(rows, [5, 6, 7, 8, 9, 10, 11, 12, 13, 95]);
        let rows = listed(&all, all.quotas(None, Some(2)));
        assert_eq!(rows, [0, 1, 5, 95, 96, 97], "two of each level");
        let all = findings(Some(3), &[(Code::D001, 5), (Code::M008, 1)]);
        assert_eq!(listed(&all, all.quotas(Some(25_000), None)), [0, 1, 5]);
        assert_eq!(serde_json::to_value(&all).unwrap().as_array().unwrap().len(), 3);
    }
}
