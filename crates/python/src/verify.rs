//! `suasion.verify`.

use crate::error::raised;
use crate::folder::Model;
use crate::input::Source;
use crate::job;
use crate::pipeline::{Looks, looks};
use crate::view::{Row, row};
use pyo3::prelude::*;
use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;
use suasion_cli::embed::Problem;
use suasion_data::report::html::{self, Verified};
use suasion_data::report::terminal::{self, Style};
use suasion_data::report::{self, Chosen, Findings, Gallery, sarif};
use suasion_data::{Code, Error, Finding, Level, Pipeline, Reference, RowId, Summary, source};

/// What was found in rows.
#[pyclass(frozen, module = "suasion._suasion")]
pub struct Verification {
    name: PathBuf,
    summary: Summary,
    /// The findings, in the order of the rows.
    findings: Vec<Noted>,
    /// Codes whose errors are allowed.
    allowed: Vec<Code>,
    /// The rows of a page, and its line about the rest.
    gallery: Gallery,
    pipeline: Pipeline,
    prepared: bool,
}

/// A finding with its place.
struct Noted {
    id: RowId,
    /// The hash of the row's content.
    content: u64,
    finding: Finding,
}

/// The rows that a page shows first.
const FIRST: u64 = 3;

/// Verifies rows. `source` has the rows that they were made from, twice: they are read once for each boundary. Returns
/// what was found, and notes for the caller.
#[pyfunction]
pub fn verify(
    py: Python<'_>,
    rows: &Source,
    source: Vec<PyRef<'_, Source>>,
    model: Option<&Model>,
    keys: &str,
    select: Vec<String>,
    ignore: Vec<String>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<(Verification, Vec<String>)> {
    let rows = rows.take(py)?;
    let (name, exceptions) = (rows.name.clone(), rows.raised.clone());
    let made = looks(model, keys, &rows, select, ignore);
    let Looks { mut pipeline, allowed, notes } = made.map_err(|problem| raised(py, &problem))?;
    let prepared = rows.manifest().is_some();
    let mut again = Vec::with_capacity(source.len());
    for source in source {
        let mut rows = source.take(py)?;
        // What either iterator raises is raised again.
        rows.raised = exceptions.clone();
        again.push(rows);
    }
    let verification = job::run(py, progress, &exceptions, move |watch| {
        if !again.is_empty() {
            let again = RefCell::new(again);
            let open = || match again.borrow_mut().pop() {
                Some(rows) => rows.open(),
                None => Ok(source::Source::given("source", std::iter::empty())),
            };
            let reference = Reference::read_while(&pipeline, open, |progress| watch.goes_on(progress))?;
            pipeline.reference = Some(Arc::new(reference));
        }
        let mut findings = Vec::new();
        let mut gallery = Gallery::new(0..FIRST, None);
        let mut outcomes = pipeline.rows(rows.open()?)?;
        while let Some(outcome) = outcomes.next() {
            let outcome = outcome?;
            if !outcome.findings().is_empty() {
                let (id, content) = (outcome.id(), report::content(&outcome));
                let noted = |finding: &Finding| Noted { id: id.clone(), content, finding: finding.clone() };
                findings.extend(outcome.findings().iter().map(noted));
            }
            gallery.add(outcome);
            if !watch.goes_on(outcomes.progress()) {
                let message = "nothing is kept of it".into();
                return Err(Problem::from(Error::Interrupted { path: name, message }));
            }
        }
        let summary = outcomes.into_summary();
        Ok(Verification { name, summary, findings, allowed, gallery, pipeline, prepared })
    })?;
    Ok((verification, notes))
}

#[pymethods]
impl Verification {
    /// False if a finding is an error that is not allowed.
    #[getter]
    fn ok(&self) -> bool {
        let mut found = self.summary.findings.iter();
        !found.any(|(code, found)| found.level == Level::Error && !self.allowed.contains(code))
    }

    /// Codes whose errors are allowed.
    #[getter]
    fn allowed(&self) -> Vec<&'static str> {
        self.allowed.iter().map(|code| code.as_str()).collect()
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
        self.findings.iter().map(|noted| crate::view::finding(&noted.finding)).collect()
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
        let mut located = Findings::default();
        let text =
            self.findings.iter().try_for_each(|noted| located.push(&noted.id, noted.content, &noted.finding));
        let text = text.and_then(|()| {
            let log = serde_json::to_string(&sarif::log(&self.summary, &located));
            log.map_err(|error| Error::io(std::env::temp_dir(), error.into()))
        });
        text.map_err(|error| raised(py, &error.into()))
    }

    /// Looks at row number `number` of the same rows, as they were looked at.
    fn look(&self, py: Python<'_>, rows: &Source, number: u64) -> PyResult<Row> {
        row(py, rows.take(py)?, self.pipeline.clone(), number)
    }

    /// A page of what was found, with these rows first.
    fn html(&self, rows: Vec<PyRef<'_, Row>>) -> String {
        let tokenizer = self.pipeline.folder.tokenizer.as_deref();
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
            objective: self.pipeline.policy.objective,
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
