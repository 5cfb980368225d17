//! The journal of a run in shards, from which the same job continues after an interruption.
//!
//! Shards are written to `x.partial/` beside the output. After each, the journal is replaced: it holds the job,
//! and for each shard its files and the summary of the run up to its end, including the number of source rows. The
//! same job continues after the last shard; another job starts from the beginning.

use crate::pack::Fill;
use crate::pipeline::{Duplicates, Summary};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use suasion_files::{Written, write_atomic};

const NAME: &str = "journal.json";

/// Size in bytes of an entry of a shard's hashes: row and hash.
const ENTRY: u64 = 16;

/// The finished shards in a folder.
pub(super) struct Journal {
    pub folder: PathBuf,
    job: Value,
    pub shards: Vec<Shard>,
}

/// A finished shard.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Shard {
    /// Its file of records; `None` if no row was kept.
    pub data: Option<(String, Written)>,
    /// Its findings.
    pub findings: String,
    /// The hashes of its rows, for later shards.
    pub hashes: String,
    /// Number of rows in it.
    pub kept: u64,
    /// The summary of the source rows up to its end.
    pub summary: Summary,
    /// The numbers of the packs up to its end.
    pub fill: Fill,
}

#[derive(Serialize, Deserialize)]
struct OnDisk {
    job: Value,
    shards: Vec<Shard>,
}

impl Journal {
    /// Opens the journal of `job` in `folder`, with the finished shards of an earlier run of the same job. Shards
    /// of another job are removed; their number is returned.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Source`] if the folder has other files and no journal.
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
                        message: format!("holds {name:?}, which suasion did not write"),
                        help: "move the folder away, or write to another name".into(),
                    });
                }
            }
        }
        let complete = |shard: &Shard| {
            // A journal that names a file elsewhere was not written by suasion.
            let length = |name: &String| {
                let inside = suasion_files::is_plain_name(name);
                fs::metadata(folder.join(name)).map(|m| m.len()).ok().filter(|_| inside)
            };
            shard.data.as_ref().is_none_or(|(name, written)| length(name) == Some(written.bytes))
                && length(&shard.findings).is_some()
                && length(&shard.hashes) == shard.kept.checked_mul(ENTRY)
        };
        let (mut shards, mut others) = (Vec::new(), 0);
        match found {
            Some(found) if found.job == job => {
                shards = found.shards.into_iter().take_while(complete).collect();
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

    /// Removes the shards of an unfinished run that will not be continued.
    pub fn discard(folder: &Path) {
        if folder.join(NAME).is_file() {
            let _ = fs::remove_dir_all(folder);
        }
    }

    /// The summary of the rows up to the end of the last shard.
    pub fn summary(&self) -> Summary {
        self.shards.last().map(|shard| shard.summary.clone()).unwrap_or_default()
    }

    /// The rows of the finished shards, for finding duplicates among later rows.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn duplicates(&self) -> Result<Duplicates> {
        let mut seen = Duplicates::default();
        for shard in &self.shards {
            let path = self.folder.join(&shard.hashes);
            let io_error = |e| Error::io(&path, e);
            let mut file = BufReader::new(fs::File::open(&path).map_err(io_error)?);
            let (mut row, mut hash) = ([0; 8], [0; 8]);
            for _ in 0..shard.kept {
                file.read_exact(&mut row).map_err(io_error)?;
                file.read_exact(&mut hash).map_err(io_error)?;
                seen.look(u64::from_le_bytes(hash), u64::from_le_bytes(row));
            }
        }
        Ok(seen)
    }

    /// An entry of a shard's hashes.
    pub fn hash_entry(row: u64, hash: u64) -> [u8; ENTRY as usize] {
        let mut entry = [0; ENTRY as usize];
        entry[..8].copy_from_slice(&row.to_le_bytes());
        entry[8..].copy_from_slice(&hash.to_le_bytes());
        entry
    }

    /// The path of a file of the next shard.
    pub fn next(&self, ending: &str) -> PathBuf {
        self.folder.join(format!("{:05}{ending}", self.shards.len()))
    }

    /// Adds a shard whose files are complete, and writes the journal.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, shard: Shard) -> Result<()> {
        self.shards.push(shard);
        let journal = OnDisk { job: self.job.clone(), shards: self.shards.clone() };
        Ok(write_atomic(self.folder.join(NAME), |file| {
            serde_json::to_writer(&mut *file, &journal)?;
            file.write_all(b"\n")
        })?)
    }
}
