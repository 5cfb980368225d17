//! The inputs and the report of a run.

use crate::divergence::Divergence;
use crate::model_files::{ModelFiles, OutputFile};
use crate::report::data::DataCard;
use crate::{EvalRecord, Evaluation, Plan, Settings, StepRecord};
use serde::Serialize;
use std::path::{Path, PathBuf};
use suasion_data::{Objective, Sample};
use suasion_engine::{Backend, Collective, Model};
use suasion_files::Lock;

/// The objective and the data of a run. Every checkpoint records them, and a run resumes only with the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Which tokens are learned.
    pub objective: Objective,
    /// Fingerprint of source, tokenizer, template and policy.
    pub data_fingerprint: String,
    /// Version of the labelling rules.
    pub masking_version: u32,
}

/// Whether a run continues a checkpoint.
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

/// The inputs of a run.
pub struct Run<'a, B: Backend> {
    /// The model, built with [`Plan::budget`], with its starting weights (a resume replaces them by the
    /// checkpoint's).
    pub model: &'a mut Model<B>,
    /// Training rows.
    pub train: &'a [Sample],
    /// Held-out rows; may be empty.
    pub eval: &'a [Sample],
    /// The settings.
    pub settings: &'a Settings,
    /// The objective and the data.
    pub identity: &'a Identity,
    /// The description of the data in the reports.
    pub card: &'a DataCard,
    /// Configuration and tokenizer files for every checkpoint and the final model.
    pub files: &'a ModelFiles,
    /// The stop ids that the rows train; the final model's files name them.
    pub stops: &'a [u32],
    /// Turns ids into text, for samples during training; ids are shown where there is no tokenizer.
    pub decode: Option<&'a dyn Fn(&[u32]) -> String>,
    /// Files written into the output folder at the start (the resolved configuration).
    pub extra: &'a [OutputFile],
    /// The folder that gets a TensorBoard event file.
    pub tensorboard: Option<&'a Path>,
    /// The ranks of the run, all of which have the same inputs. The first writes the files.
    pub collective: &'a dyn Collective,
    /// The output folder.
    pub output_dir: &'a Path,
    /// Whether it continues another run.
    pub resume: Resume,
    /// Allow a resume with other data and settings, except the objective: whatever makes it not an exact continuation is a
    /// warning.
    pub extend: bool,
    /// Allow an output folder that is not empty. An earlier run's files are removed once this one has
    /// something to replace them with; other files stay.
    pub overwrite: bool,
    /// The lock of the output folder ([`crate::lock`]); `None` acquires it.
    pub lock: Option<Lock>,
}

/// The best evaluation, by `metric_for_best_model`; that of the start, where training never improved on it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Best {
    /// Its step.
    pub step: u64,
    /// Its loss.
    pub loss: f64,
    /// Its metric.
    pub metric: f64,
    /// The checkpoint of that step, where there is one.
    pub checkpoint: Option<PathBuf>,
}

/// The report of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// True if the stop flag ended the run; it can be resumed.
    pub interrupted: bool,
    /// Steps finished.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Passes over the rows.
    pub epoch: f64,
    /// Number of the model's parameters.
    pub parameters: u64,
    /// The plan.
    pub plan: Plan,
    /// The evaluation before the first step.
    pub before: Option<Evaluation>,
    /// The evaluation of the weights that were saved.
    pub after: Option<Evaluation>,
    /// The best evaluation.
    pub best: Option<Best>,
    /// True if evaluations stopped improving and ended the run (`early_stopping_patience`).
    pub stopped_early: bool,
    /// The step whose weights are the final model: the last, or the best with `load_best_model_at_end`.
    pub final_step: u64,
    /// The logged steps.
    pub steps: Vec<StepRecord>,
    /// The evaluations.
    pub evals: Vec<EvalRecord>,
    /// Tokens computed in training, over all resumes.
    pub tokens: u64,
    /// Targets learned, over all resumes.
    pub targets: u64,
    /// Steps that changed nothing because their targets' weights sum to zero.
    pub skipped_steps: u64,
    /// Mean of the steps' losses.
    pub train_loss: Option<f64>,
    /// Time spent in steps, over all resumes.
    pub seconds: f64,
    /// Peak memory of the process.
    pub peak_memory_bytes: Option<u64>,
    /// The divergence, if there was one.
    pub diverged: Option<Divergence>,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// The output folder.
    pub output_dir: PathBuf,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}
