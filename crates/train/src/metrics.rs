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
    /// Share of the step's targets that the model predicts as the likeliest token; `None` without a target.
    pub mean_token_accuracy: Option<f64>,
    /// Mean entropy in nats of the distributions that they are predicted from.
    pub entropy: Option<f64>,
    /// Load-balancing loss of experts, which `loss` includes with its factor; missing without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aux_loss: Option<f64>,
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
    /// Share of the held-out targets that the model predicts as the likeliest token.
    pub eval_mean_token_accuracy: f64,
    /// Mean entropy in nats of the distributions that they are predicted from.
    pub eval_entropy: f64,
    /// Replies to held-out prompts (`num_samples`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub eval_samples: Vec<SampleRecord>,
}

/// A reply of the model to a held-out prompt, greedy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleRecord {
    /// The row of the held-out data, counted from 0.
    pub row: u64,
    /// Its prompt; token ids where the model has no tokenizer.
    pub prompt: String,
    /// The reply.
    pub reply: String,
    /// The reply of the row.
    pub reference: String,
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
    pub fn new(step: u64, evaluation: &Evaluation, eval_samples: Vec<SampleRecord>) -> EvalRecord {
        let section = |(name, s): (&String, &crate::evaluate::SectionLoss)| {
            (name.clone(), SectionRecord { targets: s.targets, loss: s.loss })
        };
        EvalRecord {
            step,
            eval_loss: evaluation.loss,
            eval_mean_token_accuracy: evaluation.mean_token_accuracy,
            eval_entropy: evaluation.entropy,
            eval_sections: evaluation.sections.iter().map(section).collect(),
            eval_samples,
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
    /// Open for appending; `None` before [`Log::start`], and after a write that failed.
    file: Option<File>,
    /// True after a write that failed: the file lacks lines, or ends within one.
    behind: bool,
    pub(crate) records: Vec<Record>,
}

impl Log {
    /// The lines of a checkpoint (none for a new run), without a file yet.
    pub(crate) fn new(path: PathBuf, records: Vec<Record>) -> Log {
        Log { path, file: None, behind: false, records }
    }

    /// Starts the file with the lines so far. Lines that a killed run wrote after its last checkpoint are dropped,
    /// because these steps are recomputed.
    pub(crate) fn start(&mut self) -> Result<()> {
        let path = &self.path;
        suasion_files::write_bytes(path, self.text().as_bytes())?;
        let file = File::options().append(true).open(path).map_err(|source| Error::io(path, source))?;
        self.file = Some(file);
        self.behind = false;
        Ok(())
    }

    /// Adds a line, to the records in any case, and to the file if it has been started. After a failure the next line
    /// rewrites the file.
    pub(crate) fn push(&mut self, record: Record) -> Result<()> {
        let text = line(&record);
        self.records.push(record);
        if self.behind {
            return self.start();
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        let written = file.write_all(text.as_bytes()).map_err(|source| Error::io(&self.path, source));
        if written.is_err() {
            (self.file, self.behind) = (None, true);
        }
        written
    }

    /// Rewrites the file if it lacks lines.
    pub(crate) fn catch_up(&mut self) -> Result<()> {
        if self.behind { self.start() } else { Ok(()) }
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
