//! `suasion.verify`.

use crate::error::raised;
use crate::folder::Model;
use crate::input::Source;
use crate::job;
use crate::pipeline::pipeline;
use crate::view::Row;
use pyo3::prelude::*;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use suasion_cli::embed::Problem;
use suasion_data::report::html::{self, Verified};
use suasion_data::report::terminal::{self, Style};
use suasion_data::report::{Chosen, Findings, Gallery, sarif};
use suasion_data::{Error, Finding, ModelFolder, Objective, RowId, Summary};

/// What was found in rows.
#[pyclass(frozen, module = "suasion._suasion")]
pub struct Verification {
    name: PathBuf,
    summary: Summary,
    findings: Vec<Finding>,
    /// The findings with their places.
    located: Mutex<Findings>,
    /// The rows of a page, and what it says of the rest.
    gallery: Gallery,
    folder: Arc<ModelFolder>,
    objective: Objective,
    prepared: bool,
}

/// The rows that a page shows first.
const FIRST: u64 = 3;

/// Verifies rows. Returns what was found, and notes on keys that change nothing.
#[pyfunction]
pub fn verify(
    py: Python<'_>,
    rows: &Source,
    model: Option<&Model>,
    keys: &str,
    select: Vec<String>,
    ignore: Vec<String>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<(Verification, Vec<String>)> {
    let rows = rows.take(py)?;
    let (name, exceptions) = (rows.name.clone(), rows.raised.clone());
    let made = pipeline(model, keys, &rows, select, ignore);
    let (pipeline, notes) = made.map_err(|problem| raised(py, &problem))?;
    let prepared = rows.manifest().is_some();
    let verification = job::run(py, progress, &exceptions, move |watch| {
        let (folder, objective) = (pipeline.folder.clone(), pipeline.policy.objective);
        let (mut findings, mut located) = (Vec::new(), Findings::default());
        let mut gallery = Gallery::new(0..FIRST, None);
        let mut outcomes = pipeline.rows(rows.open()?)?;
        while let Some(outcome) = outcomes.next() {
            let outcome = outcome?;
            located.add(&outcome)?;
            findings.extend_from_slice(outcome.findings());
            gallery.add(outcome);
            if !watch.goes_on(outcomes.progress()) {
                let message = "nothing is kept of it".into();
                return Err(Problem::from(Error::Interrupted { path: name, message }));
            }
        }
        let (summary, located) = (outcomes.into_summary(), located.into());
        Ok(Verification { name, summary, findings, located, gallery, folder, objective, prepared })
    })?;
    Ok((verification, notes))
}

#[pymethods]
impl Verification {
    /// False where a finding is an error.
    #[getter]
    fn ok(&self) -> bool {
        !self.summary.has_errors()
    }

    /// The name of the rows.
    #[getter]
    fn name(&self) -> String {
        self.name.display().to_string()
    }

    /// Why the turns of the chat template were not looked for in tokens.
    #[getter]
    fn no_turns(&self) -> Option<String> {
        self.summary.no_turns.clone()
    }

    /// The rows in numbers, as JSON.
    #[getter]
    fn summary(&self) -> String {
        serde_json::to_string(&self.summary).unwrap_or_default()
    }

    /// Name, tokens, and share of the loss before and after masking of each section.
    #[getter]
    fn sections(&self) -> Vec<(&'static str, u64, f64, f64)> {
        let section = |name| (self.summary.share_before(name), self.summary.share_after(name));
        self.summary
            .sections()
            .map(|(name, stats)| {
                let (before, after) = section(name);
                (name, stats.tokens, before, after)
            })
            .collect()
    }

    /// The findings, as row, code, level and message.
    #[getter]
    fn findings(&self) -> Vec<(u64, &'static str, String, String)> {
        self.findings.iter().map(crate::view::finding).collect()
    }

    /// How often each code was found, by code.
    #[getter]
    fn counts(&self) -> Vec<(&'static str, u64)> {
        self.summary.findings.iter().map(|(code, found)| (code.as_str(), found.count)).collect()
    }

    /// The summary as the command line shows it.
    #[pyo3(signature = (color=false, width=100))]
    fn text(&self, color: bool, width: usize) -> String {
        terminal::summary(&self.summary, &Style { color, width: width.max(20), ..Style::default() })
    }

    /// The findings as SARIF, in JSON.
    fn sarif(&self, py: Python<'_>) -> PyResult<String> {
        let located = self.located.lock().unwrap_or_else(PoisonError::into_inner);
        serde_json::to_string_pretty(&sarif::log(&self.summary, &located)).map_err(|error| {
            let problem = Problem::from(Error::io(std::env::temp_dir(), error.into()));
            raised(py, &problem)
        })
    }

    /// A page of what was found, with these rows first.
    fn html(&self, rows: Vec<PyRef<'_, Row>>) -> String {
        let tokenizer = self.folder.tokenizer.as_deref();
        let first: Vec<RowId> = rows.iter().map(|row| row.0.id.clone()).collect();
        let asked = rows.iter().map(|row| Chosen { view: row.0.clone(), why: String::new(), asked: true });
        let mut others = self.gallery.chosen(tokenizer);
        others.retain(|row| !first.contains(&row.view.id));
        html::page(&Verified {
            name: self.name.display().to_string(),
            summary: &self.summary,
            gallery: &self.gallery,
            rows: asked.chain(others).collect(),
            losses: None,
            objective: self.objective,
            // Rows that a program has in memory have no name that a command line could use.
            flags: match self.name.exists() {
                true => vec!["--data".into(), self.name.display().to_string()],
                false => Vec::new(),
            },
            prepared: self.prepared,
            tokenizer: tokenizer.is_some(),
        })
    }
}
