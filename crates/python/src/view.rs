//! A single row: its tokens, and why each is supervised or not.

use crate::error::raised;
use crate::folder::Model;
use crate::input::{Rows, Source};
use crate::job;
use crate::pipeline::looks;
use pyo3::prelude::*;
use suasion_cli::embed::Problem;
use suasion_data::report::RowView;
use suasion_data::report::terminal::{self, Style};
use suasion_data::{Error, Finding, Outcome, Pipeline};

/// A row, token by token.
#[pyclass(frozen, module = "suasion._suasion")]
pub struct Row(pub RowView);

/// A token: index, id, text, supervised, weight, origin, reason.
type Token = (usize, u32, String, bool, f32, &'static str, String);

#[pymethods]
impl Row {
    /// The number of the row.
    #[getter]
    fn number(&self) -> u64 {
        self.0.id.row
    }

    /// Its tokens.
    #[getter]
    fn tokens(&self) -> Vec<Token> {
        let mut tokens = Vec::with_capacity(self.0.tokens);
        for run in self.0.runs.iter().filter(|run| !run.cut) {
            let (origin, reason) = (run.origin.name(), run.reason());
            for token in &run.tokens {
                let learned = run.weight != 0.0;
                tokens.push((
                    token.index,
                    token.id,
                    token.text.clone(),
                    learned,
                    run.weight,
                    origin,
                    reason.clone(),
                ));
            }
        }
        tokens
    }

    /// The text that is learned, a string for each run of tokens.
    #[getter]
    fn learned(&self) -> Vec<String> {
        self.0.learned().map(|run| run.text.clone()).collect()
    }

    /// Its findings, as row, code, level and message.
    #[getter]
    fn findings(&self) -> Vec<(u64, &'static str, String, String)> {
        self.0.findings.iter().map(finding).collect()
    }

    /// The row as the command line shows it.
    #[pyo3(signature = (color=false, width=100, ids=false))]
    fn text(&self, color: bool, width: usize, ids: bool) -> String {
        terminal::row(&self.0, &Style { color, width: width.max(20), ids, origins: ids })
    }
}

/// A finding as Python takes it.
pub fn finding(finding: &Finding) -> (u64, &'static str, String, String) {
    (finding.row, finding.code.as_str(), finding.level.to_string(), finding.message.clone())
}

/// Looks at row number `number` of rows. A row that has no tokens is an error with its reason.
#[pyfunction]
pub fn look(py: Python<'_>, rows: &Source, model: Option<&Model>, keys: &str, number: u64) -> PyResult<Row> {
    let rows = rows.take(py)?;
    let looks = looks(model, keys, &rows, Vec::new(), Vec::new()).map_err(|problem| raised(py, &problem))?;
    row(py, rows, looks.pipeline, number)
}

/// The same with a pipeline that is known.
pub fn row(py: Python<'_>, rows: Rows, mut pipeline: Pipeline, number: u64) -> PyResult<Row> {
    let (name, exceptions) = (rows.name.clone(), rows.raised.clone());
    pipeline.keep_text = true;
    job::run(py, None, &exceptions, move |_| {
        let mut rows = rows.open()?;
        let processor = pipeline.processor()?;
        while let Some(raw) = rows.next_row()? {
            if raw.id.row != number {
                continue;
            }
            return match processor.raw_row(raw)? {
                Outcome::Kept(kept) => Ok(Row(RowView::new(&kept, pipeline.folder.tokenizer.as_deref()))),
                Outcome::Failed { error, .. } => Err(error.into()),
                Outcome::Dropped { id, reason, findings } => {
                    let why = findings.first().map_or(reason.meaning().to_string(), |f| f.message.clone());
                    Err(Error::row(id, why, "nothing of the row is learned: look at its source").into())
                }
            };
        }
        let message = format!("there is no row {number}");
        let help = "rows are counted from 0".into();
        Err(Problem::from(Error::Source { path: name, message, help }))
    })
}
