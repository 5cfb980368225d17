//! One file of records, in whatever form.

use super::Record;
use super::columnar::{ArrowStreamSink, Columns, ParquetSink};
use super::output::Plan;
use crate::pipeline::Outcome;
use crate::{Error, Result, Sample};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};
use suasion_files::{AtomicFile, Complete};

/// How prepared data is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// JSON Lines, perhaps compressed.
    Lines,
    /// Parquet.
    Parquet,
    /// A folder for `datasets.load_from_disk`: Arrow streams, always in shards.
    Folder,
}

impl Form {
    /// The form that an output's name asks for: a name without an ending is a folder's.
    pub fn of(path: &Path) -> Option<Form> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let plain = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
        match plain {
            _ if path.is_dir() || !plain.contains('.') => Some(Form::Folder),
            _ if plain.ends_with(".jsonl") => Some(Form::Lines),
            _ if name.ends_with(".parquet") => Some(Form::Parquet),
            _ => None,
        }
    }

    /// The ending of one file of it.
    pub(super) fn ending(self, output: &Path) -> String {
        match self {
            Form::Folder => ".arrow".into(),
            Form::Lines | Form::Parquet => super::ending(output),
        }
    }
}

/// What decides a file's bytes beside its labels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Add the rendered text to each record.
    #[serde(default)]
    pub with_text: bool,
    /// About the most bytes in one file, before compression; `None` for one file of any size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_shard_bytes: Option<u64>,
}

/// What can be made of a row without the others: for JSON Lines, its line; nothing where it is going to be packed.
pub(super) fn encode(plan: &Plan<'_>, outcome: &Outcome) -> Vec<u8> {
    let mut line = Vec::new();
    if let (Form::Lines, false, Outcome::Kept(kept)) = (plan.form, plan.policy.packing, outcome) {
        let text = kept.text.as_deref().filter(|_| plan.layout.with_text);
        with_record(&kept.sample, text, |record| record.write_json(&mut line));
    }
    line
}

/// The record of a row by itself, or of a pack.
pub(super) fn with_record<T>(
    sample: &Sample,
    text: Option<&str>,
    use_it: impl FnOnce(&Record<'_>) -> T,
) -> T {
    match &sample.pack {
        Some(pack) => use_it(&pack.columns().record(sample)),
        None => use_it(&Record::of(sample, text)),
    }
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
