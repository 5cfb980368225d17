//! One file of records, in whatever form.

use super::columnar::{ArrowStreamSink, Columns, ParquetSink};
use super::names::{Form, Shape};
use super::record::Record;
use crate::pipeline::Outcome;
use crate::{Error, Policy, Result};
use std::io::Write;
use std::path::{Path, PathBuf};
use suasion_files::{AtomicFile, Complete};

/// What all files of an output have in common.
#[derive(Clone, Copy)]
pub(super) struct Plan<'a> {
    /// The output as the user named it.
    pub target: &'a Path,
    pub form: Form,
    pub shape: Shape,
    pub policy: &'a Policy,
    /// For files of columns: have one for weights.
    pub weights: bool,
}

impl Plan<'_> {
    /// The columns of a file of columns, which are fixed before the first row is known.
    pub(super) fn columns(&self) -> Columns {
        Columns {
            packed: self.policy.packing,
            prefix_ranges: self.policy.share_prefix,
            weights: self.weights,
            text: self.shape.with_text,
        }
    }
}

/// What can be made of a row without the others: for JSON Lines, its line; nothing where it is going to be packed.
pub(super) fn encode(plan: &Plan<'_>, outcome: &Outcome) -> Vec<u8> {
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
    Parquet(Box<ParquetSink<AtomicFile>>),
    Arrow(Box<ArrowStreamSink<AtomicFile>>),
}

impl Sink {
    /// Starts a file.
    ///
    /// # Errors
    /// [`Error::Io`] where its folder cannot be written to.
    pub fn create(form: Form, path: PathBuf, columns: Columns) -> Result<Sink> {
        let file = AtomicFile::create(&path)?;
        let file = match form {
            Form::Lines => Kind::Lines(Box::new(file)),
            Form::Parquet => Kind::Parquet(Box::new(ParquetSink::new(&path, file, columns)?)),
            Form::Folder => Kind::Arrow(Box::new(ArrowStreamSink::new(&path, file, columns)?)),
        };
        Ok(Sink { file, path })
    }

    /// Writes a record; `encoded` is what [`encode`] made of it, if it did.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
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
            Kind::Parquet(file) => file.write(record),
            Kind::Arrow(file) => file.write(record),
        }
    }

    /// Completes the file.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn complete(self) -> Result<Complete> {
        let file = match self.file {
            Kind::Lines(file) => *file,
            Kind::Parquet(file) => file.finish()?,
            Kind::Arrow(file) => file.finish()?,
        };
        Ok(file.complete()?)
    }
}
