//! Prepared data on disk: rows as JSON Lines, Parquet or a `datasets` folder, with their findings and their
//! manifest beside them (CLI.md).
//!
//! `job` is the whole of it: is what is there still right, else run the pipeline and write. `sink` writes one file
//! of records; `output` arranges files (one, or shards in a folder of their own until all are there) and keeps the
//! `journal` by which a killed run goes on.

pub mod columnar;
pub mod folder;
mod job;
mod journal;
mod manifest;
mod names;
mod output;
mod record;
mod sink;

pub use job::{Job, Start, prepare};
pub use manifest::{Counts, Manifest, OutputFile, fingerprint};
pub use names::{Form, Shape, findings_path, manifest_path, replaces, shard_path};
pub use record::{Boundaries, Record, Rows};

use crate::{Policy, Result, Sample};
use std::path::Path;

/// Reads prepared data back (or any tokenised rows): the samples as they were written.
///
/// # Errors
/// As [`crate::Pipeline::run`].
pub fn read(path: impl AsRef<Path>, policy: &Policy) -> Result<Vec<Sample>> {
    let policy = Policy { max_length: None, ..policy.clone() };
    crate::Pipeline::new(None, &policy).samples(path).map(|(samples, _)| samples)
}
