//! Files of converted rows: JSON Lines, or Parquet with a text column for each field.

use crate::error::source_error;
use crate::prepared::Form;
use crate::{Error, Result};
use arrow_array::{ArrayRef, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use serde::Serialize;
use serde_json::{Map, Value};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use suasion_files::{AtomicFile, Complete};

/// Rows per Parquet batch.
const BATCH: usize = 1024;

/// A file of converted rows that gets its name when it is complete.
pub struct Output {
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    Lines(AtomicFile),
    Parquet {
        file: Option<AtomicFile>,
        writer: Option<Box<ArrowWriter<AtomicFile>>>,
        rows: Vec<Map<String, Value>>,
    },
}

/// The two files of an output: that of the training rows, and that of the rows held out.
///
/// The held-out rows of `rows.jsonl` go to `rows.test.jsonl`; a name without an extension means a folder of
/// `train.jsonl` and `test.jsonl`.
///
/// # Errors
/// [`Error::Source`] if the name has an unknown format.
pub fn names(output: &Path) -> Result<(PathBuf, PathBuf)> {
    match Form::of(output) {
        Some(Form::Folder) => Ok((output.join("train.jsonl"), output.join("test.jsonl"))),
        Some(Form::Lines | Form::Parquet) => {
            let name = output.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let ending = [".jsonl.gz", ".jsonl.zst", ".jsonl", ".parquet"];
            let ending = ending.iter().find(|ending| name.to_ascii_lowercase().ends_with(*ending));
            let at = name.len() - ending.map_or(0, |ending| ending.len());
            Ok((output.to_path_buf(), output.with_file_name(format!("{}.test{}", &name[..at], &name[at..]))))
        }
        None => {
            let help = "write rows.jsonl (also .jsonl.gz, .jsonl.zst), rows.parquet, or a folder";
            Err(source_error(output, "no format has this ending", help))
        }
    }
}

impl Output {
    /// Starts a file.
    ///
    /// # Errors
    /// If its folder is not writable.
    pub fn create(path: &Path) -> Result<Output> {
        let file = AtomicFile::create(path)?;
        let kind = match Form::of(path) {
            Some(Form::Parquet) => Kind::Parquet { file: Some(file), writer: None, rows: Vec::new() },
            _ => Kind::Lines(file),
        };
        Ok(Output { path: path.to_path_buf(), kind })
    }

    /// Writes a row, whose fields are texts.
    ///
    /// # Errors
    /// [`Error::Io`], including a full disk.
    pub fn write(&mut self, row: &impl Serialize) -> Result<()> {
        let written = match &mut self.kind {
            Kind::Lines(file) => serde_json::to_writer(&mut *file, row)
                .map_err(io::Error::from)
                .and_then(|()| file.write_all(b"\n")),
            Kind::Parquet { rows, .. } => {
                if let Ok(Value::Object(fields)) = serde_json::to_value(row) {
                    rows.push(fields);
                }
                if rows.len() < BATCH { Ok(()) } else { self.flush() }
            }
        };
        written.map_err(|e| Error::io(&self.path, e))
    }

    /// Writes the rows of the current batch.
    fn flush(&mut self) -> io::Result<()> {
        let Kind::Parquet { file, writer, rows } = &mut self.kind else { return Ok(()) };
        let Some(first) = rows.first() else { return Ok(()) };
        let column = |name: &String| {
            let cells = rows.iter().map(|row| row.get(name).and_then(Value::as_str));
            (name.clone(), Arc::new(cells.collect::<StringArray>()) as ArrayRef)
        };
        let batch = RecordBatch::try_from_iter(first.keys().map(column)).map_err(io::Error::other)?;
        rows.clear();
        if let Some(file) = file.take() {
            let properties = WriterProperties::builder()
                .set_created_by(concat!("suasion version ", env!("CARGO_PKG_VERSION")).into())
                .set_compression(Compression::ZSTD(ZstdLevel::default()))
                .build();
            let started = ArrowWriter::try_new(file, batch.schema(), Some(properties));
            *writer = Some(Box::new(started.map_err(io::Error::other)?));
        }
        match writer {
            Some(writer) => writer.write(&batch).map_err(io::Error::other),
            None => Ok(()),
        }
    }

    /// The whole file, still under its temporary name.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Source`] for a Parquet file without rows, which would have no columns.
    pub fn complete(mut self) -> Result<Complete> {
        self.flush().map_err(|e| Error::io(&self.path, e))?;
        let file = match self.kind {
            Kind::Lines(file) => file,
            Kind::Parquet { writer: Some(writer), .. } => {
                writer.into_inner().map_err(|e| Error::io(&self.path, io::Error::other(e)))?
            }
            Kind::Parquet { .. } => {
                let help = "write .jsonl, or keep more rows with --outcome all";
                return Err(source_error(&self.path, "there is no row to write", help));
            }
        };
        Ok(file.complete()?)
    }
}
