//! What a run takes and what it reports.

use crate::model_files::{ModelFiles, OutputFile};
use crate::report::data::DataCard;
use crate::{EvalRecord, Evaluation, Plan, Settings, StepRecord};
use serde::Serialize;
use std::path::{Path, PathBuf};
use suasion_data::{Objective, Sample};
use suasion_engine::{Backend, Model};

/// What a run is about; every checkpoint records it, and a run resumes only under its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Which tokens are learned.
    pub objective: Objective,
    /// Fingerprint of source, tokenizer, template and policy.
    pub data_fingerprint: String,
    /// Version of the rules that made the labels.
    pub masking_version: u32,
}

/// Whether a run continues another one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// A new run.
    #[default]
    No,
    /// The newest usable checkpoint of the output folder.
    Newest,
    /// This `checkpoint-N` folder; or a run's output folder, whose newest usable checkpoint is taken.
    From(PathBuf),
}

/// Everything that a run needs.
pub struct Run<'a, B: Backend> {
    /// The model, built with [`Plan::budget`] and with its starting weights (a resume loads the checkpoint's).
    pub model: &'a mut Model<B>,
    /// Training rows.
    pub train: &'a [Sample],
    /// Held-out rows; may be empty.
    pub eval: &'a [Sample],
    /// The settings.
    pub settings: &'a Settings,
    /// What the run is about.
    pub identity: &'a Identity,
    /// What the reports say of the data.
    pub card: &'a DataCard,
    /// Configuration and tokenizer files for every checkpoint and the final model.
    pub files: &'a ModelFiles,
    /// Written into the output folder at the start (the resolved configuration).
    pub extra: &'a [OutputFile],
    /// Where everything goes.
    pub output_dir: &'a Path,
    /// Whether it continues another run.
    pub resume: Resume,
    /// Allow an output folder that is not empty: the checkpoints, metrics and reports of the run that was there are
    /// removed, other files stay.
    pub overwrite: bool,
}

/// The evaluation with the lowest loss after the first step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Best {
    /// Its step.
    pub step: u64,
    /// Its loss.
    pub loss: f64,
    /// The checkpoint of that step, where there is one.
    pub checkpoint: Option<PathBuf>,
}

/// What a run did.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// True where the stop flag ended it; it can be resumed.
    pub interrupted: bool,
    /// Steps finished.
    pub step: u64,
    /// Steps planned.
    pub total_steps: u64,
    /// Passes over the rows.
    pub epoch: f64,
    /// The model's parameters.
    pub parameters: u64,
    /// The plan.
    pub plan: Plan,
    /// The evaluation before the first step.
    pub before: Option<Evaluation>,
    /// The evaluation of the weights that were saved.
    pub after: Option<Evaluation>,
    /// The best evaluation.
    pub best: Option<Best>,
    /// The step whose weights are the final model: the last, or the best where that was asked for.
    pub final_step: u64,
    /// The logged steps.
    pub steps: Vec<StepRecord>,
    /// The evaluations.
    pub evals: Vec<EvalRecord>,
    /// Tokens computed in training, over all resumes.
    pub tokens: u64,
    /// Targets learned, over all resumes.
    pub targets: u64,
    /// Steps that changed nothing because no token in them was supervised.
    pub skipped_steps: u64,
    /// Mean of the steps' losses.
    pub train_loss: Option<f64>,
    /// Time spent in steps, over all resumes.
    pub seconds: f64,
    /// The process's peak.
    pub peak_memory_bytes: Option<u64>,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// The output folder.
    pub output_dir: PathBuf,
    /// What the user should know.
    pub warnings: Vec<String>,
}
