//! Prepared data on disk: rows as JSON Lines, Parquet or a `datasets` folder, with their findings and their manifest.
//!
//! [`prepare`] compares the manifest of an existing output with its inputs, and runs the pipeline if they differ.
//! A sink writes one file of records; an output is one such file, or shards that stay in a separate folder until
//! all are complete, with a journal from which an interrupted run continues.

pub mod columnar;
pub mod folder;
mod job;
mod journal;
mod manifest;
mod memory;
mod names;
mod output;
mod record;
mod sink;

pub use job::{Job, Start, prepare};
pub use manifest::{Counts, Manifest, OutputFile, fingerprint};
pub use memory::{Prepared, prepare_rows};
pub use names::{Form, Shape, findings_path, manifest_path, replaces, shard_path};
pub use record::{Boundaries, Record, Rows};

use crate::{ModelFolder, Pipeline, Policy, Result, Sample};
use std::path::Path;

/// Reads prepared data, or any rows that came as tokens: returns the samples as written.
///
/// # Errors
/// As [`Pipeline::rows`].
pub fn read(path: impl AsRef<Path>, policy: &Policy) -> Result<Vec<Sample>> {
    let policy = Policy { max_length: None, ..policy.clone() };
    Pipeline::new(ModelFolder::default(), policy).samples(path).map(|(samples, _)| samples)
}
