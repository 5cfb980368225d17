//! One file of records, in whatever form.

use super::Record;
use super::columnar::{ArrowStreamSink, Columns, ParquetSink};
use crate::atomic::{AtomicFile, Complete};
use crate::pipeline::{Kept, Outcome};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};

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

    /// About the bytes that a token takes before compression: what shards are measured by.
    fn bytes_per_token(self) -> u64 {
        match self {
            Form::Lines => 13,
            // An id of four bytes, a label of eight, a letter.
            Form::Parquet | Form::Folder => 13,
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

impl Layout {
    /// The record of a row by itself.
    fn record<'a>(self, kept: &'a Kept) -> Record<'a> {
        Record::of(&kept.sample, kept.text.as_deref().filter(|_| self.with_text))
    }
}

/// What can be made of a row without the others: for JSON Lines, its line.
pub(super) fn encode(form: Form, layout: Layout, outcome: &Outcome) -> Vec<u8> {
    let mut line = Vec::new();
    if let (Form::Lines, Outcome::Kept(kept)) = (form, outcome) {
        layout.record(kept).write_json(&mut line);
    }
    line
}

/// A file of records that is being written.
pub(super) struct Sink {
    file: Kind,
    path: PathBuf,
    form: Form,
    /// About its bytes so far, before compression.
    pub size: u64,
    /// Records so far.
    pub records: u64,
}

enum Kind {
    Lines(AtomicFile),
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
            Form::Lines => Kind::Lines(file),
            Form::Parquet => Kind::Parquet(Box::new(ParquetSink::new(&path, file, columns)?)),
            Form::Folder => Kind::Arrow(Box::new(ArrowStreamSink::new(&path, file, columns)?)),
        };
        Ok(Sink { file, path, form, size: 0, records: 0 })
    }

    /// Writes a row; `encoded` is what [`encode`] made of it.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn write(&mut self, kept: &Kept, layout: Layout, encoded: &[u8]) -> Result<()> {
        self.size += kept.sample.len() as u64 * self.form.bytes_per_token();
        self.records += 1;
        match &mut self.file {
            Kind::Lines(file) => file.write_all(encoded).map_err(|e| Error::io(&self.path, e)),
            Kind::Parquet(file) => file.write(&layout.record(kept)),
            Kind::Arrow(file) => file.write(&layout.record(kept)),
        }
    }

    /// Completes the file.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn complete(self) -> Result<Complete> {
        match self.file {
            Kind::Lines(file) => file,
            Kind::Parquet(file) => file.finish()?,
            Kind::Arrow(file) => file.finish()?,
        }
        .complete()
    }
}
