//! One file of records, in any format.

use super::columnar::{ColumnSink, Columns};
use super::names::{Form, Shape};
use super::record::Record;
use crate::pipeline::Outcome;
use crate::{Error, Policy, Result};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use suasion_files::{AtomicFile, Complete};

/// The options that all files of an output share.
#[derive(Clone)]
pub(super) struct Plan {
    /// The output as the user gave it.
    pub target: PathBuf,
    pub form: Form,
    pub shape: Shape,
    pub policy: Arc<Policy>,
    /// Whether columnar files have a column of weights.
    pub weights: bool,
}

impl Plan {
    /// The columns of a columnar file; they are fixed before the first row is known.
    pub(super) fn columns(&self) -> Columns {
        Columns {
            packed: self.policy.packing,
            prefix_ranges: self.policy.share_prefix,
            weights: self.weights,
            text: self.shape.with_text,
        }
    }
}

/// The line of a row, if it does not depend on other rows: in JSON Lines, unless rows are packed.
pub(super) fn encode(plan: &Plan, outcome: &Outcome) -> Vec<u8> {
    let mut line = Vec::new();
    if let (Form::Lines, false, Outcome::Kept(kept)) = (plan.form, plan.policy.packing, outcome) {
        let text = kept.text.as_deref().filter(|_| plan.shape.with_text);
        Record::of(&kept.sample, text).write_json(&mut line);
    }
    line
}

/// A file of records that is being written.
pub(super) struct Sink {
    file: Kind,
    path: PathBuf,
}

enum Kind {
    Lines(Box<AtomicFile>),
    Columns(Box<ColumnSink<AtomicFile>>),
}

impl Sink {
    /// Starts a file.
    ///
    /// # Errors
    /// [`Error::Io`] if its folder is not writable.
    pub fn create(form: Form, path: PathBuf, columns: Columns) -> Result<Sink> {
        let file = AtomicFile::create(&path)?;
        let file = match form {
            Form::Lines => Kind::Lines(Box::new(file)),
            Form::Parquet => Kind::Columns(Box::new(ColumnSink::parquet(&path, file, columns)?)),
            Form::Folder => Kind::Columns(Box::new(ColumnSink::arrow(&path, file, columns)?)),
        };
        Ok(Sink { file, path })
    }

    /// Writes a record; `encoded` is its line, if [`encode`] made it.
    ///
    /// # Errors
    /// [`Error::Io`], including a full disk.
    pub fn write(&mut self, record: &Record<'_>, encoded: Option<&[u8]>) -> Result<()> {
        match &mut self.file {
            Kind::Lines(file) => {
                let mut line = Vec::new();
                let bytes = encoded.unwrap_or_else(|| {
                    record.write_json(&mut line);
                    &line
                });
                file.write_all(bytes).map_err(|e| Error::io(&self.path, e))
            }
            Kind::Columns(file) => file.write(record),
        }
    }

    /// Completes the file.
    ///
    /// # Errors
    /// [`Error::Io`], including a full disk.
    pub fn complete(self) -> Result<Complete> {
        let file = match self.file {
            Kind::Lines(file) => *file,
            Kind::Columns(file) => file.finish()?,
        };
        Ok(file.complete()?)
    }
}
