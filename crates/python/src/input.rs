//! Rows that come from Python.

use crate::arrow;
use crate::error::{raised, wrong};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use suasion_cli::embed::{self, Files};
use suasion_data::prepared::Manifest;
use suasion_data::source::{self, Part};
use suasion_data::{Error, Result};

/// The exception of an iterator, re-raised to the caller that requested its rows.
pub type Raised = Arc<Mutex<Option<PyErr>>>;

/// Rows to read once.
#[pyclass(frozen, module = "suasion._suasion")]
pub struct Source(Mutex<Option<Rows>>);

/// What a [`Source`] holds.
pub struct Rows {
    kind: Kind,
    /// The name in messages.
    pub name: PathBuf,
    /// The number of the first row.
    start: u64,
    /// What the iterator of the rows has raised.
    pub raised: Raised,
}

enum Kind {
    Files(Box<Files>),
    Stream(arrow::Reader),
    Parts(Py<PyAny>),
}

#[pymethods]
impl Source {
    /// The rows of a name, as on the command line.
    #[staticmethod]
    fn path(py: Python<'_>, name: PathBuf, split: &str) -> PyResult<Source> {
        let files = py.detach(|| embed::rows(&name, split)).map_err(|problem| raised(py, &problem))?;
        Ok(Source::of(files.name.clone(), 0, Kind::Files(Box::new(files))))
    }

    /// A stream of record batches.
    #[staticmethod]
    fn stream(object: &Bound<'_, PyAny>, name: PathBuf) -> PyResult<Source> {
        Ok(Source::of(name, 0, Kind::Stream(arrow::reader(object)?)))
    }

    /// An iterator of parts: Arrow data, or lists of rows as JSON in bytes. `start` is the number of the first row.
    #[staticmethod]
    #[pyo3(signature = (parts, name, start=0))]
    fn parts(parts: &Bound<'_, PyAny>, name: PathBuf, start: u64) -> PyResult<Source> {
        Ok(Source::of(name, start, Kind::Parts(parts.try_iter()?.into_any().unbind())))
    }
}

impl Source {
    fn of(name: PathBuf, start: u64, kind: Kind) -> Source {
        Source(Mutex::new(Some(Rows { kind, name, start, raised: Raised::default() })))
    }

    /// The rows; a source can be read once.
    pub fn take(&self, py: Python<'_>) -> PyResult<Rows> {
        let taken = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.ok_or_else(|| raised(py, &wrong("these rows were read already", "hand the rows over again")))
    }
}

impl Rows {
    /// The manifest beside the files.
    pub fn manifest(&self) -> Option<&Manifest> {
        match &self.kind {
            Kind::Files(files) => files.manifest.as_ref(),
            _ => None,
        }
    }

    /// Opens the rows as the library reads them.
    pub fn open(self) -> Result<source::Source> {
        let Rows { kind, name, start, raised } = self;
        Ok(match kind {
            Kind::Files(files) => source::Source::of(&name, files.files)?,
            Kind::Stream(reader) => {
                let path = name.clone();
                let parts = reader.map(move |batch| match batch {
                    Ok(batch) => Ok(Part::Columns(batch)),
                    Err(error) => Err(broken(&path, &error.to_string())),
                });
                source::Source::given(&name, parts).numbered_from(start)
            }
            Kind::Parts(iterator) => {
                let parts = Parts { iterator, name: name.clone(), waiting: Vec::new(), raised };
                source::Source::given(&name, parts).numbered_from(start)
            }
        })
    }
}

fn broken(name: &Path, message: &str) -> Error {
    Error::Source {
        path: name.to_path_buf(),
        message: format!("reading stopped: {message}"),
        help: "the rows come from Python: its own exception says more".into(),
    }
}

/// The parts of a Python iterator. Each is fetched with the interpreter's lock held.
struct Parts {
    iterator: Py<PyAny>,
    name: PathBuf,
    /// Batches of the last part, in reverse.
    waiting: Vec<Part>,
    raised: Raised,
}

impl Parts {
    fn fetch(&mut self, py: Python<'_>) -> PyResult<bool> {
        let Some(part) = self.iterator.bind(py).try_iter()?.next().transpose()? else { return Ok(false) };
        if let Ok(rows) = part.cast::<PyList>() {
            let bytes = |row: Bound<'_, PyAny>| Ok(row.cast::<PyBytes>()?.as_bytes().to_vec());
            self.waiting.push(Part::Json(rows.iter().map(bytes).collect::<PyResult<_>>()?));
        } else {
            self.waiting.extend(arrow::batches(&part)?.into_iter().rev().map(Part::Columns));
        }
        Ok(true)
    }
}

impl Iterator for Parts {
    type Item = Result<Part>;

    fn next(&mut self) -> Option<Result<Part>> {
        loop {
            if let Some(part) = self.waiting.pop() {
                return Some(Ok(part));
            }
            match Python::attach(|py| self.fetch(py)) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    let text = Python::attach(|py| error.value(py).to_string());
                    *self.raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return Some(Err(broken(&self.name, &text)));
                }
            }
        }
    }
}
