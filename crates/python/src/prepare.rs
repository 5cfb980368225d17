//! `suasion.prepare`.

use crate::arrow::Stream;
use crate::error::raised;
use crate::folder::{Model, choices};
use crate::input::Source;
use crate::job;
use pyo3::prelude::*;
use suasion_cli::embed::Problem;
use suasion_data::prepared::{self, prepare_rows};
use suasion_data::{Pipeline, source};

/// Prepared rows.
#[pyclass(frozen, module = "suasion._suasion")]
pub struct Prepared(prepared::Prepared);

/// Prepares rows. Returns them, and notes on keys that change nothing.
#[pyfunction]
pub fn prepare(
    py: Python<'_>,
    rows: &Source,
    model: &Model,
    keys: &str,
    with_text: bool,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<(Prepared, Vec<String>)> {
    let chosen = choices(keys, "prepare", "prepare").map_err(|problem| raised(py, &problem))?;
    let rows = rows.take(py)?;
    let (name, exceptions) = (rows.name.clone(), rows.raised.clone());
    let pipeline = Pipeline { keep_text: with_text, ..Pipeline::new(model.0.clone(), chosen.policy) };
    let prepared = job::run(py, progress, &exceptions, move |watch| {
        let rows = rows.open()?;
        prepare_rows(&pipeline, rows, &name, |progress| watch.goes_on(progress)).map_err(Problem::from)
    })?;
    Ok((Prepared(prepared), chosen.notes))
}

#[pymethods]
impl Prepared {
    fn __len__(&self) -> usize {
        self.0.batches.iter().map(|batch| batch.num_rows()).sum()
    }

    /// A row as JSON; None where there is none of that number.
    fn row(&self, mut index: usize) -> Option<String> {
        for batch in &self.0.batches {
            if index < batch.num_rows() {
                let fields = source::fields(batch, index).unwrap_or_default();
                return serde_json::to_string(&fields).ok();
            }
            index -= batch.num_rows();
        }
        None
    }

    /// The names of the columns.
    #[getter]
    fn column_names(&self) -> Vec<String> {
        self.0.schema.fields().iter().map(|field| field.name().clone()).collect()
    }

    /// The manifest as JSON.
    #[getter]
    fn manifest(&self) -> String {
        serde_json::to_string(&self.0.manifest).unwrap_or_default()
    }

    /// The findings, as row, code, level and message.
    #[getter]
    fn findings(&self) -> Vec<(u64, &'static str, String, String)> {
        self.0.findings.iter().map(crate::view::finding).collect()
    }

    /// The rows as a stream, which shares their memory.
    fn stream(&self) -> Stream {
        Stream { schema: self.0.schema.clone(), batches: self.0.batches.clone() }
    }
}
