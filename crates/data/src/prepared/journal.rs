//! What a run has finished, so that one that was killed goes on where it was.
//!
//! Shards are written to `x.partial/` beside the output. After each, the journal is replaced: it names the job, and
//! per shard its files, the rows of the source that it ends before and the run in numbers up to there. The same job
//! goes on behind the last shard; another job starts anew.

use crate::pack::Fill;
use crate::pipeline::{Duplicates, Summary};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::io::{BufReader, Read};
use std::path::PathBuf;
use suasion_files::{Written, write_atomic};

const NAME: &str = "journal.json";

/// Bytes of an entry of a shard's hashes: row and hash.
const ENTRY: usize = 24;

/// A folder of finished shards.
pub(super) struct Journal {
    pub folder: PathBuf,
    job: Value,
    pub shards: Vec<Shard>,
}

/// A finished shard.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Shard {
    /// Its file of records; `None` where its rows left none.
    pub data: Option<(String, Written)>,
    /// Its findings.
    pub findings: String,
    /// Rows and hashes of its records, for the shards behind it.
    pub hashes: String,
    /// Rows in it.
    pub kept: u64,
    /// All rows of the source up to its end.
    pub summary: Summary,
    /// All packs up to its end.
    pub fill: Fill,
}

#[derive(Serialize, Deserialize)]
struct OnDisk {
    job: Value,
    shards: Vec<Shard>,
}

impl Journal {
    /// The journal of `job` in `folder`: with the shards that an earlier run of the same job has finished, else
    /// empty. What another job has left there is removed; how many shards, if any, is told.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Source`] where the folder holds files and no journal: they are somebody else's.
    pub fn open(folder: PathBuf, job: Value) -> Result<(Journal, usize)> {
        let io_error = |e| Error::io(&folder, e);
        let found: Option<OnDisk> =
            fs::read(folder.join(NAME)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let shard_file = |name: &str| name.starts_with(|c: char| c.is_ascii_digit()) || name.starts_with('.');
        if found.is_none() && folder.exists() {
            for entry in fs::read_dir(&folder).map_err(io_error)? {
                let name = entry.map_err(io_error)?.file_name();
                let name = name.to_string_lossy();
                if !shard_file(&name) && name != NAME {
                    return Err(Error::Source {
                        path: folder.clone(),
                        message: format!("holds {name:?}, which is of no run of suasion"),
                        help: "move the folder away, or write to another name".into(),
                    });
                }
            }
        }
        let whole = |shard: &Shard| {
            let length = |name: &String| fs::metadata(folder.join(name)).map(|m| m.len()).ok();
            shard.data.as_ref().is_none_or(|(name, written)| length(name) == Some(written.bytes))
                && length(&shard.findings).is_some()
                && length(&shard.hashes) == Some(shard.kept * ENTRY as u64)
        };
        let (mut shards, mut others) = (Vec::new(), 0);
        match found {
            Some(found) if found.job == job => {
                let whole = found.shards.iter().take_while(|shard| whole(shard)).count();
                shards = found.shards[..whole].to_vec();
            }
            Some(found) => others = found.shards.len(),
            None => {}
        }
        if shards.is_empty() && folder.exists() {
            fs::remove_dir_all(&folder).map_err(io_error)?;
        }
        fs::create_dir_all(&folder).map_err(io_error)?;
        Ok((Journal { folder, job, shards }, others))
    }

    /// The run in numbers up to the end of the last shard.
    pub fn summary(&self) -> Summary {
        self.shards.last().map(|shard| shard.summary.clone()).unwrap_or_default()
    }

    /// What the finished shards hold, so that later rows are held against it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn duplicates(&self) -> Result<Duplicates> {
        let mut seen = Duplicates::default();
        for shard in &self.shards {
            let path = self.folder.join(&shard.hashes);
            let io_error = |e| Error::io(&path, e);
            let mut file = BufReader::new(fs::File::open(&path).map_err(io_error)?);
            let (mut row, mut hash) = ([0; 8], [0; 16]);
            for _ in 0..shard.kept {
                file.read_exact(&mut row).map_err(io_error)?;
                file.read_exact(&mut hash).map_err(io_error)?;
                seen.look(u128::from_le_bytes(hash), u64::from_le_bytes(row));
            }
        }
        Ok(seen)
    }

    /// An entry of a shard's hashes.
    pub fn hash_entry(row: u64, hash: u128) -> [u8; ENTRY] {
        let mut entry = [0; ENTRY];
        entry[..8].copy_from_slice(&row.to_le_bytes());
        entry[8..].copy_from_slice(&hash.to_le_bytes());
        entry
    }

    /// The path of a file of the next shard.
    pub fn next(&self, ending: &str) -> PathBuf {
        self.folder.join(format!("{:05}{ending}", self.shards.len()))
    }

    /// Adds a shard whose files are whole, and says so on disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, shard: Shard) -> Result<()> {
        self.shards.push(shard);
        let whole = OnDisk { job: self.job.clone(), shards: self.shards.clone() };
        Ok(write_atomic(self.folder.join(NAME), |file| {
            serde_json::to_writer(&mut *file, &whole)?;
            file.write_all(b"\n")
        })?)
    }
}
