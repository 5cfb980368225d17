//! `metrics.jsonl`: a line per logged step and per evaluation.

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
    /// Passes over the rows after it.
    pub epoch: f64,
    /// `Σ w·nll / Σ w` over the step's targets, before its update; `None` where the step had no target.
    pub loss: Option<f64>,
    /// The learning rate that it used.
    pub learning_rate: f64,
    /// The gradient's norm before clipping.
    pub grad_norm: f64,
    /// Its targets.
    pub targets: u64,
    /// Its tokens.
    pub tokens: u64,
    /// Tokens per second of training since the line before.
    pub tokens_per_second: f64,
    /// The process's peak so far.
    pub peak_memory_bytes: Option<u64>,
}

/// An evaluation during training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalRecord {
    /// Steps finished before it.
    pub step: u64,
    /// Mean nll over the held-out targets.
    pub eval_loss: f64,
    /// The same per section, over every token of the rows.
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

/// The growing file and its lines.
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    pub(crate) records: Vec<Record>,
}

impl Log {
    /// Starts the file with the lines of a checkpoint (none for a new run): what a killed run wrote after its last
    /// checkpoint goes, because it will be computed again.
    pub(crate) fn start(path: &Path, records: Vec<Record>) -> Result<Log> {
        let text: String = records.iter().map(line).collect();
        suasion_files::write_bytes(path, text.as_bytes())?;
        let file = File::options().append(true).open(path).map_err(|source| Error::io(path, source))?;
        Ok(Log { path: path.to_path_buf(), file, records })
    }

    pub(crate) fn push(&mut self, record: Record) -> Result<()> {
        self.file.write_all(line(&record).as_bytes()).map_err(|source| Error::io(&self.path, source))?;
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
