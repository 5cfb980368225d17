//! `metrics.jsonl`: one line per logged step and per evaluation.

use crate::{Error, Evaluation, Result};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A logged step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRecord {
    /// The step, counted from 1.
    pub step: u64,
    /// Passes over the rows after this step.
    pub epoch: f64,
    /// `Σ w·nll / Σ w` over the step's targets, before the update; `None` if their weights sum to zero.
    pub loss: Option<f64>,
    /// The learning rate of the update.
    pub learning_rate: f64,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Targets of the step.
    pub targets: u64,
    /// Tokens of the step.
    pub tokens: u64,
    /// Tokens per second of training since the previous line.
    pub tokens_per_second: f64,
    /// Peak memory of the process so far.
    pub peak_memory_bytes: Option<u64>,
}

/// An evaluation during training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalRecord {
    /// Steps finished before the evaluation.
    pub step: u64,
    /// Mean nll of the held-out targets in nats.
    pub eval_loss: f64,
    /// The loss per section, over every token of the held-out rows.
    pub eval_sections: IndexMap<String, SectionRecord>,
}

/// A section in an [`EvalRecord`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SectionRecord {
    /// Tokens measured.
    pub targets: u64,
    /// Their mean nll in nats.
    pub loss: f64,
}

impl EvalRecord {
    /// The record of an evaluation after `step` steps.
    pub fn new(step: u64, evaluation: &Evaluation) -> EvalRecord {
        let section = |(name, s): (&String, &crate::evaluate::SectionLoss)| {
            (name.clone(), SectionRecord { targets: s.targets, loss: s.loss })
        };
        EvalRecord {
            step,
            eval_loss: evaluation.loss,
            eval_sections: evaluation.sections.iter().map(section).collect(),
        }
    }
}

/// A line of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Record {
    /// A logged step.
    Step(StepRecord),
    /// An evaluation.
    Eval(EvalRecord),
}

/// The file and its lines.
pub(crate) struct Log {
    path: PathBuf,
    /// Open for appending; `None` before [`Log::start`].
    file: Option<File>,
    pub(crate) records: Vec<Record>,
}

impl Log {
    /// The lines of a checkpoint (none for a new run), without a file yet.
    pub(crate) fn new(path: PathBuf, records: Vec<Record>) -> Log {
        Log { path, file: None, records }
    }

    /// Starts the file with the lines so far. Lines that a killed run wrote after its last checkpoint are dropped,
    /// because these steps are computed again.
    pub(crate) fn start(&mut self) -> Result<()> {
        let path = &self.path;
        suasion_files::write_bytes(path, self.text().as_bytes())?;
        let file = File::options().append(true).open(path).map_err(|source| Error::io(path, source))?;
        self.file = Some(file);
        Ok(())
    }

    pub(crate) fn push(&mut self, record: Record) -> Result<()> {
        if let Some(file) = &mut self.file {
            file.write_all(line(&record).as_bytes()).map_err(|source| Error::io(&self.path, source))?;
        }
        self.records.push(record);
        Ok(())
    }

    pub(crate) fn text(&self) -> String {
        self.records.iter().map(line).collect()
    }

    pub(crate) fn steps(&self) -> impl Iterator<Item = &StepRecord> {
        self.records.iter().filter_map(|record| match record {
            Record::Step(step) => Some(step),
            Record::Eval(_) => None,
        })
    }

    pub(crate) fn evals(&self) -> impl Iterator<Item = &EvalRecord> {
        self.records.iter().filter_map(|record| match record {
            Record::Eval(eval) => Some(eval),
            Record::Step(_) => None,
        })
    }
}

fn line(record: &Record) -> String {
    serde_json::to_string(record).expect("records are plain data") + "\n"
}

/// Reads a file of records.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|error| {
            let message = format!("line {}: {error}", i + 1);
            Error::io(path, std::io::Error::new(std::io::ErrorKind::InvalidData, message))
        })
    };
    text.lines().enumerate().map(parse).collect()
}
